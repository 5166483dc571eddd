"""Models of two towers in torch and in onnxruntime: an encoder that reads once, and a decoder that writes on.

The encoder is given sound or text; the decoder writes token by token, through its cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compot_deploy.accuracy.runner import Advance
from compot_deploy.accuracy.texts import TorchTexts
from compot_deploy.accuracy.transcripts import written
from compot_deploy.errors import ArtifactError, first_line
from compot_deploy.exporters.onnx.interface import MASK
from compot_deploy.models.cache import cache_argument, cache_of
from compot_deploy.models.tasks import Batch, Utterance
from compot_deploy.models.writing import Writer


class TorchTowers(TorchTexts):
    """A model of transformers."""

    def write(self, utterance: Utterance, writer: Writer) -> tuple[int, ...]:
        """See `TowersRunner.write`."""
        return written(self.begun(utterance), utterance, writer)

    def language(self, utterance: Utterance, languages: Sequence[int]) -> int:
        """The most likely of some tokens behind the first one of a transcript."""
        logits, _ = self.begun(utterance)(utterance.tokens[None, :1], None)
        return int(languages[int(logits[0, -1, list(languages)].argmax())])

    def begun(self, utterance: Utterance) -> Advance[Any]:
        """The decoder, whose encoder has read an utterance."""
        device = self._model.device
        with torch.inference_mode():
            heard = self._model.get_encoder()(**{utterance.argument: utterance.features[None].to(device)})

        def advance(tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
            arguments = {cache_argument(self._model): cache, "use_cache": True}
            with torch.inference_mode():
                output = self._model(encoder_outputs=heard, decoder_input_ids=tokens.to(device), **arguments)
            return output.logits, cache_of(output)

        return advance


class OnnxTowers:
    """An exported ONNX folder in onnxruntime: the graphs of the two towers.

    Args:
        folder: the artifact.
        exact: compute every quantized multiplication in float32.
        threads: 0 lets the runtime choose.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ArtifactError: the runtime refuses a file, or it has other inputs than a decoder of ours.
    """

    def __init__(self, folder: Path, *, exact: bool = False, threads: int = 0) -> None:
        from compot_deploy.exporters.onnx.interface import BRANCH
        from compot_deploy.exporters.onnx.session import open_session, runtime_name
        from compot_deploy.exporters.onnx.tensors import TOWERS

        level = 0 if exact else None
        self._encoder, self._decoder = (open_session(folder, level, threads, graph) for graph in TOWERS)
        self.name = runtime_name(level)
        self._folder, self._branch = folder, BRANCH
        inputs = {entry.name: entry for entry in self._decoder.get_inputs()}
        if BRANCH not in inputs:
            raise ArtifactError(f"{folder / TOWERS[1]} has no input {BRANCH}. Export the model again.")
        self._past = {
            name: entry.shape for name, entry in inputs.items() if name.startswith("past_key_values.")
        }
        self._present = [name.replace("past_key_values.", "present.", 1) for name in self._past]
        self._read = [entry.name for entry in self._encoder.get_inputs()]
        self._masked = MASK in inputs

    def outputs(self, batch: Batch) -> Tensor:
        """See `TowersRunner.outputs`."""
        logits, _ = self._advance(self._hear(batch.arguments), batch.arguments["decoder_input_ids"], None)
        return logits

    def write(self, utterance: Utterance, writer: Writer) -> tuple[int, ...]:
        """See `TowersRunner.write`."""
        return written(self.begun(utterance), utterance, writer)

    def begun(self, utterance: Utterance) -> Advance[Mapping[str, np.ndarray]]:
        """The decoder, whose encoder has read an utterance."""
        read = {utterance.argument: utterance.features[None]}
        heard = self._hear(
            {"attention_mask": torch.ones_like(utterance.features[None], dtype=torch.int64)} | read
        )
        return lambda tokens, state: self._advance(heard, tokens, state)

    def _hear(self, arguments: Mapping[str, Tensor]) -> Mapping[str, np.ndarray]:
        """What the decoder is given of the encoder at every step."""
        feed = {name: arguments[name].contiguous().numpy() for name in self._read}
        (states,) = self._run(self._encoder, ["last_hidden_state"], feed)
        masks = {MASK: feed["attention_mask"]} if self._masked else {}
        return {"encoder_hidden_states": states} | masks

    def _advance(
        self, heard: Mapping[str, np.ndarray], tokens: Tensor, past: Mapping[str, np.ndarray] | None
    ) -> tuple[Tensor, Mapping[str, np.ndarray]]:
        """Logits of some tokens, and the cache behind them; what was made of the encoder's output stays as it is."""
        cached = past is not None
        if past is None:
            empty = {name: (len(tokens), shape[1], 0, shape[3]) for name, shape in self._past.items()}
            past = {name: np.zeros(shape, np.float32) for name, shape in empty.items()}
        feed = {
            "input_ids": tokens.contiguous().numpy(),
            self._branch: np.array([cached]),
            **heard,
            **past,
        }
        logits, *present = self._run(self._decoder, ["logits", *self._present], feed)
        after = dict(zip(self._past, present, strict=True))
        if cached:
            after |= {name: value for name, value in past.items() if ".encoder." in name}
        return torch.from_numpy(logits), after

    def _run(self, session: Any, names: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        try:
            found: list[np.ndarray] = session.run(names, dict(feed))
        except Exception as error:  # onnxruntime's own errors share no base class
            raise ArtifactError(f"{self._folder} fails: {first_line(error)}.") from error
        return found
