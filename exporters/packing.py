"""How integers lie in an ONNX file, in both directions, and what that costs.

Five layouts, all of the same numbers (``Quantized``: integers (in, out), scales (groups, out)):

* **MatMulNBits** (com.microsoft): ``B`` uint8 (out, blocks, block·bits/8), row n is output n, the last block
  filled up with the integer zero; unsigned codes ``integer + 2**(bits-1)``, lowest bits first::

      4 bits, byte j of a block:   code[2j] | code[2j+1] << 4
      2 bits, byte j of a block:   code[4j] | code[4j+1] << 2 | code[4j+2] << 4 | code[4j+3] << 6

  scales (out, blocks). Without a zero point the runtime subtracts 2**(bits-1), so an integer zero is exactly 0.
* **GatherBlockQuantized** (com.microsoft): the same bytes seen as a table (out, blocks·block·bits/8), one row
  per token. A tied table is therefore stored once, under two shapes.
* **DequantizeLinear**, blocked along axis 0: signed two's complement (in, out) row by row, two per byte at
  4 bits, low half first; scales (blocks, out). No padding.
* **Two of four**: 4-bit codes of the pattern 2:4, which the graph expands to MatMulNBits' bytes when it is
  loaded. Every four neighbours of an output become the two that may be non-zero and where they are::

      values    uint8 (out, groups of four, 1)     code[first] | code[second] << 4
      patterns  UINT4 (out, groups of four, 1)     0 to 5: the row of `POSITIONS` with first and second

  12 bits for four codes instead of 16; rows are filled up to whole blocks, scales are those of MatMulNBits.
  Two kept codes that rounded to zero leave their place open: the first row of `POSITIONS` that covers the
  non-zeros is written, and whichever row a file has, the same integers come out.
* **Three bits**, which no operator reads; the graph expands them to MatMulNBits' 4-bit bytes in the same way::

      number    code[0] | code[1] << 3 | code[2] << 6 | code[3] << 9     of every four neighbours of an output
      values    uint8 (out, groups of four, 1)     number >> 4
      nibbles   UINT4 (out, groups of four, 1)     number & 15

  Codes are ``integer + 4``; in the expanded bytes they are ``integer + 8``, as 4 bits want them.

* **MatMulBnb4** (com.microsoft): bitsandbytes' NF4 and FP4, uint8 (out·in/2) output after output, the first of
  two codes in the high half; scales (out, blocks). Blocks never cross from one output to the next, because the
  inputs are a multiple of the block.

Sources: the ONNX Runtime contrib operator documentation; the ONNX operator specification, opset 21 (int4
storage, blocked quantization).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

import torch
from jaxtyping import Float16, Int8, UInt8
from torch import Tensor

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Quantized
from compot_deploy.core.storage import SCALE_BITS

OnnxOps: TypeAlias = Literal["matmulnbits", "qdq"]
"""How a quantized linear is written: one contrib operator, or two standard ones."""

OnnxCodes: TypeAlias = Literal["dense", "packed"]
"""How integers are written that runtimes read in another form than takes the fewest bytes.

``dense``: as they are read. ``packed``: 4-bit codes of the pattern 2:4 as two of four, and 3-bit integers, which
cannot be written at all otherwise, in 3 bits."""

NBITS_BITS: Final = (2, 4, 8)
"""Bits that ONNX Runtime's MatMulNBits runs (it refuses 1, 3, 5, 6 and 7 when loading); 2 from 1.24 on."""

PACKED_BITS: Final = (2, 3, 4, 8)
"""Bits that MatMulNBits is given where the graph expands 3 bits to 4."""

QDQ_BITS: Final = (4, 8)
"""Bits that DequantizeLinear has types for at opset 21. ONNX Runtime fuses 4 bits with the product from 1.23 on,
8 bits from 1.25 on; before that 8 bits are computed in float32, exactly and slowly."""

GATHER_BITS: Final = (4, 8)
"""Bits that GatherBlockQuantized runs."""

BNB_BLOCKS: Final = (16, 32, 64, 128, 256)
"""Block sizes of MatMulBnb4 that are used here; it takes any power of two from 16 on."""

BNB_TYPES: Final[Mapping[str, int]] = MappingProxyType({"fp4": 0, "nf4": 1})
"""Attribute ``quant_type`` of MatMulBnb4, by codebook."""

BLOCKS: Final = (16, 32, 64, 128, 256)
"""Block sizes that MatMulNBits and GatherBlockQuantized accept."""

TWO_BIT_BLOCKS: Final = (32, 64, 128)
"""At 2 bits other blocks have no kernel and run about 30 times slower."""

TWO_OF_FOUR: Final = Pattern(2, 4)
"""The only pattern with a packed layout."""

POSITIONS: Final = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""Where the two values of four neighbours are, by pattern number."""


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
    blob = _join(codes.view(outputs, blocks, -1), grid.bits)
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
    codes = _split(packed.blob, grid.bits).view(outputs, -1)[:, :rows]
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
        flat = _join(flat & 0x0F, 4)
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
        nibbles = _split(flat, 4)[: rows * outputs]
        flat = (nibbles ^ 0x08) - 0x08  # two's complement: the top bit counts -8
    integers: Int8[Tensor, "inputs outputs"] = flat.view(torch.int8).view(rows, outputs)
    return Quantized(integers=integers.contiguous(), scales=packed.scales.contiguous(), grid=grid)


def pack_bnb4(matrix: Quantized) -> NBits:
    """Pack NF4 or FP4 for MatMulBnb4; `unpack_bnb4` is its inverse.

    The codes are bitsandbytes': for NF4 ``integer + 7``; for FP4 the integer, or ``8 - integer`` if it is
    negative.

    Raises:
        ValueError: an integer grid, or inputs that are no multiple of the block.
    """
    grid = matrix.grid
    rows, outputs = matrix.shape
    if grid.codebook not in BNB_TYPES or rows % grid.group:
        raise ValueError(f"MatMulBnb4 cannot hold {rows} inputs on {grid}.")
    _check_range(matrix)
    integers = matrix.integers.T.contiguous()
    codes = integers + 7 if grid.codebook == "nf4" else torch.where(integers < 0, 8 - integers, integers)
    pairs = codes.to(torch.uint8).view(outputs, rows // grid.group, -1, 2)
    return NBits(pairs[..., 0] << 4 | pairs[..., 1], matrix.scales.T.contiguous())


def unpack_bnb4(packed: NBits, rows: int, grid: Grid) -> Quantized:
    """Read what `pack_bnb4` wrote; see `unpack_nbits` for the arguments.

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


def expansion_table() -> UInt8[Tensor, "1536 2"]:
    """The two MatMulNBits bytes of four neighbours, at row ``pattern + 6·value``."""
    values = torch.arange(256)
    codes = torch.full((256, len(POSITIONS), 4), 8, dtype=torch.uint8)
    for pattern, (first, second) in enumerate(POSITIONS):
        codes[:, pattern, first] = (values & 0x0F).to(torch.uint8)
        codes[:, pattern, second] = (values >> 4).to(torch.uint8)
    return _join(codes, 4).view(-1, 2)


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
        patterns=_join(patterns, 4),  # an even number: blocks are multiples of 16
        scales=dense.scales,
    )


def unpack_two_of_four(packed: TwoOfFour, rows: int, grid: Grid) -> Quantized:
    """Read what `pack_two_of_four` wrote; see `unpack_nbits` for the arguments.

    Raises:
        ValueError: a pattern that does not exist, or bytes of another size than `rows` and `grid` say.
    """
    outputs, groups, _ = packed.values.shape
    patterns = _split(packed.patterns, 4)
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
    return _join(codes.to(torch.uint8), 4)


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
    _check_range(matrix)
    blocks = grid.groups(rows)
    device = matrix.integers.device
    codes = torch.full((outputs, blocks * grid.group), 4, dtype=torch.int16, device=device)
    codes[:, :rows] += matrix.integers.T
    lanes = codes.view(outputs, -1, 4)
    numbers = lanes[..., 0] | lanes[..., 1] << 3 | lanes[..., 2] << 6 | lanes[..., 3] << 9
    return ThreeBits(
        values=(numbers >> 4).to(torch.uint8)[..., None],
        nibbles=_join(
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
    nibbles = _split(packed.nibbles, 4)
    if grid.bits != 3 or groups * 4 != grid.groups(rows) * grid.group or nibbles.numel() != outputs * groups:
        raise ValueError(
            f"{rows} inputs on {grid} are {grid.groups(rows) * grid.group // 4} groups of four, and here are "
            f"{groups} values for each of {outputs} outputs, and {nibbles.numel()} nibbles."
        )
    numbers = packed.values[..., 0].short() << 4 | nibbles.view(outputs, groups)
    codes = torch.stack([numbers >> shift & 7 for shift in (0, 3, 6, 9)], dim=-1).view(outputs, -1)
    integers = (codes[:, :rows] - 4).to(torch.int8)
    return Quantized(integers.T.contiguous(), packed.scales.T.contiguous(), grid)


def _join(codes: UInt8[Tensor, "*rows codes"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Codes of `bits` bits to bytes, lowest bits first."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    lanes = codes.view(*codes.shape[:-1], -1, per_byte)
    joined = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        joined |= lanes[..., lane] << (bits * lane)
    return joined


def _split(packed: UInt8[Tensor, "*rows bytes"], bits: int) -> UInt8[Tensor, "*rows codes"]:
    """The inverse of `_join`."""
    mask = 2**bits - 1
    lanes = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(lanes, dim=-1).flatten(-2)


def _check_integers(matrix: Quantized) -> None:
    if matrix.grid.codebook != "integer":
        raise ValueError(f"{matrix.grid} has a table, and here integers stand for themselves.")
    _check_range(matrix)


def _check_range(matrix: Quantized) -> None:
    if matrix.integers.is_meta:
        return  # a stand-in, which has a size and no values
    low, high = (int(value) for value in torch.aminmax(matrix.integers))
    if low < matrix.grid.lowest or high > matrix.grid.highest:
        raise ValueError(
            f"Integers from {low} to {high} do not fit {matrix.grid}, "
            f"which holds {matrix.grid.lowest} to {matrix.grid.highest}."
        )


@dataclass(frozen=True)
class OnnxStorage:
    """Bytes of a leaf in the ONNX file, as `compot_deploy.core.storage.Storage` asks for them.

    The figures are those of the tensors themselves; between tensors the file has up to 63 bytes (4095 before
    large ones) so that each can be mapped into memory.

    Attributes:
        ops: how quantized linears are written.
        float_bytes: bytes of one floating-point weight, 4 or 2.
        codes: whether codes of the pattern 2:4 and 3-bit integers are packed. All others lie dense whatever
            their pattern: an exact zero costs as much as any other integer.
    """

    ops: OnnxOps = "matmulnbits"
    float_bytes: int = 4
    codes: OnnxCodes = "dense"

    def leaf_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """See `compot_deploy.core.storage.Storage.leaf_bytes`."""
        if grid is None:
            return rows * columns * self.float_bytes
        scales = grid.groups(rows) * columns * SCALE_BITS // 8
        if self.ops == "qdq":
            return -(-rows * columns * grid.bits // 8) + scales
        entries = grid.groups(rows) * grid.group * columns
        bits = 3 if self.packs(grid, pattern) else grid.bits
        return entries * bits // 8 + scales

    def memory_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """Bytes of the leaf as a loaded graph holds it: every foldable node folded.

        Packed codes are dense again, whatever `pattern` is, 3 bits are 4, scales and floating-point weights are
        float32, and DequantizeLinear has become MatMulNBits. What the kernels keep besides depends on runtime and
        processor and is not counted: ONNX Runtime 1.32 on x86 takes two more float32 per block, and about
        one bit per integer for no visible reason (LOG.md).

        Args:
            rows: inputs of the leaf.
            columns: outputs of the leaf.
            grid: None for floating point.
            pattern: sparsity of the leaf; it saves no memory.
        """
        if grid is None:
            return rows * columns * 4
        blocks = grid.groups(rows) * columns
        bits = 4 if grid.bits == 3 else grid.bits
        return blocks * (grid.group * bits // 8 + 4)

    def packs(self, grid: Grid, pattern: Pattern) -> bool:
        """Whether a leaf is written as two of four."""
        return (
            self.codes == "packed"
            and self.ops == "matmulnbits"
            and grid.bits == 4
            and grid.codebook == "integer"
            and pattern == TWO_OF_FOUR
        )


def unsupported_grid(
    grid: Grid, ops: OnnxOps, embedding: bool = False, codes: OnnxCodes = "dense"
) -> str | None:
    """Why a grid cannot be stored, as a sentence with what to use instead; None if it can.

    Args:
        grid: what is asked for.
        ops: how quantized linears are written.
        embedding: the matrix is the token embedding.
        codes: whether integers may be packed.
    """
    if grid.codebook != "integer":
        if embedding or ops != "matmulnbits":
            what = "token embeddings" if embedding else f"linears written as {ops}"
            return f"ONNX has no {grid.codebook} for {what}: use int8, or --onnx-ops matmulnbits for linears."
        if grid.group not in BNB_BLOCKS:
            return f"ONNX stores {grid.codebook} in blocks of {_either(BNB_BLOCKS)}, not {grid.group}."
        return None
    bits: tuple[int, ...] = GATHER_BITS if embedding else QDQ_BITS if ops == "qdq" else NBITS_BITS
    blocks = TWO_BIT_BLOCKS if grid.bits == 2 else BLOCKS
    if grid.bits == 3 and codes == "packed" and ops == "matmulnbits" and not embedding:
        bits = PACKED_BITS
    if grid.bits not in bits:
        what = "token embeddings" if embedding else f"linears written as {ops}"
        return f"ONNX stores {what} in {_either(bits)} bits, not {grid.bits}."
    if grid.group not in blocks:
        return f"ONNX stores {grid.bits}-bit integers in groups of {_either(blocks)}, not {grid.group}."
    return None


def _either(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"
