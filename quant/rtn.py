"""Round-to-nearest: the baseline, and optimal where the inputs are uncorrelated."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized
from compot_deploy.quant.feedback import Inputs
from compot_deploy.quant.scales import largest_scales, round_to_grid, search_scales


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
    for position, start in enumerate(range(0, work.shape[0], grid.group)):
        rows = slice(start, start + grid.group)
        weighing = None if importance is None else importance[rows]
        scale = search_scales(work[rows], grid, weighing) if searched else largest_scales(work[rows], grid)
        scales[position] = scale.half()
        integers[rows] = round_to_grid(work[rows], scale, grid).to(torch.int8)
    return Quantized(integers, scales, grid)
