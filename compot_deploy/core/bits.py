"""Codes of a few bits in bytes, and back: what the layouts of all formats are made of."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

from compot_deploy.core.matrix import Quantized


def join_codes(codes: UInt8[Tensor, "*rows codes"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Codes of `bits` bits to bytes, lowest bits first."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    lanes = codes.view(*codes.shape[:-1], -1, per_byte)
    joined = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        joined |= lanes[..., lane] << (bits * lane)
    return joined


def split_codes(packed: UInt8[Tensor, "*rows bytes"], bits: int) -> UInt8[Tensor, "*rows codes"]:
    """The inverse of `join_codes`."""
    mask = 2**bits - 1
    lanes = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(lanes, dim=-1).flatten(-2)


def check_range(matrix: Quantized) -> None:
    """Refuse integers that lie outside their grid.

    Raises:
        ValueError: says what they are and what the grid holds.
    """
    if matrix.integers.is_meta:
        return  # a stand-in, which has a size and no values
    low, high = (int(value) for value in torch.aminmax(matrix.integers))
    if low < matrix.grid.lowest or high > matrix.grid.highest:
        raise ValueError(
            f"Integers from {low} to {high} do not fit {matrix.grid}, "
            f"which holds {matrix.grid.lowest} to {matrix.grid.highest}."
        )
