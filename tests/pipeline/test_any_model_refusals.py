"""Laws of what is refused of models of any kind: before any work, in one sentence, with the exit code of its kind."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from places import SMALL, Exported, Place
from safetensors.torch import load_file, save_file

from compot_deploy import check
from compot_deploy.cli import main
from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.exporters.artifact import seal
from compot_deploy.models.streaming import BlockStream
from compot_deploy.pipeline import texts as pipeline_texts
from compot_deploy.pipeline.texts import EVALUATION

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few")]


# -- what is refused -------------------------------------------------------------------------------------


def test_a_damaged_file_is_named(exported: Exported, tmp_path: Path) -> None:
    for kind, form, name in (
        ("gpt2", "onnx", "onnx/model.onnx_data"),
        ("bert", "huggingface", "model.safetensors"),
    ):
        folder = tmp_path / kind
        shutil.copytree(exported.folder(kind, form), folder)
        content = bytearray((folder / name).read_bytes())
        content[-100] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=rf"{name.replace('.', '[.]')} is damaged"):
            check(folder)
        shutil.copy(exported.folder(kind, form) / name, folder / name)
        (folder / EVALUATION).write_text("[]")
        seal(folder, [EVALUATION])
        with pytest.raises(ArtifactError, match=r"evaluation\.json"):
            check(folder, export_only=True)


def test_a_check_with_another_original_is_refused_and_without_one_evaluates_the_file(
    place: Place, exported: Exported, tmp_path: Path
) -> None:
    folder = exported.folder("bert")
    with pytest.raises(InputError, match="none"):
        check(folder, reference=str(tmp_path / "none"))
    other = tmp_path / "other"
    shutil.copytree(place.model("bert"), other)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="this is not the model that"):
        check(folder, reference=str(other))
    home, moved = place.model("bert"), tmp_path / "moved"
    home.rename(moved)
    try:
        with pytest.raises(InputError, match=r"--reference MODEL.*--export-only"):
            check(folder)
        done = check(folder, export_only=True)
        assert done.report.accuracy.total is None and done.passed
        with pytest.raises(InputError, match="needs the original model"):
            check(folder, limits={"min_cosine": 0.5})
        assert check(folder, reference=str(moved)).report.accuracy.total is not None
    finally:
        moved.rename(home)


@pytest.mark.parametrize(
    ("kind", "flags", "named"),
    [
        ("gpt2", ["--min-cosine", "0.5"], "--min-cosine does not apply to a decoder"),
        ("bert", ["--max-kl", "1"], "--max-kl does not apply to a encoder"),
        ("bert", ["--min-top1", "0.5"], "--min-top1 does not apply to a encoder"),
        ("bert", ["--max-perplexity-ratio", "1.5"], "--max-perplexity-ratio does not apply to a encoder"),
        ("bert classes", ["--min-cosine", "0.5"], "--min-cosine does not apply to a classifier"),
        (
            "bert classes",
            ["--max-perplexity-ratio", "3"],
            "--max-perplexity-ratio does not apply to a classifier",
        ),
        ("bert masked", ["--max-perplexity-ratio", "3"], "does not apply to a masked language model"),
    ],
)
def test_a_limit_that_a_task_has_no_figure_for_is_refused_before_any_work(
    kind: str, flags: list[str], named: str, place: Place, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(BlockStream, "__init__", worked)
    monkeypatch.setattr(pipeline_texts, "load_tokenizer", worked)
    command = [str(place.model(kind)), "--calibration", str(place.text), *SMALL, *flags]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert named in " ".join(capsys.readouterr().err.split())
    assert not any(tmp_path.iterdir())


def test_limits_of_a_check_are_refused_alike(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, flag in (("bert", "--max-kl"), ("gpt2", "--min-cosine")):
        assert main(["check", str(exported.folder(kind)), flag, "0.5"]) == 2
        assert f"{flag} does not apply" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("kind", "flags", "code", "sentence"),
    [
        ("opt", ["--format", "gguf"], 3, "GGUF has no way for a opt"),
        ("bert", ["--format", "gguf"], 3, "Use --format onnx or huggingface"),
        ("bert", ["--calibration", "self"], 2, "an encoder writes no text|a encoder writes no text"),
        ("bert", ["--min-cosine", "2"], 2, "between -1 and 1"),
        ("bert", ["--size", "20KB"], 2, "alone need|cannot be met"),
        ("gpt2", ["--bits", "0.1"], 2, "smallest schemes of all of them need"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    kind: str, flags: list[str], code: int, sentence: str, place: Place, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main([*place.flags(kind, *flags), "--out", str(tmp_path / "none")]) == code
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(sentence, said) and "Traceback" not in said
    assert not (tmp_path / "none").exists()


def test_text_that_is_too_short_is_refused(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("a\nb\n")
    command = [str(place.model("bert")), "--calibration", str(tmp_path / "short.txt")]
    assert main([*command, "--out", str(tmp_path / "none")]) == 2
    assert "no line of at least 20 characters" in " ".join(capsys.readouterr().err.split())


def test_a_checkpoint_without_its_weights_is_refused(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(place.model("bert"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    command = [str(folder), *place.flags("bert")[1:], "--out", str(tmp_path / "none")]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "encoder.layer.0.output.dense.weight is missing" in said
