"""Laws of measuring candidates from coarse to fine, on numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import pytest

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.numerics.joint import Level
from compot_deploy.planning.curves import between, height, lower_hull
from compot_deploy.planning.schemes import Form, Joint, Plain
from compot_deploy.planning.screening import Measured, promise, screen

GRIDS = [Plain(Grid(bits, group)) for bits in (2, 3, 4, 8) for group in (16, 32, 64, 128)]
GRID = Grid(4, 32)
SHARES = {"q": 0.5, "k": 0.25, "v": 0.25}


def dense(atoms: int) -> Joint:
    return Joint((Level(atoms, GRID, GRID),))


def sparse(atoms: int) -> Joint:
    return Joint((Level(atoms, GRID, GRID, Pattern(2, 4)),))


class Bench:
    """Made-up matrices: what their forms cost and lose is known, and what is measured is written down."""

    def __init__(self, seed: int, joint: bool = True, exact: bool = True) -> None:
        chance = random.Random(seed)
        self.measured: list[tuple[Form, tuple[str, ...]]] = []
        self.rounded: list[tuple[str, Grid]] = []
        self.alone: dict[str, dict[Form, int]] = {}
        self.errors: dict[tuple[str, Form], float] = {}
        for name, share in SHARES.items():
            self.alone[name] = {form: self._bytes(form, share) for form in GRIDS}
            gain, slope = chance.uniform(0.05, 0.3), chance.uniform(1.2, 1.6)
            for form in GRIDS:
                assert form.grid is not None
                finer = 7 - math.log2(form.grid.group)
                self.errors[name, form] = math.exp(-slope * form.grid.bits - gain * finer - 0.5)
        scale = chance.uniform(0.7, 1.1)
        self.together: dict[Form, int] = {}
        factorised = {dense(atoms): 100 * atoms for atoms in (16, 32, 48, 64, 80)}
        factorised |= {sparse(atoms): 50 * atoms for atoms in (32, 64)}
        for levels, size in factorised.items() if joint else ():
            self.together[levels] = size
            for name, share in SHARES.items():
                error = scale * math.exp(-2.0 * size / 8000 * chance.uniform(0.97, 1.03))
                self.errors[name, levels] = error
                self.alone[name][levels] = int(size * share)
        self.exact = exact

    @staticmethod
    def _bytes(form: Plain, share: float) -> int:
        assert form.grid is not None
        return int(share * 4000 * (form.grid.bits + 16 / form.grid.group))

    def measure(self, form: Form, names: Sequence[str]) -> Mapping[str, float]:
        self.measured.append((form, tuple(names)))
        # a dictionary that nobody shares is better than a shared one, a little
        better = 0.95 if isinstance(form, Joint) and len(names) == 1 else 1.0
        return {name: self.errors[name, form] * better for name in names}

    def nearest(self, name: str, grid: Grid) -> float:
        self.rounded.append((name, grid))
        return self.errors[name, Plain(grid)] * (3.0 if self.exact else 3.0 + grid.group / 100)

    def screen(self, tolerance: float) -> Measured:
        return screen(
            self.alone,
            self.together,
            SHARES,
            tolerance=tolerance,
            measure=self.measure,
            nearest=self.nearest,
        )


def test_a_promise_is_relative_except_where_nothing_is_left_to_gain() -> None:
    hull = [(10, 0.1), (20, 1e-5)]
    assert promise(0.05, 10, hull) == pytest.approx(0.5, rel=0.01)
    assert promise(0.2, 10, hull) < 0
    assert promise(0.2, 9, hull) == 1.0
    assert promise(0.0, 20, hull) < 0.03


def test_without_a_tolerance_every_form_is_measured_and_nothing_predicted() -> None:
    bench = Bench(0)
    found = bench.screen(0.0)
    assert not bench.rounded
    assert {name: list(errors) for name, errors in found.alone.items()} == {
        name: list(prices) for name, prices in bench.alone.items()
    }
    assert set(found.together) == set(bench.together)
    assert len(bench.measured) == len(GRIDS) + 7 * 4


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.2])
def test_what_is_measured_is_listed_and_has_the_coarsest_and_the_smallest(
    seed: int, tolerance: float
) -> None:
    bench = Bench(seed, exact=False)
    found = bench.screen(tolerance)
    full = Bench(seed).screen(0.0)
    assert len(set(bench.measured)) == len(bench.measured)
    for name, errors in found.alone.items():
        assert {Plain(Grid(bits, 128)) for bits in (2, 3, 4, 8)} <= set(errors)
        assert list(errors) == [form for form in bench.alone[name] if form in errors]
        assert all(errors[form] == full.alone[name][form] for form in errors)
        smallest = min(bench.alone[name], key=bench.alone[name].__getitem__)
        assert smallest in errors
    assert set(found.together) <= set(bench.together)
    assert min(bench.together.values()) == min(bench.together[form] for form in found.together)
    known = sum(map(len, found.alone.values())) + len(found.together)
    assert known < sum(map(len, full.alone.values())) + len(full.together)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.2])
def test_no_grid_is_left_out_that_lies_more_than_the_tolerance_below_what_was_measured(
    seed: int, tolerance: float
) -> None:
    """Where predictions are exact; and of those that are measured beyond the first, some matrix asked for each."""
    bench = Bench(seed, joint=False)
    found = bench.screen(tolerance)
    for name, prices in bench.alone.items():
        hull = lower_hull((prices[form], error) for form, error in found.alone[name].items())
        left = [form for form in prices if form not in found.alone[name]]
        assert all(promise(bench.errors[name, form], prices[form], hull) < tolerance for form in left)
    seen: list[Form] = []
    for form, names in bench.measured:
        assert names == tuple(SHARES)  # one pass for all matrices
        if len(seen) >= 4:
            asked = [
                promise(
                    bench.errors[name, form],
                    bench.alone[name][form],
                    lower_hull((bench.alone[name][one], bench.errors[name, one]) for one in seen),
                )
                for name in names
            ]
            assert max(asked) >= tolerance
        seen.append(form)


def test_a_tighter_tolerance_measures_more_of_the_plain_grids() -> None:
    counts = [len(Bench(3, joint=False).screen(tolerance).alone["q"]) for tolerance in (1e-9, 0.02, 0.1, 0.9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 4


@pytest.mark.parametrize("seed", range(4))
def test_plain_grids_are_measured_alike_with_and_without_factorised_forms(seed: int) -> None:
    """So the mix that a plan is compared with is that of plain mixed precision, whatever dictionaries can do."""
    with_joint, without = (Bench(seed, joint=joint).screen(0.05) for joint in (True, False))
    for name in SHARES:
        grids = {form: e for form, e in with_joint.alone[name].items() if isinstance(form, Plain)}
        assert grids == without.alone[name]


@pytest.mark.parametrize(("better", "wanted"), [(0.6, 2), (1.0, 1), (1.5, 1)])
def test_sparse_codes_are_measured_until_one_of_them_is_seen_to_lose(better: float, wanted: int) -> None:
    """The first is given the benefit of the doubt; what it is worth decides about the next."""
    errors: dict[Form, float] = {dense(16): 0.5, dense(64): 0.1, Plain(GRID): 0.01}
    prices: dict[Form, int] = {dense(16): 1600, dense(64): 6400, Plain(GRID): 20_000}
    for form, size in ((sparse(64), 4000), (sparse(96), 5000)):
        prices[form] = size
        errors[form] = better * between([(1600, 0.5), (6400, 0.1)], size)
    found = screen(
        {"o": prices},
        {},
        {"o": 1.0},
        tolerance=0.2,
        measure=lambda form, names: {names[0]: errors[form]},
        nearest=lambda name, grid: 1.0,
    )
    assert {dense(16), dense(64), Plain(GRID)} <= set(found.alone["o"])
    assert len({sparse(64), sparse(96)} & set(found.alone["o"])) == wanted


def test_forms_in_floating_point_are_measured_from_both_ends_on() -> None:
    atoms = range(8, 8 * 15, 8)
    listed: dict[Form, int] = {Plain(None): 30_000}
    listed |= {Joint((Level(k, None, None, Pattern(k // 2, k)),)): 100 * k for k in atoms}
    order: list[Form] = []

    def measure(form: Form, names: Sequence[str]) -> Mapping[str, float]:
        order.append(form)
        return {names[0]: 0.0 if isinstance(form, Plain) else math.exp(-listed[form] / 6000)}

    def nearest(name: str, grid: Grid) -> float:
        raise AssertionError("there is no grid")

    found = screen({"o": listed}, {}, {"o": 1.0}, tolerance=0.03, measure=measure, nearest=nearest)
    sizes = [listed[form] for form in found.alone["o"]]
    assert {30_000, 800, 800 * 14} <= set(sizes)
    assert 4 < len(sizes) < len(listed)
    hull = lower_hull((listed[form], error) for form, error in found.alone["o"].items())
    assert {listed[order[1]], listed[order[2]]} == {800, 800 * 14}
    above = [height(hull, size) / math.exp(-size / 6000) for size in listed.values() if size < 30_000]
    assert max(above) < 1.03


def test_the_same_numbers_are_measured_in_the_same_order() -> None:
    one, two = Bench(5, exact=False), Bench(5, exact=False)
    assert one.screen(0.03) == two.screen(0.03)
    assert one.measured == two.measured
