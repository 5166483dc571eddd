"""The tensors of a GGUF file, one at a time: what is known of each before its bytes exist, and the bytes.

Rows of a GGUF tensor are outputs; `order` permutes them where llama.cpp wants another order (rotary pairs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from compot_deploy.core.matrix import Dense, Factorized, Leaf, Matrix, Quantized
from compot_deploy.exporters.gguf import blocks as gguf_blocks
from compot_deploy.exporters.gguf import planes as gguf_planes
from compot_deploy.models.compressed import CompressedModel


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: known size first, bytes later.

    Attributes:
        name: in the file.
        kind: ggml type.
        shape: as numpy counts, in elements.
        nbytes: of the tensor.
        described: how it is stored, in words.
        rows: makes the bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    described: str
    rows: Callable[[], np.ndarray]


def shape_of(matrix: Matrix, order: np.ndarray | None) -> tuple[int, int]:
    """(in, out) of the part of a matrix that a tensor holds."""
    inputs, outputs = matrix.shape
    return inputs, outputs if order is None else len(order)


def ordered(array: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Outputs, which are the columns here, in the order that the file has them."""
    return array if order is None else array[:, order]


def float_rows(leaf: Leaf, kind: str, order: np.ndarray | None) -> np.ndarray:
    """Rows in F32, F16 or BF16; bits of bfloat16 are carried over."""
    if kind == "BF16":
        assert isinstance(leaf, Dense)
        bits = leaf.weight.detach().cpu().contiguous().view(torch.int16).numpy()
        return np.ascontiguousarray(ordered(bits, order).T).view(np.uint8)
    values = leaf.weight.detach().cpu().numpy() if isinstance(leaf, Dense) else leaf.dequantize().numpy()
    return np.ascontiguousarray(ordered(values, order).T).astype("<f4" if kind == "F32" else "<f2")


def _arrays(leaf: Leaf, order: np.ndarray | None) -> Quantized:
    assert isinstance(leaf, Quantized)
    if order is None:
        return leaf
    index = torch.from_numpy(order)
    return Quantized(leaf.integers[:, index], leaf.scales[:, index], leaf.grid)


def plane_rows(leaf: Leaf, form: gguf_planes.PlaneFormat, order: np.ndarray | None) -> np.ndarray:
    """Rows in the planes of a sparse file."""
    quantized = _arrays(leaf, order)
    return gguf_planes.pack(quantized.integers.cpu().numpy(), quantized.scales.cpu().numpy(), form)


def block_rows(leaf: Leaf, kind: str, padded: int, order: np.ndarray | None) -> np.ndarray:
    """Rows in ggml's blocks, filled up with zeros to `padded` inputs."""
    quantized = _arrays(leaf, order)
    integers, scales = quantized.integers.cpu().numpy(), quantized.scales.cpu().numpy()
    if padded != len(integers):
        integers = np.concatenate([integers, np.zeros((padded - len(integers), integers.shape[1]), np.int8)])
    return gguf_blocks.pack_blocks(integers, scales, quantized.grid.group, kind)


def leaf_getter(model: CompressedModel, name: str) -> Callable[[], Leaf]:
    """Reads a matrix that is not factorized when its turn comes."""

    def get() -> Leaf:
        matrix = model.matrices[name]
        assert not isinstance(matrix, Factorized)
        return matrix

    return get
