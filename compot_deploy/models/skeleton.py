"""A transformers model without its weights: on the device ``meta``, or ready to be filled block by block."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compot_deploy.errors import InputError, UnsupportedModelError, first_line
from compot_deploy.models.experts import unstack
from compot_deploy.models.tasks import Task

_ADVICE: Final = "warn_if_padding_and_no_attention_mask"
"""What some models of transformers call to look for padding in their tokens."""


def on_meta(config: Any, task: Task) -> Any:
    """A model of shapes only: its parameters tell what a checkpoint must hold, its forward pass computes nothing.

    Raises:
        UnsupportedModelError: transformers has no class of this task for the configuration.
    """
    with torch.device("meta"):
        return _made(config, task, torch.float32)


def without_parameters(config: Any, task: Task, dtype: torch.dtype) -> Any:
    """A model with parameters on ``meta`` and real buffers: rotary frequencies are computed, not stored."""
    with _parameters_on_meta():
        return _made(config, task, dtype)


def unload(module: nn.Module) -> None:
    """Forget the weights of a module: its parameters are on ``meta`` then."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


class ValuesUnknown(TorchFunctionMode):
    """Lets a model on ``meta`` ask for the value of a tensor, which nobody knows there: it is told zero.

    Rotary embeddings ask whether a text is longer than any before, masks whether they hide anything. Shapes do not
    depend on the answer. Nothing is cast on ``meta`` either: transformers 4 switches autocasting off around rotary
    embeddings, which torch does not know how to do there.
    """

    def __enter__(self) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        self._autocast = torch.autocast
        setattr(torch, "autocast", self._cast)  # noqa: B010  a name of torch's that is not ours to declare
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """See `torch.overrides.TorchFunctionMode`."""
        setattr(torch, "autocast", self._autocast)  # noqa: B010
        super().__exit__(*error)

    def _cast(self, device_type: str, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        return nullcontext() if device_type == "meta" else self._autocast(device_type, *args, **kwargs)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        answer = _ANSWERS.get(function)
        if answer is not None and args[0].is_meta:
            return answer()
        if function in _SEARCHES and len(args) == 1 and args[0].is_meta:
            return _everywhere(args[0], apart=function is torch.where or bool((kwargs or {}).get("as_tuple")))
        return function(*args, **(kwargs or {}))


_SEARCHES: Final = (torch.where, torch.nonzero, torch.Tensor.nonzero)


def _everywhere(condition: Tensor, *, apart: bool) -> Tensor | tuple[Tensor, ...]:
    """Where something is true of which nobody knows: everywhere. So every expert has every token."""
    places = torch.ones(condition.shape, dtype=torch.bool).nonzero()
    return tuple(places.T.to(condition.device)) if apart else places


_ANSWERS: Final[Mapping[Any, Callable[[], Any]]] = {
    torch.Tensor.__bool__: bool,
    torch.Tensor.__int__: int,
    torch.Tensor.__index__: int,
    torch.Tensor.__float__: float,
    torch.Tensor.item: int,
}


def _made(config: Any, task: Task, dtype: torch.dtype) -> Any:
    import transformers

    auto = getattr(transformers, task.auto_class)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of initializing what is filled afterwards
            model = auto.from_config(_tied(config, task), dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedModelError(
            f"The model type {config.model_type!r} is not supported: {str(error).strip().splitlines()[0]}"
        ) from None
    except (TypeError, AttributeError, KeyError, RuntimeError, ArithmeticError) as error:
        raise InputError(
            f"The configuration of a {config.model_type} is not understood: transformers makes no model of it "
            f"({first_line(error)}). Compare its numbers with those of the model that it came from."
        ) from None
    if not _all_tied(config, task):
        _give_own_head(model)
    unstack(model)
    for module in model.modules():
        if hasattr(module, _ADVICE):  # reads values of tokens, which there are none of on `meta`
            setattr(module, _ADVICE, _nothing)
    return model.eval()


def _all_tied(config: Any, task: Task) -> bool:
    """Whether transformers may tie what it likes to: all but the head of a model whose towers read one table."""
    return not task.has_towers or bool(getattr(config, "tie_word_embeddings", True))


def _tied(config: Any, task: Task) -> Any:
    if _all_tied(config, task):
        return config
    other = copy.deepcopy(config)
    other.tie_word_embeddings = True
    return other


def _give_own_head(model: Any) -> None:
    """A head with a table of its own, which it keeps when tables are tied again."""
    head, tie = model.get_output_embeddings(), model.tie_weights
    head.weight = nn.Parameter(torch.empty_like(head.weight))

    def tie_weights(*args: Any, **kwargs: Any) -> None:
        own = head.weight
        tie(*args, **kwargs)
        head.weight = own

    model.tie_weights = tie_weights


def _nothing(*_: object) -> None:
    """No advice: which tokens are padding is known here."""


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that is registered inside lands on ``meta``; buffers stay where they are made."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = registered  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
