"""Precision by energy: strong atoms in more bits than weak ones, within a budget (water-filling)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Final, TypeAlias

from compot_deploy.core.grid import Grid
from compot_deploy.core.storage import Storage
from compot_deploy.numerics.joint import Tier
from compot_deploy.planning.schemes import GridChoice, Joint

_DICTIONARY_LOSS: Final = MappingProxyType({2: 0.05, 3: 0.012, 4: 0.003, 8: 2e-5})
_CODE_LOSS: Final = MappingProxyType({2: 0.16, 3: 0.045, 4: 0.013, 8: 1e-4})
"""Part of an atom's energy that is lost at so many bits. The dictionary's inputs are correlated, which
feedback turns to account; the codes' are not."""


def water_filling(
    energies: Sequence[float],
    inputs: int,
    outputs: int,
    *,
    budget: int,
    storage: Storage,
    grids: GridChoice,
    most_tiers: int = 4,
) -> tuple[Tier, ...]:
    """Precision by energy: the best number of atoms and bits for each, within a budget (water-filling).

    Every atom takes the bits at which another byte buys less than a common price; the lowest price that
    fits the budget is taken. Atoms of equal bits make a tier, small tiers join the one above.

    Args:
        energies: squared singular values of the whitened weight, largest first.
        inputs: m.
        outputs: n, of all matrices together.
        budget: bytes for dictionary and codes.
        storage: what a leaf costs.
        grids: what the format holds.
        most_tiers: tiers that are kept apart.

    Returns:
        Strongest first; empty if not even one step of atoms fits.
    """
    if not energies or energies[0] <= 0.0:
        return ()
    choices = _worth_taking(_choices(sorted(grids.groups), inputs, outputs))
    negated = [-energy for energy in energies]
    known: dict[tuple[_Run, ...], tuple[Tier, ...] | None] = {}

    def fitting(runs: tuple[_Run, ...]) -> tuple[Tier, ...] | None:
        tiers = _tiers(runs, inputs, outputs, storage, grids, most_tiers)
        return tiers if Joint(tiers).bytes(inputs, outputs, storage) <= budget else None

    low, high = math.log(energies[0] * 1e-12), math.log(energies[0])
    best: tuple[Tier, ...] = ()
    for _ in range(40):
        middle = (low + high) / 2
        runs = _at_price(negated, choices, math.exp(middle))
        if runs not in known:
            known[runs] = fitting(runs)
        tiers = known[runs]
        if tiers is not None:
            best, high = tiers, middle
        else:
            low = middle
    return best


_Run: TypeAlias = tuple[tuple[int, int], int]
"""Bits of dictionary and codes, and how many atoms that follow each other have them."""


@dataclass(frozen=True)
class _Choice:
    """Bits of one atom.

    Attributes:
        dictionary: bits of each of its inputs.
        codes: bits of each of its outputs.
        cost: bits that it takes, scales counted.
        loss: part of its energy that is lost.
    """

    dictionary: int
    codes: int
    cost: float
    loss: float


def _choices(bits: Sequence[int], inputs: int, outputs: int) -> list[_Choice]:
    """What an atom can have, without what costs and loses more than another choice."""
    every = [
        _Choice(a, s, inputs * (a + 0.25) + outputs * (s + 0.25), _DICTIONARY_LOSS[a] + _CODE_LOSS[s])
        for a, s in product(bits, repeat=2)
    ]
    return [
        one
        for one in every
        if not any(other is not one and other.cost <= one.cost and other.loss <= one.loss for other in every)
    ]


def _worth_taking(choices: Sequence[_Choice]) -> list[tuple[_Choice, float]]:
    """Choices that some energy takes at some price, and the energy per price above which each is taken.

    At a price p per bit an atom of energy e takes the choice of the least e·loss + p·cost: of lines over e / p the
    lower envelope, from the steepest at the right to the one that says to leave the atom out, at the left.
    """
    nothing = _Choice(0, 0, 0.0, 1.0)
    hull: list[tuple[_Choice, float]] = []
    for choice in sorted((*choices, nothing), key=lambda one: (one.cost, one.loss)):
        while hull:
            last, taken = hull[-1]
            above = (choice.cost - last.cost) / (last.loss - choice.loss)
            if above > taken:
                hull.append((choice, above))
                break
            hull.pop()
        else:
            hull.append((choice, 0.0))
    return [entry for entry in reversed(hull) if entry[0] is not nothing]


def _at_price(
    negated: Sequence[float], choices: Sequence[tuple[_Choice, float]], price: float
) -> tuple[_Run, ...]:
    """Runs of atoms with the same bits at a price per bit; they end where an atom is not worth any.

    Args:
        negated: energies times -1, so that they ascend.
        choices: of `_worth_taking`.
        price: of a bit.
    """
    runs: list[_Run] = []
    taken = 0
    for choice, above in choices:
        upto = bisect_left(negated, -above * price)
        if upto > taken:
            runs.append(((choice.dictionary, choice.codes), upto - taken))
            taken = upto
    return tuple(runs)


def _tiers(
    given: Sequence[_Run],
    inputs: int,
    outputs: int,
    storage: Storage,
    grids: GridChoice,
    most: int,
) -> tuple[Tier, ...]:
    """Tiers of the bits that atoms were given: at most so many, in whole steps of atoms."""
    runs = list(given)
    while len(runs) > most:
        # The smallest run joins its stronger neighbour, or the second the first.
        position = min(range(1, len(runs)), key=lambda index: runs[index][1])
        _, count = runs.pop(position)
        runs[position - 1] = (runs[position - 1][0], runs[position - 1][1] + count)
    tiers = []
    debt = 0
    for (a, s), count in runs:
        # Whole steps; what a tier is given too much is taken from the next.
        atoms = -(-(count - debt) // grids.step) * grids.step
        if atoms <= 0:
            debt -= count
            continue
        debt = atoms - (count - debt)
        tiers.append((atoms, a, s))
    total = sum(atoms for atoms, _, _ in tiers)
    if total > min(inputs, outputs):
        tiers[-1] = (tiers[-1][0] - grids.step, *tiers[-1][1:])
        tiers = [tier for tier in tiers if tier[0] > 0]
    return tuple(
        Tier(
            atoms,
            _cheapest(inputs, atoms, [Grid(a, group) for group in grids.groups[a]], storage, prefer=64),
            _cheapest(atoms, outputs, [Grid(s, group) for group in grids.groups[s]], storage),
        )
        for atoms, a, s in tiers
    )


def _cheapest(rows: int, columns: int, grids: Sequence[Grid], storage: Storage, prefer: int = 0) -> Grid:
    """The grid of fewest bytes; a dictionary prefers groups that follow its inputs."""
    preferred = [grid for grid in grids if grid.group == prefer] or list(grids)
    return min(preferred, key=lambda grid: (storage.leaf_bytes(rows, columns, grid), grid.group))


def predicted_error(energies: Sequence[float], tiers: Sequence[Tier]) -> float:
    """Squared relative error that atoms of some tiers will have, from the spectrum alone.

    Args:
        energies: squared singular values of the whitened weight, largest first.
        tiers: with dense codes.
    """
    whole = sum(energies)
    if whole <= 0.0:
        return 0.0
    lost, start = 0.0, 0
    for tier in tiers:
        energy = sum(energies[start : start + tier.atoms])
        lost += energy * (_loss(_DICTIONARY_LOSS, tier.dictionary) + _loss(_CODE_LOSS, tier.codes))
        start += tier.atoms
    return min(1.0, (lost + sum(energies[start:])) / whole)


def _loss(table: Mapping[int, float], grid: Grid | None) -> float:
    return 0.0 if grid is None else table[grid.bits]
