"""How far outputs are from the original's, and which way is nearer: a loss and its gradient at the outputs.

Distributions are compared by their KL divergence, whose gradient at the logits is the difference of the two
distributions: it needs no graph, and a few rows at a time. Where a model ends with its head, logits are not even there
but for some rows: they are multiplied out, compared and multiplied back. Embeddings are compared by one minus the
cosine of pooled vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from compot_deploy.core.memory import COMPARED_AT_ONCE
from compot_deploy.models.tasks import Batch, LossSum, Task, pooled

_LOGITS: Final = 2**23
"""Logits of one model that are there at a time where a model ends with its head: 32 MB."""


@dataclass(frozen=True)
class Distance:
    """Of the outputs for a batch.

    Attributes:
        loss: sum over positions or texts, and their number.
        gradient: of that sum at the outputs.
    """

    loss: LossSum
    gradient: Tensor


def distance(task: Task, original: Tensor, changed: Tensor, batch: Batch) -> Distance:
    """Between outputs of the original model and of a changed one for the same batch."""
    if task.kind == "embedding":
        return _of_vectors(original, changed, batch)
    changed = changed.detach()
    gradient = torch.zeros_like(changed)
    if task.pools:
        total = _of_rows(original, changed, gradient)
        return Distance(LossSum(total, len(changed)), gradient)
    where = batch.compared
    if bool(where.all()):
        width = changed.shape[-1]
        rows = gradient.view(-1, width)
        total = _of_rows(original.reshape(-1, width), changed.reshape(-1, width), rows)
        return Distance(LossSum(total, len(rows)), gradient)
    rows = gradient[where]
    total = _of_rows(original[where], changed[where], rows)
    gradient[where] = rows
    return Distance(LossSum(total, len(rows)), gradient)


@dataclass(frozen=True)
class Head:
    """What makes logits.

    Attributes:
        weight: its table.
        bias: of the logits, where there is one.
    """

    weight: Float[Tensor, "classes width"]
    bias: Float[Tensor, " classes"] | None

    def __call__(self, values: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows classes"]:
        """Logits."""
        return nn.functional.linear(values, self.weight, self.bias)


def distance_before_heads(
    heads: tuple[Head, Head],
    original: Float[Tensor, "texts tokens width"],
    changed: Float[Tensor, "texts tokens width"],
    batch: Batch,
) -> Distance:
    """Between what the heads of an original and of a changed model read, as their distributions are; see `distance`.

    Args:
        heads: the original's and the changed model's.
        original: what the original's head reads.
        changed: what the other's reads; the gradient is at this.
        batch: that was read.
    """
    where, changed = batch.compared, changed.detach()
    first, second = original[where], changed[where]
    rows = torch.empty_like(second)
    total, count = 0.0, max(1, _LOGITS // heads[0].weight.shape[0])
    for one, other, into in zip(first.split(count), second.split(count), rows.split(count), strict=True):
        logits = heads[1](other)
        total += _of_rows(heads[0](one), logits, logits)
        torch.matmul(logits, heads[1].weight, out=into)
    gradient = torch.zeros_like(changed)
    gradient[where] = rows
    return Distance(LossSum(total, len(rows)), gradient)


def _of_rows(
    original: Float[Tensor, "rows classes"],
    changed: Float[Tensor, "rows classes"],
    gradient: Float[Tensor, "rows classes"],
) -> float:
    """Sum of KL divergences; fills their gradient, q - p, which may take the place of what is changed."""
    total = 0.0
    count = max(1, COMPARED_AT_ONCE // original.shape[-1])
    for one, other, into in zip(
        original.split(count), changed.split(count), gradient.split(count), strict=True
    ):
        first, second = (torch.log_softmax(logits.float(), -1) for logits in (one, other))
        power = first.exp()
        total += float((power * (first - second)).sum())
        into.copy_(second.exp() - power)
    return total


def _of_vectors(original: Tensor, changed: Tensor, batch: Batch) -> Distance:
    with torch.enable_grad():
        leaf = changed.detach().requires_grad_(True)
        one, other = pooled(original, batch.real), pooled(leaf, batch.real)
        lost = (1 - nn.functional.cosine_similarity(one, other, dim=-1)).sum()
        (gradient,) = torch.autograd.grad(lost, leaf)
    return Distance(LossSum(float(lost.detach()), len(one)), gradient)
