"""A trace and a model to a graph: placeholders become operators, parameters go to the data file, names become paths.

Every matrix goes the way that it goes in a native graph, through `GraphBuilder`, so what is in the file is bit for bit
what was given. A parameter that the output does not depend on, a pooler's under token vectors, is not written.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from compot_deploy import __version__
from compot_deploy.core.matrix import Matrix
from compot_deploy.errors import InputError, UnsupportedModelError
from compot_deploy.exporters.onnx.graph import GraphBuilder, TokenTable
from compot_deploy.exporters.onnx.interface import BRANCH, HEARD, MASK, Interface
from compot_deploy.exporters.onnx.nodes import IR_VERSION, MICROSOFT, TRACED, node_path
from compot_deploy.exporters.onnx.recurrence import OPERATOR, scan_of
from compot_deploy.exporters.onnx.tracing import INPUT, OPSET, PREFIX, Trace
from compot_deploy.exporters.onnx.wrappers import PLACEHOLDER_DOMAIN

_ALL: Final = 2**31 - 1
"""Where a slice ends that takes everything."""

_SUBGRAPHS: Final = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def assemble(
    trace: Trace, matrices: Mapping[str, Matrix], tensors: Mapping[str, Tensor], graph: GraphBuilder
) -> ModelProto:
    """The finished graph; its tensors go to the builder's data file.

    Args:
        trace: of the model.
        matrices: by module path, (in, out); the token table as (hidden, vocabulary); of a tower, those of both.
        tensors: all other parameters, by name in the model.
        graph: an empty builder.

    Raises:
        UnsupportedModelError: a compressed matrix is used for more than products, or the graph branches on values.
        RecipeError: a grid that ONNX cannot hold, or a factorized token table.
        InputError: a parameter is missing, unknown, or has another shape than in the trace.
    """
    for name in matrices:
        if f"{name}.weight" not in trace.shapes and not trace.interface.is_tower:
            raise InputError(f"A {trace.class_name} has no matrix {name}.")
    assembly = _Assembly(trace, matrices, tensors, graph)
    assembly.run()
    interface = trace.interface
    made = helper.make_graph(
        graph.nodes, interface.task, _inputs(interface), _outputs(interface), list(graph.tensors.values())
    )
    model = helper.make_model(
        made,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
        producer_name="compot-deploy",
        producer_version=__version__,
    )
    entry = model.metadata_props.add()
    entry.key, entry.value = TRACED, interface.task
    return model


@dataclass
class _Placed:
    """Where a parameter is in the graph: the nodes of its first use, what they read and give.

    Attributes:
        source: the value that the nodes read.
        nodes: in running order.
        value: what the last one gives.
        uses: how often the parameter was used so far.
    """

    source: str
    nodes: tuple[NodeProto, ...]
    value: str
    uses: int = 1


@dataclass
class _Assembly:
    """Walks through a trace, node by node."""

    trace: Trace
    matrices: Mapping[str, Matrix]
    tensors: Mapping[str, Tensor]
    graph: GraphBuilder
    values: dict[str, str] = field(default_factory=dict)
    """Value of the trace to value of the graph."""
    placed: dict[str, _Placed] = field(default_factory=dict)
    repeated: dict[int, dict[str, str]] = field(default_factory=dict)
    """By number of a pass through shared layers: value of the first pass to value of this one."""
    table: TokenTable | None = None
    spread: dict[str, str] = field(default_factory=dict)
    """Angles of one row to the same for every row."""

    def __post_init__(self) -> None:
        # Asking a mapping that reads lazily whether it has a name would read it.
        self.matrix_names, self.tensor_names = frozenset(self.matrices), frozenset(self.tensors)

    def run(self) -> None:
        proto = self.trace.proto.graph
        initializers = {tensor.name: tensor for tensor in proto.initializer}
        if self.trace.interface.hears:
            self.values[HEARD] = self._heard_once()
        outputs = {value.name for value in proto.output}
        taken: set[str] = set()
        named = 0
        for node in proto.node:
            if (node.op_type, node.domain) == (OPERATOR, PLACEHOLDER_DOMAIN):
                read = [self._read(value, initializers) for value in node.input]
                name = _unused(f"{_scope(node)}/GatedDelta/Scan", taken)
                self.graph.nodes.append(scan_of(read, node.output, name))
                continue
            if node.domain == PLACEHOLDER_DOMAIN:
                value = self._place(node, self._read(node.input[0], initializers))
                self.values[node.output[0]] = value
                if node.output[0] in outputs:
                    self.graph.nodes[-1].output[0] = self.values[node.output[0]] = node.output[0]
                continue
            if any(attribute.type in _SUBGRAPHS for attribute in node.attribute):
                raise UnsupportedModelError(
                    f"The model branches on its values ({node.op_type} in {_scope(node)}), which is not supported."
                )
            taken.update(made.name for made in self.graph.nodes[named:])
            named = len(self.graph.nodes)
            copied = NodeProto()
            copied.CopyFrom(node)
            del copied.metadata_props[:], copied.input[:]  # traces of where the code lay; names of before
            copied.doc_string = ""
            copied.input.extend(self._read(value, initializers) if value else "" for value in node.input)
            rotates = (copied.op_type, copied.domain) == ("RotaryEmbedding", "")
            if rotates and sum(map(bool, copied.input)) == 3:  # a fourth would say which rows of a table
                copied.input[1], copied.input[2] = (
                    self._for_every_row(angles, copied.input[0]) for angles in copied.input[1:3]
                )
            copied.name = _unused(f"{_scope(node)}/{node.op_type}", taken)
            self.graph.nodes.append(copied)

    def _heard_once(self) -> str:
        """The encoder's output where the cache does not hold what was made of it, and nothing of it where it does."""
        path = "/heard_once"
        bounds = [self.graph.constant([value]) for value in (0, _ALL)]
        end = self.graph.node("Where", [BRANCH, *bounds], f"{path}/Where")
        slice_ = [HEARD, self.graph.constant([0]), end, self.graph.constant([1])]
        return self.graph.node("Slice", slice_, f"{path}/Slice")

    def _for_every_row(self, angles: str, values: str) -> str:
        """Rotary angles as often as there are rows: torch spreads them by itself, the standard operator does not."""
        if self.trace.positioned:
            return angles
        if angles not in self.spread:
            path = f"/rotary/{len(self.spread)}"
            rows = self.graph.node("Shape", [values], f"{path}/rows/Shape", start=0, end=1)
            rest = self.graph.node("Shape", [angles], f"{path}/rest/Shape", start=1)
            shape = self.graph.node("Concat", [rows, rest], f"{path}/shape/Concat", axis=0)
            self.spread[angles] = self.graph.node("Expand", [angles, shape], f"{path}/Expand")
        return self.spread[angles]

    def _read(self, name: str, initializers: Mapping[str, TensorProto]) -> str:
        """The value that a node reads, its tensor written when it is first read."""
        if name not in self.values:
            if name.startswith(INPUT):
                self.values[name] = self._parameter(name.removeprefix(INPUT))
            elif name in initializers:
                self.values[name] = self._constant(initializers[name])
        return self.values.get(name, name)

    def _parameter(self, name: str) -> str:
        """A parameter that is not only multiplied with."""
        module = name.removesuffix(".weight")
        if module in self.matrix_names:
            raise UnsupportedModelError(
                f"{module} does more in this model than to be multiplied with, so it cannot be compressed in ONNX."
            )
        return self.graph.float_tensor(name, self._tensor(name))

    def _tensor(self, name: str) -> Tensor:
        found = self.tensors[name] if name in self.tensor_names else self.trace.buffers.get(name)
        if found is None:
            raise InputError(f"The model lacks {name}, on which its output depends.")
        self._check_shape(name, tuple(found.shape), self.trace.shapes[name])
        return found

    def _matrix(self, module: str, turned: int) -> Matrix:
        """A matrix, (in, out), of the shape that its parameter has in the trace."""
        matrix, shape = self.matrices[module], self.trace.shapes[f"{module}.weight"]
        self._check_shape(module, matrix.shape, shape[::-1] if turned else shape)
        return matrix

    def _check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise InputError(f"{name} is {found}, and the configuration makes it {expected}.")

    def _constant(self, proto: TensorProto) -> str:
        """A traced constant; buffers keep their names in the model, others get a path."""
        name = proto.name
        data = torch.from_numpy(numpy_helper.to_array(proto).copy())
        own = name.removeprefix(PREFIX) if name.startswith(PREFIX) else f"/constants/{name}"
        return self.graph.tensor(own, data, proto.data_type, list(proto.dims))

    # -- parameters --

    def _place(self, node: NodeProto, source: str) -> str:
        """The nodes in the place of a placeholder."""
        parameter = _text(node, "parameter")
        key = f"{node.op_type} {parameter}"
        before = self.placed.get(key)
        if before is not None:
            return self._again(before, source)
        start = len(self.graph.nodes)
        if node.op_type == "Embedding":
            value = self._embedding(parameter, source)
        else:
            value = self._product(parameter, source, turned=_number(node, "turned"))
        self.placed[key] = _Placed(source, tuple(self.graph.nodes[start:]), value)
        return value

    def _embedding(self, parameter: str, source: str) -> str:
        module = parameter.removesuffix(".weight")
        if module not in self.matrix_names:
            stored = self._read(f"{INPUT}{parameter}", {})
            return self.graph.node("Gather", [stored, source], f"{node_path(module)}/Gather", axis=0)
        tied = any(
            node.domain == PLACEHOLDER_DOMAIN
            and node.op_type == "Linear"
            and _text(node, "parameter") == parameter
            for node in self.trace.proto.graph.node
        )
        value, self.table = self.graph.embedding(module, self._matrix(module, 1), source, tied=tied)
        return value

    def _product(self, parameter: str, source: str, *, turned: int) -> str:
        module = parameter.removesuffix(".weight")
        if self.table is not None and f"Embedding {parameter}" in self.placed:
            return self.graph.tied_head(self.trace.head or f"{module}.head", module, self.table, source)
        if module in self.matrix_names:
            return self.graph.linear(module, self._matrix(module, turned), source, None)
        stored = self._read(f"{INPUT}{parameter}", {})
        return self.graph.node(
            "FusedMatMul", [source, stored], f"{node_path(module)}/MatMul", domain=MICROSOFT, transB=turned
        )

    def _again(self, first: _Placed, source: str) -> str:
        """The same product with another input, for layers that share their weights."""
        first.uses += 1
        renamed = self.repeated.setdefault(first.uses, {})
        renamed[first.source] = source
        for node in first.nodes:
            if not any(name in renamed for name in node.input):
                continue  # made of tensors alone
            copied = NodeProto()
            copied.CopyFrom(node)
            del copied.metadata_props[:], copied.input[:], copied.output[:]
            copied.input.extend(renamed.get(name, name) for name in node.input)
            copied.name = f"{node.name}_{first.uses}"
            copied.output.extend(f"{name}_{first.uses}" for name in node.output)
            renamed |= dict(zip(node.output, copied.output, strict=True))
            self.graph.nodes.append(copied)
        return renamed[first.value]


def _scope(node: NodeProto) -> str:
    """The module in which a node was traced, as a path: torch notes the modules around it."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            modules = [scope for scope in ast.literal_eval(entry.value)[:-1] if scope.startswith(PREFIX)]
            if modules:
                return node_path(modules[-1].removeprefix(PREFIX))
    return "/model"


def _text(node: NodeProto, name: str) -> str:
    return next((attribute.s.decode() for attribute in node.attribute if attribute.name == name), "")


def _number(node: NodeProto, name: str) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), 0)


def _unused(name: str, taken: set[str]) -> str:
    """`name`, or the first of ``name_2``, ``name_3`` … that no node has."""
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate)
    return candidate


def _inputs(interface: Interface) -> list[onnx.ValueInfoProto]:
    decodes = interface.task == "generation"
    lengths = {MASK: "encoder_sequence_length"} | (
        {"attention_mask": "total_sequence_length"} if decodes else {}
    )
    floating = dict(interface.floating)
    made = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch_size", *floating[name]])
        if name in floating
        else helper.make_tensor_value_info(
            name, TensorProto.INT64, ["batch_size", lengths.get(name, "sequence_length")]
        )
        for name in interface.inputs
    ] + _caches(interface, interface.past, "past_sequence_length")
    if interface.hears:
        made.append(helper.make_tensor_value_info(BRANCH, TensorProto.BOOL, [1]))
    return made


def _outputs(interface: Interface) -> list[onnx.ValueInfoProto]:
    sizes = ["batch_size", *interface.output_sizes]
    return [
        helper.make_tensor_value_info(interface.output, TensorProto.FLOAT, sizes),
        *_caches(interface, interface.present, "total_sequence_length"),
    ]


def _caches(interface: Interface, names: Iterable[str], length: str) -> list[onnx.ValueInfoProto]:
    sizes = interface.cache_tensors
    states = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch_size", *state])
        for name, (_, _, state) in zip(list(names)[len(sizes) :], interface.states, strict=True)
    ]
    return [
        helper.make_tensor_value_info(
            name,
            TensorProto.FLOAT,
            ["batch_size", heads, f"encoder_{length}" if ".encoder." in name else length, size],
        )
        for name, (heads, size) in zip(list(names)[: len(sizes)], sizes, strict=True)
    ] + states
