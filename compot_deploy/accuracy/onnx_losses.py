"""What compression and export did to the outputs of a traced model, measured on texts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from compot_deploy.accuracy.embeddings import Difference, Texts, compare_texts
from compot_deploy.core.matrix import Matrix
from compot_deploy.exporters.onnx.interface import decodes
from compot_deploy.exporters.onnx.matrices import OnnxMatrices
from compot_deploy.exporters.onnx.placeholders import dequantized, matrix_of_module
from compot_deploy.exporters.onnx.session import open_session
from compot_deploy.exporters.onnx.tensors import GRAPH

Batch: TypeAlias = Mapping[str, Tensor]
"""Tokens of some texts: ``input_ids``, ``attention_mask`` and what else the model takes."""


@dataclass(frozen=True)
class Losses:
    """What compression and export did to the outputs, kept apart.

    Attributes:
        method: the original weights against the matrices, both in torch; None without the original.
        export: the matrices in torch against the file as it is shipped.
        export_exact: the same, the file's products computed in float32: rounding, and nothing more.
        total: the original against the file as it is shipped; None without the original.
    """

    method: Difference | None
    export: Difference
    export_exact: Difference
    total: Difference | None


def measure(
    model: nn.Module,
    folder: Path,
    batches: Sequence[Batch],
    matrices: Mapping[str, Matrix] | None = None,
    original: nn.Module | None = None,
    threads: int = 0,
) -> Losses:
    """Hold a folder against the model that it was made from.

    A decoder is read without a past, and its logits take the place of hidden states.

    Args:
        model: what `export` was given.
        folder: what it wrote.
        batches: texts to read, padded on either side.
        matrices: what it returned; None reads them back from the file.
        original: the model before compression; None takes `model`, unless its modules are compressed ones.
        threads: of onnxruntime; 0 leaves it to it.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ArtifactError: onnxruntime refuses the file.
    """
    written = OnnxMatrices(folder / GRAPH) if matrices is None else matrices
    compressed = any(matrix_of_module(module, path) is not None for path, module in model.named_modules())
    before = original if original is not None else None if compressed else model
    shipped, exact = (
        [Texts(run_folder(session, batch), batch["attention_mask"]) for batch in batches]
        for session in (open_session(folder, level, threads) for level in (None, 0))
    )
    with dequantized(model, written):
        reference = [Texts(run_torch(model, batch), batch["attention_mask"]) for batch in batches]
    first = None
    if before is not None:
        first = [Texts(run_torch(before, batch), batch["attention_mask"]) for batch in batches]
    return Losses(
        method=None if first is None else compare_texts(first, reference),
        export=compare_texts(reference, shipped),
        export_exact=compare_texts(reference, exact),
        total=None if first is None else compare_texts(first, shipped),
    )


def run_torch(model: nn.Module, batch: Batch) -> Tensor:
    """The output of a model for a batch: hidden states or logits, (texts, tokens, width)."""
    arguments: dict[str, Tensor] = dict(batch)
    if decodes(model) and "position_ids" in inspect.signature(model.forward).parameters:
        arguments["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        found = model(**arguments)
    output = found.get("logits")
    return found["last_hidden_state"] if output is None else output


def run_folder(session: Any, batch: Batch) -> Tensor:
    """The output of a folder for a batch, from an empty cache where it has one.

    Args:
        session: from `compot_deploy.exporters.onnx.session.open_session`.
        batch: as `run_torch` takes it; token types are 0 where they are asked for and not there.
    """
    rows = len(batch["input_ids"])
    feeds: dict[str, Any] = {}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):
            feeds[entry.name] = torch.zeros(rows, entry.shape[1], 0, entry.shape[3]).numpy()
        else:
            value = batch.get(entry.name)
            feeds[entry.name] = (torch.zeros_like(batch["input_ids"]) if value is None else value).numpy()
    output = session.get_outputs()[0].name
    return torch.from_numpy(session.run([output], feeds)[0])
