"""Laws of the command for models without a graph of ours: text in, a judged ONNX folder out."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from compot_deploy.accuracy.onnx_losses import run_folder
from compot_deploy.pipeline.traced import TEXTS, _texts, check_traced, is_traced
from consumer_environments import python_with
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from compot_deploy.cli.main import main
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Factorized, Quantized
from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.exporters.artifact import seal, unlisted_files, verify
from compot_deploy.exporters.manifest import MANIFEST, read_manifest
from compot_deploy.exporters.onnx.matrices import OnnxMatrices
from compot_deploy.exporters.onnx.session import open_session
from compot_deploy.exporters.onnx.tensors import DATA, GRAPH
from compot_deploy.pipeline.evaluation import REPORT
from compot_deploy.recipe import recipe_from_mapping


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small encoder and a text that it can read."""
    root = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model: Any = BertModel(config)
    # Columns of falling size, so that there is something to factorise.
    for name, parameter in model.named_parameters():
        if name.endswith("dense.weight"):
            parameter.data *= 0.9 ** torch.arange(parameter.shape[1])
    model.save_pretrained(root / "encoder")
    words = {"<pad>": 0, **{f"word{number}": number for number in range(1, 96)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="word1")
    fast.save_pretrained(root / "encoder")
    (root / "encoder" / "modules.json").write_text("[]")
    generator = torch.Generator().manual_seed(1)
    lines = [
        " ".join(f"word{int(word)}" for word in torch.randint(1, 96, (4 + row % 9,), generator=generator))
        for row in range(80)
    ]
    (root / "text.txt").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def exported(place: Path) -> tuple[Path, int]:
    """The folder that the command wrote, and its exit code."""
    out = place / "out"
    code = main([str(place / "encoder"), *knobs(place), "--out", str(out), "--min-cosine", "0.5"])
    return out, code


def knobs(place: Path) -> list[str]:
    return [
        "--calibration",
        str(place / "text.txt"),
        "--samples",
        "32",
        "--length",
        "16",
        "--rounds",
        "3",
        "--ratio",
        "0.05",
    ]


def test_the_command_picks_the_traced_path_and_passes(exported: tuple[Path, int]) -> None:
    folder, code = exported
    assert code == 0
    report = json.loads((folder / REPORT).read_text())
    assert report["passed"] is True
    assert report["losses"]["export_exact"]["nmse"] < 1e-10
    assert 0.5 < report["losses"]["total"]["cosine"] < 1
    assert report["sizes"]["artifact"] == sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).as_posix() not in (REPORT, MANIFEST)
    )
    for name in ("config.json", "tokenizer.json", "modules.json", "compot/recipe.toml", GRAPH):
        assert (folder / name).is_file(), name


def test_a_folder_is_checked_again_file_by_file_and_loss_by_loss(
    exported: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = exported
    assert unlisted_files(folder, verify(folder)) == ()
    before = json.loads((folder / REPORT).read_text())
    found = asdict(check_traced(folder).losses)
    assert found == before["losses"]
    assert main(["check", str(folder)]) == 0
    assert "PASSED" in capsys.readouterr().out
    assert main(["check", str(folder), "--min-cosine", "1"]) == 1
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "encoder.layer.0.attention.self.query" in shown and "onnx-traced" in shown


def test_a_damaged_file_is_named(place: Path, exported: tuple[Path, int], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported[0], folder)
    data = folder / DATA
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"onnx/model\.onnx_data is damaged"):
        check_traced(folder)
    with pytest.raises(ArtifactError, match="is not a list of texts"):
        (folder / TEXTS).write_text("[]")
        shutil.copy(exported[0] / DATA, data)
        seal(folder, [TEXTS])
        check_traced(folder)


def test_a_check_without_the_original_or_with_another_one_is_refused(
    place: Path, exported: tuple[Path, int], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"--reference: .*none.*\. Give its folder"):
        check_traced(exported[0], reference=str(tmp_path / "none"))
    other = tmp_path / "other"
    shutil.copytree(place / "encoder", other)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="its weights have another sha256"):
        check_traced(exported[0], reference=str(other))


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["check", "FOLDER", "--max-kl", "1"], "--max-kl does not apply"),
        (["check", "FOLDER", "--report-dir", "x"], "--report-dir does not apply"),
        (["run", "FOLDER", "-p", "word1"], "gives embeddings or scores and writes no text"),
        (["report", "FOLDER"], "'onnx-traced' wrote it, which has no report of this kind"),
    ],
)
def test_what_only_decoders_have_is_refused_in_one_sentence(
    exported: tuple[Path, int], command: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(exported[0]) if part == "FOLDER" else part for part in command]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_force_replaces_a_folder_of_ours(place: Path, exported: tuple[Path, int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported[0], out)
    (out / TEXTS).unlink()
    assert main([str(place / "encoder"), *knobs(place), "--out", str(out), "--min-cosine", "0.5"]) == 2
    force = ["--min-cosine", "0.5", "--force"]
    assert main([str(place / "encoder"), *knobs(place), "--out", str(out), *force]) == 0
    first, second = (read_manifest(folder) for folder in (exported[0], out))
    assert verify(out).matrices == first.matrices and second.facts == first.facts


def test_blocks_and_embedding_are_compressed_and_nothing_else(exported: tuple[Path, int]) -> None:
    matrices = OnnxMatrices(exported[0] / GRAPH)
    names = set(matrices)
    assert "pooler.dense" not in names and len(names) == 7
    table = matrices["embeddings.word_embeddings"]
    assert isinstance(table, Quantized) and table.grid == Grid(8, 32)
    assert any(isinstance(matrices[name], Factorized) for name in names)


def test_a_gate_that_does_not_hold_is_exit_code_1_and_the_folder_stays(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "strict"
    code = main([str(place / "encoder"), *knobs(place), "--out", str(out), "--min-cosine", "1"])
    assert code == 1 and (out / GRAPH).is_file()
    assert "has to be at least 1" in capsys.readouterr().out
    assert json.loads((out / REPORT).read_text())["passed"] is False
    # Nothing but the report's verdict may differ from the run that passed: two runs are bitwise equal.
    assert (out / GRAPH).read_bytes() == (place / "out" / GRAPH).read_bytes()
    data = "onnx/model.onnx_data"
    assert (out / data).read_bytes() == (place / "out" / data).read_bytes()


def test_texts_that_are_judged_on_are_not_calibrated_on(place: Path) -> None:
    recipe = recipe_from_mapping(
        {"calibration": str(place / "text.txt"), "samples": 1000, "length": 16}, origin="test"
    )
    texts = _texts(recipe)
    assert len(texts.calibration) == 72 and len(texts.evaluation) == 8
    assert not set(texts.calibration) & set(texts.evaluation)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--format", "gguf"], "makes ONNX only"),
        (["--bits", "3"], "give --ratio"),
        (["--calibration", "self"], "gets text from a file"),
        (["--archive"], "zip the folder"),
        (["--min-cosine", "2"], "between -1 and 1"),
    ],
)
def test_knobs_that_do_not_apply_are_refused_before_any_work(
    place: Path, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(place / "encoder"), "--out", str(place / "none"), *flags]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (place / "none").exists()


def test_text_that_is_too_short_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "short.txt").write_text("a\nb\n")
    assert (
        main(
            [str(place / "encoder"), "--calibration", str(place / "short.txt"), "--out", str(place / "none")]
        )
        == 2
    )
    assert "no line of at least 20 characters" in " ".join(capsys.readouterr().err.split())


def test_a_checkpoint_without_its_weights_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    folder = place / "damaged"
    folder.mkdir(exist_ok=True)
    for path in (place / "encoder").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert main([str(folder), *knobs(place), "--out", str(place / "none")]) == 2
    assert "lacks encoder.layer.0.output.dense.weight" in " ".join(capsys.readouterr().err.split())


def test_only_folders_of_other_kinds_are_traced(place: Path, tmp_path: Path) -> None:
    def traced(model: str) -> bool:
        return is_traced(recipe_from_mapping({"model": model}, origin="test"))

    assert traced(str(place / "encoder"))
    assert not traced("some/hub-id")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not traced(str(tmp_path))
    (tmp_path / "config.json").write_text("no json")
    assert not traced(str(tmp_path))


@pytest.mark.consumer
def test_optimum_gives_the_same_features_in_its_own_environment(
    place: Path, exported: tuple[Path, int], tmp_path: Path
) -> None:
    python = python_with("optimum-onnx")
    tokens = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
    mask = (tokens > 0).long()
    batch = {"input_ids": tokens, "attention_mask": mask}
    expected = run_folder(open_session(exported[0], threads=1), batch)
    (tmp_path / "tokens.json").write_text(json.dumps({name: value.tolist() for name, value in batch.items()}))
    (tmp_path / "expected.json").write_text(json.dumps(expected.tolist()))
    script = Path(__file__).parents[1] / "consumers" / "optimum_features.py"
    arguments = [tmp_path / "tokens.json", exported[0], tmp_path / "expected.json"]
    command = [python, str(script), *(str(argument) for argument in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
