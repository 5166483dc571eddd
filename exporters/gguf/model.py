"""A GGUF file read back to matrices, integers and scales bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

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
from compot_deploy.exporters.gguf.metadata import Sizes, describe
from compot_deploy.exporters.gguf.names import GgufNames, owner_of
from compot_deploy.exporters.gguf.reader import GgufFile, read_header
from compot_deploy.models.configuration import config_of
from compot_deploy.models.hints import ARCHITECTURES, Architecture
from compot_deploy.models.outline import Outline

T = TypeVar("T")

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
        modules: tuple[str, ...]
        self.shapes: Mapping[str, tuple[int, ...]] = {}
        if outline is None:
            sizes = _sizes(file, base)
            self.architecture: Architecture | None = _base_architecture(file, base)
            self.head: str | None = self.architecture.head
            kind = KINDS[self.architecture.model_type]
            self.expected = (self.architecture.embedding, *self.architecture.linear_names(sizes.layers))
            modules = (*self.expected, self.architecture.head, *_norms(self.architecture, sizes.layers))
        else:
            self.architecture, self.head = None, outline.tables.head
            kind = _kind(file, base, outline)
            sizes = describe(config_of(outline.meta.config)).sizes
            self.shapes = {name: tuple(p.shape) for name, p in outline.meta.named_parameters()}
            self.expected = tuple(name for name in outline.names if name != self.head)
            modules = (*outline.names, *(owner_of(n)[0] for n, _ in outline.meta.named_parameters()))
        self.names = GgufNames(kind, sizes, modules)
        self.matrices = {*self.expected, self.head}
        self.index = FactorizedIndex({}, {}) if self.layout == "dense" else read_index(file)

    def model(self) -> GgufModel:
        pieces: dict[str, dict[str, Matrix]] = {}
        vectors: dict[str, dict[str, np.ndarray]] = {}
        used = {
            name for pairs in self.index.matrices.values() for p in pairs for name in (p.dictionary, p.codes)
        }
        for stem, pairs in self.index.matrices.items():
            module = self._module(stem)
            pieces.setdefault(module, {})[stem] = self._factorized(self._order(module, stem), pairs)
        for name, tensor in self.file.tensors.items():
            if name in used or name.startswith("rope_"):
                continue
            stem, _, part = name.rpartition(".")
            if part not in ("weight", "bias"):
                raise ArtifactError(f"{self.file.path.name}: {name} is neither a weight nor a bias.")
            experts = self.names.experts(stem)
            if experts:
                for expert, value in zip(experts, self._split(name, len(experts)), strict=True):
                    if part == "bias" and isinstance(value, Dense):
                        vectors[f"{expert}.{part}"] = {stem: value.weight.numpy()[0]}
                    else:
                        pieces[expert] = {stem: value}
                continue
            module = self._module(stem)
            order = self._order(module, stem)
            if part != "bias" and module in self.matrices and len(tensor.shape) == 2:
                pieces.setdefault(module, {})[stem] = self._plain(order, name)
            elif len(tensor.shape) <= 2:
                values = gguf_quantize.dequantize(self.file.bytes_of(name), tensor.kind)
                if len(tensor.shape) == 1:
                    values = _restored(values.reshape(1, -1), order if part == "bias" else None)[0]
                whole = module if module in self.shapes else f"{module}.{part}"
                vectors.setdefault(whole, {})[stem] = values - np.float32(self.names.shift(whole))
            else:
                raise ArtifactError(
                    f"{self.file.path.name}: {name} has {len(tensor.shape)} dimensions, not 1 or 2."
                )
        matrices = {module: joined(self._in_order(module, found)) for module, found in pieces.items()}
        tensors = {
            name: torch.from_numpy(
                np.concatenate(self._in_order(owner_of(name)[0], found)).reshape(
                    self.shapes.get(name, next(iter(found.values())).shape)
                )
            )
            for name, found in vectors.items()
        }
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

    def _order(self, module: str, stem: str) -> np.ndarray | None:
        return dict(self.names.parts(module))[stem]

    def _in_order(self, module: str, found: Mapping[str, T]) -> list[T]:
        """The parts of a module, all of them."""
        wanted = [stem for stem, _ in self.names.parts(module)]
        lacking = [stem for stem in wanted if stem not in found]
        if lacking:
            raise ArtifactError(f"{self.file.path.name}: {lacking[0]} is missing beside {next(iter(found))}.")
        return [found[stem] for stem in wanted]

    def _factorized(self, order: np.ndarray | None, pairs: tuple[FactorPairEntry, ...]) -> Factorized:
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

    def _plain(self, order: np.ndarray | None, name: str) -> Leaf:
        if name in self.index.leaves:
            return self._leaf(self.index.leaves[name], order)
        if self.layout != "dense":
            raise ArtifactError(
                f"{self.file.path.name}: the matrix {name} is not described in compot.tensors."
            )
        tensor = self.file.tensors[name]
        grid = {"Q4_0": Grid(4, 32), "Q8_0": Grid(8, 32)}.get(tensor.kind)
        return self._leaf(LeafEntry(name, tensor.shape[1], tensor.shape[0], grid, DENSE), order)

    def _split(self, name: str, count: int) -> list[Leaf]:
        """A stack of experts, cut into what each of them has: matrices, or biases as matrices of one row."""
        tensor = self.file.tensors[name]
        if tensor.shape[0] != count or len(tensor.shape) not in (2, 3):
            raise ArtifactError(
                f"{self.file.path.name}: {name} is {tensor.shape}, and the model has {count} experts."
            )
        inputs = tensor.shape[-1] if len(tensor.shape) == 3 else 1
        outputs = math.prod(tensor.shape) // inputs
        if len(tensor.shape) == 2:
            values = gguf_quantize.dequantize(self.file.bytes_of(name), tensor.kind)
            whole: Leaf = Dense(torch.from_numpy(np.ascontiguousarray(values.reshape(1, -1))))
        else:
            grid = {"Q4_0": Grid(4, 32), "Q8_0": Grid(8, 32)}.get(tensor.kind)
            whole = self._leaf(LeafEntry(name, inputs, outputs, grid, DENSE), None)
        return [_columns(whole, at * outputs // count, (at + 1) * outputs // count) for at in range(count)]

    def _leaf(self, entry: LeafEntry, order: np.ndarray | None) -> Leaf:
        return _reordered(read_leaf(self.file, entry), order)


def joined(parts: Sequence[Matrix]) -> Matrix:
    """A matrix whose outputs were written as several tensors.

    Raises:
        ArtifactError: parts of different kinds.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Factorized):
        chains = [part.pairs for part in parts if isinstance(part, Factorized)]
        if len(chains) == len(parts) and len({len(chain) for chain in chains}) == 1:
            return Factorized(
                tuple(
                    replace(pairs[0], codes=_joined_leaves([pair.codes for pair in pairs]))
                    for pairs in zip(*chains, strict=True)
                )
            )
        raise ArtifactError("Parts of one matrix are factorized in different ways: damaged file.")
    return _joined_leaves([part for part in parts if not isinstance(part, Factorized)])


def _joined_leaves(parts: Sequence[Leaf]) -> Leaf:
    first = parts[0]
    if isinstance(first, Dense):
        dense = [part.weight for part in parts if isinstance(part, Dense)]
        if len(dense) == len(parts):
            return Dense(torch.cat(dense, dim=1))
    else:
        same = [part for part in parts if isinstance(part, Quantized) and part.grid == first.grid]
        if len(same) == len(parts):
            return Quantized(
                torch.cat([part.integers for part in same], dim=1),
                torch.cat([part.scales for part in same], dim=1),
                first.grid,
            )
    raise ArtifactError("Parts of one matrix are stored in different ways: damaged file.")


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


def _columns(leaf: Leaf, start: int, end: int) -> Leaf:
    if isinstance(leaf, Dense):
        return Dense(leaf.weight[:, start:end].contiguous())
    integers, scales = (values[:, start:end].contiguous() for values in (leaf.integers, leaf.scales))
    return Quantized(integers, scales, leaf.grid)


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
