"""A model in its final form, as exporters take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from compot_deploy.core.matrix import Matrix
from compot_deploy.errors import UnsupportedModelError
from compot_deploy.models.hints import Architecture
from compot_deploy.models.tasks import GENERATION, Task, task_of

Role: TypeAlias = Literal["linear", "table", "other"]
"""A matrix of a block, which is what a budget is spent on; the token embedding or an output head; any other matrix."""


@dataclass(frozen=True)
class Tables:
    """Paths of the tables of a model.

    Attributes:
        embedding: of the token embedding; None for models that read no tokens.
        head: of the output head; None without one.
    """

    embedding: str | None
    head: str | None


@dataclass(frozen=True)
class CompressedModel:
    """A model ready to be exported: every matrix in its final form, everything else as it was.

    Both mappings may read lazily from disk, so iterating them holds one entry in memory, not the model.

    Attributes:
        architecture: what exporters know about models of this type; None for most.
        config: the transformers configuration, as read from config.json.
        matrices: every linear weight by module path (``model.layers.0.self_attn.q_proj``), the token
            embedding with shape (hidden, vocabulary), and, where the model does not tie them, the output head. In
            running order.
        tensors: the remaining tensors (norms, biases) by name in the model, in their own shapes.
        tied: the head is the embedding; it is stored once.
        source: folder of the original model, for tokenizer and configuration files.
        tables: where the tables are; None where the architecture says it.
        outside: matrices that stand outside of the blocks and are no tables: poolers, classifiers.
    """

    architecture: Architecture | None
    config: Mapping[str, Any]
    matrices: Mapping[str, Matrix]
    tensors: Mapping[str, Tensor]
    tied: bool
    source: str
    tables: Tables | None = None
    outside: frozenset[str] = frozenset()

    @property
    def native(self) -> Architecture:
        """What exporters know about models of this type, for those that write nothing else.

        Raises:
            UnsupportedModelError: nothing is known.
        """
        if self.architecture is None:
            raise UnsupportedModelError(f"A {self.model_type} has no native way into this format.")
        return self.architecture

    @property
    def model_type(self) -> str:
        """``model_type`` of the configuration."""
        return str(self.config["model_type"])

    @property
    def task(self) -> Task:
        """What the model is for.

        Raises:
            UnsupportedModelError: the configuration names a class with a head that is not known here.
        """
        found = GENERATION if self.architecture is not None else task_of(self.config)
        if found is None:
            raise UnsupportedModelError(
                f"A {', '.join(self.config['architectures'])} is not a model of a task that is known here."
            )
        return found

    @property
    def stored_config(self) -> dict[str, Any]:
        """The configuration, with what says whether the head is the embedding as it is stored here."""
        return tied_config(self.config, self.head, self.tied)

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return int(self.config["num_hidden_layers"])

    @property
    def embedding(self) -> str | None:
        """Path of the token embedding."""
        if self.tables is not None:
            return self.tables.embedding
        return None if self.architecture is None else self.architecture.embedding

    @property
    def head(self) -> str | None:
        """Path of the output head."""
        if self.tables is not None:
            return self.tables.head
        return None if self.architecture is None else self.architecture.head

    def role(self, name: str) -> Role:
        """What a matrix is."""
        if name in (self.embedding, self.head):
            return "table"
        return "other" if name in self.outside else "linear"

    def bias(self, linear: str) -> Tensor | None:
        """Bias of a linear, or None."""
        name = f"{linear}.bias"
        return self.tensors[name] if name in self.tensors else None  # noqa: SIM401 - reads lazily


def tied_config(config: Mapping[str, Any], head: str | None, tied: bool) -> dict[str, Any]:
    """A configuration that says whether the head is the embedding; as it is for a model without a head.

    A checkpoint may tie its head while a compressed model stores it apart, at another precision.
    """
    return dict(config) if head is None else {**config, "tie_word_embeddings": tied}
