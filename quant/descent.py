"""Coordinate descent: integers and scales re-chosen one after the other, each against all others.

Given integers on a grid, the best integer of one input with all others fixed has a closed form, and so has
the scale of a group. Cycling through them lowers ``tr((W − Q)ᵀ G (W − Q))`` in every step, from any start. It
mends what a single pass of GPTQ has to leave: GPTQ chooses an input before it sees what later ones can make
good. On correlated inputs it takes another 30 to 40 % off GPTQ's loss. Unlike GPTQ it does not mind a support
that differs from column to column.

Letters: ``Q`` the quantized weight, ``R = G(W − Q)`` the gradient, kept up to date.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compot_deploy.core.matrix import Quantized
from compot_deploy.quant.scales import round_to_grid


def descend(
    quantized: Quantized,
    weight: Float[Tensor, "inputs outputs"],
    gram: Float[Tensor, "inputs inputs"],
    *,
    support: Bool[Tensor, "inputs outputs"] | None = None,
    sweeps: int = 2,
    block: int = 128,
) -> Quantized:
    """Improve a quantized weight; the loss ``tr((W − Q)ᵀ G (W − Q))`` of no column rises.

    Args:
        quantized: where to begin.
        weight: what it stands for.
        gram: ``XᵀX`` of the inputs.
        support: entries outside stay 0 (they must be 0 in `quantized`); None allows all.
        sweeps: passes over all inputs, at most; stops when one changes nothing.
        block: inputs whose changes are applied at once to those outside. A matter of speed only.
    """
    grid, inputs = quantized.grid, weight.shape[0]
    symmetric = (gram.double() + gram.double().T) / 2
    curvature = symmetric.diagonal()
    target = weight.double() if support is None else torch.where(support, weight.double(), 0.0)
    integers, scales = quantized.integers.double(), quantized.scales.double()
    free = (curvature > 0).tolist()
    for _ in range(sweeps):
        # Anew in every sweep, so within one only the inputs that are still to come have to be kept up to date.
        spread = scales.repeat_interleave(grid.group, dim=0)[:inputs]
        gradient = symmetric @ (target - integers * spread)
        changed = torch.zeros((), dtype=torch.bool, device=integers.device)
        for position, first in enumerate(range(0, inputs, grid.group)):
            last = min(first + grid.group, inputs)
            rows = slice(first, last)
            # The scale that is best for the integers as they are. Stored scales are float16 already, so the
            # nearest float16 to the optimum is no further from it than they are.
            inner = symmetric[rows, rows] @ integers[rows]
            energy = (integers[rows] * inner).sum(0)
            wanted = (integers[rows] * gradient[rows]).sum(0) / torch.where(energy > 0, energy, 1.0)
            fitted = (scales[position] + wanted).half().double()
            usable = (energy > 0) & torch.isfinite(fitted) & (fitted != 0)
            fitted = torch.where(usable, fitted, scales[position])
            before = integers[rows] * scales[position]
            gradient[rows] -= inner * (fitted - scales[position])
            scales[position] = fitted
            for start in range(first, last, block):
                stop = min(start + block, last)
                inside, rest = slice(start, stop), slice(stop, last)
                earlier = integers[inside].clone()
                held = earlier * fitted
                # Few operations a row: on a GPU their number is what a sweep costs.
                parts = (integers[inside], earlier, held, gradient[inside], curvature[inside])
                rowwise = zip(*(part.unbind() for part in parts), strict=True)
                for row, (now, was, value, pull, curved) in enumerate(rowwise, start):
                    if not free[row]:
                        continue
                    ideal = torch.addcdiv(value, pull, curved)
                    chosen = round_to_grid(ideal, fitted, grid, out=now)
                    if support is not None:
                        chosen.mul_(support[row])
                    move = (chosen - was).mul_(fitted)
                    gradient[row + 1 : stop] -= symmetric[row + 1 : stop, row, None] * move
                if stop < last:
                    gradient[rest] -= symmetric[rest, inside] @ ((integers[inside] - earlier) * fitted)
            moves = integers[rows] * fitted - before
            changed |= moves.any()
            gradient[last:] -= symmetric[last:, rows] @ moves
        if not bool(changed):  # asked once a sweep: a GPU has to be waited for
            break
    return Quantized(integers.to(torch.int8), scales.half(), grid)
