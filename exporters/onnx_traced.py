"""The ONNX folder of a model that has no graph of ours: its forward pass is traced.

Encoders, classifiers and decoders outside `compot_deploy.architectures` come this way. torch's exporter turns the
model's own code into a graph, with every compressed linear replaced by a placeholder that says which matrix
belongs there; then the placeholders become the operators that `GraphBuilder` writes for any other model::

    model ─ placeholders ─→ torch.onnx.export ─→ graph with compot::Linear(matrix="…") ─→ MatMulNBits

No weight of a compressed matrix is traced, so no exporter can transpose, fold, merge or round it: what is in
the file is bit for bit what was given. What is not given (norms, biases, position tables) is traced as it stands.

A decoder gets the inputs and outputs that a graph of ours has, caches and left padding included, so everything
that reads those folders reads this one. The difference: attention is the standard operator, not
GroupQueryAttention, so the cache is copied for each token and decoding is slower.

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
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, TypeAlias, cast, get_args

import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper
from torch import Tensor, nn

from compot_deploy import __version__
from compot_deploy.embeddings import Difference, Texts, compare_texts
from compot_deploy.errors import InputError, MissingDependencyError, UnsupportedModelError
from compot_deploy.exporters.onnx import (
    OnnxMatrices,
    OnnxOptions,
    copy_tokenizer,
    write_json,
)
from compot_deploy.exporters.onnx_config import (
    GenaiDecoder,
    genai_json,
    generation_config_json,
    portable_config,
)
from compot_deploy.exporters.onnx_graph import (
    ACCURACY_LEVEL,
    IR_VERSION,
    MICROSOFT,
    TRACED,
    GraphBuilder,
    TokenTable,
    node_path,
)
from compot_deploy.exporters.onnx_session import open_session
from compot_deploy.exporters.onnx_tensors import DATA, GRAPH, TensorWriter
from compot_deploy.weights import Dense, Matrix

OPSET: Final = 23

Task: TypeAlias = Literal["features", "generation"]
"""What a graph is for: one pass over whole texts, or text token by token with a cache."""

_DOMAIN: Final = "compot"
"""Of the placeholders; nothing of it is left in a finished graph."""

_PREFIX: Final = "traced."
"""What the wrapper around a model puts before the names of its parameters."""

_PLAIN_NAMES: Final = ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")
"""Names of sizes that consumers know; a configuration may have names of its own for them."""

_SENTENCE_FILES: Final = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
"""How token embeddings become one of a sentence, as sentence-transformers reads it; copied where present."""


# --- what goes in and comes out ----------------------------------------------------------------------


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a traced graph.

    Attributes:
        task: what it is for.
        inputs: names, in order; without the cache.
        output: ``last_hidden_state`` or ``logits``.
        output_sizes: its sizes after the batch, a name where they depend on the input.
        cache: heads and head size of each layer's keys and values; empty without a cache.
    """

    task: Task
    inputs: tuple[str, ...]
    output: str
    output_sizes: tuple[str | int, ...]
    cache: tuple[tuple[int, int], ...] = ()

    @property
    def past(self) -> tuple[str, ...]:
        """Names of the cache on its way in."""
        return tuple(
            f"past_key_values.{i}.{kind}" for i in range(len(self.cache)) for kind in ("key", "value")
        )

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the cache on its way out."""
        return tuple(f"present.{i}.{kind}" for i in range(len(self.cache)) for kind in ("key", "value"))


def interface_of(model: nn.Module) -> Interface:
    """What a graph of `model` takes and gives; the model reads two tokens to find out.

    Args:
        model: of transformers, in evaluation mode.

    Raises:
        UnsupportedModelError: it does not read tokens, has an encoder and a decoder, or keeps something else
            than keys and values while it generates.
    """
    parameters = inspect.signature(model.forward).parameters
    name, config = type(model).__name__, _config(model)
    if "input_ids" not in parameters or "attention_mask" not in parameters:
        raise UnsupportedModelError(
            f"{name} cannot be traced: its forward pass does not take input_ids and attention_mask. "
            "Models that read text are supported."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} cannot be traced: it has an encoder and a decoder, which are two graphs. "
            "Export its encoder, model.get_encoder(), by itself."
        )
    task: Task = "generation" if _decodes(model) else "features"
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if task == "generation":
        arguments["use_cache"] = True
    with torch.inference_mode():
        found = model(**arguments)
    output = "logits" if getattr(found, "logits", None) is not None else "last_hidden_state"
    if getattr(found, output, None) is None:
        raise UnsupportedModelError(
            f"{name} cannot be traced: it returns {', '.join(found)}, and neither logits nor last_hidden_state."
        )
    sizes: tuple[str | int, ...] = tuple(found[output].shape[1:])
    if len(sizes) == 2:
        sizes = ("sequence_length", sizes[1])
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    if task == "generation":
        return Interface(task, inputs, output, sizes, _cache_sizes(found.get("past_key_values"), name))
    if "token_type_ids" in parameters and int(getattr(config, "type_vocab_size", 0) or 0) > 1:
        inputs = (*inputs, "token_type_ids")
    return Interface(task, inputs, output, sizes)


def _decodes(model: nn.Module) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and bool(can_generate())


def _cache_sizes(cache: Any, name: str) -> tuple[tuple[int, int], ...]:
    """Heads and head size by layer, of a cache that holds two tokens."""
    tensors = _cache_tensors(cache)
    for keys, values in zip(tensors[::2], tensors[1::2], strict=True):
        if keys.dim() != 4 or keys.shape != values.shape or keys.shape[2] != 2:
            raise UnsupportedModelError(
                f"{name} cannot be traced for generation: its cache holds tensors of the shapes "
                f"{tuple(keys.shape)} and {tuple(values.shape)}, not keys and values of every token."
            )
    if not tensors:
        raise UnsupportedModelError(
            f"{name} cannot be traced for generation: it keeps no keys and values (its cache is a "
            f"{type(cache).__name__})."
        )
    return tuple((int(keys.shape[1]), int(keys.shape[3])) for keys in tensors[::2])


def _cache_tensors(cache: Any) -> list[Tensor]:
    """Keys and values, layer by layer, of a cache of transformers."""
    tensors = [part for layer in getattr(cache, "layers", ()) for part in _layer_tensors(layer)]
    return tensors if all(isinstance(tensor, Tensor) for tensor in tensors) else []


def _layer_tensors(layer: Any) -> tuple[Any, Any]:
    return getattr(layer, "keys", None), getattr(layer, "values", None)


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


# --- placeholders ------------------------------------------------------------------------------------


class _Placeholder(nn.Module):
    """Stands where a matrix belongs, and leaves a node with its name in the graph."""

    def __init__(
        self, operator: str, matrix: str, outputs: int, bias: Tensor | None = None, table: str = ""
    ) -> None:
        super().__init__()
        self.operator, self.outputs, self.bias = operator, outputs, bias
        self.facts: dict[str, Any] = {"matrix": matrix, "table": table}
        # Some models ask a linear for the type of its weight. Nothing can be computed with this one.
        self.weight = torch.empty(0)

    def forward(self, values: Tensor) -> Tensor:
        embeds = self.operator == "Embedding"
        sizes = (*values.shape, self.outputs) if embeds else (*values.shape[:-1], self.outputs)
        value = torch.onnx.ops.symbolic(
            f"{_DOMAIN}::{self.operator}",
            (values,),
            self.facts,
            dtype=torch.float32,
            shape=sizes,
            version=1,
        )
        return value if self.bias is None else value + self.bias


class Product(nn.Module):
    """A linear that multiplies with what a matrix stands for: the reference for a file."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, values: Tensor) -> Tensor:
        """``values @ weight + bias``."""
        value = values @ self.weight
        return value if self.bias is None else value + self.bias


@contextmanager
def _replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """`model` with other modules at some paths; afterwards it is as it was."""
    originals = {path: model.get_submodule(path) for path in modules}

    def place(chosen: Mapping[str, nn.Module]) -> None:
        for path, module in chosen.items():
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module)

    try:
        place(modules)
        yield
    finally:
        place(originals)


@dataclass(frozen=True)
class _Tables:
    """Where the token embedding is, and the head that reads the same table; None where there is none."""

    embedding: str | None
    tied_head: str | None


def _tables(model: nn.Module) -> _Tables:
    get_input, get_output = (
        getattr(model, f"get_{end}_embeddings", lambda: None) for end in ("input", "output")
    )
    table, head = get_input(), get_output()
    paths = {id(module): path for path, module in model.named_modules()}
    embedding = paths.get(id(table)) if isinstance(table, nn.Embedding) else None
    if not isinstance(table, nn.Embedding) or head is None:
        return _Tables(embedding, None)
    same = getattr(head, "weight", None) is table.weight
    return _Tables(embedding, paths.get(id(head)) if same else None)


def matrices_of(model: nn.Module, matrices: Mapping[str, Matrix] | None = None) -> dict[str, Matrix]:
    """Every matrix that will be written, by module path and in the model's order.

    Args:
        model: its factorised modules (those with an attribute ``matrix``) are taken as they are.
        matrices: more of them, or others in their place; (in, out), the token embedding (hidden, vocabulary).

    Raises:
        InputError: a name that is no module of the model, or a matrix of another shape than the module.
    """
    given = dict(matrices or {})
    tables = _tables(model)
    found: dict[str, Matrix] = {}
    for path, module in model.named_modules():
        matrix = given.pop(path, None)
        expected = None if matrix is None else _shape(module)
        if matrix is None:
            matrix = matrix_of_module(module, path)
        if matrix is None and path == tables.embedding and tables.tied_head is not None:
            matrix = Dense(module.weight.detach().T)  # so that the table that both use is stored once
        if matrix is None:
            continue
        if expected is not None and matrix.shape != expected:
            raise InputError(f"{path}: the matrix is {matrix.shape}, and the model has {expected} there.")
        found[path] = matrix
    if given:
        raise InputError(f"{type(model).__name__} has no module {next(iter(given))}.")
    return found


def matrix_of_module(module: nn.Module, path: str) -> Matrix | None:
    """The matrix of a compressed module; None for any other module.

    Args:
        module: with a method ``matrix_of(dictionary_name)`` or an attribute ``matrix``.
        path: of the module, which names a dictionary that is not shared.
    """
    reader = getattr(module, "matrix_of", None)
    if callable(reader):
        return reader(path)
    own = getattr(module, "matrix", None)
    return own if isinstance(own, get_args(Matrix)) else None


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear, (hidden, vocabulary) of an embedding; None where it cannot be told."""
    if not isinstance(module, nn.Linear | nn.Embedding) and type(module).__name__ != "Conv1D":
        return None
    rows, columns = cast(Tensor, module.weight).shape
    # Conv1D of transformers keeps (in, out); nn.Linear and nn.Embedding the transpose.
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


@contextmanager
def dequantized(model: nn.Module, matrices: Mapping[str, Matrix]) -> Iterator[nn.Module]:
    """`model` with every matrix as what it stands for, in float32: the reference that a file is held against."""
    tables = _tables(model)
    modules: dict[str, nn.Module] = {}
    for path, matrix in matrices.items():
        weight = matrix.dequantize()
        if path != tables.embedding:
            modules[path] = Product(weight, getattr(model.get_submodule(path), "bias", None))
            continue
        original = model.get_submodule(path)
        modules[path] = nn.Embedding.from_pretrained(
            weight.T.contiguous(), padding_idx=getattr(original, "padding_idx", None)
        )
        if tables.tied_head is not None and tables.tied_head not in matrices:
            head = model.get_submodule(tables.tied_head)
            modules[tables.tied_head] = Product(weight, getattr(head, "bias", None))
    with _replaced(model, modules):
        yield model


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
        found = self.traced(**arguments, past_key_values=cache, use_cache=True)
        return found[self.interface.output], *_cache_tensors(found.past_key_values)


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
        if node.domain == _DOMAIN:
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


# --- the folder --------------------------------------------------------------------------------------


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
    tables = _tables(model)
    modules: dict[str, nn.Module] = {}
    for path, matrix in matrices.items():
        bias = getattr(model.get_submodule(path), "bias", None)
        if path == tables.embedding:
            modules[path] = _Placeholder("Embedding", path, matrix.shape[0])
        else:
            modules[path] = _Placeholder("Linear", path, matrix.shape[1], bias)
    head, table = tables.tied_head, tables.embedding
    if head is not None and table is not None and head not in matrices:
        bias = getattr(model.get_submodule(head), "bias", None)
        modules[head] = _Placeholder("TiedHead", head, matrices[table].shape[1], bias, table)
    with _replaced(model, modules):
        proto = _trace(model, interface)
    graph = GraphBuilder(
        TensorWriter(data, location, data.tell()), options.ops, ACCURACY_LEVEL, options.floats, options.codes
    )
    return _finish(proto, interface, matrices, graph)


def export(
    model: nn.Module,
    folder: Path,
    matrices: Mapping[str, Matrix] | None = None,
    options: OnnxOptions = OnnxOptions(),  # noqa: B008 - frozen
    source: Path | None = None,
) -> Mapping[str, Matrix]:
    """Write the ONNX folder of any text model of transformers; linters and optimum read it like any other.

    ::

        config.json  tokenizer files  how sentences are pooled, where the original says it
        onnx/model.onnx  onnx/model.onnx_data

    Args:
        model: of transformers, in float32 and in evaluation mode; it is as it was afterwards.
        folder: an existing folder.
        matrices: by module path, (in, out); the token embedding as (hidden, vocabulary). Modules of the model
            with an attribute ``matrix`` need not be named. Whatever is not here is written in float32.
        options: of the export; `context` is not used.
        source: folder of the original model, for tokenizer and pooling; None copies none.

    Returns:
        What was written, in the model's order. A matrix that the output does not depend on, a pooler's for
        example, is not traced and not written.

    Raises:
        MissingDependencyError, UnsupportedModelError, RecipeError, InputError: see `build_traced` and
            `matrices_of`.

    Example:
        >>> model = AutoModel.from_pretrained("encoder").eval()
        >>> matrices = {
        ...     name: rtn(module.weight.detach().T, None, Grid(4, 32))
        ...     for name, module in model.named_modules()
        ...     if isinstance(module, nn.Linear)
        ... }
        >>> export(model, folder, matrices, source=Path("encoder"))
    """
    found = matrices_of(model, matrices)
    graph, data = folder / GRAPH, folder / DATA
    graph.parent.mkdir(exist_ok=True)
    with data.open("wb") as file:
        proto = build_traced(model, file, data.name, found, options)
    graph.write_bytes(proto.SerializeToString(deterministic=True))
    held = set(OnnxMatrices(graph)) if found else set()
    written = {name: matrix for name, matrix in found.items() if name in held}
    config = _config_json(model)
    write_json(folder / "config.json", config)
    if interface_task(proto) == "generation":
        original = getattr(model, "generation_config", None)
        values = {} if original is None else original.to_dict()
        generation = generation_config_json(config, _set(values))
        write_json(folder / "generation_config.json", generation)
        facts = _genai_decoder(model, interface_of(model))
        if facts is not None:
            write_json(folder / "genai_config.json", genai_json(facts, generation, GRAPH))
    if source is not None:
        copy_tokenizer(source, folder)
        for name in (*_SENTENCE_FILES, "vocab.txt"):
            if (source / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, folder / name)
    return written


def interface_task(proto: ModelProto) -> Task | None:
    """What a traced graph is for; None for a graph that was not traced."""
    for entry in proto.metadata_props:
        if entry.key == TRACED:
            return "generation" if entry.value == "generation" else "features"
    return None


def _config_json(model: nn.Module) -> dict[str, Any]:
    """The configuration, readable in transformers 4 and 5, with what transformers.js needs to know."""
    dropped = ("quantization_config", "auto_map", "_name_or_path", "transformers_version", "torch_dtype")
    values = {key: value for key, value in _config(model).to_dict().items() if key not in dropped}
    if "rope_parameters" in values or "rope_theta" in values:
        values = portable_config(values)
    names = getattr(
        _config(model), "attribute_map", {}
    )  # GPT-2 says n_layer where others say num_hidden_layers
    values |= {name: values[own] for name, own in names.items() if own in values and name in _PLAIN_NAMES}
    values["architectures"] = [type(model).__name__]
    values["dtype"] = "float32"
    values["transformers.js_config"] = {"use_external_data_format": True, "dtype": "fp32"}
    return dict(sorted(values.items()))


def _genai_decoder(model: nn.Module, interface: Interface) -> GenaiDecoder | None:
    """What onnxruntime-genai wants to know; None for layers of different sizes, which it cannot run."""
    config, sizes = _config(model), set(interface.cache)
    context = getattr(config, "max_position_embeddings", None)
    if len(sizes) != 1 or not isinstance(context, int):
        return None
    ((key_value_heads, head_size),) = sizes
    return GenaiDecoder(
        model_type="decoder",
        context=context,
        vocabulary=int(interface.output_sizes[-1]),
        hidden=int(config.hidden_size),
        layers=len(interface.cache),
        heads=int(config.num_attention_heads),
        key_value_heads=key_value_heads,
        head_size=head_size,
        shares_buffer=False,
    )


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


# --- the check ---------------------------------------------------------------------------------------


Batch: TypeAlias = Mapping[str, Tensor]
"""Tokens of some texts: ``input_ids``, ``attention_mask`` and what else the model takes."""


@dataclass(frozen=True)
class Losses:
    """What compression and export did to the outputs, kept apart.

    Attributes:
        method: the original weights against the matrices, both in torch; None without the original.
        export: the matrices in torch against the file as it is shipped.
        export_exact: the same, the file's products computed in float32: rounding, and nothing more.
        total: the original against the file as it is shipped; None without the original.
    """

    method: Difference | None
    export: Difference
    export_exact: Difference
    total: Difference | None


def measure(
    model: nn.Module,
    folder: Path,
    batches: Sequence[Batch],
    matrices: Mapping[str, Matrix] | None = None,
    original: nn.Module | None = None,
    threads: int = 0,
) -> Losses:
    """Hold a folder against the model that it was made from.

    A decoder is read without a past, and its logits take the place of hidden states.

    Args:
        model: what `export` was given.
        folder: what it wrote.
        batches: texts to read, padded on either side.
        matrices: what it returned; None reads them back from the file.
        original: the model before compression; None takes `model`, unless its modules are compressed ones.
        threads: of onnxruntime; 0 leaves it to it.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ArtifactError: onnxruntime refuses the file.
    """
    written = OnnxMatrices(folder / GRAPH) if matrices is None else matrices
    compressed = any(matrix_of_module(module, path) is not None for path, module in model.named_modules())
    before = original if original is not None else None if compressed else model
    shipped, exact = (
        [Texts(run_folder(session, batch), batch["attention_mask"]) for batch in batches]
        for session in (open_session(folder, level, threads) for level in (None, 0))
    )
    with dequantized(model, written):
        reference = [Texts(run_torch(model, batch), batch["attention_mask"]) for batch in batches]
    first = None
    if before is not None:
        first = [Texts(run_torch(before, batch), batch["attention_mask"]) for batch in batches]
    return Losses(
        method=None if first is None else compare_texts(first, reference),
        export=compare_texts(reference, shipped),
        export_exact=compare_texts(reference, exact),
        total=None if first is None else compare_texts(first, shipped),
    )


def run_torch(model: nn.Module, batch: Batch) -> Tensor:
    """The output of a model for a batch: hidden states or logits, (texts, tokens, width)."""
    arguments: dict[str, Tensor] = dict(batch)
    if _decodes(model) and "position_ids" in inspect.signature(model.forward).parameters:
        arguments["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        found = model(**arguments)
    output = found.get("logits")
    return found["last_hidden_state"] if output is None else output


def run_folder(session: Any, batch: Batch) -> Tensor:
    """The output of a folder for a batch, from an empty cache where it has one.

    Args:
        session: from `compot_deploy.exporters.onnx_session.open_session`.
        batch: as `run_torch` takes it; token types are 0 where they are asked for and not there.
    """
    rows = len(batch["input_ids"])
    feeds: dict[str, Any] = {}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):
            feeds[entry.name] = torch.zeros(rows, entry.shape[1], 0, entry.shape[3]).numpy()
        else:
            value = batch.get(entry.name)
            feeds[entry.name] = (torch.zeros_like(batch["input_ids"]) if value is None else value).numpy()
    output = session.get_outputs()[0].name
    return torch.from_numpy(session.run([output], feeds)[0])
