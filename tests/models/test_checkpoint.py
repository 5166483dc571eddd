"""Laws of reading a model: lazily, by name, and damage is found and named where it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from compot_deploy.errors import InputError, UnsupportedModelError
from compot_deploy.models.source import open_source


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))


def test_weights_come_as_in_by_out(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    checkpoint = open_source(folder)
    stored = load_file(folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(checkpoint.weight("model.layers.1.mlp.down_proj"), stored.T)
    assert checkpoint.layers == 2
    assert not checkpoint.tied


def test_shards_are_one_model(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    whole = load_file(folder / "model.safetensors")
    tiny.model("llama").save_pretrained(tmp_path / "s", max_shard_size="100KB")
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 1
    checkpoint = open_source(tmp_path / "s")
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in whole.items())


def test_the_fingerprint_changes_with_one_weight(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    before = open_source(folder).fingerprint
    assert open_source(folder).fingerprint == before
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_source(folder).fingerprint != before


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a transformers model folder"):
        open_source(tmp_path)


def test_an_unsupported_architecture_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    _edit_config(folder, model_type="gpt_neox")
    with pytest.raises(UnsupportedModelError, match=r"'gpt_neox'.*llama, mistral, qwen2, qwen3"):
        open_source(folder)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged"):
        open_source(folder)


def test_nan_is_found_and_counted(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_source(folder)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight has 1 values that are NaN"):
        checkpoint.weight("model.layers.0.mlp.up_proj")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.o_proj\.weight is missing"):
        open_source(folder)


def test_a_config_that_contradicts_the_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    _edit_config(folder, intermediate_size=128)
    with pytest.raises(
        InputError, match=r"gate_proj\.weight is \(160, 64\), but config\.json says \(128, 64\)"
    ):
        open_source(folder)


def test_a_promised_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "s", max_shard_size="100KB")
    gone = sorted((tmp_path / "s").glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(InputError, match=gone.name):
        open_source(tmp_path / "s")


def test_pickles_are_read_only_when_asked_for(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="--allow-pickle"):
        open_source(folder)
    checkpoint = open_source(folder, allow_pickle=True)
    assert torch.equal(checkpoint.tensors["model.norm.weight"], tensors["model.norm.weight"])


class _Bomb:
    """Runs code when unpickled, as a hostile checkpoint would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read as plain weights"):
        open_source(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()
