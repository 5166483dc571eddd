"""Scales of a group of weights: the search for the one float16 that loses least.

A scale may be negative. The grid is lopsided (``-8 … 7`` at 4 bits, ``-2 … 1`` at 2), so its longer side
should point to the side of the larger weights: the sign of the scale turns it, and costs nothing to store.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.errors import InputError

# The largest weight of the group falls on `factor` times the longer side of the grid. Few bits gain from
# clipping hard; many bits lose by any. Beyond 1 the shorter side takes the largest weight.
_FACTORS: Final = {
    2: tuple(round(0.3 + 0.1 * step, 6) for step in range(18)),
    3: tuple(round(0.46 + 0.06 * step, 6) for step in range(16)),
    4: tuple(round(0.6 + 0.04 * step, 6) for step in range(16)),
    8: (0.93, 0.95, *(round(0.96 + 0.004 * step, 6) for step in range(13)), 128 / 127),
}  # each holds 1: a weight that lies on the grid already is met
_REFITS: Final = 2
_LARGEST: Final = torch.finfo(torch.float16).max
_SMALLEST: Final = 2.0**-20
"""Of numbers that float16 holds with 4 bits of precision; its smallest is 2⁻²⁴."""


def check_scales(name: str, weight: Float[Tensor, "*rows outputs"], grid: Grid) -> None:
    """Refuse a matrix whose scales float16 cannot hold: what is stored would be another matrix.

    Args:
        name: of the matrix, for messages.
        weight: its values.
        grid: that it is going to be stored on.

    Raises:
        InputError: its largest weight is too large, or so small that steps of float16 are a sixteenth of its scale.
    """
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    scale = largest / -grid.lowest
    if scale > _LARGEST / 2 or 0 < scale < _SMALLEST:
        side = "large" if scale > 1 else "small"
        raise InputError(
            f"{name}: its largest weight is {largest:.3g}, and a scale of {grid.bits} bits for it is too {side} for "
            f"float16, whose numbers go from {_SMALLEST:.1g} (with 4 bits of precision) to {_LARGEST:.0f}. Rescale the "
            "matrix and the one that it is multiplied with in turn, or use --quant none."
        )


def round_to_grid(
    weight: Float[Tensor, "*rows outputs"],
    scale: Float[Tensor, "*ones outputs"],
    grid: Grid,
    *,
    out: Float[Tensor, "*rows outputs"] | None = None,
) -> Float[Tensor, "*rows outputs"]:
    """The integers nearest to ``weight / scale``, still floating; ties go to the even one.

    Args:
        weight: what to round.
        scale: of each output.
        grid: bits.
        out: where to put them; None makes a new tensor.
    """
    return torch.div(weight, scale, out=out).round_().clamp_(grid.lowest, grid.highest)


def search_scales(
    group: Float[Tensor, "rows outputs"],
    grid: Grid,
    importance: Float[Tensor, " rows"] | Float[Tensor, "rows outputs"] | None = None,
) -> Float[Tensor, " outputs"]:
    """One scale per output: every other one of a fixed list, the neighbours of the best, then least squares.

    Each candidate is rounded to float16 *before* it is evaluated, so the error that is minimized is the one that
    is stored.

    Args:
        group: weights that share their scales.
        grid: bits.
        importance: weight of the squared error of each row, for all outputs or for each; None weighs all alike.

    Returns:
        Scales that float16 holds exactly, in the dtype of `group`, never zero; 1 for a group without weight.

    Raises:
        InputError: a scale beyond float16.
    """
    base = _base(group, grid)
    search = _Search(
        group, grid, torch.ones_like(group[:, 0]) if importance is None else importance.to(group)
    )
    factors = torch.tensor(_FACTORS[grid.bits], dtype=base.dtype, device=base.device)
    place, sign = search.every_other(_stored(base * factors[:, None]), _FACTORS[grid.bits].index(1.0) % 2)
    for step in (-1, 1):
        search.attempt(_stored(base * factors[(place + step).clamp(0, len(factors) - 1)]) * sign)
    for _ in range(_REFITS):
        search.attempt(_stored(search.fitted()))
    return search.best


def largest_scales(group: Float[Tensor, "rows outputs"], grid: Grid) -> Float[Tensor, " outputs"]:
    """One scale per output, with which its largest weight is the end of the shorter side of the grid.

    Returns:
        As `search_scales`.

    Raises:
        InputError: a scale beyond float16.
    """
    base = _base(group, grid) * (-grid.lowest / grid.highest)
    return torch.nan_to_num(_stored(base), nan=1.0)


def _base(group: Float[Tensor, "rows outputs"], grid: Grid) -> Float[Tensor, " outputs"]:
    """The scale with which the largest weight is the end of the longer side."""
    largest = group.abs().amax(0)
    base = largest / -grid.lowest
    if float(base.amax()) > _LARGEST / 2:
        raise InputError(
            f"A weight of {float(largest.amax()):.3g} needs a scale beyond float16 ({_LARGEST:.0f}) at "
            f"{grid.bits} bits: the checkpoint holds a value that no format here can store."
        )
    return base


class _Search:
    """The best scale so far of every output, and what it loses. The first loses what rounding all to zero does."""

    def __init__(
        self,
        group: Float[Tensor, "rows outputs"],
        grid: Grid,
        weighing: Float[Tensor, " rows"] | Float[Tensor, "rows outputs"],
    ) -> None:
        self._group, self._grid, self._weighing = group, grid, weighing
        self._some, self._other, self._third = (torch.empty_like(group) for _ in range(3))
        self._error = self._weighed(group.square())
        self.best = torch.ones_like(self._error)

    def every_other(
        self, scales: Float[Tensor, "places outputs"], first: int
    ) -> tuple[Int64[Tensor, " outputs"], Float[Tensor, " outputs"]]:
        """Evaluate every other one of some positive scales and its negative.

        Returns:
            The place of the best one, and its sign.
        """
        steps, nearest, missed = self._some, self._other, self._third
        tried = scales[first::2]
        errors = tried.new_empty(2, *tried.shape)
        # A scale and its negative round to the same integers but for their sign: the grid is turned instead.
        lowest, highest = self._grid.lowest, self._grid.highest
        for position, scale in enumerate(tried.unbind()):
            torch.div(self._group, scale, out=steps)
            torch.round(steps, out=nearest)
            for turned, (low, high) in enumerate(((lowest, highest), (-highest, -lowest))):
                torch.clamp(nearest, low, high, out=missed).sub_(steps).square_()
                errors[turned, position] = self._weighed(missed)
        least, place = errors.mul_(tried.square()).nan_to_num_(nan=math.inf).flatten(0, 1).min(0)
        sign = torch.where(place < tried.shape[0], 1.0, -1.0).to(tried)
        place = place % tried.shape[0] * 2 + first
        self._take(scales.gather(0, place[None])[0] * sign, least)
        return place, sign

    def attempt(self, scale: Float[Tensor, " outputs"]) -> None:
        """Take a scale for the outputs where it is better; NaN never is."""
        rounded = round_to_grid(self._group, scale, self._grid, out=self._some).mul_(scale)
        self._take(scale, self._weighed(rounded.sub_(self._group).square_()))

    def fitted(self) -> Float[Tensor, " outputs"]:
        """The scale of least squares for the integers of the best one."""
        integers = round_to_grid(self._group, self.best, self._grid, out=self._some)
        weighing = self._weighing if self._weighing.dim() == 2 else self._weighing[:, None]
        weighted = torch.mul(integers, weighing, out=self._other)
        covered = torch.mul(weighted, self._group, out=self._third).sum(0)
        energy = weighted.mul_(integers).sum(0)
        return torch.where(energy > 0, covered / torch.where(energy > 0, energy, 1.0), self.best)

    def _weighed(self, squares: Float[Tensor, "rows outputs"]) -> Float[Tensor, " outputs"]:
        """The sum over rows; overwrites what is summed."""
        if self._weighing.dim() == 1:
            return torch.mv(squares.T, self._weighing)
        return squares.mul_(self._weighing).sum(0)

    def _take(self, scale: Float[Tensor, " outputs"], error: Float[Tensor, " outputs"]) -> None:
        wins = error < self._error
        self.best = torch.where(wins, scale, self.best)
        self._error = torch.where(wins, error, self._error)


def _stored(scale: Float[Tensor, "*scales outputs"]) -> Float[Tensor, "*scales outputs"]:
    """As float16 holds them; NaN, which never wins, for those below the smallest."""
    stored = scale.half().to(scale.dtype)
    return stored.masked_fill_(stored == 0, math.nan)
