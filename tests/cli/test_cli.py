"""Laws of the command line: every complaint is one sentence with its exit code, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from cases import nightly
from short import whole_reports

from compot_deploy import cli
from compot_deploy.accuracy.onnx_runner import onnx_runner
from compot_deploy.errors import (
    EXIT_BAD_INPUT,
    EXIT_GATE_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_UNSUPPORTED_MODEL,
)
from compot_deploy.exporters.artifact import verify
from compot_deploy.recipe import default_of, recipe_options
from compot_deploy.report.json import from_json
from compot_deploy.report.model_card import model_card

QUICK = ["--samples", "4", "--length", "32", "--evaluation-tokens", "128", "--rounds", "3"]
FEW = ["--min-positions", "100"]
NO_LIMIT = ["--max-perplexity-ratio", "1e9"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("source") / "tiny-llama", "llama", hidden_size=96, head_dim=16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"{tiny.WORDS}{number} " for number in range(60)))
    return path


@pytest.fixture(scope="module")
def finished(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    with whole_reports():
        code = cli.main([str(model), "--calibration", str(text), "--out", str(out), *QUICK, *NO_LIMIT])
    assert code == EXIT_OK
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert ("<svg" in (out / "compot" / "report.html").read_text()) is drawn
    return out


def _complaint(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_model_becomes_a_complete_folder(finished: Path) -> None:
    manifest = verify(finished)
    for name in ("config.json", "genai_config.json", "tokenizer.json", "onnx/model.onnx", "README.md"):
        assert (finished / name).is_file()
    assert manifest.exporter == "onnx"
    assert any(record.kind == "factorized" for record in manifest.matrices)
    report = from_json((finished / "compot" / "report.json").read_text())
    assert report.passed
    assert report.accuracy.export_reference.comparison.nmse < 1e-9
    assert all(match.equal for match in report.accuracy.export_reference.greedy)


def test_a_batch_may_be_read_in_pieces(finished: Path) -> None:
    runner = onnx_runner(finished, exact=True)
    tokens = torch.randint(320, (4, 12), generator=torch.Generator().manual_seed(0))
    whole = torch.cat(list(runner.logits(tokens, 12)), dim=1)
    pieces = torch.cat(list(runner.logits(tokens, 5)), dim=1)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


def test_a_ratio_allocated_by_singular_values_says_what_ruled_a_plan_out(finished: Path) -> None:
    notes = json.loads((finished / "compot" / "report.json").read_text())["facts"]
    (said,) = [note for note in notes if "--allocation spectral" in note]
    assert said.startswith("--rounds settles the scheme")


def test_the_card_names_the_budget_and_what_was_factorized(finished: Path) -> None:
    card = (finished / "README.md").read_text()
    assert "--ratio 0.2" in card and "tags: [compot, quantized, factorized]" in card
    manifest = verify(finished)
    others = {**manifest.recipe, "bits": 2.5}
    plain = tuple(record for record in manifest.matrices if record.kind != "factorized")
    report = from_json((finished / "compot" / "report.json").read_text())
    card = model_card(report, replace(manifest, recipe=others, matrices=plain))
    assert "--bits 2.5" in card and "--ratio" not in card and "tags: [compot, quantized]" in card


def test_a_ratio_alone_is_planned_within_its_bytes(text: Path, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "small", "llama", num_hidden_layers=1, intermediate_size=96)
    out = tmp_path / "out"
    quick = QUICK[: QUICK.index("--rounds")]
    command = [str(source), "--calibration", str(text), "--out", str(out), *quick, *NO_LIMIT]
    assert cli.main([*command, "--ratio", "0.3"]) == EXIT_OK
    report = from_json((out / "compot" / "report.json").read_text())
    assert any("the plan spends" in note for note in report.notes) and report.frontier is not None
    linears = [record for record in verify(out).matrices if ".layers." in record.name]
    assert sum(record.bytes for record in linears) <= 0.7 * sum(record.plain_int4_bytes for record in linears)
    assert {record.kind for record in linears} <= {"factorized", "quantized"}


def test_nothing_but_the_folder_is_left(finished: Path) -> None:
    assert [path.name for path in finished.parent.iterdir()] == [finished.name]


def test_the_recipe_that_is_written_back_makes_the_same_folder(
    finished: Path, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It names both by their last part.
    (tmp_path / model.name).symlink_to(model)
    (tmp_path / text.name).symlink_to(text)
    monkeypatch.chdir(tmp_path)
    again = tmp_path / "again"
    recipe = finished / "compot" / "recipe.toml"
    assert cli.main(["--recipe", str(recipe), "--out", str(again)]) == EXIT_OK
    for name in ("onnx/model.onnx", "onnx/model.onnx_data"):
        assert (again / name).read_bytes() == (finished / name).read_bytes()


def test_check_measures_a_folder_again(
    finished: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(finished), "--reference", str(model), *FEW]) == EXIT_OK
    assert "PASSED:" in capsys.readouterr().out


def test_check_without_the_original_is_refused_or_says_that_it_is_weaker(
    finished: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    moved = model.with_name("moved")
    model.rename(moved)
    try:
        assert cli.main(["check", str(folder)]) == EXIT_BAD_INPUT
        assert "--reference MODEL" in _complaint(capsys)
        assert cli.main(["check", str(folder), "--export-only", *FEW]) == EXIT_OK
        assert "PASSED, export only" in capsys.readouterr().out
        assert cli.main(["check", str(folder), "--max-kl", "1000"]) == EXIT_BAD_INPUT
        assert (
            cli.main(["check", str(folder), "--max-kl", "1000", "--reference", str(moved), *FEW]) == EXIT_OK
        )
    finally:
        moved.rename(model)


def test_inspect_lists_every_matrix(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(finished), "--json"]) == EXIT_OK
    records = json.loads(capsys.readouterr().out)
    assert len(records) == 2 * 7 + 2
    assert sum(record["bytes"] for record in records) == sum(r.bytes for r in verify(finished).matrices)
    assert cli.main(["inspect", str(finished)]) == EXIT_OK
    assert "layers.1.mlp.down_proj" in capsys.readouterr().out


def test_a_gate_that_fails_keeps_the_folder(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(model), "--calibration", str(text), "--out", str(out), *QUICK, "--max-kl", "1e-9"]
    assert cli.main(arguments) == EXIT_GATE_FAILED
    assert not from_json((out / "compot" / "report.json").read_text()).passed
    assert "FAILED" in (out / "README.md").read_text()
    assert cli.main(["check", str(out), "--reference", str(model)]) == EXIT_GATE_FAILED


def test_a_corrupted_byte_is_found(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    data = folder / "onnx" / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert cli.main(["check", str(folder)]) == EXIT_BAD_INPUT
    assert "model.onnx_data" in _complaint(capsys)


def test_an_existing_folder_is_not_overwritten(
    finished: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = verify(finished)
    assert cli.main([str(model), "--out", str(finished), *QUICK]) == EXIT_BAD_INPUT
    assert "--force" in _complaint(capsys)
    assert verify(finished) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert cli.main([str(model), "--out", str(tmp_path / "mine"), "--force", *QUICK]) == EXIT_BAD_INPUT
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--ratio", "0"], "--ratio 0"),
        (["--ratio", "1.5"], "--ratio 1.5"),
        (["--ratio", "much"], "--ratio"),
        (["--quant", "int5"], "int5"),
        (["--format", "floppy"], "--format floppy"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--dictionary-group", "64"], r"96 inputs do not split into groups of 64"),
        (["--code-group", "128"], "group"),
        (["--calibration", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--length", "100000", "--calibration", "TEXT"], "fewer than one window"),
        (["--device", "abacus"], "--device abacus"),
        # Groups finer than a format has are not tried: the message names the ratios that can be met.
        (
            ["--ratio", "0.7", "--format", "gguf", "--gguf-layout", "sparse", "--code-pattern", "2:4"],
            "of all together",
        ),
    ],
)
def test_bad_usage_is_one_sentence_and_leaves_nothing(
    arguments: list[str],
    named: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    arguments = [str(short) if argument == "TEXT" else argument for argument in arguments]
    assert cli.main([str(model), *QUICK, *arguments]) == EXIT_BAD_INPUT
    complaint = _complaint(capsys)
    assert named in complaint
    assert "Traceback" not in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_an_unsupported_model_has_its_own_code(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "no-such-type"}
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main([str(folder), *QUICK]) == EXIT_UNSUPPORTED_MODEL
    assert "'no-such-type'" in _complaint(capsys)


def test_a_folder_that_may_not_be_written_is_named(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    out = tmp_path / "file" / "out"
    assert cli.main([str(model), "--calibration", str(text), "--out", str(out), *QUICK]) == EXIT_BAD_INPUT
    assert "Traceback" not in _complaint(capsys)


@pytest.mark.nightly
def test_an_interrupted_run_resumes_to_the_same_bytes(
    model: Path, text: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "compot_deploy", str(model), "--calibration", str(text)]
    command += ["--out", str(out), *QUICK, *NO_LIMIT]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.work-*/planned-*.safetensors")):
        assert process.poll() is None, "finished before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    if process.returncode == EXIT_OK:
        pytest.skip("the run was faster than the signal")
    assert process.returncode == EXIT_INTERRUPTED, stderr.decode()
    assert not out.exists()
    kept = sorted(tmp_path.glob(".out.work-*/planned-*.safetensors"))
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert kept

    assert cli.main([*command[3:]]) == EXIT_OK
    assert not list(tmp_path.glob(".out.work-*"))
    assert times
    name = "onnx/model.onnx_data"
    assert (out / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize("command", [[], ["plan"]], ids=["deploy", "plan"])
def test_help_names_every_option_and_exit_code(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # a line that is not broken is a line that can be searched
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    missing = []
    for option in recipe_options():
        flag = "MODEL" if option.name == "model" else f"--{option.name.replace('_', '-')}"
        value = default_of(option)
        # The entry itself, not a mention in the usage or in the help of another: flag, values, then its sentence.
        entry = re.search(
            rf"(?<![\w-]){flag}( [A-Z]+| {{[^}}]*}})? {re.escape(' '.join(option.metadata['help'].split()))}(.*)",
            shown,
        )
        if entry is None or (value not in (None, False) and not entry[2].startswith(" (default: ")):
            missing.append(flag)
    assert missing == []
    for code in (0, 1, 2, 3, 4, 75):
        assert re.search(rf"exit codes:.*\b{code} \w", shown), code


def test_nothing_is_asked_of_the_network(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert cli.main(["no-such-organisation/no-such-model", *QUICK]) == EXIT_BAD_INPUT
    assert "neither a local folder nor a model that the hub answers for" in _complaint(capsys)


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no files for what is open")
def test_a_recipe_may_come_through_a_pipe_which_can_be_read_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file:
        file.write(f'model = "{tmp_path / "nowhere"}"')
    assert cli.main(["--recipe", f"/dev/fd/{reader}"]) == EXIT_BAD_INPUT
    os.close(reader)
    assert "nowhere does not exist" in _complaint(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--quant", "none", "--embeddings", "none"],
        ["--quant", "int8", "--quantizer", "rtn", "--allocation", "uniform", "--dtype", "bfloat16"],
        ["--quant", "int4", "--method", "svd-llm", "--code-bits", "8", "--dtype", "float16"],
        *nightly(
            ["--quant", "int4", "--onnx-ops", "qdq", "--dictionary-bits", "8", "--paper-exact"],
            ["--quant", "int4", "--calibration", "self", "--ratio", "0.35", "--code-group", "16"],
        ),
    ],
    ids=" ".join,
)
def test_every_way_exports_exactly_what_it_computed(
    arguments: list[str], model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [str(model), "--calibration", str(text), "--out", str(out), *QUICK, *NO_LIMIT, *arguments]
    assert cli.main(command) == EXIT_OK
    report = from_json((out / "compot" / "report.json").read_text())
    assert report.accuracy.export_reference.comparison.nmse < 1e-9
    assert any(record.kind == "factorized" for record in verify(out).matrices)


@pytest.mark.parametrize("kind", ["qwen3", *nightly("llama3", "mistral", "qwen2")])
def test_every_architecture_goes_all_the_way(kind: str, text: Path, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / kind, kind, hidden_size=96)
    command = [str(source), "--calibration", str(text), "--out", str(tmp_path / "out"), *QUICK, *NO_LIMIT]
    assert cli.main(command) == EXIT_OK
    report = from_json((tmp_path / "out" / "compot" / "report.json").read_text())
    assert report.accuracy.export_reference.comparison.nmse < 1e-9
