"""How integers lie in an ONNX file as operators read them, in both directions.

All layouts hold the same numbers (``Quantized``: integers (in, out), scales (groups, out)):

* **MatMulNBits** (com.microsoft): ``B`` uint8 (out, blocks, block·bits/8), row n is output n, the last block
  filled up with the integer zero; unsigned codes ``integer + 2**(bits-1)``, lowest bits first::

      4 bits, byte j of a block:   code[2j] | code[2j+1] << 4
      2 bits, byte j of a block:   code[4j] | code[4j+1] << 2 | code[4j+2] << 4 | code[4j+3] << 6

  scales (out, blocks). Without a zero point the runtime subtracts 2**(bits-1), so an integer zero is exactly 0.
* **GatherBlockQuantized** (com.microsoft): the same bytes seen as a table (out, blocks·block·bits/8), one row
  per token. A tied table is therefore stored once, under two shapes.
* **DequantizeLinear**, blocked along axis 0: signed two's complement (in, out) row by row, two per byte at
  4 bits, low half first; scales (blocks, out). No padding.

`compot_deploy.exporters.onnx.packed_codes` has two that are smaller, `compot_deploy.exporters.bnb4` bitsandbytes'.

Sources: the ONNX Runtime contrib operator documentation; the ONNX operator specification, opset 21 (int4
storage, blocked quantization).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float16, Int8, UInt8
from torch import Tensor

from compot_deploy.core.bits import check_range, join_codes, split_codes
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized

QDQ_BITS: Final = (4, 8)
"""Bits that DequantizeLinear has types for at opset 21. ONNX Runtime fuses 4 bits with the product from 1.23 on,
8 bits from 1.25 on; before that 8 bits are computed in float32, exactly and slowly."""


@dataclass(frozen=True)
class NBits:
    """A matrix as MatMulNBits and GatherBlockQuantized read it.

    Attributes:
        blob: unsigned codes, packed.
        scales: one per output and block.
    """

    blob: UInt8[Tensor, "outputs blocks bytes"]
    scales: Float16[Tensor, "outputs blocks"]

    @property
    def table(self) -> UInt8[Tensor, "outputs row_bytes"]:
        """The same bytes as a table of rows, for GatherBlockQuantized."""
        return self.blob.view(self.blob.shape[0], -1)


@dataclass(frozen=True)
class Blocked:
    """A matrix as a blocked DequantizeLinear reads it.

    Attributes:
        data: signed integers (in, out) row by row; at 4 bits two per byte, a last half byte zero.
        scales: one per block and output.
    """

    data: UInt8[Tensor, " bytes"]
    scales: Float16[Tensor, "blocks outputs"]


def pack_nbits(matrix: Quantized) -> NBits:
    """Pack for MatMulNBits; `unpack_nbits` is its inverse.

    Example:
        Integers (0, 1, -8, 7) of one output, 4 bits: codes 8, 9, 0, 15, bytes 0x98 and 0xf0.

    Raises:
        ValueError: an integer lies outside its grid, or a block does not fill whole bytes.
    """
    grid = matrix.grid
    rows, outputs = matrix.shape
    blocks = grid.groups(rows)
    if grid.group * grid.bits % 8:
        raise ValueError(f"A block of {grid.group} {grid.bits}-bit integers does not fill whole bytes.")
    _check_integers(matrix)
    zero = 2 ** (grid.bits - 1)
    codes = torch.full((outputs, blocks * grid.group), zero, dtype=torch.uint8, device=matrix.integers.device)
    # An int8 seen as uint8 and raised by the zero point wraps around to the unsigned code. In place: this may
    # be the embedding of a large vocabulary.
    codes[:, :rows] = matrix.integers.T.view(torch.uint8)
    codes[:, :rows] += zero
    blob = join_codes(codes.view(outputs, blocks, -1), grid.bits)
    return NBits(blob=blob, scales=matrix.scales.T.contiguous())


def unpack_nbits(packed: NBits, rows: int, grid: Grid) -> Quantized:
    """Read what `pack_nbits` wrote.

    Args:
        packed: as stored.
        rows: inputs, without the padding of the last block.
        grid: bits and group.

    Raises:
        ValueError: the bytes do not have the size that `rows` and `grid` say.
    """
    outputs, blocks, size = packed.blob.shape
    if blocks != grid.groups(rows) or size * 8 != grid.group * grid.bits:
        raise ValueError(
            f"{rows} inputs on {grid} take {grid.groups(rows)} blocks of {grid.group * grid.bits // 8} bytes, "
            f"and here are {blocks} of {size}."
        )
    codes = split_codes(packed.blob, grid.bits).view(outputs, -1)[:, :rows]
    integers = (codes - 2 ** (grid.bits - 1)).view(torch.int8)
    return Quantized(integers=integers.T.contiguous(), scales=packed.scales.T.contiguous(), grid=grid)


def pack_blocked(matrix: Quantized) -> Blocked:
    """Pack for DequantizeLinear with 4 or 8 bits; `unpack_blocked` is its inverse.

    Raises:
        ValueError: an integer lies outside its grid, or the format has no type of these bits.
    """
    bits = matrix.grid.bits
    if bits not in QDQ_BITS:
        raise ValueError(f"DequantizeLinear has no {bits}-bit integers at opset 21; it has 4 and 8.")
    _check_integers(matrix)
    flat = matrix.integers.contiguous().view(-1).view(torch.uint8)
    if bits == 4:
        if flat.numel() % 2:
            flat = torch.cat((flat, flat.new_zeros(1)))
        flat = join_codes(flat & 0x0F, 4)
    return Blocked(data=flat, scales=matrix.scales.contiguous())


def unpack_blocked(packed: Blocked, rows: int, grid: Grid) -> Quantized:
    """Read what `pack_blocked` wrote; see `unpack_nbits` for the arguments.

    Raises:
        ValueError: the bytes do not have the size that `rows` and `grid` say.
    """
    outputs = packed.scales.shape[1]
    expected = -(-rows * outputs * grid.bits // 8)
    if packed.data.numel() != expected or packed.scales.shape[0] != grid.groups(rows):
        raise ValueError(
            f"{rows} x {outputs} integers on {grid} take {expected} bytes and {grid.groups(rows)} rows of "
            f"scales, and here are {packed.data.numel()} and {packed.scales.shape[0]}."
        )
    flat = packed.data
    if grid.bits == 4:
        nibbles = split_codes(flat, 4)[: rows * outputs]
        flat = (nibbles ^ 0x08) - 0x08  # two's complement: the top bit counts -8
    integers: Int8[Tensor, "inputs outputs"] = flat.view(torch.int8).view(rows, outputs)
    return Quantized(integers=integers.contiguous(), scales=packed.scales.contiguous(), grid=grid)


def _check_integers(matrix: Quantized) -> None:
    if matrix.grid.codebook != "integer":
        raise ValueError(f"{matrix.grid} has a table, and here integers stand for themselves.")
    check_range(matrix)
