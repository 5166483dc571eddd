"""Round-to-nearest: the baseline, and optimal where the inputs are uncorrelated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized
from compot_deploy.quant.feedback import Inputs
from compot_deploy.quant.scales import largest_scales, round_to_grid, search_scales

_AT_ONCE: Final = 2**16
"""Weights that are rounded at a time: a group alone is often too small to be worth the calls."""


def rtn(
    weight: Float[Tensor, "inputs outputs"],
    gram: Inputs | None,
    grid: Grid,
    *,
    support: Bool[Tensor, "inputs outputs"] | None = None,
    searched: bool = True,
    importance: Float[Tensor, " inputs"] | None = None,
) -> Quantized:
    """Quantize each group on its own, with the scale of least squared error.

    Args:
        weight: what to quantize.
        gram: not used; it is here so that all quantizers look alike.
        grid: bits and group. A last group may be shorter.
        support: entries outside become exactly 0; None allows all.
        searched: look for that scale; without, the largest weight of a group falls on the end of the grid, which is a
            twentieth of the work and at 8 bits nearly as good.
        importance: weight of the squared error of each input while scales are searched; None weighs all alike.

    Raises:
        InputError: a weight so large that its scale does not fit float16.
    """
    work = weight.float()
    if support is not None:
        work = torch.where(support, work, 0.0)
    integers = torch.empty(work.shape, dtype=torch.int8, device=work.device)
    scales = torch.empty((grid.groups(work.shape[0]), work.shape[1]), dtype=torch.float16, device=work.device)
    for start, stop in _pieces(work.shape[0], grid.group, work.shape[1]):
        rows, count = slice(start * grid.group, stop * grid.group), stop - start
        groups = _side_by_side(work[rows], count)
        weighing = None
        if importance is not None:
            weighing = _side_by_side(importance[rows, None].expand(-1, work.shape[1]), count)
        scale = search_scales(groups, grid, weighing) if searched else largest_scales(groups, grid)
        scales[start:stop] = scale.half().view(count, -1)
        rounded = round_to_grid(groups, scale, grid).to(torch.int8)
        integers[rows] = rounded.view(len(groups), count, -1).transpose(0, 1).flatten(0, 1)
    return Quantized(integers, scales, grid)


def _pieces(inputs: int, size: int, outputs: int) -> Iterator[tuple[int, int]]:
    """Groups that are done together, as many as stay in a cache; the last one, if it is shorter, alone."""
    together, full = max(1, _AT_ONCE // (size * outputs)), inputs // size
    yield from ((start, min(start + together, full)) for start in range(0, full, together))
    if inputs % size:
        yield full, full + 1


def _side_by_side(
    values: Float[Tensor, "inputs outputs"], groups: int
) -> Float[Tensor, "rows groups_times_outputs"]:
    """Groups of inputs next to each other, as if they were further outputs of one group."""
    return values.reshape(groups, -1, values.shape[1]).transpose(0, 1).flatten(1)
