"""What a leaf takes in a GGUF file, and which grids a layout holds: numbers, no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.errors import RecipeError
from compot_deploy.exporters.gguf import blocks as gguf_blocks
from compot_deploy.exporters.gguf import planes as gguf_planes
from compot_deploy.exporters.gguf import quantize as gguf_quantize
from compot_deploy.exporters.gguf.index import Layout


@dataclass(frozen=True)
class GgufStorage:
    """True bytes of a leaf in a factorized layout, and which grids it stores exactly. Implements `weights.Storage`.

    Attributes:
        layout: ``factorized`` or ``sparse``.
        float_bytes: bytes of one floating-point weight: 4, or 2 for leaves in float16 or bfloat16. A leaf is
            stored as wide as it is, and those of a compression are float32.
    """

    layout: Layout
    float_bytes: int = 4

    def leaf_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """Bytes of an (rows, columns) leaf, scales, positions and padding included.

        Raises:
            RecipeError: the layout cannot hold the grid exactly.
        """
        if grid is None:
            return self.float_bytes * rows * columns
        if grid.codebook != "integer":
            raise RecipeError(
                f"GGUF has no {grid.codebook}: use --gguf-layout dense, which multiplies factors out, or "
                "--quant int4."
            )
        if self.layout == "sparse":
            return gguf_planes.PlaneFormat.of(rows, grid, pattern).nbytes(columns)
        gguf_blocks.check_group(grid, rows)
        blocks = math.ceil(rows / gguf_blocks.BLOCK)
        return blocks * gguf_blocks.BLOCK_BYTES[gguf_blocks.block_type(grid)] * columns

    def check(self, rows: int, grid: Grid | None, pattern: Pattern = DENSE) -> None:
        """Refuse what the layout cannot store exactly, before any work starts.

        Raises:
            RecipeError: naming what it can.
        """
        self.leaf_bytes(rows, 1, grid, pattern)


@dataclass(frozen=True)
class ProductStorage:
    """True bytes of a matrix in a dense file, which holds no factors, only products, in llama.cpp's own types.

    Attributes:
        type: ggml type of matrices that are not integers, as `GgufOptions.type` names it.
    """

    type: str = "auto"

    def leaf_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """Bytes of an (rows, columns) matrix, in the wider type where its rows do not split into blocks."""
        floating = "F16" if self.type == "auto" else self.type
        kind = floating if grid is None else gguf_blocks.block_type(grid)
        return columns * gguf_quantize.row_bytes(gguf_quantize.fitting_type(kind, rows), rows)
