"""Models small enough to be understood, for the tests of the accuracy checker.

The toy decoder has no attention: its state is the running sum of the embeddings of all tokens so far,

    logits[t] = tanh(E[token 0] + … + E[token t]) W

with W int4 on a grid. It is written twice, in torch and as an ONNX graph with the inputs and outputs of a
decoder, the sum being taken over the key cache, so a wrong cache, mask or position changes the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from compot_deploy.accuracy.runner import greedy, stream
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized

VOCABULARY, WIDTH, BLOCK = 40, 64, 32


def toy_weights(seed: int = 0) -> tuple[Tensor, Quantized]:
    """Embedding (vocabulary, width) and the output matrix (width, vocabulary)."""
    generator = torch.Generator().manual_seed(seed)
    embedding = 0.5 * torch.randn(VOCABULARY, WIDTH, generator=generator)
    integers = torch.randint(-8, 8, (WIDTH, VOCABULARY), generator=generator).to(torch.int8)
    scales = (0.05 + 0.05 * torch.rand(WIDTH // BLOCK, VOCABULARY, generator=generator)).half()
    return embedding, Quantized(integers, scales, Grid(4, BLOCK))


class ToyRunner:
    """The toy decoder in torch; the wrong figures of a broken model come from `damage`, added to W."""

    def __init__(self, embedding: Tensor, output: Tensor, name: str = "toy", context: int | None = None):
        self.embedding, self.output = embedding, output
        self.name, self.context, self.vocabulary = name, context, output.shape[1]
        self.calls = 0

    def logits(self, tokens: Tensor, chunk: int) -> Iterator[Tensor]:
        self.calls += 1
        return stream(self._advance, tokens, chunk)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        return greedy(self._advance, prompt, new_tokens)

    def _advance(self, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        sums = self.embedding[tokens].cumsum(1)
        if state is not None:
            sums = sums + state
        return sums.tanh() @ self.output, sums[:, -1:]


def pack_nibbles(matrix: Quantized) -> np.ndarray[Any, Any]:
    """(width, vocabulary) integers → MatMulNBits' (vocabulary, blocks, 16), low nibble first."""
    offset = (matrix.integers.T.numpy().astype(np.int16) + 8).astype(np.uint8)
    blocks = offset.reshape(offset.shape[0], -1, BLOCK)
    packed: np.ndarray[Any, Any] = blocks[..., 0::2] | (blocks[..., 1::2] << 4)
    return packed


def save_toy_onnx(
    folder: Path,
    embedding: Tensor,
    output: Quantized,
    *,
    form: str = "nbits",
    position_ids: bool = False,
    rename: dict[str, str] | None = None,
) -> Path:
    """Write the toy decoder as an exported folder; `form` is nbits, qdq or none (plain float32)."""
    nodes: list[Any] = []
    initializers: list[Any] = []

    def constant(name: str, values: Any) -> str:
        initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(op: str, inputs: list[str], out: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [out], name=f"/{out}/{op}", **attributes))
        return out

    one = constant("one", np.array([1]))
    node("Gather", [constant("embedding", embedding.numpy()), "input_ids"], "embedded")
    node("Unsqueeze", ["embedded", one], "keys")
    node("Concat", ["past_key_values.0.key", "keys"], "present.0.key", axis=2)
    node("Concat", ["past_key_values.0.value", "keys"], "present.0.value", axis=2)
    node("Squeeze", ["present.0.key", one], "history")
    node("CumSum", ["history", constant("axis", np.array(1))], "sums")
    node("Shape", ["input_ids"], "length", start=1, end=2)
    node("Neg", ["length"], "start")
    node("Slice", ["sums", "start", constant("end", np.array([2**31])), "one"], "recent")
    node("Tanh", ["recent"], "activation")
    # Zero logits wherever the mask, or the positions, do not fit the cache.
    node("Shape", ["present.0.key"], "total", start=2, end=3)
    node("ReduceSum", ["attention_mask", "one"], "seen")
    node("Equal", ["seen", "total"], "mask_fits")
    node("Cast", ["mask_fits"], "mask_factor", to=TensorProto.FLOAT)
    node("Unsqueeze", ["mask_factor", "one"], "factor")
    if position_ids:
        node("ReduceMax", ["position_ids", "one"], "last_position")
        node("Add", ["last_position", "one"], "positions_seen")
        node("Equal", ["positions_seen", "total"], "positions_fit")
        node("Cast", ["positions_fit"], "position_factor", to=TensorProto.FLOAT)
        node("Unsqueeze", ["position_factor", "one"], "position_factor_3d")
        node("Mul", ["factor", "position_factor_3d"], "both_factors")
    if form == "nbits":
        node(
            "MatMulNBits",
            [
                "activation",
                constant("codes", pack_nibbles(output)),
                constant("scales", output.scales.T.float().contiguous().numpy()),
            ],
            "product",
            domain="com.microsoft",
            K=WIDTH,
            N=VOCABULARY,
            bits=4,
            block_size=BLOCK,
            accuracy_level=4,
        )
    elif form == "qdq":
        flat = (output.integers.numpy().astype(np.uint8) & 15).reshape(-1)
        initializers.append(
            helper.make_tensor(
                "codes",
                TensorProto.INT4,
                (WIDTH, VOCABULARY),
                (flat[0::2] | (flat[1::2] << 4)).tobytes(),
                raw=True,
            )
        )
        constant("scales", output.scales.float().numpy())
        node("DequantizeLinear", ["codes", "scales"], "weight", axis=0, block_size=BLOCK)
        node("MatMul", ["activation", "weight"], "product")
    else:
        constant("weight", output.dequantize().numpy())
        node("MatMul", ["activation", "weight"], "product")
    node("Mul", ["product", "both_factors" if position_ids else "factor"], "logits")

    def tensor(name: str, kind: int, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    cache = ["batch_size", 1, "past_sequence_length", WIDTH]
    inputs = [
        tensor("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        tensor("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
        *(tensor(f"past_key_values.0.{part}", TensorProto.FLOAT, cache) for part in ("key", "value")),
    ]
    if position_ids:
        inputs.append(tensor("position_ids", TensorProto.INT64, ["batch_size", "sequence_length"]))
    outputs = [
        tensor("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", VOCABULARY]),
        *(
            tensor(f"present.0.{part}", TensorProto.FLOAT, ["batch_size", 1, "total_sequence_length", WIDTH])
            for part in ("key", "value")
        ),
    ]
    for old, new in (rename or {}).items():
        for entry in (*inputs, *outputs):
            if entry.name == old:
                entry.name = new
        for graph_node in nodes:
            for names in (graph_node.input, graph_node.output):
                names[:] = [new if name == old else name for name in names]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, initializers)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    (folder / "onnx").mkdir(parents=True)
    onnx.save_model(
        model,
        str(folder / "onnx" / "model.onnx"),
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=1024,
    )
    return folder
