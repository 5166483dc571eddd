"""Module paths to GGUF names, and the order of outputs that llama.cpp wants."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.exporters.gguf import metadata as gguf_metadata
from compot_deploy.models.hints import Architecture


@runtime_checkable
class NamedSizes(Protocol):
    """The sizes that names and orders depend on; `DecoderShape` has them."""

    @property
    def layers(self) -> int:
        """Number of blocks."""
        ...

    @property
    def heads(self) -> int:
        """Query heads."""
        ...

    @property
    def key_value_heads(self) -> int:
        """Key and value heads."""
        ...

    @property
    def head_size(self) -> int:
        """Width of one head."""
        ...


class GgufNames:
    """Module paths to GGUF stems, and the output order that a matrix needs."""

    def __init__(self, architecture: Architecture, sizes: NamedSizes) -> None:
        self.architecture = architecture
        self._stems = {
            architecture.embedding: "token_embd",
            architecture.head: "output",
            architecture.final_norm: "output_norm",
        }
        for layer in range(sizes.layers):
            for path, short in architecture.ggml_names.items():
                self._stems[f"{architecture.block_path(layer)}.{path}"] = f"blk.{layer}.{short}"
        self._orders: dict[str, np.ndarray] = {}
        if architecture.ggml_interleaved_rope:
            self._orders = {
                "attn_q": gguf_metadata.interleaved_rope(sizes.heads, sizes.head_size),
                "attn_k": gguf_metadata.interleaved_rope(sizes.key_value_heads, sizes.head_size),
            }

    def stem(self, module: str) -> str:
        """``model.layers.0.self_attn.q_proj`` to ``blk.0.attn_q``."""
        if module not in self._stems:
            raise UnsupportedModelError(f"{module} has no name in GGUF for {self.architecture.model_type}.")
        return self._stems[module]

    def module(self, stem: str) -> str | None:
        """The inverse of `stem`; None for a stem that no module has."""
        if not hasattr(self, "_modules"):
            self._modules = {short: path for path, short in self._stems.items()}
        return self._modules.get(stem)

    def tensor(self, name: str) -> str:
        """A checkpoint name to a GGUF tensor name.

        Raises:
            UnsupportedModelError: llama.cpp's model of this type has no such tensor.
        """
        module, _, part = name.rpartition(".")
        if part == "bias" and not module.endswith(self.architecture.ggml_biased):
            raise UnsupportedModelError(
                f"{name}: llama.cpp's {self.architecture.ggml_name} has no bias there. Use another --format."
            )
        return f"{self.stem(module)}.{part}"

    def order(self, module: str) -> np.ndarray | None:
        """``new[:, j] = old[:, order[j]]`` for a module's outputs, or None."""
        return self._orders.get(self._stems.get(module, "").rpartition(".")[2])
