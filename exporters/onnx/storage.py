"""What a leaf takes in an ONNX file and in the loaded graph, and which grids a file holds: numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.storage import SCALE_BITS
from compot_deploy.exporters.bnb4 import BNB_BLOCKS
from compot_deploy.exporters.onnx.layouts import QDQ_BITS
from compot_deploy.exporters.onnx.packed_codes import TWO_OF_FOUR

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

GATHER_BITS: Final = (2, 4, 8)
"""Bits that GatherBlockQuantized runs; 2 from 1.28 on."""

BLOCKS: Final = (16, 32, 64, 128, 256)
"""Block sizes that MatMulNBits and GatherBlockQuantized accept."""

TWO_BIT_BLOCKS: Final = (32, 64, 128)
"""At 2 bits other blocks have no kernel and run about 30 times slower."""


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
