"""The graph of a model that has none of ours: its forward pass is traced.

torch's exporter turns the model's own code into a graph, with every compressed linear replaced by a
placeholder that says which matrix belongs there; then the placeholders become the operators that
`GraphBuilder` writes for any other model::

    model ─ placeholders ─→ torch.onnx.export ─→ graph with compot::Linear(matrix="…") ─→ MatMulNBits

No weight of a compressed matrix is traced, so no exporter can transpose, fold, merge or round it: what is in
the file is bit for bit what was given. What is not given (norms, biases, position tables) is traced as it stands.

Facts that shape it, seen with torch 2.13, transformers 4.57 and 5.23, ONNX Runtime 1.32:

* Opset 23 exactly: at 20 attention is taken apart, at 24 RMS norms are.
* Sizes 0 and 1 are special to the tracer, so it is shown 2 rows, 3 tokens and a past of 5; the graph then takes
  any, a past of 0 included.
* Positions of a decoder are counted from the attention mask: left-padded rows come out as unpadded ones do.

Sources: the documentation of torch.onnx (``torch.onnx.ops.symbolic``); the ONNX operator specification, opset 23.
"""

from __future__ import annotations

import ast
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, Final

import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper
from torch import Tensor, nn

from compot_deploy import __version__
from compot_deploy.core.matrix import Matrix
from compot_deploy.errors import InputError, MissingDependencyError, UnsupportedModelError
from compot_deploy.exporters.onnx.exporter import OnnxOptions
from compot_deploy.exporters.onnx.graph import (
    ACCURACY_LEVEL,
    IR_VERSION,
    MICROSOFT,
    TRACED,
    GraphBuilder,
    TokenTable,
    node_path,
)
from compot_deploy.exporters.onnx.interface import Interface, Task, cache_tensors, interface_of
from compot_deploy.exporters.onnx.placeholders import (
    PLACEHOLDER_DOMAIN,
    Placeholder,
    embedding_tables,
    replaced,
)
from compot_deploy.exporters.onnx.tensors import TensorWriter
from compot_deploy.models.transformers_versions import cache_of, forward_with_cache

OPSET: Final = 23

_PREFIX: Final = "traced."
"""What the wrapper around a model puts before the names of its parameters."""


def build_traced(
    model: nn.Module,
    data: BinaryIO,
    location: str,
    matrices: Mapping[str, Matrix],
    options: OnnxOptions = OnnxOptions(),  # noqa: B008 - frozen
) -> ModelProto:
    """The graph of a model; its tensors go to the data file.

    Args:
        model: of transformers, in float32 and in evaluation mode. It is as it was afterwards.
        data: a file opened for writing; tensors are appended where it stands.
        location: its name, relative to the graph.
        matrices: as `matrices_of` gives them.
        options: of the export; `context` is not used.

    Raises:
        MissingDependencyError: onnxscript is not installed, or torch is older than 2.8.
        UnsupportedModelError: see `interface_of`, and whatever torch's exporter cannot do.
        RecipeError: a grid that ONNX cannot hold, or a factorized embedding.
        InputError: a model in training mode or in another type than float32.
    """
    name = type(model).__name__
    if model.training:
        raise InputError(
            f"{name} is in training mode, where dropout acts: call model.eval() before exporting."
        )
    other = next(
        (p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None
    )
    if other is not None:
        raise InputError(f"{name} has parameters in {other}: call model.float() before exporting.")
    interface = interface_of(model)
    tables = embedding_tables(model)
    modules: dict[str, nn.Module] = {}
    for path, matrix in matrices.items():
        bias = getattr(model.get_submodule(path), "bias", None)
        if path == tables.embedding:
            modules[path] = Placeholder("Embedding", path, matrix.shape[0])
        else:
            modules[path] = Placeholder("Linear", path, matrix.shape[1], bias)
    head, table = tables.tied_head, tables.embedding
    if head is not None and table is not None and head not in matrices:
        bias = getattr(model.get_submodule(head), "bias", None)
        modules[head] = Placeholder("TiedHead", head, matrices[table].shape[1], bias, table)
    with replaced(model, modules):
        proto = _trace(model, interface)
    graph = GraphBuilder(
        TensorWriter(data, location, data.tell()), options.ops, ACCURACY_LEVEL, options.floats, options.codes
    )
    return _finish(proto, interface, matrices, graph)


def interface_task(proto: ModelProto) -> Task | None:
    """What a traced graph is for; None for a graph that was not traced."""
    for entry in proto.metadata_props:
        if entry.key == TRACED:
            return "generation" if entry.value == "generation" else "features"
    return None


# --- tracing -----------------------------------------------------------------------------------------


class _Features(nn.Module):
    """A model with tensors in and one tensor out."""

    def __init__(self, model: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.traced, self.interface = model, interface

    def forward(self, *tokens: Tensor) -> Tensor:
        return self.traced(**dict(zip(self.interface.inputs, tokens, strict=True)))[self.interface.output]


class _Generation(nn.Module):
    """A decoder with tensors in and tensors out: its cache as a list, its positions from the mask."""

    def __init__(self, model: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.traced, self.interface = model, interface
        self.positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(self.interface.cache)):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.positions:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            arguments["position_ids"] = positions[:, -input_ids.shape[1] :]
        found = forward_with_cache(self.traced, cache, **arguments)
        return found[self.interface.output], *cache_tensors(cache_of(found))


def _trace(model: nn.Module, interface: Interface) -> ModelProto:
    """The graph of a model with placeholders, its other weights inside."""
    _require_tracer()
    rows, length, past = 2, 3, 5
    dynamic = torch.export.Dim.DYNAMIC
    by_row = {0: dynamic, 1: dynamic}
    inputs, outputs = [*interface.inputs, *interface.past], [interface.output, *interface.present]
    wrapper: nn.Module
    arguments: tuple[Any, ...]
    shapes: tuple[Any, ...]
    if interface.task == "generation":
        cache = [torch.zeros(rows, heads, past, size) for heads, size in interface.cache for _ in range(2)]
        wrapper = _Generation(model, interface)
        arguments = (_ones(rows, length), _ones(rows, past + length), cache)
        shapes = (by_row, by_row, [{0: dynamic, 2: dynamic}] * len(cache))
    else:
        wrapper = _Features(model, interface)
        # Each a tensor of its own: the tracer takes equal objects for the same input.
        arguments = tuple(_ones(rows, length) for _ in interface.inputs)
        shapes = ((by_row,) * len(interface.inputs),)
    with _quiet(), torch.inference_mode():
        try:
            program = torch.onnx.export(
                wrapper.eval(),
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # the exporter's errors share no base class but this
            reason = str(error).strip().splitlines()
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be traced: torch's exporter stops with {type(error).__name__}: "
                f"{reason[0] if reason else 'no message'}"
            ) from error
    assert program is not None
    proto: ModelProto = program.model_proto
    return inliner.inline_local_functions(proto) if proto.functions else proto


def _ones(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.int64)


def _require_tracer() -> None:
    purpose = "Tracing a model without a graph of its own"
    if not hasattr(getattr(torch.onnx, "ops", None), "symbolic"):
        raise MissingDependencyError("torch>=2.8", "trace", purpose)
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingDependencyError("onnxscript", "trace", purpose) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about packages that are not needed and about its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# --- the finished graph ------------------------------------------------------------------------------


def _finish(
    proto: ModelProto,
    interface: Interface,
    matrices: Mapping[str, Matrix],
    graph: GraphBuilder,
) -> ModelProto:
    """Placeholders to operators, weights to the data file, names to paths."""
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    outputs = [value.name for value in proto.graph.output]
    renamed: dict[str, str] = {}
    tables: dict[str, TokenTable] = {}
    taken: set[str] = set()

    def stored(name: str) -> str:
        """The value that a node reads, its tensor written when it is first read."""
        if name not in renamed and name in initializers:
            renamed[name] = _store(initializers[name], graph)
        return renamed.get(name, name)

    for node in proto.graph.node:
        if node.domain == PLACEHOLDER_DOMAIN:
            matrix = _text(node, "matrix")
            source = stored(node.input[0])
            if node.op_type == "Linear":
                value = graph.linear(matrix, matrices[matrix], source, None)
            elif node.op_type == "Embedding":
                tied = any(_text(other, "table") == matrix for other in proto.graph.node)
                value, tables[matrix] = graph.embedding(matrix, matrices[matrix], source, tied=tied)
            else:
                table = _text(node, "table")
                value = graph.tied_head(matrix, table, tables[table], source)
            renamed[node.output[0]] = value
            if node.output[0] in outputs:
                graph.nodes[-1].output[0] = renamed[node.output[0]] = node.output[0]
            continue
        if any(attribute.type in _SUBGRAPHS for attribute in node.attribute):
            raise UnsupportedModelError(
                f"The model branches on its values ({node.op_type} in {_scope(node)}), which is not supported."
            )
        taken.update(made.name for made in graph.nodes)
        copied = NodeProto()
        copied.CopyFrom(node)
        del copied.metadata_props[:], copied.input[:]  # traces of where the code lay; names of before
        copied.doc_string = ""
        copied.input.extend(stored(value) if value else "" for value in node.input)
        copied.name = _unused(f"{_scope(node)}/{node.op_type}", taken)
        graph.nodes.append(copied)
    made = helper.make_graph(
        graph.nodes,
        interface.task,
        _inputs(interface),
        _outputs(interface),
        list(graph.tensors.values()),
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


_SUBGRAPHS: Final = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def _store(proto: TensorProto, graph: GraphBuilder) -> str:
    """Write a traced tensor; parameters keep their names in the model, constants get a path."""
    name = proto.name
    own = name.startswith(_PREFIX)
    data = torch.from_numpy(numpy_helper.to_array(proto).copy())
    return graph.tensor(
        name.removeprefix(_PREFIX) if own else f"/constants/{name}", data, proto.data_type, list(proto.dims)
    )


def _scope(node: NodeProto) -> str:
    """The module in which a node was traced, as a path: torch notes the modules around it."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            modules = [scope for scope in ast.literal_eval(entry.value)[:-1] if scope.startswith(_PREFIX)]
            if modules:
                return node_path(modules[-1].removeprefix(_PREFIX))
    return "/model"


def _text(node: NodeProto, name: str) -> str:
    for attribute in node.attribute:
        if attribute.name == name:
            return attribute.s.decode()
    return ""


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
    lengths = {"attention_mask": "total_sequence_length"} if decodes else {}
    return [
        helper.make_tensor_value_info(
            name, TensorProto.INT64, ["batch_size", lengths.get(name, "sequence_length")]
        )
        for name in interface.inputs
    ] + _caches(interface, interface.past, "past_sequence_length")


def _outputs(interface: Interface) -> list[onnx.ValueInfoProto]:
    sizes = ["batch_size", *interface.output_sizes]
    return [
        helper.make_tensor_value_info(interface.output, TensorProto.FLOAT, sizes),
        *_caches(interface, interface.present, "total_sequence_length"),
    ]


def _caches(interface: Interface, names: Sequence[str], length: str) -> list[onnx.ValueInfoProto]:
    sizes = [size for size in interface.cache for _ in range(2)]
    return [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch_size", heads, length, size])
        for name, (heads, size) in zip(names, sizes, strict=True)
    ]
