"""How a matrix becomes operators of an ONNX graph.

A factorized linear is two matrix products, ``…/dictionary/MatMul`` and ``…/codes/MatMul``; further pairs
(``dictionary_2`` …) are added up; a dictionary that several linears share is computed once and feeds them all.

Sources: the ONNX operator specification, opset 21; the ONNX Runtime contrib operator documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from onnx import TensorProto
from torch import Tensor
from typing_extensions import assert_never

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Leaf, Matrix, Quantized
from compot_deploy.errors import RecipeError
from compot_deploy.exporters.artifact import digest
from compot_deploy.exporters.bnb4 import BNB_TYPES, pack_bnb4
from compot_deploy.exporters.onnx.expansion import EXPANSION_TABLE, EXPANSIONS, THREE_BITS_TABLE
from compot_deploy.exporters.onnx.layouts import pack_blocked, pack_nbits
from compot_deploy.exporters.onnx.nodes import MICROSOFT, Nodes, Part, node_path
from compot_deploy.exporters.onnx.packed_codes import ThreeBits, TwoOfFour, pack_three_bits, pack_two_of_four
from compot_deploy.exporters.onnx.storage import OnnxCodes, OnnxOps, OnnxStorage, unsupported_grid

ACCURACY_LEVEL: Final = 4
"""int8 activations: what MatMulNBits has its fast kernels for, and what is deployed. Level 0 computes in
float32, 3 to 300 times slower, and is the oracle."""


def _numbered(word: str, position: int) -> str:
    """``codes``, then ``codes_2``, ``codes_3`` and so on."""
    return word if position == 0 else f"{word}_{position + 1}"


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
class GraphBuilder(Nodes):
    """Matrices as operators.

    Attributes:
        ops: how quantized linears are written.
        accuracy_level: of MatMulNBits.
        codes: whether integers may be packed.
        dictionaries: those that are in the graph, by name and position.
    """

    ops: OnnxOps = "matmulnbits"
    accuracy_level: int = ACCURACY_LEVEL
    codes: OnnxCodes = "dense"
    dictionaries: dict[tuple[str, int], _Shared] = field(default_factory=dict)

    def linear(self, module: str, matrix: Matrix, source: str, bias: Tensor | None) -> str:
        """``source @ matrix + bias``."""
        path = node_path(module)
        match matrix:
            case Dense() | Quantized():
                metadata = {Part.MATRIX: module, Part.ROLE: Part.PLAIN}
                value = self.product(f"{module}.weight", path, matrix, source, metadata)
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

    def _pair(self, module: str, position: int, pair: FactorPair, source: str) -> str:
        metadata = {
            Part.MATRIX: module,
            Part.ROLE: Part.CODES,
            Part.PAIR: str(position),
            Part.DICTIONARY: pair.dictionary_name,
            Part.PATTERN: f"{pair.pattern.kept}:{pair.pattern.of}",
        }
        word = _numbered("codes", position)
        hidden = self._dictionary(position, pair, source)
        path = f"{node_path(module)}/{word}"
        return self.product(f"{module}.{word}", path, pair.codes, hidden, metadata, pair.pattern)

    def _dictionary(self, position: int, pair: FactorPair, source: str) -> str:
        """The product with a dictionary, which is computed once however many linears share it."""
        key = (pair.dictionary_name, position)
        fingerprint = digest(pair.dictionary)
        shared = self.dictionaries.get(key)
        if shared is None:
            word = _numbered("dictionary", position)
            metadata = {Part.ROLE: Part.DICTIONARY_ROLE, Part.DICTIONARY: pair.dictionary_name}
            path = f"{node_path(pair.dictionary_name)}/{word}"
            value = self.product(f"{pair.dictionary_name}.{word}", path, pair.dictionary, source, metadata)
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
        metadata: Mapping[str, str],
        pattern: Pattern = DENSE,
    ) -> str:
        """``source @ leaf``, as one operator or, for `ops` qdq, two."""
        match leaf:
            case Dense():
                weight = self.as_float(self.stored_float(name, leaf.weight), f"{path}/weight/Cast")
                return self.node("MatMul", [source, weight], f"{path}/MatMul", metadata=metadata)
            case Quantized():
                return self._quantized_product(name, path, leaf, source, metadata, pattern)
            case _:
                assert_never(leaf)

    def _quantized_product(
        self,
        name: str,
        path: str,
        leaf: Quantized,
        source: str,
        metadata: Mapping[str, str],
        pattern: Pattern,
    ) -> str:
        grid = leaf.grid
        _require(unsupported_grid(grid, self.ops, codes=self.codes), name)
        if self.ops == "qdq":
            return self._blocked(name, path, source, leaf, metadata)
        if grid.codebook != "integer":
            return self.bnb4(name, path, source, leaf, metadata)
        if grid.bits == 3 or OnnxStorage(self.ops, codes=self.codes).packs(grid, pattern):
            blob, scales = self.expanded(name, path, leaf)
            return self.nbits(
                path, source, blob, scales, NBitsLayout(*leaf.shape, Grid(4, grid.group)), metadata
            )
        packed = pack_nbits(leaf)
        blob = self.tensor(f"{name}.integers", packed.blob, TensorProto.UINT8, packed.blob.shape)
        scales = self.scales(name, path, packed.scales)
        return self.nbits(path, source, blob, scales, NBitsLayout(*leaf.shape, grid), metadata)

    def _blocked(
        self, name: str, path: str, source: str, leaf: Quantized, metadata: Mapping[str, str]
    ) -> str:
        """A blocked DequantizeLinear, and the product with what it gives."""
        blocked = pack_blocked(leaf)
        kind = TensorProto.INT4 if leaf.grid.bits == 4 else TensorProto.INT8
        integers = self.tensor(f"{name}.integers", blocked.data, kind, leaf.shape)
        scales = self.scales(name, path, blocked.scales)
        weight = self.node(
            "DequantizeLinear",
            [integers, scales],
            f"{path}/DequantizeLinear",
            axis=0,
            block_size=leaf.grid.group,
        )
        return self.node("MatMul", [source, weight], f"{path}/MatMul", metadata=metadata)

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
        self, path: str, source: str, blob: str, scales: str, layout: NBitsLayout, metadata: Mapping[str, str]
    ) -> str:
        """One MatMulNBits; never with a g_idx, which 2 bits silently get wrong and 8 bits refuse."""
        return self.node(
            "MatMulNBits",
            [source, blob, scales],
            f"{path}/MatMul",
            domain=MICROSOFT,
            metadata=metadata,
            K=layout.inputs,
            N=layout.outputs,
            bits=layout.grid.bits,
            block_size=layout.grid.group,
            accuracy_level=self.accuracy_level,
        )

    def bnb4(self, name: str, path: str, source: str, leaf: Quantized, metadata: Mapping[str, str]) -> str:
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
            metadata=metadata,
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
        metadata = {Part.MATRIX: name, Part.ROLE: Part.EMBEDDING}
        match matrix:
            case Dense():
                stored = self.stored_float(f"{name}.weight", matrix.weight.T)
                # A tied head needs the whole table as float32; an embedding alone only the rows it gathers.
                table = self.as_float(stored, f"{path}/weight/Cast") if tied else stored
                value = self.node("Gather", [table, tokens], f"{path}/Gather", metadata=metadata, axis=0)
                if table == stored and self.tensors[stored].data_type != TensorProto.FLOAT:
                    value = self.node("Cast", [value], f"{path}/Cast", to=TensorProto.FLOAT)
                return value, TokenTable(matrix.shape, table)
            case Quantized():
                return self._quantized_embedding(name, matrix, tokens, metadata, tied)
            case Factorized():
                raise RecipeError(f"{name}: a factorized token embedding cannot be stored in ONNX.")
            case _:
                assert_never(matrix)

    def _quantized_embedding(
        self, name: str, matrix: Quantized, tokens: str, metadata: Mapping[str, str], tied: bool
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
            metadata={**metadata, Part.INPUTS: str(hidden)},
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
        metadata = {Part.MATRIX: embedding, Part.ROLE: Part.TIED_HEAD}
        if table.scales is None or table.grid is None:
            return self.node(
                "FusedMatMul",
                [source, table.values],
                f"{path}/MatMul",
                domain=MICROSOFT,
                metadata=metadata,
                transB=1,
            )
        layout = NBitsLayout(*table.shape, table.grid)
        return self.nbits(path, source, table.values, table.scales, layout, metadata)
