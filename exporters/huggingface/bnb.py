"""A plain model in bitsandbytes' own layout: transformers loads it with nothing but bitsandbytes installed.

For models whose every linear is plain on one grid of bitsandbytes, with floating-point tables::

    4 bits   name.weight uint8 (out·in/2, 1)   the first of two codes in the high half, output after output
             name.weight.absmax float32        one per block
             name.weight.quant_map float32     the table of 16 values
             name.weight.quant_state.bitsandbytes__nf4   uint8, JSON: type, block size, dtype, shape
    int8     name.weight int8 (out, in), name.SCB float32 (out) = 127 · scale, name.weight_format = 0

Scales are float16 numbers, so nothing is rounded. What our types know beyond that, the groups of int8, stands in
config.json under ``compot``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor

from compot_deploy.core.grid import DENSE, Codebook, Grid, Pattern
from compot_deploy.core.matrix import Quantized
from compot_deploy.errors import ArtifactError, RecipeError
from compot_deploy.exporters.bnb4 import Bnb4, pack_bnb4, unpack_bnb4

_STATE: Final = "quant_state.bitsandbytes__"
_FP4_TABLE: Final = (0, 1, 2, 3, 4, 5, 6, 7, 0, -1, -2, -3, -4, -5, -6, -7)
"""Integers by bitsandbytes' code; code 8 is its negative zero."""


@dataclass(frozen=True)
class BnbStorage:
    """Bytes of a leaf in this layout, as `compot_deploy.core.storage.Storage` asks for them."""

    def leaf_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """See `compot_deploy.core.storage.Storage.leaf_bytes`."""
        if grid is None:
            return 4 * rows * columns
        if grid.codebook == "integer":
            return rows * columns * grid.bits // 8 + 4 * columns + 1
        state = len(_state(rows, columns, grid))
        return rows * columns // 2 + 4 * grid.groups(rows) * columns + 64 + state


def quantization_config(grid: Grid, floating: Sequence[str] | None) -> dict[str, Any]:
    """What transformers' BitsAndBytesConfig reads.

    Args:
        grid: of all linears.
        floating: those that stay in floating point; None leaves it to transformers.
    """
    four = grid.codebook != "integer"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": grid.codebook if four else "fp4",
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        # No activation is set apart: what is stored is what is multiplied with.
        "llm_int8_threshold": 0.0,
        "llm_int8_skip_modules": None if floating is None else list(floating),
    }


def tensors_of(name: str, matrix: Quantized) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one linear.

    Raises:
        RecipeError: int8 with more than one scale per output, or a grid that bitsandbytes does not have.
    """
    grid = matrix.grid
    if grid.codebook == "integer":
        if grid.bits != 8 or not torch.equal(matrix.scales, matrix.scales[:1].expand_as(matrix.scales)):
            raise RecipeError(f"{name}: bitsandbytes has int8 with one scale per output, not {grid}.")
        yield f"{name}.weight", matrix.integers.T.contiguous()
        yield f"{name}.SCB", 127.0 * matrix.scales[0].float()
        yield f"{name}.weight_format", torch.tensor(0, dtype=torch.uint8)
        return
    packed = pack_bnb4(matrix)
    yield f"{name}.weight", packed.blob.reshape(-1, 1)
    yield f"{name}.weight.absmax", packed.scales.float().flatten()
    yield f"{name}.weight.quant_map", quant_map(grid.codebook)
    state = _state(*matrix.shape, grid)
    yield f"{name}.weight.{_STATE}{grid.codebook}", torch.tensor(list(state), dtype=torch.uint8)


def matrix_of(name: str, read: Mapping[str, Tensor], shape: tuple[int, int], grid: Grid) -> Quantized:
    """Read what `tensors_of` wrote.

    Args:
        name: module path.
        read: tensors by name.
        shape: (in, out), of the configuration.
        grid: of the configuration.

    Raises:
        ArtifactError: a tensor is missing, or has another size or other contents than written here.
    """
    inputs, outputs = shape
    try:
        if grid.codebook == "integer":
            integers, scale = read[f"{name}.weight"], (read[f"{name}.SCB"] / 127).half()
            if integers.shape != (outputs, inputs) or not torch.equal(
                127.0 * scale.float(), read[f"{name}.SCB"]
            ):
                raise ValueError("another shape, or scales that were not written here")
            scales = scale[None].expand(grid.groups(inputs), outputs).contiguous()
            return Quantized(integers.T.contiguous(), scales, grid)
        state = bytes(read[f"{name}.weight.{_STATE}{grid.codebook}"].tolist())
        if state != _state(inputs, outputs, grid):
            raise ValueError(f"another quant_state: {state.decode(errors='replace')[:80]}")
        blocks = inputs // grid.group
        absmax = read[f"{name}.weight.absmax"].view(outputs, blocks)
        if not torch.equal(absmax.half().float(), absmax):
            raise ValueError("scales that are no float16")
        if not torch.equal(read[f"{name}.weight.quant_map"], quant_map(grid.codebook)):
            raise ValueError("another table")
        blob = read[f"{name}.weight"].view(outputs, blocks, grid.group // 2)
        return unpack_bnb4(Bnb4(blob, absmax.half()), inputs, grid)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{name} is not as compot-deploy writes it: {error}. Export the model again."
        ) from None


def quant_map(codebook: str) -> Tensor:
    """Bitsandbytes' table, by its codes."""
    grid = Grid(4, 64, cast(Codebook, codebook))
    table = grid.table
    assert table is not None
    if codebook == "nf4":
        return torch.tensor(table)
    return torch.tensor([table[integer - grid.lowest] for integer in _FP4_TABLE])


def dequantized(model: Any) -> Any:
    """A loaded model with its linears multiplied out in float32, in place: what its numbers mean, exactly."""
    import bitsandbytes

    for path, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            weight = module.weight.data.float() * (module.weight.SCB.float() / 127)[:, None]
        else:
            continue
        made = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        made.weight = torch.nn.Parameter(weight.float().view(made.weight.shape), requires_grad=False)
        if module.bias is not None:
            made.bias = torch.nn.Parameter(module.bias.float(), requires_grad=False)
        model.set_submodule(path, made)
    return model


def _state(inputs: int, outputs: int, grid: Grid) -> bytes:
    """Bitsandbytes' JSON about a weight; dtype is what it computes in."""
    assert math.prod((inputs, outputs))
    return json.dumps(
        {
            "quant_type": grid.codebook,
            "blocksize": grid.group,
            "dtype": "float32",
            "shape": [outputs, inputs],
        }
    ).encode()
