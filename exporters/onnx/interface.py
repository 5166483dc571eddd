"""What the graph of a traced model takes and gives: its inputs, its output, its cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import nn

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.exporters.onnx.recurrence import known_rules
from compot_deploy.exporters.onnx.tensors import GRAPH, TOWERS
from compot_deploy.models import tasks
from compot_deploy.models.cache import attending, cache_of, cache_tensors, states_of
from compot_deploy.models.example import example_of
from compot_deploy.models.skeleton import ValuesUnknown

Task: TypeAlias = Literal["features", "generation", "encoder", "decoder"]
"""What a graph is for: one pass over whole texts, text token by token with a cache; or one of the two towers of a
model whose encoder reads and whose decoder writes."""

HEARD: Final = "encoder_hidden_states"
"""What a decoder reads of an encoder."""

MASK: Final = "encoder_attention_mask"
"""Which tokens of an encoder's text are no padding; it is as long with a cache as without one."""

BRANCH: Final = "use_cache_branch"
"""Whether the cache that a decoder is given holds what it made of the encoder's output."""


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a traced graph.

    Attributes:
        task: what it is for.
        inputs: names, in order; without the cache.
        output: ``last_hidden_state`` or ``logits``.
        output_sizes: its sizes after the batch, a name where they depend on the input.
        cache: heads and head size of each layer's keys and values, where values have a size of their own that too;
            empty without a cache. A decoder that reads an encoder has two caches a layer: of its own text, and of what
            it read there.
        layers: numbers of the layers that have such a cache, where others have states.
        states: what those keep: kind, number of the layer, sizes after the batch.
        floating: inputs that are no tokens, and their sizes after the batch.
    """

    task: Task
    inputs: tuple[str, ...]
    output: str
    output_sizes: tuple[str | int, ...]
    cache: tuple[tuple[int, ...], ...] = ()
    layers: tuple[int, ...] = ()
    states: tuple[tuple[str, int, tuple[int, ...]], ...] = ()
    floating: tuple[tuple[str, tuple[str | int, ...]], ...] = ()

    @property
    def hears(self) -> bool:
        """Whether it is a decoder that reads an encoder."""
        return self.task == "decoder"

    @property
    def is_tower(self) -> bool:
        """Whether there is another graph of the same model."""
        return self.task in ("encoder", "decoder")

    @property
    def past(self) -> tuple[str, ...]:
        """Names of the cache on its way in."""
        states = (f"past_{kind}.{layer}" for kind, layer, _ in self.states)
        return (*(f"past_key_values.{name}" for name in self._caches), *states)

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the cache on its way out."""
        states = (f"present_{kind}.{layer}" for kind, layer, _ in self.states)
        return (*(f"present.{name}" for name in self._caches), *states)

    @property
    def cache_tensors(self) -> tuple[tuple[int, int], ...]:
        """Heads and size of each tensor of the cache: keys and values in turn."""
        return tuple((sizes[0], sizes[at]) for sizes in self.cache for at in (1, -1))

    @property
    def _caches(self) -> Iterator[str]:
        for number in range(len(self.cache)):
            layer = self.layers[number] if self.layers else number
            place = f"{number // 2}.{('decoder', 'encoder')[number % 2]}" if self.hears else str(layer)
            yield from (f"{place}.{kind}" for kind in ("key", "value"))


def interface_of(model: nn.Module) -> Interface:
    """What a graph of `model` takes and gives; the model reads two tokens to find out.

    Args:
        model: of transformers, in evaluation mode; on torch's device ``meta`` nothing is computed.

    Raises:
        UnsupportedModelError: it does not read tokens, has an encoder and a decoder, or keeps something else
            than keys and values while it generates.
    """
    parameters = inspect.signature(model.forward).parameters
    name, config = type(model).__name__, config_of(model)
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
    task: Task = "generation" if decodes(model) else "features"
    # No mask: on the device ``meta`` nothing could ask whether it hides anything.
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    arguments: dict[str, Any] = {"input_ids": tokens}
    if task == "generation":
        arguments["use_cache"] = True
    with ValuesUnknown(), torch.inference_mode():
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
        cache = cache_of(found)
        if any(one.kind == "recurrent" for one in states_of(cache)) and not known_rules(model):
            raise UnsupportedModelError(
                f"{name} cannot be traced for generation: it keeps the state of a recurrence, whose steps cannot be "
                "traced for texts of any length. Use another --format."
            )
        states = tuple((one.kind, one.layer, tuple(one.values.shape[1:])) for one in states_of(cache))
        layers = attending(cache) if states else ()
        return Interface(task, inputs, output, sizes, _cache_sizes(cache, name), layers=layers, states=states)
    if "token_type_ids" in parameters and int(getattr(config, "type_vocab_size", 0) or 0) > 1:
        inputs = (*inputs, "token_type_ids")
    return Interface(task, inputs, output, sizes)


def towers_of(model: nn.Module, task: tasks.Task) -> dict[str, Interface]:
    """What the graphs of a model take and give, by their places in a folder: one, or one for each tower.

    Raises:
        UnsupportedModelError: see `interface_of`.
    """
    if not task.has_towers:
        return {GRAPH: interface_of(model)}
    shown = example_of(model, task, tokens=2)
    name, read = next(iter(shown.items()))
    with ValuesUnknown(), torch.inference_mode():
        found = model(**shown, use_cache=True)
    heard = found.encoder_last_hidden_state
    length: str | int = heard.shape[1]
    inputs: tuple[str, ...] = (name,)
    masks: tuple[str, ...] = ()
    floating: tuple[tuple[str, tuple[str | int, ...]], ...] = ((name, tuple(read.shape[1:])),)
    if not read.is_floating_point():
        inputs, masks, floating, length = ("input_ids", "attention_mask"), (MASK,), (), "sequence_length"
    elif read.dim() == 2:  # sound as it is, of any length
        floating, length = ((name, ("num_samples",)),), _FRAMES
    own, crossed = (
        _cache_sizes(cache, type(model).__name__, length)
        for cache, length in (
            (cache_of(found).self_attention_cache, 2),
            (cache_of(found).cross_attention_cache, heard.shape[1]),
        )
    )
    width = int(heard.shape[2])
    return {
        TOWERS[0]: Interface("encoder", inputs, "last_hidden_state", (length, width), floating=floating),
        TOWERS[1]: Interface(
            "decoder",
            ("input_ids", HEARD, *masks),
            "logits",
            ("sequence_length", int(found.logits.shape[-1])),
            tuple(sizes for pair in zip(own, crossed, strict=True) for sizes in pair),
            floating=((HEARD, (_FRAMES, width)),),
        ),
    }


_FRAMES: Final = "encoder_sequence_length"


def decodes(model: nn.Module) -> bool:
    """Whether a model generates text token by token."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and bool(can_generate())


def _cache_sizes(cache: Any, name: str, length: str | int = 2) -> tuple[tuple[int, ...], ...]:
    """Heads and head size by layer, and that of values where it differs, of a cache that holds so many tokens."""
    tensors = cache_tensors(cache)
    for keys, values in zip(tensors[::2], tensors[1::2], strict=True):
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[2] != length:
            raise UnsupportedModelError(
                f"{name} cannot be traced for generation: its cache holds tensors of the shapes "
                f"{tuple(keys.shape)} and {tuple(values.shape)}, not keys and values of every token."
            )
    if not tensors:
        raise UnsupportedModelError(
            f"{name} cannot be traced for generation: it keeps no keys and values (its cache is a "
            f"{type(cache).__name__})."
        )
    return tuple(
        (int(keys.shape[1]), *dict.fromkeys((int(keys.shape[3]), int(values.shape[3]))))
        for keys, values in zip(tensors[::2], tensors[1::2], strict=True)
    )


def config_of(model: nn.Module) -> Any:
    """The configuration of a model; None for a module without one."""
    return getattr(model, "config", None)
