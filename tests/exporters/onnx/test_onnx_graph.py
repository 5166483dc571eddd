"""Laws of the graph: it computes what transformers computes, whatever its matrices are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from packaging.version import Version
from reference_onnx import (
    MODELS,
    OnnxRun,
    compressed,
    nmse,
    padded_batch,
    rounded,
    share_dictionaries,
    source_of,
    torch_logits,
    torch_model,
    two_pairs,
    with_matrices,
)
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense, Matrix, Quantized
from compot_deploy.errors import ArtifactError, RecipeError, UnsupportedModelError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.onnx.nodes import node_path
from compot_deploy.exporters.onnx.options import OnnxOptions
from compot_deploy.exporters.onnx.session import open_session, with_accuracy_level
from compot_deploy.exporters.onnx.shape import check_supported, decoder_shape, portable_config
from compot_deploy.exporters.onnx.tensors import GRAPH
from compot_deploy.models.compressed import CompressedModel

onnxruntime = pytest.importorskip("onnxruntime")
EXPORTER = EXPORTERS["onnx"]


def since(version: str, what: str) -> pytest.MarkDecorator:
    """Skip where the installed runtime is too old."""
    old = Version(onnxruntime.__version__) < Version(version)
    return pytest.mark.skipif(old, reason=f"{what} came with onnxruntime {version}")


def export(model: CompressedModel, folder: Path, options: OnnxOptions = OnnxOptions()) -> Path:  # noqa: B008
    folder.mkdir()
    EXPORTER.write(model, folder, options)
    return folder


def nodes(folder: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(folder / GRAPH, load_external_data=False).graph.node)


def quantized(name: str, weight: Tensor) -> Matrix:
    """int4 linears in groups of 32, int8 embedding."""
    return rounded(weight, Grid(8 if "embed" in name else 4, 32))


def factorized(name: str, weight: Tensor) -> Matrix:
    """Two pairs for every linear of a block, int8 embedding and head."""
    return two_pairs(name, weight) if "layers" in name else rounded(weight, Grid(8, 32))


# --- floating point


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_with_padding_prefill_and_decoding(name: str, tmp_path: Path) -> None:
    reference = torch_model(MODELS[name])
    folder = export(compressed(reference), tmp_path / "model")
    tokens, mask = padded_batch()
    expected = torch_logits(reference, tokens, mask)
    real = mask.bool()

    whole = OnnxRun(open_session(folder, threads=1))(tokens, mask)
    assert (whole - expected)[real].abs().max() < 1e-4

    stepwise = OnnxRun(open_session(folder, threads=1))  # past of 0, then of 8, then token by token
    pieces = [stepwise(tokens[:, :8], mask[:, :8])]
    pieces += [stepwise(tokens[:, i : i + 1], mask[:, : i + 1]) for i in range(8, 12)]
    assert (torch.cat(pieces, dim=1) - expected)[real].abs().max() < 1e-4


def test_a_chunk_of_several_tokens_may_follow_a_past(tmp_path: Path) -> None:
    reference = torch_model(MODELS["mistral-window"])
    run = OnnxRun(open_session(export(compressed(reference), tmp_path / "model"), threads=1))
    tokens, mask = (rows[1:2] for rows in padded_batch())  # onnxruntime allows it for a batch of one
    run(tokens[:, :5], mask[:, :5])
    found = run(tokens[:, 5:], mask)
    assert (found - torch_logits(reference, tokens, mask)[:, 5:]).abs().max() < 1e-4


def test_positions_up_to_the_last_of_the_context_are_right(tmp_path: Path) -> None:
    reference = torch_model(MODELS["llama-yarn"])
    session = open_session(export(compressed(reference), tmp_path / "model"), threads=1)
    tokens = torch.randint(3, 96, (1, 128))
    mask = torch.ones_like(tokens)
    assert (OnnxRun(session)(tokens, mask) - torch_logits(reference, tokens, mask)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "llama-llama3-tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_stored_in_sixteen_bits_without_a_change(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    reference = torch_model(MODELS[name])
    model = compressed(reference, lambda _, weight: Dense(weight.to(dtype)))
    kind: Any = str(dtype).removeprefix("torch.")
    narrow = export(model, tmp_path / "narrow", OnnxOptions(floats=kind))
    wide = export(model, tmp_path / "wide")
    tokens, mask = padded_batch()
    logits = [OnnxRun(open_session(folder, threads=1))(tokens, mask) for folder in (narrow, wide)]
    assert (logits[0] - logits[1]).abs().max() < 1e-5
    sizes = [(folder / "onnx/model.onnx_data").stat().st_size for folder in (narrow, wide)]
    assert sizes[0] < 0.75 * sizes[1]
    expected = torch_logits(with_matrices(reference, model.matrices), tokens, mask)
    assert (logits[0] - expected)[mask.bool()].abs().max() < 1e-4


def test_a_float_type_that_loses_bits_is_refused(tmp_path: Path) -> None:
    model = compressed(torch_model(MODELS["llama"]))
    with pytest.raises(ValueError, match="cannot be stored in bfloat16 without an error"):
        export(model, tmp_path / "model", OnnxOptions(floats="bfloat16"))


# --- integers


@pytest.mark.parametrize("name", ["llama", "llama-llama3-tied", "qwen2-tied", "qwen3", "llama-biases"])
@pytest.mark.parametrize("scheme", [quantized, factorized])
def test_level_0_computes_the_integers_exactly(
    name: str, scheme: Callable[[str, Tensor], Matrix], tmp_path: Path
) -> None:
    reference = torch_model(MODELS[name])
    model = compressed(reference, scheme)
    folder = export(model, tmp_path / "model")
    tokens, mask = padded_batch()
    real = mask.bool()
    expected = torch_logits(with_matrices(reference, model.matrices), tokens, mask)[real]
    found = OnnxRun(open_session(folder, accuracy_level=0, threads=1))(tokens, mask)[real]
    assert nmse(found, expected) < 1e-9
    shipped = OnnxRun(open_session(folder, threads=1))(tokens, mask)[real]
    assert 1e-9 < nmse(shipped, expected) < 1e-2  # int8 activations


@pytest.mark.parametrize("bits", [pytest.param(2, marks=since("1.24", "MatMulNBits of 2 bits")), 4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_every_bit_width_and_a_last_partial_group(bits: int, group: int, tmp_path: Path) -> None:
    settings = {**MODELS["qwen2-tied"], "hidden_size": 80, "intermediate_size": 88, "num_attention_heads": 5}
    settings["num_key_value_heads"] = 1
    reference = torch_model(settings)
    model = compressed(
        reference, lambda name, w: rounded(w, Grid(max(bits, 4) if "embed" in name else bits, group))
    )
    tokens, mask = padded_batch()
    expected = torch_logits(with_matrices(reference, model.matrices), tokens, mask)[mask.bool()]
    session = open_session(export(model, tmp_path / "model"), accuracy_level=0, threads=1)
    assert nmse(OnnxRun(session)(tokens, mask)[mask.bool()], expected) < 1e-9


@pytest.mark.parametrize("bits", [4, 8])
def test_standard_operators_compute_the_same(bits: int, tmp_path: Path) -> None:
    def scheme(name: str, weight: Tensor) -> Matrix:
        return rounded(weight, Grid(8 if "embed" in name else bits, 32))

    model = compressed(torch_model(MODELS["llama"]), scheme)
    contrib = export(model, tmp_path / "contrib")
    standard = export(model, tmp_path / "standard", OnnxOptions(ops="qdq"))
    assert "MatMulNBits" not in {node.op_type for node in nodes(standard)}
    tokens, mask = padded_batch()
    one, two = (
        OnnxRun(open_session(folder, accuracy_level=0, threads=1))(tokens, mask)[mask.bool()]
        for folder in (contrib, standard)
    )
    assert nmse(one, two) < 1e-9


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=since("1.25", "fusion of 8 bits"))])
def test_standard_operators_are_fused_to_the_same_kernel(bits: int, tmp_path: Path) -> None:
    model = compressed(torch_model(MODELS["llama"]), lambda _, weight: rounded(weight, Grid(bits, 32)))
    folder = export(model, tmp_path / "model", OnnxOptions(ops="qdq"))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    kinds = Counter(node.op_type for node in optimized.graph.node)
    assert kinds["DequantizeLinear"] == 0
    assert kinds["MatMulNBits"] == 7 * 2 + 1


def test_a_shared_dictionary_is_stored_and_computed_once(tmp_path: Path) -> None:
    reference = torch_model(MODELS["qwen3"])
    model = compressed(reference, factorized)
    block = "model.layers.0.self_attn"
    names = [f"{block}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    shared = replace(model, matrices=share_dictionaries(model.matrices, names, f"{block}.input"))
    folder, plain = export(shared, tmp_path / "shared"), export(model, tmp_path / "plain")
    graph_nodes = nodes(folder)
    readers = Counter(value for node in graph_nodes for value in node.input)
    for word in ("dictionary", "dictionary_2"):
        assert readers[f"/model/layers.0/attn/input/{word}/MatMul/output_0"] == 3
    assert sum("/attn/" in node.name and "/dictionary" in node.name for node in graph_nodes) < sum(
        "/attn/" in node.name and "/dictionary" in node.name for node in nodes(plain)
    )
    tokens, mask = padded_batch()
    expected = torch_logits(with_matrices(reference, shared.matrices), tokens, mask)[mask.bool()]
    found = OnnxRun(open_session(folder, accuracy_level=0, threads=1))(tokens, mask)[mask.bool()]
    assert nmse(found, expected) < 1e-9


def test_a_dictionary_cannot_be_shared_across_activations(tmp_path: Path) -> None:
    model = compressed(torch_model({**MODELS["llama"], "num_key_value_heads": 4}), factorized)
    block = "model.layers.0.self_attn"
    names = [f"{block}.q_proj", f"{block}.o_proj"]
    with pytest.raises(ValueError, match="read different activations"):
        export(replace(model, matrices=share_dictionaries(model.matrices, names, "both")), tmp_path / "model")


def test_different_dictionaries_cannot_have_one_name(tmp_path: Path) -> None:
    model = compressed(
        torch_model(MODELS["llama"]),
        lambda name, w: (
            two_pairs(name, w, "same") if "layers.0.self_attn.q" in name or ".k_" in name else Dense(w)
        ),
    )
    with pytest.raises(ValueError, match="Two different dictionaries have the name same"):
        export(model, tmp_path / "model")


# --- structure


def test_node_names_are_paths(tmp_path: Path) -> None:
    assert node_path("model.layers.10.self_attn.q_proj") == "/model/layers.10/attn/q_proj"
    assert node_path("lm_head") == "/lm_head"
    names = {
        node.name
        for node in nodes(export(compressed(torch_model(MODELS["llama"]), factorized), tmp_path / "model"))
    }
    for name in (
        "/model/embed_tokens/Gather",
        "/model/layers.0/attn/q_proj/dictionary/MatMul",
        "/model/layers.0/attn/q_proj/codes/MatMul",
        "/model/layers.1/mlp/down_proj/dictionary_2/MatMul",
        "/model/layers.1/mlp/down_proj/codes_2/MatMul",
        "/lm_head/MatMul",
    ):
        assert name in names


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    sizes = {}
    for name, tied in (("tied", True), ("untied", False)):
        settings = {**MODELS["qwen2-tied"], "tie_word_embeddings": tied, "vocab_size": 4096}
        for kind, scheme in (("int8", quantized), ("float", None)):
            model = compressed(torch_model(settings), scheme)
            folder = export(model, tmp_path / f"{name}-{kind}")
            sizes[name, kind] = (folder / "onnx/model.onnx_data").stat().st_size
    table = 4096 * 64
    assert sizes["untied", "float"] - sizes["tied", "float"] >= table * 4
    assert sizes["untied", "int8"] - sizes["tied", "int8"] >= table * 4.5 / 8  # the untied head is int4
    assert sizes["tied", "int8"] < table * 2


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = compressed(torch_model(MODELS["qwen3"]), factorized)
    one, two = export(model, tmp_path / "one"), export(model, tmp_path / "two")
    for file in ("onnx/model.onnx", "onnx/model.onnx_data", "config.json", "genai_config.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes()


def test_changing_the_level_writes_nothing_and_changes_only_the_level(tmp_path: Path) -> None:
    folder = export(compressed(torch_model(MODELS["llama"]), quantized), tmp_path / "model")
    before = (folder / GRAPH).read_bytes()
    changed = onnx.load_from_string(with_accuracy_level(folder / GRAPH, 0).graph)
    assert (folder / GRAPH).read_bytes() == before
    levels = [a for node in changed.graph.node for a in node.attribute if a.name == "accuracy_level"]
    assert len(levels) == 15 and {a.i for a in levels} == {0}
    for attribute in levels:
        attribute.i = 4
    assert changed.SerializeToString(deterministic=True) == before


def test_the_level_reaches_every_product_wherever_it_is(tmp_path: Path) -> None:
    """One without the attribute, one in a branch, one in a function."""

    def product(name: str, **attributes: int) -> onnx.NodeProto:
        return onnx.helper.make_node("MatMulNBits", [], [name], domain="com.microsoft", **attributes)

    branch = onnx.helper.make_graph([product("b", accuracy_level=4)], "branch", [], [])
    nodes = [product("a"), onnx.helper.make_node("If", ["a"], ["c"], then_branch=branch, else_branch=branch)]
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    function = onnx.helper.make_function("compot", "F", [], ["d"], [product("d")], opsets)
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []), functions=[function])
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())

    changed = onnx.load_from_string(with_accuracy_level(path, 0).graph)
    first, second = changed.graph.node
    products = [first, *(node for a in second.attribute for node in a.g.node), *changed.functions[0].node]
    assert [node.op_type for node in products] == ["MatMulNBits"] * 4
    assert [(a.name, a.i) for node in products for a in node.attribute] == [("accuracy_level", 0)] * 4


def test_a_damaged_graph_is_one_error_at_any_level(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / GRAPH).write_bytes(b"\xff" * 64)
    for level in (None, 0):
        with pytest.raises(ArtifactError, match="is not an ONNX graph, or it is damaged"):
            open_session(tmp_path, level)


def test_the_model_is_unchanged_by_the_export(tmp_path: Path) -> None:
    model = compressed(torch_model(MODELS["llama-llama3-tied"]), quantized)
    kept = {
        name: (m.integers.clone(), m.scales.clone())
        for name, m in model.matrices.items()
        if isinstance(m, Quantized)
    }
    tensors = {name: tensor.clone() for name, tensor in model.tensors.items()}
    export(model, tmp_path / "model")
    for name, (integers, scales) in kept.items():
        matrix = model.matrices[name]
        assert isinstance(matrix, Quantized)
        assert torch.equal(matrix.integers, integers) and torch.equal(matrix.scales, scales)
    assert all(torch.equal(model.tensors[name], tensor) for name, tensor in tensors.items())


# --- what the configuration says


@pytest.mark.parametrize("name", MODELS)
def test_both_styles_of_configuration_mean_the_same(name: str) -> None:
    config = compressed(torch_model(MODELS[name])).config
    both = portable_config(config)
    old = {k: v for k, v in both.items() if k != "rope_parameters"}
    new = {k: v for k, v in both.items() if k not in ("rope_scaling", "rope_theta")}
    assert portable_config(old) == portable_config(new) == both == portable_config(both)


def test_defaults_of_transformers_fill_a_terse_configuration() -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "intermediate_size": 80,
        "vocab_size": 99,
        "sliding_window": 7,  # a llama ignores it
    }
    model = compressed(torch_model(MODELS["llama"]))
    shape = decoder_shape(model.architecture, config)
    assert (shape.key_value_heads, shape.head_size, shape.norm_epsilon) == (4, 16, 1e-6)
    assert shape.windows == (None, None, None)


def test_windows_are_those_of_the_model_class() -> None:
    for name, windows in (("mistral-window", (5, 5)), ("qwen2-window", (None, 4)), ("qwen3", (None, None))):
        model = compressed(torch_model(MODELS[name]))
        assert decoder_shape(model.architecture, model.config).windows == windows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "type 'longrope' is not supported in ONNX",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"head_dim": 12}, "heads of 12 is not supported in ONNX: GroupQueryAttention takes multiples of 8"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs between layer types"),
    ],
)
def test_what_the_graph_cannot_express_is_refused_from_the_configuration(
    change: dict[str, Any], message: str
) -> None:
    model = compressed(torch_model(MODELS["llama"]))
    config = {**model.config, "rope_scaling": None, **change}
    with pytest.raises(UnsupportedModelError, match=message):
        check_supported(model.architecture, config)


def test_grids_and_contexts_out_of_range_are_refused_before_any_work(tmp_path: Path) -> None:
    source = source_of(MODELS["llama"], tmp_path)
    EXPORTER.check(source, {"dictionary": Grid(4, 32), "codes": Grid(2, 64), "head": None}, OnnxOptions())
    with pytest.raises(RecipeError, match="codes: ONNX stores 2-bit integers in groups of 32, 64 or 128"):
        EXPORTER.check(source, {"codes": Grid(2, 16)}, OnnxOptions())
    with pytest.raises(RecipeError, match="embedding: ONNX stores token embeddings in 2, 4 or 8 bits, not 3"):
        EXPORTER.check(source, {"embedding": Grid(3, 32)}, OnnxOptions())
    with pytest.raises(RecipeError, match="written as qdq in 4 or 8 bits, not 2"):
        EXPORTER.check(source, {"codes": Grid(2, 32)}, OnnxOptions(ops="qdq"))
    with pytest.raises(RecipeError, match="context of 129 tokens is out of range: the model has 1 to 128"):
        EXPORTER.check(source, {}, OnnxOptions(context=129))


def test_a_matrix_of_another_shape_is_named(tmp_path: Path) -> None:
    model = compressed(torch_model(MODELS["llama"]))
    matrices = dict(model.matrices) | {"model.layers.1.mlp.up_proj": Dense(torch.zeros(64, 95))}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is \(64, 95\), and .* \(64, 96\)"):
        export(replace(model, matrices=matrices), tmp_path / "model")


def test_a_factorized_embedding_is_refused(tmp_path: Path) -> None:
    model = compressed(torch_model(MODELS["llama"]), two_pairs)
    with pytest.raises(RecipeError, match="a factorized token embedding cannot be stored"):
        export(model, tmp_path / "model")


def test_a_shorter_context_cuts_the_rotary_tables(tmp_path: Path) -> None:
    reference = torch_model(MODELS["llama"])
    folder = export(compressed(reference), tmp_path / "model", OnnxOptions(context=16))
    run = OnnxRun(open_session(folder, threads=1))
    tokens, mask = padded_batch()
    assert (run(tokens, mask) - torch_logits(reference, tokens, mask))[mask.bool()].abs().max() < 1e-4
    with pytest.raises(Exception, match="total_sequence_length"):
        OnnxRun(run.session)(torch.ones(1, 17, dtype=torch.int64), torch.ones(1, 17, dtype=torch.int64))


def test_a_graph_that_onnxruntime_refuses_is_one_error(tmp_path: Path) -> None:
    folder = export(compressed(torch_model(MODELS["llama"]), quantized), tmp_path / "model")
    (folder / "onnx/model.onnx_data").unlink()
    with pytest.raises(ArtifactError, match="onnxruntime cannot load"):
        open_session(folder)
