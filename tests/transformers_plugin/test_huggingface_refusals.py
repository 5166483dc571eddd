"""A folder that does not fit is refused with one clear sentence, and never filled with random numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from compressed_folders import EXPORTER, load, other_code, written
from reference_onnx import (
    MODELS,
    torch_model,
)
from safetensors.torch import load_file, save_file

from compot_deploy.accuracy.runners import huggingface_runner
from compot_deploy.errors import ArtifactError, CompotDeployError, InputError
from compot_deploy.transformers_plugin.folder import CODE
from compot_deploy.transformers_plugin.weight_files import INDEX, WEIGHTS


def attention_entry(config: dict[str, Any]) -> dict[str, Any]:
    return next(e for e in config["compot"]["matrices"] if e["name"].endswith("0.self_attn.q_proj"))


def larger_k(config: dict[str, Any]) -> None:
    dictionary, codes = attention_entry(config)["leaves"][:2]
    dictionary["shape"][1] = codes["shape"][0] = 4096
    for entry in config["compot"]["matrices"]:
        if entry.get("owner", "").endswith("0.self_attn.q_proj"):
            entry["leaves"][0]["shape"][1] = entry["leaves"][1]["shape"][0] = 4096


def one_sided_k(config: dict[str, Any]) -> None:
    attention_entry(config)["leaves"][0]["shape"][1] = 4096


def negative(config: dict[str, Any]) -> None:
    attention_entry(config)["leaves"][0]["shape"][0] = -64


def no_auto_map(config: dict[str, Any]) -> None:
    del config["auto_map"]


def other_format(config: dict[str, Any]) -> None:
    config["compot"]["format"] = 99


def other_values(config: dict[str, Any]) -> None:
    attention_entry(config)["leaves"][0]["values"] = "int5/g32"


def other_pattern(config: dict[str, Any]) -> None:
    attention_entry(config)["leaves"][1]["pattern"] = "9:2"


def twice(config: dict[str, Any]) -> None:
    config["compot"]["matrices"].append(config["compot"]["matrices"][0])


def unknown_owner(config: dict[str, Any]) -> None:
    attention_entry(config)["owner"] = "model.layers.7.self_attn.q_proj"


def other_base(config: dict[str, Any]) -> None:
    config["base_config"]["auto_map"] = {"AutoConfig": "evil.Config"}


def no_layout(config: dict[str, Any]) -> None:
    del config["compot"]


TAMPERED: dict[Callable[[dict[str, Any]], None], str] = {
    larger_k: r"is U8 \[.*\] in the file, and .* says U8 .*4096",
    one_sided_k: "a dictionary of 4096 atoms and codes of",
    negative: "not two positive numbers",
    other_code: "auto_map points to 'someone/else--evil.Model'.* refused",
    other_format: "has the format 99, and this version",
    other_values: "stores values as 'int5/g32', which does not exist",
    other_pattern: "has the pattern '9:2', which does not exist",
    twice: "lists model.* twice",
    unknown_owner: "not listed before it as an owner",
    other_base: "base_config has 'auto_map'",
    no_layout: "has the format None",
}


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda tamper: tamper.__name__)
def test_a_tampered_configuration_is_one_clear_sentence(
    tamper: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    folder = written(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    tamper(config)
    (folder / "config.json").write_text(json.dumps(config))
    for attempt in (
        lambda: load(folder),
        lambda: load(folder, trust_remote_code=True),
        lambda: huggingface_runner(folder),
        lambda: EXPORTER.read_model(folder),
    ):
        with pytest.raises(CompotDeployError, match=TAMPERED[tamper]) as caught:
            attempt()
        assert caught.value.exit_code == 2
    assert [diagnostic.severity for diagnostic in EXPORTER.lint(folder)] == ["error"]


def test_a_missing_auto_map_is_refused_by_our_own_tools(tmp_path: Path) -> None:
    folder = written(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    no_auto_map(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="auto_map points to None"):
        huggingface_runner(folder)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", shard_bytes=20_000)
    index = json.loads((folder / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    for path in ("../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors"):
        index["weight_map"][first] = path
        (folder / INDEX).write_text(json.dumps(index))
        for attempt in (lambda: load(folder), lambda: EXPORTER.read(folder)):
            with pytest.raises(ArtifactError, match="not a plain file name inside the folder"):
                attempt()


def test_a_missing_tensor_is_refused_and_never_drawn_at_random(tmp_path: Path) -> None:
    folder = written(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.codes0.integers"):
        save_file(
            {key: value for key, value in tensors.items() if key != name},
            folder / WEIGHTS,
            metadata={"format": "pt"},
        )
        with pytest.raises(ArtifactError, match=name):
            load(folder)


def test_foreign_code_in_the_folder_is_found(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (folder / CODE).write_text("import os\n")
    (diagnostic,) = EXPORTER.lint(folder)
    assert diagnostic.severity == "error"
    assert "not the one that compot-deploy writes" in diagnostic.sentence
    load(folder)  # does not run it


def test_quantizing_what_is_quantized_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="quantized already"):
        load(folder, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))


def test_a_configuration_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    torch_model(MODELS["llama"]).config.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="is of the type 'llama', not 'compot'"):
        huggingface_runner(tmp_path)
