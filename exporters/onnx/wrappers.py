"""What is traced: a model whose parameters are arguments, and whose products with them leave placeholders.

There is one class for each kind of graph: tensors in, tensors out, caches as lists.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compot_deploy.exporters.onnx.interface import Interface
from compot_deploy.exporters.onnx.recurrence import left_out
from compot_deploy.models.cache import (
    State,
    cache_argument,
    cache_of,
    cache_tensors,
    cache_with_states,
    states_of,
)
from compot_deploy.models.sites import tables_of

PLACEHOLDER_DOMAIN: Final = "compot"
"""Of the placeholders; nothing of it is left in a finished graph."""


class _Placeholders(TorchFunctionMode):
    """Sees every product with a parameter and every look-up of tokens, and leaves a placeholder in its place.

    Args:
        parameters: by name, the objects that the model will multiply with.
        table: name of the token table's parameter.
    """

    def __init__(self, parameters: Mapping[str, Tensor], table: str | None) -> None:
        super().__init__()
        self._names = {id(value): name for name, value in parameters.items() if value.dim() == 2}
        self._table = table

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        if function is nn.functional.linear:
            values, weight, bias = _bound(args, kwargs, ("input", "weight", "bias"))
            if id(weight) in self._names:
                return _plus(self._product(values, weight, weight.shape[0], turned=True), bias)
        elif function is torch.addmm and not kwargs:
            bias, values, weight = args
            if id(weight) in self._names:
                return _plus(self._product(values, weight, weight.shape[1], turned=False), bias)
        elif function is nn.functional.embedding:
            tokens, weight = _bound(args, kwargs, ("input", "weight"))
            if self._names.get(id(weight), "") == self._table:
                return _symbol(
                    "Embedding", tokens, (*tokens.shape, weight.shape[1]), {"parameter": self._table}
                )
        return function(*args, **kwargs)

    def _product(self, values: Tensor, weight: Tensor, outputs: int, *, turned: bool) -> Tensor:
        attributes = {"parameter": self._names[id(weight)], "turned": int(turned)}
        return _symbol("Linear", values, (*values.shape[:-1], outputs), attributes)


def _bound(args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    """Arguments by position or name."""
    return tuple(args[place] if place < len(args) else kwargs.get(name) for place, name in enumerate(names))


def _plus(value: Tensor, bias: Tensor | None) -> Tensor:
    return value if bias is None else value + bias


def _symbol(operator: str, values: Tensor, shape: Sequence[Any], attributes: Mapping[str, Any]) -> Tensor:
    """The output of a node that computes nothing yet."""
    return torch.onnx.ops.symbolic(
        f"{PLACEHOLDER_DOMAIN}::{operator}",
        (values,),
        dict(attributes),
        dtype=torch.float32,
        shape=tuple(shape),
        version=1,
    )


class Wrapper(nn.Module):
    """A model whose parameters are arguments.

    Args:
        model: of shapes only.
        interface: of the graph.
        names: of the parameters that are arguments.
    """

    def __init__(self, model: nn.Module, interface: Interface, names: Sequence[str]) -> None:
        super().__init__()
        self.traced, self.interface, self.names = model, interface, names
        table, _, _ = tables_of(model)
        self.table = None if table is None else f"{table}.weight"

    def run(self, arguments: Mapping[str, Any], values: Sequence[Tensor]) -> Any:
        """The model's own forward pass with these values, products with them replaced by placeholders."""
        parameters = dict(zip(self.names, values, strict=True))
        with _Placeholders(parameters, self.table), left_out(self.traced):
            return torch.func.functional_call(self.traced, parameters, (), dict(arguments))


class _Features(Wrapper):
    """Tensors in and one tensor out."""

    def forward(self, tokens: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        found: Tensor = self.run(dict(zip(self.interface.inputs, tokens, strict=True)), values)[
            self.interface.output
        ]
        return found


class _Generation(Wrapper):
    """A decoder with tensors in and tensors out: its cache as a list, its positions from the mask."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Sequence[Tensor], values: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        interface = self.interface
        keys_and_values, states = past[: 2 * len(interface.cache)], past[2 * len(interface.cache) :]
        cache = DynamicCache()
        if states:
            held = zip(interface.states, states, strict=True)
            config = self.traced.config
            cache = cache_with_states(config, [State(kind, layer, value) for (kind, layer, _), value in held])
        for number, layer in enumerate(interface.layers or range(len(interface.cache))):
            cache.update(keys_and_values[2 * number], keys_and_values[2 * number + 1], layer)
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if takes_positions(self.traced):
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            arguments["position_ids"] = positions[:, -input_ids.shape[1] :]
        arguments |= {cache_argument(self.traced): cache, "use_cache": True}
        found = self.run(arguments, values)
        kept = cache_of(found)
        now = {(state.kind, state.layer): state.values for state in states_of(kept)}
        after = (now[kind, layer] for kind, layer, _ in interface.states)
        return found[interface.output], *cache_tensors(kept), *after


class _Encoder(Wrapper):
    """The tower that reads: sound or text in, hidden states out."""

    def __init__(self, model: Any, interface: Interface, names: Sequence[str]) -> None:
        super().__init__(model, interface, names)
        encoder = model.get_encoder()
        model.forward = lambda **read: encoder(**read)  # what it does in this graph

    def forward(self, read: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        found: Tensor = self.run(dict(zip(self.interface.inputs, read, strict=True)), values)[
            self.interface.output
        ]
        return found


class _Decoder(Wrapper):
    """The tower that writes. What it makes of the encoder's output joins what its cache holds of it.

    So one graph serves the first token, with an empty cache, and all others, with an encoder's output of no frames.
    """

    def forward(
        self,
        input_ids: Tensor,
        heard: Tensor,
        masks: Sequence[Tensor],
        past: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        own, crossed = DynamicCache(), DynamicCache()
        for layer in range(len(self.interface.cache) // 2):
            key, value, heard_key, heard_value = past[4 * layer : 4 * layer + 4]
            own.update(key, value, layer)
            crossed.update(heard_key, heard_value, layer)
        cache = EncoderDecoderCache(own, crossed)
        cache.is_updated = dict.fromkeys(cache.is_updated, False)
        arguments = {
            "encoder_outputs": BaseModelOutput(last_hidden_state=heard),
            "decoder_input_ids": input_ids,
            cache_argument(self.traced): cache,
            "use_cache": True,
        }
        if masks:
            arguments["attention_mask"] = _hiding(masks[0], input_ids.shape[1])
        found = self.run(arguments, values)
        caches = cache_of(found)
        own_tensors, crossed_tensors = (
            cache_tensors(one) for one in (caches.self_attention_cache, caches.cross_attention_cache)
        )
        made = [
            tensor
            for at in range(0, len(own_tensors), 2)
            for tensor in (*own_tensors[at : at + 2], *crossed_tensors[at : at + 2])
        ]
        return found[self.interface.output], *made


def _hiding(mask: Tensor, tokens: int) -> Tensor:
    """What is added to scores at padding, for every token: as a model makes it, but of the cache's length."""
    hidden = (1.0 - mask.float()) * torch.finfo(torch.float32).min
    return hidden[:, None, None, :].expand(-1, -1, tokens, -1)


WRAPPERS: Final[Mapping[str, type[Wrapper]]] = {
    "features": _Features,
    "generation": _Generation,
    "encoder": _Encoder,
    "decoder": _Decoder,
}


def takes_positions(model: nn.Module) -> bool:
    """Whether positions of tokens can be given to the forward pass."""
    return "position_ids" in inspect.signature(model.forward).parameters
