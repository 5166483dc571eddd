"""What a leaf takes in a GGUF file, and which grids a layout holds: numbers, no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compot_deploy.exporters import gguf_blocks, gguf_planes
from compot_deploy.exporters.gguf_index import Layout
from compot_deploy.weights import DENSE, Grid, Pattern


@dataclass(frozen=True)
class GgufStorage:
    """True bytes of a leaf in a layout, and which grids it stores exactly. Implements `weights.Storage`.

    Attributes:
        layout: ``factorized`` or ``sparse``; a dense file holds products, counted as plain matrices.
    """

    layout: Layout

    def leaf_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """Bytes of an (rows, columns) leaf, scales, positions and padding included.

        Raises:
            RecipeError: the layout cannot hold the grid exactly.
        """
        if grid is None:
            return 2 * rows * columns
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
