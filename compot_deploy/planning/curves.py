"""Rate-distortion points: what the forms of a matrix take and what they lose, and the lower hull of such points.

Numbers only, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

from compot_deploy.core.storage import Storage
from compot_deploy.planning.schemes import Form

LEAST_ERROR: Final = 1e-30
"""Has a logarithm; a matrix of zeros has no error at all."""


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


def curve(
    names: Sequence[str],
    alone: Mapping[str, Sequence[tuple[Form, float]]],
    together: Sequence[tuple[Form, Mapping[str, float]]],
    sizes: Mapping[str, tuple[int, int]],
    storage: Storage,
    unmeasured: int = 0,
) -> Curve:
    """Priced candidates from measured errors.

    Args:
        names: matrices of one input.
        alone: form and squared error, for each.
        together: shared form and the squared error of each.
        sizes: (in, out) of each.
        storage: what a leaf costs.
        unmeasured: how many forms were listed and not measured.
    """
    inputs = sizes[names[0]][0]
    outputs = sum(sizes[name][1] for name in names)
    return Curve(
        tuple(names),
        tuple(
            tuple(Candidate(form, form.bytes(*sizes[name], storage), (error,)) for form, error in alone[name])
            for name in names
        ),
        tuple(
            Candidate(form, form.bytes(inputs, outputs, storage), tuple(errors[name] for name in names))
            for form, errors in together
        ),
        unmeasured,
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
