"""How a speech model is used: what its encoder is given of a recording, and how its decoder writes a transcript.

Everything is read from the model's own files: preprocessor_config.json (rate, bands, normalization) and
generation_config.json (how a transcript begins and ends, tokens that are never written).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from compot_deploy.errors import InputError, first_line
from compot_deploy.models.audio import Recording
from compot_deploy.models.generation import end_tokens, read_generation
from compot_deploy.models.tasks import Utterance
from compot_deploy.models.writing import Writer, start_token

_SETTINGS: Final = "preprocessor_config.json"
_SECONDS: Final = 30
"""That a model hears at once, where nothing says it."""

_LONGEST: Final = 448
"""Tokens of a transcript, where nothing says it."""


@dataclass(frozen=True)
class Listener(Writer):
    """What stands between sound and a speech model, and how it writes transcripts.

    Attributes:
        rate: samples per second.
        seconds: that are heard at once.
        argument: of the model's forward pass that takes the features.
        extract: samples between -1 and 1 to what the encoder reads.
    """

    rate: int
    seconds: float
    argument: str
    extract: Callable[[np.ndarray], Tensor]

    def features(self, recording: Recording) -> Float[Tensor, "..."]:  # noqa: UP037
        """What the encoder reads."""
        return self.extract(recording.samples.numpy().astype(np.float32) / 32768)

    def utterance(self, recording: Recording, tokens: Sequence[int], given: int) -> Utterance:
        """A recording with its transcript.

        Args:
            recording: at the rate that the model hears.
            tokens: its beginning included, its end not.
            given: how many tokens its beginning has.
        """
        ids = torch.tensor(list(tokens), dtype=torch.int64)
        return Utterance(ids, self.features(recording), given, self.argument)


def load_listener(folder: Path, config: Mapping[str, Any]) -> Listener:
    """The listener of a model folder; code of its own is not run.

    Args:
        folder: of the model.
        config: its config.json.

    Raises:
        InputError: a file is missing or cannot be read.
    """
    if not (folder / _SETTINGS).is_file():
        raise InputError(
            f"{folder} has no {_SETTINGS}, so nobody knows how it hears. Save it with "
            "feature_extractor.save_pretrained(folder)."
        )
    extractor = _extractor(folder)
    generation = read_generation(folder)

    def asked(name: str) -> Any:
        return generation.get(name, config.get(name))

    start = start_token(folder, asked("decoder_start_token_id"))
    languages, beginning = _beginning(start, generation, asked("forced_decoder_ids"))
    limit = config.get("max_target_positions") or config.get("max_position_embeddings") or _LONGEST
    return Listener(
        rate=int(extractor.sampling_rate),
        seconds=float(getattr(extractor, "chunk_length", None) or _SECONDS),
        argument=str(extractor.model_input_names[0]),
        beginning=beginning,
        languages=languages,
        end=frozenset(end_tokens(generation, config)),
        suppressed=tuple(asked("suppress_tokens") or ()),
        suppressed_first=tuple(asked("begin_suppress_tokens") or ()),
        longest=min(int(limit), int(generation.get("max_length") or limit)),
        extract=lambda values: _extracted(extractor, values),
    )


def _beginning(
    start: int, generation: Mapping[str, Any], forced: Sequence[Sequence[int | None]] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Languages to choose from, and the tokens that a transcript begins with."""
    silent = generation.get("no_timestamps_token_id")
    rest = () if silent is None else (int(silent),)
    if generation.get("is_multilingual") and generation.get("lang_to_id"):
        transcribe = (generation.get("task_to_id") or {}).get("transcribe")
        task = () if transcribe is None else (int(transcribe),)
        return tuple(generation["lang_to_id"].values()), (start, *task, *rest)
    known = tuple(int(token) for _, token in forced or () if token is not None)
    return (), (start, *known, *(token for token in rest if token not in known))


def _extractor(folder: Path) -> Any:
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers' own errors share no base class
        raise InputError(f"{folder / _SETTINGS} is not understood ({first_line(error)}).") from None


def _extracted(extractor: Any, values: np.ndarray) -> Tensor:
    found = extractor(values, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    features: Tensor = found[extractor.model_input_names[0]][0]
    return features.float().contiguous()
