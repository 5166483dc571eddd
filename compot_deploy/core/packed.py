"""How a leaf lies in memory and in a Hugging Face folder: true size, both directions, pure torch.

Rows are outputs, so that a table can be read row by row and a product needs no transpose::

    integers   uint8 (out, bytes)     codes ``integer - lowest`` of one output, in planes
    scales     int16 (out, groups)    the bits of the float16 scales: no cast of a model's floats can touch them
    mask       uint8 (out, bytes)     sparse leaves: bit i of byte j says whether input 8j+i is non-zero
    weight     float (out, in)        dense floating-point leaves
    values     float (out, slots)     sparse floating-point leaves

A plane of w bits holds 8/w codes per byte, lowest bits first, each row filled up to whole eights; 3 bits are a
plane of the low 2 bits and then one of the third. A sparse leaf stores ``kept`` slots for every ``of``
neighbouring inputs, the non-zeros in ascending order and then padding. It is stored sparse only where that
takes fewer bytes; either way the same numbers come back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from compot_deploy.core.bits import check_range, join_codes, split_codes
from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Dense, Leaf, Quantized
from compot_deploy.core.storage import SCALE_BITS
from compot_deploy.errors import ArtifactError

PLANES: Final = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Widths of the planes that make up a code, low bits first."""


@dataclass(frozen=True)
class LeafScheme:
    """Everything about a stored leaf but its numbers.

    Attributes:
        inputs: rows of the leaf.
        outputs: columns of the leaf.
        grid: None for floating point.
        pattern: which entries may be non-zero.
        float_type: of floating-point values.
    """

    inputs: int
    outputs: int
    grid: Grid | None = None
    pattern: Pattern = DENSE
    float_type: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.inputs < 1 or self.outputs < 1:
            raise ArtifactError(
                f"A stored matrix of {self.inputs} x {self.outputs} is impossible: the configuration is damaged."
            )

    @classmethod
    def of(cls, leaf: Leaf, pattern: Pattern = DENSE) -> LeafScheme:
        """The scheme of a leaf."""
        if isinstance(leaf, Quantized):
            return cls(*leaf.shape, leaf.grid, pattern)
        return cls(*leaf.shape, None, pattern, leaf.weight.dtype)

    @property
    def slots(self) -> int:
        """Values of one output that a sparse leaf stores."""
        return -(-self.inputs // self.pattern.of) * self.pattern.kept

    @property
    def sparse(self) -> bool:
        """Whether zeros are left out: where that takes fewer bytes."""
        mask = _eights(self.inputs)
        return not self.pattern.is_dense and mask + self._value_bytes(self.slots) < self._value_bytes(
            self.inputs
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the leaf."""
        stored = self.slots if self.sparse else self.inputs
        scales = 0 if self.grid is None else self.grid.groups(self.inputs) * SCALE_BITS // 8
        row = self._value_bytes(stored) + scales + (_eights(self.inputs) if self.sparse else 0)
        return row * self.outputs

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and type of every tensor of the leaf, by name."""
        stored = self.slots if self.sparse else self.inputs
        found: dict[str, tuple[tuple[int, int], torch.dtype]] = {}
        if self.grid is None:
            found["values" if self.sparse else "weight"] = ((self.outputs, stored), self.float_type)
        else:
            found["integers"] = ((self.outputs, self._value_bytes(stored)), torch.uint8)
            found["scales"] = ((self.outputs, self.grid.groups(self.inputs)), torch.int16)
        if self.sparse:
            found["mask"] = ((self.outputs, _eights(self.inputs)), torch.uint8)
        return found

    def _value_bytes(self, count: int) -> int:
        if self.grid is None:
            return count * self.float_type.itemsize
        return count if self.grid.bits == 8 else _eights(count) * self.grid.bits


def pack(leaf: Leaf, pattern: Pattern = DENSE) -> dict[str, Tensor]:
    """The tensors of a leaf; `unpack` is the inverse.

    Raises:
        ValueError: an integer outside its grid, or more non-zeros than the pattern allows.
    """
    scheme = LeafScheme.of(leaf, pattern)
    values = (leaf.integers if isinstance(leaf, Quantized) else leaf.weight).T.contiguous()
    found: dict[str, Tensor] = {}
    if scheme.sparse:
        mask = values != 0
        found["mask"] = join_codes(_padded(mask.to(torch.uint8), -(-scheme.inputs // 8) * 8), 1)
        values = _compact(values, mask, scheme)
    if not isinstance(leaf, Quantized):
        found["values" if scheme.sparse else "weight"] = values
        return found
    check_range(leaf)
    found["integers"] = pack_rows(values, leaf.grid)
    found["scales"] = leaf.scales.T.contiguous().view(torch.int16)
    return found


def unpack(tensors: Mapping[str, Tensor], scheme: LeafScheme) -> Leaf:
    """The leaf, bit for bit as it was packed."""
    if scheme.grid is None:
        rows = expand(tensors["values"], tensors["mask"], scheme) if scheme.sparse else tensors["weight"]
        return Dense(rows.T.contiguous())
    integers = unpack_rows(tensors["integers"], scheme.slots if scheme.sparse else scheme.inputs, scheme.grid)
    if scheme.sparse:
        integers = expand(integers, tensors["mask"], scheme)
    scales = tensors["scales"].view(torch.float16).T.contiguous()
    return Quantized(integers.T.contiguous(), scales, scheme.grid)


def dequantize_rows(tensors: Mapping[str, Tensor], scheme: LeafScheme) -> Float[Tensor, "outputs inputs"]:
    """The values, transposed, in float32 for integers and in the stored type for floating point.

    The same float32 operations as `compot_deploy.core.matrix.Quantized.dequantize`, so the same numbers. The rows
    may be a selection of the leaf's.
    """
    grid = scheme.grid
    if grid is None:
        return expand(tensors["values"], tensors["mask"], scheme) if scheme.sparse else tensors["weight"]
    integers = unpack_rows(tensors["integers"], scheme.slots if scheme.sparse else scheme.inputs, grid)
    table = grid.table
    if table is None:
        values = integers.float()
    else:
        values = torch.tensor(table, device=integers.device)[integers.int() - grid.lowest]
    if scheme.sparse:
        values = expand(values, tensors["mask"], scheme)
    scales = tensors["scales"].view(torch.float16).float().repeat_interleave(grid.group, dim=1)
    return values * scales[:, : scheme.inputs]


def pack_rows(integers: Int8[Tensor, "outputs count"], grid: Grid) -> UInt8[Tensor, "outputs bytes"]:
    """Integers of each row as planes of codes."""
    codes = (integers.to(torch.int16) - grid.lowest).to(torch.uint8)
    if grid.bits == 8:
        return codes
    codes = _padded(codes, -(-codes.shape[1] // 8) * 8)
    planes, shift = [], 0
    for width in PLANES[grid.bits]:
        planes.append(join_codes((codes >> shift) & (2**width - 1), width))
        shift += width
    return torch.cat(planes, dim=1)


def unpack_rows(
    packed: UInt8[Tensor, "outputs bytes"], count: int, grid: Grid
) -> Int8[Tensor, "outputs count"]:
    """The inverse of `pack_rows`."""
    codes, start, shift, eights = packed, 0, 0, _eights(count)
    if grid.bits < 8:
        codes = packed.new_zeros(len(packed), eights * 8)
        for width in PLANES[grid.bits]:
            codes = codes | (split_codes(packed[:, start : start + eights * width], width) << shift)
            start, shift = start + eights * width, shift + width
    return (codes[:, :count].to(torch.int16) + grid.lowest).to(torch.int8)


def expand(values: Tensor, mask: UInt8[Tensor, "outputs bytes"], scheme: LeafScheme) -> Tensor:
    """Slots back to where their non-zeros stand; everything else is zero."""
    pattern, groups = scheme.pattern, -(-scheme.inputs // scheme.pattern.of)
    kept = split_codes(mask, 1)[:, : scheme.inputs]
    grouped = _padded(kept, groups * pattern.of).view(len(mask), groups, pattern.of).int()
    first = torch.arange(groups, device=mask.device, dtype=torch.int32)[:, None] * pattern.kept
    # Clamped where a damaged mask marks more than there are slots: wrong numbers, but none from elsewhere.
    slot = ((grouped.cumsum(2, dtype=torch.int32) - 1).clamp(0, pattern.kept - 1) + first).view(len(mask), -1)
    return torch.gather(values, 1, slot[:, : scheme.inputs].long()) * kept.to(values.dtype)


def _compact(values: Tensor, mask: Tensor, scheme: LeafScheme) -> Tensor:
    """The non-zeros of every group of a row, in order, then zeros."""
    pattern, groups = scheme.pattern, -(-scheme.inputs // scheme.pattern.of)
    width = groups * pattern.of
    grouped = _padded(mask.to(torch.uint8), width).view(len(values), groups, pattern.of)
    most = int(grouped.sum(2).max())
    if most > pattern.kept:
        raise ValueError(f"{most} of {pattern.of} neighbours are non-zero, and the pattern is {pattern}.")
    order = torch.argsort(grouped, dim=2, descending=True, stable=True)[:, :, : pattern.kept]
    padded = _padded(values, width).view(len(values), groups, pattern.of)
    return torch.gather(padded, 2, order).view(len(values), -1).contiguous()


def _eights(count: int) -> int:
    return -(-count // 8)


def _padded(rows: Tensor, width: int) -> Tensor:
    missing = width - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


@dataclass(frozen=True)
class PackedStorage:
    """Bytes of a leaf in a Hugging Face folder, as `compot_deploy.core.storage.Storage` asks for them.

    Attributes:
        float_type: of floating-point values.
    """

    float_type: torch.dtype = torch.float32

    def leaf_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """See `compot_deploy.core.storage.Storage.leaf_bytes`."""
        return LeafScheme(rows, columns, grid, pattern, self.float_type).nbytes

    def memory_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """A loaded model holds the same tensors."""
        return self.leaf_bytes(rows, columns, grid, pattern)
