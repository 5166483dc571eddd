"""An exported ONNX folder, as deployed or with the runtime's approximations switched off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from compot_deploy.accuracy.runner import Choose, continued, greedy, stream
from compot_deploy.core.json_files import read_object
from compot_deploy.errors import ArtifactError, a_few, first_line

if TYPE_CHECKING:
    import onnxruntime


class OnnxRunner:
    """An exported ONNX folder in ONNX Runtime, on the CPU.

    Reads the inputs that every consumer agrees on, ``input_ids``, ``attention_mask``, ``position_ids`` where
    the graph has it, ``past_key_values.{i}.key|value``, and returns ``logits`` and ``present.{i}.key|value``.

    Args:
        folder: holds ``onnx/model.onnx``, ``onnx/model.onnx_data`` and, for the context length,
            ``config.json``.
        accuracy_level: of quantized multiplications: 0 computes in float32, 4 rounds activations to int8.
            None leaves what the file says. Set in memory; no file is changed or written.
        threads: 0 lets the runtime choose.
        name: for reports.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ArtifactError: the folder lacks the model, or the runtime refuses it, or its inputs have other names.
    """

    def __init__(
        self,
        folder: Path,
        accuracy_level: int | None = None,
        *,
        threads: int = 0,
        name: str | None = None,
    ) -> None:
        from compot_deploy.exporters.onnx.session import open_session, runtime_name
        from compot_deploy.exporters.onnx.tensors import GRAPH

        self._path = folder / GRAPH
        self._session: onnxruntime.InferenceSession = open_session(folder, accuracy_level, threads)
        import onnxruntime  # after open_session, which says how to install it where it is missing

        self.name = name or runtime_name(accuracy_level)
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        inputs = {entry.name: entry for entry in self._session.get_inputs()}
        outputs = {entry.name: entry for entry in self._session.get_outputs()}
        self._positions = "position_ids" in inputs
        self._past = [past for past in inputs if past.startswith("past_")]
        self._present = [
            past.replace("past_key_values.", "present.", 1).replace("past_", "present_", 1)
            for past in self._past
        ]
        self._check_names(inputs, outputs)
        self._empty = [_empty_cache(inputs[past], self._path) for past in self._past]
        config = _read_config(folder)
        width = outputs["logits"].shape[-1]
        if not isinstance(width, int):
            width = config.get("vocab_size")
        if not isinstance(width, int):
            raise ArtifactError(
                f"{self._path}: neither the logits nor config.json tell the size of the vocabulary."
            )
        self.vocabulary = width
        context = config.get("max_position_embeddings")
        self.context: int | None = context if isinstance(context, int) else None

    def logits(
        self, tokens: Int64[Tensor, "batch length"], chunk: int
    ) -> Iterator[Float[Tensor, "batch positions vocabulary"]]:
        """See `Runner.logits`."""
        if len(tokens) > 1 and chunk < tokens.shape[1]:
            # GroupQueryAttention continues by several positions at once only in a batch of one.
            rows = [stream(self._advance, row[None], chunk) for row in tokens]
            return (torch.cat(pieces) for pieces in zip(*rows, strict=True))
        return stream(self._advance, tokens, chunk)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        """See `Runner.generate`."""
        return greedy(self._advance, prompt, new_tokens)

    def tokens(
        self, prompt: Sequence[int], choose: Choose | None = None, chunk: int | None = None
    ) -> Iterator[int]:
        """Tokens after a prompt without end, one by one as they are asked for; see `continued`."""
        return continued(self._advance, prompt, choose, chunk)

    def _check_names(self, inputs: Iterable[str], outputs: Iterable[str]) -> None:
        known = {"input_ids", "attention_mask", "position_ids", *self._past}
        for problem, names in (
            ("lacks the inputs", {"input_ids", "attention_mask"} - set(inputs)),
            ("has inputs that are not understood:", set(inputs) - known),
            ("lacks the outputs", {"logits", *self._present} - set(outputs)),
        ):
            if names:
                raise ArtifactError(f"{self._path} {problem} {a_few(sorted(names))}. Export the model again.")
        if not self._past:
            raise ArtifactError(f"{self._path} has no key-value cache: no input past_key_values.0.key.")

    def _advance(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        batch, length = tokens.shape
        past_length, past = state or (0, None)
        if past is None:
            past = [
                self._value(empty.repeat(batch, *[1] * (empty.dim() - 1)).numpy()) for empty in self._empty
            ]
        total = past_length + length
        feed = {
            "input_ids": self._value(tokens.contiguous().numpy()),
            "attention_mask": self._value(torch.ones(batch, total, dtype=torch.int64).numpy()),
            **dict(zip(self._past, past, strict=True)),
        }
        if self._positions:
            positions = torch.arange(past_length, total).repeat(batch, 1)
            feed["position_ids"] = self._value(positions.numpy())
        try:
            logits, *present = self._session.run_with_ort_values(["logits", *self._present], feed)
        except Exception as error:  # see above
            raise ArtifactError(
                f"{self._path} fails at positions {past_length} to {total - 1}: {first_line(error)}."
            ) from error
        return torch.from_numpy(logits.numpy()), (total, present)


def onnx_runner(folder: Path, *, exact: bool = False, threads: int = 0) -> OnnxRunner:
    """An exported ONNX folder: `exact`, the float32 reference, computes every quantized multiplication in float32."""
    return OnnxRunner(folder, 0 if exact else None, threads=threads)


def _empty_cache(entry: Any, path: Path) -> Tensor:
    """A cache of no tokens for one window, (1, heads, 0, head size); states of one size begin with zeros."""
    types = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
    if entry.type not in types:
        raise ArtifactError(f"{path}: {entry.name} is a {entry.type}, not a float or float16 tensor.")
    if not entry.name.startswith("past_key_values.") and all(
        isinstance(size, int) for size in entry.shape[1:]
    ):
        return torch.zeros(1, *entry.shape[1:], dtype=types[entry.type])
    if len(entry.shape) != 4 or not all(isinstance(entry.shape[axis], int) for axis in (1, 3)):
        raise ArtifactError(
            f"{path}: {entry.name} has the shape {entry.shape}, not (batch, heads, past, head size) with "
            "fixed heads and head size."
        )
    return torch.zeros(1, entry.shape[1], 0, entry.shape[3], dtype=types[entry.type])


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_object(path) if path.is_file() else {}
