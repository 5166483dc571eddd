"""Tensors on their way: their bytes beside the pickle, as Ray's object store wants them, instead of inside of it.

torch writes a tensor into a pickle as a file of its own, copied several times: 0.2 to 0.4 GB a second. Strides stay:
a product of what is transposed is not the same to the last bit as that of a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A tensor.

    Attributes:
        bytes: of its numbers, in the order in which they lie in memory; None for one on torch's device ``meta``.
        dtype: of the numbers.
        shape: of the tensor.
        strides: of the tensor.
    """

    bytes: UInt8[np.ndarray, " bytes"] | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def packed(tensor: Tensor) -> Packed:
    """A tensor in the memory of this process, without what else its storage holds."""
    dense = tensor.detach()
    if dense.is_meta:
        return Packed(None, dense.dtype, tuple(dense.shape), tuple(dense.stride()))
    if dense.numel() and not torch.ops.aten.is_non_overlapping_and_dense(dense):
        dense = dense.contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))
    shape, strides = tuple(dense.shape), tuple(dense.stride())
    return Packed(flat.view(torch.uint8).numpy(), dense.dtype, shape, strides)


def unpacked(one: Packed) -> Tensor:
    """The tensor, in memory of its own."""
    if one.bytes is None:
        return torch.empty_strided(one.shape, one.strides, dtype=one.dtype, device="meta")
    room = torch.empty(one.bytes.shape, dtype=torch.uint8)
    room.numpy()[:] = one.bytes
    return room.view(one.dtype).as_strided(one.shape, one.strides)


def send_packed(ray: Any) -> None:
    """Let Ray send the tensors of this process so, until it is disconnected."""
    ray.util.register_serializer(Tensor, serializer=packed, deserializer=unpacked)
