"""Laws of the ONNX folder: what goes in comes out bit for bit, and every consumer generates the same text."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from consumer_environments import python_with
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import same_matrix
from onnx import TensorProto
from reference_onnx import (
    MODELS,
    OnnxRun,
    compressed,
    padded_batch,
    rounded,
    share_dictionaries,
    torch_logits,
    torch_model,
    two_pairs,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense, Factorized, Matrix
from compot_deploy.core.storage import matrix_bytes
from compot_deploy.errors import ArtifactError, InputError, MissingDependencyError, RecipeError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import Provenance, describe, verify, write_manifest
from compot_deploy.exporters.onnx.config import (
    config_json,
    genai_config_json,
    generation_config_json,
    portable_tokenizer_config,
)
from compot_deploy.exporters.onnx.decoder import build_decoder
from compot_deploy.exporters.onnx.options import OnnxOptions
from compot_deploy.exporters.onnx.session import open_session
from compot_deploy.exporters.onnx.tensors import DATA, GRAPH, TensorReader, TensorWriter
from compot_deploy.exporters.staging import staged_folder

EXPORTER = EXPORTERS["onnx"]
END_OF_TEXT = 2


def mixed(name: str, weight: Tensor) -> Matrix:
    """Some of everything: pairs, plain int4 and int2, dense, int8 embedding."""
    if "embed" in name or "lm_head" in name:
        return rounded(weight, Grid(8, 32))
    if "self_attn" in name:
        return two_pairs(name, weight)
    if "gate" in name:
        return rounded(weight, Grid(2, 64))
    return Dense(weight) if "up" in name else rounded(weight, Grid(4, 128))


def int4(name: str, weight: Tensor) -> Matrix:
    return rounded(weight, Grid(4, 32)) if "up_proj" in name or "embed" in name else two_pairs(name, weight)


def export(model: Any, folder: Path, options: OnnxOptions = OnnxOptions()) -> Path:  # noqa: B008
    folder.mkdir()
    EXPORTER.write(model, folder, options)
    return folder


def save_tokenizer(folder: Path) -> None:
    words = {f"w{i}": i for i in range(96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2").save_pretrained(
        folder
    )


# --- what goes in comes out


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "qwen3"])
def test_reading_a_folder_gives_back_every_matrix_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = compressed(torch_model(MODELS[name]), mixed)
    block = "model.layers.1.self_attn"
    shared = share_dictionaries(model.matrices, [f"{block}.q_proj", f"{block}.k_proj"], f"{block}.input")
    model = replace(model, matrices=shared)
    found = EXPORTER.read(export(model, tmp_path / "model"))
    assert list(found) == list(model.matrices)
    for key, matrix in model.matrices.items():
        assert same_matrix(found[key], matrix), key
    query = found[f"{block}.q_proj"]
    assert isinstance(query, Factorized)
    assert [(pair.dictionary_name, str(pair.pattern)) for pair in query.pairs] == [
        (f"{block}.input", "dense"),
        (f"{block}.input", "1:2"),
    ]


@pytest.mark.parametrize("bits", [4, 8])
def test_reading_standard_operators_gives_back_every_matrix(bits: int, tmp_path: Path) -> None:
    model = compressed(torch_model(MODELS["llama"]), lambda name, w: rounded(w, Grid(bits, 64)))
    found = EXPORTER.read(export(model, tmp_path / "model", OnnxOptions(ops="qdq")))
    assert list(found) == list(model.matrices)
    assert all(same_matrix(found[key], matrix) for key, matrix in model.matrices.items())


@pytest.mark.parametrize("name", ["llama", "llama-llama3-tied"])
def test_sixteen_bit_floats_come_back_in_sixteen_bits(name: str, tmp_path: Path) -> None:
    model = compressed(torch_model(MODELS[name]), lambda _, w: Dense(w.bfloat16()))
    found = EXPORTER.read(export(model, tmp_path / "model", OnnxOptions(floats="bfloat16")))
    assert all(same_matrix(found[key], matrix) for key, matrix in model.matrices.items())


def test_padded_rows_of_the_embedding_come_back_without_their_padding(tmp_path: Path) -> None:
    settings = {**MODELS["qwen2-tied"], "hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1}
    model = compressed(torch_model(settings), lambda name, w: rounded(w, Grid(4, 64)))
    found = EXPORTER.read(export(model, tmp_path / "model"))
    assert all(same_matrix(found[key], matrix) for key, matrix in model.matrices.items())


@pytest.mark.parametrize("ops", ["matmulnbits", "qdq"])
def test_storage_counts_what_lies_in_the_file(ops: Any, tmp_path: Path) -> None:
    def form(name: str, weight: Tensor) -> Matrix:
        return rounded(weight, Grid(8, 32)) if "embed" in name else int4(name, weight)

    model = compressed(torch_model(MODELS["qwen2-tied"]), form)
    options = OnnxOptions(ops=ops)
    folder = export(model, tmp_path / "model", options)
    stored = 0
    for tensor in onnx.load(folder / GRAPH, load_external_data=False).graph.initializer:
        if tensor.name.endswith((".integers", ".scales")):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            stored += int(entries["length"]) if entries else len(tensor.raw_data)
    assert stored == sum(matrix_bytes(model.matrices, EXPORTER.storage(options)).values())


@pytest.mark.parametrize("name", ["llama-biases", "qwen2-tied", "qwen3"])
@pytest.mark.parametrize("ops", ["matmulnbits", "qdq"])
def test_a_model_that_is_read_back_is_written_to_the_same_bytes(name: str, ops: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tokenizer(source)
    options = OnnxOptions(ops=ops)
    first = export(compressed(torch_model(MODELS[name]), int4, source), tmp_path / "first", options)
    second = export(EXPORTER.read_model(first), tmp_path / "second", options)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([1, 3, 63, 64, 65, 1000, (1 << 20) + 1]), min_size=1, max_size=6))
def test_tensors_of_any_size_come_back_and_can_be_mapped(sizes: list[int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        graph = onnx.GraphProto()
        written = []
        with (Path(name) / "data").open("wb") as file:
            writer = TensorWriter(file, "data")
            for number, size in enumerate(sizes):
                written.append(torch.randint(0, 256, (size,), dtype=torch.uint8))
                extent = writer.append(written[-1])
                assert extent.offset % (4096 if size > 1 << 20 else 64) == 0
                tensor = graph.initializer.add(name=str(number), data_location=TensorProto.EXTERNAL)
                for key, value in (
                    ("location", "data"),
                    ("offset", extent.offset),
                    ("length", extent.length),
                ):
                    tensor.external_data.add(key=key, value=str(value))
        reader = TensorReader(graph, Path(name))
        for number, tensor in enumerate(written):
            assert torch.equal(reader.bytes_of(str(number)), tensor)


class OneAtATime(Mapping[str, Matrix]):
    """A mapping that makes its matrices anew and watches how many are alive."""

    def __init__(self, matrices: Mapping[str, Matrix]) -> None:
        self.matrices = matrices
        self.alive: list[weakref.ref[Tensor]] = []
        self.order: list[str] = []
        self.most = 0

    def __getitem__(self, name: str) -> Matrix:
        matrix = self.matrices[name]
        assert isinstance(matrix, Dense)
        copy = Dense(matrix.weight.clone())
        self.order.append(name)
        self.alive.append(weakref.ref(copy.weight))
        self.most = max(self.most, sum(reference() is not None for reference in self.alive))
        return copy

    def __iter__(self) -> Iterator[str]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)


@pytest.mark.parametrize("name", ["llama", "llama-llama3-tied"])
def test_matrices_are_read_once_in_order_and_not_kept(name: str, tmp_path: Path) -> None:
    model = compressed(torch_model(MODELS[name]))
    watched = OneAtATime(model.matrices)
    lazy = replace(model, matrices=watched)
    watched.order.clear()  # the run-time check of the dataclass has looked at an item
    export(lazy, tmp_path / "model")
    assert watched.order == list(model.matrices)
    assert watched.most <= 2  # the next one is read before the last one's name is rebound


def test_a_tensor_beyond_four_gigabytes_is_found(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    reference = torch_model(MODELS["llama"])
    model = compressed(reference, int4)
    folder = tmp_path / "onnx"
    folder.mkdir()
    with (tmp_path / DATA).open("wb") as file:
        file.seek(5 << 30)  # a sparse file: it takes no room on the disk
        proto = build_decoder(model, file, Path(DATA).name)
    (tmp_path / GRAPH).write_bytes(proto.SerializeToString())
    found = EXPORTER.read(tmp_path)
    assert all(same_matrix(found[key], matrix) for key, matrix in model.matrices.items())
    tokens, mask = padded_batch()
    session = onnxruntime.InferenceSession(str(tmp_path / GRAPH), providers=["CPUExecutionProvider"])
    whole = export(model, tmp_path / "whole")
    assert torch.equal(OnnxRun(session)(tokens, mask), OnnxRun(open_session(whole))(tokens, mask))


# --- damage


def test_a_truncated_data_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    folder = export(compressed(torch_model(MODELS["llama"]), int4), tmp_path / "model")
    size = (folder / DATA).stat().st_size
    os.truncate(folder / DATA, size // 2)
    with pytest.raises(ArtifactError, match=f"has {size // 2:,} bytes, and the tensor lm_head"):
        EXPORTER.read(folder)["lm_head"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../secret"}, "outside the folder"),
        ({"location": "/etc/passwd"}, "outside the folder"),
        ({"location": "elsewhere"}, "cannot be read"),
        ({"offset": "-4"}, "has offset -4"),
        ({"length": "many"}, "no usable place"),
        ({"length": "99999999"}, "is truncated or belongs to another graph"),
    ],
)
def test_a_tensor_cannot_lie_outside_its_file(entries: dict[str, str], message: str, tmp_path: Path) -> None:
    folder = export(compressed(torch_model(MODELS["llama"]), int4), tmp_path / "model")
    model = onnx.load(folder / GRAPH, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name == "model.layers.0.mlp.up_proj.weight.integers":
            for entry in tensor.external_data:
                entry.value = entries.get(entry.key, entry.value)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=message):
        EXPORTER.read(folder)["model.layers.0.mlp.up_proj"]


def test_a_graph_that_is_missing_or_damaged_or_foreign_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is missing"):
        EXPORTER.read(tmp_path)
    (tmp_path / "onnx").mkdir()
    (tmp_path / GRAPH).write_bytes(b"\xff" * 100)
    with pytest.raises(ArtifactError, match="is not an ONNX graph"):
        EXPORTER.read(tmp_path)
    (tmp_path / GRAPH).write_bytes(b"")
    with pytest.raises(ArtifactError, match="no matrices that compot-deploy wrote"):
        EXPORTER.read(tmp_path)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = compressed(torch_model(MODELS["llama"]), int4)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with (
            pytest.raises(InputError, match="could not be written"),
            staged_folder(tmp_path / "model") as folder,
        ):
            EXPORTER.write(model, folder, OnnxOptions())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_verifies_and_records_the_matrices_of_the_file(tmp_path: Path) -> None:
    model = compressed(torch_model(MODELS["qwen3"]), mixed)
    options = OnnxOptions()
    with staged_folder(tmp_path / "model") as folder:
        EXPORTER.write(model, folder, options)
        written = write_manifest(
            folder, describe(model, EXPORTER.name, EXPORTER.storage(options), Provenance())
        )
    assert verify(tmp_path / "model") == written
    again = replace(model, matrices=EXPORTER.read(tmp_path / "model"))
    assert (
        describe(again, EXPORTER.name, EXPORTER.storage(options), Provenance()).matrices == written.matrices
    )


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
    with pytest.raises(InputError, match=r"generation_config\.json is not JSON"):
        export(model, tmp_path / "model")


def test_options_come_from_a_recipe() -> None:
    assert EXPORTER.options({"onnx_ops": "qdq", "ratio": 0.2}) == OnnxOptions(ops="qdq")
    with pytest.raises(RecipeError, match="--onnx-ops fast: choose one of matmulnbits, qdq"):
        EXPORTER.options({"onnx_ops": "fast"})


def test_a_missing_runtime_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"compot-deploy\[onnx\]"):
        open_session(tmp_path)


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
@pytest.mark.parametrize("form", [None, int4])
def test_onnxruntime_genai_generates_the_same_tokens(name: str, form: Any, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    source = tmp_path / "source"
    save_tokenizer(source)
    folder = export(compressed(torch_model(MODELS[name]), form, source), tmp_path / "model")
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
        for kind, form in (("float", None), ("int4", int4)):
            folder = export(compressed(torch_model(MODELS[name]), form, source), tmp_path / f"{name}-{kind}")
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
