"""Laws of traced graphs: what was given is in the file, and the file computes what torch computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from compot_deploy.accuracy.embeddings import Texts, compare_texts
from compot_deploy.accuracy.onnx_losses import Losses, run_folder, run_torch
from consumer_environments import python_with
from matrices import same_matrix
from reference_onnx import rounded, two_pairs
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from compot_deploy.accuracy.evaluate import measure
from compot_deploy.accuracy.onnx_runner import OnnxRunner
from compot_deploy.accuracy.torch_runner import TorchRunner
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense, Factorized, Matrix, Pair
from compot_deploy.errors import InputError, MissingDependencyError, RecipeError, UnsupportedModelError
from compot_deploy.exporters.onnx.interface import interface_of
from compot_deploy.exporters.onnx.lint.folder import lint_onnx
from compot_deploy.exporters.onnx.matrices import OnnxMatrices
from compot_deploy.exporters.onnx.nodes import Part
from compot_deploy.exporters.onnx.placeholders import dequantized
from compot_deploy.exporters.onnx.session import open_session
from compot_deploy.exporters.onnx.tensors import GRAPH
from compot_deploy.exporters.onnx.traced import export

VOCABULARY = 96


def randomized(model: Any) -> Any:
    """Biases and norms start at 0 and 1, where a mistake with them would not show."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def bert(kind: type = BertModel) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return randomized(kind(config))


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=48,  # no multiple of the block, which is filled up
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return randomized(GPT2LMHeadModel(config))


def linears(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the linears of a model, (in, out)."""
    return {
        name: module.weight.detach() if type(module).__name__ == "Conv1D" else module.weight.detach().T
        for name, module in model.named_modules()
        if type(module).__name__ in ("Conv1D", "Linear") and "lm_head" not in name
    }


def some_of_everything(model: nn.Module, table: str) -> dict[str, Matrix]:
    """Pairs, pairs that share a dictionary, plain integers, floats, and an int8 table."""
    matrices: dict[str, Matrix] = {}
    for name, weight in linears(model).items():
        if name.endswith((".query", ".c_attn", ".c_fc", "intermediate.dense")):
            matrices[name] = two_pairs(name, weight.contiguous())
        elif name.endswith((".key", "mlp.c_proj")):
            matrices[name] = rounded(weight.contiguous(), Grid(2, 32))
        elif name.endswith("pooler.dense"):
            continue  # traced as it is
        else:
            matrices[name] = rounded(weight.contiguous(), Grid(4, 16))
    for name in list(matrices):  # value shares the dictionary of query
        if name.endswith(".value"):
            query = matrices[name.replace(".value", ".query")]
            assert isinstance(query, Factorized)
            pair = query.pairs[0]
            matrices[name] = Factorized((Pair(pair.dictionary, pair.codes, pair.dictionary_name),))
    embedding = model.get_submodule(table).weight
    assert isinstance(embedding, Tensor)
    return {**matrices, table: rounded(embedding.detach().T.contiguous(), Grid(8, 32))}


class Case:
    """A model, its matrices, and the folder that was made of them, once for all tests."""

    def __init__(self, model: Any, table: str, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.given = some_of_everything(model, table)
        self.before = {name: value.clone() for name, value in model.state_dict().items()}
        self.modules = dict(model.named_modules())
        self.written = export(model, folder, self.given)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(bert(), "embeddings.word_embeddings", tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(gpt2(), "transformer.wte", tmp_path_factory.mktemp("decoder"))


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


# --- what goes in comes out


def test_reading_a_traced_folder_gives_back_every_matrix_bit_for_bit(case: Case) -> None:
    found = OnnxMatrices(case.folder / GRAPH)
    assert set(found) == set(case.given) == set(case.written)
    for name, matrix in case.given.items():
        assert same_matrix(found[name], matrix), name


def test_exporting_leaves_the_model_as_it_was(case: Case) -> None:
    assert all(case.modules[name] is module for name, module in case.model.named_modules())
    assert all(torch.equal(value, case.before[name]) for name, value in case.model.state_dict().items())


def test_a_shared_dictionary_is_stored_and_computed_once(encoder: Case) -> None:
    graph = onnx.load(encoder.folder / GRAPH, load_external_data=False).graph
    roles = [entry.value for node in graph.node for entry in node.metadata_props if entry.key == Part.ROLE]
    # query has two pairs and lends its first dictionary to value, intermediate.dense has two.
    assert roles.count(Part.DICTIONARY_ROLE) == 4
    assert roles.count(Part.CODES) == 5


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
    )


# --- the file computes what torch computes


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 2), (2, 1), (3, 7), (5, 40)])
@pytest.mark.parametrize("left", [False, True])
def test_outputs_equal_torchs_for_any_number_and_length_of_texts(
    case: Case, rows: int, length: int, left: bool
) -> None:
    losses = measured(case, [texts(rows, length, left)])
    assert losses.export_exact.nmse < 1e-10
    assert losses.export_exact.largest < 1e-5
    assert losses.export.nmse < 1e-2


def measured(case: Case, batches: list[dict[str, Tensor]]) -> Losses:
    return measure(case.model, case.folder, batches, case.written, threads=1)


def test_token_types_reach_the_model(encoder: Case) -> None:
    batch = texts(2, 6)
    types = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    session = open_session(encoder.folder, 0, 1)
    zeros, given = run_folder(session, batch), run_folder(session, {**batch, "token_type_ids": types})
    with dequantized(encoder.model, encoder.written):
        expected = run_torch(encoder.model, {**batch, "token_type_ids": types})
    mask = batch["attention_mask"].bool()
    assert float((given - expected)[mask].abs().max()) < 1e-5
    assert float((given - zeros)[mask].abs().max()) > 0.1


def test_a_decoder_continues_token_by_token_as_it_reads_at_once(decoder: Case) -> None:
    runner = OnnxRunner(decoder.folder, 0, threads=1)
    tokens = texts(1, 20)["input_ids"]
    whole, pieces = (torch.cat(list(runner.logits(tokens, chunk)), dim=1) for chunk in (20, 1))
    assert float((whole - pieces).abs().max()) < 1e-4
    with dequantized(decoder.model, decoder.written):
        expected = TorchRunner(decoder.model).generate([5, 6, 7], 12)
    assert runner.generate([5, 6, 7], 12) == expected


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


def test_losses_are_kept_apart(encoder: Case) -> None:
    losses = measured(encoder, [texts(3, 7), texts(2, 9)])
    assert losses.method is not None and losses.total is not None
    assert losses.export.texts == 5
    assert losses.export_exact.nmse < losses.export.nmse < losses.method.nmse
    assert abs(losses.total.cosine - losses.method.cosine) < 0.05


# --- lint


def test_the_lint_has_nothing_to_say_about_a_traced_folder(case: Case) -> None:
    assert [finding for finding in lint_onnx(case.folder) if finding.severity != "note"] == []


def changed(folder: Path, tmp_path: Path, change: Any) -> tuple[str, ...]:
    """Sentences of the lint for a copy of a folder whose graph was changed."""
    shutil.copytree(folder, tmp_path / "changed")
    model = onnx.load(folder / GRAPH, load_external_data=False)
    change(model)
    (tmp_path / "changed" / GRAPH).write_bytes(model.SerializeToString())
    return tuple(f"{finding.severity}: {finding.sentence}" for finding in lint_onnx(tmp_path / "changed"))


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


def test_interfaces_are_told_from_the_model() -> None:
    assert interface_of(bert()).inputs == ("input_ids", "attention_mask", "token_type_ids")
    classifier = interface_of(bert(BertForSequenceClassification))
    assert (classifier.output, classifier.output_sizes) == ("logits", (2,))
    decoder = interface_of(gpt2())
    assert (decoder.task, decoder.cache, decoder.present[3]) == (
        "generation",
        ((4, 12),) * 2,
        "present.1.value",
    )


def refused(model: Any, folder: Path, matrices: Mapping[str, Matrix] | None = None) -> Exception:
    with pytest.raises((InputError, UnsupportedModelError, MissingDependencyError, RecipeError)) as caught:
        export(model, folder, matrices)
    return caught.value


def test_models_that_cannot_be_traced_are_refused(tmp_path: Path) -> None:
    two = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    ).eval()
    assert "an encoder and a decoder" in str(refused(two, tmp_path))
    pictures = ViTModel(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32
        )
    ).eval()
    assert "does not take input_ids" in str(refused(pictures, tmp_path))
    assert "model.eval()" in str(refused(bert().train(), tmp_path))
    assert "model.float()" in str(refused(bert().half(), tmp_path))


def test_matrices_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    name = "encoder.layer.0.intermediate.dense"
    assert "no module encoder.layer.9" in str(
        refused(bert(), tmp_path, {"encoder.layer.9": Dense(torch.ones(2, 2))})
    )
    error = refused(bert(), tmp_path, {name: Dense(torch.ones(96, 64))})
    assert "(96, 64)" in str(error) and "(64, 96)" in str(error)


def test_a_missing_tracer_is_named_before_anything_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    error = refused(bert(), tmp_path)
    assert isinstance(error, MissingDependencyError) and "compot-deploy[trace]" in str(error)


# --- comparing texts


def test_padding_never_counts() -> None:
    torch.manual_seed(0)
    vectors, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    expected = compare_texts([Texts(vectors, mask)], [Texts(other, mask)])
    vectors[1, 1], other[1, 2] = float("nan"), 1e9
    assert compare_texts([Texts(vectors, mask)], [Texts(other, mask)]) == expected


def test_batches_do_not_change_the_figures() -> None:
    torch.manual_seed(0)
    mask = torch.ones(4, 3, dtype=torch.int64)
    one, two = torch.randn(4, 3, 8), torch.randn(4, 3, 8)
    whole = compare_texts([Texts(one, mask)], [Texts(two, mask)])
    parts = compare_texts(
        [Texts(one[i : i + 2], mask[:2]) for i in (0, 2)], [Texts(two[i : i + 2], mask[:2]) for i in (0, 2)]
    )
    assert parts.nmse == pytest.approx(whole.nmse, rel=1e-12)
    assert (parts.cosine, parts.lowest_cosine, parts.texts) == pytest.approx(
        (whole.cosine, whole.lowest_cosine, whole.texts), rel=1e-12
    )


def test_two_vectors_by_hand() -> None:
    mask = torch.ones(1, 1, dtype=torch.int64)
    first, second = Texts(torch.tensor([[[1.0, 0.0]]]), mask), Texts(torch.tensor([[[1.0, 1.0]]]), mask)
    found = compare_texts([first], [second])
    assert (found.nmse, found.cosine) == pytest.approx((2.0, 2**-0.5))
    assert compare_texts([first], [first]).nmse == 0.0


def test_other_texts_are_not_compared() -> None:
    mask = torch.ones(1, 2, dtype=torch.int64)
    one = Texts(torch.ones(1, 2, 3), mask)
    for other in (Texts(torch.ones(1, 2, 4), mask), Texts(torch.ones(1, 2, 3), torch.tensor([[1, 0]]))):
        with pytest.raises(ValueError, match="do not belong to the same texts"):
            compare_texts([one], [other])
    with pytest.raises(ValueError, match="No text"):
        compare_texts([], [])
