"""The decoder as an ONNX graph of our own, written tensor by tensor.

The graph is the one that runtimes have fast kernels for::

    input_ids → Gather(BlockQuantized) → ┌ SimplifiedLayerNormalization
                                         │ q, k, v linears → GroupQueryAttention → o linear
       one block, repeated               │ SkipSimplifiedLayerNormalization
                                         └ gate, up linears → Sigmoid·Mul → Mul → down linear
    → SkipSimplifiedLayerNormalization → head linear → logits

A factorized linear is two matrix products, ``…/dictionary/MatMul`` and ``…/codes/MatMul``; further pairs
(``dictionary_2`` …) are added up; a dictionary that several linears share is computed once and feeds them all.

Facts about ONNX Runtime that shape it, each pinned by a test:

* Left padding goes through ``attention_bias``, made from attention_mask. GroupQueryAttention's own
  ``seqlens_k`` assumes right padding and its ``position_ids`` are wrong while decoding. Rotary embedding is
  relative, so rows that are shifted by their padding come out the same.
* A sliding window goes through the same bias, not through ``local_window_size``: a window of 3 there means 4
  tokens in ONNX Runtime 1.23 and 3 in 1.32.
* GroupQueryAttention rotates heads of multiples of 16 only; smaller ones are rotated before it.
* It takes several new tokens on top of a past only for a batch of one; a prompt or a single token for any.
* Scales are stored as float16 and cast; ONNX Runtime folds the cast when it loads.
* So it folds the five nodes that expand packed codes (Cast, Concat, MatMulInteger, Gather, Reshape); where it
  does not, every run expands them again, 20 to 100 times slower.
* Opset 21 and IR 10: newer ones do not load everywhere.

Sources: the ONNX operator specification, opset 21; the ONNX Runtime contrib operator documentation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final, Literal, TypeAlias

import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor
from typing_extensions import assert_never

from compot_deploy import __version__
from compot_deploy.errors import RecipeError
from compot_deploy.exporters.artifact import digest
from compot_deploy.exporters.onnx_config import (
    DecoderShape,
    RotaryTables,
    check_supported,
    decoder_shape,
    rotary_tables,
)
from compot_deploy.exporters.onnx_tensors import Extent, TensorWriter
from compot_deploy.exporters.packing import (
    BNB_TYPES,
    POSITIONS,
    OnnxCodes,
    OnnxOps,
    OnnxStorage,
    ThreeBits,
    TwoOfFour,
    expansion_table,
    pack_blocked,
    pack_bnb4,
    pack_nbits,
    pack_three_bits,
    pack_two_of_four,
    three_bit_table,
    unsupported_grid,
)
from compot_deploy.weights import (
    DENSE,
    CompressedModel,
    Dense,
    Factorized,
    Grid,
    Leaf,
    Matrix,
    Pair,
    Pattern,
    Quantized,
)

OPSET: Final = 21
IR_VERSION: Final = 10
MICROSOFT: Final = "com.microsoft"
ACCURACY_LEVEL: Final = 4
"""int8 activations: what MatMulNBits has its fast kernels for, and what is shipped. Level 0 computes in
float32, 3 to 300 times slower, and is the oracle."""

MASKED: Final = -1e9
"""Added to the score of a masked key; finite, so that a row with nothing but padding gives no NaN."""

EXPANSION_TABLE: Final = "/constants/two_of_four/table"
EXPANSION_WEIGHTS: Final = "/constants/two_of_four/weights"
THREE_BITS_TABLE: Final = "/constants/three_bits/table"
THREE_BITS_WEIGHTS: Final = "/constants/three_bits/weights"


@dataclass(frozen=True)
class ExpansionKind:
    """What all packed integers of one layout share in a graph.

    Attributes:
        table: name of the tensor with MatMulNBits' bytes by row.
        weights: name of the tensor (1, factor), which makes ``half + factor·value`` of a row as a product,
            because no standard operator adds two bytes.
        factor: see `weights`.
        half: suffix of the tensor of half bytes.
        rows: makes the table.
    """

    table: str
    weights: str
    factor: int
    half: str
    rows: Callable[[], Tensor]


EXPANSIONS: Final = {
    kind.table: kind
    for kind in (
        ExpansionKind(EXPANSION_TABLE, EXPANSION_WEIGHTS, len(POSITIONS), "patterns", expansion_table),
        ExpansionKind(THREE_BITS_TABLE, THREE_BITS_WEIGHTS, 16, "nibbles", three_bit_table),
    )
}

TRACED: Final = "compot.traced"
"""Metadata of a graph that was traced, and what for: ``features`` or ``generation``."""

INLINE_BYTES: Final = 1024
"""Tensors up to this size are kept in the graph, larger ones in the data file."""

# --- names -------------------------------------------------------------------------------------------


def node_path(module: str) -> str:
    """``model.layers.0.self_attn.q_proj`` as ``/model/layers.0/attn/q_proj``."""
    path = "/" + module.replace("self_attn", "attn").replace(".", "/")
    return re.sub(r"/(\d+)(?=/|$)", r".\1", path)


def _numbered(word: str, position: int) -> str:
    """``codes``, then ``codes_2``, ``codes_3`` and so on."""
    return word if position == 0 else f"{word}_{position + 1}"


FloatType: TypeAlias = Literal["float32", "float16", "bfloat16"]

_FLOAT_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOAT_KINDS: Final = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


class Part:
    """Names of the facts that are written onto nodes, so that a file can be read back by itself."""

    MATRIX: Final = "compot.matrix"
    ROLE: Final = "compot.role"
    PAIR: Final = "compot.pair"
    DICTIONARY: Final = "compot.dictionary"
    PATTERN: Final = "compot.pattern"
    INPUTS: Final = "compot.inputs"

    PLAIN: Final = "plain"
    DICTIONARY_ROLE: Final = "dictionary"
    CODES: Final = "codes"
    EMBEDDING: Final = "embedding"
    TIED_HEAD: Final = "tied_head"


# --- the graph ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shared:
    """A dictionary that is in the graph: what it reads, what it gives, and the digest of its numbers."""

    source: str
    value: str
    digest: str


@dataclass(frozen=True)
class NBitsLayout:
    """Sizes and grid of a MatMulNBits."""

    inputs: int
    outputs: int
    grid: Grid


@dataclass(frozen=True)
class Expansion:
    """The nodes that make MatMulNBits' bytes of packed codes, and the tensors that they read.

    Attributes:
        nodes: Cast, Concat, MatMulInteger, Gather and Reshape, as they run.
        values: two codes of every four.
        patterns: their positions.
        weights: what turns both into a row of the table.
        table: the bytes.
    """

    nodes: tuple[NodeProto, ...]
    values: str
    patterns: str
    weights: str
    table: str


def expansion_of(value: str, producers: Mapping[str, NodeProto]) -> Expansion | None:
    """The expansion that makes `value`, as `GraphBuilder.expanded` writes it; None if it is made in another way.

    Args:
        value: what a MatMulNBits multiplies with.
        producers: node by output.
    """
    nodes: list[NodeProto] = []
    for operator, follow in (("Reshape", 0), ("Gather", 1), ("MatMulInteger", 0), ("Concat", 0), ("Cast", 0)):
        node = producers.get(value)
        if node is None or node.op_type != operator or len(node.input) != (1 if operator == "Cast" else 2):
            return None
        nodes.append(node)
        value = node.input[follow]
    _, gather, product, concat, cast = nodes
    return Expansion(
        nodes=tuple(reversed(nodes)),
        values=str(concat.input[1]),
        patterns=str(cast.input[0]),
        weights=str(product.input[1]),
        table=str(gather.input[0]),
    )


@dataclass(frozen=True)
class TokenTable:
    """The token table as a tied head reads it: floats (vocabulary, hidden), or packed integers and scales.

    Attributes:
        shape: (hidden, vocabulary).
        values: the floats or the integers.
        scales: of integers.
        grid: of integers.
    """

    shape: tuple[int, int]
    values: str
    scales: str | None = None
    grid: Grid | None = None


def _check_shape(name: str, matrix: Matrix, expected: tuple[int, int]) -> None:
    if matrix.shape != expected:
        raise ValueError(f"{name} is {matrix.shape}, and the configuration makes it {expected}.")


def _require(complaint: str | None, name: str) -> None:
    if complaint is not None:
        raise RecipeError(f"{name}: {complaint}")


@dataclass
class GraphBuilder:
    """Nodes and tensors as they are added; a value is named by its string."""

    writer: TensorWriter
    ops: OnnxOps
    accuracy_level: int
    floats: FloatType
    codes: OnnxCodes = "dense"
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: dict[str, TensorProto] = field(default_factory=dict)
    dictionaries: dict[tuple[str, int], _Shared] = field(default_factory=dict)

    # -- tensors --

    def tensor(self, name: str, data: Tensor, kind: int, shape: Sequence[int]) -> str:
        """Add a stored tensor under a name of its own."""
        if data.numel() * data.element_size() <= INLINE_BYTES:
            proto = self._declare(name, kind, shape)
            known = torch.zeros_like(data, device="cpu") if data.is_meta else data.contiguous()
            proto.raw_data = known.view(-1).view(torch.uint8).numpy().tobytes()
        else:
            self.alias(name, self.writer.append(data), kind, shape)
        return name

    def alias(self, name: str, extent: Extent, kind: int, shape: Sequence[int]) -> str:
        """Add a tensor whose bytes are in the data file already."""
        proto = self._declare(name, kind, shape)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", self.writer.location),
            ("offset", str(extent.offset)),
            ("length", str(extent.length)),
        ):
            entry = proto.external_data.add()
            entry.key, entry.value = key, value
        return name

    def _declare(self, name: str, kind: int, shape: Sequence[int]) -> TensorProto:
        if name in self.tensors:
            raise ValueError(f"The tensor {name} is in the graph already.")
        proto = TensorProto(name=name, data_type=kind, dims=list(shape))
        self.tensors[name] = proto
        return proto

    def constant(self, value: int | float | Sequence[int], kind: int = TensorProto.INT64) -> str:
        """A small constant, one tensor per value and type."""
        name = f"/constants/{TensorProto.DataType.Name(kind)}/{value}".replace(" ", "")
        if name not in self.tensors:
            dtype = {
                TensorProto.INT64: torch.int64,
                TensorProto.INT32: torch.int32,
                TensorProto.FLOAT: torch.float32,
            }[kind]
            data = torch.tensor(value, dtype=dtype)
            self.tensor(name, data, kind, data.shape)
        return name

    def float_tensor(self, name: str, data: Tensor) -> str:
        """A float32 tensor, as it stands."""
        return self.tensor(name, data.detach().float(), TensorProto.FLOAT, data.shape)

    # -- nodes --

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        *,
        domain: str = "",
        outputs: Sequence[str] | None = None,
        facts: Mapping[str, str] | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node; returns its first output."""
        made = helper.make_node(
            operator,
            list(inputs),
            list(outputs or [f"{name}/output_0"]),
            name=name,
            domain=domain,
            **attributes,
        )
        for key, value in (facts or {}).items():
            entry = made.metadata_props.add()
            entry.key, entry.value = key, value
        self.nodes.append(made)
        return str(made.output[0])

    # -- matrices --

    def linear(self, module: str, matrix: Matrix, source: str, bias: Tensor | None) -> str:
        """``source @ matrix + bias``."""
        path = node_path(module)
        match matrix:
            case Dense() | Quantized():
                facts = {Part.MATRIX: module, Part.ROLE: Part.PLAIN}
                value = self.product(f"{module}.weight", path, matrix, source, facts)
            case Factorized():
                value = self._pair(module, 0, matrix.pairs[0], source)
                for position, pair in enumerate(matrix.pairs[1:], start=1):
                    other = self._pair(module, position, pair, source)
                    value = self.node("Add", [value, other], f"{path}/{_numbered('sum', position)}/Add")
            case _:
                assert_never(matrix)
        if bias is not None:
            value = self.node("Add", [value, self.float_tensor(f"{module}.bias", bias)], f"{path}/bias/Add")
        return value

    def _pair(self, module: str, position: int, pair: Pair, source: str) -> str:
        facts = {
            Part.MATRIX: module,
            Part.ROLE: Part.CODES,
            Part.PAIR: str(position),
            Part.DICTIONARY: pair.dictionary_name,
            Part.PATTERN: f"{pair.pattern.kept}:{pair.pattern.of}",
        }
        word = _numbered("codes", position)
        hidden = self._dictionary(position, pair, source)
        path = f"{node_path(module)}/{word}"
        return self.product(f"{module}.{word}", path, pair.codes, hidden, facts, pair.pattern)

    def _dictionary(self, position: int, pair: Pair, source: str) -> str:
        """The product with a dictionary, which is computed once however many linears share it."""
        key = (pair.dictionary_name, position)
        fingerprint = digest(pair.dictionary)
        shared = self.dictionaries.get(key)
        if shared is None:
            word = _numbered("dictionary", position)
            facts = {Part.ROLE: Part.DICTIONARY_ROLE, Part.DICTIONARY: pair.dictionary_name}
            path = f"{node_path(pair.dictionary_name)}/{word}"
            value = self.product(f"{pair.dictionary_name}.{word}", path, pair.dictionary, source, facts)
            shared = self.dictionaries[key] = _Shared(source, value, fingerprint)
        if shared.source != source:
            raise ValueError(
                f"The dictionary {pair.dictionary_name} is shared by linears that read different activations, "
                f"{shared.source} and {source}."
            )
        if shared.digest != fingerprint:
            raise ValueError(f"Two different dictionaries have the name {pair.dictionary_name}.")
        return shared.value

    def product(
        self,
        name: str,
        path: str,
        leaf: Leaf,
        source: str,
        facts: Mapping[str, str],
        pattern: Pattern = DENSE,
    ) -> str:
        """``source @ leaf``, as one operator or, for `ops` qdq, two."""
        rows, columns = leaf.shape
        match leaf:
            case Dense():
                weight = self._float_weight(name, path, leaf.weight)
                return self.node("MatMul", [source, weight], f"{path}/MatMul", facts=facts)
            case Quantized():
                grid = leaf.grid
                _require(unsupported_grid(grid, self.ops, codes=self.codes), name)
                if self.ops == "qdq":
                    blocked = pack_blocked(leaf)
                    kind = TensorProto.INT4 if grid.bits == 4 else TensorProto.INT8
                    integers = self.tensor(f"{name}.integers", blocked.data, kind, (rows, columns))
                    scales = self.scales(name, path, blocked.scales)
                    weight = self.node(
                        "DequantizeLinear",
                        [integers, scales],
                        f"{path}/DequantizeLinear",
                        axis=0,
                        block_size=grid.group,
                    )
                    return self.node("MatMul", [source, weight], f"{path}/MatMul", facts=facts)
                layout = NBitsLayout(rows, columns, grid)
                if grid.codebook != "integer":
                    return self.bnb4(name, path, source, leaf, facts)
                if grid.bits == 3 or OnnxStorage(self.ops, codes=self.codes).packs(grid, pattern):
                    layout = NBitsLayout(rows, columns, Grid(4, grid.group))
                    blob, scales = self.expanded(name, path, leaf)
                else:
                    packed = pack_nbits(leaf)
                    blob = self.tensor(f"{name}.integers", packed.blob, TensorProto.UINT8, packed.blob.shape)
                    scales = self.scales(name, path, packed.scales)
                return self.nbits(path, source, blob, scales, layout, facts)
            case _:
                assert_never(leaf)

    def expanded(self, name: str, path: str, leaf: Quantized) -> tuple[str, str]:
        """Integers and scales of packed codes, as MatMulNBits reads them; `expansion_of` finds them again."""
        half: Tensor
        packed: TwoOfFour | ThreeBits
        if leaf.grid.bits == 3:
            packed = pack_three_bits(leaf)
            half, kind = packed.nibbles, EXPANSIONS[THREE_BITS_TABLE]
        else:
            packed = pack_two_of_four(leaf)
            half, kind = packed.patterns, EXPANSIONS[EXPANSION_TABLE]
        outputs, groups, _ = packed.values.shape
        blocks, block = leaf.grid.groups(leaf.shape[0]), leaf.grid.group
        values = self.tensor(f"{name}.values", packed.values, TensorProto.UINT8, packed.values.shape)
        patterns = self.tensor(f"{name}.{kind.half}", half, TensorProto.UINT4, (outputs, groups, 1))
        if kind.table not in self.tensors:
            table = kind.rows()
            self.tensor(kind.table, table, TensorProto.UINT8, table.shape)
            weights = torch.tensor([[1], [kind.factor]], dtype=torch.uint8)
            self.tensor(kind.weights, weights, TensorProto.UINT8, weights.shape)
        scales = self.scales(name, path, packed.scales)
        numbers = self.node("Cast", [patterns], f"{path}/expand/Cast", to=TensorProto.UINT8)
        both = self.node("Concat", [numbers, values], f"{path}/expand/Concat", axis=-1)
        rows = self.node("MatMulInteger", [both, kind.weights], f"{path}/expand/MatMulInteger")
        pairs = self.node("Gather", [kind.table, rows], f"{path}/expand/Gather", axis=0)
        shape = self.constant([outputs, blocks, block // 2])
        blob = self.node("Reshape", [pairs, shape], f"{path}/expand/Reshape")
        return blob, scales

    def nbits(
        self, path: str, source: str, blob: str, scales: str, layout: NBitsLayout, facts: Mapping[str, str]
    ) -> str:
        """One MatMulNBits; never with a g_idx, which 2 bits silently get wrong and 8 bits refuse."""
        return self.node(
            "MatMulNBits",
            [source, blob, scales],
            f"{path}/MatMul",
            domain=MICROSOFT,
            facts=facts,
            K=layout.inputs,
            N=layout.outputs,
            bits=layout.grid.bits,
            block_size=layout.grid.group,
            accuracy_level=self.accuracy_level,
        )

    def bnb4(self, name: str, path: str, source: str, leaf: Quantized, facts: Mapping[str, str]) -> str:
        """One MatMulBnb4, which computes in float32 always."""
        packed = pack_bnb4(leaf)
        codes = packed.blob.flatten()
        blob = self.tensor(f"{name}.integers", codes, TensorProto.UINT8, codes.shape)
        scales = packed.scales.flatten()
        return self.node(
            "MatMulBnb4",
            [source, blob, self.scales(name, path, scales)],
            f"{path}/MatMul",
            domain=MICROSOFT,
            facts=facts,
            K=leaf.shape[0],
            N=leaf.shape[1],
            block_size=leaf.grid.group,
            quant_type=BNB_TYPES[leaf.grid.codebook],
        )

    def embedding(
        self, name: str, matrix: Matrix, tokens: str, *, tied: bool = False
    ) -> tuple[str, TokenTable]:
        """Rows of a table by token id.

        Args:
            name: of the table.
            matrix: the table, (hidden, vocabulary).
            tokens: the value with the token ids.
            tied: `tied_head` will read the table as well.

        Returns:
            The embedded tokens, and the table as `tied_head` wants it.
        """
        path = node_path(name)
        facts = {Part.MATRIX: name, Part.ROLE: Part.EMBEDDING}
        match matrix:
            case Dense():
                stored = self.stored_float(f"{name}.weight", matrix.weight.T)
                # A tied head needs the whole table as float32; an embedding alone only the rows it gathers.
                table = self.as_float(stored, f"{path}/weight/Cast") if tied else stored
                value = self.node("Gather", [table, tokens], f"{path}/Gather", facts=facts, axis=0)
                if table == stored and self.tensors[stored].data_type != TensorProto.FLOAT:
                    value = self.node("Cast", [value], f"{path}/Cast", to=TensorProto.FLOAT)
                return value, TokenTable(matrix.shape, table)
            case Quantized():
                return self._quantized_embedding(name, matrix, tokens, facts, tied)
            case Factorized():
                raise RecipeError(f"{name}: a factorized token embedding cannot be stored in ONNX.")
            case _:
                assert_never(matrix)

    def _quantized_embedding(
        self, name: str, matrix: Quantized, tokens: str, facts: Mapping[str, str], tied: bool
    ) -> tuple[str, TokenTable]:
        grid, (hidden, _), path = matrix.grid, matrix.shape, node_path(name)
        _require(unsupported_grid(grid, self.ops, embedding=True), name)
        packed = pack_nbits(matrix)
        extent = self.writer.append(packed.blob)
        table = self.alias(f"{name}.integers", extent, TensorProto.UINT8, packed.table.shape)
        scales = self.scales(name, path, packed.scales)
        value = self.node(
            "GatherBlockQuantized",
            [table, tokens, scales],
            f"{path}/Gather",
            domain=MICROSOFT,
            facts={**facts, Part.INPUTS: str(hidden)},
            bits=grid.bits,
            block_size=grid.group,
            gather_axis=0,
            quantize_axis=1,
        )
        if hidden % grid.group:  # the last block is filled up
            bounds = [self.constant([0]), self.constant([hidden]), self.constant([2])]
            value = self.node("Slice", [value, *bounds], f"{path}/Slice")
        if not tied:
            return value, TokenTable(matrix.shape, table)
        # The head reads the same bytes as (vocabulary, blocks, block bytes): a second name, no second copy.
        blob = self.alias(f"{name}.integers.blocks", extent, TensorProto.UINT8, packed.blob.shape)
        return value, TokenTable(matrix.shape, blob, scales, grid)

    def tied_head(self, head: str, embedding: str, table: TokenTable, source: str) -> str:
        """``source @ table``, with the table of the token embedding."""
        path = node_path(head)
        facts = {Part.MATRIX: embedding, Part.ROLE: Part.TIED_HEAD}
        if table.scales is None or table.grid is None:
            return self.node(
                "FusedMatMul",
                [source, table.values],
                f"{path}/MatMul",
                domain=MICROSOFT,
                facts=facts,
                transB=1,
            )
        layout = NBitsLayout(*table.shape, table.grid)
        return self.nbits(path, source, table.values, table.scales, layout, facts)

    def scales(self, name: str, path: str, scales: Tensor) -> str:
        """Scales as float32, stored as float16."""
        stored = self.tensor(f"{name}.scales", scales, TensorProto.FLOAT16, scales.shape)
        return self.node("Cast", [stored], f"{path}/scales/Cast", to=TensorProto.FLOAT)

    def stored_float(self, name: str, weight: Tensor) -> str:
        """A floating-point matrix in the file's floating-point type, which must hold it exactly."""
        stored = weight.detach().to(_FLOAT_DTYPES[self.floats])
        if not weight.is_meta and not torch.equal(stored.to(weight.dtype), weight.detach()):
            raise ValueError(f"{name} ({weight.dtype}) cannot be stored in {self.floats} without an error.")
        return self.tensor(name, stored, _FLOAT_KINDS[self.floats], stored.shape)

    def _float_weight(self, name: str, path: str, weight: Tensor) -> str:
        return self.as_float(self.stored_float(name, weight), f"{path}/weight/Cast")

    def as_float(self, stored: str, path: str) -> str:
        """A stored tensor as float32."""
        if self.tensors[stored].data_type == TensorProto.FLOAT:
            return stored
        return self.node("Cast", [stored], path, to=TensorProto.FLOAT)


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
    check_supported(model.architecture, model.config)
    shape = decoder_shape(model.architecture, model.config)
    rows = shape.context if context is None else context
    if not 1 <= rows <= shape.context:
        raise RecipeError(f"A context of {rows} tokens is out of range: the model has 1 to {shape.context}.")
    graph = GraphBuilder(TensorWriter(data, location, data.tell()), ops, accuracy_level, floats, codes)
    builder = _Decoder(graph, model, shape)
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
        graph, shape, architecture = self.graph, self.shape, self.model.architecture
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
        name = self.model.architecture.embedding
        matrix = self.model.matrices[name]
        _check_shape(name, matrix, (self.shape.hidden, self.shape.vocabulary))
        return self.graph.embedding(name, matrix, "input_ids", tied=self.model.tied)

    def _head(self, source: str, table: TokenTable) -> None:
        graph, architecture = self.graph, self.model.architecture
        if self.model.tied:
            graph.tied_head(architecture.head, architecture.embedding, table, source)
        else:
            self._linear(architecture.head, source)
        graph.nodes[-1].output[0] = "logits"

    def _linear(self, module: str, source: str) -> str:
        matrix = self.model.matrices[module]
        _check_shape(module, matrix, self.shape.linear(module.rpartition(".")[2]))
        return self.graph.linear(module, matrix, source, self.model.bias(module))

    def _norm(self, module: str, stream: str, delta: str | None) -> tuple[str, str]:
        """(residual stream, its norm); a `delta` is added to the stream first."""
        graph, path = self.graph, node_path(module)
        weight = graph.float_tensor(f"{module}.weight", self.model.tensors[f"{module}.weight"])
        if delta is None:
            return stream, self._plain_norm(path, stream, weight)
        outputs = [f"{path}/output_0", "", "", f"{path}/output_3"]
        if module == self.model.architecture.final_norm:
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
