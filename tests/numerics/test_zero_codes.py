"""A code that is zero stays exactly zero in every format, as whoever runs the file computes it.

Not by our own readers: ONNX Runtime multiplies the stored codes with the identity, gguf-py dequantizes what it
knows, and planes are taken apart byte by byte after docs/gguf-layout.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from onnx import TensorProto, helper
from reference_gguf import compressed, shared_change
from reference_onnx import MODELS, rounded, sparse_pair, torch_model, two_pairs
from reference_onnx import compressed as compressed_torch
from torch import Tensor

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Factorized, Matrix, Quantized
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.writer import write
from compot_deploy.exporters.onnx.options import OnnxOptions
from compot_deploy.exporters.onnx.tensors import GRAPH
from compot_deploy.models.compressed import CompressedModel


def codes_of(model: CompressedModel) -> dict[tuple[str, int], Quantized]:
    """Codes of every pair, by matrix and position."""
    return {
        (name, position): pair.codes
        for name, matrix in model.matrices.items()
        if isinstance(matrix, Factorized)
        for position, pair in enumerate(matrix.pairs)
        if isinstance(pair.codes, Quantized)
    }


def computed_by_onnxruntime(folder: Path, atoms: dict[tuple[str, int], int]) -> dict[tuple[str, int], Tensor]:
    """What onnxruntime multiplies with: each product with codes by itself, fed with the identity."""
    import onnxruntime

    model = onnx.load(folder / GRAPH)
    producers = {output: node for node in model.graph.node for output in node.output if output}
    found = {}
    for node in model.graph.node:
        metadata = {entry.key: entry.value for entry in node.metadata_props}
        if metadata.get("compot.role") != "codes":
            continue
        key = metadata["compot.matrix"], int(metadata["compot.pair"])
        needed = [node]
        wanted = list(node.input[1:])
        while wanted:
            producer = producers.get(wanted.pop())
            if producer is not None:
                needed.insert(0, producer)
                wanted += list(producer.input)
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
        used = {name for one in needed for name in one.input}
        graph = helper.make_graph(
            needed,
            "codes",
            [helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, [atoms[key]] * 2)],
            [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)],
            [tensor for tensor in model.graph.initializer if tensor.name in used],
        )
        part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        session = onnxruntime.InferenceSession(
            part.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (values,) = session.run(None, {node.input[0]: np.eye(atoms[key], dtype=np.float32)})
        found[key] = torch.from_numpy(values)
    return found


def sparse(name: str, weight: Tensor) -> Matrix:
    """2:4 codes for the MLP, every other code elsewhere; tables in 8 bits."""
    if "layers" not in name:
        return rounded(weight, Grid(8, 32))
    return sparse_pair(name, weight) if "mlp" in name else two_pairs(name, weight)


def in_three_bits(name: str, weight: Tensor) -> Matrix:
    """The same with codes of 3 bits."""
    matrix = sparse(name, weight)
    if not isinstance(matrix, Factorized):
        return matrix
    return Factorized(
        tuple(replace(pair, codes=rounded(pair.codes.dequantize(), Grid(3, 16))) for pair in matrix.pairs)
    )


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        (OnnxOptions(), sparse),
        (OnnxOptions(ops="qdq"), sparse),
        (OnnxOptions(codes="packed"), sparse),
        (OnnxOptions(codes="packed"), in_three_bits),
    ],
    ids=["nbits", "qdq", "2:4 packed", "3 bits packed"],
)
def test_zero_codes_are_zero_in_onnxruntime(tmp_path: Path, options: OnnxOptions, scheme: Any) -> None:
    model = compressed_torch(torch_model(MODELS["llama"]), scheme)
    EXPORTERS["onnx"].write(model, tmp_path, options)
    codes = codes_of(model)
    found = computed_by_onnxruntime(tmp_path, {key: leaf.shape[0] for key, leaf in codes.items()})
    assert set(found) == set(codes)
    for key, leaf in codes.items():
        zero = leaf.integers == 0
        assert float(zero.float().mean()) > 0.2 or key[1] == 0
        assert torch.equal(found[key] == 0, zero), key
        torch.testing.assert_close(found[key], leaf.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", [sparse, in_three_bits], ids=["4 bits", "3 bits"])
def test_zero_codes_are_zero_in_transformers(tmp_path: Path, scheme: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = compressed_torch(torch_model(MODELS["llama"]), scheme)
    exporter = EXPORTERS["huggingface"]
    exporter.write(model, tmp_path, exporter.options({}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    codes = codes_of(model)
    assert len(codes) > 7
    for (name, position), leaf in codes.items():
        product = loaded.get_submodule(f"{name}.codes{position}")
        with torch.no_grad():
            values = product(torch.eye(leaf.shape[0]))
        zero = leaf.integers == 0
        assert float(zero.float().mean()) > 0.2 or position == 0
        assert torch.equal(values == 0, zero), name
        torch.testing.assert_close(values, leaf.dequantize(), rtol=1e-6, atol=0)


def planes_of_two_of_four(row: np.ndarray[Any, Any], inputs: int, group: int) -> list[int]:
    """4-bit integers of one output in the pattern 2:4, byte by byte: scales, then records of 64 inputs."""
    data = row.view(np.uint8)[2 * -(-inputs // group) :].tolist()
    result = []
    for start in range(0, len(data), 24):
        values, positions = data[start : start + 16], data[start + 16 : start + 24]
        unit = [0] * 64
        for slot in range(32):
            value = (values[slot % 16] >> (4 * (slot // 16))) & 15
            position = (positions[slot % 8] >> (2 * (slot // 8))) & 3
            unit[4 * (slot // 2) + position] = value - 8
        result += unit
    return result[:inputs]


@pytest.mark.parametrize("layout", ["factorized", "sparse"])
def test_zero_codes_are_zero_in_gguf_files(tmp_path: Path, layout: Any) -> None:
    folder = tiny.save(tmp_path / "model", "qwen2", num_hidden_layers=1)  # no reordered outputs
    model = compressed(folder, shared_change(Grid(4, 32), Pattern(2, 4), 0.6, round_to=4), Grid(8, 32))
    write(model, tmp_path / "m.gguf", GgufOptions(layout=layout))
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    stems = {"self_attn.q_proj": "attn_q", "self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down"}
    for path, stem in stems.items():
        leaf = codes_of(model)[f"model.layers.0.{path}", 0]
        stored = tensors[f"blk.0.{stem}.code.weight"]
        inputs, outputs = leaf.shape
        assert inputs > 32
        if layout == "factorized":
            values = torch.from_numpy(dequantize(stored.data, stored.tensor_type)).T[:inputs]
        else:
            rows = stored.data.reshape(outputs, -1)
            values = torch.tensor([planes_of_two_of_four(row, inputs, 32) for row in rows]).T
            assert torch.equal(values, leaf.integers.long())
        zero = leaf.integers == 0
        assert float(zero.float().mean()) >= 0.5
        assert torch.equal(values == 0, zero), path
