"""Integers in fewer bytes than any operator reads; the graph expands them to MatMulNBits' when it is loaded.

* **Two of four**: 4-bit codes of the pattern 2:4. Every four neighbours of an output become the two that may be
  non-zero and where they are::

      values    uint8 (out, groups of four, 1)     code[first] | code[second] << 4
      patterns  UINT4 (out, groups of four, 1)     0 to 5: the row of `POSITIONS` with first and second

  12 bits for four codes instead of 16; rows are filled up to whole blocks, scales are those of MatMulNBits.
  Two kept codes that rounded to zero leave their place open: the first row of `POSITIONS` that covers the
  non-zeros is written, and whichever row a file has, the same integers come out.
* **Three bits**, which no operator reads, expanded to 4 bits::

      number    code[0] | code[1] << 3 | code[2] << 6 | code[3] << 9     of every four neighbours of an output
      values    uint8 (out, groups of four, 1)     number >> 4
      nibbles   UINT4 (out, groups of four, 1)     number & 15

  Codes are ``integer + 4``; in the expanded bytes they are ``integer + 8``, as 4 bits want them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float16, UInt8
from torch import Tensor

from compot_deploy.core.bits import check_range, join_codes, split_codes
from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Quantized
from compot_deploy.exporters.onnx.layouts import NBits, pack_nbits, unpack_nbits

TWO_OF_FOUR: Final = Pattern(2, 4)
"""The only pattern with a packed layout."""

POSITIONS: Final = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""Where the two values of four neighbours are, by pattern number."""


@dataclass(frozen=True)
class TwoOfFour:
    """A matrix with the pattern 2:4, packed.

    Attributes:
        values: two unsigned codes of every four neighbours.
        patterns: their positions, two numbers a byte, low half first.
        scales: one per output and block.
    """

    values: UInt8[Tensor, "outputs groups 1"]
    patterns: UInt8[Tensor, " bytes"]
    scales: Float16[Tensor, "outputs blocks"]


@dataclass(frozen=True)
class ThreeBits:
    """A matrix of 3-bit integers, packed.

    Attributes:
        values: high 8 of the 12 bits of every four neighbours.
        nibbles: low 4 of them, two a byte, low half first.
        scales: one per output and block.
    """

    values: UInt8[Tensor, "outputs groups 1"]
    nibbles: UInt8[Tensor, " bytes"]
    scales: Float16[Tensor, "outputs blocks"]


def expansion_table() -> UInt8[Tensor, "1536 2"]:
    """The two MatMulNBits bytes of four neighbours, at row ``pattern + 6·value``."""
    values = torch.arange(256)
    codes = torch.full((256, len(POSITIONS), 4), 8, dtype=torch.uint8)
    for pattern, (first, second) in enumerate(POSITIONS):
        codes[:, pattern, first] = (values & 0x0F).to(torch.uint8)
        codes[:, pattern, second] = (values >> 4).to(torch.uint8)
    return join_codes(codes, 4).view(-1, 2)


def pack_two_of_four(matrix: Quantized) -> TwoOfFour:
    """Pack 4-bit codes of the pattern 2:4; `unpack_two_of_four` is its inverse.

    Example:
        Integers (0, 3, 0, -2) of one output: codes 8, 11, 8, 6, pattern 4 (positions 1 and 3), value 0x6b.

    Raises:
        ValueError: not 4 bits, an integer outside its grid, or more than two non-zeros among four neighbours.
    """
    if matrix.grid.bits != 4:
        raise ValueError(f"Two of four are packed at 4 bits, and these integers are on {matrix.grid}.")
    dense = pack_nbits(matrix)
    outputs = dense.blob.shape[0]
    pairs = dense.blob.view(outputs, -1, 2).int()
    # Packing is the inverse of the table that the graph expands with: two bytes → row, or -1.
    if pairs.is_meta:
        return TwoOfFour(dense.blob.view(outputs, -1, 2)[..., :1], dense.blob.view(-1, 4)[:, 0], dense.scales)
    table = expansion_table().int()
    rows = torch.full((1 << 16,), -1, dtype=torch.int32)
    for pattern in reversed(range(len(POSITIONS))):  # the first pattern that fits is written last, and stays
        own = torch.arange(pattern, table.shape[0], len(POSITIONS))
        rows[table[own, 0] + (table[own, 1] << 8)] = own.int()
    found = rows[pairs[..., 0] + (pairs[..., 1] << 8)]
    if bool((found < 0).any()):
        output, group = (int(place) for place in (found < 0).nonzero()[0])
        raise ValueError(
            f"Output {output} has more than 2 non-zeros among the atoms {4 * group} to {4 * group + 3}, which "
            f"the pattern {TWO_OF_FOUR} excludes."
        )
    patterns = (found % len(POSITIONS)).to(torch.uint8).flatten()
    return TwoOfFour(
        values=(found // len(POSITIONS)).to(torch.uint8)[..., None],
        patterns=join_codes(patterns, 4),  # an even number: blocks are multiples of 16
        scales=dense.scales,
    )


def unpack_two_of_four(packed: TwoOfFour, rows: int, grid: Grid) -> Quantized:
    """Read what `pack_two_of_four` wrote; see `unpack_nbits` for the arguments.

    Raises:
        ValueError: a pattern that does not exist, or bytes of another size than `rows` and `grid` say.
    """
    outputs, groups, _ = packed.values.shape
    patterns = split_codes(packed.patterns, 4)
    if grid.bits != 4 or groups * 4 != grid.groups(rows) * grid.group or patterns.numel() != outputs * groups:
        raise ValueError(
            f"{rows} inputs on {grid} are {grid.groups(rows) * grid.group // 4} groups of four, and here are "
            f"{groups} values for each of {outputs} outputs, and {patterns.numel()} patterns."
        )
    if int(patterns.max()) >= len(POSITIONS):
        raise ValueError(f"There is a pattern {int(patterns.max())}, and they are numbered 0 to 5.")
    index = patterns.view(outputs, groups).int() + len(POSITIONS) * packed.values[..., 0].int()
    blob = expansion_table()[index].view(outputs, grid.groups(rows), grid.group // 2)
    return unpack_nbits(NBits(blob, packed.scales), rows, grid)


def three_bit_table() -> UInt8[Tensor, "4096 2"]:
    """The two 4-bit MatMulNBits bytes of four neighbours of 3 bits, at the row of their number."""
    numbers = torch.arange(1 << 12)
    codes = torch.stack([(numbers >> shift & 7) + 4 for shift in (0, 3, 6, 9)], dim=-1)
    return join_codes(codes.to(torch.uint8), 4)


def pack_three_bits(matrix: Quantized) -> ThreeBits:
    """Pack 3-bit integers; `unpack_three_bits` is its inverse.

    Example:
        Integers (0, 3, -4, -1) of one output: codes 4, 7, 0, 3, number 0x63c, value 0x63, nibble 12.

    Raises:
        ValueError: not 3 bits, or an integer outside its grid.
    """
    grid, (rows, outputs) = matrix.grid, matrix.shape
    if grid.bits != 3 or grid.group % 16:
        raise ValueError(f"Groups of multiples of 16 integers of 3 bits are packed, and these are on {grid}.")
    check_range(matrix)
    blocks = grid.groups(rows)
    device = matrix.integers.device
    codes = torch.full((outputs, blocks * grid.group), 4, dtype=torch.int16, device=device)
    codes[:, :rows] += matrix.integers.T
    lanes = codes.view(outputs, -1, 4)
    numbers = lanes[..., 0] | lanes[..., 1] << 3 | lanes[..., 2] << 6 | lanes[..., 3] << 9
    return ThreeBits(
        values=(numbers >> 4).to(torch.uint8)[..., None],
        nibbles=join_codes(
            (numbers & 15).to(torch.uint8).flatten(), 4
        ),  # an even number: blocks are multiples of 16
        scales=matrix.scales.T.contiguous(),
    )


def unpack_three_bits(packed: ThreeBits, rows: int, grid: Grid) -> Quantized:
    """Read what `pack_three_bits` wrote; see `unpack_nbits` for the arguments.

    Raises:
        ValueError: bytes of another size than `rows` and `grid` say.
    """
    outputs, groups, _ = packed.values.shape
    nibbles = split_codes(packed.nibbles, 4)
    if grid.bits != 3 or groups * 4 != grid.groups(rows) * grid.group or nibbles.numel() != outputs * groups:
        raise ValueError(
            f"{rows} inputs on {grid} are {grid.groups(rows) * grid.group // 4} groups of four, and here are "
            f"{groups} values for each of {outputs} outputs, and {nibbles.numel()} nibbles."
        )
    numbers = packed.values[..., 0].short() << 4 | nibbles.view(outputs, groups)
    codes = torch.stack([numbers >> shift & 7 for shift in (0, 3, 6, 9)], dim=-1).view(outputs, -1)
    integers = (codes[:, :rows] - 4).to(torch.int8)
    return Quantized(integers.T.contiguous(), packed.scales.T.contiguous(), grid)
