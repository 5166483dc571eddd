"""What the token embedding and the output head do to a model's loss: second moments of their gradients.

A table is used row by row, so its gradient G of a sampled scalar (`Task.sampled`), shape (vocabulary, hidden), has what
both uses ask of a row: as an output of the head ``Σ_t x_t ∂/∂logit_tv``, as an embedding the gradients of the positions
that read it. Of a tied table the two are added before they are squared: it is stored once and weighs twice. Rows are
rounded for themselves, row v by errors ``δ_v = c_v z_v``, c_v as large as its steps are and the z_v alike; to second
order the loss (KL divergence, or one minus the cosine) that this brings is

    ``½ E ⟨G, δ⟩² = ½ mean_v (δ_v / c_v)ᵀ F (δ_v / c_v)``,   ``F = E Gᵀ diag(c²) G``   (hidden, hidden)

F is added up in the backward pass that measures the sensitivities of linears, for each half of the texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from compot_deploy.core.work_files import is_sound, read_tensors, write_tensors
from compot_deploy.errors import UnsupportedModelError
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tasks import Batch
from compot_deploy.planning.prediction import output_steps

HALVES: Final = 2
"""Into which texts are parted, so that what is fitted to some is measured on others."""

CHUNK: Final = 8192
"""Rows of a table that are looked at at a time."""

_FILE: Final = "tables.safetensors"


@dataclass(frozen=True)
class TableEffects:
    """F of one table, of each half of the texts; see above.

    Attributes:
        halves: shape (hidden, hidden) each, in units of the loss.
        rows: the part of each that gradients at looked-up rows make.
    """

    halves: tuple[Float64[Tensor, "hidden hidden"], ...]
    rows: tuple[Float64[Tensor, "hidden hidden"], ...]

    @property
    def whole(self) -> Float64[Tensor, "hidden hidden"]:
        """Of all texts."""
        return torch.stack(self.halves).mean(0)

    def gram(
        self, head: Float64[Tensor, "hidden hidden"] | None, half: int | None = None
    ) -> Float64[Tensor, "hidden hidden"] | None:
        """What to round with: F, its part of the head from more text where there is some.

        Args:
            head: Gram of what the head reads; None for a table that is no head.
            half: of the texts; None is all of them.

        Returns:
            None for a table that nothing is known of.
        """
        whole = self.whole if half is None else self.halves[half]
        rows = torch.stack(self.rows).mean(0) if half is None else self.rows[half]
        weight = float((whole - rows).trace())
        if head is not None and weight > 0.0 and float(head.trace()) > 0.0:
            whole = rows + head * (weight / float(head.trace()))
        return whole if float(whole.trace()) > 0.0 else None


def loss_of(effects: Float64[Tensor, "hidden hidden"], errors: Float[Tensor, "hidden rows"]) -> float:
    """The loss that a table brings whose rows are all like some.

    Args:
        effects: F.
        errors: of these rows, each over the steps of its row, ``δ_v / c_v``.
    """
    errors = errors.double()
    return float((errors * (effects.to(errors.device) @ errors)).sum()) / errors.shape[1] / 2


def has_effects(work: Path) -> bool:
    """Whether F is known in a work folder."""
    return is_sound(work / _FILE)


def keep_effects(work: Path, effects: Mapping[str, TableEffects]) -> None:
    """Put F of every table into the work folder; of none, where gradients could not be had."""
    tensors = {
        f"{kind}/{number}/{name}": part.cpu()
        for name, one in sorted(effects.items())
        for kind, parts in (("halves", one.halves), ("rows", one.rows))
        for number, part in enumerate(parts)
    }
    write_tensors(work / _FILE, tensors, {})


def known_effects(work: Path) -> dict[str, TableEffects]:
    """What `keep_effects` kept."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    for key, tensor in sorted(read_tensors(work / _FILE).items()):
        kind, _, name = key.split("/", 2)
        found.setdefault(name, {"halves": [], "rows": []})[kind].append(tensor)
    return {name: TableEffects(tuple(one["halves"]), tuple(one["rows"])) for name, one in found.items()}


class TableGradients:
    """Adds up F while gradients come by; a `compot_deploy.models.backward.TableWatch`.

    Args:
        source: whose tables.
        batches: what the model reads; one text each.
        device: where to compute.
    """

    def __init__(self, source: ModelSource, batches: Sequence[Batch], device: str) -> None:
        layout = source.layout
        self._embedding = layout.embedding
        self._head = layout.embedding if layout.tied else layout.head
        self._batches = batches
        self._tied = layout.tied
        self._steps: dict[str, Tensor] = {}
        self._sums: dict[str, list[Tensor]] = {}
        self._rows: list[Tensor] = []
        for name in dict.fromkeys((self._embedding, self._head)):
            if name is not None:
                self._steps[name] = table_steps(source, name).to(device)
                hidden = source.shape(name)[0]
                zeros = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
                self._sums[name] = [zeros.clone() for _ in range(HALVES)]
                if name == self._embedding:
                    self._rows = [zeros.clone() for _ in range(HALVES)]
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._pools = source.task.pools
        self._draws = 1
        self._told: set[str] = set()

    def head(
        self, batch: int, values: Float[Tensor, "rows hidden"], gradients: Sequence[Float[Tensor, "rows out"]]
    ) -> None:
        """What the head did in one batch; of a tied table, what the rows that the batch reads need of it is kept."""
        assert self._head is not None
        if not self._tied:
            self._told.add(self._head)
        self._draws = len(gradients)
        read = self._batches[batch].ids.unique() if self._tied else None
        for gradient in gradients:
            stepped = gradient * self._steps[self._head]
            self._add(self._head, batch, values.T @ (stepped @ stepped.T) @ values)
            if read is not None:
                self._kept.setdefault(batch, []).append((values, stepped[:, read]))

    def rows(
        self, batch: int, ids: Int[Tensor, " rows"], gradients: Sequence[Float[Tensor, "rows hidden"]]
    ) -> None:
        """What the rows of the token table did in one batch."""
        assert self._embedding is not None
        self._told.add(self._embedding)
        self._draws = len(gradients)
        read, places = ids.unique(return_inverse=True)
        kept = self._kept.pop(batch, [])
        for number, gradient in enumerate(gradients):
            summed = gradient.new_zeros(len(read), gradient.shape[1]).index_add_(0, places, gradient)
            summed *= self._steps[self._embedding][read, None]
            part = summed.T @ summed
            self._add(self._embedding, batch, part)
            self._rows[batch % HALVES] += part.double()
            if kept:
                values, stepped = kept[number]
                if stepped.shape[1] != len(read):
                    raise UnsupportedModelError("The model looks up other tokens than it is given.")
                both = values.T @ stepped @ summed
                self._add(self._embedding, batch, both + both.T)

    def effects(self) -> dict[str, TableEffects]:
        """F of every table that gradients came by at, per position or text."""
        counts = self._counts()
        found = {}
        for name in self._told:
            rows = (
                self._rows
                if name == self._embedding
                else [torch.zeros_like(part) for part in self._sums[name]]
            )
            halves, own = (
                tuple(part / count for part, count in zip(parts, counts, strict=True) if count)
                for parts in (self._sums[name], rows)
            )
            found[name] = TableEffects(halves, own)
        return found

    def _counts(self) -> list[int]:
        """Positions or texts of each half, times the scalars of each."""
        found = [0] * HALVES
        for number, batch in enumerate(self._batches):
            found[number % HALVES] += len(batch.real) if self._pools else int(batch.real.sum())
        return [count * self._draws for count in found]

    def _add(self, name: str, batch: int, part: Tensor) -> None:
        self._sums[name][batch % HALVES] += part.double()


def table_steps(source: ModelSource, name: str) -> Float[Tensor, " vocabulary"]:
    """How coarse the steps of every row of a table are."""
    rows = source.weight(name).T
    return torch.cat([row_steps(part.float().T) for part in rows.split(CHUNK)])


def row_steps(weight: Float[Tensor, "hidden rows"]) -> Float[Tensor, " rows"]:
    """How coarse the steps of rows are; 1 for a row of zeros, which has no errors."""
    steps = output_steps(weight)
    return torch.where(steps > 0, steps, 1.0)
