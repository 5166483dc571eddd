"""CoSpaDi, as a baseline: a dictionary by K-SVD and codes by matching pursuit, in the whitened space.

Source: CoSpaDi (arXiv 2509.22075), on K-SVD (Aharon, Elad, Bruckstein 2006, with the power iterations of its
approximate form) and Batch-OMP. Letters: ``W~ = LᵀW`` the whitened weight (m × n), ``D`` the dictionary
(m × k, columns of norm 1, *not* orthogonal), ``S`` the codes (k × n, s non-zeros in each column),
``A = L⁻ᵀD`` what is deployed.

Two choices are in its favour: the dictionary starts at the leading singular vectors, as COMPOT's does, and a
column keeps its codes of the round before where a new pursuit is worse, so the objective never rises.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from compot_deploy.core.grid import DENSE, Pattern
from compot_deploy.numerics.factors import Factors
from compot_deploy.numerics.spectrum import principal_directions
from compot_deploy.numerics.whiten import Whitening, relative_error

ROUNDS: Final = 10
"""Of {pursuit, every atom once}. After that a round gains less than 1 % of the squared error."""

_POWER_STEPS: Final = 3
_CHUNK: Final = 128
"""Columns that are pursued together: their orthogonal bases should stay in the processor's cache."""


def cospadi(
    weight: Tensor, whitening: Whitening, atoms: int, pattern: Pattern, rounds: int = ROUNDS
) -> Factors:
    """Factorize a weight.

    Args:
        weight: W, shape (in, out).
        whitening: of the inputs.
        atoms: k.
        pattern: s of all k atoms in each column.
        rounds: of K-SVD.

    Raises:
        ValueError: a pattern that does not count over all atoms.
    """
    if not pattern.is_dense and pattern.of != atoms:
        raise ValueError(f"CoSpaDi keeps s of all {atoms} atoms, it cannot keep {pattern}.")
    kept = atoms if pattern.is_dense else pattern.kept
    whitened = whitening.apply(weight)
    rotation = None
    target = whitened
    if target.shape[0] > target.shape[1] >= atoms:
        rotation, target = torch.linalg.qr(target)  # all that matters lies in the span of the columns
    dictionary, codes, objective = ksvd(target, principal_directions(target, atoms), kept, rounds)
    error = relative_error(target, target - dictionary @ codes)
    if rotation is not None:
        dictionary = rotation @ dictionary
    shape = DENSE if kept == atoms else Pattern(kept, atoms)
    return Factors(whitening.unapply(dictionary), codes, codes != 0, shape, error, objective, converged=False)


def ksvd(
    target: Tensor, dictionary: Tensor, kept: int, rounds: int
) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """K-SVD from a dictionary.

    Args:
        target: shape (rows, outputs).
        dictionary: where to begin, shape (rows, atoms).
        kept: non-zeros of a column.
        rounds: of {pursuit, every atom once}; a last pursuit follows.

    Returns:
        Dictionary with columns of norm 1, codes, and after each round the squared error as a part of the
        target's energy; it never rises.
    """
    dictionary = dictionary / dictionary.norm(dim=0)
    codes = pursue(dictionary, target, kept)
    energy = float(target.square().sum())
    objective = [float((target - dictionary @ codes).square().sum()) / energy]
    for _ in range(rounds):
        dictionary, codes = update_atoms(target, dictionary, codes)
        found = pursue(dictionary, target, kept)
        lost, before = ((target - dictionary @ each).square().sum(0) for each in (found, codes))
        codes = torch.where(lost < before, found, codes)
        objective.append(float(torch.minimum(lost, before).sum()) / energy)
    return dictionary, codes, tuple(objective)


def pursue(dictionary: Tensor, target: Tensor, kept: int) -> Tensor:
    """Orthogonal matching pursuit of every column, many at a time.

    A column takes the atom that correlates most with what is left of it, then its coefficients are fitted
    anew, `kept` times. What is kept of the orthogonal basis are its products with the dictionary (Batch-OMP),
    so no step touches the rows.

    Args:
        dictionary: shape (rows, atoms), columns of norm 1.
        target: shape (rows, outputs).
        kept: atoms per column.

    Returns:
        Codes, shape (atoms, outputs), in the dtype of `target`.
    """
    gram, products = dictionary.T @ dictionary, target.T @ dictionary
    quick = gram.float()
    codes = [_pursue(gram, quick, part, kept) for part in products.split(_CHUNK)]
    return torch.cat(codes).T.contiguous()


def _pursue(gram: Tensor, quick: Tensor, products: Tensor, kept: int) -> Tensor:
    """Codes of some columns, one per row, from the Gram of the atoms and the products with them."""
    count, atoms = products.shape
    if kept == atoms:
        chosen = torch.arange(atoms).expand(count, atoms)
    else:
        rows = torch.arange(count)
        left = products.float()
        chosen = torch.empty(count, kept, dtype=torch.long)
        basis = torch.empty(count, kept, atoms)
        free = torch.ones(count, atoms, dtype=torch.bool)
        for step in range(kept):
            best = torch.where(free, left.abs(), -1.0).argmax(1)
            direction = quick[best]
            if step:
                shares = basis[rows, :step, best]
                direction = torch.baddbmm(
                    direction[:, None], shares[:, None], basis[:, :step], alpha=-1.0
                ).squeeze(1)
            norm = direction[rows, best, None].clamp_min(1e-7).sqrt()
            direction = direction / norm
            left = left - direction * (left[rows, best, None] / norm)
            basis[:, step], chosen[:, step] = direction, best
            free[rows, best] = False
    inner = gram[chosen[:, :, None], chosen[:, None, :]]
    inner.diagonal(dim1=1, dim2=2).add_(1e-9)
    wanted = products.gather(1, chosen)
    fitted = torch.cholesky_solve(wanted[..., None], torch.linalg.cholesky(inner)).squeeze(-1)
    return torch.zeros_like(products).scatter(1, chosen, fitted)


def update_atoms(target: Tensor, dictionary: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Every atom once, with its codes: the best rank-one fit to what the others leave where it is used.

    The support stays as it is and the error does not rise.
    """
    dictionary, codes = dictionary.T.contiguous(), codes.clone()
    left = (target - dictionary.T @ codes).T.contiguous()
    for number, atom in enumerate(dictionary):
        users = codes[number].nonzero().squeeze(1)
        if not len(users):
            continue
        mine = codes[number, users]
        wanted = left[users] + mine[:, None] * atom
        for _ in range(_POWER_STEPS):
            atom = mine @ wanted
            atom = atom / atom.norm().clamp_min(1e-300)
            mine = wanted @ atom
        dictionary[number], codes[number, users] = atom, mine
        left[users] = wanted - mine[:, None] * atom
    return dictionary.T.contiguous(), codes
