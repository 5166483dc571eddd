"""The matrices of an ONNX graph, read back bit for bit from the graph and its data file.

Names, pairs and patterns come from the nodes themselves, not from the manifest.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from onnx import NodeProto, TensorProto
from torch import Tensor

from compot_deploy.core.grid import Codebook, Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Leaf, Matrix, Quantized
from compot_deploy.errors import ArtifactError, CompotDeployError, first_line
from compot_deploy.exporters.bnb4 import BNB_TYPES, Bnb4, unpack_bnb4
from compot_deploy.exporters.onnx.expansion import THREE_BITS_TABLE, Expansion, expansion_of
from compot_deploy.exporters.onnx.layouts import Blocked, NBits, unpack_blocked, unpack_nbits
from compot_deploy.exporters.onnx.nodes import FLOAT_TYPES, TRACED, Part
from compot_deploy.exporters.onnx.packed_codes import (
    ThreeBits,
    TwoOfFour,
    unpack_three_bits,
    unpack_two_of_four,
)
from compot_deploy.exporters.onnx.tensors import TensorReader, graphs_of, read_graph


class FolderMatrices(Mapping[str, Matrix]):
    """The matrices of all graphs of a folder by module path."""

    def __init__(self, folder: Path) -> None:
        self._graphs = [OnnxMatrices(folder / graph) for graph in graphs_of(folder)]
        self._homes = {name: graph for graph in self._graphs for name in graph}

    def __getitem__(self, name: str) -> Matrix:
        return self._homes[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    @property
    def traced(self) -> bool:
        """Whether the graphs were made by tracing the model's own code."""
        return self._graphs[0].traced

    @property
    def vectors(self) -> Mapping[str, Tensor]:
        """Norms and biases by checkpoint name; small enough to be read at once."""
        return {name: value for graph in self._graphs for name, value in graph.vectors.items()}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every floating-point tensor by its name in the graphs, read when it is asked for."""
        return ChainMap(*(cast(MutableMapping[str, Tensor], graph.tensors) for graph in self._graphs))


class OnnxMatrices(Mapping[str, Matrix]):
    """The matrices of a graph by module path, in block order; each access reads one from the data file."""

    def __init__(self, path: Path) -> None:
        model = read_graph(path)
        self._path = path
        self._reader = TensorReader(model.graph, path.parent)
        self._producer = {output: node for node in model.graph.node for output in node.output if output}
        self._nodes: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            metadata = _metadata(node)
            if metadata.get(Part.ROLE) in (Part.PLAIN, Part.CODES, Part.EMBEDDING):
                self._nodes.setdefault(metadata.get(Part.MATRIX, ""), []).append(node)
        if not self._nodes:
            raise ArtifactError(f"{path} has no matrices that compot-deploy wrote.")
        self.traced = any(entry.key == TRACED for entry in model.metadata_props)
        """Whether the graph was made by tracing the model's own code."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, name: object) -> bool:
        return name in self._nodes

    @property
    def vectors(self) -> Mapping[str, Tensor]:
        """Norms and biases by checkpoint name; small enough to be read at once."""
        return {
            name: self.stored(name)
            for name, proto in self._reader.protos.items()
            if len(proto.dims) == 1 and name.endswith((".weight", ".bias"))
        }

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every floating-point tensor by its name in the graph, read when it is asked for."""
        return _Tensors(self)

    @property
    def float_names(self) -> tuple[str, ...]:
        """Names of floating-point tensors."""
        return tuple(name for name, proto in self._reader.protos.items() if proto.data_type in FLOAT_TYPES)

    def __getitem__(self, name: str) -> Matrix:
        nodes = self._nodes[name]
        role = _metadata(nodes[0]).get(Part.ROLE)
        with self._contradictions(name):
            if role == Part.EMBEDDING:
                return self._table(nodes[0])
            if role == Part.PLAIN:
                return self._leaf(nodes[0])
            return Factorized(tuple(self._pair(node) for node in nodes))

    def _pair(self, node: NodeProto) -> FactorPair:
        metadata = _metadata(node)
        source = self._producer.get(node.input[0])
        if source is None or _metadata(source).get(Part.ROLE) != Part.DICTIONARY_ROLE:
            raise ArtifactError(f"The node {node.name} holds codes, but no dictionary feeds it.")
        return FactorPair(
            dictionary=self._leaf(source),
            codes=self._leaf(node),
            dictionary_name=metadata[Part.DICTIONARY],
            pattern=Pattern.of_text(metadata[Part.PATTERN]),
        )

    def _leaf(self, node: NodeProto) -> Leaf:
        """The matrix that a product multiplies with."""
        if node.op_type == "MatMulNBits":
            grid = Grid(_attribute(node, "bits"), _attribute(node, "block_size"))
            expansion = expansion_of(node.input[1], self._producer)
            if expansion is not None:
                return self._packed(node, expansion, grid)
            return self._nbits(node.input[1], node.input[2], _attribute(node, "K"), grid)
        if node.op_type == "MatMulBnb4":
            return self._bnb4(node)
        weight = self._producer.get(node.input[1])
        if weight is not None and weight.op_type == "DequantizeLinear":
            integers = self._reader.protos[weight.input[0]]
            grid = Grid(4 if integers.data_type == TensorProto.INT4 else 8, _attribute(weight, "block_size"))
            packed = Blocked(self._reader.bytes_of(weight.input[0]), self._behind_cast(weight.input[1]))
            return unpack_blocked(packed, int(integers.dims[0]), grid)
        return Dense(self._behind_cast(node.input[1]))

    def _packed(self, node: NodeProto, expansion: Expansion, grid: Grid) -> Quantized:
        """Integers that the graph expands to those of `grid`."""
        values = self._reader.bytes_of(expansion.values)
        values = values.view(*self._reader.protos[expansion.values].dims)
        halves, scales = self._reader.bytes_of(expansion.patterns), self._behind_cast(node.input[2])
        rows = _attribute(node, "K")
        if expansion.table == THREE_BITS_TABLE:
            return unpack_three_bits(ThreeBits(values, halves, scales), rows, Grid(3, grid.group))
        return unpack_two_of_four(TwoOfFour(values, halves, scales), rows, grid)

    def _bnb4(self, node: NodeProto) -> Quantized:
        rows, outputs = _attribute(node, "K"), _attribute(node, "N")
        kinds = {number: name for name, number in BNB_TYPES.items()}
        grid = Grid(4, _attribute(node, "block_size"), cast(Codebook, kinds[_attribute(node, "quant_type")]))
        blob = self._reader.bytes_of(node.input[1]).view(outputs, rows // grid.group, grid.group // 2)
        return unpack_bnb4(Bnb4(blob, self._behind_cast(node.input[2]).view(outputs, -1)), rows, grid)

    def _table(self, node: NodeProto) -> Leaf:
        """The token embedding, turned from (vocabulary, hidden) to (hidden, vocabulary)."""
        if node.op_type == "Gather":
            return Dense(self._behind_cast(node.input[0]).T)
        grid = Grid(_attribute(node, "bits"), _attribute(node, "block_size"))
        return self._nbits(node.input[0], node.input[2], int(_metadata(node)[Part.INPUTS]), grid)

    def _nbits(self, integers: str, scales: str, rows: int, grid: Grid) -> Quantized:
        stored = self._behind_cast(scales)
        blob = self._reader.bytes_of(integers).view(*stored.shape, grid.group * grid.bits // 8)
        return unpack_nbits(NBits(blob, stored), rows, grid)

    def _behind_cast(self, value: str) -> Tensor:
        """The stored tensor that a value is, or is cast from."""
        node = self._producer.get(value)
        return self.stored(str(node.input[0]) if node is not None and node.op_type == "Cast" else value)

    def stored(self, name: str) -> Tensor:
        """A floating-point tensor of the graph."""
        with self._contradictions(name):
            data = self._reader.bytes_of(name).clone()  # the mapping is read-only, a matrix need not be
            proto = self._reader.protos[name]
            return data.view(FLOAT_TYPES[proto.data_type]).view(*proto.dims)

    @contextmanager
    def _contradictions(self, name: str) -> Iterator[None]:
        """Whatever a graph provokes whose parts do not belong together is one sentence.

        Raises:
            ArtifactError: names what was read.
        """
        try:
            yield
        except (CompotDeployError, MemoryError):
            raise
        except Exception as error:  # sizes, types and names of tensors: each of them may be anything
            raise ArtifactError(
                f"{self._path}: {name} contradicts itself ({type(error).__name__}: {first_line(error)}). Export the "
                "model again."
            ) from None


class _Tensors(Mapping[str, Tensor]):
    """Tensors of a graph by name."""

    def __init__(self, graph: OnnxMatrices) -> None:
        self._graph, self._names = graph, dict.fromkeys(graph.float_names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._graph.stored(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def _metadata(node: NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def _attribute(node: NodeProto, name: str) -> int:
    for attribute in node.attribute:
        if attribute.name == name:
            return int(attribute.i)
    raise ArtifactError(f"The node {node.name} has no attribute {name}.")
