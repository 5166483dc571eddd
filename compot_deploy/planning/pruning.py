"""Pruning, coarse to fine: which schemes of the matrices of one input are worth measuring.

Numbers only, no tensors. A few schemes are measured to begin with: of every number of bits the coarsest grid, of
factorized schemes the smallest and the largest. Of every other scheme an error is predicted, and the scheme is measured
only if it is predicted to lie a part of at least `tolerance` *below* the lower convex hull, in bytes and squared
error, of what was measured before. The greatest predicted gain comes first, each measurement may lower the hull, and
what gains too little is pruned. No budget is looked at: plans of all budgets choose among the same
schemes, so a larger budget never gives a worse plan.

Plain grids come first, and only other grids are their measure: a plan is compared with the best mix of plain
grids, which must not be a worse one for what factorized schemes can do. Then schemes with one dictionary for all
matrices of the input, against every mix of plain grids; then factorized schemes of each matrix for itself, against
its grids and its part of the shared schemes.

Predictions. A finer group of a grid: the measured error of the next coarser one, times what the finer groups
bring to rounding to nearest, which needs no feedback and no descent. A factorized scheme: the logarithm of the
error is nearly linear in bytes among schemes of a kind; a dictionary for one matrix follows the shared ones.
They decide what is measured and nothing else: a plan is made of measured errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from compot_deploy.core.grid import Grid
from compot_deploy.planning.rate_points import LEAST_ERROR, Point, between, height, lower_hull, sum_of_hulls
from compot_deploy.planning.schemes import Joint, Plain, Scheme

Measure: TypeAlias = Callable[[Scheme, Sequence[str]], Mapping[str, float]]
"""The squared error of each of some matrices in a scheme; a factorized scheme gives all of them one dictionary."""


Nearest: TypeAlias = Callable[[str, Grid], float]
"""The squared error of a matrix that is rounded to nearest on a grid."""


Prices: TypeAlias = Mapping[Scheme, int]
"""Bytes of every scheme on a list."""


_NEGLIGIBLE: Final = 5e-4
"""Squared error below which nothing gains much: a sixtieth of what 2 bits cost, fifty times what 8 bits do."""


_SPARSE: Final = 0.9
"""Error of sparse codes as part of what dense ones of the same bytes have, while none was measured."""


@dataclass(frozen=True)
class Measured:
    """The schemes that were measured, with their squared errors, in the order in which they were listed.

    Attributes:
        per_matrix: schemes of each matrix for itself.
        shared: schemes with one dictionary for all matrices.
    """

    per_matrix: Mapping[str, Mapping[Scheme, float]]
    shared: Mapping[Scheme, Mapping[str, float]]


def prune(
    per_matrix: Mapping[str, Prices],
    shared: Prices,
    shares: Mapping[str, float],
    *,
    tolerance: float,
    measure: Measure,
    nearest: Nearest,
) -> Measured:
    """Measure what is worth it.

    Args:
        per_matrix: what each matrix of the input may become; all list the same plain schemes.
        shared: factorized schemes for all matrices at once; none for a single one.
        shares: which part of the outputs of all matrices is each one's.
        tolerance: part by which a scheme must be predicted to lie below the hull; 0 measures all that is listed.
        measure: makes a scheme and says what it loses.
        nearest: for predictions; not called with a tolerance of 0.
    """
    names = tuple(per_matrix)
    plain = _plain_schemes(per_matrix, tolerance, measure, nearest)
    hulls = {
        name: lower_hull((per_matrix[name][scheme], errors[name]) for scheme, errors in plain.items())
        for name in names
    }
    shared_errors: dict[Scheme, Mapping[str, float]] = {}

    def sum_of_errors(scheme: Scheme) -> float:
        shared_errors[scheme] = measure(scheme, names)
        return sum(shared_errors[scheme].values())

    mixes = sum_of_hulls(list(hulls.values())) if all(hulls.values()) else []
    _factorized_schemes(shared, tolerance, sum_of_errors, mixes)
    found: dict[str, Mapping[Scheme, float]] = {}
    for name, prices in per_matrix.items():
        parts = [(shared[scheme] * shares[name], errors[name]) for scheme, errors in shared_errors.items()]
        errors = {scheme: plain[scheme][name] for scheme in plain} | _factorized_schemes(
            {scheme: size for scheme, size in prices.items() if isinstance(scheme, Joint)},
            tolerance,
            lambda scheme, name=name: measure(scheme, (name,))[name],  # type: ignore[misc]
            hulls[name],
            parts,
        )
        found[name] = {scheme: errors[scheme] for scheme in prices if scheme in errors}
    return Measured(found, {scheme: shared_errors[scheme] for scheme in shared if scheme in shared_errors})


def _plain_schemes(
    per_matrix: Mapping[str, Prices], tolerance: float, measure: Measure, nearest: Nearest
) -> dict[Scheme, Mapping[str, float]]:
    """Errors of plain schemes. A grid is measured for all matrices in one pass, if any of them asks for it."""
    names = tuple(per_matrix)
    listed = [scheme for scheme in next(iter(per_matrix.values())) if isinstance(scheme, Plain)]
    if not tolerance:
        return {scheme: measure(scheme, names) for scheme in listed}
    found: dict[Scheme, Mapping[str, float]] = {
        scheme: measure(scheme, names) for scheme in _first_plain(listed, per_matrix[names[0]])
    }
    rounded: dict[tuple[str, Grid], float] = {}

    def by_rounding(name: str, grid: Grid) -> float:
        if (name, grid) not in rounded:
            rounded[name, grid] = max(nearest(name, grid), LEAST_ERROR)
        return rounded[name, grid]

    def gain_of(scheme: Plain) -> float:
        grid, below = scheme.grid, min(_coarser(found, scheme), key=lambda grid: grid.group)
        assert grid is not None  # what is not quantized was measured to begin with
        best = -math.inf
        for name in names:
            hull = lower_hull((per_matrix[name][one], errors[name]) for one, errors in found.items())
            size = per_matrix[name][scheme]
            if predicted_gain(0.0, size, hull) >= tolerance:  # else no error at all would be too little
                finer = by_rounding(name, grid) / by_rounding(name, below)
                best = max(best, predicted_gain(finer * found[Plain(below)][name], size, hull))
        return best

    while rest := [scheme for scheme in listed if scheme not in found]:
        gains = {scheme: gain_of(scheme) for scheme in rest}
        best = max(gains, key=gains.__getitem__)
        if gains[best] < tolerance:
            break
        found[best] = measure(best, names)
    return found


def _first_plain(listed: Sequence[Plain], prices: Prices) -> Iterator[Plain]:
    """Of each number of bits the coarsest grid, which other inputs have too, and the smallest, if that is another.

    A format may fill up a last group; then the coarsest grid is not the smallest.
    """
    for scheme in listed:
        alike = [scheme, *(other for other in listed if other != scheme and _alike(other, scheme))]
        smallest = min(alike, key=lambda one: (prices[one], -_group(one)))
        if scheme in (smallest, max(alike, key=_group)):
            yield scheme


def _coarser(schemes: Iterable[Scheme], scheme: Plain) -> Iterator[Grid]:
    """Grids among some schemes that differ from that of a scheme in larger groups only."""
    for other in schemes:
        if isinstance(other, Plain) and _alike(other, scheme) and _group(other) > _group(scheme):
            assert other.grid is not None
            yield other.grid


def _alike(one: Plain, two: Plain) -> bool:
    """Whether two schemes differ in the size of their groups at most."""
    if one.grid is None or two.grid is None:
        return one == two
    return replace(one.grid, group=two.grid.group) == two.grid


def _group(scheme: Plain) -> int:
    return 0 if scheme.grid is None else scheme.grid.group


def _factorized_schemes(
    prices: Prices,
    tolerance: float,
    measure: Callable[[Scheme], float],
    beat: Sequence[Point],
    shared: Sequence[Point] = (),
) -> dict[Scheme, float]:
    """Errors of factorized schemes.

    Args:
        prices: what is listed.
        tolerance: see `prune`.
        measure: the error of a scheme.
        beat: the hull of what else there is.
        shared: of a matrix that shares its input, its part of the schemes with a shared dictionary: they are to
            be beaten too, and show how errors fall.
    """
    listed = sorted(prices, key=prices.__getitem__)
    if not tolerance or not listed:
        return {scheme: measure(scheme) for scheme in listed}
    dense = [scheme for scheme in listed if not _is_sparse(scheme)] or listed
    first = dense[:1] if shared else [dense[0], dense[-1]]
    found = {scheme: measure(scheme) for scheme in dict.fromkeys(first)}

    def predicted(scheme: Scheme) -> float:
        size = prices[scheme]
        known = [(prices[one], found[one]) for one in dense if one in found]
        inside = known[0][0] <= size <= known[-1][0]
        if shared and not inside:
            ratios = [math.log(max(error, LEAST_ERROR) / between(shared, at)) for at, error in known]
            value = between(shared, size) * math.exp(sum(ratios) / len(ratios))
        else:
            value = between(known, size)
        return value if scheme in dense else value * sparse()

    def sparse() -> float:
        known = [(prices[one], found[one]) for one in dense if one in found]
        return min(
            (found[one] / between(known, prices[one]) for one in found if one not in dense), default=_SPARSE
        )

    while rest := [scheme for scheme in listed if scheme not in found]:
        hull = lower_hull([*beat, *shared, *((prices[scheme], error) for scheme, error in found.items())])
        gains = {scheme: predicted_gain(predicted(scheme), prices[scheme], hull) for scheme in rest}
        best = max(gains, key=gains.__getitem__)
        if gains[best] < tolerance:
            break
        found[best] = measure(best)
    return found


def _is_sparse(scheme: Scheme) -> bool:
    return isinstance(scheme, Joint) and not scheme.is_dense


def predicted_gain(predicted: float, size: int | float, hull: Sequence[Point]) -> float:
    """By which part of itself a scheme would lower the hull; 1 where it is smaller than everything on it."""
    now = height(hull, size)
    return 1.0 if math.isinf(now) else (now - predicted) / (now + _NEGLIGIBLE)
