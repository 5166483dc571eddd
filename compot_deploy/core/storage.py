"""What matrices cost: bytes of stored tensors, as each format really needs them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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


@runtime_checkable
class LoadedStorage(Protocol):
    """A storage that knows what a leaf takes once it is loaded."""

    def memory_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """Bytes of a leaf in memory; the arguments are those of `Storage.leaf_bytes`."""
        ...


@dataclass(frozen=True)
class InMemory:
    """The storage of a model that is loaded: what the format says, or as in the file with dense codes.

    Attributes:
        storage: of the file.
    """

    storage: Storage

    def leaf_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """See `compot_deploy.core.storage.Storage`."""
        if isinstance(self.storage, LoadedStorage):
            return self.storage.memory_bytes(rows, columns, grid, pattern)
        return self.storage.leaf_bytes(rows, columns, grid)


@dataclass(frozen=True)
class PaperStorage:
    """Bytes as COMPOT (arXiv 2602.15200) counts them, extended to grids: values, scales and a mask, no padding.

    16 bits per value that may be non-zero, one mask bit per entry of sparse codes.

    Attributes:
        float_bits: bits of a value that is on no grid.
    """

    float_bits: int = 16

    def leaf_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """Bytes of a leaf; see `compot_deploy.core.storage.Storage`."""
        stored = rows // pattern.of * pattern.kept * columns
        stored += min(rows % pattern.of, pattern.kept) * columns
        bits = stored * (self.float_bits if grid is None else grid.bits)
        if grid is not None:
            bits += SCALE_BITS * grid.groups(rows) * columns
        if not pattern.is_dense:
            bits += rows * columns
        return math.ceil(bits / 8)
