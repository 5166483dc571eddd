"""Laws of a healed export: every format holds what was tuned, and the report shows what that gained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from texts import write_lines

from compot_deploy.cli import main
from compot_deploy.core.matrix import Quantized
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.manifest import read_manifest
from compot_deploy.healing import objection
from compot_deploy.models.source import open_source
from compot_deploy.models.tasks import SPEECH
from compot_deploy.pipeline import healing
from compot_deploy.pipeline.check import Deployment
from compot_deploy.pipeline.compress import compress, context_of
from compot_deploy.pipeline.deploy import deploy
from compot_deploy.pipeline.healing import expected
from compot_deploy.planning.settings import resolve
from compot_deploy.recipe import Recipe, recipe_from_mapping, recipe_to_toml
from compot_deploy.report.html.page import to_html
from compot_deploy.report.json import from_json, to_json
from compot_deploy.report.markdown import to_markdown

COMMON = {"method": "plain", "quant": "int4", "samples": 24, "length": 24, "evaluation_tokens": 400}
GATE = {"max_perplexity_ratio": 1000.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    tiny.save(root / "model", "llama", num_hidden_layers=1)
    write_lines(root / "text.txt")
    return root


@pytest.fixture(scope="module")
def healed(place: Path) -> dict[str, Deployment]:
    made = deploy(
        str(place / "model"),
        calibration=str(place / "text.txt"),
        out=str(place / "healed"),
        format=("onnx", "gguf", "huggingface"),
        dictionary_bits=2,
        gguf_layout="sparse",
        heal=10,
        **COMMON,
        **GATE,
    )
    return dict(zip(("onnx", "gguf", "huggingface"), made, strict=True))


@pytest.mark.slow
def test_every_format_holds_what_was_tuned_and_the_gate_sees_the_gain(
    place: Path, healed: dict[str, Deployment]
) -> None:
    (plain,) = deploy(
        str(place / "model"),
        calibration=str(place / "text.txt"),
        out=str(place / "plain"),
        dictionary_bits=2,
        **COMMON,
        **GATE,
    )
    before = EXPORTERS["onnx"].read(plain.folder)
    first = EXPORTERS["onnx"].read(healed["onnx"].folder)
    for kind, made in healed.items():
        after, accuracy = EXPORTERS[kind].read(made.folder), made.report.accuracy
        for name, matrix in before.items():
            other, same = after[name], first[name]
            if isinstance(matrix, Quantized) and name != "lm_head" and "embed" not in name:
                assert isinstance(other, Quantized) and isinstance(same, Quantized)
                assert bool((matrix.integers == other.integers).all())
                assert bool((matrix.scales != other.scales).any())
                assert bool((same.scales == other.scales).all())
        assert accuracy.unhealed is not None and accuracy.method is not None and accuracy.total is not None
        losses = [
            loss.comparison.divergence.mean.value
            for loss in (accuracy.unhealed, accuracy.method, accuracy.total)
            if loss.comparison.divergence is not None
        ]
        assert losses[1] < losses[0] and losses[2] < losses[0]
        assert plain.report.accuracy.unhealed is None and plain.report.accuracy.method is not None
        assert accuracy.unhealed.comparison == plain.report.accuracy.method.comparison
        assert read_manifest(made.folder).recipe["heal"] == "10"
    assert healed["onnx"].report.sizes.weights == plain.report.sizes.weights, "the same bytes"
    assert healed["onnx"].report.sizes.artifact == pytest.approx(plain.report.sizes.artifact, abs=4096)


@pytest.mark.slow
def test_every_report_says_what_healing_gained_and_took(healed: dict[str, Deployment]) -> None:
    report = healed["onnx"].report
    assert from_json(to_json(report)) == report
    for told in (to_markdown(report), to_html(report), (healed["onnx"].folder / "README.md").read_text()):
        assert "before healing" in told and "Healing took the method loss from" in told
        assert "10 steps on" in told and "numbers tuned" in told


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--heal", "20", "--samples", "8"], "needs 16 windows of calibration text"),
        (["--heal", "0"], "a number of steps from 1"),
        (["--heal", "soon"], "give auto, off, or a number"),
        (["--heal", "9", "--format", "gguf", "--gguf-type", "Q4_K"], "rounds every weight again"),
    ],
)
def test_what_cannot_be_healed_is_refused_before_any_work(
    place: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = [str(place / "model"), "--calibration", str(place / "text.txt"), "--out", str(tmp_path / "out")]
    assert main([*command, "--length", "24", "--method", "plain", *flags]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_steps_are_written_as_they_were_given() -> None:
    for given, kept, steps in ((40, "40", 40), ("auto", "auto", None), ("off", "off", None)):
        recipe = recipe_from_mapping({"heal": given}, origin="a test")
        assert (recipe.heal, recipe.heal_steps) == (kept, steps)
        assert f'heal = "{kept}"' in recipe_to_toml(recipe)


def test_little_text_is_not_worth_healing_and_plan_and_report_say_so(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(place / "model")
    options = {**COMMON, "calibration": str(place / "text.txt"), "heal": "auto"}
    for samples, said in ((8, "needs 16 windows"), (24, "longer than the rest of the run")):
        settings = resolve(Recipe(str(place / "model"), **{**options, "samples": samples}), source)
        made = compress(settings, tmp_path)
        assert made.unhealed is None and any("not healed" in note and said in note for note in made.notes)
        context = context_of(settings, tmp_path)
        assert said in expected(settings.recipe, context)[0] and context.answers is None
    monkeypatch.setattr(healing, "affordable_steps", lambda *_: 12)
    context = context_of(settings, tmp_path)
    assert "by 12 steps" in expected(settings.recipe, context)[0] and context.answers is not None
    assert expected(Recipe(), context) == ()


def test_what_is_not_healed_says_why(place: Path) -> None:
    source = open_source(place / "model")
    assert objection(source) is None
    assert "speech model" in str(objection(replace(source, task=SPEECH)))
