"""A model's forward pass as a graph without a single weight: its own code, traced by torch's exporter.

Every product of an activation with a parameter, and every look-up in the token table, leaves a placeholder that says
which parameter belongs there; all other parameters (norms, biases, position tables) are inputs of the graph::

    model of shapes ─→ torch.onnx.export ─→ graph with compot::Linear(parameter="…")

So no exporter can transpose, fold, merge or round a weight, and a trace depends on the configuration alone: it is made
before any work is done, and serves every plan of the model. `compot_deploy.exporters.onnx.assembly` fills it.

Facts that shape it, seen with torch 2.13, transformers 4.57 and 5.24, ONNX Runtime 1.32:

* Opset 23 exactly: at 20 attention is taken apart, at 24 RMS norms are.
* Sizes 0 and 1 are special to the tracer, so it is shown 2 rows, 3 tokens and a past of 5; the graph then takes
  any, a past of 0 included.
* Positions of a decoder are counted from the attention mask: left-padded rows come out as unpadded ones do.

Sources: the documentation of torch.onnx (``torch.onnx.ops.symbolic``); the ONNX operator specification, opset 23.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
from onnx import ModelProto, inliner
from torch import Tensor, nn

from compot_deploy.errors import MissingDependencyError, UnsupportedModelError
from compot_deploy.exporters.onnx.interface import Interface, towers_of
from compot_deploy.exporters.onnx.wrappers import WRAPPERS, takes_positions
from compot_deploy.models.configuration import for_model
from compot_deploy.models.sites import tables_of
from compot_deploy.models.skeleton import on_meta, without_parameters
from compot_deploy.models.tasks import Task

OPSET: Final = 23

INPUT: Final = "compot:"
"""Stands before the names of parameters that are inputs of a trace."""

PREFIX: Final = "traced."
"""What the wrapper around a model puts before the names of its buffers and modules."""


@dataclass(frozen=True)
class Trace:
    """A graph with placeholders; never change it, it is kept for the next model of its configuration.

    Attributes:
        proto: the graph, its constants inside.
        interface: what it takes and gives.
        class_name: of the model in transformers.
        head: path of the output head; None without one.
        positioned: the model is told the positions of every row.
        shapes: of every parameter, by name.
        buffers: stored tensors that are no parameters, as the model makes them.
    """

    proto: ModelProto
    interface: Interface
    class_name: str
    head: str | None
    positioned: bool
    shapes: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, Tensor]


def traces(config: Mapping[str, Any], task: Task) -> Mapping[str, Trace]:
    """The graphs of a model's forward pass, by their places in a folder: one, or one for each tower.

    Args:
        config: of transformers, with what says whether the head is tied.
        task: what the model is for.

    Raises:
        MissingDependencyError: onnxscript is not installed, or torch is older than 2.8.
        UnsupportedModelError: see `towers_of`, and whatever torch's exporter cannot do.
    """
    _require_tracer()
    return _traces(json.dumps(dict(config), sort_keys=True), task)


@lru_cache(maxsize=4)
def _traces(config: str, task: Task) -> Mapping[str, Trace]:
    settings = for_model(json.loads(config))
    return {
        place: _trace(_hollow(without_parameters(settings, task, torch.float32)), interface)
        for place, interface in towers_of(on_meta(settings, task), task).items()
    }


def _trace(model: Any, interface: Interface) -> Trace:
    table, head, _ = tables_of(model)
    stored = dict(model.named_parameters())
    if (
        table is not None and f"{table}.weight" not in stored
    ):  # it stands in the model before, as something else
        parameter = model.get_submodule(table).weight
        stored = {name: value for name, value in stored.items() if value is not parameter}
        stored[f"{table}.weight"] = parameter
    buffers = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if not isinstance(value, nn.Parameter) and value.is_floating_point()
    }
    belongs = _belonging(model, interface)
    shown = {name: value for name, value in {**stored, **buffers}.items() if belongs(name, value)}
    names = list(shown)
    wrapper = WRAPPERS[interface.task](model, interface, names)
    proto = _exported(wrapper, interface, names, list(shown.values()))
    return Trace(
        proto=proto,
        interface=interface,
        class_name=type(model).__name__,
        head=head,
        positioned=interface.task == "generation" and takes_positions(model),
        shapes={name: tuple(value.shape) for name, value in shown.items()},
        buffers=buffers,
    )


def _hollow(model: nn.Module) -> Any:
    """The model with parameters of zeros that take no memory; those that stand in it twice still do."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros(1, dtype=old.dtype).expand(old.shape)
            made.setdefault(id(old), nn.Parameter(zeros, requires_grad=False))
            setattr(module, name, made[id(old)])
    return model


# --- what is traced ----------------------------------------------------------------------------------


def _belonging(model: Any, interface: Interface) -> Callable[[str, Tensor], bool]:
    """Whether a tensor is one of a graph: of a tower those that its modules hold, a table perhaps those of both."""
    if not interface.is_tower:
        return lambda name, value: True
    encoder = model.get_encoder()
    (path,) = (path for path, module in model.named_modules() if module is encoder)
    reads = interface.task == "encoder"
    held = {
        id(value)
        for name, value in model.state_dict(keep_vars=True).items()
        if name.startswith(f"{path}.") == reads
    }
    return lambda name, value: id(value) in held


def _exported(
    wrapper: nn.Module, interface: Interface, names: Sequence[str], values: Sequence[Tensor]
) -> ModelProto:
    rows, length, past = 2, 3, 5
    dynamic = torch.export.Dim.DYNAMIC
    by_row = {0: dynamic, 1: dynamic}
    inputs = [*interface.inputs, *interface.past, *(f"{INPUT}{name}" for name in names)]
    # Each a tensor of its own: the tracer takes equal objects for the same input.
    own = [torch.zeros(value.shape, dtype=value.dtype) for value in values]
    arguments: tuple[Any, ...]
    shapes: tuple[Any, ...]
    if interface.task == "generation":
        cache = [torch.zeros(rows, heads, past, size) for heads, size in interface.cache_tensors]
        changing = [{0: dynamic, 2: dynamic}] * len(cache) + [{0: dynamic}] * len(interface.states)
        cache += [torch.zeros(rows, *sizes) for _, _, sizes in interface.states]
        arguments = (_ones(rows, length), _ones(rows, past + length), cache, own)
        shapes = (by_row, by_row, changing, [None] * len(own))
    elif interface.task == "decoder":
        lengths = [one for _ in interface.cache[::2] for one in (past, past, past + 1, past + 1)]
        sizes = interface.cache_tensors
        cache = [
            torch.zeros(rows, heads, held, size) for (heads, size), held in zip(sizes, lengths, strict=True)
        ]
        ((_, (_, width)),) = interface.floating
        masks = [_ones(rows, past + 1 + _HEARD_FRAMES)] * (len(interface.inputs) - 2)
        arguments = (_ones(rows, length), torch.zeros(rows, _HEARD_FRAMES, int(width)), masks, cache, own)
        moving = [{0: dynamic, 2: dynamic}] * len(cache)
        shapes = (by_row, by_row, [by_row] * len(masks), moving, [None] * len(own))
    elif interface.floating:
        ((_, sizes_of_sound),) = interface.floating
        shown = [size if isinstance(size, int) else _SAMPLES for size in sizes_of_sound]
        of_sound = {0: dynamic} | {
            axis: dynamic for axis, size in enumerate(sizes_of_sound, start=1) if isinstance(size, str)
        }
        arguments = ([torch.zeros(rows, *shown)], own)
        shapes = ([of_sound], [None] * len(own))
    else:
        arguments = ([_ones(rows, length) for _ in interface.inputs], own)
        shapes = ([by_row] * len(interface.inputs), [None] * len(own))
    with _quiet(), torch.inference_mode():
        try:
            program = torch.onnx.export(
                wrapper.eval(),
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=[interface.output, *interface.present],
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # the exporter's errors share no base class but this
            raise UnsupportedModelError(
                f"{type(wrapper.traced).__name__} cannot be traced: torch's exporter stops with {_reason(error)}"
            ) from error
    assert program is not None
    proto: ModelProto = program.model_proto
    return inliner.inline_local_functions(proto) if proto.functions else proto


_HEARD_FRAMES: Final = 7
_SAMPLES: Final = 16_000
"""Of an encoder's output, and of sound of any length, that the tracer is shown."""


def _reason(error: BaseException) -> str:
    """What is behind an error of the exporter, which itself says only in which of its steps it arose."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


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
