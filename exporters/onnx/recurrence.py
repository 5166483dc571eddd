"""The gated delta rule (Qwen3.5, Qwen3-Next) in a traced graph: a loop over the tokens, whatever their number.

Transformers computes it in blocks of 64 tokens, in Python loops that a tracer unrolls for the text that it is shown. So
a placeholder is traced in its place, and the graph gets a ``Scan``, which applies the rule token by token. With S the
state (keys x values) of a head::

    S ← exp(g) S        S ← S + k (β (v − kᵀS))ᵀ        output = qᵀS

Source: Yang, Kautz, Hatamizadeh, *Gated Delta Networks* (2024), and the rule as transformers spells it out by token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor, nn

OPERATOR: Final = "GatedDelta"
"""Of the placeholder."""

_FUNCTION: Final = "torch_chunk_gated_delta_rule"
"""What the models of transformers call it."""


def known_rules(model: nn.Module) -> tuple[Any, ...]:
    """The modules of code of a model that compute the rule by that function."""
    names = dict.fromkeys(type(module).__module__ for module in model.modules())
    return tuple(sys.modules[name] for name in names if hasattr(sys.modules[name], _FUNCTION))


@contextmanager
def left_out(model: nn.Module) -> Iterator[None]:
    """Put the placeholder in the place of the rule, until the context ends."""
    homes = [(home, getattr(home, _FUNCTION)) for home in known_rules(model)]
    try:
        for home, _ in homes:
            setattr(home, _FUNCTION, _placeholder)
        yield
    finally:
        for home, own in homes:
            setattr(home, _FUNCTION, own)


def _placeholder(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The arguments and results of the rule in transformers; (batch, tokens, heads, width) but for the state."""
    repeats = value.shape[2] // key.shape[2]
    if repeats > 1:
        query, key = (values.repeat_interleave(repeats, dim=2) for values in (query, key))
    by_head = [values.transpose(1, 2).float() for values in (query, key, value, g.exp(), beta)]
    query, key, value, decay, rate = by_head
    if use_qk_l2norm_in_kernel:
        query, key = (
            values * torch.rsqrt(values.square().sum(-1, keepdim=True) + 1e-6) for values in (query, key)
        )
    query = query / query.shape[-1] ** 0.5
    made, state = torch.onnx.ops.symbolic_multi_out(
        f"compot::{OPERATOR}",
        (initial_state, query, key, value, decay, rate),
        dtypes=(torch.float32, torch.float32),
        shapes=(value.shape, initial_state.shape),
        version=1,
    )
    return made.transpose(1, 2), state


def scan_of(inputs: Sequence[str], outputs: Sequence[str], name: str) -> NodeProto:
    """The loop in the place of a placeholder.

    Args:
        inputs: state, then queries, keys, values, decays and rates by head and token.
        outputs: of every token, and the state behind the last one.
        name: of the node.
    """
    made, state = outputs
    return helper.make_node(
        "Scan",
        list(inputs),
        [state, made],
        name,
        body=_step(),
        num_scan_inputs=len(inputs) - 1,
        scan_input_axes=[2] * (len(inputs) - 1),
        scan_output_axes=[2],
    )


def _step() -> Any:
    """One token."""
    made: list[NodeProto] = []

    def node(operator: str, inputs: Sequence[str], output: str) -> str:
        made.append(helper.make_node(operator, list(inputs), [output], f"/step/{output}"))
        return output

    kept = node("Mul", ["state", node("Unsqueeze", ["decay", "last_two"], "decay_4d")], "kept")
    told = node("MatMul", [node("Unsqueeze", ["key", "row"], "key_row"), kept], "told")
    missed = node("Sub", [node("Unsqueeze", ["value", "row"], "value_row"), told], "missed")
    learned = node("Mul", [missed, node("Unsqueeze", ["rate", "last_two"], "rate_4d")], "learned")
    added = node("MatMul", [node("Unsqueeze", ["key", "column"], "key_column"), learned], "added")
    after = node("Add", [kept, added], "state_after")
    found = node("MatMul", [node("Unsqueeze", ["query", "row"], "query_row"), after], "found")
    node("Squeeze", [found, "row"], "made")
    axes = {"row": [2], "column": [3], "last_two": [2, 3]}
    names = ("state", "query", "key", "value", "decay", "rate")
    return helper.make_graph(
        made,
        "gated_delta_rule",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("state_after", "made")],
        [helper.make_tensor(name, TensorProto.INT64, [len(axis)], axis) for name, axis in axes.items()],
    )
