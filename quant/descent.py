"""Coordinate descent: integers and scales re-chosen one after the other, each against all others.

Given integers on a grid, the best integer of one input with all others fixed has a closed form, and so has
the scale of a group. Cycling through them lowers ``tr((W − Q)ᵀ G (W − Q))`` in every step, from any start. It
mends what a single pass of GPTQ has to leave: GPTQ chooses an input before it sees what later ones can make
good. On correlated inputs it takes another 30 to 40 % off GPTQ's loss. Unlike GPTQ it does not mind a support
that differs from column to column.

Letters: ``Q`` the quantized weight, ``R = G(W − Q)`` the gradient, kept up to date.

Sweeps run forwards and backwards in turn. A group hears of all that happened on its far side since its own last
turn in one product, so a sweep takes half of the products that one in a fixed direction would. Everything is
float32: the gradient is accumulated relative to its own terms, and what decides about an integer is hundreds of
times coarser than what float32 loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized
from compot_deploy.core.threads import one_thread

BLOCK: Final = 16
"""Inputs that are rounded one after the other; beyond that, products of matrices are faster."""


def descend(
    quantized: Quantized,
    weight: Float[Tensor, "inputs outputs"],
    gram: Float[Tensor, "inputs inputs"],
    *,
    support: Bool[Tensor, "inputs outputs"] | None = None,
    sweeps: int = 2,
    block: int = BLOCK,
) -> Quantized:
    """Improve a quantized weight; the loss ``tr((W − Q)ᵀ G (W − Q))`` of no column rises.

    Args:
        quantized: where to begin.
        weight: what it stands for.
        gram: ``XᵀX`` of the inputs.
        support: entries outside stay 0 (they must be 0 in `quantized`); None allows all.
        sweeps: passes over all inputs, at most; stops when one changes nothing.
        block: inputs that are rounded one after the other between two products. A matter of speed only.
    """
    with one_thread():
        return _descended(quantized, weight, gram, support, sweeps, block)


def _descended(
    quantized: Quantized,
    weight: Float[Tensor, "inputs outputs"],
    gram: Float[Tensor, "inputs inputs"],
    support: Bool[Tensor, "inputs outputs"] | None,
    sweeps: int,
    block: int,
) -> Quantized:
    symmetric = (gram.double() + gram.double().T) / 2
    mean = float(symmetric.diagonal().mean())
    symmetric = (symmetric / mean if mean > 0.0 else symmetric).float()
    target = weight.float() if support is None else torch.where(support, weight.float(), 0.0)
    integers, scales = quantized.integers.float(), quantized.scales.float()
    span = span_of([quantized.grid], [weight.shape[1]], weight.device)
    gradient = symmetric @ (target - dequantize_groups(integers, scales, quantized.grid.group))
    Descent(integers, scales, gradient, symmetric, span, support, block).run(sweeps)
    return Quantized(integers.to(torch.int8), scales.half(), quantized.grid)


@dataclass(frozen=True)
class Span:
    """What rounding has to know of the grids of one or more matrices side by side.

    Attributes:
        group: inputs that share a scale.
        lowest: the smallest integer of each output.
        highest: the largest.
    """

    group: int
    lowest: Float32[Tensor, " outputs"]
    highest: Float32[Tensor, " outputs"]


def span_of(grids: Sequence[Grid], outputs: Sequence[int], device: torch.device) -> Span:
    """Of grids with groups of one size, each for so many outputs."""
    count = torch.tensor(outputs, device=device)
    ends = torch.tensor([(grid.lowest, grid.highest) for grid in grids], dtype=torch.float32, device=device)
    lowest, highest = ends.repeat_interleave(count, dim=0).T.contiguous()
    return Span(grids[0].group, lowest, highest)


class Descent:
    """Sweeps over integers and scales, in place.

    Args:
        integers: of Q, changed.
        scales: of Q, changed; float16 holds them exactly.
        gradient: R, changed.
        gram: G, symmetric.
        span: integers and groups.
        support: entries outside stay 0; None allows all.
        block: see `descend`.
    """

    def __init__(
        self,
        integers: Float32[Tensor, "inputs outputs"],
        scales: Float32[Tensor, "groups outputs"],
        gradient: Float32[Tensor, "inputs outputs"],
        gram: Float32[Tensor, "inputs inputs"],
        span: Span,
        support: Bool[Tensor, "inputs outputs"] | None = None,
        block: int = BLOCK,
    ) -> None:
        self._integers, self._scales, self._gradient, self._gram = integers, scales, gradient, gram
        self._span, self._support, self._block = span, support, block
        curvature = gram.diagonal()
        # An input without energy keeps its integers: what it would move by is multiplied by zero.
        self._reciprocal = torch.where(curvature > 0, 1.0 / curvature, 0.0)[:, None]
        self._before = torch.zeros_like(integers)  # by how much Q moved in the sweep before this one
        self._moved = torch.zeros_like(integers)  # and in this one

    def run(self, sweeps: int) -> None:
        """Go over all inputs, forwards first; stop when a sweep changes nothing."""
        for sweep in range(sweeps):
            self._visit(0, self._integers.shape[0], backwards=sweep % 2 == 1)
            if not bool(self._moved.any()):  # asked once a sweep: a GPU has to be waited for
                break
            self._before, self._moved = self._moved, self._before

    def _visit(self, start: int, stop: int, *, backwards: bool) -> None:
        if within(start, stop, self._span.group):
            self._group(start, stop)
            return
        middle = halfway(start, stop, self._span.group)
        halves = (slice(start, middle), slice(middle, stop))
        first, second = reversed(halves) if backwards else halves
        self._visit(first.start, first.stop, backwards=backwards)
        # The second half last heard of the first before that one's turn in the last sweep.
        unheard = self._moved[first] + self._before[first]
        self._gradient[second].addmm_(self._gram[second, first], unheard, alpha=-1)
        self._visit(second.start, second.stop, backwards=backwards)

    def _group(self, start: int, stop: int) -> None:
        rows = slice(start, stop)
        integers, gradient, inner = self._integers[rows], self._gradient[rows], self._gram[rows, rows]
        scale, reciprocal = self._scales[start // self._span.group], self._reciprocal[rows]
        # The scale that is best for the integers as they are. Stored scales are float16 already, so the
        # nearest float16 to the optimum is no further from it than they are.
        pulled = inner @ integers
        energy = (integers * pulled).sum(0)
        wanted = (integers * gradient).sum(0) / torch.where(energy > 0, energy, 1.0)
        fitted = (scale + wanted).half().float()
        usable = (energy > 0) & torch.isfinite(fitted) & (fitted != 0)
        fitted = torch.where(usable, fitted, scale)
        # In units of the scale and of each input's own curvature: what an input would like to be.
        ideal = torch.addcmul(gradient, pulled, fitted - scale, value=-1)
        ideal.mul_(reciprocal).div_(fitted).add_(integers)
        earlier = integers.clone()
        support = None if self._support is None else self._support[rows]
        round_in_turn(
            ideal, integers, earlier, (inner * reciprocal).tril(-1), self._span, support, self._block
        )
        moved = torch.mul(integers, fitted, out=self._moved[rows]).sub_(earlier.mul_(scale))
        gradient.addmm_(inner, moved, alpha=-1)
        scale.copy_(fitted)


def round_in_turn(
    ideal: Float32[Tensor, "rows outputs"],
    integers: Float32[Tensor, "rows outputs"],
    wanted: Float32[Tensor, "rows outputs"],
    influence: Float32[Tensor, "rows rows"],
    span: Span,
    support: Bool[Tensor, "rows outputs"] | None = None,
    block: int = BLOCK,
) -> None:
    """Round rows one after the other, each to ``round(ideal_i + Σ_{j<i} influence_ij (wanted_j − integers_j))``.

    Args:
        ideal: changed into what was rounded.
        integers: overwritten.
        wanted: what the rows before would have to be to have no influence.
        influence: strictly lower triangular.
        span: the integers that there are.
        support: entries outside become 0.
        block: rows between two products.
    """
    rows = ideal.shape[0]
    if rows > block:
        middle = (rows + 1) // 2
        for part in (slice(0, middle), slice(middle, rows)):
            if part.start:
                missed = wanted[:middle] - integers[:middle]
                ideal[part].addmm_(influence[part, :middle], missed)
            inside = None if support is None else support[part]
            round_in_turn(
                ideal[part], integers[part], wanted[part], influence[part, part], span, inside, block
            )
        return
    ideal.addmm_(influence, wanted)
    integers.zero_()  # rows that are still to come have no influence, but must not be NaN
    chosen = integers.T
    # Few operations a row: their number is what it all costs, on a GPU above all.
    for row, (value, integer, weights) in enumerate(
        zip(ideal.unbind(), integers.unbind(), influence.unbind(), strict=True)
    ):
        value.addmv_(chosen, weights, alpha=-1)
        torch.round(value, out=integer).clamp_(span.lowest, span.highest)
        if support is not None:
            integer.mul_(support[row])


def dequantize_groups(
    integers: Float32[Tensor, "inputs outputs"], scales: Float32[Tensor, "groups outputs"], group: int
) -> Float32[Tensor, "inputs outputs"]:
    """Q: every integer times the scale of its group."""
    result = torch.empty_like(integers)
    for position, start in enumerate(range(0, integers.shape[0], group)):
        rows = slice(start, start + group)
        torch.mul(integers[rows], scales[position], out=result[rows])
    return result


def within(start: int, stop: int, size: int) -> bool:
    """Whether a range lies in one of the pieces of `size` that everything is cut into."""
    return start // size == (stop - 1) // size


def halfway(start: int, stop: int, size: int) -> int:
    """Where a range that begins with a piece of `size` and has several of them is cut in two: between two."""
    first, last = start // size, (stop - 1) // size
    return size * ((first + last + 1) // 2)
