"""What is in a GGUF file, sorted by who handles it: llama.cpp, the plug-in, or numpy before both.

Everything points into the mapped file; pages of what somebody has copied are given back.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np

from compot_deploy.errors import ArtifactError
from compot_deploy.exporters.gguf import index as gguf_index
from compot_deploy.exporters.gguf import quantize as gguf_quantize
from compot_deploy.exporters.gguf.kinds import has_head
from compot_deploy.exporters.gguf.library import LlamaError
from compot_deploy.exporters.gguf.reader import GgufFile
from compot_deploy.llama.plugin import Leaf, Plugin, leaf

Tensor: TypeAlias = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]
"""Type, shape and bytes of a tensor that llama.cpp is given; the bytes are made when they are asked for."""

SELF_TEST: Final = 2e-5
"""Largest difference to numpy allowed for one row when loading, relative to the sum of absolute terms."""

SELF_TEST_OUTPUTS: Final = 32
"""How many outputs of a leaf are compared: a few rows tell, whole matrices would take memory."""

ROWS_ONLY: Final = -2
"""The bundle of a matrix that the plug-in only reads rows of."""

EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"

_RUNNABLE: Final = ("F32", "F16", "BF16", "Q4_0", "Q8_0", "I8")


def _leaf(file: GgufFile, entry: gguf_index.LeafEntry) -> Leaf:
    kind = file.tensors[entry.tensor].kind
    if kind == "I8":
        kind = "columns" if gguf_index.plane_format(entry).narrow else "planes"
    elif kind not in _RUNNABLE:
        raise ArtifactError(
            f"{file.path.name}: {entry.tensor} has the type {kind}, which the plug-in cannot run."
        )
    return leaf(file.bytes_of(entry.tensor), kind, entry.inputs, entry.outputs, entry.grid, entry.pattern)


class Parts:
    """The tensors of a factorized file, sorted by who handles them.

    Attributes:
        tied: the file has no head of its own.
        one_table: llama.cpp multiplies with the embedding itself; otherwise it is given a tied head as a second tensor.
    """

    def __init__(self, file: GgufFile, index: gguf_index.FactorizedIndex) -> None:
        self.file, self.index = file, index
        dense = gguf_index.read_layout(file) == "dense"
        self.base = file.text("general.architecture" if dense else "compot.base_architecture")
        factors = {
            name for pairs in index.matrices.values() for p in pairs for name in (p.dictionary, p.codes)
        }
        self.natives: list[str] = []
        self.plain: list[str] = []  # plain matrices that only the plug-in can read
        for name, tensor in file.tensors.items():
            if name in factors:
                continue
            entry = index.leaves.get(name)
            # The embedding is read by the plug-in straight from the file: no copy, whether tied or not.
            special = entry is not None and (
                name == EMBEDDING or tensor.kind == "I8" or tensor.shape != (entry.outputs, entry.inputs)
            )
            (self.plain if special and tensor.kind in _RUNNABLE else self.natives).append(name)
        self.tied = HEAD not in file.tensors and HEAD.rpartition(".")[0] not in index.matrices
        self.placeholders: dict[str, tuple[int, int]] = {}
        for name in self.plain:
            self.placeholders[name] = (index.leaves[name].outputs, index.leaves[name].inputs)
        for stem, pairs in index.matrices.items():
            codes, dictionary = index.leaves[pairs[0].codes], index.leaves[pairs[0].dictionary]
            self.placeholders[f"{stem}.weight"] = (codes.outputs, dictionary.inputs)
        self.one_table = self.tied and not has_head(self.base)
        if self.tied and not self.one_table and EMBEDDING in self.placeholders:
            # This way of loading gives a tied head a tensor of its own.
            self.placeholders[HEAD] = self.placeholders[EMBEDDING]

    def native(self, name: str) -> Tensor:
        """Type, shape and bytes of a tensor that llama.cpp takes as it is."""
        tensor = self.file.tensors[name]
        return tensor.kind, tensor.shape, lambda: self.file.bytes_of(name)

    def floating(self, name: str) -> Tensor:
        """The same in F32, for which llama.cpp rounds nothing."""
        kind, shape, _ = native = self.native(name)
        return native if kind == "F32" else ("F32", shape, lambda: self._product(name))

    def expanded(self) -> dict[str, Tensor]:
        """Everything multiplied out or dequantized to F32, so that llama.cpp computes without rounding."""
        result = {name: self.floating(name) for name in self.natives}
        for name, shape in self.placeholders.items():
            result[name] = ("F32", shape, lambda n=name: self._product(n))  # type: ignore[misc]
        if self.tied and not self.one_table and HEAD not in result:
            result[HEAD] = result[EMBEDDING]
        return result

    def _product(self, name: str) -> np.ndarray:
        if name == HEAD and self.tied:
            name = EMBEDDING
        stem = name.rpartition(".")[0]
        if name in self.file.tensors and name not in self.index.leaves:
            return gguf_quantize.dequantize(self.file.bytes_of(name), self.file.tensors[name].kind)
        if stem not in self.index.matrices:
            return np.ascontiguousarray(gguf_index.read_values(self.file, self.index.leaves[name]).T)
        total: np.ndarray | None = None
        for pair in self.index.matrices[stem]:
            dictionary = gguf_index.read_values(self.file, self.index.leaves[pair.dictionary]).astype(
                np.float64
            )
            codes = gguf_index.read_values(self.file, self.index.leaves[pair.codes]).astype(np.float64)
            part = dictionary @ codes
            total = part if total is None else total + part
        assert total is not None
        return np.ascontiguousarray(total.T, dtype=np.float32)

    def leaf(self, name: str) -> Leaf:
        """A leaf for the plug-in, pointing into the mapped file."""
        return _leaf(self.file, self.index.leaves[name])

    def linears(self) -> list[tuple[str, int, list[Leaf], int]]:
        """(name of the weight in llama.cpp, pairs, leaves, bundle) of everything the plug-in computes."""
        result: list[tuple[str, int, list[Leaf], int]] = []
        bundles: dict[tuple[str, ...], int] = {}
        for stem, pairs in self.index.matrices.items():
            bundle = bundles.setdefault(tuple(pair.dictionary for pair in pairs), len(bundles))
            leaves = [self.leaf(name) for pair in pairs for name in (pair.dictionary, pair.codes)]
            result.append((f"{stem}.weight", len(pairs), leaves, bundle))
        for name in self.plain:
            rows_only = name == EMBEDDING and not self.one_table
            result.append((name, 0, [self.leaf(name)], ROWS_ONLY if rows_only else -1))
            if rows_only and self.tied:
                result.append((HEAD, 0, [self.leaf(name)], -1))
        return result

    def self_test(self, plugin: Plugin) -> None:
        """One product per kind of leaf against numpy.

        Raises:
            LlamaError: the kernels disagree with the file's numbers.
        """
        plugin.use(plugin.isa)
        seen: set[tuple[int, ...]] = set()
        used = [
            name for pairs in self.index.matrices.values() for p in pairs for name in (p.dictionary, p.codes)
        ]
        for name in (*used, *self.plain):
            entry, whole = self.index.leaves[name], self.leaf(name)
            form = (whole.kind, whole.bits, whole.of, whole.group, whole.group < whole.inputs)
            if form in seen:
                continue
            seen.add(form)
            file, few = gguf_index.first_outputs(self.file, entry, SELF_TEST_OUTPUTS)
            # Small whole numbers, a peak of 127 in every unit: rounding changes nothing.
            x = (np.arange(few.inputs) * 37 % 255 - 127).astype(np.float32)[None]
            x[0, ::64] = 127
            got = plugin.product(_leaf(file, few), x)[0]
            weight = gguf_index.read_values(file, few).astype(np.float64)
            terms = x[0][:, None] * weight  # summed without @: the code of a BLAS would stay in memory
            expected, size = terms.sum(axis=0), np.abs(terms).sum(axis=0)
            if not (np.abs(got - expected) <= SELF_TEST * size + 1e-30).all():
                raise LlamaError(
                    f"The plug-in's kernels for {plugin.isa} compute {name} wrongly: worst difference "
                    f"{np.abs(got - expected).max():.3g}. Please report this machine; execution='expand' works."
                )

    def release_pages(self) -> None:
        """Give back the mapped pages of what llama.cpp and the plug-in hold in memory of their own."""
        mapped = getattr(self.file.data, "_mmap", None)
        if mapped is not None and hasattr(mapped, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)
