"""Coarse to fine: which forms of the matrices of one input are worth measuring.

Numbers only, no tensors. A few forms are measured to begin with: of every number of bits the coarsest grid, of
factorised forms the smallest and the largest. Of every other form an error is predicted, and the form is measured
only if it promises to lie a part of at least `tolerance` *below* the lower convex hull, in bytes and squared
error, of what was measured before. The greatest promise comes first, each measurement may lower the hull, and
when no form promises enough it is over. No budget is looked at: plans of all budgets choose among the same
forms, so a larger budget never gives a worse plan.

Plain grids come first, and only other grids are their measure: a plan is compared with the best mix of plain
grids, which must not be a worse one for what factorised forms can do. Then forms with one dictionary for all
matrices of the input, against every mix of plain grids; then factorised forms of each matrix for itself, against
its grids and its part of the shared forms.

Predictions. A finer group of a grid: the measured error of the next coarser one, times what the finer groups
bring to rounding to nearest, which needs no feedback and no descent. A factorised form: the logarithm of the
error is nearly linear in bytes among forms of a kind; a dictionary for one matrix follows the shared ones.
They decide what is measured and nothing else: a plan is made of measured errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from compot_deploy.core.grid import Grid
from compot_deploy.planning.curves import LEAST_ERROR, Point, between, height, lower_hull, sum_of_hulls
from compot_deploy.planning.schemes import Form, Joint, Plain

Measure: TypeAlias = Callable[[Form, Sequence[str]], Mapping[str, float]]
"""The squared error of each of some matrices in a form; a factorised form gives all of them one dictionary."""


Nearest: TypeAlias = Callable[[str, Grid], float]
"""The squared error of a matrix that is rounded to nearest on a grid."""


Prices: TypeAlias = Mapping[Form, int]
"""Bytes of every form on a list."""


_NEGLIGIBLE: Final = 5e-4
"""Squared error below which nobody promises much: a sixtieth of what 2 bits cost, fifty times what 8 bits do."""


_SPARSE: Final = 0.9
"""Error of sparse codes as part of what dense ones of the same bytes have, while none was measured."""


@dataclass(frozen=True)
class Measured:
    """The forms that were measured, with their squared errors, in the order in which they were listed.

    Attributes:
        alone: forms of each matrix for itself.
        together: forms with one dictionary for all matrices.
    """

    alone: Mapping[str, Mapping[Form, float]]
    together: Mapping[Form, Mapping[str, float]]


def screen(
    alone: Mapping[str, Prices],
    together: Prices,
    shares: Mapping[str, float],
    *,
    tolerance: float,
    measure: Measure,
    nearest: Nearest,
) -> Measured:
    """Measure what is worth it.

    Args:
        alone: what each matrix of the input may become; all list the same plain forms.
        together: factorised forms for all matrices at once; none for a single one.
        shares: which part of the outputs of all matrices is each one's.
        tolerance: part by which a form must promise to lie below the hull; 0 measures all that is listed.
        measure: makes a form and says what it loses.
        nearest: for predictions; not called with a tolerance of 0.
    """
    names = tuple(alone)
    plain = _plain_forms(alone, tolerance, measure, nearest)
    hulls = {
        name: lower_hull((alone[name][form], errors[name]) for form, errors in plain.items())
        for name in names
    }
    shared: dict[Form, Mapping[str, float]] = {}

    def sum_of_errors(form: Form) -> float:
        shared[form] = measure(form, names)
        return sum(shared[form].values())

    mixes = sum_of_hulls(list(hulls.values())) if all(hulls.values()) else []
    _factorised_forms(together, tolerance, sum_of_errors, mixes)
    found: dict[str, Mapping[Form, float]] = {}
    for name, prices in alone.items():
        parts = [(together[form] * shares[name], errors[name]) for form, errors in shared.items()]
        errors = {form: plain[form][name] for form in plain} | _factorised_forms(
            {form: size for form, size in prices.items() if isinstance(form, Joint)},
            tolerance,
            lambda form, name=name: measure(form, (name,))[name],  # type: ignore[misc]
            hulls[name],
            parts,
        )
        found[name] = {form: errors[form] for form in prices if form in errors}
    return Measured(found, {form: shared[form] for form in together if form in shared})


def _plain_forms(
    alone: Mapping[str, Prices], tolerance: float, measure: Measure, nearest: Nearest
) -> dict[Form, Mapping[str, float]]:
    """Errors of plain forms. A grid is measured for all matrices in one pass, if any of them asks for it."""
    names = tuple(alone)
    listed = [form for form in next(iter(alone.values())) if isinstance(form, Plain)]
    if not tolerance:
        return {form: measure(form, names) for form in listed}
    found: dict[Form, Mapping[str, float]] = {
        form: measure(form, names) for form in _first_plain(listed, alone[names[0]])
    }
    rounded: dict[tuple[str, Grid], float] = {}

    def by_rounding(name: str, grid: Grid) -> float:
        if (name, grid) not in rounded:
            rounded[name, grid] = max(nearest(name, grid), LEAST_ERROR)
        return rounded[name, grid]

    def promised(form: Plain) -> float:
        grid, below = form.grid, min(_coarser(found, form), key=lambda grid: grid.group)
        assert grid is not None  # what is not quantized was measured to begin with
        best = -math.inf
        for name in names:
            hull = lower_hull((alone[name][one], errors[name]) for one, errors in found.items())
            size = alone[name][form]
            if promise(0.0, size, hull) >= tolerance:  # else no error at all would be too little
                gain = by_rounding(name, grid) / by_rounding(name, below)
                best = max(best, promise(gain * found[Plain(below)][name], size, hull))
        return best

    while rest := [form for form in listed if form not in found]:
        promises = {form: promised(form) for form in rest}
        best = max(promises, key=promises.__getitem__)
        if promises[best] < tolerance:
            break
        found[best] = measure(best, names)
    return found


def _first_plain(listed: Sequence[Plain], prices: Prices) -> Iterator[Plain]:
    """Of each number of bits the coarsest grid, which other inputs have too, and the smallest, if that is another.

    A format may fill up a last group; then the coarsest grid is not the smallest.
    """
    for form in listed:
        alike = [form, *(other for other in listed if other != form and _alike(other, form))]
        smallest = min(alike, key=lambda one: (prices[one], -_group(one)))
        if form in (smallest, max(alike, key=_group)):
            yield form


def _coarser(forms: Iterable[Form], form: Plain) -> Iterator[Grid]:
    """Grids among some forms that differ from that of a form in larger groups only."""
    for other in forms:
        if isinstance(other, Plain) and _alike(other, form) and _group(other) > _group(form):
            assert other.grid is not None
            yield other.grid


def _alike(one: Plain, two: Plain) -> bool:
    """Whether two forms differ in the size of their groups at most."""
    if one.grid is None or two.grid is None:
        return one == two
    return replace(one.grid, group=two.grid.group) == two.grid


def _group(form: Plain) -> int:
    return 0 if form.grid is None else form.grid.group


def _factorised_forms(
    prices: Prices,
    tolerance: float,
    measure: Callable[[Form], float],
    beat: Sequence[Point],
    shared: Sequence[Point] = (),
) -> dict[Form, float]:
    """Errors of factorised forms.

    Args:
        prices: what is listed.
        tolerance: see `screen`.
        measure: the error of a form.
        beat: the hull of what else there is.
        shared: of a matrix that shares its input, its part of the forms with a shared dictionary: they are to
            be beaten too, and show how errors fall.
    """
    listed = sorted(prices, key=prices.__getitem__)
    if not tolerance or not listed:
        return {form: measure(form) for form in listed}
    dense = [form for form in listed if not _is_sparse(form)] or listed
    first = dense[:1] if shared else [dense[0], dense[-1]]
    found = {form: measure(form) for form in dict.fromkeys(first)}

    def predicted(form: Form) -> float:
        size = prices[form]
        known = [(prices[one], found[one]) for one in dense if one in found]
        inside = known[0][0] <= size <= known[-1][0]
        if shared and not inside:
            ratios = [math.log(max(error, LEAST_ERROR) / between(shared, at)) for at, error in known]
            value = between(shared, size) * math.exp(sum(ratios) / len(ratios))
        else:
            value = between(known, size)
        return value if form in dense else value * sparse()

    def sparse() -> float:
        known = [(prices[one], found[one]) for one in dense if one in found]
        return min(
            (found[one] / between(known, prices[one]) for one in found if one not in dense), default=_SPARSE
        )

    while rest := [form for form in listed if form not in found]:
        hull = lower_hull([*beat, *shared, *((prices[form], error) for form, error in found.items())])
        promises = {form: promise(predicted(form), prices[form], hull) for form in rest}
        best = max(promises, key=promises.__getitem__)
        if promises[best] < tolerance:
            break
        found[best] = measure(best)
    return found


def _is_sparse(form: Form) -> bool:
    return isinstance(form, Joint) and not all(level.pattern.is_dense for level in form.levels)


def promise(predicted: float, size: int | float, hull: Sequence[Point]) -> float:
    """By which part of itself a form would lower the hull; 1 where it is smaller than everything on it."""
    now = height(hull, size)
    return 1.0 if math.isinf(now) else (now - predicted) / (now + _NEGLIGIBLE)
