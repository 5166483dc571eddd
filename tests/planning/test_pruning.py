"""Laws of measuring candidates from coarse to fine, on numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import pytest

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.numerics.joint import Tier
from compot_deploy.planning.pruning import Measured, predicted_gain, prune
from compot_deploy.planning.rate_points import between, height, lower_hull
from compot_deploy.planning.schemes import Joint, Plain, Scheme

GRIDS = [Plain(Grid(bits, group)) for bits in (2, 3, 4, 8) for group in (16, 32, 64, 128)]
GRID = Grid(4, 32)
SHARES = {"q": 0.5, "k": 0.25, "v": 0.25}


def dense(atoms: int) -> Joint:
    return Joint((Tier(atoms, GRID, GRID),))


def sparse(atoms: int) -> Joint:
    return Joint((Tier(atoms, GRID, GRID, Pattern(2, 4)),))


class Bench:
    """Made-up matrices: what their schemes cost and lose is known, and what is measured is written down."""

    def __init__(self, seed: int, joint: bool = True, exact: bool = True) -> None:
        chance = random.Random(seed)
        self.measured: list[tuple[Scheme, tuple[str, ...]]] = []
        self.rounded: list[tuple[str, Grid]] = []
        self.per_matrix: dict[str, dict[Scheme, int]] = {}
        self.errors: dict[tuple[str, Scheme], float] = {}
        for name, share in SHARES.items():
            self.per_matrix[name] = {scheme: self._bytes(scheme, share) for scheme in GRIDS}
            gain, slope = chance.uniform(0.05, 0.3), chance.uniform(1.2, 1.6)
            for scheme in GRIDS:
                assert scheme.grid is not None
                finer = 7 - math.log2(scheme.grid.group)
                self.errors[name, scheme] = math.exp(-slope * scheme.grid.bits - gain * finer - 0.5)
        scale = chance.uniform(0.7, 1.1)
        self.shared: dict[Scheme, int] = {}
        factorized = {dense(atoms): 100 * atoms for atoms in (16, 32, 48, 64, 80)}
        factorized |= {sparse(atoms): 50 * atoms for atoms in (32, 64)}
        for tiers, size in factorized.items() if joint else ():
            self.shared[tiers] = size
            for name, share in SHARES.items():
                error = scale * math.exp(-2.0 * size / 8000 * chance.uniform(0.97, 1.03))
                self.errors[name, tiers] = error
                self.per_matrix[name][tiers] = int(size * share)
        self.exact = exact

    @staticmethod
    def _bytes(scheme: Plain, share: float) -> int:
        assert scheme.grid is not None
        return int(share * 4000 * (scheme.grid.bits + 16 / scheme.grid.group))

    def measure(self, scheme: Scheme, names: Sequence[str]) -> Mapping[str, float]:
        self.measured.append((scheme, tuple(names)))
        # a dictionary that nobody shares is better than a shared one, a little
        better = 0.95 if isinstance(scheme, Joint) and len(names) == 1 else 1.0
        return {name: self.errors[name, scheme] * better for name in names}

    def nearest(self, name: str, grid: Grid) -> float:
        self.rounded.append((name, grid))
        return self.errors[name, Plain(grid)] * (3.0 if self.exact else 3.0 + grid.group / 100)

    def prune(self, tolerance: float) -> Measured:
        return prune(
            self.per_matrix,
            self.shared,
            SHARES,
            tolerance=tolerance,
            measure=self.measure,
            nearest=self.nearest,
        )


def test_a_predicted_gain_is_relative_except_where_nothing_is_left_to_gain() -> None:
    hull = [(10, 0.1), (20, 1e-5)]
    assert predicted_gain(0.05, 10, hull) == pytest.approx(0.5, rel=0.01)
    assert predicted_gain(0.2, 10, hull) < 0
    assert predicted_gain(0.2, 9, hull) == 1.0
    assert predicted_gain(0.0, 20, hull) < 0.03


def test_without_a_tolerance_every_scheme_is_measured_and_nothing_predicted() -> None:
    bench = Bench(0)
    found = bench.prune(0.0)
    assert not bench.rounded
    assert {name: list(errors) for name, errors in found.per_matrix.items()} == {
        name: list(prices) for name, prices in bench.per_matrix.items()
    }
    assert set(found.shared) == set(bench.shared)
    assert len(bench.measured) == len(GRIDS) + 7 * 4


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.2])
def test_what_is_measured_is_listed_and_has_the_coarsest_and_the_smallest(
    seed: int, tolerance: float
) -> None:
    bench = Bench(seed, exact=False)
    found = bench.prune(tolerance)
    full = Bench(seed).prune(0.0)
    assert len(set(bench.measured)) == len(bench.measured)
    for name, errors in found.per_matrix.items():
        assert {Plain(Grid(bits, 128)) for bits in (2, 3, 4, 8)} <= set(errors)
        assert list(errors) == [scheme for scheme in bench.per_matrix[name] if scheme in errors]
        assert all(errors[scheme] == full.per_matrix[name][scheme] for scheme in errors)
        smallest = min(bench.per_matrix[name], key=bench.per_matrix[name].__getitem__)
        assert smallest in errors
    assert set(found.shared) <= set(bench.shared)
    assert min(bench.shared.values()) == min(bench.shared[scheme] for scheme in found.shared)
    known = sum(map(len, found.per_matrix.values())) + len(found.shared)
    assert known < sum(map(len, full.per_matrix.values())) + len(full.shared)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.2])
def test_no_grid_is_left_out_that_lies_more_than_the_tolerance_below_what_was_measured(
    seed: int, tolerance: float
) -> None:
    """Where predictions are exact; and of those that are measured beyond the first, some matrix asked for each."""
    bench = Bench(seed, joint=False)
    found = bench.prune(tolerance)
    for name, prices in bench.per_matrix.items():
        hull = lower_hull((prices[scheme], error) for scheme, error in found.per_matrix[name].items())
        left = [scheme for scheme in prices if scheme not in found.per_matrix[name]]
        assert all(
            predicted_gain(bench.errors[name, scheme], prices[scheme], hull) < tolerance for scheme in left
        )
    seen: list[Scheme] = []
    for scheme, names in bench.measured:
        assert names == tuple(SHARES)  # one pass for all matrices
        if len(seen) >= 4:
            asked = [
                predicted_gain(
                    bench.errors[name, scheme],
                    bench.per_matrix[name][scheme],
                    lower_hull((bench.per_matrix[name][one], bench.errors[name, one]) for one in seen),
                )
                for name in names
            ]
            assert max(asked) >= tolerance
        seen.append(scheme)


def test_a_tighter_tolerance_measures_more_of_the_plain_grids() -> None:
    counts = [
        len(Bench(3, joint=False).prune(tolerance).per_matrix["q"]) for tolerance in (1e-9, 0.02, 0.1, 0.9)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 4


@pytest.mark.parametrize("seed", range(4))
def test_plain_grids_are_measured_alike_with_and_without_factorized_schemes(seed: int) -> None:
    """So the mix that a plan is compared with is that of plain mixed precision, whatever dictionaries can do."""
    with_joint, without = (Bench(seed, joint=joint).prune(0.05) for joint in (True, False))
    for name in SHARES:
        grids = {scheme: e for scheme, e in with_joint.per_matrix[name].items() if isinstance(scheme, Plain)}
        assert grids == without.per_matrix[name]


@pytest.mark.parametrize(("better", "wanted"), [(0.6, 2), (1.0, 1), (1.5, 1)])
def test_sparse_codes_are_measured_until_one_of_them_is_seen_to_lose(better: float, wanted: int) -> None:
    """The first is given the benefit of the doubt; what it is worth decides about the next."""
    errors: dict[Scheme, float] = {dense(16): 0.5, dense(64): 0.1, Plain(GRID): 0.01}
    prices: dict[Scheme, int] = {dense(16): 1600, dense(64): 6400, Plain(GRID): 20_000}
    for scheme, size in ((sparse(64), 4000), (sparse(96), 5000)):
        prices[scheme] = size
        errors[scheme] = better * between([(1600, 0.5), (6400, 0.1)], size)
    found = prune(
        {"o": prices},
        {},
        {"o": 1.0},
        tolerance=0.2,
        measure=lambda scheme, names: {names[0]: errors[scheme]},
        nearest=lambda name, grid: 1.0,
    )
    assert {dense(16), dense(64), Plain(GRID)} <= set(found.per_matrix["o"])
    assert len({sparse(64), sparse(96)} & set(found.per_matrix["o"])) == wanted


def test_schemes_in_floating_point_are_measured_from_both_ends_on() -> None:
    atoms = range(8, 8 * 15, 8)
    listed: dict[Scheme, int] = {Plain(None): 30_000}
    listed |= {Joint((Tier(k, None, None, Pattern(k // 2, k)),)): 100 * k for k in atoms}
    order: list[Scheme] = []

    def measure(scheme: Scheme, names: Sequence[str]) -> Mapping[str, float]:
        order.append(scheme)
        return {names[0]: 0.0 if isinstance(scheme, Plain) else math.exp(-listed[scheme] / 6000)}

    def nearest(name: str, grid: Grid) -> float:
        raise AssertionError("there is no grid")

    found = prune({"o": listed}, {}, {"o": 1.0}, tolerance=0.03, measure=measure, nearest=nearest)
    sizes = [listed[scheme] for scheme in found.per_matrix["o"]]
    assert {30_000, 800, 800 * 14} <= set(sizes)
    assert 4 < len(sizes) < len(listed)
    hull = lower_hull((listed[scheme], error) for scheme, error in found.per_matrix["o"].items())
    assert {listed[order[1]], listed[order[2]]} == {800, 800 * 14}
    above = [height(hull, size) / math.exp(-size / 6000) for size in listed.values() if size < 30_000]
    assert max(above) < 1.03


def test_the_same_numbers_are_measured_in_the_same_order() -> None:
    one, two = Bench(5, exact=False), Bench(5, exact=False)
    assert one.prune(0.03) == two.prune(0.03)
    assert one.measured == two.measured
