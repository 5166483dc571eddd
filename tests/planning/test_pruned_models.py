"""Laws of measuring candidates from coarse to fine, on real matrices of the model that ships."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from compot_deploy.cli import main
from compot_deploy.core.grid import Grid
from compot_deploy.core.storage import PaperStorage
from compot_deploy.embedded import MODEL
from compot_deploy.errors import InterruptedRunError
from compot_deploy.models.source import open_source
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.numerics.whiten import whiten
from compot_deploy.pipeline.deploy import plan_only
from compot_deploy.pipeline.texts import calibration_windows
from compot_deploy.planning import measure, settings
from compot_deploy.planning.candidates import Search, realize
from compot_deploy.planning.carry_out import choose
from compot_deploy.planning.context import PlanningContext, collect_grams
from compot_deploy.planning.knapsack import knapsack, smallest_bytes
from compot_deploy.planning.pruning import Measured
from compot_deploy.planning.rate_points import RatePoints
from compot_deploy.planning.schemes import GridChoice, Plain, Scheme
from compot_deploy.planning.settings import resolve
from compot_deploy.quant import rtn
from compot_deploy.recipe import Recipe
from compot_deploy.report import plan as plan_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[RatePoints], list[RatePoints], dict[str, float], int]:
    """Points of q, k and v of the shipped model, all schemes and coarse to fine; sensitivities; and the weights."""
    work = tmp_path_factory.mktemp("work")
    checkpoint = open_source(MODEL)
    recipe = Recipe(bits=2.2, samples=16, length=64, search="full")
    windows = calibration_windows(recipe, checkpoint, work)
    resolved = resolve(recipe, checkpoint)
    full = PlanningContext(checkpoint, windows, work, resolved.storage, resolved.search)
    collect_grams(full)
    coarse = replace(full, search=replace(full.search, tolerance=0.03))
    known: dict[Any, Any] = {}
    made = [0]

    def realize_once(scheme: Scheme, weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        key = scheme, tuple(weights)
        if key not in known:
            known[key] = replace(realize(scheme, weights, *args, **kwargs), matrices={})
        return known[key]

    block = checkpoint.layout.blocks[1]
    inputs = [group for group in full.groups if (group.block, group.name) == (block, "self_attn.q_proj")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "realize", realize_once)
        everything = list(measure.measure_rate_points(full, inputs))
        before, made[0] = made[0], 0
        some = list(measure.measure_rate_points(coarse, inputs))
    assert made[0] < before
    sensitivities = {name: 1.0 for points in everything for name in points.names}
    weights = sum(math.prod(checkpoint.shape(name)) for points in everything for name in points.names)
    return everything, some, sensitivities, weights


def test_the_error_of_rounding_to_nearest_is_that_of_the_quantizer_of_that_name(tmp_path: Path) -> None:
    """For predictions all groups are rounded side by side, a short last one included, on some of the outputs."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(200, 300, generator=generator)
    inputs = torch.randn(400, 200, generator=generator) @ torch.randn(200, 200, generator=generator)
    whitening = whiten((inputs.T @ inputs).double())
    search = Search(GridChoice({3: (16, 32, 128)}), rates=(), sparse=(), tolerance=0.01)
    context = PlanningContext(open_source(MODEL), TokenWindows((), "", ""), tmp_path, PaperStorage(), search)
    seen: dict[Grid, float] = {}

    def look(
        per_matrix: Mapping[str, Mapping[Scheme, int]], *args: Any, nearest: Any, **kwargs: Any
    ) -> Measured:
        seen.update(
            {
                scheme.grid: nearest("w", scheme.grid)
                for scheme in per_matrix["w"]
                if isinstance(scheme, Plain) and scheme.grid
            }
        )
        return Measured({}, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "prune", look)
        measure._measure(context.conditions, {"w": weight}, whitening)
    some = weight[:, ::3]
    assert len(seen) == 3
    for grid, error in seen.items():
        expected = whitening.error(some, rtn(some, None, grid).dequantize()) ** 2
        assert error == pytest.approx(expected, rel=1e-6)


def test_plans_of_a_coarse_search_lose_a_few_percent_at_most(
    real: tuple[list[RatePoints], list[RatePoints], dict[str, float], int],
) -> None:
    everything, some, _, weights = real
    chance = random.Random(0)
    sensitivities = {f"{copy}.{name}": chance.uniform(0.5, 2.0) for copy in range(6) for name in real[2]}

    def many(rate_points: Sequence[RatePoints]) -> list[RatePoints]:
        """A model of so many matrices that a missing size is made good by another matrix."""
        copied = [(copy, one) for copy in range(6) for one in rate_points]
        return [replace(one, names=tuple(f"{copy}.{name}" for name in one.names)) for copy, one in copied]

    def losses(rate_points: Sequence[RatePoints]) -> list[float]:
        budgets = [int(6 * bits * weights / 8) for bits in (1.4, 1.8, 2.2, 2.6, 3.0, 3.6, 4.5)]
        return [knapsack(rate_points, budget, sensitivities).loss for budget in budgets]

    ratios = [
        after / before for before, after in zip(losses(many(everything)), losses(many(some)), strict=True)
    ]
    assert max(ratios) < 1.06
    assert sum(ratios) / len(ratios) < 1.02
    plain = [
        [one.only(lambda scheme: isinstance(scheme, Plain)) for one in many(rate_points)]
        for rate_points in (everything, some)
    ]
    full, coarse = (
        knapsack(rate_points, int(6 * 3.2 * weights / 8), sensitivities).loss for rate_points in plain
    )
    assert coarse / full < 1.03


def test_measured_schemes_are_some_of_the_listed_with_the_errors_that_all_have(
    real: tuple[list[RatePoints], list[RatePoints], dict[str, float], int],
) -> None:
    everything, some, *_ = real
    measured, listed = measure.counted(some)
    assert 0.4 < measured / listed < 0.9
    assert measure.counted(everything) == (listed, listed)
    assert measure.notes_on(everything) == ()
    assert f"{measured} of {listed} schemes" in measure.notes_on(some)[0]
    for full, coarse in zip(everything, some, strict=True):
        for all_of_one, found in zip(full.per_matrix, coarse.per_matrix, strict=True):
            assert set(found) <= set(all_of_one)
        assert set(coarse.shared) <= set(full.shared)
    assert smallest_bytes(some) == smallest_bytes(everything)


def test_contenders_of_a_coarse_search_are_grids_that_every_matrix_has(
    real: tuple[list[RatePoints], list[RatePoints], dict[str, float], int],
) -> None:
    """Of every number of bits the coarsest at least; so where one fits, there is a single grid to compare with."""
    _, some, sensitivities, weights = real
    for bits in (3.0, 4.5, 6.0, 8.6):
        plans = choose(some, sensitivities, int(bits * weights / 8))
        singles = [plan for plan in plans if len({entry.candidate.scheme for entry in plan.chosen}) == 1]
        assert singles
        assert all(plan.bytes <= plans[0].budget and plan.loss >= plans[0].loss for plan in plans)


@pytest.fixture(scope="module")
def recipe_options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
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


def _point_files(out: Path) -> set[str]:
    return {path.name for path in out.parent.glob(".out.work-*/points-*.json")}


def test_what_is_measured_depends_on_no_budget_and_a_stopped_search_goes_on(
    recipe_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(settings, "_GROUPS", {2: (32, 64), 4: (16, 32, 64), 8: (64,)})
    straight, stopped, made = tmp_path / "one" / "out", tmp_path / "two" / "out", [0]

    def plan(out: Path, **changes: Any) -> plan_report.Planned:
        return plan_report.Planned(
            "tiny", plan_only(Recipe(**{**recipe_options, "out": str(out), **changes}))
        )

    def realize_and_stop(*args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        if made[0] == 25:
            raise KeyboardInterrupt
        return realize(*args, **kwargs)

    first = plan(straight, bits=2.0)
    coarse = json.loads(plan_report.as_json(first))
    counts, measured = coarse["forms"], _point_files(straight)
    told = f"{counts['measured']} of {counts['listed']} schemes"
    assert any(told in line for line in plan_report.overview(first).lines)

    with monkeypatch.context() as patch:
        patch.setattr(measure, "realize", realize_and_stop)
        with pytest.raises(InterruptedRunError):
            plan(stopped, bits=3.3)
    assert 0 < len(_point_files(stopped)) < len(measured)
    assert json.loads(plan_report.as_json(plan(stopped, bits=2.0))) == coarse  # begun for another budget
    assert _point_files(stopped) == measured

    # All schemes of the same inputs are another measurement, beside it.
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in recipe_options.items() if key != "model"]
    flags += ["--search=full", "--bits=2.0", "--json", "--out", str(straight)]
    assert main(["plan", recipe_options["model"], *flags]) == 0
    full = json.loads(capsys.readouterr().out)
    assert full["forms"] == {"measured": counts["listed"], "listed": counts["listed"]}
    assert counts["measured"] < counts["listed"]
    assert full["notes"] == [] and told in coarse["notes"][0] and "--search full" in coarse["notes"][0]
    assert full["predicted_loss"] <= coarse["predicted_loss"]
    assert len(list(straight.parent.glob(".out.work-*"))) == 1
    assert measured < _point_files(straight) and len(_point_files(straight)) == 2 * len(measured)


def test_large_models_are_planned_on_predictions_unless_told_otherwise(
    recipe_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_source(recipe_options["model"])
    weights = sum(math.prod(site.shape) for site in checkpoint.layout.sites)

    def search(**changes: Any) -> tuple[bool, float]:
        recipe = Recipe(model=recipe_options["model"], bits=2.0, **changes)
        found = resolve(recipe, checkpoint).search
        return found.predicted, found.tolerance

    assert search() == search(search="full") == (False, 0.0)
    assert search(search="coarse") == search(search="coarse", quant="none") == (False, 0.03)
    assert search(search="predicted") == (True, 0.0)
    assert search(search="predicted", quant="none") == (False, 0.03), "no grid can be sampled"
    monkeypatch.setattr(settings, "_MEASURE_ALL", weights)
    assert search() == (False, 0.0)
    monkeypatch.setattr(settings, "_MEASURE_ALL", weights - 1)
    assert search() == (True, 0.0)
    assert search(search="full") == (False, 0.0)
