"""A GGUF file read back to matrices, integers and scales bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from compot_deploy.core.grid import DENSE, Grid
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Leaf, Matrix, Quantized
from compot_deploy.errors import ArtifactError
from compot_deploy.exporters.gguf import quantize as gguf_quantize
from compot_deploy.exporters.gguf.index import (
    FactorizedIndex,
    FactorPairEntry,
    Layout,
    LeafEntry,
    read_index,
    read_integers,
    read_layout,
)
from compot_deploy.exporters.gguf.kinds import KINDS, Kind
from compot_deploy.exporters.gguf.metadata import Sizes
from compot_deploy.exporters.gguf.names import GgufNames
from compot_deploy.exporters.gguf.reader import GgufFile, read_header
from compot_deploy.models.hints import ARCHITECTURES, Architecture
from compot_deploy.models.outline import Outline


_NORMS: Final = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
"""Of a block, in the architectures that are known by name."""


@dataclass(frozen=True)
class GgufModel:
    """A file read back.

    Attributes:
        layout: which of the three.
        architecture: the base architecture, where exporters know it by name.
        matrices: by module path, in (in, out) and the order of Hugging Face's rotary pairs.
        tensors: norms and biases by checkpoint name.
        tied: the file has no output head of its own.
        metadata: all keys.
    """

    layout: Layout
    architecture: Architecture | None
    matrices: Mapping[str, Matrix]
    tensors: Mapping[str, Tensor]
    tied: bool
    metadata: Mapping[str, Any]


def read(path: str | Path, outline: Outline | None = None) -> GgufModel:
    """Read a file written here back to matrices: integers and scales bit for bit.

    Matrices of a dense file are what they were stored as: Q4_0 and Q8_0 become integers in groups of 32,
    every other type floating point.

    Args:
        path: the file.
        outline: what the configuration beside it says of its matrices; None for the architectures that are known
            by name.

    Raises:
        ArtifactError: the file is damaged, contradicts itself, or has an unknown layout or version.
    """
    return read_file(read_header(path), outline)


def read_file(file: GgufFile, outline: Outline | None = None) -> GgufModel:
    """`read` on a header that was read already.

    Raises:
        ArtifactError: see `read`.
    """
    return _Reader(file, outline).model()


class _Reader:
    """One pass over a checked file."""

    def __init__(self, file: GgufFile, outline: Outline | None) -> None:
        self.file = file
        self.layout = read_layout(file)
        base = file.text("general.architecture" if self.layout == "dense" else "compot.base_architecture")
        sizes = _sizes(file, base)
        modules: tuple[str, ...]
        if outline is None:
            self.architecture: Architecture | None = _base_architecture(file, base)
            self.head: str | None = self.architecture.head
            kind = KINDS[self.architecture.model_type]
            self.expected = (self.architecture.embedding, *self.architecture.linear_names(sizes.layers))
            modules = (*self.expected, self.architecture.head, *_norms(self.architecture, sizes.layers))
        else:
            self.architecture, self.head = None, outline.tables.head
            kind = _kind(file, base, outline)
            self.expected = tuple(name for name in outline.names if name != self.head)
            modules = (*outline.names, *(n.rpartition(".")[0] for n, _ in outline.meta.named_parameters()))
        self.names = GgufNames(kind, sizes, modules)
        self.index = FactorizedIndex({}, {}) if self.layout == "dense" else read_index(file)

    def model(self) -> GgufModel:
        matrices: dict[str, Matrix] = {}
        tensors: dict[str, Tensor] = {}
        used = {
            name for pairs in self.index.matrices.values() for p in pairs for name in (p.dictionary, p.codes)
        }
        for stem, pairs in self.index.matrices.items():
            module = self._module(stem)
            matrices[module] = self._factorized(module, pairs)
        for name, tensor in self.file.tensors.items():
            if name in used or name == "rope_freqs.weight":
                continue
            stem, _, part = name.rpartition(".")
            module = self._module(stem)
            if len(tensor.shape) == 1:
                values = gguf_quantize.dequantize(self.file.bytes_of(name), tensor.kind).reshape(-1)
                order = self.names.order(module) if part == "bias" else None
                values = _restored(values[None], order)[0] - np.float32(self.names.shift(f"{module}.{part}"))
                tensors[f"{module}.{part}"] = torch.from_numpy(values.copy())
            elif len(tensor.shape) == 2 and module not in (*self.expected, self.head):
                values = gguf_quantize.dequantize(self.file.bytes_of(name), tensor.kind)
                tensors[f"{module}.{part}"] = torch.from_numpy(values.copy())
            elif len(tensor.shape) == 2:
                matrices[module] = self._plain(module, name)
            else:
                raise ArtifactError(
                    f"{self.file.path.name}: {name} has {len(tensor.shape)} dimensions, not 1 or 2."
                )
        missing = [name for name in self.expected if name not in matrices]
        if missing:
            raise ArtifactError(
                f"{self.file.path.name}: {len(missing)} matrices are missing, {missing[0]} first."
            )
        return GgufModel(
            layout=self.layout,
            architecture=self.architecture,
            matrices={name: matrices[name] for name in (*self.expected, self.head) if name in matrices},
            tensors=tensors,
            tied=self.head not in matrices,
            metadata=self.file.metadata,
        )

    def _module(self, stem: str) -> str:
        module = self.names.module(stem)
        if module is None:
            raise ArtifactError(
                f"{self.file.path.name}: {stem} belongs to no module of llama.cpp's {self.names.kind.ggml}."
            )
        return module

    def _factorized(self, module: str, pairs: tuple[FactorPairEntry, ...]) -> Factorized:
        order = self.names.order(module)
        return Factorized(
            tuple(
                FactorPair(
                    self._leaf(self.index.leaves[pair.dictionary], None),
                    self._leaf(self.index.leaves[pair.codes], order),
                    pair.name,
                    pair.pattern,
                )
                for pair in pairs
            )
        )

    def _plain(self, module: str, name: str) -> Leaf:
        order = self.names.order(module)
        if name in self.index.leaves:
            return self._leaf(self.index.leaves[name], order)
        if self.layout != "dense":
            raise ArtifactError(
                f"{self.file.path.name}: the matrix {name} is not described in compot.tensors."
            )
        tensor = self.file.tensors[name]
        grid = {"Q4_0": Grid(4, 32), "Q8_0": Grid(8, 32)}.get(tensor.kind)
        return self._leaf(LeafEntry(name, tensor.shape[1], tensor.shape[0], grid, DENSE), order)

    def _leaf(self, entry: LeafEntry, order: np.ndarray | None) -> Leaf:
        return _reordered(read_leaf(self.file, entry), order)


def read_leaf(file: GgufFile, entry: LeafEntry) -> Leaf:
    """A leaf with its outputs in the order of the file.

    Raises:
        ArtifactError: the bytes are not what `write` writes.
    """
    if entry.grid is not None:
        integers, scales = read_integers(file, entry, entry.grid)
        return Quantized(torch.from_numpy(integers), torch.from_numpy(scales), entry.grid)
    rows, kind = file.bytes_of(entry.tensor), file.tensors[entry.tensor].kind
    if kind == "BF16":
        bits = np.ascontiguousarray(np.ascontiguousarray(rows).view("<i2").T)
        return Dense(torch.from_numpy(bits).view(torch.bfloat16))
    if kind == "F16":
        return Dense(torch.from_numpy(np.ascontiguousarray(np.ascontiguousarray(rows).view("<f2").T)))
    return Dense(torch.from_numpy(np.ascontiguousarray(gguf_quantize.dequantize(rows, kind).T)))


def _reordered(leaf: Leaf, order: np.ndarray | None) -> Leaf:
    """Undo the order of rotary pairs."""
    if order is None:
        return leaf
    if leaf.shape[1] != len(order):
        raise ArtifactError(f"A matrix of {leaf.shape[1]} outputs, {len(order)} are expected: damaged file.")
    back = torch.from_numpy(np.argsort(order))
    if isinstance(leaf, Dense):
        return Dense(leaf.weight[:, back])
    return Quantized(leaf.integers[:, back], leaf.scales[:, back], leaf.grid)


def _restored(array: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Undo `_ordered`."""
    if order is None:
        return array
    if array.shape[1] != len(order):
        raise ArtifactError(f"A matrix of {array.shape[1]} outputs, {len(order)} are expected: damaged file.")
    return array[:, np.argsort(order)]


def _base_architecture(file: GgufFile, name: str) -> Architecture:
    """The architecture that llama.cpp calls `name`; Mistral reads back as Llama, which it equals."""
    for architecture in ARCHITECTURES.values():
        if KINDS[architecture.model_type].ggml == name:
            return architecture
    if any(kind.ggml == name for kind in KINDS.values()):
        raise ArtifactError(
            f"{file.path.name}: a file of the architecture {name!r} is read with the configuration beside it: give "
            "its folder."
        )
    raise ArtifactError(f"{file.path.name}: the architecture {name!r} is not one that compot-deploy writes.")


def _kind(file: GgufFile, name: str, outline: Outline) -> Kind:
    kind = KINDS.get(outline.meta.config.model_type)
    if kind is None or kind.ggml != name:
        raise ArtifactError(
            f"{file.path.name}: its architecture {name!r} is not that of a {outline.meta.config.model_type}, which "
            "config.json beside it says."
        )
    return kind


def _norms(architecture: Architecture, layers: int) -> tuple[str, ...]:
    """Everything with weights that is no matrix."""
    inside = [f"{architecture.block_path(layer)}.{path}" for layer in range(layers) for path in _NORMS]
    return (architecture.final_norm, *inside)


def _sizes(file: GgufFile, prefix: str) -> Sizes:
    """The sizes of a file, held against its tensors: orders of rotary pairs are built from them."""
    result = Sizes(
        layers=file.count(f"{prefix}.block_count"),
        heads=file.count(f"{prefix}.attention.head_count"),
        key_value_heads=file.count(f"{prefix}.attention.head_count_kv"),
        head_size=file.count(f"{prefix}.attention.key_length"),
    )
    widest = max((tensor.shape[0] for tensor in file.tensors.values()), default=0)
    rows = max(result.heads, result.key_value_heads) * result.head_size
    if result.layers > len(file.tensors) or rows > 64 * widest:
        raise ArtifactError(
            f"{file.path.name}: {result.layers} blocks of {result.heads} heads contradict the "
            f"{len(file.tensors)} tensors of the file."
        )
    return result
