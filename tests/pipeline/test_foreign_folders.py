"""Laws of checking what somebody else wrote: whose limits count, what may lie there, how text is read, what is kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from damage import DAMAGES, Damage
from safetensors import safe_open
from safetensors.torch import save_file

from compot_deploy import check, deploy
from compot_deploy.accuracy.evaluate import Evaluation
from compot_deploy.accuracy.gate import Gate
from compot_deploy.accuracy.listening import Shortening, positions_of
from compot_deploy.errors import ArtifactError, InputError, RecipeError
from compot_deploy.exporters.artifact import verify
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.tasks import EMBEDDING, GENERATION, Task
from compot_deploy.models.tokens import make_windows
from compot_deploy.pipeline.evaluation import REFERENCE
from compot_deploy.pipeline.integrity import unlisted
from compot_deploy.pipeline.limits import (
    gate_of,
    least_positions,
    limits_of_check,
    positions_criterion,
)
from compot_deploy.pipeline.reading import ReadingCheck, reading_of
from compot_deploy.pipeline.reference import read_reference, reading_of_source, write_reference
from compot_deploy.recipe import Recipe

CLASSIFIER = Task("classification", "AutoModel", "classifier")

# --- whose limits


@pytest.mark.parametrize(
    ("task", "folder", "given", "expected", "whose"),
    [
        (GENERATION, {}, {}, {"max_perplexity_ratio": 2.0}, "the default"),
        (GENERATION, {"max_perplexity_ratio": 1e9}, {}, {"max_perplexity_ratio": 2.0}, "1e+09 is looser"),
        (GENERATION, {"max_perplexity_ratio": None}, {}, {"max_perplexity_ratio": 2.0}, "the default"),
        (GENERATION, {"max_perplexity_ratio": 1.1}, {}, {"max_perplexity_ratio": 1.1}, "the folder's own"),
        (GENERATION, {"max_kl": 0.1}, {}, {"max_perplexity_ratio": 2.0, "max_kl": 0.1}, "the folder's own"),
        (GENERATION, {}, {"max_perplexity_ratio": 50.0}, {"max_perplexity_ratio": 50.0}, "given"),
        (EMBEDDING, {"min_cosine": -1.0}, {}, {"min_cosine": 0.9}, "-1 is looser"),
        (EMBEDDING, {"min_cosine": 0.99}, {}, {"min_cosine": 0.99}, "the folder's own"),
        (EMBEDDING, {}, {"min_cosine": 0.5}, {"min_cosine": 0.5}, "given"),
        (CLASSIFIER, {"max_kl": 1e9}, {}, {"max_kl": 1e9, "min_top1": 0.5}, "the default"),
        (CLASSIFIER, {"min_top1": 0.0}, {}, {"min_top1": 0.5}, "0 is looser"),
    ],
)
def test_a_folder_may_be_stricter_with_itself_and_never_looser(
    task: Task, folder: dict[str, Any], given: dict[str, Any], expected: dict[str, float], whose: str
) -> None:
    recipe, said = limits_of_check(Recipe(**{**folder, **given}), given, task)
    assert gate_of(recipe, task) == Gate(**expected)
    assert whose in said
    # What the file itself adds is limited alike.
    recipe, _ = limits_of_check(Recipe(max_export_nmse=1.0), {}, GENERATION)
    assert recipe.max_export_nmse == Recipe().max_export_nmse


def text(*lengths: int) -> Evaluation:
    windows = make_windows([[1] * length for length in lengths], "a text", 10)
    return Evaluation(windows, (), decode=lambda ids: "")


def test_little_text_fails() -> None:
    assert not positions_criterion(text(2), GENERATION, 256).passed
    assert not positions_criterion(text(*[51] * 5), GENERATION, 256).passed
    assert positions_criterion(text(*[64] * 4), GENERATION, 256).passed
    assert not positions_criterion(text(*[64] * 15), EMBEDDING, 256).passed
    assert positions_criterion(text(*[4] * 16), EMBEDDING, 256).passed
    # Whoever asks for few tokens at export gets few, unless --min-positions says otherwise.
    assert least_positions(Recipe(), 256) == least_positions(Recipe(), 100) == 256
    assert least_positions(Recipe(evaluation_tokens=100), 32) == 96
    assert least_positions(Recipe(evaluation_tokens=100, min_positions=1000), 32) == 1000
    with pytest.raises(RecipeError, match="--min-positions 0"):
        check("anywhere", min_positions=0)


# --- how text is read


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tiny.tokenizer_files(folder)
    return folder


def swapped(values: dict[str, Any]) -> None:
    words = values["model"]["vocab"]
    words["e"], words["t"] = words["t"], words["e"]


def without_start(values: dict[str, Any]) -> None:
    values["post_processor"] = None


def decoded_otherwise(values: dict[str, Any]) -> None:
    values["decoder"] = None


def other_template(values: dict[str, Any]) -> None:
    values["chat_template"] = "{{ messages }}"


@pytest.mark.parametrize(
    ("file", "change", "failing"),
    [
        ("tokenizer.json", lambda values: None, []),
        ("tokenizer.json", swapped, ["tokenizer"]),
        ("tokenizer.json", without_start, ["tokenizer"]),
        ("tokenizer.json", decoded_otherwise, ["tokenizer"]),
        ("tokenizer_config.json", other_template, ["text_settings"]),
        ("config.json", lambda values: values.update(eos_token_id=[2, 3]), ["text_settings"]),
    ],
)
def test_text_must_be_read_as_the_original_reads_it(
    tokenizer: Path, tmp_path: Path, file: str, change: Callable[[dict[str, Any]], None], failing: list[str]
) -> None:
    config = {"eos_token_id": 2}
    wanted = reading_of(tokenizer, config, [[1, 40, 41, 42]])
    folder = tmp_path / "folder"
    shutil.copytree(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(config))
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))
    found = list(ReadingCheck(wanted, folder, "onnx").criteria())
    assert [one.name for one in found if not one.passed] == failing


def test_a_runtime_that_reads_text_itself_is_asked(tokenizer: Path) -> None:
    wanted = reading_of(tokenizer, {})

    class Llama:
        name = "llama.cpp"

        def tokenize(self, text: str) -> list[int]:
            return [*wanted.ids[text], 7]

    reading = ReadingCheck(wanted, tokenizer, "gguf")
    assert all(one.passed for one in reading.criteria())
    reading.visit(["exported"], Llama())
    (said,) = [one.sentence for one in reading.criteria() if not one.passed]
    assert "llama.cpp reads" in said


# --- a folder, and the file that stands for its original


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    out = tmp_path_factory.mktemp("exported") / "out"
    options: dict[str, Any] = {"samples": 2, "length": 32, "evaluation_tokens": 256}
    (made,) = deploy(str(model), method="plain", quant="int8", out=str(out), **options)
    assert made.passed
    return out


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_a_reference_file_stands_for_the_original(exported: Path, model: Path, tmp_path: Path) -> None:
    kept = Path(shutil.copy(exported / REFERENCE, tmp_path / "kept.safetensors"))
    assert REFERENCE in {record.path for record in verify(exported).files}, "its hash is in the manifest"
    with_file, with_model = (check(exported, reference=str(one)) for one in (kept, model))
    assert with_file.passed and with_model.passed
    one, other = with_file.report.accuracy, with_model.report.accuracy
    assert one.total is not None and other.total is not None and one.method is None
    found, truth = one.total.comparison, other.total.comparison
    assert found.perplexity_ratio is not None and truth.perplexity_ratio is not None
    assert found.perplexity_ratio.value == pytest.approx(truth.perplexity_ratio.value, rel=1e-6)
    assert found.top1_agreement == truth.top1_agreement
    assert found.divergence is not None and truth.divergence is not None
    assert found.divergence.mean.value == pytest.approx(truth.divergence.mean.value, rel=0.1)
    assert {c.name for c in one.gate.criteria} == {c.name for c in other.gate.criteria}
    assert any("reference file" in note for note in with_file.report.notes)
    # Its limits are held, as those of the original are.
    assert not check(exported, reference=str(kept), limits={"max_kl": 1e-9}).passed


def test_a_text_of_ones_own_takes_the_place_of_the_folders(
    exported: Path, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(tiny.WORDS * 400)
    found = check(exported, reference=str(model), text=path)
    assert found.report.accuracy.evaluation.source == "mine.txt"
    with pytest.raises(InputError, match="--reference MODEL"):
        check(exported, reference=str(exported / REFERENCE), text=path)


def test_a_damaged_matrix_is_named_though_every_hash_of_a_file_is_right(folder: Path, model: Path) -> None:
    manifest = json.loads((folder / "compot" / "manifest.json").read_text())
    manifest["matrices"][2]["digest"] = "0" * 64
    (folder / "compot" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ArtifactError, match=rf"the numbers of {manifest['matrices'][2]['name']} are not those"
    ):
        check(folder, reference=str(model))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "onnx/other", "tokenizer.model", "vocab.txt", "a/b.gguf"]
)
def test_nothing_that_a_runtime_reads_may_lie_there_unlisted(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(ArtifactError, match="does not list and a runtime would read"):
        unlisted(folder, verify(folder))


def test_whatever_else_lies_there_is_named_and_fails_where_one_is_strict(folder: Path) -> None:
    manifest = verify(folder)
    assert unlisted(folder, manifest, strict=True) == ()
    (folder / "notes.md").write_text("x")
    (folder / "weights.pt").write_bytes(b"\x80")
    (folder / "run.py").write_text("")
    (folder / "away").symlink_to(folder.parent)
    (folder / "nowhere").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe")
    found = unlisted(folder, manifest)
    assert [one.where for one in found] == ["away", "notes.md", "nowhere", "pipe", "run.py", "weights.pt"]
    assert {one.severity for one in found} == {"warning"}
    said = {one.where: one.sentence for one in found}
    assert "leads out" in said["away"] and "pickle" in said["weights.pt"] and "program" in said["run.py"]
    assert {one.severity for one in unlisted(folder, manifest, strict=True)} == {"error"}


@pytest.mark.parametrize("damage", ["cut off", "emptied", "zeros", "first bit flipped", "another file"])
def test_a_damaged_reference_file_is_one_sentence(exported: Path, tmp_path: Path, damage: str) -> None:
    path = Path(shutil.copy(exported / REFERENCE, tmp_path / "kept.safetensors"))
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    DAMAGES[damage](Damage(path))
    with pytest.raises(InputError, match=r"no reference file, or damaged|is no reference file"):
        read_reference(path, GENERATION)


def test_a_reference_file_of_another_kind_or_model_is_refused(
    exported: Path, model: Path, tmp_path: Path
) -> None:
    path = exported / REFERENCE
    with pytest.raises(InputError, match="a model for generation, and the folder's is one for embedding"):
        read_reference(path, EMBEDDING)
    with safe_open(path, framework="pt") as reader:
        said = json.loads(reader.metadata()["reference"])
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    said["fingerprint"] = "0" * 64
    save_file(tensors, tmp_path / "kept.safetensors", {"reference": json.dumps(said)})
    with pytest.raises(InputError, match="this is not the model"):
        check(exported, reference=str(tmp_path / "kept.safetensors"))


def test_what_is_written_is_read(model: Path, tmp_path: Path) -> None:
    source: ModelSource = open_source(model)
    windows = make_windows([[1, 5, 9, 7], [1, 8]], "a text", source.vocabulary, ["a note"])
    evaluation = Evaluation(windows, ((1, 5),), decode=lambda ids: "")
    heard = Shortening(source.task, positions_of(source.task, windows.windows))
    logits = torch.randn(4, source.vocabulary)
    heard.hear(3, logits[3:], torch.tensor([8]))
    heard.hear(0, logits[:3], torch.tensor([5, 9, 7]))
    path = tmp_path / "kept.safetensors"
    write_reference(path, "tiny", source, evaluation, heard)
    first = path.read_bytes()
    write_reference(path, "tiny", source, evaluation, heard)
    assert path.read_bytes() == first
    found = read_reference(path, source.task)
    assert (found.model, found.fingerprint, found.vocabulary) == (
        "tiny",
        source.fingerprint,
        source.vocabulary,
    )
    assert found.text.digest == windows.digest and found.text.notes == ("a note",)
    assert found.prompts == ((1, 5),) and found.reading == reading_of_source(source, windows)
    assert found.answers.choice.tolist() == logits.argmax(-1).tolist()  # type: ignore[union-attr]
