"""Laws of traced graphs: what was given is in the file, and the file computes what torch computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from any_models import VOCABULARY
from consumer_environments import python_with
from exported_models import compressed, some_of_everything, source_of, stand_in
from reference_onnx import two_pairs
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

from compot_deploy.accuracy.onnx_runner import OnnxRunner
from compot_deploy.accuracy.torch_runner import TorchRunner
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense
from compot_deploy.errors import InputError, MissingDependencyError, RecipeError, UnsupportedModelError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.onnx import tracing
from compot_deploy.exporters.onnx.interface import interface_of
from compot_deploy.exporters.onnx.lint.folder import lint_onnx
from compot_deploy.exporters.onnx.nodes import Part
from compot_deploy.exporters.onnx.options import OnnxOptions
from compot_deploy.exporters.onnx.session import open_session
from compot_deploy.exporters.onnx.tensors import GRAPH
from compot_deploy.models.whole import model_of

EXPORTER = EXPORTERS["onnx"]


class Case:
    """A model, and the folder that was made of it, once for all tests."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.source = source_of(kind, folder / "source")
        self.given = compressed(self.source, some_of_everything(self.source))
        self.folder = folder / "exported"
        self.folder.mkdir()
        self.notes = EXPORTER.write(self.given, self.folder, OnnxOptions())
        self.model = model_of(self.given)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("bert", tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("gpt2", tmp_path_factory.mktemp("decoder"))


@pytest.fixture(params=["encoder", "decoder"])
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.getfixturevalue(request.param)
    return found


def texts(rows: int, length: int, left: bool = False) -> dict[str, Tensor]:
    """Random tokens; every row but the first has one more padded token than the one before."""
    generator = torch.Generator().manual_seed(rows * 100 + length)
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(1, rows):
        padded = min(row, length - 1)
        mask[row, : padded if left else 0] = 0
        if not left and padded:
            mask[row, -padded:] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def run_folder(folder: Path, batch: Mapping[str, Tensor], level: int | None = 0) -> Tensor:
    """First output of a folder, from an empty cache where it has one."""
    session = open_session(folder, level, 1)
    feeds: dict[str, Any] = {}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):
            rows = len(batch["input_ids"])
            feeds[entry.name] = torch.zeros(rows, entry.shape[1], 0, entry.shape[3]).numpy()
        else:
            feeds[entry.name] = batch.get(entry.name, torch.zeros_like(batch["input_ids"])).numpy()
    return torch.from_numpy(session.run([session.get_outputs()[0].name], feeds)[0])


def run_torch(case: Case, batch: Mapping[str, Tensor]) -> Tensor:
    """The same of the compressed model in torch, positions counted from the mask as generate() does."""
    arguments = dict(batch)
    if case.given.task.generates:
        arguments["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return case.given.task.output(case.model(**arguments))


# --- what goes in comes out


def test_a_shared_dictionary_is_stored_and_computed_once(encoder: Case) -> None:
    graph = onnx.load(encoder.folder / GRAPH, load_external_data=False).graph
    roles = [entry.value for node in graph.node for entry in node.metadata_props if entry.key == Part.ROLE]
    # In each of two blocks query, key and value share two dictionaries.
    assert roles.count(Part.DICTIONARY_ROLE) == 2 * 2
    assert roles.count(Part.CODES) == 2 * 2 * 3


def test_a_tied_head_reads_the_bytes_of_the_embedding(decoder: Case) -> None:
    graph = onnx.load(decoder.folder / GRAPH, load_external_data=False).graph
    places = [
        [(entry.key, entry.value) for entry in tensor.external_data]
        for tensor in graph.initializer
        if tensor.name.startswith("transformer.wte.integers")
    ]
    assert len(places) == 2 and places[0] == places[1]
    assert not any(VOCABULARY in tensor.dims and tensor.data_type == 1 for tensor in graph.initializer)


def test_nothing_of_the_place_where_it_was_traced_is_in_the_file(case: Case) -> None:
    content = (case.folder / GRAPH).read_bytes()
    assert (
        b".py" not in content
        and str(Path.cwd()).encode() not in content
        and b"traced." not in content.replace(b"compot.traced", b"")
        and b"compot:" not in content
    )


def test_what_the_output_does_not_depend_on_is_left_out_and_said(encoder: Case, decoder: Case) -> None:
    assert encoder.notes == ("pooler.dense is left out: the output does not depend on it.",)
    assert decoder.notes == ()
    assert b"pooler" not in (encoder.folder / GRAPH).read_bytes()


def test_the_same_model_gives_the_same_bytes_and_one_trace(case: Case, tmp_path: Path) -> None:
    before = tracing._traces.cache_info().misses
    EXPORTER.write(case.given, tmp_path, OnnxOptions())
    EXPORTER.check(case.source, {}, OnnxOptions())
    assert tracing._traces.cache_info().misses == before
    for path in sorted(case.folder.rglob("*")):
        if path.is_file():
            assert (tmp_path / path.relative_to(case.folder)).read_bytes() == path.read_bytes(), path


def test_a_dry_run_counts_every_byte_of_a_traced_model(case: Case, tmp_path: Path) -> None:
    stand_ins = replace(case.given, matrices={n: stand_in(m) for n, m in case.given.matrices.items()})
    missing = EXPORTER.dry_run(stand_ins, tmp_path, OnnxOptions())
    assert missing > 0
    assert missing + size_of(tmp_path) == size_of(case.folder)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- the file computes what torch computes


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 2), (2, 1), (3, 7), (5, 40)])
@pytest.mark.parametrize("left", [False, True])
def test_outputs_equal_torchs_for_any_number_and_length_of_texts(
    case: Case, rows: int, length: int, left: bool
) -> None:
    batch = texts(rows, length, left)
    real = batch["attention_mask"].bool()
    expected, exact, shipped = (
        run_torch(case, batch),
        run_folder(case.folder, batch),
        run_folder(case.folder, batch, None),
    )
    assert float((exact - expected)[real].abs().max()) < 1e-5
    assert 0 < float((shipped - expected)[real].abs().max()) < 0.3


def test_token_types_reach_the_model(encoder: Case) -> None:
    batch = texts(2, 6)
    types = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    zeros, given = (
        run_folder(encoder.folder, batch),
        run_folder(encoder.folder, {**batch, "token_type_ids": types}),
    )
    expected = run_torch(encoder, {**batch, "token_type_ids": types})
    mask = batch["attention_mask"].bool()
    assert float((given - expected)[mask].abs().max()) < 1e-5
    assert float((given - zeros)[mask].abs().max()) > 0.05


def test_a_decoder_continues_token_by_token_as_it_reads_at_once(decoder: Case) -> None:
    runner = OnnxRunner(decoder.folder, 0, threads=1)
    tokens = texts(1, 20)["input_ids"]
    whole, pieces = (torch.cat(list(runner.logits(tokens, chunk)), dim=1) for chunk in (20, 1))
    assert float((whole - pieces).abs().max()) < 1e-4
    assert runner.generate([5, 6, 7], 12) == TorchRunner(decoder.model).generate([5, 6, 7], 12)


def test_linears_that_are_handed_over_as_tensors_compute_the_same(encoder: Case, tmp_path: Path) -> None:
    model = compressed(encoder.source, some_of_everything(encoder.source), outside=False)
    assert "pooler.dense" not in model.matrices
    name = "encoder.layer.0.output.dense"
    plain = dict(encoder.given.matrices)
    tensors = {**encoder.given.tensors, f"{name}.weight": plain.pop(name).dequantize().T.contiguous()}
    EXPORTER.write(replace(encoder.given, matrices=plain, tensors=tensors), tmp_path, OnnxOptions())
    again = EXPORTER.read_model(tmp_path)
    assert (
        torch.equal(again.tensors[f"{name}.weight"], tensors[f"{name}.weight"]) and name not in again.matrices
    )
    assert torch.allclose(
        run_folder(tmp_path, texts(2, 6)), run_folder(encoder.folder, texts(2, 6)), atol=1e-5
    )


def test_onnxruntime_genai_continues_as_torch_does(decoder: Case) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(decoder.folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=15, batch_size=1)
    generator = genai.Generator(model, parameters)
    prompt = torch.tensor([[5, 6, 7]], dtype=torch.int32)
    generator.append_tokens(prompt.numpy())
    while not generator.is_done():
        generator.generate_next_token()
    found = tuple(int(token) for token in generator.get_sequence(0)[3:])
    expected = OnnxRunner(decoder.folder, threads=1).generate([5, 6, 7], 12)
    assert len(found) > 2 and found == expected[: len(found)]


@pytest.mark.consumer
def test_optimum_continues_a_traced_decoder_in_its_own_environment(decoder: Case, tmp_path: Path) -> None:
    python = python_with("optimum-onnx")
    program = (
        "import sys, torch\n"
        "from optimum.onnxruntime import ORTModelForCausalLM\n"
        "model = ORTModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids, mask = torch.tensor([[5, 6, 7], [0, 8, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]])\n"
        "options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)\n"
        "print(model.generate(input_ids=ids, attention_mask=mask, **options)[:, 3:].tolist())\n"
    )
    result = subprocess.run(
        [python, "-c", program, str(decoder.folder)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    runner = OnnxRunner(decoder.folder, threads=1)
    # The second row is padded on the left; unpadded it continues alike.
    expected = [list(runner.generate(prompt, 8)) for prompt in ([5, 6, 7], [8, 9])]
    assert json.loads(result.stdout.splitlines()[-1]) == expected


# --- lint


def test_the_lint_has_nothing_to_say_about_a_traced_folder(case: Case) -> None:
    assert [diagnostic for diagnostic in lint_onnx(case.folder) if diagnostic.severity != "note"] == []


def changed(folder: Path, tmp_path: Path, change: Any) -> tuple[str, ...]:
    """Sentences of the lint for a copy of a folder whose graph was changed."""
    shutil.copytree(folder, tmp_path / "changed")
    model = onnx.load(folder / GRAPH, load_external_data=False)
    change(model)
    (tmp_path / "changed" / GRAPH).write_bytes(model.SerializeToString())
    return tuple(
        f"{diagnostic.severity}: {diagnostic.sentence}" for diagnostic in lint_onnx(tmp_path / "changed")
    )


def test_the_lint_finds_an_output_that_no_consumer_knows(encoder: Case, tmp_path: Path) -> None:
    def rename(model: Any) -> None:
        model.graph.output[0].name = model.graph.node[-1].output[0] = "hidden"

    found = changed(encoder.folder, tmp_path, rename)
    assert any("None of the outputs last_hidden_state, logits is there" in sentence for sentence in found)


def test_the_lint_finds_a_missing_input_and_a_fixed_length(encoder: Case, tmp_path: Path) -> None:
    def fix(model: Any) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 128
        model.graph.input[1].name = "mask"

    found = changed(encoder.folder, tmp_path, fix)
    assert any("The input attention_mask is missing" in sentence for sentence in found)
    assert any("input_ids takes texts of one number and length only" in sentence for sentence in found)


def test_the_lint_finds_a_placeholder_that_was_left(encoder: Case, tmp_path: Path) -> None:
    def leave(model: Any) -> None:
        model.opset_import.add(domain="compot", version=1)

    assert any("needs a library of custom operators" in s for s in changed(encoder.folder, tmp_path, leave))


# --- what is refused


def test_interfaces_are_told_from_shapes_alone(tmp_path: Path) -> None:
    found = interface_of(source_of("bert", tmp_path / "bert").meta)
    assert found.inputs == ("input_ids", "attention_mask", "token_type_ids")
    classifier = interface_of(source_of("bert classes", tmp_path / "classifier").meta)
    assert (classifier.output, classifier.output_sizes) == ("logits", (3,))
    decoder = interface_of(source_of("gpt2", tmp_path / "gpt2").meta)
    assert (decoder.task, decoder.cache, decoder.present[3]) == (
        "generation",
        ((4, 16),) * 2,
        "present.1.value",
    )


def test_models_that_cannot_be_traced_are_refused() -> None:
    two = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    ).eval()
    with pytest.raises(UnsupportedModelError, match="an encoder and a decoder"):
        interface_of(two)
    pictures = ViTModel(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32
        )
    ).eval()
    with pytest.raises(UnsupportedModelError, match="does not take input_ids"):
        interface_of(pictures)


def test_what_cannot_be_written_is_refused(encoder: Case, tmp_path: Path) -> None:
    assert EXPORTER.supports(encoder.source) is None
    with pytest.raises(RecipeError, match="codes: ONNX stores 2-bit integers in groups"):
        EXPORTER.check(encoder.source, {"codes": Grid(2, 16)}, OnnxOptions())
    table = "embeddings.word_embeddings"
    matrices = {**encoder.given.matrices, table: two_pairs(table, torch.randn(64, VOCABULARY))}
    with pytest.raises(RecipeError, match="a factorized token embedding cannot be stored"):
        EXPORTER.write(replace(encoder.given, matrices=matrices), tmp_path, OnnxOptions())
    name = "encoder.layer.0.intermediate.dense"
    matrices = {**encoder.given.matrices, name: Dense(torch.ones(160, 64))}
    with pytest.raises(InputError, match=r"\(160, 64\).*\(64, 160\)"):
        EXPORTER.write(replace(encoder.given, matrices=matrices), tmp_path, OnnxOptions())
    tensors = {n: t for n, t in encoder.given.tensors.items() if n != "embeddings.LayerNorm.bias"}
    with pytest.raises(InputError, match=r"lacks embeddings\.LayerNorm\.bias"):
        EXPORTER.write(replace(encoder.given, tensors=tensors), tmp_path, OnnxOptions())


def test_a_missing_tracer_is_named_before_any_work(encoder: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=r"compot-deploy\[trace\]"):
        EXPORTER.check(encoder.source, {}, OnnxOptions())
