"""Laws of the ONNX folder: what goes in comes out bit for bit, and every consumer generates the same text."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import same_matrix
from onnx import TensorProto
from onnx_folders import EXPORTER, export, int4, save_tokenizer
from reference_onnx import (
    MODELS,
    OnnxRun,
    compressed,
    padded_batch,
    rounded,
    share_dictionaries,
    torch_model,
    two_pairs,
)
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense, Factorized, Matrix
from compot_deploy.core.storage import matrix_bytes
from compot_deploy.errors import ArtifactError, InputError, MissingDependencyError, RecipeError
from compot_deploy.exporters.artifact import Provenance, describe, verify, write_manifest
from compot_deploy.exporters.onnx.decoder import build_decoder
from compot_deploy.exporters.onnx.options import OnnxOptions
from compot_deploy.exporters.onnx.session import open_session
from compot_deploy.exporters.onnx.tensors import DATA, GRAPH, TensorReader, TensorWriter
from compot_deploy.exporters.staging import staged_folder


def mixed(name: str, weight: Tensor) -> Matrix:
    """Some of everything: pairs, plain int4 and int2, dense, int8 embedding."""
    if "embed" in name or "lm_head" in name:
        return rounded(weight, Grid(8, 32))
    if "self_attn" in name:
        return two_pairs(name, weight)
    if "gate" in name:
        return rounded(weight, Grid(2, 64))
    return Dense(weight) if "up" in name else rounded(weight, Grid(4, 128))


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
    def scheme(name: str, weight: Tensor) -> Matrix:
        return rounded(weight, Grid(8, 32)) if "embed" in name else int4(name, weight)

    model = compressed(torch_model(MODELS["qwen2-tied"]), scheme)
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


def test_options_come_from_a_recipe() -> None:
    assert EXPORTER.options({"onnx_ops": "qdq", "ratio": 0.2}) == OnnxOptions(ops="qdq")
    with pytest.raises(RecipeError, match="--onnx-ops fast: choose one of matmulnbits, qdq"):
        EXPORTER.options({"onnx_ops": "fast"})


def test_a_missing_runtime_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"compot-deploy\[onnx\]"):
        open_session(tmp_path)
