"""GPTQ: quantize inputs one after the other, each error made good by the inputs still to come.

Source: GPTQ (arXiv 2210.17323), algorithm 1. Letters: ``H`` the damped Gram, ``U`` the upper Cholesky factor
of its inverse (``H⁻¹ = UᵀU``), ``e`` the error of one input divided by ``U_ii``. Departures: scales are
searched when a group is reached, from the weights as updated so far, weighing each input by what its error
will cost (``1 / U_ii²``); afterwards coordinate descent goes over the result (see `descent`; `sweeps=0` is
GPTQ as published); there is no reordering here, because the order of inputs is the caller's (a dictionary's
atoms can be permuted for nothing, see `compot_deploy.numerics.quantize_factors`).
"""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized
from compot_deploy.errors import InputError
from compot_deploy.quant.descent import descend
from compot_deploy.quant.rtn import rtn
from compot_deploy.quant.scales import round_to_grid, search_scales

DAMPING: Final = 1e-2
"""Relative to the mean of the diagonal, the paper's value: keeps the feedback of unseen inputs bounded."""

SWEEPS: Final = 3
"""Passes of coordinate descent afterwards; the third still gains 2 % of the loss."""

_LARGEST_DAMPING: Final = 10.0


def gptq(
    weight: Float[Tensor, "inputs outputs"],
    gram: Float[Tensor, "inputs inputs"],
    grid: Grid,
    *,
    support: Bool[Tensor, "inputs outputs"] | None = None,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    block: int = 128,
) -> Quantized:
    """Quantize with error feedback, so that ``tr((W − Q)ᵀ G (W − Q))`` stays small.

    With a diagonal Gram there is no feedback and the result is round-to-nearest; a weight that lies on the
    grid already comes back unchanged.

    Args:
        weight: what to quantize.
        gram: ``XᵀX`` of its inputs.
        grid: bits and group. A last group may be shorter.
        support: entries outside are exactly 0; None allows all. Then the free inputs differ from column
            to column, and GPTQ's one factor for all columns would push error into entries that cannot take
            it: measured worse than round-to-nearest. Coordinate descent from round-to-nearest takes its
            place; it is never worse, and as good as a GPTQ with a factor of its own for each column.
        damping: added to the diagonal, relative to its mean; grows tenfold until Cholesky succeeds.
        sweeps: of coordinate descent; 0 is GPTQ as published. With a support at least one is made.
        block: inputs whose feedback is applied at once to those behind them. A matter of speed only.

    Raises:
        InputError: a Gram with NaN or without energy, or a weight whose scale does not fit float16.
    """
    inputs = weight.shape[0]
    if support is not None:
        _inverse_factor(gram, damping)  # refuses what is no Gram
        nearest = rtn(weight, gram, grid, support=support)
        return descend(nearest, weight, gram, support=support, sweeps=max(1, sweeps), block=block)
    work = weight.double().clone()
    upper = _inverse_factor(gram, damping)
    cost = upper.diagonal().square().reciprocal()
    integers = torch.empty(work.shape, dtype=torch.int8, device=work.device)
    scales = torch.empty((grid.groups(inputs), work.shape[1]), dtype=torch.float16, device=work.device)
    scale = torch.ones(work.shape[1], dtype=torch.float64, device=work.device)
    for start, stop in _blocks(inputs, grid.group, block):
        errors, chosen = torch.empty_like(work[start:stop]), torch.empty_like(work[start:stop])
        # Few operations a row: on a GPU their number is what it all costs.
        parts = (work[start:stop], errors, chosen, upper.diagonal()[start:stop])
        rowwise = zip(*(part.unbind() for part in parts), strict=True)
        for row, (wanted, error, rounded, pivot) in enumerate(rowwise, start):
            if row % grid.group == 0:
                # Everything in front is applied by now: a group begins with its block, or lies inside it.
                group = slice(row, min(row + grid.group, inputs))
                scale = search_scales(work[group], grid, cost[group])
                scales[row // grid.group] = scale.half()
            round_to_grid(wanted, scale, grid, out=rounded)
            torch.div(wanted - rounded * scale, pivot, out=error)
            work[row + 1 : stop] -= upper[row, row + 1 : stop, None] * error
        integers[start:stop] = chosen
        work[stop:] -= upper[start:stop, stop:].T @ errors
    return descend(Quantized(integers, scales, grid), weight, gram, sweeps=sweeps, block=block)


def _blocks(inputs: int, group: int, block: int) -> list[tuple[int, int]]:
    """Ranges of inputs such that every group begins with a range or lies inside of one."""
    if group < block:
        step = block // group * group
        return [(start, min(start + step, inputs)) for start in range(0, inputs, step)]
    return [
        (start, min(start + block, first + group, inputs))
        for first in range(0, inputs, group)
        for start in range(first, min(first + group, inputs), block)
    ]


def _inverse_factor(gram: Float[Tensor, "inputs inputs"], damping: float) -> Float64[Tensor, "inputs inputs"]:
    """U, upper triangular, with ``(G + damping)⁻¹ = UᵀU``."""
    symmetric = (gram.double() + gram.double().T) / 2
    mean = float(symmetric.diagonal().mean())
    if not mean > 0.0:  # NaN included
        raise InputError(
            f"GPTQ needs a Gram matrix with energy; the mean of its diagonal is {mean:g}. "
            "Calibrate with more text, or use the quantizer rtn."
        )
    identity = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    while damping <= _LARGEST_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(symmetric + damping * mean * identity)
        if int(failed) == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(failed) == 0:
                return upper
        damping = max(damping * 10, 1e-6)
    raise InputError(
        f"The matrix of {gram.shape[0]} inputs is no Gram matrix: it is not positive definite even with "
        f"{_LARGEST_DAMPING:g} times the mean of its diagonal added. Collect it as XᵀX."
    )
