"""Laws of bitsandbytes as a quantizer: its own codes, exact zeros, and formats that carry them bit for bit."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
import torch
from cases import nightly
from matrices import same_matrix
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compot_deploy.accuracy.runners import huggingface_runner
from compot_deploy.cli import main
from compot_deploy.core.grid import Codebook, Grid
from compot_deploy.core.matrix import Quantized
from compot_deploy.core.store import load_matrices, save_matrices
from compot_deploy.errors import ArtifactError, MissingDependencyError, RecipeError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.bnb4 import BNB_TYPES, pack_bnb4, unpack_bnb4
from compot_deploy.exporters.huggingface.bnb import dequantized
from compot_deploy.exporters.manifest import read_manifest
from compot_deploy.exporters.onnx.layouts import pack_nbits
from compot_deploy.models.source import open_source
from compot_deploy.quant import QUANTIZERS, bnb
from compot_deploy.recipe import Recipe
from compot_deploy.report.json import from_json
from compot_deploy.report.tables import loss_table

if find_spec("bitsandbytes") is None:
    pytest.skip("the extra bnb is not installed", allow_module_level=True)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses an optional kernel, aloud


@pytest.fixture
def functional() -> Any:
    """The library, which takes long to load, and where the tests are collected nobody needs it."""
    return import_module("bitsandbytes.functional")


TABLES: tuple[Codebook, ...] = ("nf4", "fp4")


def weight(rows: int = 128, columns: int = 12) -> torch.Tensor:
    made = 0.1 * torch.randn(rows, columns)
    made[torch.rand(rows, columns) < 0.4] = 0.0
    made[:, 3] = 0.0
    return made


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("table", TABLES)
def test_four_bits_dequantize_to_what_the_library_makes_of_the_same_codes(
    functional: Any, table: Codebook, group: int
) -> None:
    quantized = bnb(weight(), None, Grid(4, group, table))
    packed = pack_bnb4(quantized)
    state = functional.QuantState(
        absmax=packed.scales.float().flatten(),
        shape=torch.Size((12, 128)),
        code=functional.get_4bit_type(table, device="cpu", blocksize=group),
        blocksize=group,
        quant_type=table,
        dtype=torch.float32,
    )
    library = functional.dequantize_4bit(packed.blob.reshape(-1, 1), state).T
    assert torch.equal(library, quantized.dequantize())


@pytest.mark.parametrize("table", TABLES)
def test_codes_are_the_librarys_own_where_its_scales_are_float16(functional: Any, table: Codebook) -> None:
    values = weight()
    values[::32] = 0.5  # the largest of every block, and a float16
    codes, state = functional.quantize_4bit(values.T.contiguous(), blocksize=32, quant_type=table)
    quantized = bnb(values, None, Grid(4, 32, table))
    assert torch.equal(quantized.dequantize(), functional.dequantize_4bit(codes, state).T)
    nibbles = torch.stack((codes.flatten() >> 4, codes.flatten() & 15))
    if table == "fp4":
        nibbles[nibbles == 8] = 0  # its negative zero
    assert torch.equal(pack_bnb4(quantized).blob.flatten(), nibbles[0] << 4 | nibbles[1])


@pytest.mark.parametrize("grid", [Grid(4, 32, "nf4"), Grid(4, 64, "fp4"), Grid(8, 32)], ids=str)
def test_zeros_survive_and_nothing_stands_outside_the_support(grid: Grid) -> None:
    values = weight()
    support = torch.rand(values.shape) < 0.5
    for quantized in (bnb(values, None, grid), bnb(values, None, grid, support=support)):
        assert not quantized.integers[values == 0].any()
        assert (
            torch.equal(quantized.dequantize() == 0, quantized.integers == 0) or (quantized.scales == 0).any()
        )
    assert not quantized.integers[~support].any()


def test_int8_is_vector_wise_and_within_half_a_step(functional: Any) -> None:
    values = weight(100, 7)
    quantized = bnb(values, None, Grid(8, 32))
    assert torch.equal(quantized.scales, quantized.scales[:1].expand(4, 7)), "one scale per output"
    library, absmax, _ = functional.int8_vectorwise_quant(values.T.contiguous())
    assert (library.T - quantized.integers).abs().max() <= 1
    step = quantized.scales[0].float()
    assert torch.allclose(step * 127, absmax.float(), rtol=1e-3)
    assert ((quantized.dequantize() - values).abs() <= 0.5 * step * 1.07 + 1e-9).all()


def test_the_input_is_not_changed_and_two_runs_are_equal() -> None:
    values = weight()
    kept = values.clone()
    assert same_matrix(bnb(values, None, Grid(4, 32, "nf4")), bnb(values, None, Grid(4, 32, "nf4")))
    assert torch.equal(values, kept)


@pytest.mark.parametrize(("grid", "sentence"), [(Grid(4, 32), "not int4"), (Grid(4, 16, "nf4"), "not 16")])
def test_grids_that_the_library_does_not_have_are_refused(grid: Grid, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        bnb(weight(), None, grid)


@pytest.mark.parametrize("table", TABLES)
def test_packing_for_onnx_is_exact_and_integer_layouts_refuse_tables(table: Codebook) -> None:
    quantized = bnb(weight(), None, Grid(4, 32, table))
    assert same_matrix(unpack_bnb4(pack_bnb4(quantized), 128, quantized.grid), quantized)
    with pytest.raises(ValueError, match="has a table"):
        pack_nbits(quantized)
    with pytest.raises(ValueError, match="cannot hold 100 inputs"):
        pack_bnb4(Quantized(quantized.integers[:100], quantized.scales, quantized.grid))


def test_the_work_folder_keeps_tables(tmp_path: Path) -> None:
    quantized = bnb(weight(), None, Grid(4, 32, "nf4"))
    save_matrices(tmp_path / "x.safetensors", {"a": quantized})
    assert same_matrix(load_matrices(tmp_path / "x.safetensors")["a"], quantized)


@pytest.mark.parametrize("table", TABLES)
def test_onnxruntime_computes_the_same_numbers(table: Codebook) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    quantized = bnb(weight(), None, Grid(4, 32, table))
    packed, x = pack_bnb4(quantized), torch.randn(5, 128)
    node = onnx.helper.make_node(
        "MatMulBnb4",
        ["x", "b", "s"],
        ["y"],
        domain="com.microsoft",
        K=128,
        N=12,
        block_size=32,
        quant_type=BNB_TYPES[table],
    )
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [info("x", 1, [5, 128])],
        [info("y", 1, [5, 12])],
        [
            onnx.numpy_helper.from_array(packed.blob.flatten().numpy(), "b"),
            onnx.numpy_helper.from_array(packed.scales.float().flatten().numpy(), "s"),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(found), x @ quantized.dequantize(), atol=1e-6)


# --- recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe_options", "sentence"),
    [
        ({"quant": "nf4"}, "add --quantizer bnb"),
        ({"quantizer": "bnb"}, "not int4; add --quant nf4"),
        ({"quantizer": "bnb", "quant": "nf4", "bits": 2.0}, "a plan chooses among integer grids"),
        ({"quantizer": "bnb", "quant": "nf4", "code_bits": 8}, "contradicts --quantizer bnb"),
        ({"quantizer": "bnb", "quant": "fp4", "code_group": 16}, "blocks of 32 and more"),
    ],
)
def test_contradictions_are_refused(recipe_options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        Recipe(**recipe_options)


def test_a_missing_package_is_named_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    with pytest.raises(MissingDependencyError, match=r"compot-deploy\[bnb\]"):
        QUANTIZERS["bnb"](weight(), torch.eye(128), Grid(8, 32))
    source = tiny.save(tmp_path / "model")
    assert main([str(source), "--quantizer", "bnb", "--quant", "nf4", "--out", str(tmp_path / "out")]) == 4
    assert "bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize("quant", ["nf4", *nightly("int8")])
def test_both_formats_carry_it_end_to_end(
    quant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tiny.save(tmp_path / "model", num_hidden_layers=1), tmp_path / "out"
    recipe = ["--quantizer", "bnb", "--quant", quant, "--ratio", "0.2", "--allocation", "uniform"]
    recipe += [
        "--format",
        "onnx",
        "--format",
        "huggingface",
        "--rounds",
        "1",
        "--samples",
        "4",
        "--length",
        "32",
    ]
    recipe += ["--evaluation-tokens", "64", "--max-perplexity-ratio", "100"]
    assert main([str(source), *recipe, "--out", str(out)]) == 0
    models = [EXPORTERS[kind].read_model(out / kind).matrices for kind in ("onnx", "huggingface")]
    assert all(same_matrix(models[0][name], models[1][name]) for name in models[0])
    operators = {
        node.op_type for node in onnx.load(out / "onnx/onnx/model.onnx", load_external_data=False).graph.node
    }
    assert ("MatMulBnb4" in operators) == (quant == "nf4")
    records = [record for record in read_manifest(out / "onnx").matrices if record.pairs]
    codebooks = {pair.codes.codebook for record in records for pair in record.pairs}
    assert codebooks == {"nf4" if quant == "nf4" else "integer"}
    report = from_json((out / "onnx/compot/report.json").read_text())
    (beside,) = report.alternatives
    assert beside.bytes == report.sizes.weights, "compared with GPTQ at the same bytes"
    assert beside.name == f"gptq int{8 if quant == 'int8' else 4}/g32"
    table = loss_table(report)
    assert f"method, {beside.name}" in table.columns
    assert all(len(row) == len(table.columns) for row in table.rows)
    capsys.readouterr()
    assert main(["inspect", str(out / "onnx")]) == 0
    assert ("nf4/g32" in capsys.readouterr().out) == (quant == "nf4")
    assert EXPORTERS["onnx"].lint(out / "onnx") == ()


def test_a_wrong_block_of_a_bnb_node_is_found(tmp_path: Path) -> None:
    source, out = tiny.save(tmp_path / "model", num_hidden_layers=1), tmp_path / "out"
    recipe = ["--quantizer", "bnb", "--quant", "fp4", "--format", "onnx", "--rounds", "1", "--samples", "4"]
    recipe += ["--length", "32", "--evaluation-tokens", "64", "--ratio", "0.2", "--allocation", "uniform"]
    main([str(source), *recipe, "--max-perplexity-ratio", "100", "--out", str(out)])
    path = out / "onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "MatMulBnb4")
    attribute = next(a for a in node.attribute if a.name == "block_size")
    attribute.i = 64
    path.write_bytes(model.SerializeToString())
    diagnostics = EXPORTERS["onnx"].lint(out)
    assert [f.severity for f in diagnostics if "should have" in f.sentence or "cross" in f.sentence] == [
        "error"
    ]


def test_other_formats_refuse_tables(tmp_path: Path) -> None:
    recipe = Recipe(quantizer="bnb", quant="nf4")
    source = open_source(tiny.save(tmp_path / "llama"))
    grids = {"dictionary": recipe.dictionary_grid}
    for kind, recipe_options in (("onnx", {"onnx_ops": "qdq"}), ("gguf", {"gguf_layout": "sparse"})):
        exporter = EXPORTERS[kind]
        options = exporter.options(recipe_options)
        with pytest.raises(RecipeError, match="nf4"):
            exporter.check(source, grids, options)
    assert replace(recipe, quant="int8").code_grid == Grid(8, 32)


# --- bitsandbytes' own folder ----------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4", "int8", *nightly("fp4")])
def test_a_plain_model_is_written_in_the_librarys_own_layout(quant: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    source, out = tiny.save(tmp_path / "model", num_hidden_layers=1), tmp_path / "out"
    recipe = [
        "--quantizer",
        "bnb",
        "--quant",
        quant,
        "--method",
        "plain",
        "--embeddings",
        "none",
        "--head",
        "none",
    ]
    recipe += ["--format", "huggingface", "--samples", "4", "--length", "32", "--evaluation-tokens", "64"]
    assert main([str(source), *recipe, "--max-perplexity-ratio", "100", "--out", str(out)]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(loaded).__name__ == "LlamaForCausalLM", "no class of ours"
    kind = "Linear8bitLt" if quant == "int8" else "Linear4bit"
    assert type(loaded.model.layers[0].mlp.down_proj).__name__ == kind
    model = EXPORTERS["huggingface"].read_model(out)
    multiplied_out = dequantized(loaded)
    for name, matrix in model.matrices.items():
        found = multiplied_out.get_submodule(name).weight.T
        assert torch.allclose(found, matrix.dequantize(), rtol=1e-6, atol=0), name
    promised = sum(record.bytes for record in read_manifest(out).matrices)
    norms = sum(tensor.nbytes for tensor in model.tensors.values())
    assert sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values()) == promised + norms
    assert main(["check", str(out), "--min-positions", "64"]) == 0


def test_a_changed_bnb_folder_is_one_clear_sentence(tmp_path: Path) -> None:
    source, out = tiny.save(tmp_path / "model", num_hidden_layers=1), tmp_path / "out"
    recipe = [
        "--quantizer",
        "bnb",
        "--quant",
        "nf4",
        "--method",
        "plain",
        "--embeddings",
        "none",
        "--head",
        "none",
    ]
    recipe += ["--format", "huggingface", "--samples", "4", "--length", "32", "--evaluation-tokens", "64"]
    main([str(source), *recipe, "--max-perplexity-ratio", "100", "--out", str(out)])
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    q = "model.layers.0.self_attn.q_proj"

    def attempt(sentence: str) -> None:
        with pytest.raises(ArtifactError, match=sentence):
            huggingface_runner(out)

    (out / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Config"}}))
    attempt("auto_map points to code")
    (out / "config.json").write_text(json.dumps({**config, "compot": {"format": 1, "linears": "nf4/g64"}}))
    attempt("is not as compot-deploy writes it: another quant_state")
    (out / "config.json").write_text(json.dumps(config))
    for changed, sentence in (
        ({f"{q}.weight.absmax": tensors[f"{q}.weight.absmax"] * 1.0001}, "no float16"),
        ({f"{q}.weight.quant_map": torch.zeros(16)}, "another table"),
        ({f"{q}.weight": tensors[f"{q}.weight"][:-16]}, "is not as compot-deploy writes it"),
    ):
        save_file({**tensors, **changed}, out / "model.safetensors", metadata={"format": "pt"})
        attempt(sentence)
        assert [diagnostic.severity for diagnostic in EXPORTERS["huggingface"].lint(out)] == ["error"]
