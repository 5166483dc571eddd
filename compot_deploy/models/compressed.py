"""A model in its final form, as exporters take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compot_deploy.core.matrix import Matrix
from compot_deploy.models.hints import Architecture


@dataclass(frozen=True)
class CompressedModel:
    """A model ready to be exported: every matrix in its final form, everything else as it was.

    Both mappings may read lazily from disk, so iterating them holds one entry in memory, not the model.

    Attributes:
        architecture: names and structure.
        config: the transformers configuration, as read from config.json.
        matrices: every linear weight by module path (``model.layers.0.self_attn.q_proj``), the token
            embedding as ``architecture.embedding`` with shape (hidden, vocabulary), and, where the model
            does not tie them, the output head as ``architecture.head``. In block order.
        tensors: the remaining tensors (norms, biases) by checkpoint name, in their checkpoint shapes.
        tied: the head is the embedding; it is stored once.
        source: folder of the original model, for tokenizer and configuration files.
    """

    architecture: Architecture
    config: Mapping[str, Any]
    matrices: Mapping[str, Matrix]
    tensors: Mapping[str, Tensor]
    tied: bool
    source: str

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return int(self.config["num_hidden_layers"])

    def bias(self, linear: str) -> Tensor | None:
        """Bias of a linear, or None."""
        name = f"{linear}.bias"
        return self.tensors[name] if name in self.tensors else None  # noqa: SIM401 - reads lazily
