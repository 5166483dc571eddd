"""GGUF through the command line: the same law as for ONNX, the file adds rounding and nothing more."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny

from compot_deploy import cli
from compot_deploy.errors import EXIT_BAD_INPUT, EXIT_OK
from compot_deploy.exporters.artifact import verify
from compot_deploy.report import Report, from_json

pytest.importorskip("xllamacpp", reason="llama.cpp's library is the extra llama")

QUICK = ["--samples", "4", "--length", "32", "--evaluation-tokens", "128", "--rounds", "3"]
NO_LIMIT = ["--max-perplexity-ratio", "1e9"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("source") / "tiny-llama", "llama", hidden_size=128)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"{tiny.WORDS}{number} " for number in range(60)))
    return path


def _report(folder: Path) -> Report:
    return from_json((folder / "compot" / "report.json").read_text())


@pytest.mark.consumer
@pytest.mark.parametrize("layout", ["dense", "factorized"])
def test_a_model_becomes_a_gguf_folder(
    layout: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(model), "--format", "gguf", "--gguf-layout", layout, "--calibration", str(text)]
    assert cli.main([*command, "--out", str(out), *QUICK, *NO_LIMIT, "--max-export-nmse", "1e-3"]) == EXIT_OK
    report = _report(out)
    if layout == "factorized":
        assert report.accuracy.export_exact.comparison.nmse < 1e-9
        assert any(record.kind == "factorized" for record in verify(out).matrices)
    assert cli.main(["check", str(out)]) == EXIT_OK
    capsys.readouterr()
    assert cli.main(["run", str(out), "-p", "the quick", "-n", "4"]) == EXIT_OK
    assert capsys.readouterr().out.startswith("the quick")


def test_two_formats_share_one_compression(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [str(model), "--format", "onnx", "--format", "gguf", "--gguf-layout", "factorized"]
    assert cli.main([*command, "--calibration", str(text), "--out", str(out), *QUICK, *NO_LIMIT]) == EXIT_OK
    onnx, gguf = (
        {record.name: record.digest for record in verify(out / kind).matrices} for kind in ("onnx", "gguf")
    )
    assert onnx == gguf


def test_a_truncated_file_is_one_sentence(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(model), "--format", "gguf", "--gguf-layout", "factorized", "--calibration", str(text)]
    assert cli.main([*command, "--out", str(out), *QUICK, *NO_LIMIT]) == EXIT_OK
    short = tmp_path / "short.gguf"
    shutil.copyfile(out / "model.gguf", short)
    with short.open("r+b") as file:
        file.truncate(short.stat().st_size // 2)
    capsys.readouterr()
    assert cli.main(["run", str(short), "-p", "the"]) == EXIT_BAD_INPUT
    assert "Traceback" not in capsys.readouterr().err


def test_a_prompt_longer_than_the_context_is_refused(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main([str(model), "--calibration", str(text), "--out", str(out), *QUICK, *NO_LIMIT]) == EXIT_OK
    capsys.readouterr()
    assert cli.main(["run", str(out), "-p", "the quick", "-n", "1000"]) == EXIT_BAD_INPUT
    assert "context of 256" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["run", str(out), "-p", "the quick", "-n", "4"]) == EXIT_OK
    assert cli.main(["run", str(tmp_path), "-p", "the"]) == EXIT_BAD_INPUT
