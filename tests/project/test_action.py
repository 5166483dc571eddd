"""Laws of the action and of its example workflow: their steps, run in a shell, pass, and fail on a regression."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from compot_deploy import cli
from compot_deploy.exporters.artifact import verify
from compot_deploy.pipeline.deploy import deploy
from compot_deploy.pipeline.evaluation import REPORT_FILES
from compot_deploy.report.json import from_json, to_json

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
WORKFLOW = yaml.safe_load((ROOT / "examples" / "ci" / "compot-gate.yml").read_text(encoding="utf-8"))
QUICK = (
    "--samples 4 --length 32 --evaluation-tokens 256 --rounds 2 --max-perplexity-ratio 1e9 "
    "--embeddings none --head none"
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user's repository holds: the original, calibration text, limits, the report of a good run."""
    folder = tmp_path_factory.mktemp("repository")
    tiny.save(folder / "models" / "original", num_hidden_layers=1)
    (folder / "ci").mkdir()
    text = "".join(f"{tiny.WORDS}{number} " for number in range(160))
    (folder / "ci" / "calibration.txt").write_text(text)
    (good,) = deploy(
        str(folder / "models" / "original"),
        calibration=str(folder / "ci" / "calibration.txt"),
        out=str(folder / "good"),
        samples=4,
        length=32,
        evaluation_tokens=256,
        rounds=2,
        max_perplexity_ratio=1e9,
        embeddings="none",  # what quantization costs is what quantizing the factors costs
        head="none",
    )
    (folder / "ci" / "baseline.json").write_text(to_json(good.report), encoding="utf-8")
    (folder / "ci" / "gate.toml").write_text('max_bytes = "1MB"\n[regression]\nkl = "10%"\nbytes = "2%"\n')
    return folder


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment whose `python` writes down what it is to do, and whose compot-deploy is ours; it has no torch."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, line in (
        ("python", f'printf "%s\\n" "$*" >> "{tmp_path}/installed"; case "$*" in -c*|*+cpu*) exit 1; esac'),
        ("compot-deploy", f'exec "{sys.executable}" -m compot_deploy "$@"'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "HF_HUB_OFFLINE": "1",
    }


class Failed(Exception):
    """A step exited with another code than 0."""


def expand(text: str, inputs: Mapping[str, str]) -> str:
    """GitHub's expressions, as far as these files use them."""

    def value(match: re.Match[str]) -> str:
        name = match[1].strip()
        if name.startswith("inputs."):
            return inputs[name.removeprefix("inputs.")]
        assert name == "github.action_path", name
        return str(ROOT)

    return re.sub(r"\$\{\{(.*?)\}\}", value, text)


def wanted(condition: str, inputs: Mapping[str, str], failed: bool) -> bool:
    condition = condition.removeprefix("${{").removesuffix("}}").strip()
    always = condition.startswith("always()")
    condition = condition.removeprefix("always()").removeprefix(" && ")
    if condition.startswith("github.event_name"):
        return not failed
    match = re.fullmatch(r"inputs\.([\w-]+) != '([^']*)'", condition)
    assert match is not None, condition
    return inputs[match[1]] != match[2] and (always or not failed)


def run_action(given: Mapping[str, Any], folder: Path, shell: Mapping[str, str]) -> list[str]:
    """Run the steps of action.yml; returns the names of those that ran, uploads included."""
    assert set(given) <= set(ACTION["inputs"])
    inputs = {name: str(given.get(name, spec["default"])) for name, spec in ACTION["inputs"].items()}
    ran, failure = [], None
    for step in ACTION["runs"]["steps"]:
        if "if" in step and not wanted(step["if"], inputs, failure is not None):
            continue
        if failure is not None and "always()" not in step.get("if", ""):
            continue
        ran.append(step["name"])
        if "run" not in step:
            continue
        assert "${{" not in step["run"]  # what somebody types is a variable, never a part of the script
        env = {name: expand(value, inputs) for name, value in step.get("env", {}).items()}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=folder,
            env={**shell, **env},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            failure = Failed(step["name"], done.returncode, done.stdout[-2000:] + done.stderr[-2000:], ran)
    if failure is not None:
        raise failure
    return ran


def run_workflow(folder: Path, shell: Mapping[str, str], more: str) -> list[str]:
    """Run the example's job as a pull request would, with quicker settings."""
    ran = []
    for step in WORKFLOW["jobs"]["gate"]["steps"]:
        if step.get("uses", "").startswith("compot-deploy/"):
            given = dict(step["with"])
            ran += run_action({**given, "arguments": f"{given['arguments']} {QUICK} {more}"}, folder, shell)
        elif "run" in step:
            done = subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], cwd=folder, env=dict(shell))
            assert done.returncode == 0
            ran.append(step["name"])
    return ran


@pytest.mark.slow  # five processes that each load torch
@pytest.mark.nightly
def test_the_example_passes_and_fails_on_a_planted_regression(
    repository: Path, shell: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(repository, folder)
    ran = run_workflow(folder, shell, "")
    assert ran == ["Install compot-deploy", "Compress", "Check", "Keep the report", "Ship"]
    assert (tmp_path / "installed").read_text().splitlines() == [
        "-c import torch",
        "-m pip install --quiet torch==2.13.0+cpu",
        "-m pip install --quiet torch==2.13.0",
        f"-m pip install --quiet --no-deps --require-hashes -r {ROOT}/locks/demo.txt",
        f"-m pip install --quiet --no-deps --no-build-isolation {ROOT}",
    ]
    report = from_json((folder / "report" / "report.json").read_text(encoding="utf-8"))
    assert report.passed and {one.name for one in report.accuracy.gate.criteria} >= {
        "max_bytes", "kl_growth", "bytes_growth",
    }  # fmt: skip
    assert (folder / "report" / "report.html").is_file() and (
        folder / "report" / "report.junit.xml"
    ).is_file()
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "✅ passed" in summary and "Against the baseline" in summary

    shutil.rmtree(folder / "models" / "compressed")
    with pytest.raises(Failed) as failure:
        run_workflow(folder, shell, "--code-bits 2")  # the planted regression
    step, code, output, ran = failure.value.args
    assert (step, code) == ("Check", 1), output
    assert ran[-1] == "Keep the report"
    report = from_json((folder / "report" / "report.json").read_text(encoding="utf-8"))
    assert [one.name for one in report.accuracy.gate.criteria if not one.passed] == ["kl_growth"]
    added = (tmp_path / "summary.md").read_text(encoding="utf-8").removeprefix(summary)
    assert "❌ failed" in added and summary in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_a_gate_that_cannot_be_read_stops_the_action_before_it_evaluates(
    repository: Path, shell: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "gate.toml").write_text("max_kk = 1\n")
    given = {"folder": "good", "gate": str(tmp_path / "gate.toml"), "package": "none", "report": "nowhere"}
    with pytest.raises(Failed) as failure:
        run_action(given, repository, shell)
    step, code, output, _ = failure.value.args
    assert (step, code) == ("Check", 2) and "unknown key 'max_kk'. Known keys:" in output
    assert not (tmp_path / "installed").exists() and not (repository / "nowhere").exists()


def test_every_input_is_used_and_documented() -> None:
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    documented = (ROOT / "docs" / "ci-gate.md").read_text(encoding="utf-8")
    for name, spec in ACTION["inputs"].items():
        assert f"inputs.{name}" in text and spec["description"] and f"`{name}`" in documented, name
    with_ = next(
        step["with"]
        for step in WORKFLOW["jobs"]["gate"]["steps"]
        if "with" in step and "gate" in step["with"]
    )
    assert set(with_) <= set(ACTION["inputs"])


def test_the_report_is_written_again_from_its_own_figures(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "good"
    shutil.copytree(repository / "good", folder)
    before = {name: (folder / name).read_bytes() for name in REPORT_FILES}
    (folder / "compot" / "report.html").write_text("gone")
    assert cli.main(["report", str(folder)]) == 2  # damaged: nothing is sealed anew
    assert "report.html" in capsys.readouterr().err
    (folder / "compot" / "report.html").write_bytes(before["compot/report.html"])
    assert cli.main(["report", str(folder)]) == 0
    assert "report.html: PASSED" in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in REPORT_FILES} == before
    verify(folder)


def test_the_method_loss_is_split_where_the_factors_were_there(repository: Path) -> None:
    report = from_json((repository / "good" / "compot" / "report.json").read_text(encoding="utf-8"))
    accuracy = report.accuracy
    assert accuracy.factorization is not None and accuracy.quantization is not None and accuracy.method
    assert accuracy.split_absent is None
    first, second = accuracy.factorization.comparison, accuracy.quantization.comparison
    product = first.perplexity_ratio.value * second.perplexity_ratio.value
    assert product == pytest.approx(accuracy.method.comparison.perplexity_ratio.value, rel=1e-9)
    assert first.nmse > 1e-3 and second.nmse > 1e-4
    assert all(text.factorized is not None for text in accuracy.continuations)
    by_name = {layer.name: layer for layer in report.layers}
    for layer in report.layers:
        if layer.kind == "factorized":
            assert layer.error and layer.unquantized_error and layer.unquantized_error < layer.error
    assert sum(layer.bytes for layer in report.layers) == report.sizes.weights
    assert len(by_name) == 7 + 2 and sum(layer.block is None for layer in report.layers) == 2
