"""The order of atoms, which is free, chosen so that a pattern of neighbours keeps the most energy."""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from compot_deploy.core.grid import Pattern


def arrange(coefficients: Float[Tensor, "atoms outputs"], pattern: Pattern) -> Int64[Tensor, " atoms"]:
    """An order of atoms in which a pattern of neighbours keeps more of the coefficients' energy.

    The order of atoms is free, but a pattern keeps only so many of each group of neighbours, so atoms that are
    large in the same outputs should not be neighbours. Two atoms of different groups are swapped where that
    keeps more, the best swaps first, until none does. What a group keeps when one of its members is another atom
    follows from the others alone: their largest, and what the atom exceeds the last of those by.

    Args:
        coefficients: of an orthonormal dictionary, so that what is kept is what the objective gains.
        pattern: of neighbours.

    Returns:
        Old numbers of the atoms in their new order, which never keeps less than the given one.
    """
    atoms, outputs = coefficients.shape
    order = torch.arange(atoms, device=coefficients.device)
    squares = coefficients.double().square()
    some = squares[:, :: max(1, outputs // _ARRANGED_OUTPUTS)].float()
    kept = _kept_energy(squares, pattern)
    for _ in range(_ARRANGEMENT_SWEEPS):
        swapped = order.clone()
        for first, second in _best_swaps(some[order], pattern):
            swapped[[first, second]] = swapped[[second, first]]
        now = _kept_energy(squares[swapped], pattern)
        if now <= kept * (1 + 1e-7):
            break
        order, kept = swapped, now
    return order


def arrangeable(pattern: Pattern, atoms: int) -> bool:
    """Whether the order of atoms matters: a pattern of neighbours, more than one group of them."""
    return not pattern.is_dense and pattern.of < atoms


def _best_swaps(squares: Float[Tensor, "atoms outputs"], pattern: Pattern) -> list[tuple[int, int]]:
    """Swaps that keep more, no group in two of them, so that their gains add up."""
    atoms, outputs = squares.shape
    groups = squares.view(-1, pattern.of, outputs)
    energy = groups.topk(pattern.kept, dim=1).values.sum((1, 2)).repeat_interleave(pattern.of)
    bases, bars = [], []
    for member in range(pattern.of):
        others = torch.cat((groups[:, :member], groups[:, member + 1 :]), dim=1)
        largest = others.topk(pattern.kept, dim=1).values
        bases.append(largest.sum((1, 2)))
        bars.append(largest[:, -1])
    base, bar = torch.stack(bases, 1).flatten(), torch.stack(bars, 1).flatten(0, 1)
    step = max(1, _ARRANGEMENT_NUMBERS // squares.numel())
    instead = torch.cat(
        [
            (squares[None] - bar[start : start + step, None]).clamp_min_(0.0).sum(-1)
            for start in range(0, atoms, step)
        ]
    )
    instead = instead + base[:, None]  # what the group of the row keeps with the atom of the column instead
    gain = instead + instead.T - energy[:, None] - energy[None]
    group = torch.arange(atoms, device=squares.device) // pattern.of
    gain = torch.where(group[:, None] < group[None], gain, 0.0).flatten()
    found: list[tuple[int, int]] = []
    used: set[int] = set()
    for place in torch.argsort(gain, descending=True, stable=True)[: 64 * atoms].tolist():
        first, second = divmod(place, atoms)
        if float(gain[place]) <= 1e-9 * float(energy[0]):
            break
        pair = {first // pattern.of, second // pattern.of}
        if not used & pair:
            used |= pair
            found.append((first, second))
    return found


def _kept_energy(squares: Float64[Tensor, "atoms outputs"], pattern: Pattern) -> float:
    return float(squares.view(-1, pattern.of, squares.shape[1]).topk(pattern.kept, dim=1).values.sum())


_ARRANGED_OUTPUTS: Final = 1024
"""Outputs that swaps are looked for on, evenly spread; whether they pay is decided on all."""


_ARRANGEMENT_SWEEPS: Final = 24


_ARRANGEMENT_NUMBERS: Final = 1 << 24
"""Numbers in memory at a time while all swaps are valued: 64 MB."""
