"""One budget for a whole model: which scheme every matrix takes, on the bytes that ship.

Numbers only, no tensors. Each matrix, and each set of matrices that read one input, brings rate–distortion points:
schemes that it could take, each with the bytes that the target's `Storage` says and the squared relative whitened
error that was measured on its quantized values. A plan picks one scheme for each so that the weighted errors
sum to the least that a budget allows (the multiple-choice knapsack of ROCKET, arXiv 2602.11008, on true bytes).

Plain quantization is among the candidates, so a plan is never worse in its own measure than the best mix of
plain grids. Sharing a dictionary is a candidate as well: for matrices of one input the knapsack sees schemes
for all of them together beside every useful combination of schemes for each alone.

The solver is exact up to rounding of bytes: dynamic programming over the budget in steps that depend on the
points alone, so a larger budget never gives a worse plan, and equal inputs give equal plans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np

from compot_deploy.core.grid import Grid
from compot_deploy.core.storage import Storage
from compot_deploy.errors import RecipeError
from compot_deploy.planning.rate_points import Candidate, RatePoints, lower_hull
from compot_deploy.planning.schemes import Plain

_STEPS: Final = 1 << 16
"""Resolution of the knapsack: bytes are rounded up to this part of what the largest schemes need together."""

_MOST_COMBINATIONS: Final = 64
"""Of schemes of matrices that read one input; beyond it only the lower convex hull is kept."""


@dataclass(frozen=True)
class Chosen:
    """One scheme and the matrices that it is for; several share a dictionary.

    Attributes:
        names: of the matrices.
        candidate: scheme, bytes and errors.
        reason: why they are not factorized, where a rule says so.
    """

    names: tuple[str, ...]
    candidate: Candidate
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """A scheme for every matrix.

    Attributes:
        chosen: in the order of the inputs.
        budget: bytes that were allowed.
        loss: predicted: sum of the weighted squared errors.
        notes: facts that a report must state.
        tables: schemes of the token embedding and the output head, which `bytes`, `budget` and `loss` leave out; none
            where their precision is settled.
        table_loss: predicted: what the tables add to the loss.
    """

    chosen: tuple[Chosen, ...]
    budget: int
    loss: float
    notes: tuple[str, ...] = ()
    tables: tuple[Chosen, ...] = ()
    table_loss: float = 0.0

    @property
    def bytes(self) -> int:
        """Bytes of all matrices."""
        return sum(entry.candidate.bytes for entry in self.chosen)

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables whose schemes were chosen."""
        return sum(entry.candidate.bytes for entry in self.tables)

    @property
    def total_loss(self) -> float:
        """Predicted, tables included."""
        return self.loss + self.table_loss


def knapsack(
    rate_points: Sequence[RatePoints], budget: int, weights: Mapping[str, float] | None = None
) -> Plan:
    """The plan of least loss within a budget.

    Args:
        rate_points: one per input.
        budget: bytes for all matrices.
        weights: what one unit of relative squared error of a matrix costs the model; None weighs all alike.

    Raises:
        RecipeError: a budget below what the smallest schemes need, saying what that is.
    """
    return _Problem.of(rate_points, weights).plans([budget])[0]


def too_little(budget: int, smallest: int) -> RecipeError:
    """What is said of a budget below what the smallest schemes need."""
    return RecipeError(
        f"A budget of {budget} bytes for the linears cannot be met: the smallest schemes of all of them need "
        f"{smallest} bytes. Allow at least that."
    )


def plain_plan(sizes: Mapping[str, tuple[int, int]], grid: Grid | None, storage: Storage) -> Plan:
    """Every matrix on one grid, whatever that costs in accuracy."""
    scheme = Plain(grid)
    chosen = tuple(
        Chosen((name,), Candidate(scheme, scheme.bytes(*size, storage), (math.nan,)))
        for name, size in sizes.items()
    )
    return Plan(chosen, sum(entry.candidate.bytes for entry in chosen), math.nan)


def smallest_bytes(rate_points: Sequence[RatePoints]) -> int:
    """What the smallest schemes of all matrices need together."""
    return sum(min(option.bytes for option in _options(points, None)) for points in rate_points)


def frontier(
    rate_points: Sequence[RatePoints], weights: Mapping[str, float] | None, budgets: Sequence[int]
) -> tuple[Plan, ...]:
    """The plans of several budgets, for a plot; budgets that cannot be met are left out."""
    problem = _Problem.of(rate_points, weights)
    return problem.plans([budget for budget in budgets if budget >= problem.smallest])


@dataclass(frozen=True)
class _Option:
    bytes: int
    loss: float
    chosen: tuple[Chosen, ...]


@dataclass(frozen=True)
class _Problem:
    """Options of every input, with any number of budgets."""

    items: tuple[tuple[_Option, ...], ...]

    @classmethod
    def of(cls, rate_points: Sequence[RatePoints], weights: Mapping[str, float] | None) -> _Problem:
        items = tuple(tuple(_options(points, weights)) for points in rate_points)
        if not items or not all(items):
            raise RecipeError("There is nothing to plan: a matrix has no candidate at all.")
        return cls(items)

    @property
    def smallest(self) -> int:
        """Bytes of the smallest schemes."""
        return sum(options[0].bytes for options in self.items)

    @property
    def most(self) -> int:
        """Bytes of every matrix at its best."""
        return sum(options[-1].bytes for options in self.items)

    @property
    def unit(self) -> int:
        """What bytes are rounded up to: from the points alone, so that more budget never gives more error."""
        return max(1, -(-self.most // _STEPS))

    def plans(self, budgets: Sequence[int]) -> tuple[Plan, ...]:
        """The plan of each budget; one table of the dynamic programming serves them all."""
        for budget in budgets:
            if budget < self.smallest:
                raise too_little(budget, self.smallest)
        tight = [budget for budget in budgets if budget < self.most]
        table = _Table(self.items, max(tight) // self.unit, self.unit) if tight else None
        plans = []
        for budget in budgets:
            notes: tuple[str, ...] = ()
            if table is None or budget >= self.most:
                chosen = [options[-1] for options in self.items]
                notes = (
                    f"the budget of {budget} bytes is more than the {self.most} that every matrix at its best "
                    "needs",
                )
            else:
                chosen = table.chosen(budget // self.unit)
            entries = tuple(entry for option in chosen for entry in option.chosen)
            plans.append(Plan(entries, budget, sum(option.loss for option in chosen), notes))
        return tuple(plans)


def _options(points: RatePoints, weights: Mapping[str, float] | None) -> list[_Option]:
    """What the knapsack may pick for one input, smallest first; each larger one loses less."""
    weight = {name: 1.0 if weights is None else weights[name] for name in points.names}

    def loss(names: Sequence[str], candidate: Candidate) -> float:
        return sum(weight[name] * error for name, error in zip(names, candidate.errors, strict=True))

    separate = [_Option(0, 0.0, ())]
    for name, candidates in zip(points.names, points.per_matrix, strict=True):
        entries = _front(
            [_Option(entry.bytes, loss((name,), entry), (Chosen((name,), entry),)) for entry in candidates]
        )
        separate = _front(
            [
                _Option(one.bytes + two.bytes, one.loss + two.loss, one.chosen + two.chosen)
                for one, two in product(separate, entries)
            ]
        )
        if len(separate) > _MOST_COMBINATIONS:
            separate = _hull(separate)
    joined = [
        _Option(entry.bytes, loss(points.names, entry), (Chosen(points.names, entry),))
        for entry in points.shared
    ]
    return _front(separate + joined)


def _front(options: Sequence[_Option]) -> list[_Option]:
    """Options that no other beats in both bytes and loss."""
    kept: list[_Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _hull(front: Sequence[_Option]) -> list[_Option]:
    """The options of a front on its lower convex hull."""
    kept = set(lower_hull((option.bytes, option.loss) for option in front))
    return [option for option in front if (option.bytes, option.loss) in kept]


class _Table:
    """Dynamic programming: the least loss of the first inputs within every number of units up to `room`."""

    def __init__(self, items: Sequence[Sequence[_Option]], room: int, unit: int) -> None:
        self._items = items
        self._sizes = [[-(-option.bytes // unit) for option in options] for options in items]
        self._picks = []
        least = np.zeros(room + 1)
        for options, needs in zip(items, self._sizes, strict=True):
            best = np.full(room + 1, np.inf)
            pick = np.zeros(room + 1, dtype=np.int16)
            for number, (option, need) in enumerate(zip(options, needs, strict=True)):
                if need > room:
                    continue
                value = least[: room + 1 - need] + option.loss
                better = value < best[need:]
                best[need:][better] = value[better]
                pick[need:][better] = number
            least = best
            self._picks.append(pick)

    def chosen(self, room: int) -> list[_Option]:
        """One option of each input, within so many units."""
        if sum(map(min, self._sizes)) > room:
            # Rounded up even the smallest do not fit, though their bytes do.
            return [options[0] for options in self._items]
        chosen: list[_Option] = []
        left = room
        for options, needs, pick in zip(
            reversed(self._items), reversed(self._sizes), reversed(self._picks), strict=True
        ):
            number = int(pick[left])
            chosen.append(options[number])
            left -= needs[number]
        return chosen[::-1]
