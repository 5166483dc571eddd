"""One source of settings: the object that transformers builds of config.json, and nothing that only stands there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers

from compot_deploy.errors import CompotDeployError, InputError, UnsupportedModelError
from compot_deploy.exporters.gguf.kinds import KINDS
from compot_deploy.exporters.gguf.metadata import describe
from compot_deploy.exporters.onnx.config import config_json
from compot_deploy.models.configuration import config_of, read_config, read_settings, settings_of
from compot_deploy.models.decoder_shape import decoder_shape
from compot_deploy.models.generation import end_tokens, read_generation
from compot_deploy.models.hints import ARCHITECTURES
from compot_deploy.models.rotary import portable_config


def save_config(folder: Path, kind: str = "llama", without: tuple[str, ...] = (), **changes: Any) -> Path:
    """config.json of a tiny model, some keys changed or left out by hand."""
    folder.mkdir(exist_ok=True)
    tiny.config(kind).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if key not in without}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


HEADS = {"num_attention_heads": 16, "head_dim": 8}
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "no key-value heads": ("mistral", ("num_key_value_heads",), HEADS),
    "no context": ("llama", ("max_position_embeddings",), {}),
    "no head size": ("qwen3", ("head_dim",), {}),
    "no epsilon": ("qwen2", ("rms_norm_eps",), {}),
    "a window that the class ignores": ("llama", (), {"sliding_window": 64}),
    "a scaling beside the parameters": (
        "llama",
        (),
        {
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_exporter_takes_what_transformers_understands(case: str, tmp_path: Path) -> None:
    kind, without, changes = CASES[case]
    folder = save_config(tmp_path / "m", kind, without, **changes)
    theirs = transformers.AutoConfig.from_pretrained(folder)
    architecture, config = ARCHITECTURES[kind], config_of(read_settings(folder))
    shape, keys = decoder_shape(architecture, config), describe(config).keys
    prefix = KINDS[kind].ggml
    for found, key, wanted in (
        (shape.heads, "attention.head_count", theirs.num_attention_heads),
        (shape.key_value_heads, "attention.head_count_kv", theirs.num_key_value_heads),
        (shape.context, "context_length", theirs.max_position_embeddings),
        (shape.norm_epsilon, "attention.layer_norm_rms_epsilon", theirs.rms_norm_eps),
        (
            shape.head_size,
            "attention.key_length",
            getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        ),
    ):
        assert found == keys[f"{prefix}.{key}"] == wanted, key
    assert shape.windows == (None, None)
    theirs_rope = portable_config(theirs.to_dict())["rope_parameters"]
    rope = portable_config(config)["rope_parameters"]
    assert rope["rope_type"] == theirs_rope["rope_type"] and rope.get("factor") == theirs_rope.get("factor")
    assert keys[f"{prefix}.rope.freq_base"] == rope["rope_theta"] == theirs_rope["rope_theta"]
    assert keys.get(f"{prefix}.rope.scaling.factor") == theirs_rope.get("factor")
    written = config_json(architecture, config, tied=False)
    (folder / "config.json").write_text(json.dumps(written))
    assert decoder_shape(architecture, read_config(folder)) == shape


def test_what_is_written_is_json_in_the_strict_sense(tmp_path: Path) -> None:
    folder = save_config(tmp_path / "m", final_loss=float("nan"), best=[float("inf"), 1])
    config = config_of(read_settings(folder))
    assert config["final_loss"] is None and config["best"] == [None, 1]
    json.dumps(config, allow_nan=False)


def test_every_setting_stands_in_what_is_written(tmp_path: Path) -> None:
    """A reader with other defaults reads the same model."""
    config = config_of(
        read_settings(save_config(tmp_path / "m", "mistral", ("num_key_value_heads",), **HEADS))
    )
    assert config["num_key_value_heads"] == 8 and config["tie_word_embeddings"] is False
    for kind in tiny.KINDS:
        theirs = tiny.config(kind)
        again = settings_of(config_of(theirs), "config.json")
        ours, wanted = again.to_dict(), theirs.to_dict()
        assert {k: v for k, v in ours.items() if k in wanted} == wanted | {
            k: ours[k] for k in ("dtype", "_name_or_path") if k in ours
        }


HOSTILE: dict[str, tuple[dict[str, Any], type[CompotDeployError], str]] = {
    "head_dim": ({"head_dim": 0}, InputError, "head_dim"),
    "rope as a text": ({"rope_parameters": "fast", "rope_scaling": "fast"}, InputError, "rope|rotary"),
    "no positions": ({"max_position_embeddings": 0}, InputError, "max_position_embeddings is 0"),
    "positions below zero": ({"max_position_embeddings": -1}, InputError, "max_position_embeddings is -1"),
    "many positions": ({"max_position_embeddings": 10**15}, InputError, "max_position_embeddings is 10000"),
    "a fraction": ({"max_position_embeddings": 1.5}, InputError, "max_position_embeddings"),
    "a billion blocks": ({"num_hidden_layers": 10**9}, InputError, "num_hidden_layers is 1000000000"),
    "a huge vocabulary": ({"vocab_size": 10**30}, InputError, "vocab_size"),
    "a text for a number": ({"hidden_size": "64"}, InputError, "hidden_size"),
    "a list for a number": ({"vocab_size": [320]}, InputError, "vocab_size"),
    "no type of torch's": ({"dtype": 5}, InputError, "dtype is 5"),
    "no type's name": ({"dtype": "float33"}, InputError, "dtype is 'float33'"),
    "no epsilon": ({"rms_norm_eps": float("nan")}, InputError, "rms_norm_eps|not JSON|null|None"),
    "a base of zero": ({"rope_theta": 0.0, "rope_parameters": None}, InputError, "rope_theta is 0"),
    "heads that share unevenly": ({"num_key_value_heads": 3}, InputError, "num_key_value_heads"),
    "padding beyond the table": ({"pad_token_id": 320}, InputError, "pad_token_id is 320"),
    "classes by the billion": ({"num_labels": 10**10}, InputError, "num_labels is 10000000000"),
    "no list of classes": ({"architectures": "LlamaForCausalLM"}, InputError, "architectures"),
    "an empty quantization": ({"quantization_config": {}}, InputError, "quant_method"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedModelError, "already .fp8"),
    "no type": ({"model_type": 7}, UnsupportedModelError, "model type 7"),
    "an unknown type": ({"model_type": "nobody"}, UnsupportedModelError, "model type 'nobody'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_numbers_that_no_model_has_are_refused_by_name(case: str, tmp_path: Path) -> None:
    changes, kind, words = HOSTILE[case]
    folder = save_config(tmp_path / "m", **changes)
    with pytest.raises(kind, match=words) as raised:
        read_settings(folder)
    assert "\n" not in str(raised.value)
    written = json.loads((folder / "config.json").read_text())
    if (
        "quantization_config" not in written and case != "no epsilon"
    ):  # what is read from an exported folder, too
        with pytest.raises(kind, match=words):
            read_config(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"vocab_size": ' + "9" * 5000 + "}",
        '{"model_type": "llama", "name": "\\ud800"}',
        "{'model_type': 'llama'}",
        "[]",
        "",
        "\xff\xfe",
    ],
    ids=["brackets", "braces", "digits", "surrogate", "quotes", "array", "empty", "bytes"],
)
def test_json_that_is_none_is_one_sentence(text: str, tmp_path: Path) -> None:
    for name, read in (("config.json", read_settings), ("generation_config.json", read_generation)):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError) as raised:
            read(tmp_path)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 500 + len(str(tmp_path))


def test_a_byte_order_mark_before_the_generation_settings_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(b'\xef\xbb\xbf{"eos_token_id": [3, 4]}')
    assert read_generation(tmp_path)["eos_token_id"] == [3, 4]


def test_damaged_generation_settings_are_named_before_anything_is_done(tmp_path: Path) -> None:
    for text, words in (
        ("", "not JSON"),
        ('{"eos_token_id": 1,}', "not JSON"),
        ('{"eos_token_id": "x"}', "no"),
    ):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(InputError, match=rf"generation_config\.json.*{words}"):
            read_generation(tmp_path)


def test_generation_settings_win_over_the_configuration() -> None:
    assert end_tokens({"eos_token_id": [5, 6, 5]}, {"eos_token_id": 1}) == (5, 6)
    assert end_tokens({}, {"eos_token_id": 1}) == (1,)
    assert end_tokens({}, {}) == ()
