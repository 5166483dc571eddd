"""What transformers says about a configuration: which matrices a model has, where they are kept, what its tables are.

Everything is asked of the model on the device ``meta``, so a folder that was exported tells all of it by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor, nn

from compot_deploy.core.matrix import Matrix
from compot_deploy.core.store import Without
from compot_deploy.errors import ArtifactError, InputError, UnsupportedModelError, first_line
from compot_deploy.models.compressed import CompressedModel, Tables
from compot_deploy.models.configuration import settings_of
from compot_deploy.models.example import example_of
from compot_deploy.models.hints import ARCHITECTURES
from compot_deploy.models.sites import Layout, discover
from compot_deploy.models.skeleton import on_meta
from compot_deploy.models.tasks import Task, task_of


@dataclass(frozen=True)
class Outline:
    """A model without weights; shared by all who ask for the same configuration, so never change it.

    Attributes:
        task: what the model is for.
        meta: the model on the device ``meta``.
        layout: its blocks, matrices and tables.
    """

    task: Task
    meta: Any
    layout: Layout

    @property
    def tables(self) -> Tables:
        """Paths of the tables."""
        return Tables(self.layout.embedding, self.layout.head)

    @cached_property
    def outside(self) -> tuple[str, ...]:
        """Linears that are neither in a block nor a table: poolers, classifiers."""
        known = {*self.layout.names, self.layout.embedding, self.layout.head}
        return tuple(
            name
            for name, module in self.meta.named_modules()
            if isinstance(module, nn.Linear)
            and name not in known
            and not any(name.startswith(f"{block}.") for block in self.layout.blocks)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every matrix: those of the blocks, the tables, those outside; a tied head is no matrix of its own."""
        head = None if self.layout.tied else self.layout.head
        tables = (name for name in (self.layout.embedding, head) if name is not None)
        return (*self.layout.names, *tables, *self.outside)

    @cached_property
    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        """Other names of parameters that stand in the model more than once, by their first name."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.meta.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return {group[0]: tuple(group[1:]) for group in names.values() if len(group) > 1}

    def turned(self, name: str) -> bool:
        """Whether the parameter of a matrix is kept as (out, in); ``Conv1D`` keeps (in, out)."""
        return type(self.meta.get_submodule(name)).__name__ != "Conv1D"

    def shape(self, name: str) -> tuple[int, int]:
        """(in, out) of a matrix, (hidden, vocabulary) of a table."""
        rows, columns = self.meta.get_submodule(name).weight.shape
        return (columns, rows) if self.turned(name) else (rows, columns)

    def stored(self, name: str, weight: Tensor) -> Tensor:
        """A weight (in, out) as its parameter keeps it, and the other way round."""
        return weight.T if self.turned(name) else weight

    def compressed(
        self,
        config: Mapping[str, Any],
        matrices: Mapping[str, Matrix],
        tensors: Mapping[str, Tensor],
        source: str,
    ) -> CompressedModel:
        """The model of a folder.

        Args:
            config: of the model.
            matrices: read from its files.
            tensors: everything else in the files; names that the model does not know are left out.
            source: the folder.

        Raises:
            ArtifactError: a matrix that the model does not have.
        """
        known = {name for name, _ in self.meta.named_parameters()} | {
            name
            for name, value in self.meta.state_dict(keep_vars=True).items()
            if not isinstance(value, nn.Parameter)
        }
        strange = next((name for name in matrices if f"{name}.weight" not in known), None)
        if strange is not None:
            raise ArtifactError(f"{source}: the model has no matrix {strange}. Export the model again.")
        own = known - {f"{name}.weight" for name in matrices}
        model_type = str(config.get("model_type"))
        return CompressedModel(
            architecture=ARCHITECTURES.get(model_type) if self.task.generates else None,
            config=config,
            matrices=matrices,
            tensors=Without(tensors, {name for name in tensors if name not in own}),
            tied=self.layout.tied,
            source=source,
            tables=self.tables,
            outside=frozenset(name for name in matrices if name in self.outside),
        )


def outline_of(model: CompressedModel) -> Outline:
    """The outline of a compressed model.

    Raises:
        InputError: transformers refuses its configuration.
        UnsupportedModelError: transformers has no model for it.
    """
    return _outline(
        json.dumps(model.stored_config, sort_keys=True),
        model.task,
        f"The configuration of this {model.model_type}",
        InputError,
    )


def outline_of_config(config: Mapping[str, Any], where: str) -> Outline:
    """The outline of a configuration that was read from a folder.

    Args:
        config: with what says whether the head is tied.
        where: for messages.

    Raises:
        ArtifactError: transformers does not understand it.
        UnsupportedModelError: a class with a head that is not known here.
    """
    task = task_of(config)
    if task is None:
        raise UnsupportedModelError(
            f"{where}: a {', '.join(map(str, config['architectures']))} is not a model of a task that is known here: "
            "load it with transformers."
        )
    return _outline(json.dumps(dict(config), sort_keys=True), task, where, ArtifactError)


@lru_cache(maxsize=4)
def _outline(config: str, task: Task, where: str, kind: type[InputError]) -> Outline:
    settings = settings_of(json.loads(config), where, kind)
    try:
        meta = on_meta(settings, task)
        layout = discover(meta, example_of(meta, task))
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a model's own code says to sizes that do not fit each other
        raise kind(f"{where} is not understood: {type(error).__name__}: {first_line(error)}.") from None
    return Outline(task, meta, layout)
