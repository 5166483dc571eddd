"""Laws of runs on models of any kind: stopped and gone on with, made again, held against limits and baselines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cases import nightly
from places import FORMATS, Exported, Place

from compot_deploy.cli import main
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import verify
from compot_deploy.models.streaming import BlockStream
from compot_deploy.pipeline.evaluation import CARD, REPORT
from compot_deploy.pipeline.texts import EVALUATION
from compot_deploy.pipeline.workspace import RECIPE
from compot_deploy.report.json import from_json

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few")]


# -- runs again, runs on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", *nightly("bert")])
def test_a_gate_that_does_not_hold_is_exit_code_1_and_the_folder_stays(
    kind: str, place: Place, exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = ["--min-cosine", "1"] if kind == "bert" else ["--max-kl", "0"]
    both = ["--format", "onnx", "--format", "huggingface", "--bits", "3.4"]
    out = tmp_path / "strict"
    assert main([*place.flags(kind, *both, *strict), "--out", str(out)]) == 1
    assert "FAILED" in capsys.readouterr().out
    for form in FORMATS:
        assert not from_json((out / form / REPORT).read_text()).passed
        # Nothing but verdicts differs from the run that passed: two runs are bitwise equal.
        assert model_files(out / form) == model_files(exported.folder(kind, form))


def model_files(folder: Path) -> dict[str, bytes]:
    """Every file of the model, by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / CARD and folder / "compot" not in path.parents
    }


def _stop(patch: pytest.MonkeyPatch, owner: Any, name: str, after: int) -> None:
    """Interrupt at a call, as Ctrl-C does."""
    real, calls = getattr(owner, name), [0]

    def stopped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    patch.setattr(owner, name, stopped)


@pytest.mark.parametrize(
    ("kind", "sequential"), [("gpt2", False), pytest.param("bert", True, marks=pytest.mark.nightly)]
)
def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_bytes(
    kind: str, sequential: bool, place: Place, tmp_path: Path
) -> None:
    from compot_deploy.pipeline import export as export_module
    from compot_deploy.planning import carry_out, measure, sensitivity

    flags = ["--bits", "3.4"]
    flags += ["--sequential"] if sequential else []
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main([*place.flags(kind, *flags), "--out", str(straight)]) == 0
    exporter = type(EXPORTERS["onnx"])
    stages: list[tuple[Any, str, int]] = [
        (BlockStream, "advance", 1),
        (measure, "realize", 20),
        (sensitivity, "products_backwards", 0),
        (carry_out._Blocks, "keep", 1),
        (exporter, "write", 0),
        (export_module, "evaluate_folder", 0),
    ]
    for owner, name, after in stages:
        with pytest.MonkeyPatch.context() as patch:
            _stop(patch, owner, name, after)
            assert main([*place.flags(kind, *flags), "--out", str(stopped)]) == 75, name
        assert not stopped.exists()
        assert list(tmp_path.glob(".stopped.work-*")), "what is finished is kept"
    with pytest.MonkeyPatch.context() as patch:
        if not sequential:  # everything is there: no block runs again
            _stop(patch, BlockStream, "advance", 0)
        _stop(patch, carry_out._Blocks, "keep", 0)
        assert main([*place.flags(kind, *flags), "--out", str(stopped)]) == 0
    assert model_files(stopped) == model_files(straight)
    digests = [{m.name: m.digest for m in verify(out).matrices} for out in (straight, stopped)]
    assert digests[0] == digests[1]
    assert not list(tmp_path.glob(".stopped.work-*"))


def test_force_replaces_a_folder_of_ours_and_a_recipe_makes_the_same_again(
    place: Place, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported.folder("bert"), out)
    (out / EVALUATION).unlink()
    monkeypatch.chdir(place.root)  # a recipe names model and text by their last part
    flags = ["--recipe", str(exported.folder("bert") / RECIPE), "--out", str(out)]
    assert main(flags) == 2
    both = tmp_path / "both"
    assert main([*flags[:2], "--out", str(both)]) == 0
    for form in FORMATS:
        assert model_files(both / form) == model_files(exported.folder("bert", form))
    only = ["--min-cosine", "-1", "--method", "plain"]
    assert main([*place.flags("bert", *only), "--out", str(out), "--force"]) == 0
    assert verify(out).recipe["method"] == "plain"


@pytest.mark.parametrize("kind", ["gpt2", *nightly("bert")])
def test_a_zip_of_the_folder_is_written_beside_it(kind: str, place: Place, tmp_path: Path) -> None:
    import zipfile

    more = ["--method", "plain", "--archive"]
    assert main([*place.flags(kind, *more), "--out", str(tmp_path / "out")]) == 0
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as packed:
        assert "onnx/model.onnx" in packed.namelist()
        packed.extractall(tmp_path / "again")
    assert verify(tmp_path / "again").matrices == verify(tmp_path / "out").matrices


@pytest.mark.parametrize("kind", ["bert", *nightly("gpt2")])
def test_a_folder_is_held_against_a_baseline_and_a_gate_file(
    kind: str, place: Place, exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported.folder(kind)
    loss = "kl" if kind == "gpt2" else "cosine_distance"
    baseline = tmp_path / "baseline.json"
    baseline.write_bytes((folder / REPORT).read_bytes())
    check = ["check", str(folder), "--reference", str(place.model(kind)), *place.limits(kind)]
    command = [*check, "--baseline", str(baseline), "--report-dir", str(tmp_path / "report")]
    assert main(command) == 0
    report = from_json((tmp_path / "report" / "report.json").read_text())
    names = {one.name for one in report.accuracy.gate.criteria}
    assert {f"{loss}_growth", "bytes_growth"} <= names
    assert (tmp_path / "report" / "report.junit.xml").is_file()
    # A baseline that was better by a third.
    document = json.loads(baseline.read_text())
    total = document["accuracy"]["total"]["comparison"]
    if kind == "gpt2":
        total["divergence"]["mean"]["value"] /= 1.5
    else:
        total["cosine"]["value"] = 1 - (1 - total["cosine"]["value"]) / 1.5
    baseline.write_text(json.dumps(document))
    assert main(command) == 1
    assert f"{loss}_growth" in "".join(capsys.readouterr().out.split())
    gate = tmp_path / "gate.toml"
    limit = "max_kl = 1e9" if kind == "gpt2" else "min_cosine = 0.0"
    gate.write_text(f'{limit}\nmax_bytes = "10MB"\n[regression]\n{loss} = "60%"\n')
    assert main([*command, "--gate", str(gate)]) == 0
    gate.write_text('max_bytes = "10KB"\n')
    assert main([*check, "--gate", str(gate)]) == 1
