"""Speech models in torch and in onnxruntime: an encoder that hears once, and a decoder that writes token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compot_deploy.accuracy.texts import TorchTexts
from compot_deploy.accuracy.transcripts import written
from compot_deploy.errors import ArtifactError, first_line
from compot_deploy.models.cache import cache_argument, cache_of
from compot_deploy.models.listening import Listener
from compot_deploy.models.tasks import Batch, Utterance


class TorchSpeech(TorchTexts):
    """A speech model of transformers."""

    def transcribe(self, utterance: Utterance, listener: Listener) -> tuple[int, ...]:
        """See `SpeechRunner.transcribe`."""
        return written(self._decoder(utterance), utterance, listener)

    def language(self, utterance: Utterance, languages: Sequence[int]) -> int:
        """The most likely of some tokens behind the first one of a transcript."""
        logits, _ = self._decoder(utterance)(utterance.tokens[None, :1], None)
        return int(languages[int(logits[0, -1, list(languages)].argmax())])

    def _decoder(self, utterance: Utterance) -> Any:
        device = self._model.device
        with torch.inference_mode():
            heard = self._model.get_encoder()(**{utterance.argument: utterance.features[None].to(device)})

        def advance(tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
            arguments = {cache_argument(self._model): cache, "use_cache": True}
            with torch.inference_mode():
                output = self._model(encoder_outputs=heard, decoder_input_ids=tokens.to(device), **arguments)
            return output.logits, cache_of(output)

        return advance


class OnnxSpeech:
    """An exported ONNX folder of a speech model in onnxruntime: the graphs of its two towers.

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

    def outputs(self, batch: Batch) -> Tensor:
        """See `SpeechRunner.outputs`."""
        (argument,) = (name for name in batch.arguments if name != "decoder_input_ids")
        heard = self._hear(argument, batch.arguments[argument])
        logits, _ = self._advance(heard, batch.arguments["decoder_input_ids"], None)
        return logits

    def transcribe(self, utterance: Utterance, listener: Listener) -> tuple[int, ...]:
        """See `SpeechRunner.transcribe`."""
        heard = self._hear(utterance.argument, utterance.features[None])
        return written(lambda tokens, state: self._advance(heard, tokens, state), utterance, listener)

    def _hear(self, argument: str, features: Tensor) -> np.ndarray:
        return self._run(self._encoder, ["last_hidden_state"], {argument: features.numpy()})[0]

    def _advance(
        self, heard: np.ndarray, tokens: Tensor, past: Mapping[str, np.ndarray] | None
    ) -> tuple[Tensor, Mapping[str, np.ndarray]]:
        """Logits of some tokens, and the cache behind them; what was made of the encoder's output stays as it is."""
        cached = past is not None
        if past is None:
            empty = {name: (len(tokens), shape[1], 0, shape[3]) for name, shape in self._past.items()}
            past = {name: np.zeros(shape, np.float32) for name, shape in empty.items()}
        feed = {
            "input_ids": tokens.contiguous().numpy(),
            "encoder_hidden_states": heard,
            self._branch: np.array([cached]),
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
