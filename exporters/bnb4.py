"""bitsandbytes' NF4 and FP4 in bytes, as its own folders and ONNX's MatMulBnb4 (com.microsoft) hold them.

uint8 (out·in/2) output after output, the first of two codes in the high half; scales (out, blocks). Blocks never
cross from one output to the next, because the inputs are a multiple of the block.

Sources: the ONNX Runtime contrib operator documentation; bitsandbytes' documentation of its 4-bit types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from jaxtyping import Float16, UInt8
from torch import Tensor

from compot_deploy.core.bits import check_range
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized

BNB_BLOCKS: Final = (16, 32, 64, 128, 256)
"""Block sizes of MatMulBnb4 that are used here; it takes any power of two from 16 on."""

BNB_TYPES: Final[Mapping[str, int]] = MappingProxyType({"fp4": 0, "nf4": 1})
"""Attribute ``quant_type`` of MatMulBnb4, by codebook."""


@dataclass(frozen=True)
class Bnb4:
    """A matrix of NF4 or FP4.

    Attributes:
        blob: codes of bitsandbytes', two a byte, the first in the high half.
        scales: one per output and block.
    """

    blob: UInt8[Tensor, "outputs blocks bytes"]
    scales: Float16[Tensor, "outputs blocks"]


def pack_bnb4(matrix: Quantized) -> Bnb4:
    """Pack NF4 or FP4; `unpack_bnb4` is its inverse.

    The codes are bitsandbytes': for NF4 ``integer + 7``; for FP4 the integer, or ``8 - integer`` if it is
    negative.

    Raises:
        ValueError: an integer grid, or inputs that are no multiple of the block.
    """
    grid = matrix.grid
    rows, outputs = matrix.shape
    if grid.codebook not in BNB_TYPES or rows % grid.group:
        raise ValueError(f"MatMulBnb4 cannot hold {rows} inputs on {grid}.")
    check_range(matrix)
    integers = matrix.integers.T.contiguous()
    codes = integers + 7 if grid.codebook == "nf4" else torch.where(integers < 0, 8 - integers, integers)
    pairs = codes.to(torch.uint8).view(outputs, rows // grid.group, -1, 2)
    return Bnb4(pairs[..., 0] << 4 | pairs[..., 1], matrix.scales.T.contiguous())


def unpack_bnb4(packed: Bnb4, rows: int, grid: Grid) -> Quantized:
    """Read what `pack_bnb4` wrote; see `pack_bnb4`.

    Args:
        packed: as stored.
        rows: inputs.
        grid: block and codebook.

    Raises:
        ValueError: the bytes do not have the size that `rows` and `grid` say, or hold a negative zero.
    """
    outputs, blocks, size = packed.blob.shape
    if rows % grid.group or blocks * grid.group != rows or size * 2 != grid.group:
        raise ValueError(f"{rows} inputs on {grid} are not {blocks} blocks of {size} bytes.")
    codes = torch.stack((packed.blob >> 4, packed.blob & 15), dim=-1).view(outputs, rows).to(torch.int8)
    if grid.codebook == "nf4":
        integers = codes - 7
    else:
        if bool((codes == 8).any()):
            raise ValueError("There is a negative zero, which is not written here.")
        integers = torch.where(codes < 8, codes, 8 - codes)
    return Quantized(integers.T.contiguous(), packed.scales.T.contiguous(), grid)
