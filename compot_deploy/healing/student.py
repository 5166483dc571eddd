"""The compressed model as a checkpoint: its tensors are computed from integers and tuned scales when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compot_deploy.core.matrix import Matrix
from compot_deploy.healing.parameters import grids_of, scale_gradients, weight_of
from compot_deploy.healing.steps import Tuned, Tuning, tuned_scales, tuned_vector
from compot_deploy.models.sites import Site
from compot_deploy.models.source import ModelSource
from compot_deploy.models.weight_gradients import OUTSIDE
from compot_deploy.models.whole import oriented


@dataclass(frozen=True)
class Student:
    """A compressed model that is tuned.

    Attributes:
        original: that it was made of.
        matrices: of the blocks, the tables and outside, by name; read lazily.
        tuning: what is tuned of it.
        device: where it runs.
    """

    original: ModelSource
    matrices: Mapping[str, Matrix]
    tuning: Tuning
    device: str

    @cached_property
    def source(self) -> ModelSource:
        """Read like any model, block by block."""
        return self.original.with_tensors(_Tensors(self))

    @cached_property
    def model(self) -> Any:
        """Its skeleton, in which everything stands that is outside of the blocks."""
        return self.source.skeleton(device=torch.device(self.device), dtype=torch.float32, head=True)

    @cached_property
    def names(self) -> Mapping[str, Sequence[str]]:
        """Matrices of every block, in running order."""
        layout = self.original.layout
        return {
            block: [name for group in layout.of(block) for name in group.names] for block in layout.blocks
        }

    def wanted(self, block: str | None) -> list[str]:
        """Parameters whose gradients are needed."""
        tuned = self.tuning.of(block)
        found = [name for name in tuned if name in self.original.tensors]
        if block is not OUTSIDE:
            found += [self.original.sites[name].parameter for name in self.names[block]]
        return found

    def step(self, block: str | None, gradients: Mapping[str, Tensor], number: int, part: float) -> bool:
        """One step of everything that is tuned of a block; see `Tuned.step`. Returns whether there was a gradient."""
        tuned = self.tuning.of(block)
        found = {name: gradients[name] for name in tuned if name in gradients}
        if block is not OUTSIDE:
            found |= self._at_scales(block, gradients)
        for key, gradient in found.items():
            tuned[key].step(gradient, number, part)
        if block is OUTSIDE:
            self.renew_outside()
        return bool(found)

    def renew_outside(self) -> None:
        """Let the skeleton have the tuned values of what is outside of the blocks."""
        for name, one in self.tuning.of(OUTSIDE).items():
            self.model.get_parameter(name).data.copy_(one.value)

    def _at_scales(self, block: str, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From gradients at weights to gradients at the scales that they are made of."""
        tuned = self.tuning.of(block)
        found: dict[str, Tensor] = {}
        for name in self.names[block]:
            site, matrix = self.original.sites[name], self.matrices[name]
            if site.parameter not in gradients:
                continue
            scales = {key: tuned[key].value for key in grids_of(name, matrix)}
            at_weight = oriented(gradients[site.parameter], site)
            for key, part in scale_gradients(name, matrix, scales, at_weight).items():
                found[key] = found[key] + part if key in found else part
        return found


class _Tensors(Mapping[str, Tensor]):
    """By name in the checkpoint, as a checkpoint keeps them."""

    def __init__(self, student: Student) -> None:
        self._student = student
        source = student.original
        self._sites = {site.parameter: site for site in source.layout.sites}
        self._blocks = {site.parameter: group.block for group in source.layout.groups for site in group.sites}
        self._others = {f"{name}.weight": name for name in student.matrices if name not in source.sites}
        self._vectors = {
            key: one
            for block in (*source.layout.blocks, OUTSIDE)
            for key, one in student.tuning.of(block).items()
            if key in source.tensors
        }

    def __getitem__(self, name: str) -> Tensor:
        student = self._student
        if name in self._sites:
            return self._weight(self._sites[name], self._blocks[name])
        if name in self._others:
            return student.matrices[self._others[name]].dequantize().T
        return self._vectors[name].value if name in self._vectors else student.original.tensors[name]

    def _weight(self, site: Site, block: str) -> Tensor:
        student = self._student
        matrix, tuned = student.matrices[site.name], student.tuning.of(block)
        scales = {key: tuned[key].value for key in grids_of(site.name, matrix)}
        with torch.no_grad():
            return oriented(weight_of(site.name, matrix, scales), site)

    def __iter__(self) -> Iterator[str]:
        return iter(self._student.original.tensors)

    def __len__(self) -> int:
        return len(self._student.original.tensors)


def tuning_of(source: ModelSource, matrices: Mapping[str, Matrix], device: str) -> Tuning:
    """Everything of a compressed model that can be tuned: scales of its blocks, vectors of its blocks and outside."""
    layout = source.layout
    parts: dict[str | None, dict[str, Tuned]] = {block: {} for block in (*layout.blocks, OUTSIDE)}
    for group in layout.groups:
        for name in group.names:
            for key, leaf in grids_of(name, matrices[name]).items():
                if key not in parts[group.block]:
                    parts[group.block][key] = tuned_scales(leaf, device)
    for name in vectors_of(source):
        owner = next((block for block in layout.blocks if name.startswith(f"{block}.")), OUTSIDE)
        parts[owner][name] = tuned_vector(source.tensors[name], device)
    return Tuning(parts)


def vectors_of(source: ModelSource) -> list[str]:
    """Norm weights and biases, by name in the checkpoint; not what a head adds, and not what two names share."""
    known: dict[int, list[str]] = {}
    head = source.layout.head
    for name, parameter in source.meta.named_parameters(remove_duplicate=False):
        known.setdefault(id(parameter), []).append(name)
        if parameter.dim() != 1 or (head is not None and name.startswith(f"{head}.")):
            known[id(parameter)].append("")
    names = [found[0] for found in known.values() if len(found) == 1]
    return [name for name in names if name in source.tensors and source.tensors[name].is_floating_point()]
