"""Slow, obvious versions of the numerics, to test the fast ones against."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Quantized
from compot_deploy.quant.scales import search_scales


def correlated_gram(size: int, tokens: int | None = None) -> Tensor:
    """Gram of activations with strong correlations and a wide spectrum."""
    mixing = torch.randn(size, size, dtype=torch.float64) * torch.logspace(0, -1.5, size, dtype=torch.float64)
    activations = torch.randn(tokens or 4 * size, size, dtype=torch.float64) @ mixing.T
    return activations.T @ activations


def gram_loss(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """``tr((W − Ŵ)ᵀ G (W − Ŵ))``."""
    difference = weight.double() - approximation.double()
    return float((difference * (gram @ difference)).sum())


def column_losses(weight: Tensor, approximation: Tensor, gram: Tensor) -> Tensor:
    """`gram_loss` of each column."""
    difference = weight.double() - approximation.double()
    return (difference * (gram @ difference)).sum(0)


def best_codes(target: Tensor, dictionary: Tensor, pattern: Pattern) -> float:
    """Least squared error of one column over all supports that the pattern allows, by trying them all."""
    atoms = dictionary.shape[1]
    groups = [
        [list(kept) for kept in itertools.combinations(range(start, start + pattern.of), pattern.kept)]
        for start in range(0, atoms, pattern.of)
    ]
    best = float("inf")
    for combination in itertools.product(*groups):
        chosen = dictionary[:, list(itertools.chain.from_iterable(combination))]
        solution = torch.linalg.lstsq(chosen, target).solution
        best = min(best, float((target - chosen @ solution).square().sum()))
    return best


def fitted_codes(target: Tensor, dictionary: Tensor, support: Tensor) -> Tensor:
    """Least squares on the support, column by column."""
    codes = torch.zeros(support.shape, dtype=target.dtype)
    for column in range(target.shape[1]):
        chosen = support[:, column].nonzero().flatten()
        codes[chosen, column] = torch.linalg.lstsq(
            dictionary[:, chosen], target[:, column : column + 1]
        ).solution.flatten()
    return codes


def textbook_gptq(weight: Tensor, gram: Tensor, grid: Grid, damping: float) -> Quantized:
    """GPTQ without blocks or Cholesky: the inverse of the Gram of the inputs still free, every time anew.

    The optimal brain surgeon step for input i among the free ones F: ``w_F -= e / [H_F⁻¹]_ii · [H_F⁻¹]_:i``.
    """
    inputs, outputs = weight.shape
    work = weight.double().clone()
    damped = gram + damping * gram.diagonal().mean() * torch.eye(inputs, dtype=gram.dtype)
    integers = torch.zeros(inputs, outputs, dtype=torch.int8)
    scales = torch.zeros(grid.groups(inputs), outputs, dtype=torch.float16)
    cost = torch.tensor(
        [1.0 / float(torch.linalg.inv(damped[i:, i:])[0, 0]) for i in range(inputs)], dtype=torch.float64
    )
    for row in range(inputs):
        if row % grid.group == 0:
            group = slice(row, min(row + grid.group, inputs))
            scales[row // grid.group] = search_scales(work[group], grid, cost[group]).half()
        scale = scales[row // grid.group].double()
        rounded = (work[row] / scale).round().clamp(grid.lowest, grid.highest)
        integers[row] = rounded.to(torch.int8)
        inverse = torch.linalg.inv(damped[row:, row:])
        error = work[row] - rounded * scale
        for later in range(row + 1, inputs):
            work[later] -= error * inverse[later - row, 0] / inverse[0, 0]
    return Quantized(integers, scales, grid)
