"""The nodes and tensors of an ONNX graph, and how a matrix becomes operators.

A factorized linear is two matrix products, ``…/dictionary/MatMul`` and ``…/codes/MatMul``; further pairs
(``dictionary_2`` …) are added up; a dictionary that several linears share is computed once and feeds them all.

Facts about ONNX Runtime that shape it, each pinned by a test:

* Scales are stored as float16 and cast; ONNX Runtime folds the cast when it loads.
* IR 10: newer ones do not load everywhere.

Sources: the ONNX operator specification, opset 21; the ONNX Runtime contrib operator documentation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor
from typing_extensions import assert_never

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, Leaf, Matrix, Pair, Quantized
from compot_deploy.errors import RecipeError
from compot_deploy.exporters.artifact import digest
from compot_deploy.exporters.onnx.expansion import EXPANSION_TABLE, EXPANSIONS, THREE_BITS_TABLE
from compot_deploy.exporters.onnx.tensors import Extent, TensorWriter
from compot_deploy.exporters.packing import (
    BNB_TYPES,
    OnnxCodes,
    OnnxOps,
    OnnxStorage,
    ThreeBits,
    TwoOfFour,
    pack_blocked,
    pack_bnb4,
    pack_nbits,
    pack_three_bits,
    pack_two_of_four,
    unsupported_grid,
)

IR_VERSION: Final = 10
MICROSOFT: Final = "com.microsoft"
ACCURACY_LEVEL: Final = 4
"""int8 activations: what MatMulNBits has its fast kernels for, and what is shipped. Level 0 computes in
float32, 3 to 300 times slower, and is the oracle."""

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
