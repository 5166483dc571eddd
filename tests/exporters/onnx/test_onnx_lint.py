"""Laws of the lint: it is silent about what the exporter writes, and finds each thing that can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper
from reference_onnx import MODELS, compressed, rounded, torch_model, two_pairs
from torch import Tensor

from compot_deploy.core.diagnostics import Diagnostic
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Matrix
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.onnx.lint.folder import lint_onnx
from compot_deploy.exporters.onnx.options import OnnxOptions
from compot_deploy.exporters.onnx.session import with_accuracy_level
from compot_deploy.exporters.onnx.tensors import DATA, GRAPH

EXPORTER = EXPORTERS["onnx"]
UP = "model.layers.0.mlp.up_proj.weight"


def scheme(name: str, weight: Tensor) -> Matrix:
    return (
        two_pairs(name, weight)
        if "self_attn" in name
        else rounded(weight, Grid(8 if "embed" in name else 4, 32))
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lint") / "model"
    folder.mkdir()
    EXPORTER.write(compressed(torch_model(MODELS["qwen2-tied"]), scheme), folder, OnnxOptions())
    return folder


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    shutil.copytree(clean, tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, edit: Callable[[ModelProto], None]) -> tuple[Diagnostic, ...]:
    """Diagnostics after an edit of the graph."""
    model = onnx.load(folder / GRAPH, load_external_data=False)
    edit(model)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    return lint_onnx(folder)


def node(model: ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def tensor(model: ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def set_attribute(proto: NodeProto, name: str, value: int) -> None:
    for attribute in proto.attribute:
        if attribute.name == name:
            attribute.i = value


def set_entry(proto: TensorProto, key: str, value: str) -> None:
    for entry in proto.external_data:
        if entry.key == key:
            entry.value = value


def overwrite(folder: Path, name: str, data: bytes | None = None) -> None:
    """Replace the first bytes of a tensor where it lies; None fills it with zeros."""
    model = onnx.load(folder / GRAPH, load_external_data=False)
    proto = tensor(model, name)
    entries = {entry.key: entry.value for entry in proto.external_data}
    if entries:
        with (folder / DATA).open("r+b") as file:
            file.seek(int(entries["offset"]))
            file.write(bytes(int(entries["length"])) if data is None else data)
    else:
        size = len(proto.raw_data)
        proto.raw_data = bytes(size) if data is None else data + proto.raw_data[len(data) :]
        (folder / GRAPH).write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "name", ["llama", "llama-llama3-tied", "mistral-window", "qwen3", "llama-small-heads"]
)
@pytest.mark.parametrize("options", [OnnxOptions(), OnnxOptions(ops="qdq")])
def test_nothing_is_found_in_what_the_exporter_writes(
    name: str, options: OnnxOptions, tmp_path: Path
) -> None:
    for kind in (None, scheme):
        target = tmp_path / str(kind is None)
        target.mkdir()
        EXPORTER.write(compressed(torch_model(MODELS[name]), kind), target, options)
        assert lint_onnx(target) == ()


MATMUL = "/model/layers.0/mlp/up_proj/MatMul"


@pytest.mark.parametrize(
    ("edit", "severity", "where", "sentence"),
    [
        (lambda m: setattr(m, "ir_version", 14), "error", "ir_version", "IR 14 does not load"),
        (lambda m: setattr(m.opset_import[0], "version", 28), "error", "opset", "Opset 28 of ai.onnx"),
        (
            lambda m: m.opset_import.append(helper.make_opsetid("mine", 1)),
            "error",
            "opset",
            "domain mine needs a library",
        ),
        (lambda m: set_attribute(node(m, MATMUL), "bits", 3), "error", MATMUL, "3 bits: onnxruntime runs"),
        (lambda m: set_attribute(node(m, MATMUL), "block_size", 96), "error", MATMUL, "Blocks of 96"),
        (
            lambda m: set_attribute(node(m, MATMUL), "block_size", 64),
            "error",
            MATMUL,
            "Input 1 has the shape",
        ),
        (lambda m: set_attribute(node(m, MATMUL), "N", 95), "error", MATMUL, "and should have (95, 2, 16)"),
        (
            lambda m: set_attribute(node(m, MATMUL), "accuracy_level", 0),
            "warning",
            MATMUL,
            "accuracy_level is 0",
        ),
        (lambda m: node(m, MATMUL).input.extend(["", UP + ".integers"]), "error", MATMUL, "has a g_idx"),
        (lambda m: node(m, MATMUL).input.append(UP + ".scales"), "warning", MATMUL, "has zero points"),
        (
            lambda m: setattr(node(m, "/model/embed_tokens/Gather").attribute[0], "i", 3),
            "error",
            "/model/embed_tokens/Gather",
            "3 bits: onnxruntime runs",
        ),
        (lambda m: setattr(node(m, MATMUL), "name", "up"), "warning", "up", "name is not a path"),
        (
            lambda m: setattr(node(m, MATMUL), "name", "/lm_head/MatMul"),
            "error",
            "/lm_head/MatMul",
            "2 nodes have this name",
        ),
        (
            lambda m: node(m, MATMUL).input.__setitem__(0, "nothing"),
            "error",
            MATMUL,
            "It reads nothing, which",
        ),
        (
            lambda m: setattr(m.graph.input[0], "name", "tokens"),
            "error",
            "inputs",
            "input input_ids is missing",
        ),
        (
            lambda m: setattr(m.graph.output[0], "name", "scores"),
            "error",
            "outputs",
            "output logits is missing",
        ),
        (
            lambda m: setattr(m.graph.output[0], "name", "scores"),
            "error",
            "outputs",
            "Nothing computes the output",
        ),
        (lambda m: m.graph.input.pop(), "error", "inputs", "input past_key_values.1.value"),
        (
            lambda m: set_entry(tensor(m, UP + ".integers"), "location", "../x"),
            "error",
            UP,
            "outside the folder",
        ),
        (lambda m: set_entry(tensor(m, UP + ".integers"), "location", "x"), "error", UP, "cannot be read"),
        (lambda m: set_entry(tensor(m, UP + ".integers"), "offset", "99999999"), "error", UP, "is truncated"),
        (
            lambda m: set_entry(tensor(m, UP + ".integers"), "length", "1000"),
            "error",
            UP,
            "3,072 bytes, and 1,000",
        ),
        (lambda m: set_entry(tensor(m, UP + ".integers"), "offset", "0"), "error", "", "overlap those of"),
        (
            lambda m: setattr(tensor(m, UP + ".scales"), "data_type", TensorProto.STRING),
            "error",
            UP,
            "type STRING",
        ),
        (
            lambda m: m.graph.initializer.append(helper.make_tensor("idle", 1, [1], b"\0\0\x80?", raw=True)),
            "warning",
            "idle",
            "nothing reads it",
        ),
        (
            lambda m: set_entry(tensor(m, "model.embed_tokens.integers.blocks"), "offset", "64"),
            "error",
            "/lm_head/MatMul",
            "does not read the table of the embedding",
        ),
    ],
)
def test_each_fault_of_a_graph_is_found(
    folder: Path, edit: Callable[[ModelProto], Any], severity: str, where: str, sentence: str
) -> None:
    diagnostics = change(folder, edit)
    assert any(f.severity == severity and where in f.where and sentence in f.sentence for f in diagnostics), (
        diagnostics
    )


def test_what_only_newer_runtimes_load_is_noted_once(tmp_path: Path) -> None:
    def two_bits(name: str, weight: Tensor) -> Matrix:
        return rounded(weight, Grid(2, 32)) if "mlp" in name else rounded(weight, Grid(8, 32))

    EXPORTER.write(compressed(torch_model(MODELS["llama"]), two_bits), tmp_path, OnnxOptions())
    (diagnostic,) = lint_onnx(tmp_path)
    assert diagnostic.severity == "note" and "6 products with 2 bits" in diagnostic.sentence


def test_a_second_copy_of_a_tied_table_is_found(folder: Path) -> None:
    def edit(model: ModelProto) -> None:
        head = node(model, "/lm_head/MatMul")
        for entry in head.metadata_props:
            entry.value = entry.value.replace("tied_head", "plain")

    (diagnostic,) = change(folder, edit)
    assert diagnostic.severity == "warning" and "the graph stores both" in diagnostic.sentence


@pytest.mark.parametrize(
    ("name", "values", "severity", "sentence"),
    [
        (UP + ".scales", np.array([np.nan], np.float16).tobytes(), "error", "1 of its 192 values are NaN"),
        (UP + ".scales", np.array([np.inf] * 2, np.float16).tobytes(), "error", "2 of its 192 values"),
        (UP + ".scales", None, "warning", "Every value is zero"),
        (UP + ".integers", b"\x88" * 3072, "warning", "Every integer is zero"),
        ("rotary.cosine", None, "warning", "Every value is zero"),
    ],
)
def test_values_that_cannot_be_meant_are_found(
    folder: Path, name: str, values: bytes | None, severity: str, sentence: str
) -> None:
    overwrite(folder, name, values)
    (diagnostic,) = lint_onnx(folder)
    assert (diagnostic.severity, diagnostic.where) == (severity, f"{GRAPH}: {name}")
    assert sentence in diagnostic.sentence


def test_trailing_bytes_are_found(folder: Path) -> None:
    with (folder / DATA).open("ab") as file:
        file.write(b"extra")
    (diagnostic,) = lint_onnx(folder)
    assert (diagnostic.severity, diagnostic.where) == (
        "warning",
        DATA,
    ) and "5 bytes behind" in diagnostic.sentence


def test_missing_and_damaged_files_are_found(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text("{")
    genai = json.loads((folder / "genai_config.json").read_text())
    genai["model"]["decoder"]["filename"] = "model.onnx"
    (folder / "genai_config.json").write_text(json.dumps(genai))
    found = [(f.severity, f.where) for f in lint_onnx(folder)]
    assert found == [
        ("error", "config.json"),
        ("error", "genai_config.json"),
        ("warning", "generation_config.json"),
    ]


def test_an_empty_generation_config_is_nothing_wrong(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{}")
    assert lint_onnx(folder) == ()


def test_layers_that_config_json_contradicts_are_found(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (diagnostic,) = lint_onnx(folder)
    assert "caches of 2 layers, and config.json says 3" in diagnostic.sentence


def test_a_graph_that_cannot_be_parsed_is_one_diagnostic(folder: Path) -> None:
    (folder / GRAPH).write_bytes(b"\xff" * 64)
    assert [f.severity for f in lint_onnx(folder)] == ["error"]
    (folder / GRAPH).unlink()
    assert "missing" in lint_onnx(folder)[0].sentence


def test_the_oracle_is_told_from_the_shipped_file(folder: Path) -> None:
    leveled = with_accuracy_level(folder / GRAPH, 0).graph
    (folder / GRAPH).write_bytes(leveled)
    diagnostics = lint_onnx(folder)
    assert len(diagnostics) == sum(
        n.op_type == "MatMulNBits" for n in onnx.load_from_string(leveled).graph.node
    )
    assert {f.severity for f in diagnostics} == {"warning"}
