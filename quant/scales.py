"""Scales of a group of weights: the search for the one float16 that loses least.

A scale may be negative. The grid is lopsided (``-8 … 7`` at 4 bits, ``-2 … 1`` at 2), so its longer side
should point to the side of the larger weights: the sign of the scale turns it, and costs nothing to store.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.errors import InputError

# The largest weight of the group falls on `factor` times the longer side of the grid. Few bits gain from
# clipping hard; many bits lose by any. Beyond 1 the shorter side takes the largest weight.
_FACTORS: Final = {
    2: tuple(0.3 + 0.1 * step for step in range(18)),
    3: tuple(0.46 + 0.06 * step for step in range(16)),
    4: tuple(0.6 + 0.04 * step for step in range(16)),
    8: (0.93, 0.95, *(0.96 + 0.004 * step for step in range(13)), 128 / 127),
}
_REFITS: Final = 2
_LARGEST: Final = torch.finfo(torch.float16).max


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
    importance: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, " outputs"]:
    """One scale per output: the best of a fixed list, then re-fitted by least squares.

    Each candidate is rounded to float16 *before* it is judged, so the error that is minimised is the one that
    is stored.

    Args:
        group: weights that share their scales.
        grid: bits.
        importance: weight of the squared error of each row; None weighs all alike.

    Returns:
        Scales that float16 holds exactly, in the dtype of `group`, never zero; 1 for a group without weight.

    Raises:
        InputError: a scale beyond float16.
    """
    largest = group.abs().amax(0)
    base = largest / -grid.lowest
    if float(base.amax()) > _LARGEST / 2:
        raise InputError(
            f"A weight of {float(largest.amax()):.3g} needs a scale beyond float16 ({_LARGEST:.0f}) at "
            f"{grid.bits} bits: the checkpoint holds a value that no format here can store."
        )
    best = torch.ones_like(base)
    best_error = _error(group, torch.zeros_like(group), importance)  # what rounding all to zero costs
    factors = [sign * factor for factor in _FACTORS[grid.bits] for sign in (1.0, -1.0)]
    tried = _stored(base * torch.tensor(factors, dtype=base.dtype, device=base.device)[:, None])
    for scale in tried.unbind():
        best, best_error = _better(group, scale, grid, importance, best, best_error)
    for _ in range(_REFITS):
        integers = round_to_grid(group, best, grid)
        weighted = integers if importance is None else integers * importance[:, None]
        energy = (weighted * integers).sum(0)
        fitted = torch.where(energy > 0, (weighted * group).sum(0) / energy.clamp_min(1e-300), best)
        best, best_error = _better(group, _stored(fitted), grid, importance, best, best_error)
    return best


def _stored(scale: Float[Tensor, "*scales outputs"]) -> Float[Tensor, "*scales outputs"]:
    """As float16 holds them; NaN, which never wins, for those below the smallest."""
    stored = scale.half().to(scale.dtype)
    return stored.masked_fill_(stored == 0, math.nan)


def _error(
    group: Float[Tensor, "rows outputs"],
    rounded: Float[Tensor, "rows outputs"],
    importance: Float[Tensor, " rows"] | None,
) -> Float[Tensor, " outputs"]:
    squares = (group - rounded).square_()
    return squares.sum(0) if importance is None else importance @ squares


def _better(
    group: Float[Tensor, "rows outputs"],
    stored: Float[Tensor, " outputs"],
    grid: Grid,
    importance: Float[Tensor, " rows"] | None,
    best: Float[Tensor, " outputs"],
    best_error: Float[Tensor, " outputs"],
) -> tuple[Float[Tensor, " outputs"], Float[Tensor, " outputs"]]:
    error = _error(group, round_to_grid(group, stored, grid).mul_(stored), importance)
    wins = error < best_error
    return torch.where(wins, stored, best), torch.where(wins, error, best_error)
