"""Bit planes for GGUF: integers of 2, 3, 4 or 8 bits, dense or in an N:M pattern, in I8 payload tensors.

Layout version 1, documented byte by byte in docs/gguf-layout.md. A leaf (inputs, outputs) becomes one row
of bytes per output, in one of two kinds:

``planes``: float16 scales, one per group of inputs, then one record per unit of 64 inputs. A record holds
the slots of its unit: 64 when dense, 32 when half of the inputs are kept. Slots are split into planes that
a SIMD register unpacks with one shift and one mask::

    slots   4-bit plane                    2-bit plane                1-bit plane
    64      byte i: slot i | slot 32+i     byte i: slot 16j+i at 2j   byte i: slot 8j+i at j
    32      byte i: slot i | slot 16+i     byte i: slot  8j+i at 2j   byte i: slot 4j+i at j

Values are stored plus ``2**(bits-1)`` (8-bit ones as signed bytes); 3 bits are a 2-bit plane of the low
bits and a 1-bit plane of the high bit. Then follow, for 2:4 and 4:8, the positions of the slots inside
their group: a 2-bit plane, and for 4:8 a 1-bit plane of the third bit. Positions of a group ascend.

``columns``, for at most 32 inputs and one group: the float16 scales of all outputs, then for each input
one signed byte per output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float16, Int8, Integer, UInt8

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.errors import ArtifactError, RecipeError

UNIT: Final = 64
"""Inputs per record; longer rows are a multiple of it, padded with exact zeros."""

NARROW: Final = 32
"""Leaves with at most this many inputs are stored column by column, without padding."""

PATTERNS: Final = (Pattern(2, 4), Pattern(4, 8))
"""The N:M patterns with a layout of their own; any other pattern is stored dense, zeros included."""


@dataclass(frozen=True)
class PlaneFormat:
    """How the integers of one leaf lie in its payload.

    Attributes:
        grid: bits and group of the integers.
        pattern: 2:4, 4:8 or dense.
        inputs: rows of the leaf, without padding.
    """

    grid: Grid
    pattern: Pattern
    inputs: int

    def __post_init__(self) -> None:
        group, inputs = self.grid.group, self.inputs
        if inputs < 1:
            raise RecipeError(f"A leaf of {inputs} inputs cannot be stored.")
        if group % 32 and group < inputs:
            raise RecipeError(
                f"Groups of {group} inputs cannot be stored as GGUF planes: scales belong to multiples of 32 "
                f"inputs. Use a group of 32, 64 or 128."
            )
        if not self.pattern.is_dense and self.pattern not in PATTERNS:
            raise RecipeError(f"The pattern {self.pattern} has no planes: use 2:4, 4:8 or dense.")

    @classmethod
    def of(cls, inputs: int, grid: Grid, pattern: Pattern) -> PlaneFormat:
        """The format for a leaf: patterns without planes, and narrow leaves, are stored dense."""
        kept = pattern if pattern in PATTERNS and inputs > NARROW else Pattern()
        return cls(grid, kept, inputs)

    @property
    def narrow(self) -> bool:
        """Stored by columns: few inputs, so that records of 64 would be mostly padding."""
        return self.inputs <= NARROW

    @property
    def groups(self) -> int:
        """Scales per output."""
        return self.grid.groups(self.inputs)

    @property
    def units(self) -> int:
        """Records per output."""
        return math.ceil(self.inputs / UNIT)

    @property
    def slots(self) -> int:
        """Stored values per record."""
        return UNIT if self.pattern.is_dense else UNIT // 2

    @property
    def record_bytes(self) -> int:
        """Bytes of one record: value planes, then position planes."""
        position_bits = 0 if self.pattern.is_dense else int(math.log2(self.pattern.of))
        return self.slots * (self.grid.bits + position_bits) // 8

    def shape(self, outputs: int) -> tuple[int, int]:
        """(rows, bytes per row) of the payload tensor."""
        if self.narrow:
            return 2 + self.inputs, outputs
        return outputs, 2 * self.groups + self.units * self.record_bytes

    def nbytes(self, outputs: int) -> int:
        """Bytes of the payload tensor."""
        rows, columns = self.shape(outputs)
        return rows * columns


def pack(
    integers: Int8[np.ndarray, "inputs outputs"],
    scales: Float16[np.ndarray, "groups outputs"],
    form: PlaneFormat,
) -> Int8[np.ndarray, "rows bytes"]:
    """The payload of a leaf.

    Raises:
        ValueError: an integer lies outside the grid, or outside the pattern.
    """
    inputs, outputs = integers.shape
    if inputs != form.inputs or scales.shape != (form.groups, outputs):
        raise ValueError(f"A leaf of {integers.shape} with scales {scales.shape} does not fit {form}.")
    if integers.size and not form.grid.lowest <= integers.min() <= integers.max() <= form.grid.highest:
        raise ValueError(f"Integers from {integers.min()} to {integers.max()} do not fit {form.grid}.")
    if form.narrow:
        head = np.ascontiguousarray(scales).astype("<f2").view(np.int8).reshape(2, outputs)
        return np.concatenate([head, integers])
    padded = np.zeros((outputs, form.units * UNIT), np.int8)
    padded[:, :inputs] = integers.T
    units = padded.reshape(outputs, form.units, UNIT)
    parts: list[UInt8[np.ndarray, ...]] = []
    if form.pattern.is_dense:
        parts.extend(_value_planes(units, form.grid.bits))
    else:
        positions, values = _select(units, form.pattern)
        parts.extend(_value_planes(values, form.grid.bits))
        parts.append(_pack_plane(positions & 3, 2))
        if form.pattern.of == 8:
            parts.append(_pack_plane(positions >> 2, 1))
    records = np.concatenate(parts, axis=-1).reshape(outputs, -1)
    front = np.ascontiguousarray(scales.T).astype("<f2").view(np.uint8).reshape(outputs, -1)
    return np.concatenate([front, records], axis=1).view(np.int8)


def unpack(
    payload: Int8[np.ndarray, "rows bytes"], form: PlaneFormat, outputs: int
) -> tuple[Int8[np.ndarray, "inputs outputs"], Float16[np.ndarray, "groups outputs"]]:
    """Integers and scales of a payload, the inverse of `pack`.

    Raises:
        ArtifactError: the payload has another size, or positions that do not ascend inside their group.
    """
    if payload.shape != form.shape(outputs):
        raise ArtifactError(
            f"A payload of {payload.shape} bytes cannot hold {form.inputs} x {outputs} {form.grid} "
            f"{form.pattern}: {form.shape(outputs)} are needed. The file is damaged; export it again."
        )
    if form.narrow:
        head = np.ascontiguousarray(payload[:2]).reshape(-1).view("<f2").astype(np.float16)
        return payload[2:].copy(), head.reshape(1, outputs)
    raw = np.ascontiguousarray(payload).view(np.uint8)
    scales = np.ascontiguousarray(raw[:, : 2 * form.groups]).view("<f2").astype(np.float16)
    records = raw[:, 2 * form.groups :].reshape(outputs, form.units, form.record_bytes)
    slots, bits = form.slots, form.grid.bits
    value_bytes = slots * bits // 8
    values = _values(records[..., :value_bytes], slots, bits)
    if form.pattern.is_dense:
        units = values
    else:
        at = value_bytes
        positions = _unpack_plane(records[..., at : at + slots // 4], 2, slots)
        if form.pattern.of == 8:
            high = _unpack_plane(records[..., at + slots // 4 :], 1, slots)
            positions = positions | (high << 2)
        grouped = positions.reshape(outputs, form.units, -1, form.pattern.kept).astype(np.int16)
        if grouped.size and (np.diff(grouped, axis=-1) <= 0).any():
            raise ArtifactError("Positions of sparse codes do not ascend: the file is damaged.")
        units = np.zeros((outputs, form.units, UNIT // form.pattern.of, form.pattern.of), np.int8)
        np.put_along_axis(units, grouped.astype(np.int64), values.reshape(grouped.shape), axis=-1)
        units = units.reshape(outputs, form.units, UNIT)
    flat = units.reshape(outputs, -1)
    return np.ascontiguousarray(flat[:, : form.inputs].T), np.ascontiguousarray(scales.T)


def _select(
    units: Int8[np.ndarray, "outputs units 64"], pattern: Pattern
) -> tuple[UInt8[np.ndarray, "outputs units 32"], Int8[np.ndarray, "outputs units 32"]]:
    """Positions (ascending in each group) and values of the kept slots; free slots take the first zeros."""
    grouped = units.reshape(*units.shape[:2], UNIT // pattern.of, pattern.of)
    if ((grouped != 0).sum(axis=-1) > pattern.kept).any():
        raise ValueError(f"The codes have more non-zeros than {pattern} allows.")
    # A stable sort puts non-zeros first and keeps the order among equals, so free slots are the first zeros.
    order = np.argsort(grouped == 0, axis=-1, kind="stable")[..., : pattern.kept]
    positions = np.sort(order, axis=-1)
    values = np.take_along_axis(grouped, positions, axis=-1)
    shape = (*units.shape[:2], UNIT // 2)
    return positions.astype(np.uint8).reshape(shape), values.reshape(shape)


def _value_planes(values: Int8[np.ndarray, "*unit slots"], bits: int) -> list[UInt8[np.ndarray, ...]]:
    if bits == 8:
        return [values.view(np.uint8)]
    offset = (values.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 3:
        return [_pack_plane(offset & 3, 2), _pack_plane(offset >> 2, 1)]
    return [_pack_plane(offset, bits)]


def _values(
    planes: UInt8[np.ndarray, "*unit bytes"], slots: int, bits: int
) -> Int8[np.ndarray, "*unit slots"]:
    if bits == 8:
        return np.ascontiguousarray(planes).view(np.int8)
    if bits == 3:
        low = _unpack_plane(planes[..., : slots // 4], 2, slots)
        offset = low | (_unpack_plane(planes[..., slots // 4 :], 1, slots) << 2)
    else:
        offset = _unpack_plane(planes, bits, slots)
    return (offset.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


def _pack_plane(slots: Integer[np.ndarray, "*unit slots"], bits: int) -> UInt8[np.ndarray, "*unit bytes"]:
    per_byte = 8 // bits
    pieces = slots.reshape(*slots.shape[:-1], per_byte, -1).astype(np.uint8)
    shifts = (np.arange(per_byte, dtype=np.uint8) * bits)[:, None]
    return np.bitwise_or.reduce(pieces << shifts, axis=-2)


def _unpack_plane(
    plane: UInt8[np.ndarray, "*unit bytes"], bits: int, slots: int
) -> UInt8[np.ndarray, "*unit slots"]:
    per_byte = 8 // bits
    shifts = (np.arange(per_byte, dtype=np.uint8) * bits)[:, None]
    pieces = (plane[..., None, :] >> shifts) & np.uint8(2**bits - 1)
    return pieces.reshape(*plane.shape[:-1], slots)
