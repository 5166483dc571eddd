"""Laws of reading a model: lazily, by name, and damage is found and named where it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import any_models
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from whole_models import loaded

from compot_deploy.errors import InputError, UnsupportedModelError
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.whole import whole_model


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))


def _edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _rename(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {change(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _same(source: ModelSource, model: Any) -> None:
    """Every parameter that transformers loads is read, and equal."""
    for name, parameter in model.named_parameters():
        if ".pooler." not in f".{name}":
            assert torch.equal(source.tensors[name], parameter), name


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


@pytest.mark.parametrize("model_type", ["nobody_knows", None])
def test_an_unknown_model_type_is_named_with_those_that_have_a_graph(
    model_type: str | None, tmp_path: Path
) -> None:
    folder = tiny.save(tmp_path / "m")
    _edit_config(folder, model_type=model_type)
    with pytest.raises(UnsupportedModelError, match=rf"{model_type!r}.*llama, mistral, qwen2, qwen3"):
        open_source(folder)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    _edit_config(
        folder, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    )
    with pytest.raises(UnsupportedModelError, match="needs code of its own, which is never run"):
        open_source(folder)
    assert not (tmp_path / "ran").exists()


HEADS = (
    "BertForQuestionAnswering",
    "BertForPreTraining",
    "BertForNextSentencePrediction",
    "BertForMultipleChoice",
    "GPT2DoubleHeadsModel",
    "T5ForQuestionAnswering",
    "ViTForImageClassification",
)


@pytest.mark.parametrize("name", HEADS)
def test_a_class_whose_head_would_be_lost_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": [name]}))
    with pytest.raises(UnsupportedModelError, match=rf"a {name} is not supported: its head would be lost"):
        open_source(tmp_path)


def test_a_model_with_encoder_and_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=320, d_model=64, num_layers=1, architectures=["T5Model"])
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="a t5 has an encoder and a decoder"):
        open_source(tmp_path)


def test_a_decoder_that_names_no_class_keeps_its_head(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    _edit_config(folder, architectures=None)
    source = open_source(folder)
    assert source.task.generates
    assert source.layout.head == "lm_head"


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged"):
        open_source(folder)


@pytest.mark.parametrize(
    ("kind", "linear"),
    [("llama", "model.layers.0.mlp.up_proj"), ("gpt_neox", "gpt_neox.layers.0.mlp.dense_h_to_4h")],
    ids=["read lazily", "converted as a whole"],
)
def test_nan_is_found_and_counted(kind: str, linear: str, tmp_path: Path) -> None:
    folder = (tiny.save if kind in tiny.KINDS else any_models.save)(tmp_path / "m", kind)

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{linear}.weight"][3, 5] = torch.nan

    _edit_tensors(folder, damage)
    checkpoint = open_source(folder)
    with pytest.raises(InputError, match=rf"{linear}\.weight has 1 values that are NaN"):
        checkpoint.weight(linear)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.1.self_attn.o_proj.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.bias"),
        ("bert", "encoder.layer.0.output.dense.weight"),
        ("gpt_neox", "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"),
    ],
)
def test_a_missing_tensor_is_named(kind: str, name: str, tmp_path: Path) -> None:
    folder = (tiny.save if kind in tiny.KINDS else any_models.save)(tmp_path / "m", kind)
    _edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match=rf"the tensor {name} is missing; config\.json promises it"):
        open_source(folder)


def test_a_missing_head_is_told_from_a_tied_one(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    _edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"lm_head\.weight is missing.*does not tie it to the embedding"):
        open_source(folder)
    _edit_config(folder, tie_word_embeddings=True)
    assert open_source(folder).tied


@pytest.mark.parametrize(
    ("kind", "changes", "complaint"),
    [
        (
            "llama",
            {"intermediate_size": 128},
            r"gate_proj\.weight is \(160, 64\), but config\.json says \(128, 64\)",
        ),
        (
            "llama",
            {"vocab_size": 300},
            r"embed_tokens\.weight is \(320, 64\), but config\.json says \(300, 64\)",
        ),
        ("gpt2", {"n_inner": 128}, r"c_fc\.weight is \(64, 160\), but config\.json says \(64, 128\)"),
        (
            "bert",
            {"intermediate_size": 128},
            r"intermediate\.dense\.weight is \(160, 64\), but .* \(128, 64\)",
        ),
        ("llama", {"num_hidden_layers": 3}, r"layers\.2\..* is missing; config\.json promises it"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(
    kind: str, changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    folder = (tiny.save if kind in tiny.KINDS else any_models.save)(tmp_path / "m", kind)
    _edit_config(folder, **changes)
    with pytest.raises(InputError, match=complaint):
        open_source(folder)


@pytest.mark.parametrize("value", [0, -1, None, "many"])
def test_sizes_of_a_known_decoder_are_positive_numbers(value: Any, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    _edit_config(folder, intermediate_size=value)
    with pytest.raises(InputError, match=r"intermediate_size|is not understood"):
        open_source(folder)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.bias"),
        ("llama", "extra.bias"),
        ("gpt2", "h.1.mlp.c_fc.extra"),
        ("bert", "encoder.layer.0.output.extra.weight"),
        ("bert masked", "encoder.layer.0.output.extra.weight"),
    ],
)
def test_a_weight_that_the_model_would_compute_without_is_refused(
    kind: str, name: str, tmp_path: Path
) -> None:
    folder = (tiny.save if kind in tiny.KINDS else any_models.save)(tmp_path / "m", kind)
    _edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(64)}))
    with pytest.raises(InputError, match=rf"promises does not know: {name}\."):
        open_source(folder)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "h.1.attn.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("bert", "embeddings.position_ids"),
        ("bert", "cls.predictions.bias"),
        ("bert", "cls.seq_relationship.weight"),
    ],
)
def test_what_is_computed_and_heads_of_other_tasks_may_be_in_a_file(
    kind: str, name: str, tmp_path: Path
) -> None:
    folder = (tiny.save if kind in tiny.KINDS else any_models.save)(tmp_path / "m", kind)
    model = loaded(folder, open_source(folder).task.auto_class)
    _edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(64)}))
    _same(open_source(folder), model)


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


# -- names in files and names in the model ---------------------------------------------------------------


@pytest.mark.parametrize("kind", (*tiny.KINDS, *any_models.KINDS))
def test_every_weight_is_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    folder = (tiny.save if kind in tiny.KINDS else any_models.save)(tmp_path / "m", kind)
    source = open_source(folder)
    _same(source, loaded(folder, source.task.auto_class))
    assert source.fingerprint == open_source(folder).fingerprint


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("gpt2", "transformer."), ("opt", "model."), ("bert masked", "bert."), ("llama", "model.")],
)
def test_a_model_saved_without_its_head_s_prefix_is_found(kind: str, prefix: str, tmp_path: Path) -> None:
    folder = (tiny.save if kind in tiny.KINDS else any_models.save)(tmp_path / "m", kind)
    model = loaded(folder, open_source(folder).task.auto_class)
    _rename(folder, lambda name: name.removeprefix(prefix))
    assert not any(name.startswith(prefix) for name in load_file(folder / "model.safetensors"))
    _same(open_source(folder), model)


def test_a_bare_encoder_is_found_in_a_file_with_a_prefix(tmp_path: Path) -> None:
    folder = any_models.save(tmp_path / "m", "bert")
    model = loaded(folder, "AutoModel")
    _rename(folder, lambda name: f"bert.{name}")
    _same(open_source(folder), model)


def test_names_of_old_layer_norms_are_understood(tmp_path: Path) -> None:
    folder = any_models.save(tmp_path / "m", "bert")
    model = loaded(folder, "AutoModel")

    def old(name: str) -> str:
        for new, before in ((".weight", ".gamma"), (".bias", ".beta")):
            name = name.replace(f".LayerNorm{new}", f".LayerNorm{before}")
        return name

    _rename(folder, old)
    assert "embeddings.LayerNorm.gamma" in load_file(folder / "model.safetensors")
    _same(open_source(folder), model)


def test_an_older_checkpoint_is_converted_as_transformers_does(tmp_path: Path) -> None:
    folder = any_models.save(tmp_path / "m", "gpt_neox")
    stored = load_file(folder / "model.safetensors")
    assert "embed_out.weight" in stored and "lm_head.weight" not in stored
    source = open_source(folder)
    head = source.layout.head  # embed_out before transformers 5, lm_head since
    assert head is not None
    assert torch.equal(source.weight(head), stored["embed_out.weight"].T)
    # What one reader does to a tensor, no other sees.
    source.weight(head).zero_()
    assert torch.equal(source.weight(head), stored["embed_out.weight"].T)


@pytest.mark.parametrize("kind", ["llama3", "gpt2", "bert masked"])
def test_a_tied_head_is_the_embedding_whichever_of_them_is_stored(kind: str, tmp_path: Path) -> None:
    folder = (tiny.save if kind in tiny.KINDS else any_models.save)(tmp_path / "m", kind)
    source = open_source(folder)
    embedding, head = source.layout.embedding, source.layout.head
    assert source.tied and embedding and head
    model = loaded(folder, source.task.auto_class)
    table = source.weight(embedding)
    _rename(folder, lambda name: f"{head}.weight" if name == f"{embedding}.weight" else name)
    again = open_source(folder)
    assert again.tied
    assert torch.equal(again.weight(embedding), table)
    _same(again, model)
    _edit_tensors(folder, lambda tensors: tensors.update({f"{embedding}.weight": table.T.contiguous()}))
    both = open_source(folder)
    _same(both, model)
    whole = whole_model(both)
    assert whole.get_output_embeddings().weight is whole.get_input_embeddings().weight


def test_an_encoder_may_come_without_a_pooler(tmp_path: Path) -> None:
    folder = any_models.save(tmp_path / "m", "bert")
    model = loaded(folder, "AutoModel")
    for part in ("weight", "bias"):
        _edit_tensors(folder, lambda tensors, part=part: tensors.pop(f"pooler.dense.{part}"))  # type: ignore[misc]
    source = open_source(folder)
    _same(source, model)
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        found, expected = whole_model(source)(input_ids=tokens), model(input_ids=tokens)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
