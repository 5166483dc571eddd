"""GPTQ: quantize inputs one after the other, each error made good by the inputs still to come.

Source: GPTQ (arXiv 2210.17323), algorithm 1. Letters: ``H = T C Tᵀ`` the damped Gram and its factors, see
`feedback`; ``D = W − Q``, ``w'_i = w_i + Σ_{j<i} T_ji d_j`` what input i is rounded from. Departures, all of
which ``sweeps=0`` switches off but the first:

* the scale of a group is searched when the group is reached, for what its inputs would be if nothing in it were
  rounded (``T_ggᵀ x`` = the feedback so far), weighing each input by what its error costs, C_ii;
* when a block of inputs is done, coordinate descent goes over it, against the Gram that is left when later
  inputs mend what they can (Schur's complement, ``T_bb C_b T_bbᵀ``). It knows of the block what GPTQ did not
  know of later inputs, for little: a block is small;
* when all are done, coordinate descent goes over everything (see `descent`).

There is no reordering, because the order of inputs is the caller's (a dictionary's atoms can be permuted for
nothing, see `compot_deploy.numerics.quantize_factors`).

Precision: factors in float64, everything of the size of the weight in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized
from compot_deploy.core.threads import one_thread
from compot_deploy.quant.descent import (
    BLOCK,
    Descent,
    dequantize_groups,
    descend,
    halfway,
    round_in_turn,
    span_of,
    within,
)
from compot_deploy.quant.feedback import DAMPING, Feedback, Inputs, feedback_of
from compot_deploy.quant.rtn import rtn
from compot_deploy.quant.scales import search_scales

SWEEPS: Final = 2
"""Passes of coordinate descent over everything."""

_MENDED: Final = 256
"""Inputs that are descended over together as soon as they are quantized, but no more than half of all: what is left
then must be able to mend. 512 gain another 1 % on tall matrices."""

_COLUMNS: Final = 2048
"""Outputs that are done at a time: they are independent, and working memory is several times their weights."""


def gptq(
    weight: Float[Tensor, "inputs outputs"],
    gram: Inputs,
    grid: Grid,
    *,
    support: Bool[Tensor, "inputs outputs"] | None = None,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    block: int = BLOCK,
) -> Quantized:
    """Quantize with error feedback, so that ``tr((W − Q)ᵀ G (W − Q))`` stays small.

    With a diagonal Gram there is no feedback and the result is round-to-nearest; a weight that lies on the
    grid already comes back unchanged. Outputs are independent: matrices of one input go side by side.

    Args:
        weight: what to quantize.
        gram: ``XᵀX`` of its inputs, or what `feedback_of` made of it, so that several grids and matrices share it.
        grid: bits and group. A last group may be shorter.
        support: entries outside are exactly 0; None allows all. Then the free inputs differ from column
            to column, and GPTQ's one factor for all columns would push error into entries that cannot take
            it: measured worse than round-to-nearest. Coordinate descent from round-to-nearest takes its
            place; it is never worse, and as good as a GPTQ with a factor of its own for each column.
        damping: see `feedback_of`; has no effect on factors that were made before.
        sweeps: of coordinate descent over everything; 0 is GPTQ as published, without descent over blocks. With
            a support at least one is made.
        block: inputs that are rounded one after the other between two products. A matter of speed only.

    Raises:
        InputError: a Gram with NaN or without energy, or a weight whose scale does not fit float16.
    """
    if support is not None:
        inner = feedback_of(gram, damping).gram
        nearest = rtn(weight, None, grid, support=support)
        return descend(nearest, weight, inner, support=support, sweeps=max(1, sweeps), block=block)
    return gptq_side_by_side([(weight, grid)], gram, damping=damping, sweeps=sweeps, block=block)[0]


def gptq_side_by_side(
    matrices: Sequence[tuple[Float[Tensor, "inputs _"], Grid]],
    gram: Inputs,
    *,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    block: int = BLOCK,
) -> tuple[Quantized, ...]:
    """Quantize several matrices of one input, each on a grid of its own; see `gptq`.

    Those whose grids have groups of one size take one pass: an input costs the same few steps for all of them.

    Args:
        matrices: weights and grids.
        gram: of the input.
        damping: see `gptq`.
        sweeps: see `gptq`.
        block: see `gptq`.
    """
    feedback = feedback_of(gram, damping)
    pieces: list[tuple[int, Float[Tensor, "inputs outputs"], Grid]] = []
    for number, (weight, grid) in sorted(enumerate(matrices), key=lambda entry: entry[1][1].group):
        pieces += [(number, piece, grid) for piece in weight.float().split(_COLUMNS, 1)]
    made: list[list[Quantized]] = [[] for _ in matrices]
    while pieces:
        count = _together(pieces)
        now, pieces = pieces[:count], pieces[count:]
        with one_thread():
            done = _Pass([entry[1:] for entry in now], feedback, sweeps, block).result()
        for (number, _, _), part in zip(now, done, strict=True):
            made[number].append(part)
    return tuple(_joined(parts) for parts in made)


def _together(pieces: Sequence[tuple[int, Float[Tensor, "inputs _"], Grid]]) -> int:
    """How many pieces, from the first, go through one pass."""
    count, columns = 0, 0
    for _, piece, grid in pieces:
        columns += piece.shape[1]
        if count and (columns > _COLUMNS or grid.group != pieces[0][2].group):
            break
        count += 1
    return count


def _joined(parts: Sequence[Quantized]) -> Quantized:
    if len(parts) == 1:
        return parts[0]
    integers, scales = (
        torch.cat(values, 1) for values in zip(*((p.integers, p.scales) for p in parts), strict=True)
    )
    return Quantized(integers, scales, parts[0].grid)


class _Pass:
    """GPTQ on the way through the inputs of some matrices, whose grids have groups of one size."""

    def __init__(
        self,
        matrices: Sequence[tuple[Float32[Tensor, "inputs _"], Grid]],
        feedback: Feedback,
        sweeps: int,
        block: int,
    ) -> None:
        self._weight = torch.cat([weight for weight, _ in matrices], 1)
        self._feedback, self._sweeps, self._block = feedback, sweeps, block
        self._grids = tuple(grid for _, grid in matrices)
        self._widths = [weight.shape[1] for weight, _ in matrices]
        self._span = span_of(self._grids, self._widths, self._weight.device)
        self._cost = feedback.cost.float()
        inputs, outputs = self._weight.shape
        self._mended = max(1, min(_MENDED, inputs // 2) // self._span.group) * self._span.group
        if not sweeps:
            self._mended = 0
        elif self._mended >= inputs:
            # One block is everything: it is descended over with the Gram as it is.
            self._mended, self._sweeps = 0, sweeps + 1
        self._work = self._weight.clone()  # w', as far as errors are known
        self._error = torch.empty_like(self._work)  # D
        self._integers = torch.zeros_like(self._work)
        self._scales = self._work.new_ones(self._grids[0].groups(inputs), outputs)

    def result(self) -> list[Quantized]:
        """The matrices, in their order."""
        self._quantize(0, self._weight.shape[0])
        if self._sweeps:
            # H D = T C (W' − Q), and G is H without its damping.
            felt = self._work.sub_(dequantize_groups(self._integers, self._scales, self._span.group)).mul_(
                self._cost[:, None]
            )
            gradient = _times_upper(self._feedback.onward.T, felt).add_(
                self._error, alpha=-self._feedback.damping
            )
            self._descend(self._integers, self._scales, gradient, self._feedback.gram, self._sweeps)
        parts = zip(
            self._integers.split(self._widths, 1),
            self._scales.split(self._widths, 1),
            self._grids,
            strict=True,
        )
        return [
            Quantized(integers.to(torch.int8).contiguous(), scales.half().contiguous(), grid)
            for integers, scales, grid in parts
        ]

    def _quantize(self, start: int, stop: int) -> None:
        """One half, its feedback to the other, the other half; blocks are not cut."""
        if not self._mended:
            self._quantize_groups(start, stop)
            return
        if stop - start <= self._mended:
            self._quantize_block(start, stop)
            return
        middle = halfway(start, stop, self._mended)
        self._quantize(start, middle)
        self._feed_back(start, middle, stop)
        self._quantize(middle, stop)

    def _quantize_block(self, start: int, stop: int) -> None:
        rows, size = slice(start, stop), self._span.group
        fed = self._work[rows] - self._weight[rows]
        self._quantize_groups(start, stop)
        groups = slice(start // size, -(-stop // size))
        integers, scales = self._integers[rows], self._scales[groups]
        self._descend_block(rows, integers, scales)
        error = torch.sub(
            self._weight[rows], dequantize_groups(integers, scales, size), out=self._error[rows]
        )
        # w' = w + feedback from before the block + (T − 1)ᵀ D from inside of it
        quantized = self._weight[rows] - error
        torch.addmm(fed, self._feedback.onward[rows, rows], error, out=self._work[rows]).add_(quantized)

    def _descend_block(
        self,
        rows: slice,
        integers: Float32[Tensor, "rows outputs"],
        scales: Float32[Tensor, "groups outputs"],
    ) -> None:
        """One sweep against what is left of the Gram when later inputs mend what they can."""
        costly = self._feedback.onward[rows, rows].T * self._cost[rows]
        gradient = costly @ (self._work[rows] - dequantize_groups(integers, scales, self._span.group))
        left = costly @ self._feedback.onward[rows, rows]
        self._descend(integers, scales, gradient, left, 1)

    def _quantize_groups(self, start: int, stop: int) -> None:
        if within(start, stop, self._span.group):
            self._quantize_group(start, stop)
            return
        middle = halfway(start, stop, self._span.group)
        self._quantize_groups(start, middle)
        self._feed_back(start, middle, stop)
        self._quantize_groups(middle, stop)

    def _quantize_group(self, start: int, stop: int) -> None:
        rows = slice(start, stop)
        weight, work, integers = self._weight[rows], self._work[rows], self._integers[rows]
        onward = self._feedback.onward[rows, rows]
        fed = work - weight
        wanted = weight
        if start:
            wanted = weight + torch.linalg.solve_triangular(onward, fed, upper=False, unitriangular=True)
        lanes = zip(wanted.split(self._widths, 1), self._grids, strict=True)
        scale = torch.cat([search_scales(lane, grid, self._cost[rows]) for lane, grid in lanes])
        # In units of the scale from here on. Divisions, so that a weight on the grid is met exactly.
        steps = weight / scale
        ideal = fed.div_(scale).add_(steps)
        round_in_turn(ideal, integers, steps, onward.tril(-1), self._span, block=self._block)
        torch.mul(ideal, scale, out=work)
        torch.addcmul(weight, integers, scale, value=-1, out=self._error[rows])
        self._scales[start // self._span.group] = scale

    def _descend(
        self,
        integers: Float32[Tensor, "rows outputs"],
        scales: Float32[Tensor, "groups outputs"],
        gradient: Float32[Tensor, "rows outputs"],
        gram: Float32[Tensor, "rows rows"],
        sweeps: int,
    ) -> None:
        Descent(integers, scales, gradient, gram, self._span, block=self._block).run(sweeps)

    def _feed_back(self, start: int, middle: int, stop: int) -> None:
        """What the errors of some inputs ask of those behind them."""
        first, second = slice(start, middle), slice(middle, stop)
        self._work[second].addmm_(self._feedback.onward[second, first], self._error[first])


def _times_upper(
    upper: Float32[Tensor, "n n"], matrix: Float32[Tensor, "n columns"], block: int = 64
) -> Float32[Tensor, "n columns"]:
    """The product with an upper triangular matrix, in half of the operations."""
    size = upper.shape[0]
    if size <= block:
        return upper @ matrix
    middle = size // 2
    above = _times_upper(upper[:middle, :middle], matrix[:middle], block)
    above.addmm_(upper[:middle, middle:], matrix[middle:])
    return torch.cat((above, _times_upper(upper[middle:, middle:], matrix[middle:], block)))
