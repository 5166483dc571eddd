"""Consumers read an ONNX folder: its configuration says what the graph is, its text is that of transformers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from consumer_environments import python_with
from onnx_folders import export, int4, save_tokenizer
from reference_onnx import MODELS, OnnxRun, compressed, padded_batch, torch_logits, torch_model
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from compot_deploy.errors import InputError
from compot_deploy.exporters.onnx.config import (
    config_json,
    genai_config_json,
    generation_config_json,
    portable_tokenizer_config,
)
from compot_deploy.exporters.onnx.session import open_session
from compot_deploy.exporters.onnx.tensors import DATA, GRAPH

END_OF_TEXT = 2


# --- files for consumers


def test_the_folder_holds_what_every_consumer_needs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tokenizer(source)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.5}')
    model = compressed(torch_model(MODELS["llama"]), int4, source)
    folder = export(model, tmp_path / "model")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        "config.json",
        "generation_config.json",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        GRAPH,
        DATA,
    } <= files
    assert AutoTokenizer.from_pretrained(folder)("w5 w7").input_ids == [5, 7]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["bos_token_id"]) == ([2, 3], 1)
    genai = json.loads((folder / "genai_config.json").read_text())
    assert genai["model"]["eos_token_id"] == [2, 3] and genai["model"]["pad_token_id"] == 0
    assert genai["search"]["temperature"] == 0.5 and genai["model"]["decoder"]["filename"] == GRAPH


@pytest.mark.parametrize("name", MODELS)
def test_the_written_configuration_gives_the_same_model(name: str, tmp_path: Path) -> None:
    reference = torch_model(MODELS[name])
    folder = export(compressed(reference), tmp_path / "model")
    again = AutoConfig.from_pretrained(folder)
    other = type(reference)._from_config(again, attn_implementation="eager").float().eval()
    other.load_state_dict(reference.state_dict())
    tokens, mask = padded_batch()
    assert torch.equal(torch_logits(other, tokens, mask), torch_logits(reference, tokens, mask))
    raw = json.loads((folder / "config.json").read_text())
    assert (
        raw["rope_theta"]
        == raw["rope_parameters"]["rope_theta"]
        == reference.config.rope_parameters["rope_theta"]
    )
    assert (raw["rope_scaling"] or {"rope_type": "default"})["rope_type"] == raw["rope_parameters"][
        "rope_type"
    ]


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-small-heads"])
def test_the_sizes_for_genai_are_those_of_the_graph(name: str, tmp_path: Path) -> None:
    folder = export(compressed(torch_model(MODELS[name])), tmp_path / "model")
    graph = onnx.load(folder / GRAPH, load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    (attention,) = {
        attribute.i
        for node in graph.node
        if node.op_type == "GroupQueryAttention"
        for attribute in node.attribute
        if attribute.name == "num_heads"
    }
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    decoder = model["decoder"]
    assert [decoder["num_key_value_heads"], decoder["head_size"]] == shapes["past_key_values.0.key"][1::2]
    assert decoder["num_attention_heads"] == attention
    assert decoder["num_hidden_layers"] == sum(name.startswith("past_key") for name in shapes) // 2
    assert model["vocab_size"] == shapes["logits"][2]
    assert model["context_length"] == 128 and decoder["hidden_size"] == 64


def test_settings_that_no_longer_hold_are_not_copied() -> None:
    model = compressed(torch_model(MODELS["llama"]))
    config = {
        **model.config,
        "quantization_config": {"quant_method": "gptq"},
        "auto_map": {},
        "dtype": "bfloat16",
    }
    written = config_json(model.architecture, config, tied=True)
    assert "quantization_config" not in written and "auto_map" not in written
    assert written["dtype"] == "float32" and written["tie_word_embeddings"] is True


def test_a_model_without_special_tokens_names_none() -> None:
    model = compressed(torch_model(MODELS["llama"]))
    config = {**model.config, "bos_token_id": None, "pad_token_id": None, "eos_token_id": 7}
    generation = generation_config_json(config, {})
    assert generation == {"eos_token_id": 7}
    written = genai_config_json(model.architecture, config, generation, 64, GRAPH)["model"]
    assert "bos_token_id" not in written and written["pad_token_id"] == 7 and written["context_length"] == 64


def test_tokenizers_of_transformers_5_are_spelled_for_4_as_well() -> None:
    original = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "eos_token": "</s>"}
    assert portable_tokenizer_config(original) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "eos_token": "</s>",
    }
    assert original["extra_special_tokens"] == ["<a>"]


def test_a_damaged_file_of_the_original_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    model = compressed(torch_model(MODELS["llama"]), source=tmp_path)
    with pytest.raises(InputError, match=r"generation_config\.json cannot be read: it is not JSON"):
        export(model, tmp_path / "model")


# --- consumers


def greedy(folder: Path, tokens: Tensor, mask: Tensor, new: int) -> Tensor:
    """Tokens that a plain loop over onnxruntime chooses, the file as shipped; no end of text before the last."""
    run = OnnxRun(open_session(folder))
    logits, sequence = run(tokens, mask), tokens
    for step in range(new):
        logits[:, -1, END_OF_TEXT] = -torch.inf
        chosen = logits[:, -1:].argmax(-1)
        sequence, mask = torch.cat((sequence, chosen), 1), torch.cat((mask, torch.ones_like(chosen)), 1)
        if step + 1 < new:
            logits = run(chosen, mask)
    return sequence


def torch_greedy(model: Any, tokens: Tensor, mask: Tensor, new: int) -> Tensor:
    """The same through transformers."""
    with torch.no_grad():
        return model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )


@pytest.mark.parametrize("name", ["llama-llama3-tied", "mistral", "qwen3"])
def test_unquantized_text_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    reference = torch_model(MODELS[name])
    folder = export(compressed(reference), tmp_path / "model")
    tokens, mask = padded_batch()
    assert torch.equal(greedy(folder, tokens, mask, 20), torch_greedy(reference, tokens, mask, 20))


@pytest.mark.consumer
@pytest.mark.parametrize("name", ["llama-llama3-tied", "mistral", "qwen2-tied", "qwen3", "llama-small-heads"])
@pytest.mark.parametrize("scheme", [None, int4])
def test_onnxruntime_genai_generates_the_same_tokens(name: str, scheme: Any, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    source = tmp_path / "source"
    save_tokenizer(source)
    folder = export(compressed(torch_model(MODELS[name]), scheme, source), tmp_path / "model")
    prompts, _ = padded_batch()
    prompts = prompts.clamp(min=3)  # rows of equal length: the runtime pads on the right
    loaded = genai.Model(str(folder))
    for batch in (1, 3):
        expected = greedy(folder, prompts[:batch], torch.ones_like(prompts[:batch]), 12)
        settings = genai.GeneratorParams(loaded)
        settings.set_search_options(max_length=24, min_length=24, do_sample=False, batch_size=batch)
        generator = genai.Generator(loaded, settings)
        generator.append_tokens(prompts[:batch].int().numpy())
        while not generator.is_done():
            generator.generate_next_token()
        for row in range(batch):
            assert list(generator.get_sequence(row)) == expected[row].tolist()


@pytest.mark.consumer
@pytest.mark.slow
def test_optimum_generates_the_same_tokens_in_its_own_environment(tmp_path: Path) -> None:
    python = python_with("optimum-onnx")
    script = Path(__file__).parents[2] / "consumers" / "optimum_generate.py"
    source = tmp_path / "source"
    save_tokenizer(source)
    arguments = [str(tmp_path / "prompts.json")]
    tokens, mask = padded_batch()
    Path(arguments[0]).write_text(json.dumps({"input_ids": tokens.tolist(), "attention_mask": mask.tolist()}))
    for name in ("llama-llama3-tied", "llama-yarn", "mistral", "qwen2-tied", "qwen3"):
        for kind, scheme in (("float", None), ("int4", int4)):
            folder = export(
                compressed(torch_model(MODELS[name]), scheme, source), tmp_path / f"{name}-{kind}"
            )
            expected = tmp_path / f"{folder.name}.json"
            expected.write_text(json.dumps(greedy(folder, tokens, mask, 12).tolist()))
            arguments += [str(folder), str(expected)]
    result = subprocess.run([python, str(script), *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("same tokens") == 10


@pytest.mark.consumer
@pytest.mark.slow
def test_genai_generates_the_same_tokens_in_its_own_environment(tmp_path: Path) -> None:
    python = python_with("onnxruntime-genai")
    script = Path(__file__).parents[2] / "consumers" / "genai_generate.py"
    source = tmp_path / "source"
    save_tokenizer(source)
    arguments = [str(tmp_path / "prompts.json")]
    prompts = padded_batch()[0].clamp(min=3)  # rows of equal length: the runtime pads on the right
    Path(arguments[0]).write_text(json.dumps({"input_ids": prompts.tolist()}))
    for name in ("llama-llama3-tied", "mistral", "qwen2-tied", "qwen3"):
        folder = export(compressed(torch_model(MODELS[name]), int4, source), tmp_path / name)
        expected = tmp_path / f"{name}.json"
        expected.write_text(json.dumps(greedy(folder, prompts, torch.ones_like(prompts), 12).tolist()))
        arguments += [str(folder), str(expected)]
    result = subprocess.run([python, str(script), *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("same tokens") == 4
