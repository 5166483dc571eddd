"""GPTQ with coordinate descent in float64, input by input: slow, and what the fast one must not lose against."""

from __future__ import annotations

import torch
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized

_FACTORS = {
    2: tuple(0.3 + 0.1 * step for step in range(18)),
    3: tuple(0.46 + 0.06 * step for step in range(16)),
    4: tuple(0.6 + 0.04 * step for step in range(16)),
    8: (0.93, 0.95, *(0.96 + 0.004 * step for step in range(13)), 128 / 127),
}


def reference_gptq(weight: Tensor, gram: Tensor, grid: Grid, sweeps: int = 3) -> Quantized:
    """GPTQ as published, with scales searched when a group is reached, then sweeps over everything."""
    inputs = weight.shape[0]
    work = weight.double().clone()
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    cost = upper.diagonal() ** -2
    integers = torch.zeros_like(work)
    scales = torch.ones(grid.groups(inputs), work.shape[1], dtype=torch.float64)
    for row in range(inputs):
        if row % grid.group == 0:
            rows = slice(row, row + grid.group)
            scales[row // grid.group] = reference_scale(work[rows], grid, cost[rows])
        scale = scales[row // grid.group]
        integers[row] = _rounded(work[row], scale, grid)
        error = (work[row] - integers[row] * scale) / upper[row, row]
        work[row + 1 :] -= upper[row, row + 1 :, None] * error
    for _ in range(sweeps):
        _sweep(integers, scales, weight.double(), gram.double(), grid)
    return Quantized(integers.to(torch.int8), scales.half(), grid)


def reference_scale(group: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    """Every scale of the list and its negative, then twice the one of least squares."""

    def error(scale: Tensor) -> Tensor:
        return importance @ (group - _rounded(group, scale, grid) * scale).square()

    best = torch.ones_like(group[0])
    least = importance @ group.square()
    base = group.abs().amax(0) / -grid.lowest
    for step in range(2 * len(_FACTORS[grid.bits]) + 2):
        if step < 2 * len(_FACTORS[grid.bits]):
            tried = base * _FACTORS[grid.bits][step // 2] * (1 - 2 * (step % 2))
        else:
            chosen = _rounded(group, best, grid)
            energy = importance @ chosen.square()
            tried = torch.where(energy > 0, importance @ (chosen * group) / energy.clamp_min(1e-300), best)
        tried = tried.half().double()
        lost = error(torch.where(tried == 0, torch.nan, tried))
        best, least = torch.where(lost < least, tried, best), torch.where(lost < least, lost, least)
    return best


def _sweep(integers: Tensor, scales: Tensor, weight: Tensor, gram: Tensor, grid: Grid) -> None:
    inputs = weight.shape[0]
    gradient = gram @ (weight - integers * scales.repeat_interleave(grid.group, 0)[:inputs])
    for row in range(inputs):
        if row % grid.group == 0:
            rows = slice(row, row + grid.group)
            pulled = gram[:, rows] @ integers[rows]
            energy = (integers[rows] * pulled[rows]).sum(0)
            wanted = (integers[rows] * gradient[rows]).sum(0) / torch.where(energy > 0, energy, 1.0)
            fitted = (scales[row // grid.group] + wanted).half().double()
            fitted = torch.where((energy > 0) & (fitted != 0), fitted, scales[row // grid.group])
            gradient -= pulled * (fitted - scales[row // grid.group])
            scales[row // grid.group] = fitted
        if gram[row, row] > 0:
            scale = scales[row // grid.group]
            before = integers[row].clone()
            integers[row] = _rounded(integers[row] * scale + gradient[row] / gram[row, row], scale, grid)
            gradient -= gram[:, row, None] * ((integers[row] - before) * scale)


def _rounded(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    return (weight / scale).round().clamp(grid.lowest, grid.highest)
