"""The decoder as an ONNX graph of our own, written tensor by tensor.

The graph is the one that runtimes have fast kernels for::

    input_ids → Gather(BlockQuantized) → ┌ SimplifiedLayerNormalization
                                         │ q, k, v linears → GroupQueryAttention → o linear
       one block, repeated               │ SkipSimplifiedLayerNormalization
                                         └ gate, up linears → Sigmoid·Mul → Mul → down linear
    → SkipSimplifiedLayerNormalization → head linear → logits

How a linear becomes operators is `GraphBuilder`'s business.

Facts about ONNX Runtime that shape it, each pinned by a test:

* Left padding goes through ``attention_bias``, made from attention_mask. GroupQueryAttention's own
  ``seqlens_k`` assumes right padding and its ``position_ids`` are wrong while decoding. Rotary embedding is
  relative, so rows that are shifted by their padding come out the same.
* A sliding window goes through the same bias, not through ``local_window_size``: a window of 3 there means 4
  tokens in ONNX Runtime 1.23 and 3 in 1.32.
* GroupQueryAttention rotates heads of multiples of 16 only; smaller ones are rotated before it.
* It takes several new tokens on top of a past only for a batch of one; a prompt or a single token for any.
* Opset 21: newer ones do not load everywhere.

Sources: the ONNX operator specification, opset 21; the ONNX Runtime contrib operator documentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import BinaryIO, Final

import onnx
from onnx import ModelProto, TensorProto, helper

from compot_deploy import __version__
from compot_deploy.core.matrix import Matrix
from compot_deploy.errors import RecipeError
from compot_deploy.exporters.onnx.graph import ACCURACY_LEVEL, GraphBuilder, TokenTable
from compot_deploy.exporters.onnx.nodes import IR_VERSION, MICROSOFT, FloatType, node_path
from compot_deploy.exporters.onnx.shape import RotaryTables, check_supported, rotary_tables
from compot_deploy.exporters.onnx.storage import OnnxCodes, OnnxOps
from compot_deploy.exporters.onnx.tensors import TensorWriter
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.decoder_shape import DecoderShape, decoder_shape
from compot_deploy.models.outline import Outline, outline_of

OPSET: Final = 21

MASKED: Final = -1e9
"""Added to the score of a masked key; finite, so that a row with nothing but padding gives no NaN."""


def build_decoder(
    model: CompressedModel,
    data: BinaryIO,
    location: str,
    *,
    ops: OnnxOps = "matmulnbits",
    context: int | None = None,
    accuracy_level: int = ACCURACY_LEVEL,
    floats: FloatType = "float32",
    codes: OnnxCodes = "dense",
) -> ModelProto:
    """The whole decoder: the graph is returned, the tensors go to the data file as they are read.

    Args:
        model: every matrix in its final form; read in block order, one at a time.
        data: a file opened for writing; tensors are appended where it stands.
        location: its name, relative to the graph.
        ops: how quantized linears are written.
        context: longest sequence; None takes the model's own.
        accuracy_level: of MatMulNBits.
        floats: type in which floating-point matrices are stored; a checkpoint in bfloat16 needs no more.
        codes: how 4-bit codes of the pattern 2:4 are written.

    Raises:
        UnsupportedModelError: see `check_supported`.
        RecipeError: a grid that ONNX cannot hold, a factorized embedding, or a context out of range.
        ValueError: a shape that the configuration contradicts, or a shared name with different contents.
    """
    check_supported(model.native, model.config)
    shape = decoder_shape(model.native, model.config)
    rows = shape.context if context is None else context
    if not 1 <= rows <= shape.context:
        raise RecipeError(f"A context of {rows} tokens is out of range: the model has 1 to {shape.context}.")
    graph = GraphBuilder(
        TensorWriter(data, location, data.tell()),
        floats,
        ops=ops,
        accuracy_level=accuracy_level,
        codes=codes,
    )
    builder = _Decoder(graph, model, shape, outline_of(model))
    builder.build(rotary_tables(model.config, rows))
    made = helper.make_graph(
        graph.nodes, "decoder", builder.inputs(), builder.outputs(), list(graph.tensors.values())
    )
    return helper.make_model(
        made,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
        producer_name="compot-deploy",
        producer_version=__version__,
    )


@dataclass
class _Decoder:
    """Walks through the decoder, block by block."""

    graph: GraphBuilder
    model: CompressedModel
    shape: DecoderShape
    outline: Outline

    def inputs(self) -> list[onnx.ValueInfoProto]:
        ids = [("input_ids", ["batch_size", "sequence_length"])]
        ids += [("attention_mask", ["batch_size", "total_sequence_length"])]
        return [helper.make_tensor_value_info(name, TensorProto.INT64, dims) for name, dims in ids] + [
            self._cache(f"past_key_values.{layer}.{kind}", "past_sequence_length")
            for layer in range(self.shape.layers)
            for kind in ("key", "value")
        ]

    def outputs(self) -> list[onnx.ValueInfoProto]:
        dims = ["batch_size", "sequence_length", self.shape.vocabulary]
        return [helper.make_tensor_value_info("logits", TensorProto.FLOAT, dims)] + [
            self._cache(f"present.{layer}.{kind}", "total_sequence_length")
            for layer in range(self.shape.layers)
            for kind in ("key", "value")
        ]

    def _cache(self, name: str, length: str) -> onnx.ValueInfoProto:
        dims = ["batch_size", self.shape.key_value_heads, length, self.shape.head_size]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)

    def build(self, tables: RotaryTables) -> None:
        graph, shape, architecture = self.graph, self.shape, self.model.native
        lengths = self._lengths()
        padding = self._padding_bias()
        biases: dict[int | None, str] = {None: padding}
        for window in dict.fromkeys(shape.windows):
            if window is not None:
                within = window >= tables.cosine.shape[0]  # no sequence is long enough to feel it
                biases[window] = padding if within else self._window_bias(window, padding)
        cosine = graph.float_tensor("rotary.cosine", tables.cosine)
        sine = graph.float_tensor("rotary.sine", tables.sine)
        start = None if shape.fused_rotary else self._past_length()
        rotary = [cosine, sine] if shape.fused_rotary else ["", ""]

        stream, table = self._embed()
        delta: str | None = None
        for layer in range(shape.layers):
            block = architecture.block_path(layer)
            stream, value = self._norm(f"{block}.input_layernorm", stream, delta)
            query, key, values = (
                self._linear(f"{block}.self_attn.{name}", value) for name in ("q_proj", "k_proj", "v_proj")
            )
            if architecture.query_key_norm:
                query = self._head_norm(f"{block}.self_attn.q_norm", query, shape.heads)
                key = self._head_norm(f"{block}.self_attn.k_norm", key, shape.key_value_heads)
            if start is not None:
                query = self._rotate(f"{block}.self_attn.q_rotary", query, start, cosine, sine)
                key = self._rotate(f"{block}.self_attn.k_rotary", key, start, cosine, sine)
            past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
            attended = graph.node(
                "GroupQueryAttention",
                [query, key, values, *past, *lengths, *rotary, "", biases[shape.windows[layer]]],
                f"{node_path(block)}/attn/GroupQueryAttention",
                domain=MICROSOFT,
                outputs=[
                    f"{node_path(block)}/attn/GroupQueryAttention/output_0",
                    f"present.{layer}.key",
                    f"present.{layer}.value",
                ],
                num_heads=shape.heads,
                kv_num_heads=shape.key_value_heads,
                do_rotary=int(shape.fused_rotary),
                rotary_interleaved=0,
                scale=1.0 / math.sqrt(shape.head_size),
            )
            delta = self._linear(f"{block}.self_attn.o_proj", attended)
            stream, value = self._norm(f"{block}.post_attention_layernorm", stream, delta)
            gate = self._linear(f"{block}.mlp.gate_proj", value)
            up = self._linear(f"{block}.mlp.up_proj", value)
            path = f"{node_path(block)}/mlp"
            sigmoid = graph.node("Sigmoid", [gate], f"{path}/silu/Sigmoid")
            activated = graph.node("Mul", [gate, sigmoid], f"{path}/silu/Mul")
            delta = self._linear(
                f"{block}.mlp.down_proj", graph.node("Mul", [activated, up], f"{path}/gated/Mul")
            )
        _, value = self._norm(architecture.final_norm, stream, delta)
        self._head(value, table)

    def _lengths(self) -> list[str]:
        """seqlens_k (batch) and total_sequence_length: every row is as long as the attention mask."""
        graph = self.graph
        total = graph.node("Shape", ["attention_mask"], "/lengths/total/Shape", start=1, end=2)
        total = graph.node("Cast", [total], "/lengths/total/Cast", to=TensorProto.INT32)
        last = graph.node("Sub", [total, graph.constant([1], TensorProto.INT32)], "/lengths/last/Sub")
        batch = graph.node("Shape", ["attention_mask"], "/lengths/batch/Shape", start=0, end=1)
        last = graph.node("Expand", [last, batch], "/lengths/last/Expand")
        return [last, graph.node("Squeeze", [total], "/lengths/total/Squeeze")]

    def _padding_bias(self) -> str:
        """(batch, 1, sequence, total): `MASKED` where a key is padding, else 0.

        The causal part is GroupQueryAttention's own.
        """
        graph, path = self.graph, "/mask/padding"
        padded = graph.node("Equal", ["attention_mask", graph.constant(0)], f"{path}/Equal")
        bias = graph.node("Where", [padded, self._masked(), self._unmasked()], f"{path}/Where")
        bias = graph.node("Unsqueeze", [bias, graph.constant([1, 2])], f"{path}/Unsqueeze")
        length = graph.node("Shape", ["input_ids"], f"{path}/sequence/Shape", start=1, end=2)
        one = graph.constant([1])
        target = graph.node("Concat", [one, one, length, one], f"{path}/shape/Concat", axis=0)
        return graph.node("Expand", [bias, target], f"{path}/Expand")

    def _window_bias(self, window: int, padding: str) -> str:
        """The padding bias, and `MASKED` where a key lies before the window of its query as well."""
        graph, path = self.graph, f"/mask/window_{window}"
        total = graph.node("Shape", ["attention_mask"], f"{path}/total/Shape", start=1, end=2)
        total = graph.node("Squeeze", [total], f"{path}/total/Squeeze")
        length = graph.node("Shape", ["input_ids"], f"{path}/sequence/Shape", start=1, end=2)
        length = graph.node("Squeeze", [length], f"{path}/sequence/Squeeze")
        past = graph.node("Sub", [total, length], f"{path}/past/Sub")
        queries = graph.node("Range", [past, total, graph.constant(1)], f"{path}/queries/Range")
        keys = graph.node("Range", [graph.constant(0), total, graph.constant(1)], f"{path}/keys/Range")
        # Query i sees key j if i - j < window: j ≤ i - window is outside.
        edge = graph.node("Sub", [queries, graph.constant(window)], f"{path}/edge/Sub")
        edge = graph.node("Unsqueeze", [edge, graph.constant([1])], f"{path}/edge/Unsqueeze")
        outside = graph.node("LessOrEqual", [keys, edge], f"{path}/LessOrEqual")
        bias = graph.node("Where", [outside, self._masked(), self._unmasked()], f"{path}/Where")
        return graph.node("Add", [padding, bias], f"{path}/Add")

    def _past_length(self) -> str:
        """(1,): how many positions are in the cache; the same for all rows, padding included."""
        graph, path = self.graph, "/lengths/past"
        total = graph.node("Shape", ["attention_mask"], f"{path}/total/Shape", start=1, end=2)
        length = graph.node("Shape", ["input_ids"], f"{path}/sequence/Shape", start=1, end=2)
        return graph.node("Sub", [total, length], f"{path}/Sub")

    def _rotate(self, module: str, value: str, start: str, cosine: str, sine: str) -> str:
        return self.graph.node(
            "RotaryEmbedding",
            [value, start, cosine, sine],
            f"{node_path(module)}/RotaryEmbedding",
            domain=MICROSOFT,
        )

    def _masked(self) -> str:
        return self.graph.constant(MASKED, TensorProto.FLOAT)

    def _unmasked(self) -> str:
        return self.graph.constant(0.0, TensorProto.FLOAT)

    def _embed(self) -> tuple[str, TokenTable]:
        """The token embedding, and its table for a head that is tied to it."""
        name = self.model.native.embedding
        matrix = self.model.matrices[name]
        self._check_shape(name, matrix)
        return self.graph.embedding(name, matrix, "input_ids", tied=self.model.tied)

    def _head(self, source: str, table: TokenTable) -> None:
        graph, architecture = self.graph, self.model.native
        if self.model.tied:
            graph.tied_head(architecture.head, architecture.embedding, table, source)
        else:
            self._linear(architecture.head, source)
        graph.nodes[-1].output[0] = "logits"

    def _linear(self, module: str, source: str) -> str:
        matrix = self.model.matrices[module]
        self._check_shape(module, matrix)
        return self.graph.linear(module, matrix, source, self.model.bias(module))

    def _check_shape(self, name: str, matrix: Matrix) -> None:
        expected = self.outline.shape(name)
        if matrix.shape != expected:
            raise ValueError(f"{name} is {matrix.shape}, and the configuration makes it {expected}.")

    def _norm(self, module: str, stream: str, delta: str | None) -> tuple[str, str]:
        """(residual stream, its norm); a `delta` is added to the stream first."""
        graph, path = self.graph, node_path(module)
        weight = graph.float_tensor(f"{module}.weight", self.model.tensors[f"{module}.weight"])
        if delta is None:
            return stream, self._plain_norm(path, stream, weight)
        outputs = [f"{path}/output_0", "", "", f"{path}/output_3"]
        if module == self.model.native.final_norm:
            outputs = outputs[:1]  # nobody reads the stream after it
        graph.node(
            "SkipSimplifiedLayerNormalization",
            [stream, delta, weight],
            f"{path}/SkipLayerNorm",
            domain=MICROSOFT,
            outputs=outputs,
            epsilon=self.shape.norm_epsilon,
        )
        return f"{path}/output_3", f"{path}/output_0"

    def _plain_norm(self, path: str, value: str, weight: str) -> str:
        return self.graph.node(
            "SimplifiedLayerNormalization",
            [value, weight],
            f"{path}/LayerNorm",
            axis=-1,
            epsilon=self.shape.norm_epsilon,
            stash_type=1,
        )

    def _head_norm(self, module: str, value: str, heads: int) -> str:
        """RMS norm of every head by itself."""
        graph, path = self.graph, node_path(module)
        size = self.shape.head_size
        weight = graph.float_tensor(f"{module}.weight", self.model.tensors[f"{module}.weight"])
        split = graph.node("Reshape", [value, graph.constant([0, 0, heads, size])], f"{path}/split/Reshape")
        normed = self._plain_norm(path, split, weight)
        return graph.node("Reshape", [normed, graph.constant([0, 0, heads * size])], f"{path}/join/Reshape")
