"""Why a model cannot be taken, said of the model: which part of it, what is in the way, and what to use instead."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Final

from torch import nn

from compot_deploy.errors import a_few, first_line
from compot_deploy.models.experts import EXPERTS, Experts, routers
from compot_deploy.models.sites import Layout, blocks_of

INSTEAD: Final = (
    "Use a model in whose blocks each matrix is a linear of its own: Llama, Mistral, Qwen2, Qwen3, Gemma, Phi, GPT-2, "
    "GPT-NeoX, OPT, mixtures of experts like Mixtral and Qwen3-MoE, and encoders like BERT are taken."
)


def of_a_stopped_pass(model: Any, error: BaseException) -> str:
    """Why a model cannot be looked at: its forward pass on the device ``meta`` has ended with an error.

    Args:
        model: whose forward pass it was.
        error: with its traceback, which leads to the part of the model that stopped.
    """
    reason = f"{type(error).__name__}: {first_line(error)}"
    where = _stopped_in(model, error.__traceback__)
    experts = _experts(model, where)
    if experts is not None:
        return of_experts(model, experts)
    if model.main_input_name != "input_ids":
        read = model.main_input_name
        return f"A {_kind(model)} reads {read}, and only models that read tokens are supported. {INSTEAD}"
    return (
        f"A {_kind(model)} cannot be looked at without its weights: {_named(model, where)} stops with {reason}. "
        f"{INSTEAD}"
    )


def of_experts(model: Any, path: str) -> str:
    """Why a mixture of experts is not taken."""
    return (
        f"A {_kind(model)} is a mixture of experts of a kind that is not supported: {path} is multiplied with in a way "
        f"of its own. {INSTEAD}"
    )


def of_no_sites(model: Any) -> str:
    """Why nothing can be compressed: no product with a matrix of a block was seen."""
    matrices = unseen(model, None)
    if not matrices:
        return f"A {_kind(model)} has no matrices in its blocks, so there is nothing to compress. {INSTEAD}"
    first = matrices[0]
    return (
        f"A {_kind(model)} is not supported: it multiplies with {first}, a {_class(model, first)}, in a way of its "
        f"own, and so with all {len(matrices)} matrices of its blocks; only products of linears are seen. {INSTEAD}"
    )


def unseen(model: Any, layout: Layout | None) -> tuple[str, ...]:
    """Modules of the blocks with a matrix that no product was seen of: they stay as they are. Tables are not meant."""
    seen = set() if layout is None else {site.parameter for site in layout.sites}
    seen |= {f"{path}.weight" for path in routers(model)}
    found = []
    for block in blocks_of(model) or ("",):
        for path, module in model.get_submodule(block).named_modules(prefix=block):
            weight = getattr(module, "weight", None)
            matrix = (
                isinstance(weight, nn.Parameter)
                and weight.dim() == 2
                and not isinstance(module, nn.Embedding)
            )
            if matrix and f"{path}.weight" not in seen:
                found.append(path)
    return tuple(found)


def stacked(model: Any, layout: Layout) -> str | None:
    """A module whose stacked matrices no product was seen of; None where all were seen."""
    seen = {site.parameter for site in layout.sites}
    for block in blocks_of(model) or ("",):
        for path, module in model.get_submodule(block).named_modules(prefix=block):
            if _stacks(module) and not any(f"{path}.{name}" in seen for name, _ in module.named_parameters()):
                return path
    return None


def note_on(model: Any, layout: Layout) -> tuple[str, ...]:
    """What a report must say about matrices of the blocks that stay as they are."""
    left = unseen(model, layout)
    if not left:
        return ()
    return (
        f"{a_few(left)} stay as they are: the model multiplies with them in a way of its own, which is not seen",
    )


def _stacks(module: nn.Module) -> bool:
    """Whether a module holds matrices of several experts as one parameter; kernels of convolutions are not meant."""
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return not convolution and any(
        parameter.dim() == 3 and min(parameter.shape) > 1 for parameter in module.parameters(recurse=False)
    )


def _experts(model: Any, where: str) -> str | None:
    """Experts in the block in which a pass has stopped: stacked matrices, or modules side by side under that name."""
    for block in blocks_of(model):
        if where == block or where.startswith(f"{block}."):
            for path, module in model.get_submodule(block).named_modules(prefix=block):
                alone = path.endswith(EXPERTS) and next(module.parameters(), None) is not None
                if not isinstance(module, Experts) and (_stacks(module) or alone):
                    return str(path)
    return None


def _stopped_in(model: Any, trace: TracebackType | None) -> str:
    """Path of the innermost module whose forward pass a traceback leads through; empty for the model itself."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = ""
    while trace is not None:
        found = paths.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found


def _class(model: Any, path: str) -> str:
    return type(model.get_submodule(path)).__name__


def _kind(model: Any) -> str:
    return f"{model.config.model_type} ({type(model).__name__})"


def _named(model: Any, path: str) -> str:
    return f"{path} ({_class(model, path)})" if path else "it"
