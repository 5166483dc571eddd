"""One budget for a whole model: which form every matrix takes, on the bytes that ship.

Numbers only, no tensors. Each matrix, and each set of matrices that read one input, brings a curve: forms
that it could take, each with the bytes that the target's `Storage` says and the squared relative whitened
error that was measured on its quantized values. A plan picks one form for each so that the weighted errors
sum to the least that a budget allows (the multiple-choice knapsack of ROCKET, arXiv 2602.11008, on true bytes).

Plain quantization is among the candidates, so a plan is never worse in its own measure than the best mix of
plain grids. Sharing a dictionary is a candidate as well: for matrices of one input the knapsack sees forms
for all of them together beside every useful combination of forms for each alone.

The solver is exact up to rounding of bytes: dynamic programming over the budget in steps that depend on the
curves alone, so a larger budget never gives a worse plan, and equal inputs give equal plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from typing_extensions import assert_never

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.storage import Storage
from compot_deploy.errors import RecipeError
from compot_deploy.numerics.joint import Level

_STEPS: Final = 1 << 16
"""Resolution of the knapsack: bytes are rounded up to this part of what the largest forms need together."""

_MOST_COMBINATIONS: Final = 64
"""Of forms of matrices that read one input; beyond it only the lower convex hull is kept."""


# -- what a matrix can become -------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """A matrix that is not factorised: quantized on one grid, or None: kept as it is."""

    grid: Grid | None

    def bytes(self, inputs: int, outputs: int, storage: Storage) -> int:
        """As stored."""
        return storage.leaf_bytes(inputs, outputs, self.grid)

    def __str__(self) -> str:
        return "unquantized" if self.grid is None else str(self.grid)


@dataclass(frozen=True)
class Joint:
    """Dictionaries and codes, quantized jointly; see `compot_deploy.numerics.joint`."""

    levels: tuple[Level, ...]

    def bytes(self, inputs: int, outputs: int, storage: Storage) -> int:
        """As stored; `outputs` of all matrices together where they share the dictionary."""
        return sum(
            storage.leaf_bytes(inputs, level.atoms, level.dictionary)
            + storage.leaf_bytes(level.atoms, outputs, level.codes, level.pattern)
            for level in self.levels
        )

    def __str__(self) -> str:
        return " + ".join(map(str, self.levels))


@dataclass(frozen=True)
class Separate:
    """A dictionary and codes made in floating point, then quantized one after the other, as the papers do.

    Attributes:
        method: how the factors are made.
        atoms: k.
        pattern: which codes are kept.
        dictionary: grid of A; None for floating point.
        codes: grid of S.
        rounds: alternations of coding and dictionary update.
        paper_exact: stop where the paper stops.
    """

    method: Literal["compot", "svd-llm"]
    atoms: int
    pattern: Pattern
    dictionary: Grid | None
    codes: Grid | None
    rounds: int
    paper_exact: bool = False

    def bytes(self, inputs: int, outputs: int, storage: Storage) -> int:
        """As stored; `outputs` of all matrices together where they share the dictionary."""
        dictionary = storage.leaf_bytes(inputs, self.atoms, self.dictionary)
        return dictionary + storage.leaf_bytes(self.atoms, outputs, self.codes, self.pattern)


Form: TypeAlias = Plain | Joint | Separate

Point: TypeAlias = tuple[int | float, float]
"""Bytes and squared error."""


@runtime_checkable
class LoadedStorage(Protocol):
    """A storage that knows what a leaf takes once it is loaded."""

    def memory_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """Bytes of a leaf in memory; the arguments are those of `Storage.leaf_bytes`."""
        ...


@dataclass(frozen=True)
class InMemory:
    """The storage of a model that is loaded: what the format says, or as in the file with dense codes.

    Attributes:
        storage: of the file.
    """

    storage: Storage

    def leaf_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = DENSE) -> int:
        """See `compot_deploy.core.storage.Storage`."""
        if isinstance(self.storage, LoadedStorage):
            return self.storage.memory_bytes(rows, columns, grid, pattern)
        return self.storage.leaf_bytes(rows, columns, grid)


@dataclass(frozen=True)
class Candidate:
    """A form with its price and its measured worth.

    Attributes:
        form: what the matrix becomes.
        bytes: as stored.
        errors: relative squared whitened error of each matrix that it covers, after quantization.
    """

    form: Form
    bytes: int
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """What can be chosen for the matrices that read one input.

    Attributes:
        names: of the matrices.
        alone: candidates of each matrix for itself, in the order of `names`.
        together: candidates that cover all of them with one dictionary; none for a single matrix.
        unmeasured: how many forms were on the list and promised too little to be measured.
    """

    names: tuple[str, ...]
    alone: tuple[tuple[Candidate, ...], ...]
    together: tuple[Candidate, ...] = ()
    unmeasured: int = 0

    def __post_init__(self) -> None:
        if len(self.alone) != len(self.names):
            raise ValueError(
                f"{self.names}: {len(self.alone)} lists of candidates for {len(self.names)} names."
            )

    def only(self, keep: Callable[[Form], bool]) -> Curve:
        """The curve with the candidates that `keep` says yes to."""
        return Curve(
            self.names,
            tuple(tuple(entry for entry in entries if keep(entry.form)) for entries in self.alone),
            tuple(entry for entry in self.together if keep(entry.form)),
        )


# -- precision by energy ------------------------------------------------------------------------------


@dataclass(frozen=True)
class GridChoice:
    """Grids that a format holds.

    Attributes:
        groups: sizes of groups by bits.
        step: atoms of a level come in multiples of this.
    """

    groups: Mapping[int, tuple[int, ...]]
    step: int = 8

    @property
    def grids(self) -> tuple[Grid, ...]:
        """All of them."""
        return tuple(Grid(bits, group) for bits, groups in self.groups.items() for group in groups)


_DICTIONARY_LOSS: Final = MappingProxyType({2: 0.05, 3: 0.012, 4: 0.003, 8: 2e-5})
_CODE_LOSS: Final = MappingProxyType({2: 0.16, 3: 0.045, 4: 0.013, 8: 1e-4})
"""Part of an atom's energy that is lost at so many bits. The dictionary's inputs are correlated, which
feedback turns to account; the codes' are not."""


def water_levels(
    energies: Sequence[float],
    inputs: int,
    outputs: int,
    *,
    budget: int,
    storage: Storage,
    grids: GridChoice,
    most_levels: int = 4,
) -> tuple[Level, ...]:
    """Precision by energy: the best number of atoms and bits for each, within a budget (water-filling).

    Every atom takes the bits at which another byte buys less than a common price; the lowest price that
    fits the budget is taken. Atoms of equal bits make a level, small levels join the one above.

    Args:
        energies: squared singular values of the whitened weight, largest first.
        inputs: m.
        outputs: n, of all matrices together.
        budget: bytes for dictionary and codes.
        storage: what a leaf costs.
        grids: what the format holds.
        most_levels: levels that are kept apart.

    Returns:
        Strongest first; empty if not even one step of atoms fits.
    """
    if not energies or energies[0] <= 0.0:
        return ()
    steps = [
        (a, s, inputs * (a + 0.25) + outputs * (s + 0.25), _DICTIONARY_LOSS[a] + _CODE_LOSS[s])
        for a, s in product(sorted(grids.groups), repeat=2)
    ]
    steps = [
        step
        for step in steps
        if not any(other is not step and other[2] <= step[2] and other[3] <= step[3] for other in steps)
    ]

    def at(price: float) -> tuple[Level, ...]:
        chosen: list[tuple[int, int]] = []
        for energy in energies:
            best, least = None, energy
            for a, s, bits, loss in steps:
                value = energy * loss + price * bits
                if value < least:
                    best, least = (a, s), value
            if best is None:
                break
            chosen.append(best)
        return _levels(chosen, inputs, outputs, storage, grids, most_levels)

    def fits(levels: tuple[Level, ...]) -> bool:
        return Joint(levels).bytes(inputs, outputs, storage) <= budget

    low, high = math.log(energies[0] * 1e-12), math.log(energies[0])
    best: tuple[Level, ...] = ()
    for _ in range(40):
        middle = (low + high) / 2
        levels = at(math.exp(middle))
        if fits(levels):
            best, high = levels, middle
        else:
            low = middle
    return best


def _levels(
    chosen: Sequence[tuple[int, int]],
    inputs: int,
    outputs: int,
    storage: Storage,
    grids: GridChoice,
    most: int,
) -> tuple[Level, ...]:
    runs: list[tuple[tuple[int, int], int]] = []
    for bits in chosen:
        if runs and runs[-1][0] == bits:
            runs[-1] = (bits, runs[-1][1] + 1)
        else:
            runs.append((bits, 1))
    while len(runs) > most:
        # The smallest run joins its stronger neighbour, or the second the first.
        position = min(range(1, len(runs)), key=lambda index: runs[index][1])
        bits, count = runs.pop(position)
        runs[position - 1] = (runs[position - 1][0], runs[position - 1][1] + count)
    levels = []
    debt = 0
    for (a, s), count in runs:
        # Whole steps; what a level is given too much is taken from the next.
        atoms = -(-(count - debt) // grids.step) * grids.step
        if atoms <= 0:
            debt -= count
            continue
        debt = atoms - (count - debt)
        levels.append((atoms, a, s))
    total = sum(atoms for atoms, _, _ in levels)
    if total > min(inputs, outputs):
        levels[-1] = (levels[-1][0] - grids.step, *levels[-1][1:])
        levels = [level for level in levels if level[0] > 0]
    return tuple(
        Level(
            atoms,
            _cheapest(inputs, atoms, [Grid(a, group) for group in grids.groups[a]], storage, prefer=64),
            _cheapest(atoms, outputs, [Grid(s, group) for group in grids.groups[s]], storage),
        )
        for atoms, a, s in levels
    )


def _cheapest(rows: int, columns: int, grids: Sequence[Grid], storage: Storage, prefer: int = 0) -> Grid:
    """The grid of fewest bytes; a dictionary prefers groups that follow its inputs."""
    preferred = [grid for grid in grids if grid.group == prefer] or list(grids)
    return min(preferred, key=lambda grid: (storage.leaf_bytes(rows, columns, grid), grid.group))


# -- the knapsack -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """One form and the matrices that it is for; several share a dictionary.

    Attributes:
        names: of the matrices.
        candidate: form, bytes and errors.
        reason: why they are not factorised, where a rule says so.
    """

    names: tuple[str, ...]
    candidate: Candidate
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """A form for every matrix.

    Attributes:
        chosen: in the order of the curves.
        budget: bytes that were allowed.
        loss: predicted: sum of the weighted squared errors.
        notes: facts that a report must state.
    """

    chosen: tuple[Chosen, ...]
    budget: int
    loss: float
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of all matrices."""
        return sum(entry.candidate.bytes for entry in self.chosen)


def knapsack(curves: Sequence[Curve], budget: int, weights: Mapping[str, float] | None = None) -> Plan:
    """The plan of least loss within a budget.

    Args:
        curves: one per input.
        budget: bytes for all matrices.
        weights: what one unit of relative squared error of a matrix costs the model; None weighs all alike.

    Raises:
        RecipeError: a budget below what the smallest forms need, saying what that is.
    """
    return _Problem.of(curves, weights).plans([budget])[0]


def too_little(budget: int, smallest: int) -> RecipeError:
    """What is said of a budget below what the smallest forms need."""
    return RecipeError(
        f"A budget of {budget} bytes for the linears cannot be met: the smallest forms of all of them need "
        f"{smallest} bytes. Allow at least that."
    )


def plain_plan(sizes: Mapping[str, tuple[int, int]], grid: Grid | None, storage: Storage) -> Plan:
    """Every matrix on one grid, whatever that costs in accuracy."""
    form = Plain(grid)
    chosen = tuple(
        Chosen((name,), Candidate(form, form.bytes(*size, storage), (math.nan,)))
        for name, size in sizes.items()
    )
    return Plan(chosen, sum(entry.candidate.bytes for entry in chosen), math.nan)


def smallest_bytes(curves: Sequence[Curve]) -> int:
    """What the smallest forms of all matrices need together."""
    return sum(min(option.bytes for option in _options(curve, None)) for curve in curves)


def frontier(
    curves: Sequence[Curve], weights: Mapping[str, float] | None, budgets: Sequence[int]
) -> tuple[Plan, ...]:
    """The plans of several budgets, for a plot; budgets that cannot be met are left out."""
    problem = _Problem.of(curves, weights)
    return problem.plans([budget for budget in budgets if budget >= problem.smallest])


def better_of(plans: Sequence[Plan], effect: Callable[[Plan], float]) -> Plan:
    """The plan whose measured effect on the model is least; the first wins a tie.

    The loss of a plan adds up effects that were measured one at a time. This is the check that the sum was
    right about plans that come close to each other.
    """
    if not plans:
        raise ValueError("There is no plan to choose from.")
    effects = [effect(plan) for plan in plans]
    return plans[min(range(len(plans)), key=effects.__getitem__)]


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
    def of(cls, curves: Sequence[Curve], weights: Mapping[str, float] | None) -> _Problem:
        items = tuple(tuple(_options(curve, weights)) for curve in curves)
        if not items or not all(items):
            raise RecipeError("There is nothing to plan: a matrix has no candidate at all.")
        return cls(items)

    @property
    def smallest(self) -> int:
        """Bytes of the smallest forms."""
        return sum(options[0].bytes for options in self.items)

    @property
    def most(self) -> int:
        """Bytes of every matrix at its best."""
        return sum(options[-1].bytes for options in self.items)

    @property
    def unit(self) -> int:
        """What bytes are rounded up to: from the curves alone, so that more budget never gives more error."""
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


def _options(curve: Curve, weights: Mapping[str, float] | None) -> list[_Option]:
    """What the knapsack may pick for one input, smallest first; each larger one loses less."""
    weight = {name: 1.0 if weights is None else weights[name] for name in curve.names}

    def loss(names: Sequence[str], candidate: Candidate) -> float:
        return sum(weight[name] * error for name, error in zip(names, candidate.errors, strict=True))

    separate = [_Option(0, 0.0, ())]
    for name, candidates in zip(curve.names, curve.alone, strict=True):
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
        _Option(entry.bytes, loss(curve.names, entry), (Chosen(curve.names, entry),))
        for entry in curve.together
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


def lower_hull(points: Iterable[Point]) -> list[Point]:
    """The lower convex hull of some points, from the smallest on, falling."""
    hull: list[Point] = []
    for size, error in sorted(points):
        if hull and error >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], (size, error)):
            hull.pop()
        hull.append((size, error))
    return hull


def _slope(first: Point, second: Point) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


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


def form_to_data(form: Form) -> dict[str, Any]:
    """A form as JSON takes it; `form_from_data` is the inverse."""

    def grid(value: Grid | None) -> list[int | str] | None:
        if value is None:
            return None
        return [value.bits, value.group, *([] if value.codebook == "integer" else [value.codebook])]

    match form:
        case Plain():
            return {"plain": grid(form.grid)}
        case Joint():
            return {
                "joint": [
                    {
                        "atoms": level.atoms,
                        "dictionary": grid(level.dictionary),
                        "codes": grid(level.codes),
                        "pattern": [level.pattern.kept, level.pattern.of],
                    }
                    for level in form.levels
                ]
            }
        case Separate():
            return {
                "separate": {
                    "method": form.method,
                    "atoms": form.atoms,
                    "pattern": [form.pattern.kept, form.pattern.of],
                    "dictionary": grid(form.dictionary),
                    "codes": grid(form.codes),
                    "rounds": form.rounds,
                    "paper_exact": form.paper_exact,
                }
            }
        case _:
            assert_never(form)


def form_from_data(data: Mapping[str, Any]) -> Form:
    """Read what `form_to_data` wrote."""

    def grid(value: Sequence[Any] | None) -> Grid | None:
        return None if value is None else Grid(*value)

    if "plain" in data:
        return Plain(grid(data["plain"]))
    if "separate" in data:
        values = dict(data["separate"])
        values |= {name: grid(values[name]) for name in ("dictionary", "codes")}
        return Separate(**values | {"pattern": Pattern(*values["pattern"])})
    return Joint(
        tuple(
            Level(level["atoms"], grid(level["dictionary"]), grid(level["codes"]), Pattern(*level["pattern"]))
            for level in data["joint"]
        )
    )


def describe(form: Form) -> str:
    """A few characters for a table: int4/g32, or the atoms and bits of each level."""
    match form:
        case Plain():
            return str(form)
        case Joint():
            parts = []
            for level in form.levels:
                bits = [grid.bits if grid else 32 for grid in (level.dictionary, level.codes)]
                sparse = "" if level.pattern.is_dense else f" {level.pattern}"
                parts.append(f"{level.atoms}@{bits[0]}/{bits[1]}{sparse}")
            return "joint " + " ".join(parts)
        case Separate():
            bits = [grid.bits if grid else 32 for grid in (form.dictionary, form.codes)]
            sparse = "" if form.pattern.is_dense else f" {form.pattern}"
            return f"{form.method} {form.atoms}@{bits[0]}/{bits[1]}{sparse}"
        case _:
            assert_never(form)
