"""Module paths to GGUF names, and the order of outputs that llama.cpp wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.exporters.gguf import metadata as gguf_metadata
from compot_deploy.models.hints import Architecture


class GgufNames:
    """Module paths to GGUF stems, and the output order that a matrix needs."""

    def __init__(self, architecture: Architecture, config: Mapping[str, Any]) -> None:
        self.architecture = architecture
        self._stems = {
            architecture.embedding: "token_embd",
            architecture.head: "output",
            architecture.final_norm: "output_norm",
        }
        for layer in range(int(config["num_hidden_layers"])):
            for path, short in architecture.ggml_names.items():
                self._stems[f"{architecture.block_path(layer)}.{path}"] = f"blk.{layer}.{short}"
        self._orders: dict[str, np.ndarray] = {}
        if architecture.ggml_interleaved_rope:
            heads, head = int(config["num_attention_heads"]), architecture.head_size(config)
            groups = int(config.get("num_key_value_heads") or heads)
            self._orders = {
                "attn_q": gguf_metadata.interleaved_rope(heads, head),
                "attn_k": gguf_metadata.interleaved_rope(groups, head),
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
        """A checkpoint name to a GGUF tensor name."""
        module, _, part = name.rpartition(".")
        return f"{self.stem(module)}.{part}"

    def order(self, module: str) -> np.ndarray | None:
        """``new[:, j] = old[:, order[j]]`` for a module's outputs, or None."""
        return self._orders.get(self._stems.get(module, "").rpartition(".")[2])
