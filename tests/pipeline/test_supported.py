"""What a model can become is said from its configuration alone, by the code that would do it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import any_models
import gguf_models
import pytest
import tiny

from compot_deploy.cli import main
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.gguf.kinds import KINDS
from compot_deploy.models.source import open_source, promised_source
from compot_deploy.pipeline.supported import row_of, supported

DOCS = Path(__file__).parents[2] / "docs"


def config_alone(folder: Path) -> Path:
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    return folder


@pytest.mark.parametrize("kind", ["llama", "phi3", "bert classes"])
def test_the_answer_is_that_of_the_whole_folder(tmp_path: Path, kind: str) -> None:
    save = tiny.save if kind == "llama" else any_models.save
    folder = save(tmp_path / "m", kind)
    whole = row_of(open_source(folder), "m")
    assert whole.objection is None and {way.format for way in whole.ways} == set(EXPORTERS)
    assert row_of(promised_source(config_alone(folder)), "m") == whole
    for way in whole.ways:
        if way.objection is None:
            assert way.consumers
    encoder = kind.startswith("bert")
    assert all((way.objection is not None) is encoder for way in whole.ways if way.format == "gguf")


def test_a_feature_of_one_way_is_refused_there_alone(tmp_path: Path) -> None:
    folder = config_alone(gguf_models.save(tmp_path / "m", "stablelm"))
    ways = {(way.format, way.name): way.objection for way in supported(folder).ways}
    assert ways["gguf", "dense"] is None and ways["huggingface", "packed"] is None
    assert "dense" in str(ways["gguf", "sparse"])


def test_the_command_prints_a_row_and_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config_alone(tiny.save(tmp_path / "m", "qwen3"))
    assert main(["supports", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "native graph" in shown and "sparse" in shown
    assert main(["supports", str(folder), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["model_type"] == "qwen3" and data["task"] == "generation" and data["matrices"] == 14
    assert all(way["supported"] is (way["objection"] is None) for way in data["ways"])


def test_a_model_of_which_nothing_can_be_made_is_one_sentence_and_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "falcon", "architectures": ["FalconForCausalLM"]}))
    values = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert main(["supports", str(tmp_path), "--json"]) == 3
    data = json.loads(capsys.readouterr().out)
    assert "in a way of its own" in data["objection"] and data["ways"] == []


def test_the_documented_table_has_every_type_and_what_the_code_says_of_some() -> None:
    sys.path.insert(0, str(DOCS))
    try:
        import supported as script
    finally:
        sys.path.remove(str(DOCS))
    text = script.PAGE.read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == list(script.types()) and set(KINDS) <= set(rows)
    for line in script.table(("qwen3", "stablelm", "bert", "mixtral")).splitlines():
        assert line in text


@pytest.mark.slow
@pytest.mark.nightly
def test_the_documented_table_is_current() -> None:
    sys.path.insert(0, str(DOCS))
    try:
        import supported as script
    finally:
        sys.path.remove(str(DOCS))
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.page(text) == text
