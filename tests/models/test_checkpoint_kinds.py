"""Checkpoints as people have them: read as transformers reads them, or refused from names, types and shapes alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import any_models
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from whole_models import loaded

from compot_deploy.errors import CompotDeployError, InputError, UnsupportedModelError
from compot_deploy.models.source import open_source

Tensors = dict[str, Tensor]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=1)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    made = tmp_path / "m"
    made.mkdir()
    for path in original.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    return made


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> Tensors:
    tensors = load_file(folder / SINGLE)
    tensors = change(tensors) or tensors
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / SINGLE, {"format": "pt"}
    )
    return tensors


def split(folder: Path) -> dict[str, str]:
    """The same tensors in two parts with an index; the map."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    half = len(names) // 2
    parts = {name: f"model-0000{1 + (n >= half)}-of-00002.safetensors" for n, name in enumerate(names)}
    for part in set(parts.values()):
        save_file({name: tensors[name] for name in names if parts[name] == part}, folder / part)
    write_index(folder, parts)
    return parts


def write_index(folder: Path, parts: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": parts}))


def same_as_transformers(folder: Path) -> None:
    source = open_source(folder)
    model = loaded(folder, source.task.auto_class)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in source.tensors:
            assert torch.equal(source.tensors[name], parameter), name
    assert source.tied is (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


# -- read as transformers reads them ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model-00003-of-00003.safetensors", "consolidated.safetensors"])
def test_what_lies_beside_the_parts_is_not_read(name: str, folder: Path) -> None:
    split(folder)
    stale = {"model.norm.weight": torch.full((64,), 7.0), "layers.0.attention.wq.weight": torch.zeros(2)}
    save_file(stale, folder / name)
    assert len(open_source(folder).files) == 2
    same_as_transformers(folder)


def test_what_lies_beside_the_one_file_is_not_read(folder: Path) -> None:
    save_file({"model.norm.weight": torch.full((64,), 7.0)}, folder / "consolidated.safetensors")
    write_index(folder, {"model.norm.weight": "consolidated.safetensors"})
    same_as_transformers(folder)


def test_a_checkpoint_saved_as_the_base_model_keeps_its_tied_head(tmp_path: Path) -> None:
    """The layout of Qwen3-Embedding: the class has a head, the names have no prefix."""
    folder = tiny.save(tmp_path / "m", "qwen3")
    rewrite(folder, lambda t: {k.removeprefix("model."): v for k, v in t.items() if k != "lm_head.weight"})
    same_as_transformers(folder)


def test_a_table_may_be_stored_under_the_heads_name(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m", "llama3")
    table = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    rewrite(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    source = open_source(folder)
    assert source.tied and torch.equal(source.tensors["model.embed_tokens.weight"], table)


def test_a_head_of_its_own_is_used_although_the_configuration_ties_it(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    source = open_source(folder)
    assert not source.tied and source.config["tie_word_embeddings"] is False
    stored = load_file(folder / SINGLE)
    assert torch.equal(source.tensors["lm_head.weight"], stored["lm_head.weight"])
    assert torch.equal(source.tensors["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert any("ties lm_head.weight" in note for note in source.notes)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert open_source(folder).tied and not open_source(folder).notes  # stored twice, and the same


def test_a_value_head_is_left_out_with_a_note(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"v_head.summary.weight": torch.randn(1, 64)}))
    (note,) = open_source(folder).notes
    assert "v_head.summary.weight" in note and "left out" in note


# -- refused, before a weight is read --------------------------------------------------------------------

LAYER = "model.layers.0.self_attn.q_proj"


def with_type(kind: torch.dtype) -> Callable[[Tensors], Any]:
    return lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].to(kind)})


def beside(*parts: str) -> Callable[[Tensors], Any]:
    return lambda t: t.update({f"{LAYER}.{part}": torch.ones(1) for part in parts})


def without_norm(tensors: Tensors) -> None:
    del tensors["model.norm.weight"]


REFUSED: dict[str, tuple[Callable[[Tensors], Any], type[CompotDeployError], str]] = {
    "float8": (with_type(torch.float8_e4m3fn), UnsupportedModelError, "F8_E4M3"),
    "integers": (with_type(torch.int8), UnsupportedModelError, "I8"),
    "complex numbers": (with_type(torch.complex64), UnsupportedModelError, "C64"),
    "FP8 of DeepSeek": (beside("weight_scale_inv"), UnsupportedModelError, "quantized already"),
    "compressed-tensors": (
        beside("weight_packed", "weight_shape"),
        UnsupportedModelError,
        "quantized already",
    ),
    "bitsandbytes int8": (beside("SCB"), UnsupportedModelError, "quantized already"),
    "bitsandbytes 4 bits": (
        beside("weight.absmax", "weight.quant_state.bitsandbytes__nf4"),
        UnsupportedModelError,
        "quantized already",
    ),
    "GPTQ and AWQ": (beside("qweight", "qzeros", "scales"), UnsupportedModelError, "quantized already"),
    "LoRA": (beside("lora_A.default.weight"), UnsupportedModelError, "adapter that is not merged"),
    "a block too many": (
        lambda t: t.update({k.replace("layers.0", "layers.1"): v.clone() for k, v in t.items()}),
        InputError,
        r"does not know: model\.layers\.1",
    ),
    "a norm that is missing": (without_norm, InputError, "is missing"),
    "a norm of another shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(64, 1)}),
        InputError,
        r"model\.norm\.weight is \(64, 1\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_of_another_kind_is_refused_from_names_types_and_shapes(case: str, folder: Path) -> None:
    change, kind, words = REFUSED[case]
    rewrite(folder, change)
    with pytest.raises(kind, match=words):
        open_source(folder)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (None, "has no weight_map"),
        ([], "has no weight_map"),
        ({"model.norm.weight": "../secret.safetensors"}, "not the plain name"),
        ({"model.norm.weight": "/etc/passwd"}, "not the plain name"),
        ({"model.norm.weight": 5}, "not the plain name"),
        ({"model.norm.weight": ".hidden"}, "not the plain name"),
        ({"model.norm.weight": "gone.safetensors"}, "promises model.norm.weight in gone.safetensors"),
        ({"nobody": "part.safetensors"}, "promises nobody in part.safetensors"),
    ],
    ids=str,
)
def test_an_index_that_lies_is_refused(parts: Any, words: str, folder: Path) -> None:
    (folder / SINGLE).rename(folder / "part.safetensors")
    write_index(folder, parts)
    with pytest.raises(InputError, match=words):
        open_source(folder)


def test_a_name_twice_is_refused(folder: Path) -> None:
    parts = split(folder)
    first, second = sorted(set(parts.values()))
    again = load_file(folder / second) | {"model.norm.weight": torch.zeros(64)}
    taken = next(name for name, part in parts.items() if part == first)
    save_file(again | {taken: torch.zeros(1)}, folder / second)
    with pytest.raises(InputError, match=rf"holds {taken} twice"):
        open_source(folder)


def test_only_files_that_transformers_does_not_read_are_named(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "consolidated.safetensors")
    with pytest.raises(InputError, match=r"holds no weights.*consolidated\.safetensors"):
        open_source(folder)


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="holds an adapter"):
        open_source(folder)


def test_more_blocks_than_tensors_are_refused_before_a_model_is_made(folder: Path) -> None:
    configure(folder, num_hidden_layers=9999)
    with pytest.raises(InputError, match="num_hidden_layers 9,999"):
        open_source(folder)


def test_a_sentence_encoder_with_a_layer_behind_its_pooling_is_refused(tmp_path: Path) -> None:
    folder = any_models.save(tmp_path / "m", "bert")
    layers = [
        {"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Dense")
    ]
    (folder / "modules.json").write_text(json.dumps(layers[:2]))
    assert open_source(folder).task.kind == "embedding"
    (folder / "modules.json").write_text(json.dumps(layers))
    with pytest.raises(UnsupportedModelError, match="a layer Dense behind the encoder"):
        open_source(folder)
    (folder / "modules.json").write_text("[5]")
    with pytest.raises(InputError, match=r"modules\.json cannot be read"):
        open_source(folder)


def test_a_model_that_names_no_class_is_not_taken_for_one_without_a_head(tmp_path: Path) -> None:
    for kind in ("gpt2", "bert classes"):
        folder = any_models.save(tmp_path / kind, kind)
        configure(folder, architectures=None)
        with pytest.raises(UnsupportedModelError, match="names no class under architectures"):
            open_source(folder)
