"""Module paths to GGUF names, and the order of outputs that llama.cpp wants.

Names are those of gguf-py, the package that llama.cpp's own converter takes them from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

import numpy as np

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.exporters.gguf.kinds import Kind, Order
from compot_deploy.exporters.gguf.metadata import Sizes
from compot_deploy.exporters.gguf.rotary import interleaved_rope
from compot_deploy.models.experts import same_place

_COMPUTED: Final = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias")
"""Ends of the names of buffers that some checkpoints hold: the model computes them."""


def loose_names(tensors: Iterable[str]) -> tuple[str, ...]:
    """Names of tensors that are learned."""
    return tuple(name for name in tensors if not name.endswith(_COMPUTED))


def owner_of(name: str) -> tuple[str, str]:
    """The module of a tensor, and which part of it that is; a parameter of no such module stands for itself."""
    module, _, part = name.rpartition(".")
    return (module, part) if part in ("weight", "bias") else (name, "weight")


Part: TypeAlias = tuple[str, np.ndarray | None]
"""A tensor of the file, and which outputs of a module it holds in which order; None is all of them as they are."""


class GgufNames:
    """Module paths to GGUF stems, and the output order that a matrix needs.

    Args:
        kind: of the model.
        sizes: of the model.
        modules: paths of everything with a weight or a bias.
    """

    def __init__(self, kind: Kind, sizes: Sizes, modules: Iterable[str]) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self.kind, self.sizes = kind, sizes
        architecture = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == kind.ggml), None)
        if architecture is None:
            raise UnsupportedModelError(
                f"The installed package gguf has no tensor names for llama.cpp's {kind.ggml}: pip install -U gguf"
            )
        known = get_tensor_name_map(architecture, sizes.layers)
        self._stems: dict[str, str] = {}
        for module in modules:
            stem = self._renamed(module) or known.get_name(same_place(module) or module)
            if stem is not None:
                self._stems[module] = stem
        self._modules = {stem: module for module in self._stems for stem, _ in self.parts(module)}
        self._experts: dict[str, list[str]] = {}
        for module, stem in self._stems.items():
            if same_place(module) is not None:
                self._experts.setdefault(stem, []).append(module)

    def stem(self, module: str) -> str:
        """``model.layers.0.self_attn.q_proj`` to ``blk.0.attn_q``."""
        if module not in self._stems:
            raise UnsupportedModelError(f"{module} has no name in GGUF for llama.cpp's {self.kind.ggml}.")
        return self._stems[module]

    def module(self, stem: str) -> str | None:
        """The inverse of `stem`; None for a stem that no module has."""
        return self._modules.get(stem)

    def experts(self, stem: str) -> tuple[str, ...]:
        """Modules that a stack of experts holds, in their order; none for a tensor of another kind."""
        return tuple(self._experts.get(stem, ()))

    def parts(self, module: str) -> tuple[Part, ...]:
        """The tensors that a module is written as: one, or several that share its outputs."""
        stem = self.stem(module)
        block, _, short = stem.rpartition(".")
        pieces = self.kind.split.get(short)
        if pieces is None:
            return ((stem, self.order(module)),)
        ends = np.cumsum([self._heads(piece) * self.sizes.head_size for piece in pieces])
        return tuple(
            (f"{block}.{piece}", np.arange(end - self._heads(piece) * self.sizes.head_size, end))
            for piece, end in zip(pieces, ends, strict=True)
        )

    def tensors(self, name: str) -> tuple[Part, ...]:
        """A checkpoint name to the GGUF tensors that hold it, with the order of a bias.

        Raises:
            UnsupportedModelError: llama.cpp's model of this type has no such tensor.
        """
        module, part = owner_of(name)
        stem = self.stem(module)
        short = stem.rpartition(".")[2]
        norm = short.endswith("norm") and not self.kind.rms
        if part == "bias" and not norm and short not in self.kind.biased:
            raise UnsupportedModelError(
                f"{name}: llama.cpp's {self.kind.ggml} has no bias there. Use another --format."
            )
        return tuple(
            (f"{one}.{part}", order if part == "bias" else None) for one, order in self.parts(module)
        )

    def order(self, module: str) -> np.ndarray | None:
        """``new[:, j] = old[:, order[j]]`` for the outputs of a module that is written as one tensor, or None."""
        short = self._stems.get(module, "").rpartition(".")[2]
        wanted = self.kind.orders.get(short)
        return None if wanted is None else _order(wanted, self.sizes, self._heads(short))

    def _heads(self, short: str) -> int:
        return self.sizes.key_value_heads if short in ("attn_k", "attn_v") else self.sizes.heads

    def shift(self, name: str) -> float:
        """What is added to a tensor on its way into the file."""
        module, part = owner_of(name)
        return self.kind.shift if part == "weight" and self._stems.get(module, "").endswith("norm") else 0.0

    def _renamed(self, module: str) -> str | None:
        for path, short in self.kind.renamed.items():
            if module == path:
                return short
            if module.endswith(f".{path}"):
                block = next(part for part in module.split(".") if part.isdigit())
                return f"blk.{block}.{short}"
        return None


def _order(wanted: Order, sizes: Sizes, heads: int) -> np.ndarray:
    if wanted == "pairs":
        return interleaved_rope(heads, sizes.head_size)
    # Query, key and value of each head beside each other; llama.cpp wants all queries, all keys, all values.
    rows = np.arange(heads * 3 * sizes.head_size).reshape(heads, 3, sizes.head_size)
    return rows.swapaxes(0, 1).reshape(-1)
