"""Laws of planning a whole model, on tiny random ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from compot_deploy import plan_report
from compot_deploy.allocate import PaperStorage
from compot_deploy.candidates import Search, forms, realize
from compot_deploy.checkpoint import open_checkpoint
from compot_deploy.cli import main
from compot_deploy.errors import RecipeError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import verify
from compot_deploy.pipeline import deploy, plan_only
from compot_deploy.plan import GridChoice, InMemory, Joint, Plain, form_from_data, form_to_data
from compot_deploy.recipe import Recipe
from compot_deploy.report import from_json
from compot_deploy.runners import torch_runner
from compot_deploy.weights import Factorized, Grid, Pattern, leaves, matrix_bytes
from compot_deploy.whiten import whiten

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
    checkpoint = open_checkpoint(str(model))
    names = checkpoint.architecture.linear_names(checkpoint.layers)
    matrices = exporter.read(shared)
    linears = {name: matrices[name] for name in names}
    numbers = sum(checkpoint.weight(name).numel() for name in names)
    spent = sum(matrix_bytes(linears, storage).values())
    assert spent * 8 <= 1.7 * numbers
    assert any(isinstance(matrix, Factorized) for matrix in linears.values())
    report = json.loads((shared / "compot" / "report.json").read_text())
    stated = verify(shared)
    assert sum(record.bytes for record in stated.matrices if ".layers." in record.name) == spent
    assert f"the plan spends {spent} of {int(1.7 * numbers / 8)} bytes" in json.dumps(report)


def test_a_report_has_the_frontier_with_the_chosen_point_and_the_memory_figures(shared: Path) -> None:
    report = from_json((shared / "compot" / "report.json").read_text(encoding="utf-8"))
    planned = report.frontier
    assert planned is not None and planned.chosen.bytes == report.sizes.linears
    assert planned.chosen.bits == pytest.approx(8 * planned.chosen.bytes / planned.weights)
    assert planned.weights == report.sizes.linear_weights
    losses = [point.loss for point in planned.all_forms]
    assert len(losses) > 5 and losses == sorted(losses, reverse=True)
    assert any(point.bytes <= planned.chosen.bytes for point in planned.all_forms)
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
    assert all(layer.effect is not None and layer.error is not None for layer in linears)


def test_a_plan_is_the_same_twice_and_more_budget_costs_less(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe(model=str(model), calibration=str(text), bits=2.0, out=str(tmp_path / "out"), **SETTINGS)
    first = plan_only(recipe)
    (work,) = tmp_path.glob(".out.work-*")
    kept = {path: path.stat().st_mtime_ns for path in work.glob("curve-*.json")}
    assert kept
    again = plan_only(recipe)
    assert again.plans == first.plans
    wider = plan_only(Recipe(**{**vars(recipe), "bits": 3.0}))
    assert wider.plans[0].loss < first.plans[0].loss
    # every budget uses the same measurements
    assert {path: path.stat().st_mtime_ns for path in work.glob("curve-*.json")} == kept
    # where there is no plain mix of the size, nothing is compared with it; where there is, it is
    assert len(first.plans) == 1
    assert all(isinstance(entry.candidate.form, Plain) for entry in wider.plans[-1].chosen)


def test_the_plan_command_prints_the_plan(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--calibration", str(text), "--out", str(tmp_path / "out"), "--bits", "2.0"]
    flags += ["--samples", "6", "--length", "32"]
    picture = tmp_path / "plan.png"
    assert main(["plan", str(model), *flags, "--plot", str(picture)]) == 0
    table = capsys.readouterr().out
    assert "layers.0.mlp.down_proj" in table
    assert "predicted output" in table
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["plan", str(model), *flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes"] <= plan["budget"]
    assert sum(entry["bytes"] for entry in plan["chosen"]) == plan["bytes"]
    losses = [point["predicted_loss"] for point in plan["frontier"]]
    assert losses == sorted(losses, reverse=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ({"bits": 0.05}, "smallest forms"),
        ({"size": "20KB"}, "alone need about"),
        ({"bits": 2.0, "size": "1MB"}, "give one of them"),
        ({"size": "much"}, "400MB"),
        ({"bits": 2.0, "allocation": "spectral"}, "need --allocation knapsack"),
    ],
)
def test_impossible_budgets_say_what_is_possible(
    model: Path, text: Path, tmp_path: Path, knobs: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(RecipeError, match=complaint):
        plan_only(
            Recipe(model=str(model), calibration=str(text), out=str(tmp_path / "o"), **knobs, **SETTINGS)
        )


def test_the_whole_output_has_the_size_that_was_asked_for(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "sized"
    deploy(str(model), calibration=str(text), size="150KB", out=str(out), **SETTINGS)
    size = sum(
        path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name != "report.html"
    )
    assert size <= 150_000
    assert size > 0.95 * 150_000


def test_sizes_are_read_with_their_units() -> None:
    assert Recipe(size="400MB").size_bytes == 400_000_000
    assert Recipe(size="1.5 GiB").size_bytes == 3 * 2**29
    assert Recipe(size="12kb").size_bytes == 12_000
    assert Recipe(size="77").size_bytes == 77
    assert Recipe().size_bytes is None


def test_forms_survive_json() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).double()
    whitening = whiten(torch.eye(64).double())
    search = Search(
        GridChoice({2: (32,), 4: (32, 64), 8: (64,)}), unquantized=True, patterns=(Pattern(2, 4),)
    )
    tried = forms(weight, whitening, PaperStorage(), search)
    assert {type(form) for form in tried} == {Plain, Joint}
    for form in tried:
        assert form_from_data(json.loads(json.dumps(form_to_data(form)))) == form


def test_errors_are_those_of_the_matrices_that_are_made() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = (
        torch.randn(300, 64, generator=generator).double() @ torch.randn(64, 64, generator=generator).double()
    )
    whitening = whiten(tokens.T @ tokens)
    weights = {name: torch.randn(64, 48, generator=generator) for name in "qk"}
    search = Search(GridChoice({2: (32,), 4: (32, 64), 8: (64,)}))
    whole = torch.cat(list(weights.values()), dim=1)
    for form in forms(whole, whitening, PaperStorage(), search):
        made = realize(form, weights, whitening, search)
        sizes = matrix_bytes(made.matrices, PaperStorage())
        if isinstance(form, Joint):
            assert sum(sizes.values()) == form.bytes(64, 96, PaperStorage())
        else:
            assert sizes["q"] == form.bytes(64, 48, PaperStorage())
        for name, matrix in made.matrices.items():
            assert made.errors[name] == pytest.approx(
                whitening.error(weights[name], matrix.dequantize()) ** 2
            )


def test_without_quantization_the_paper_s_accounting_plans_floating_forms() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).double()
    whitening = whiten(torch.eye(64).double())
    search = Search(GridChoice({}), unquantized=True, floating=(0.5, 0.8))
    tried = forms(weight, whitening, PaperStorage(), search)
    plain = Plain(None).bytes(64, 96, PaperStorage())
    sizes = [form.bytes(64, 96, PaperStorage()) / plain for form in tried]
    assert sizes[0] == 1.0
    assert 0.45 < sizes[1] <= 0.5
    assert 0.75 < sizes[2] <= 0.8


def test_replaced_matrices_come_back(model: Path) -> None:
    runner = torch_runner(model)
    tokens = torch.arange(3, 11)[None]
    (before,) = runner.logits(tokens, 8)
    name = "model.layers.0.mlp.down_proj"
    weight = open_checkpoint(str(model)).weight(name).float()
    made = realize(
        Plain(Grid(2, 64)), {name: weight}, whiten(torch.eye(weight.shape[0])), Search(GridChoice({2: (64,)}))
    )
    with runner.replaced(made.matrices):
        (during,) = runner.logits(tokens, 8)
    (after,) = runner.logits(tokens, 8)
    assert torch.equal(before, after)
    assert not torch.equal(before, during)


def test_a_label_says_the_path_once() -> None:
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    assert plan_report._label(names) == "layers.0.self_attn.q_proj + k_proj"
