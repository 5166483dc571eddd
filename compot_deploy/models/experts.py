"""Mixtures of experts: every matrix of every expert as a linear of its own, whatever transformers keeps them in.

Since version 5 transformers keeps the experts of a block as two stacks, which are multiplied slice by slice::

    experts.gate_up_proj (experts, 2·width, hidden)   experts.down_proj (experts, hidden, width)

`unstack` puts modules in their place whose names are those of the checkpoints and of version 4, and which compute the
same::

    experts.0.gate_proj  experts.0.up_proj  experts.0.down_proj  experts.1.gate_proj …

So an expert's matrices are found, calibrated, planned and written like all others, and each has the Gram of the tokens
that were routed to it. Routers are left alone: they are small, and what they decide is not a matter of rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

EXPERTS: Final = "experts"
"""Last part of the path of a block's experts, in every model of transformers."""

_STACKS: Final = ("gate_up_proj", "up_proj", "down_proj")


class Expert(nn.Module):
    """One expert: a gated or a plain MLP.

    Args:
        gate: absent in an MLP without one.
        up: hidden to width.
        down: width to hidden.
    """

    def __init__(self, gate: nn.Linear | None, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        if gate is not None:
            self.gate_proj = gate
        self.up_proj, self.down_proj = up, down


class Experts(nn.ModuleList):
    """The experts of a block, side by side. Each computes the tokens that the router gives it, and no other.

    Args:
        stacked: the module of transformers whose place this one takes; its parameters are taken from it.
    """

    def __init__(self, stacked: Any) -> None:
        gated = bool(stacked.has_gate)
        first = stacked.gate_up_proj if gated else stacked.up_proj
        first_bias = getattr(stacked, "gate_up_proj_bias" if gated else "up_proj_bias", None)
        down_bias = getattr(stacked, "down_proj_bias", None)
        turned, beside = bool(stacked.is_transposed), bool(stacked.is_concatenated)
        made = []
        for number in range(len(first)):
            down = _linear(stacked.down_proj[number], _slice(down_bias, number), turned)
            bias = _slice(first_bias, number)
            if not gated:
                made.append(Expert(None, _linear(first[number], bias, turned), down))
                continue
            rows = first[number].T if turned else first[number]
            gate, up = (
                _linear(_half(rows, half, beside), _half(bias, half, beside), False) for half in (0, 1)
            )
            made.append(Expert(gate, up, down))
        super().__init__(made)
        for name in [name for name, _ in stacked.named_parameters(recurse=False)]:
            setattr(stacked, name, None)
        # What activations an expert has is left to the model's own code. A tuple hides the module from torch.
        self._stacked = (stacked,)
        self.gated, self.beside = gated, beside

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """The sum of what its experts make of every token, each times the weight that the router gives it."""
        result = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, places = torch.where(top_k_index == number)
            if _is_empty(tokens):
                continue
            made = self._computed(expert, hidden_states[tokens]) * top_k_weights[tokens, places, None]
            result = result.index_add(0, tokens, made.to(result.dtype))
        return result

    def _computed(self, expert: Any, values: Tensor) -> Tensor:
        (stacked,) = self._stacked
        if not self.gated:
            return expert.down_proj(stacked.act_fn(expert.up_proj(values)))
        gate, up = expert.gate_proj(values), expert.up_proj(values)
        both = torch.cat((gate, up), -1) if self.beside else torch.stack((gate, up), -1).flatten(-2)
        return expert.down_proj(stacked._apply_gate(both))


def unstack(model: nn.Module) -> None:
    """Put `Experts` in the place of every stack of experts of a model; others are left as they are."""
    found = [(path, module) for path, module in model.named_modules() if is_stack(module)]
    for path, module in found:
        parent = model.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], Experts(module))


def is_stack(module: Any) -> bool:
    """Whether a module keeps its experts in stacks whose order transformers describes."""
    described = all(hasattr(module, name) for name in ("has_gate", "is_transposed", "is_concatenated"))
    if not described or getattr(module, "has_post_expert_norm", False):
        return False
    names = {name for name, _ in module.named_parameters()}
    wanted = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    return wanted <= names <= wanted | {f"{name}_bias" for name in wanted}


def routers(model: nn.Module) -> Iterator[str]:
    """Paths of what decides which experts a token meets: matrices beside experts with an output for each, or one."""
    for path, module in model.named_modules():
        experts = getattr(module, EXPERTS, None)
        if not isinstance(experts, nn.ModuleList):
            continue
        for name, part in module.named_modules(prefix=path):
            weight = getattr(part, "weight", None)
            inside = name.startswith(f"{path}.{EXPERTS}.")
            if (
                not inside
                and isinstance(weight, Tensor)
                and weight.dim() == 2
                and len(weight) in (1, len(experts))
            ):
                yield name


def same_place(name: str) -> str | None:
    """A matrix of an expert without the number of the expert: what the experts of a block share; None for others."""
    before, found, after = name.rpartition(f".{EXPERTS}.")
    number, _, rest = after.partition(".")
    return f"{before}{found}{rest}" if found and number.isdigit() else None


_OLD_EXPERT: Final = re.compile(r"\.(experts\.\d+)\.w([123])\.weight$")
_OLD_PARTS: Final = {"1": "gate_proj", "2": "down_proj", "3": "up_proj"}
_OLD_BLOCK: Final = ".block_sparse_moe."


def name_of_today(name: str) -> str:
    """What a tensor of Mixtral's checkpoints, and of others like them, is called in transformers."""
    renamed = _OLD_EXPERT.sub(lambda found: f".{found[1]}.{_OLD_PARTS[found[2]]}.weight", name)
    return renamed.replace(_OLD_BLOCK, ".mlp.")


def _is_empty(tokens: Tensor) -> bool:
    """Whether an expert has nothing to do; a tracer, which sees one text only, is not asked."""
    return not torch.compiler.is_compiling() and len(tokens) == 0


def _slice(values: Tensor | None, number: int) -> Tensor | None:
    return None if values is None else values[number]


def _half(values: Tensor | None, half: int, beside: bool) -> Tensor | None:
    """Gate (0) or up (1) of what is kept one behind the other, or in turn."""
    if values is None:
        return None
    size = len(values) // 2
    return values[half * size : (half + 1) * size] if beside else values[half::2]


def _linear(weight: Tensor | None, bias: Tensor | None, turned: bool) -> nn.Linear:
    """A linear of values (out, in), or (in, out) where they are turned."""
    assert weight is not None
    rows = weight.T if turned else weight
    made = nn.Linear(rows.shape[1], rows.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(_own(rows), requires_grad=weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(_own(bias), requires_grad=bias.requires_grad)
    return made


def _own(values: Tensor) -> Tensor:
    """The same in memory of its own: matrices are told apart by where they lie."""
    return values.detach().clone(memory_format=torch.contiguous_format)
