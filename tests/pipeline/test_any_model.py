"""Laws of the pipeline for models of any kind: text in, evaluated folders out, as for decoders with a native graph."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from cases import nightly, pairs_by_day
from consumer_environments import python_with
from places import FORMATS, KINDS, Exported, Place

from compot_deploy import check
from compot_deploy.accuracy.texts import OnnxTexts
from compot_deploy.cli import main
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Factorized, Quantized
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import unlisted_files, verify
from compot_deploy.exporters.manifest import MANIFEST
from compot_deploy.models.source import open_source
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.pipeline.deploy import deploy, plan, run
from compot_deploy.pipeline.evaluation import CARD, HTML, JUNIT, REPORT, UNCOUNTED
from compot_deploy.pipeline.provenance import published
from compot_deploy.pipeline.texts import EVALUATION, calibration_windows, evaluation_windows
from compot_deploy.pipeline.workspace import RECIPE
from compot_deploy.planning.schemes import Joint
from compot_deploy.recipe import Recipe
from compot_deploy.report.json import from_json

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few")]
TABLES = {
    "gpt2": "transformer.wte",
    "opt": "model.decoder.embed_tokens",
    "bert": "embeddings.word_embeddings",
}

CASES = [kind if kind != "opt" else nightly(kind)[0] for kind in KINDS]


# -- what comes out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
def test_a_model_becomes_evaluated_folders_of_both_formats(
    kind: str, place: Place, exported: Exported
) -> None:
    for form in FORMATS:
        out = exported.folder(kind, form)
        assert exported.codes[kind] == 0
        report = from_json((out / REPORT).read_text())
        accuracy = report.accuracy
        assert report.passed and report.format == form
        assert accuracy.export_reference.comparison.nmse < 1e-9
        assert accuracy.total is not None and accuracy.method is not None
        total = accuracy.total.comparison
        if kind == "bert":
            assert total.cosine is not None and -1 < total.cosine.value < 1
            assert total.perplexity_ratio is None and total.divergence is None
        else:
            assert total.perplexity_ratio is not None and total.top1_agreement is not None
            assert total.divergence is not None and total.divergence.mean.value > 1e-4
            assert total.cosine is None
            assert accuracy.continuations
        assert report.sizes.artifact == sum(
            path.stat().st_size
            for path in out.rglob("*")
            if path.is_file() and path.relative_to(out).as_posix() not in (*UNCOUNTED, MANIFEST)
        )
        for name in (REPORT, JUNIT, CARD, HTML, RECIPE, EVALUATION, "config.json", "tokenizer.json"):
            assert (out / name).is_file(), name
        assert report.frontier is not None
        if form == FORMATS[0]:  # whose bytes decide the plan
            assert report.frontier.chosen.bytes == report.sizes.linears
            assert report.sizes.linears is not None and report.sizes.linear_weights is not None
            assert report.sizes.linears * 8 <= 3.4 * report.sizes.linear_weights
        assert not [diagnostic for diagnostic in report.diagnostics if diagnostic.severity == "error"]
        linears = [layer for layer in report.layers if layer.block is not None]
        assert report.recipe["model"] == place.model(kind).name
        assert len(linears) == len(open_source(place.model(kind)).layout.names)
        assert all(layer.sensitivity is not None and layer.error is not None for layer in linears)
    manifests = [verify(exported.folder(kind, form)) for form in FORMATS]
    digests = [{m.name: m.digest for m in one.matrices if m.role == "linear"} for one in manifests]
    assert digests[0] == digests[1], "one compression, two files"


@pytest.mark.parametrize(
    ("form", "kind"),
    pairs_by_day(FORMATS, KINDS, [("onnx", "gpt2"), ("huggingface", "bert")]),
)
def test_a_folder_is_checked_again_file_by_file_and_loss_by_loss(
    kind: str, form: str, place: Place, exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported.folder(kind, form)
    assert unlisted_files(folder, verify(folder)) == ()
    before = from_json((folder / REPORT).read_text()).accuracy
    original = str(place.model(kind))
    (flag, limit) = place.limits(kind)
    found = check(folder, reference=original, limits={flag[2:].replace("-", "_"): float(limit)})
    assert found.passed
    for name in ("method", "export_reference", "export_deployed", "total"):
        one, other = getattr(found.report.accuracy, name), getattr(before, name)
        assert one.comparison.nmse == pytest.approx(other.comparison.nmse, rel=1e-6, abs=1e-15), name
    again = ["check", str(folder), "--reference", original, *place.limits(kind)]
    assert main(again) == 0
    assert "PASSED:" in capsys.readouterr().out
    strict = ["--min-cosine", "1"] if kind == "bert" else ["--max-kl", "0"]
    assert main([*again, *strict]) == 1
    assert main(["inspect", str(folder)]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert "layers.0" in shown or "layer.0" in shown or "h.0" in shown
    assert main(["report", str(folder)]) == 0
    assert unlisted_files(folder, verify(folder)) == ()


@pytest.mark.parametrize("kind", CASES)
def test_blocks_and_embedding_are_compressed_and_nothing_else(
    kind: str, place: Place, exported: Exported
) -> None:
    source = open_source(place.model(kind))
    for form in FORMATS:
        model = EXPORTERS[form].read_model(exported.folder(kind, form))
        roles = {name: model.role(name) for name in model.matrices}
        assert {name for name, role in roles.items() if role == "linear"} == set(source.layout.names)
        table = model.matrices[TABLES[kind]]
        assert isinstance(table, Quantized) and table.grid == Grid(8, 32)
        others = {name for name, role in roles.items() if role == "other"}
        assert others <= {"pooler.dense"}, "a graph of token vectors needs no pooler"
        described = {record.name: record.role for record in verify(exported.folder(kind, form)).matrices}
        assert described == roles, "the manifest tells what the files hold"
        assert all(torch.equal(model.matrices[name].dequantize(), source.weight(name)) for name in others)


@pytest.mark.parametrize("kind", ["bert", *nightly("opt")])
def test_factors_share_dictionaries_in_models_of_any_kind(kind: str, place: Place, tmp_path: Path) -> None:
    """Below what plain integers reach, dictionaries are what is left."""
    (done,) = deploy(
        str(place.model(kind)),
        calibration=str(place.text),
        bits=2.15,
        samples=8,
        length=32,
        evaluation_tokens=256,
        max_perplexity_ratio=None if kind != "bert" else 2.0,
        min_cosine=-1.0 if kind == "bert" else Recipe().min_cosine,
        out=str(tmp_path / "out"),
    )
    model = EXPORTERS["onnx"].read_model(done.folder)
    factorized = [matrix for matrix in model.matrices.values() if isinstance(matrix, Factorized)]
    assert factorized
    assert done.report.accuracy.export_reference.comparison.nmse < 1e-9
    linears, weights = done.report.sizes.linears, done.report.sizes.linear_weights
    assert linears is not None and weights is not None and linears * 8 <= 2.15 * weights


@pytest.mark.parametrize(
    ("kind", "method"),
    [("gpt2", "compot"), ("bert", "svd-llm"), pytest.param("opt", "plain", marks=pytest.mark.nightly)],
)
def test_a_method_is_that_of_every_model(kind: str, method: str, place: Place, tmp_path: Path) -> None:
    flags = ["--method", method, *(["--rounds", "3", "--ratio", "0.1"] if method != "plain" else [])]
    assert main([*place.flags(kind, *flags), "--out", str(tmp_path / "out")]) == 0
    report = from_json((tmp_path / "out" / REPORT).read_text())
    kinds = {layer.kind for layer in report.layers if layer.block is not None}
    assert kinds == {"quantized"} if method == "plain" else "factorized" in kinds
    if method != "plain":
        assert report.accuracy.factorization is not None, "factors before quantization split the loss"


def test_the_plan_of_a_model_says_what_its_loss_is_measured_in(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units = {"gpt2": "nats per token", "bert": "of one minus the cosine"}
    for kind, unit in units.items():
        out = tmp_path / kind
        flags = ["--bits", "3.4", "--out", str(out)]
        assert main(["plan", *place.flags(kind, *flags)]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"loss is predicted, in {unit}" in shown
        assert "int4/g32" in shown and not out.exists()
    drafted = plan(
        str(place.model("gpt2")),
        bits=2.15,
        calibration=str(place.text),
        samples=8,
        length=32,
        out=str(tmp_path / "o"),
    )
    assert drafted.plans[0].bytes <= drafted.plans[0].budget
    assert any(isinstance(entry.candidate.scheme, Joint) for entry in drafted.plans[0].chosen)


@pytest.mark.parametrize(
    ("kind", "form"), [("gpt2", "onnx"), pytest.param("bert", "huggingface", marks=pytest.mark.nightly)]
)
def test_the_model_s_files_have_the_size_that_was_asked_for(
    kind: str, form: str, place: Place, tmp_path: Path
) -> None:
    out = tmp_path / "sized"
    flags = ["--format", form, "--method", "plain", "--bits", "8.6"]
    assert main([*place.flags(kind, *flags), "--out", str(out)]) == 0
    largest = model_bytes(out)
    wanted = largest - 15_000
    flags = [*flags[:2], "--size", f"{wanted}B", *flags[6:]]
    assert main([*place.flags(kind, *flags), "--out", str(out), "--force"]) == 0
    assert 0.9 * wanted < model_bytes(out) <= wanted


def model_bytes(folder: Path) -> int:
    """Of all files but those that tell about the model."""
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path != folder / CARD and folder / "compot" not in path.parents
    )


@pytest.mark.parametrize("kind", ["gpt2", *nightly("bert")])
def test_other_methods_are_evaluated_beside_it_at_the_same_bytes(
    kind: str, place: Place, tmp_path: Path
) -> None:
    more = ["--bits", "3.4", "--compare", "plain,svd-llm"]
    assert main([*place.flags(kind, *more), "--out", str(tmp_path / "out")]) == 0
    report = from_json((tmp_path / "out" / REPORT).read_text())
    own = report.sizes.linears
    assert own is not None
    names = {other.name: other for other in report.alternatives}
    assert set(names) == {"plain", "svd-llm"}
    assert names["plain"].factorized == 0
    assert all(other.linears == len(open_source(place.model(kind)).layout.names) for other in names.values())
    for other in names.values():
        assert other.bytes <= report.sizes.weights + 1
        assert other.loss.comparison.nmse > 0
    page = (tmp_path / "out" / HTML).read_text()
    assert "alternatives.0.loss" in page and "alternatives.1.loss" in page


# -- whole texts of the other tasks ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["bert masked", *nightly("bert classes", "bert token classes", "distilbert", "gpt2 classes")]
)
def test_models_of_every_task_are_evaluated_in_both_formats(kind: str, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--format", "onnx", "--format", "huggingface", "--method", "plain"]
    assert main([*place.flags(kind, *flags), "--out", str(out)]) == 0
    for form in FORMATS:
        report = from_json((out / form / REPORT).read_text())
        total = report.accuracy.total
        assert total is not None and report.accuracy.export_reference.comparison.nmse < 1e-9
        criteria = {one.name for one in report.accuracy.gate.criteria}
        if kind == "distilbert":
            assert criteria >= {"nonfinite_logits", "max_export_nmse", "min_cosine"}
        else:
            assert criteria >= {"nonfinite_logits", "max_export_nmse", "min_top1"}
            assert total.comparison.divergence is not None and total.comparison.perplexity_ratio is None
        again = ["check", str(out / form), "--reference", str(place.model(kind)), *place.limits(kind)]
        assert main(again) == 0


# -- texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_texts_that_are_evaluated_on_are_not_calibrated_on(kind: str, place: Place, tmp_path: Path) -> None:
    source = open_source(place.model(kind))
    recipe = Recipe(calibration=str(place.text), model=str(source.folder), samples=1000, length=16)
    calibration = calibration_windows(recipe, source, tmp_path)
    evaluation = evaluation_windows(recipe, source, tmp_path)

    def rows(windows: TokenWindows) -> set[tuple[int, ...]]:
        return {tuple(window.tolist()) for window in windows.windows}

    assert len(calibration.windows) > 100 > len(evaluation.windows) > 15
    assert not rows(calibration) & rows(evaluation)
    assert "not calibrated on" in evaluation.source


def test_an_encoder_without_a_text_reads_that_of_the_model_that_ships(place: Place, tmp_path: Path) -> None:
    source = open_source(place.model("bert"))
    recipe = Recipe(model=str(source.folder), samples=4, length=32, evaluation_tokens=64)
    calibration, evaluation = (
        make(recipe, source, tmp_path) for make in (calibration_windows, evaluation_windows)
    )
    assert "training text" in calibration.source and "held-out text" in evaluation.source
    assert len(evaluation.windows) >= 16


# -- text out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("form", FORMATS)
def test_a_decoder_writes_text_and_an_encoder_says_that_it_does_not(
    kind: str, form: str, exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(exported.folder(kind, form)), "-p", "the quick", "-n", "4"]
    if kind == "bert":
        assert main(command) == 2
        assert "gives embeddings or scores and writes no text" in " ".join(capsys.readouterr().err.split())
        return
    capsys.readouterr()  # of making the folder
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.startswith("the quick") and "4 tokens" in said.err


def test_a_recipe_is_all_that_a_run_needs(place: Place, tmp_path: Path) -> None:
    recipe = Recipe(
        model=str(place.model("gpt2")),
        calibration=str(place.text),
        method="plain",
        samples=8,
        length=32,
        evaluation_tokens=256,
        max_perplexity_ratio=None,
        out=str(tmp_path / "out"),
    )
    (done,) = run(recipe)
    assert done.passed
    assert verify(done.folder).recipe == json.loads(json.dumps(asdict(published(recipe))))


@pytest.mark.consumer
def test_optimum_gives_the_same_features_in_its_own_environment(
    place: Place, exported: Exported, tmp_path: Path
) -> None:
    python = python_with("optimum-onnx")
    folder = exported.folder("bert")
    source = open_source(place.model("bert"))
    (batch,) = source.task.batches([torch.tensor([5, 6, 7, 8, 9]), torch.tensor([10, 11, 12])])
    expected = OnnxTexts(folder, threads=1).outputs(batch)
    arguments = {name: value.tolist() for name, value in batch.arguments.items()}
    (tmp_path / "tokens.json").write_text(json.dumps(arguments))
    (tmp_path / "expected.json").write_text(json.dumps(expected.tolist()))
    script = Path(__file__).parents[1] / "consumers" / "optimum_features.py"
    paths = [tmp_path / "tokens.json", folder, tmp_path / "expected.json"]
    command = [python, str(script), *(str(path) for path in paths)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
