"""What matrices cost: bytes of stored tensors, as each format really needs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Factorized, Leaf, Matrix, Quantized

SCALE_BITS = 16
"""A scale is a float16 in every format that is written."""


@runtime_checkable
class Storage(Protocol):
    """What a target format really needs for a leaf; each exporter publishes one. Numbers, no tensors."""

    def leaf_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """Bytes of an (rows, columns) leaf in the file: integers, scales, masks and padding.

        Args:
            rows: inputs of the leaf.
            columns: outputs of the leaf.
            grid: None for floating point.
            pattern: sparsity of the leaf; DENSE for dictionaries and plain matrices.
        """
        ...


def matrix_bytes(matrices: Mapping[str, Matrix], storage: Storage) -> dict[str, int]:
    """Bytes of each matrix in a file; a shared dictionary is counted once, with the first that uses it."""
    seen: set[tuple[str, int]] = set()
    result: dict[str, int] = {}
    for name, matrix in matrices.items():
        total = 0
        if isinstance(matrix, Factorized):
            for position, pair in enumerate(matrix.pairs):
                if (pair.dictionary_name, position) not in seen:
                    seen.add((pair.dictionary_name, position))
                    total += _leaf_bytes(pair.dictionary, DENSE, storage)
                total += _leaf_bytes(pair.codes, pair.pattern, storage)
        else:
            total = _leaf_bytes(matrix, DENSE, storage)
        result[name] = total
    return result


def _leaf_bytes(leaf: Leaf, pattern: Pattern, storage: Storage) -> int:
    grid = leaf.grid if isinstance(leaf, Quantized) else None
    return storage.leaf_bytes(*leaf.shape, grid, pattern)
