"""Laws of measuring candidates from coarse to fine, on numbers and on real matrices of the model that ships."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from compot_deploy.cli.main import main
from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.storage import PaperStorage
from compot_deploy.embedded import MODEL
from compot_deploy.errors import InterruptedRunError
from compot_deploy.models.source import open_source
from compot_deploy.models.tokens import TokenWindows, load_tokenizer
from compot_deploy.numerics.joint import Level
from compot_deploy.numerics.whiten import whiten
from compot_deploy.pipeline.deploy import plan_only
from compot_deploy.pipeline.texts import calibration_windows
from compot_deploy.planning import carry_out as planning
from compot_deploy.planning import settings
from compot_deploy.planning.candidates import Search, realize
from compot_deploy.planning.curves import Curve, between, height, lower_hull, sum_of_hulls
from compot_deploy.planning.knapsack import knapsack, smallest_bytes
from compot_deploy.planning.schemes import Form, GridChoice, Joint, Plain
from compot_deploy.planning.screening import Measured, promise, screen
from compot_deploy.planning.settings import search_of, storage_of
from compot_deploy.quant import rtn
from compot_deploy.recipe import Recipe
from compot_deploy.report import plan as plan_report

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


# -- curves as numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_a_hull_is_below_every_point_and_made_of_them(seed: int) -> None:
    chance = random.Random(seed)
    sizes = [chance.randrange(1, 100) for _ in range(60)]
    points = [(size, chance.uniform(1.0, 1.3) / size) for size in sizes]
    hull = lower_hull(points)
    assert set(hull) <= set(points)
    assert all(height(hull, size) <= error + 1e-12 for size, error in points)
    assert hull == sorted(hull) and [error for _, error in hull] == sorted((e for _, e in hull), reverse=True)
    assert math.isinf(height(hull, hull[0][0] - 1)) and height(hull, 1000) == min(e for _, e in points)
    slopes = [(after - before) / (high - low) for (low, before), (high, after) in pairwise(hull)]
    assert slopes == sorted(slopes)
    for (low, before), (high, after) in pairwise(hull):
        assert height(hull, (low + high) / 2) == pytest.approx((before + after) / 2)


def test_a_sum_of_hulls_is_the_hull_of_all_sums() -> None:
    chance = random.Random(2)
    hulls = [lower_hull([(chance.randrange(50), chance.random()) for _ in range(12)]) for _ in range(3)]
    sums = [tuple(map(sum, zip(*points, strict=True))) for points in product(*hulls)]
    brute = lower_hull(sums)  # type: ignore[arg-type]
    made = sum_of_hulls(hulls)
    for size in range(int(brute[0][0]), int(brute[-1][0]) + 5):
        assert height(made, size) == pytest.approx(height(brute, size))


def test_errors_of_factorised_forms_are_log_linear_in_bytes() -> None:
    points = [(10, math.exp(-1.0)), (20, math.exp(-2.0)), (40, math.exp(-2.5))]
    expected = {10: -1.0, 15: -1.5, 30: -2.25, 5: -0.5, 50: -2.75}
    for size, logarithm in expected.items():
        assert math.log(between(points, size)) == pytest.approx(logarithm)
    assert between(points[:1], 77) == pytest.approx(points[0][1])
    assert between([(10, 0.1), (20, 0.2)], 30) == pytest.approx(0.1)  # bytes never harm


def test_a_promise_is_relative_except_where_nothing_is_left_to_gain() -> None:
    hull = [(10, 0.1), (20, 1e-5)]
    assert promise(0.05, 10, hull) == pytest.approx(0.5, rel=0.01)
    assert promise(0.2, 10, hull) < 0
    assert promise(0.2, 9, hull) == 1.0
    assert promise(0.0, 20, hull) < 0.03


# -- what is measured ----------------------------------------------------------------------------------


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


# -- real matrices -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Curve], list[Curve], dict[str, float], int]:
    """Curves of q, k and v of the shipped model, all forms and coarse to fine, and how many forms were made."""
    work = tmp_path_factory.mktemp("work")
    checkpoint = open_source(MODEL)
    recipe = Recipe(bits=2.2, samples=16, length=64, search="full")
    windows = calibration_windows(recipe, checkpoint, load_tokenizer(checkpoint.folder), work)
    full = planning.Task(checkpoint, windows, work, storage_of(recipe), search_of(recipe, checkpoint))
    planning.collect_grams(full)
    coarse = replace(full, search=replace(full.search, tolerance=0.03))
    known: dict[Any, Any] = {}
    made = [0]

    def realize_once(form: Form, weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        key = form, tuple(weights)
        if key not in known:
            known[key] = replace(realize(form, weights, *args, **kwargs), matrices={})
        return known[key]

    inputs = [entry for entry in full.inputs if entry[0] == 1 and entry[1].name == "attention_input"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "realize", realize_once)
        everything = [planning._curve(full, *entry) for entry in inputs]
        before, made[0] = made[0], 0
        some = [planning._curve(coarse, *entry) for entry in inputs]
    assert made[0] < before
    effects = {name: 1.0 for curve in everything for name in curve.names}
    weights = sum(
        math.prod(settings.shape_of(checkpoint, name)) for curve in everything for name in curve.names
    )
    return everything, some, effects, weights


def test_the_error_of_rounding_to_nearest_is_that_of_the_quantizer_of_that_name(tmp_path: Path) -> None:
    """For predictions all groups are rounded side by side, a short last one included, on some of the outputs."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(200, 300, generator=generator)
    inputs = torch.randn(400, 200, generator=generator) @ torch.randn(200, 200, generator=generator)
    whitening = whiten((inputs.T @ inputs).double())
    search = Search(GridChoice({3: (16, 32, 128)}), rates=(), sparse=(), tolerance=0.01)
    task = planning.Task(open_source(MODEL), TokenWindows((), "", ""), tmp_path, PaperStorage(), search)
    seen: dict[Grid, float] = {}

    def look(alone: Mapping[str, Mapping[Form, int]], *args: Any, nearest: Any, **kwargs: Any) -> Measured:
        seen.update(
            {
                form.grid: nearest("w", form.grid)
                for form in alone["w"]
                if isinstance(form, Plain) and form.grid
            }
        )
        return Measured({}, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "screen", look)
        planning._measure(task, {"w": weight}, whitening)
    some = weight[:, ::3]
    assert len(seen) == 3
    for grid, error in seen.items():
        expected = whitening.error(some, rtn(some, None, grid).dequantize()) ** 2
        assert error == pytest.approx(expected, rel=1e-6)


def test_plans_of_a_coarse_search_lose_a_few_percent_at_most(
    real: tuple[list[Curve], list[Curve], dict[str, float], int],
) -> None:
    everything, some, _, weights = real
    chance = random.Random(0)
    effects = {f"{copy}.{name}": chance.uniform(0.5, 2.0) for copy in range(6) for name in real[2]}

    def many(curves: Sequence[Curve]) -> list[Curve]:
        """A model of so many matrices that a missing size is made good by another matrix."""
        copied = [(copy, one) for copy in range(6) for one in curves]
        return [replace(one, names=tuple(f"{copy}.{name}" for name in one.names)) for copy, one in copied]

    def losses(curves: Sequence[Curve]) -> list[float]:
        budgets = [int(6 * bits * weights / 8) for bits in (1.4, 1.8, 2.2, 2.6, 3.0, 3.6, 4.5)]
        return [knapsack(curves, budget, effects).loss for budget in budgets]

    ratios = [
        after / before for before, after in zip(losses(many(everything)), losses(many(some)), strict=True)
    ]
    assert max(ratios) < 1.06
    assert sum(ratios) / len(ratios) < 1.02
    plain = [
        [one.only(lambda form: isinstance(form, Plain)) for one in many(curves)]
        for curves in (everything, some)
    ]
    full, coarse = (knapsack(curves, int(6 * 3.2 * weights / 8), effects).loss for curves in plain)
    assert coarse / full < 1.03


def test_measured_forms_are_some_of_the_listed_with_the_errors_that_all_have(
    real: tuple[list[Curve], list[Curve], dict[str, float], int],
) -> None:
    everything, some, *_ = real
    measured, listed = planning.counted(some)
    assert 0.4 < measured / listed < 0.9
    assert planning.counted(everything) == (listed, listed)
    assert planning.notes_on(everything) == ()
    assert f"{measured} of {listed} forms" in planning.notes_on(some)[0]
    for full, coarse in zip(everything, some, strict=True):
        for all_of_one, found in zip(full.alone, coarse.alone, strict=True):
            assert set(found) <= set(all_of_one)
        assert set(coarse.together) <= set(full.together)
    assert smallest_bytes(some) == smallest_bytes(everything)


def test_contenders_of_a_coarse_search_are_grids_that_every_matrix_has(
    real: tuple[list[Curve], list[Curve], dict[str, float], int],
) -> None:
    """Of every number of bits the coarsest at least; so where one fits, there is a single grid to compare with."""
    _, some, effects, weights = real
    for bits in (3.0, 4.5, 6.0, 8.6):
        plans = planning.choose(some, effects, int(bits * weights / 8))
        singles = [plan for plan in plans if len({entry.candidate.form for entry in plan.chosen}) == 1]
        assert singles
        assert all(plan.bytes <= plans[0].budget and plan.loss >= plans[0].loss for plan in plans)


# -- a whole model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    text = folder / "words.txt"
    text.write_text((tiny.WORDS + "\n") * 100)
    model = tiny.save(folder / "tiny", num_hidden_layers=1)
    return {
        "model": str(model),
        "calibration": str(text),
        "samples": 6,
        "length": 32,
        "evaluation_tokens": 64,
        "search": "coarse",
    }


def _curves(out: Path) -> set[str]:
    return {path.name for path in out.parent.glob(".out.work-*/curve-*.json")}


def test_what_is_measured_depends_on_no_budget_and_a_stopped_search_goes_on(
    knobs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "_GROUPS", {2: (32, 64), 4: (16, 32, 64), 8: (64,)})
    straight, stopped, made = tmp_path / "one" / "out", tmp_path / "two" / "out", [0]

    def plan(out: Path, **changes: Any) -> plan_report.Planned:
        return plan_report.Planned("tiny", plan_only(Recipe(**{**knobs, "out": str(out), **changes})))

    def realize_and_stop(*args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        if made[0] == 25:
            raise KeyboardInterrupt
        return realize(*args, **kwargs)

    first = plan(straight, bits=2.0)
    coarse = json.loads(plan_report.as_json(first))
    counts, measured = coarse["forms"], _curves(straight)
    told = f"{counts['measured']} of {counts['listed']} forms"
    assert any(told in line for line in plan_report.overview(first).lines)

    with monkeypatch.context() as patch:
        patch.setattr(planning, "realize", realize_and_stop)
        with pytest.raises(InterruptedRunError):
            plan(stopped, bits=3.3)
    assert 0 < len(_curves(stopped)) < len(measured)
    assert json.loads(plan_report.as_json(plan(stopped, bits=2.0))) == coarse  # begun for another budget
    assert _curves(stopped) == measured

    # All forms of the same inputs are another measurement, beside it.
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in knobs.items() if key != "model"]
    flags += ["--search=full", "--bits=2.0", "--json", "--out", str(straight)]
    assert main(["plan", knobs["model"], *flags]) == 0
    full = json.loads(capsys.readouterr().out)
    assert full["forms"] == {"measured": counts["listed"], "listed": counts["listed"]}
    assert counts["measured"] < counts["listed"]
    assert full["notes"] == [] and told in coarse["notes"][0] and "--search full" in coarse["notes"][0]
    assert full["predicted_loss"] <= coarse["predicted_loss"]
    assert len(list(straight.parent.glob(".out.work-*"))) == 1
    assert measured < _curves(straight) and len(_curves(straight)) == 2 * len(measured)


def test_large_models_are_searched_coarse_to_fine_unless_told_otherwise(
    knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_source(knobs["model"])
    names = checkpoint.architecture.linear_names(checkpoint.layers)
    weights = sum(math.prod(settings.shape_of(checkpoint, name)) for name in names)

    def tolerance(**changes: Any) -> float:
        return search_of(Recipe(model=knobs["model"], bits=2.0, **changes), checkpoint).tolerance

    assert tolerance() == tolerance(search="full") == 0.0
    assert tolerance(search="coarse") == tolerance(search="coarse", quant="none") == 0.03
    monkeypatch.setattr(settings, "_MEASURE_ALL", weights)
    assert tolerance() == 0.0
    monkeypatch.setattr(settings, "_MEASURE_ALL", weights - 1)
    assert tolerance() == 0.03
    assert tolerance(search="full") == 0.0


def test_measurements_of_every_form_keep_their_names() -> None:
    """Curves that were measured before there was a tolerance are found again."""
    search = Search(settings.search_of(Recipe(bits=2.0), open_source(MODEL)).grids)
    assert search.tolerance == 0.0
    assert repr(replace(search, tolerance=0.03)) == repr(search)
