"""Tools of somebody who spoils exported folders, and the register of his ways.

Most ways write every hash anew afterwards, of files and of matrices: whoever can change a folder can do that.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from onnx.external_data_helper import load_external_data_for_tensor
from signing import manifest_of, sign_again
from torch import Tensor

from compot_deploy.core.matrix import Matrix, Quantized
from compot_deploy.exporters import EXPORTERS
from compot_deploy.models.compressed import CompressedModel

GRAPH: Final = "onnx/model.onnx"
DATA: Final = "onnx/model.onnx_data"
BLOCK: Final = "model.layers.{}."

Spoil = Callable[[Path], None]
SPOILS: Final[dict[str, Spoil]] = {}
"""What is wrong with the folder afterwards, and what makes it so."""

STRICT: Final[set[str]] = set()
"""Of these, the ones that fail with --strict."""

OWN_LIMITS: Final[set[str]] = set()
"""Of these, the ones that must fail though whoever checks asks for nothing."""


def spoil(what: str, *, strict: bool = False, own_limits: bool = False) -> Callable[[Spoil], Spoil]:
    """Take a function into `SPOILS`."""

    def take(function: Spoil) -> Spoil:
        SPOILS[what] = function
        if strict:
            STRICT.add(what)
        if own_limits:
            OWN_LIMITS.add(what)
        return function

    return take


def rewrite(folder: Path, change: Callable[[CompressedModel], CompressedModel]) -> None:
    """Write the files again of another model, and sign."""
    exporter = EXPORTERS["onnx"]
    model = exporter.read_model(folder)
    held = {name: model.matrices[name] for name in model.matrices}
    changed = change(replace(model, matrices=held, tensors={k: v.clone() for k, v in model.tensors.items()}))
    with tempfile.TemporaryDirectory() as scratch:
        exporter.write(changed, Path(scratch), exporter.options(manifest_of(folder)["recipe"]))
        for name in (GRAPH, DATA):
            shutil.copyfile(Path(scratch) / name, folder / name)
    sign_again(folder)


def with_matrices(change: Callable[[str, Matrix], Matrix]) -> Callable[[CompressedModel], CompressedModel]:
    return lambda model: replace(
        model, matrices={name: change(name, matrix) for name, matrix in model.matrices.items()}
    )


def scaled(matrix: Matrix, factor: float) -> Matrix:
    assert isinstance(matrix, Quantized)
    return Quantized(matrix.integers, (matrix.scales.float() * factor).half(), matrix.grid)


def with_rows(matrix: Matrix, order: Tensor) -> Matrix:
    """Outputs in another order."""
    assert isinstance(matrix, Quantized)
    return Quantized(
        matrix.integers[:, order].contiguous(), matrix.scales[:, order].contiguous(), matrix.grid
    )


def edit_json(
    folder: Path, name: str, change: Callable[[dict[str, Any]], None], *, sign: bool = True
) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    if sign:
        sign_again(folder)


def edit_constants(folder: Path, names: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> None:
    """Change float tensors of the graph in place."""
    model = onnx.load(folder / GRAPH, load_external_data=False)
    data = bytearray((folder / DATA).read_bytes())
    for tensor in model.graph.initializer:
        if tensor.name in names:
            place = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
            load_external_data_for_tensor(tensor, str(folder / "onnx"))
            values = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
            changed = change(values).contiguous().numpy().tobytes()
            data[place["offset"] : place["offset"] + len(changed)] = changed
    (folder / DATA).write_bytes(data)
    sign_again(folder)


def shuffled(length: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(0))
