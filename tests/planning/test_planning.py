"""Laws of planning a whole model, on tiny random ones."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from compot_deploy.cli import main
from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Factorized, Quantized, leaves
from compot_deploy.core.storage import InMemory, PaperStorage, matrix_bytes
from compot_deploy.errors import RecipeError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import verify
from compot_deploy.models.source import open_source
from compot_deploy.numerics.joint import Tier
from compot_deploy.numerics.whiten import whiten
from compot_deploy.pipeline.deploy import deploy, plan_only
from compot_deploy.planning import carry_out as planning
from compot_deploy.planning import measure, sensitivity
from compot_deploy.planning.candidates import Search, realize, schemes
from compot_deploy.planning.context import PlanningContext
from compot_deploy.planning.knapsack import Plan, knapsack, smallest_bytes
from compot_deploy.planning.rate_points import Candidate, RatePoints
from compot_deploy.planning.schemes import (
    GridChoice,
    Joint,
    Plain,
    Scheme,
    Separate,
    describe,
    scheme_from_data,
    scheme_to_data,
)
from compot_deploy.planning.sensitivity import ReplacedLoss
from compot_deploy.quant import Quantizer, gptq, rtn
from compot_deploy.recipe import Recipe
from compot_deploy.report import plan as plan_report
from compot_deploy.report.json import from_json

SETTINGS: dict[str, Any] = {
    "samples": 6,
    "length": 32,
    "evaluation_tokens": 64,
    "max_perplexity_ratio": None,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text((tiny.WORDS + "\n") * 100)
    return path


@pytest.fixture(scope="module")
def shared(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose budget is below every plain grid, so that dictionaries must be used and shared."""
    out = tmp_path_factory.mktemp("out") / "small"
    (done,) = deploy(str(model), calibration=str(text), bits=1.7, out=str(out), **SETTINGS)
    assert done.passed
    return out


def test_a_budget_below_every_plain_grid_is_kept_and_exported_exactly(shared: Path, model: Path) -> None:
    exporter = EXPORTERS["onnx"]
    storage = exporter.storage(exporter.options({}))
    checkpoint = open_source(str(model))
    names = checkpoint.layout.names
    matrices = exporter.read(shared)
    linears = {name: matrices[name] for name in names}
    numbers = sum(checkpoint.weight(name).numel() for name in names)
    spent = sum(matrix_bytes(linears, storage).values())
    assert spent * 8 <= 1.7 * numbers
    assert any(isinstance(matrix, Factorized) for matrix in linears.values())
    report = json.loads((shared / "compot" / "report.json").read_text())
    assert report["sizes"]["memory"] == sum(matrix_bytes(matrices, InMemory(storage)).values())
    stated = verify(shared)
    assert sum(record.bytes for record in stated.matrices if ".layers." in record.name) == spent
    assert f"the plan spends {spent} of {int(1.7 * numbers / 8)} bytes" in json.dumps(report)


@pytest.fixture(scope="module")
def measured(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output path beside which points and sensitivities are kept: plans of any budget take them from there."""
    out = tmp_path_factory.mktemp("measured") / "out"
    plan_only(Recipe(model=str(model), calibration=str(text), bits=2.0, out=str(out), **SETTINGS))
    return out


@pytest.mark.slow
def test_same_inputs_and_seed_give_the_same_plan_bit_for_bit(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = []
    for attempt in ("one", "two"):  # nothing measured for the first serves the second
        flags = ["--calibration", str(text), "--out", str(tmp_path / attempt / "out"), "--bits", "2.0"]
        flags += ["--samples", "6", "--length", "32", "--evaluation-tokens", "64", "--json"]
        assert main(["plan", str(model), *flags]) == 0
        plans.append(capsys.readouterr().out)
    assert len(list(tmp_path.glob("*/.out.work-*"))) == 2
    assert plans[0] == plans[1]


@pytest.mark.slow
def test_candidates_of_one_matrix_are_in_memory_at_a_time(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a scheme is made, no matrix of another one is alive, and no weight of another input."""
    made: list[weakref.ref[torch.Tensor]] = []
    weights: list[tuple[frozenset[str], weakref.ref[torch.Tensor]]] = []
    peak = [0]
    make, read = measure.realize, PlanningContext.weights

    def realize_and_look(
        scheme: Scheme, covered: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        assert not [one for one in made if one() is not None], scheme
        others = [names for names, one in weights if one() is not None and not names >= set(covered)]
        assert not others
        result = make(scheme, covered, *args, **kwargs)
        parts = [leaf for matrix in result.matrices.values() for leaf in leaves(matrix)]
        tensors = [part.integers if isinstance(part, Quantized) else part.weight for part in parts]
        tensors = [tensor for tensor in tensors if not any(tensor is weight for weight in covered.values())]
        peak[0] = max(peak[0], len(tensors))
        made.extend(weakref.ref(tensor) for tensor in tensors)
        return result

    def read_and_remember(context: PlanningContext, names: Sequence[str]) -> dict[str, torch.Tensor]:
        found = read(context, names)
        weights.extend((frozenset(names), weakref.ref(weight)) for weight in found.values())
        return found

    monkeypatch.setattr(measure, "realize", realize_and_look)
    monkeypatch.setattr(sensitivity, "realize", realize_and_look)
    monkeypatch.setattr(PlanningContext, "weights", read_and_remember)
    plan_only(
        Recipe(model=str(model), calibration=str(text), bits=2.0, out=str(tmp_path / "out"), **SETTINGS)
    )
    assert len(made) > 100 > 30 > peak[0] > 0


@pytest.mark.slow
def test_what_is_impossible_names_the_smallest_that_is_not(model: Path, text: Path, measured: Path) -> None:
    def plan(bits: float) -> Plan:
        recipe = Recipe(model=str(model), calibration=str(text), bits=bits, out=str(measured), **SETTINGS)
        return plan_only(recipe).plans[0]

    with pytest.raises(RecipeError, match="smallest schemes of all of them need") as caught:
        plan(0.05)
    (smallest,) = re.findall(r"need (\d+) bytes", str(caught.value))
    checkpoint = open_source(str(model))
    names = checkpoint.layout.names
    numbers = sum(checkpoint.weight(name).numel() for name in names)
    assert plan((int(smallest) + 0.5) * 8 / numbers).bytes == int(smallest)
    with pytest.raises(RecipeError, match=smallest):
        plan((int(smallest) - 0.5) * 8 / numbers)


def test_a_budget_above_everything_keeps_the_dense_scheme_and_says_so(
    model: Path, text: Path, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--calibration", str(text), "--out", str(measured), "--bits", "32"]
    flags += ["--samples", "6", "--length", "32", "--evaluation-tokens", "64"]
    assert main(["plan", str(model), *flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert all(entry["form"] == {"plain": None} for entry in plan["chosen"])
    assert plan["predicted_loss"] == 0.0
    assert main(["plan", str(model), *flags]) == 0
    assert "more than the" in capsys.readouterr().out


def test_a_sensitivity_is_what_disturbing_one_linear_alone_costs_per_unit_of_its_error(
    model: Path, text: Path, measured: Path
) -> None:
    """In nats per token, the original's distribution first, by the coarsest grid: computed here by transformers."""
    from transformers import AutoModelForCausalLM

    drafted = plan_only(
        Recipe(model=str(model), calibration=str(text), bits=2.0, out=str(measured), **SETTINGS)
    )
    context = drafted.context
    alone = sensitivity.sensitivities_one_by_one(context)
    reference = AutoModelForCausalLM.from_pretrained(model).float().eval()

    def predictions() -> torch.Tensor:
        with torch.no_grad():
            made = [reference(window[None]).logits[0].double() for window in context.windows.windows]
        return torch.cat(made).log_softmax(-1)

    original = predictions()
    coarsest = min(context.search.grids.grids, key=lambda grid: (grid.bits, -grid.group))
    for path in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.0.{path}"
        (group,) = [one for one in context.groups if name in one.names]
        weights = context.weights([name])
        made = realize(Plain(coarsest), weights, context.whitening(group), context.search)
        module = reference.get_submodule(name)
        before = module.weight.data
        module.weight.data = made.matrices[name].dequantize().T.contiguous()
        cost = float((original.exp() * (original - predictions())).sum(1).mean())
        module.weight.data = before
        assert cost > 1e-6
        assert alone[name] == pytest.approx(cost / made.errors[name], rel=1e-3)
    weighted = knapsack(drafted.rate_points, drafted.plans[0].budget, drafted.sensitivities)
    assert weighted == replace(drafted.plans[0], tables=(), table_loss=0.0)


def test_a_plan_stands_beside_the_best_mix_and_the_best_single_grid_of_its_budget() -> None:
    coarse, middle, fine = (Plain(Grid(bits, 32)) for bits in (2, 3, 4))
    joint = Joint((Tier(8, Grid(4, 32), Grid(4, 32)),))

    def candidates(entries: Mapping[Scheme, tuple[int, float]]) -> tuple[Candidate, ...]:
        return tuple(Candidate(scheme, size, (error,)) for scheme, (size, error) in entries.items())

    def chosen(
        budget: int, *schemes: Mapping[Scheme, tuple[int, float]], weight: float = 1.0
    ) -> list[list[Scheme]]:
        rate_points = [
            RatePoints((name,), (candidates(one),)) for name, one in zip("ab", schemes, strict=True)
        ]
        plans = planning.choose(rate_points, {"a": weight, "b": 1.0}, budget)
        assert all(plan.bytes <= budget for plan in plans)
        return [[entry.candidate.scheme for entry in plan.chosen] for plan in plans]

    plain_a = {coarse: (10, 0.5), middle: (15, 0.3), fine: (20, 0.05)}
    a, b = plain_a | {joint: (18, 0.04)}, {coarse: (10, 0.1), middle: (15, 0.09), fine: (20, 0.01)}
    assert chosen(30, a, b) == [[joint, coarse], [fine, coarse], [middle, middle]]
    assert chosen(40, a, b) == [[joint, fine], [fine, fine]]  # the mix is the single grid
    assert chosen(30, plain_a, b) == [[fine, coarse], [middle, middle]]  # the plan is the mix
    assert chosen(20, a, b) == [[coarse, coarse]]
    assert chosen(30, a, b, weight=0.01) == [[coarse, fine], [middle, middle]]
    # A single grid must be there for every matrix, and a mix needs a plain scheme of each.
    assert chosen(30, a, {coarse: (10, 0.1)}) == [[joint, coarse], [fine, coarse], [coarse, coarse]]
    assert chosen(30, a, {joint: (10, 0.1)}) == [[joint, joint]]


@pytest.mark.parametrize("favourite", [None, 0, 1, 2])
def test_a_ratio_is_a_budget_too_and_what_is_made_is_never_worse_than_plain_grids(
    model: Path, text: Path, measured: Path, monkeypatch: pytest.MonkeyPatch, favourite: int | None
) -> None:
    """The plan, the best mix of grids and the best single grid are made; whichever costs least is taken."""
    recipe = Recipe(
        model=str(model),
        calibration=str(text),
        ratio=0.3,
        allocation="knapsack",
        out=str(measured),
        **SETTINGS,
    )
    drafted = plan_only(recipe)
    storage = drafted.context.storage
    plain = sum(Plain(Grid(4, 32)).bytes(*size, storage) for size in drafted.sizes.values())
    plan, *others = drafted.plans
    assert plan.budget == int(0.7 * plain)
    assert all(one.bytes <= plan.budget for one in drafted.plans)
    assert all(plan.loss <= other.loss for other in others)
    singles = [one for one in drafted.plans if len({entry.candidate.scheme for entry in one.chosen}) == 1]
    assert len(singles) == 1
    assert all(isinstance(e.candidate.scheme, Plain) for one in others for e in one.chosen)
    # A budget between two grids leaves room for all three; make them, and look at what is taken.
    monkeypatch.setattr(sensitivity, "_POSITIONS", 64)
    if favourite is None:
        losses: list[float] = []
        own = ReplacedLoss.__call__

        def remember(loss: ReplacedLoss, matrices: Any) -> float:
            # They come close to each other, so more text is read for the choice than for one linear's sensitivity.
            assert sum(int(batch.real.sum()) for batch in loss._batches) == 2 * 64
            losses.append(own(loss, matrices))
            return losses[-1]

        monkeypatch.setattr(ReplacedLoss, "__call__", remember)
    elif favourite == 0:  # all cost the same
        monkeypatch.setattr(ReplacedLoss, "__call__", lambda *_: 0.1)
        losses = [0.1] * len(drafted.plans)
    else:
        favourite = min(favourite, len(others))
        calls: list[int] = []

        def prefer(loss: Any, matrices: Any) -> float:
            calls.append(1)
            return 0.1 if len(calls) - 1 == favourite else 0.2

        monkeypatch.setattr(ReplacedLoss, "__call__", prefer)
        losses = [0.1 if number == favourite else 0.2 for number in range(len(drafted.plans))]
    outcome = planning.carry_out(drafted.context, drafted.plans)
    assert len(losses) == len(drafted.plans) > 1
    best = drafted.plans[losses.index(min(losses))]
    assert outcome.plan == best
    winner = "the plan" if best is plan else f"{planning.name_of(best)}, which is taken"
    assert outcome.notes[-1].endswith(f"better is {winner}")
    assert all(f"{loss:.4g}" in outcome.notes[-1] for loss in losses)
    assert set(outcome.files) == set(drafted.sizes)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0.3, 1.9])
def test_a_budget_that_is_too_small_is_refused_before_a_scheme_is_measured(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: float
) -> None:
    """And with the figure that measured schemes would have given; one that is not too small goes on."""
    recipe = Recipe(model=str(model), calibration=str(text), bits=bits, out=str(tmp_path / "out"), **SETTINGS)
    listed: list[str] = []
    listing = measure._listed
    monkeypatch.setattr(
        measure, "_listed", lambda context, *rest: (listed.append("1"), listing(context, *rest))[1]
    )
    with monkeypatch.context() as patch:
        patch.setattr(measure, "realize", lambda *_, **__: pytest.fail("a scheme was made"))
        if bits < 1.0:
            with pytest.raises(RecipeError, match=r"cannot be met: .* need \d+ bytes") as said:
                plan_only(recipe)
        else:
            with pytest.raises(pytest.fail.Exception, match="a scheme was made"):
                plan_only(recipe)
    assert listed
    if bits < 1.0:
        drafted = plan_only(Recipe(**{**vars(recipe), "bits": 2.6}))
        assert f"need {smallest_bytes(drafted.rate_points)} bytes" in str(said.value)


def test_a_report_has_the_frontier_with_the_chosen_point_and_the_memory_figures(shared: Path) -> None:
    report = from_json((shared / "compot" / "report.json").read_text(encoding="utf-8"))
    planned = report.frontier
    assert planned is not None and planned.chosen.bytes == report.sizes.linears
    assert planned.chosen.bits == pytest.approx(8 * planned.chosen.bytes / planned.weights)
    assert planned.weights == report.sizes.linear_weights
    losses = [point.loss for point in planned.all_schemes]
    assert len(losses) > 5 and losses == sorted(losses, reverse=True)
    assert any(point.bytes <= planned.chosen.bytes for point in planned.all_schemes)
    assert report.accuracy.factorization is None
    assert "never existed without" in (report.accuracy.split_absent or "")

    exporter = EXPORTERS["onnx"]
    storage = InMemory(exporter.storage(exporter.options({})))
    total, seen = 0, set()
    for matrix in exporter.read(shared).values():
        for leaf in leaves(matrix):
            name = next(
                (pair.dictionary_name for pair in getattr(matrix, "pairs", ()) if pair.dictionary is leaf),
                None,
            )
            if name is None or name not in seen:
                total += storage.leaf_bytes(*leaf.shape, getattr(leaf, "grid", None))
            seen |= {name} - {None}
    assert report.sizes.memory == total
    linears = [layer for layer in report.layers if layer.block is not None]
    assert sum(layer.bits * layer.inputs * layer.outputs for layer in linears) == pytest.approx(
        8 * sum(layer.bytes for layer in linears)
    )
    assert all(layer.sensitivity is not None and layer.error is not None for layer in linears)


def test_a_plan_is_the_same_twice_and_more_budget_costs_less(model: Path, text: Path, measured: Path) -> None:
    recipe = Recipe(model=str(model), calibration=str(text), bits=2.0, out=str(measured), **SETTINGS)
    first = plan_only(recipe)
    (work,) = measured.parent.glob(".out.work-*")
    kept = {path: path.stat().st_mtime_ns for path in work.glob("points-*.json")}
    assert kept
    again = plan_only(recipe)
    assert again.plans == first.plans
    wider = plan_only(Recipe(**{**vars(recipe), "bits": 3.0}))
    assert wider.plans[0].loss < first.plans[0].loss
    # every budget uses the same measurements
    assert {path: path.stat().st_mtime_ns for path in work.glob("points-*.json")} == kept
    # where there is no plain mix of the size, nothing is compared with it; where there is, it is
    assert len(first.plans) == 1
    assert all(isinstance(entry.candidate.scheme, Plain) for entry in wider.plans[-1].chosen)


@pytest.mark.slow
def test_the_plan_command_prints_the_plan(
    model: Path, text: Path, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--calibration", str(text), "--out", str(measured), "--bits", "2.0"]
    flags += ["--samples", "6", "--length", "32"]
    picture = tmp_path / "plan.png"
    assert main(["plan", str(model), *flags, "--plot", str(picture)]) == 0
    table = capsys.readouterr().out
    assert "layers.0.mlp.down_proj" in table
    assert "predicted size of the model's files" in " ".join(table.split())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["plan", str(model), *flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes"] <= plan["budget"]
    assert sum(entry["bytes"] for entry in plan["chosen"]) == plan["bytes"]
    storage = EXPORTERS["onnx"].storage(EXPORTERS["onnx"].options({}))
    shapes = dict.fromkeys(("q_proj", "o_proj"), (64, 64)) | dict.fromkeys(("k_proj", "v_proj"), (64, 32))
    shapes |= {"gate_proj": (64, 160), "up_proj": (64, 160), "down_proj": (160, 64)}
    memory = 0
    for entry in plan["chosen"]:
        sizes = [shapes[name.rpartition(".")[2]] for name in entry["linears"]]
        scheme = scheme_from_data(entry["form"])
        memory += scheme.bytes(sizes[0][0], sum(columns for _, columns in sizes), InMemory(storage))
    assert plan["tensor_memory_bytes"] == memory > plan["bytes"]
    assert f"tensors of the linears take {memory:,} bytes" in table
    losses = [point["predicted_loss"] for point in plan["frontier"]]
    assert losses == sorted(losses, reverse=True)
    assert not measured.exists()


@pytest.mark.parametrize(
    ("recipe_options", "complaint"),
    [
        ({"size": "20KB"}, "alone need"),
        ({"bits": 2.0, "size": "1MB"}, "give one of them"),
        ({"size": "much"}, "400MB"),
        ({"bits": 2.0, "allocation": "spectral"}, "need --allocation knapsack"),
    ],
)
def test_impossible_budgets_say_what_is_possible(
    model: Path, text: Path, measured: Path, recipe_options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(RecipeError, match=complaint):
        plan_only(
            Recipe(model=str(model), calibration=str(text), out=str(measured), **recipe_options, **SETTINGS)
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe_options",
    [
        pytest.param({}, id="onnx"),
        pytest.param({"format": ("gguf",), "gguf_layout": "sparse"}, id="gguf", marks=pytest.mark.nightly),
    ],
)
def test_the_model_s_files_have_the_size_that_was_asked_for_and_predicted(
    model: Path, text: Path, tmp_path: Path, recipe_options: dict[str, Any]
) -> None:
    out = tmp_path / "sized"
    common = {"model": str(model), "calibration": str(text), "out": str(out), **recipe_options, **SETTINGS}
    between = plan_report.Planned("tiny", plan_only(Recipe(bits=4.0, **common))).artifact_bytes
    drafted = plan_only(Recipe(size=f"{between}B", **common))
    predicted = json.loads(plan_report.as_json(plan_report.Planned("tiny", drafted)))[
        "predicted_artifact_bytes"
    ]
    (done,) = deploy(**common, size=f"{between}B")
    size = sum(
        path.stat().st_size
        for path in out.rglob("*")
        if path.is_file() and path != out / "README.md" and out / "compot" not in path.parents
    )
    assert size <= between
    assert size > 0.96 * between
    assert predicted == size
    assert done.folder == out


def test_sizes_are_read_with_their_units() -> None:
    assert Recipe(size="400MB").size_bytes == 400_000_000
    assert Recipe(size="1.5 GiB").size_bytes == 3 * 2**29
    assert Recipe(size="12kb").size_bytes == 12_000
    assert Recipe(size="77").size_bytes == 77
    assert Recipe().size_bytes is None


def test_schemes_survive_json() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).double()
    whitening = whiten(torch.eye(64).double())
    search = Search(
        GridChoice({2: (32,), 4: (32, 64), 8: (64,)}), unquantized=True, patterns=(Pattern(2, 4),)
    )
    tried = schemes(weight, whitening, PaperStorage(), search)
    assert {type(scheme) for scheme in tried} == {Plain, Joint}
    tables = [Grid(4, 64, "nf4"), Grid(4, 128, "fp4"), Grid(3, 32), None]
    separate = [
        Separate(method, 24, pattern, dictionary, codes, rounds=7, paper_exact=exact)
        for method, exact in (("compot", True), ("compot", False), ("svd-llm", False))
        for pattern in (Pattern(), Pattern(2, 4), Pattern(12, 24))
        for dictionary, codes in zip(tables, tables[::-1], strict=True)
    ]
    stored = [json.dumps(scheme_to_data(scheme)) for scheme in (*tried, *map(Plain, tables), *separate)]
    assert [scheme_from_data(json.loads(one)) for one in stored] == [*tried, *map(Plain, tables), *separate]
    assert len(set(stored)) == len({*tried, *map(Plain, tables), *separate})
    assert len({describe(scheme) for scheme in (*map(Plain, tables), *separate)}) > 20


def test_errors_are_those_of_the_matrices_that_are_made() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = (
        torch.randn(300, 64, generator=generator).double() @ torch.randn(64, 64, generator=generator).double()
    )
    whitening = whiten(tokens.T @ tokens)
    weights = {name: torch.randn(64, 48, generator=generator) for name in "qk"}
    search = Search(GridChoice({2: (32,), 4: (32, 64), 8: (64,)}))
    whole = torch.cat(list(weights.values()), dim=1)
    for scheme in schemes(whole, whitening, PaperStorage(), search):
        made = realize(scheme, weights, whitening, search)
        sizes = matrix_bytes(made.matrices, PaperStorage())
        if isinstance(scheme, Joint):
            assert sum(sizes.values()) == scheme.bytes(64, 96, PaperStorage())
        else:
            assert sizes["q"] == scheme.bytes(64, 48, PaperStorage())
        for name, matrix in made.matrices.items():
            assert made.errors[name] == pytest.approx(
                whitening.error(weights[name], matrix.dequantize()) ** 2
            )


@pytest.mark.parametrize("quantizer", [gptq, rtn])
def test_matrices_of_one_input_side_by_side_are_quantized_as_each_is_alone(quantizer: Quantizer) -> None:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    whitening = whiten((inputs.T @ inputs).double())
    weights = {name: torch.randn(64, size, generator=generator) for name, size in (("q", 48), ("k", 16))}
    search = Search(GridChoice({3: (32,)}))
    for scheme in (Plain(Grid(3, 32)), Plain(None)):
        beside = realize(scheme, weights, whitening, search, quantizer=quantizer)
        for name, weight in weights.items():
            alone = realize(scheme, {name: weight}, whitening, search, quantizer=quantizer)
            assert torch.equal(beside.matrices[name].dequantize(), alone.matrices[name].dequantize())
            assert beside.errors[name] == pytest.approx(alone.errors[name], rel=1e-12, abs=1e-30)


def test_without_quantization_the_paper_s_accounting_plans_floating_schemes() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).double()
    whitening = whiten(torch.eye(64).double())
    search = Search(GridChoice({}), unquantized=True, floating=(0.5, 0.8))
    tried = schemes(weight, whitening, PaperStorage(), search)
    plain = Plain(None).bytes(64, 96, PaperStorage())
    sizes = [scheme.bytes(64, 96, PaperStorage()) / plain for scheme in tried]
    assert sizes[0] == 1.0
    assert 0.45 < sizes[1] <= 0.5
    assert 0.75 < sizes[2] <= 0.8


def test_a_label_says_the_path_once() -> None:
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    assert plan_report._label(names) == "layers.0.self_attn.q_proj + k_proj"
