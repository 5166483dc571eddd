"""Rate-distortion points: what the schemes of a matrix take and what they lose, and the lower hull of such points.

Numbers only, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, TypeAlias

from compot_deploy.core.storage import Storage
from compot_deploy.planning.schemes import Scheme

LEAST_ERROR: Final = 1e-30
"""Has a logarithm; a matrix of zeros has no error at all."""


@dataclass(frozen=True)
class Candidate:
    """A scheme with its price and its measured worth.

    Attributes:
        scheme: what the matrix becomes.
        bytes: as stored.
        errors: relative squared whitened error of each matrix that it covers, after quantization.
    """

    scheme: Scheme
    bytes: int
    errors: tuple[float, ...]


@dataclass(frozen=True)
class RatePoints:
    """What can be chosen for the matrices that read one input.

    Attributes:
        names: of the matrices.
        per_matrix: candidates of each matrix with a dictionary of its own, or without one, in the order of `names`.
        shared: candidates that cover all of them with a shared dictionary; none for a single matrix.
        unmeasured: how many schemes were on the list and pruned, for their predicted gain was too small.
        predicted: candidates whose errors are not measured: the matrices that each covers, and its scheme.
    """

    names: tuple[str, ...]
    per_matrix: tuple[tuple[Candidate, ...], ...]
    shared: tuple[Candidate, ...] = ()
    unmeasured: int = 0
    predicted: frozenset[tuple[tuple[str, ...], Scheme]] = frozenset()

    def __post_init__(self) -> None:
        if len(self.per_matrix) != len(self.names):
            raise ValueError(
                f"{self.names}: {len(self.per_matrix)} lists of candidates for {len(self.names)} names."
            )

    def measured(self) -> RatePoints:
        """The points without the candidates whose errors are predicted."""
        return RatePoints(
            self.names,
            tuple(
                tuple(entry for entry in entries if ((name,), entry.scheme) not in self.predicted)
                for name, entries in zip(self.names, self.per_matrix, strict=True)
            ),
            tuple(entry for entry in self.shared if (self.names, entry.scheme) not in self.predicted),
            len(self.predicted),
        )

    def corrected(self, names: tuple[str, ...], scheme: Scheme, errors: Mapping[str, float]) -> RatePoints:
        """The points with measured errors in the place of predicted ones.

        What else is predicted of the same input moves by the same ratio.

        Args:
            names: of the matrices that the scheme covers.
            scheme: whose errors were measured.
            errors: of each of them.
        """
        shared = len(names) == len(self.names) > 1
        place = self.names.index(names[0])
        candidates = self.shared if shared else self.per_matrix[place]
        before = next(entry for entry in candidates if entry.scheme == scheme)
        ratio = sum(errors.values()) / max(sum(before.errors), LEAST_ERROR)

        def moved(covered: tuple[str, ...], entry: Candidate) -> Candidate:
            if (covered, entry.scheme) == (names, scheme):
                return replace(entry, errors=tuple(errors[name] for name in names))
            if (covered, entry.scheme) in self.predicted:
                return replace(entry, errors=tuple(error * ratio for error in entry.errors))
            return entry

        return replace(
            self,
            per_matrix=tuple(
                tuple(moved((name,), entry) for entry in entries)
                for name, entries in zip(self.names, self.per_matrix, strict=True)
            ),
            shared=tuple(moved(self.names, entry) for entry in self.shared),
            predicted=self.predicted - {(names, scheme)},
        )

    def only(self, keep: Callable[[Scheme], bool]) -> RatePoints:
        """The points with the candidates that `keep` says yes to."""
        return RatePoints(
            self.names,
            tuple(tuple(entry for entry in entries if keep(entry.scheme)) for entries in self.per_matrix),
            tuple(entry for entry in self.shared if keep(entry.scheme)),
        )


def price_candidates(
    names: Sequence[str],
    per_matrix: Mapping[str, Sequence[tuple[Scheme, float]]],
    shared: Sequence[tuple[Scheme, Mapping[str, float]]],
    sizes: Mapping[str, tuple[int, int]],
    storage: Storage,
    unmeasured: int = 0,
    predicted: Iterable[tuple[tuple[str, ...], Scheme]] = (),
) -> RatePoints:
    """Priced candidates from measured errors.

    Args:
        names: matrices of one input.
        per_matrix: scheme and squared error, for each.
        shared: shared scheme and the squared error of each.
        sizes: (in, out) of each.
        storage: what a leaf costs.
        unmeasured: how many schemes were listed and not measured.
        predicted: see `RatePoints`.
    """
    inputs = sizes[names[0]][0]
    outputs = sum(sizes[name][1] for name in names)
    return RatePoints(
        tuple(names),
        tuple(
            tuple(
                Candidate(scheme, scheme.bytes(*sizes[name], storage), (error,))
                for scheme, error in per_matrix[name]
            )
            for name in names
        ),
        tuple(
            Candidate(scheme, scheme.bytes(inputs, outputs, storage), tuple(errors[name] for name in names))
            for scheme, errors in shared
        ),
        unmeasured,
        frozenset(predicted),
    )


Point: TypeAlias = tuple[int | float, float]
"""Bytes and squared error."""


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


def height(hull: Sequence[Point], size: int | float) -> float:
    """What a hull has for so many bytes; infinite below its smallest point."""
    if not hull or size < hull[0][0]:
        return math.inf
    for (low, before), (high, after) in pairwise(hull):
        if size < high:
            return before + (after - before) * (size - low) / (high - low)
    return hull[-1][1]


def sum_of_hulls(hulls: Sequence[Sequence[Point]]) -> list[Point]:
    """The lower hull of all sums with one point of each hull (Minkowski): their edges, steepest first."""
    start = (sum(hull[0][0] for hull in hulls), sum(hull[0][1] for hull in hulls))
    edges = [
        (after[0] - before[0], after[1] - before[1]) for hull in hulls for before, after in pairwise(hull)
    ]
    points = [start]
    for wide, deep in sorted(edges, key=lambda edge: edge[1] / edge[0]):
        points.append((points[-1][0] + wide, points[-1][1] + deep))
    return points


def between(points: Sequence[Point], size: int | float) -> float:
    """The error at so many bytes, its logarithm linear between points and beyond them, never rising."""
    ordered = [(at, math.log(max(error, LEAST_ERROR))) for at, error in sorted(points)]
    if len(ordered) == 1:
        return math.exp(ordered[0][1])
    after = next((place for place, (at, _) in enumerate(ordered) if at >= size), len(ordered) - 1)
    before = max(0, after - 1)
    (low, first), (high, second) = ordered[before], ordered[max(1, after)]
    slope = min(0.0, (second - first) / (high - low)) if high > low else 0.0
    return math.exp(first + slope * (size - low))
