"""What every factorization is asked for and gives back: how long to alternate, and the factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from compot_deploy.core.grid import Pattern
from compot_deploy.errors import InputError, RecipeError
from compot_deploy.numerics.coding import threshold
from compot_deploy.numerics.whiten import Whitening


@dataclass(frozen=True)
class Alternation:
    """How long to alternate, and whether to improve on the published method afterwards.

    Attributes:
        rounds: codes and dictionary, at most this often; 20 as in the paper.
        tolerance: a round that lowers the squared error by less than this part of the weight's energy is
            the last. 1e-7 is where float32 products stop telling better from worse.
        momentum: how much of the last change of ``W~Sᵀ`` is added to it. 1 is best on trained weights; 2
            overshoots, 0 is the paper's alternation.
        newton: how many of the rounds, from the first, are Newton steps. Five of them reach what twenty
            rounds of the paper do; after ten or more rounds those with momentum have gone further.
        refinements: turns of {re-fit codes, least-squares dictionary} afterwards; the third still gains
            about 0.5 % of the error, the fourth nothing that can be measured. 0 leaves the dictionary
            orthonormal.
        arrangements: times that atoms are put into another order for a pattern of neighbours, each followed by
            rounds; see `compot_deploy.numerics.arrange`.
        paper_exact: no momentum, no Newton steps, and leave the dictionary orthonormal and the codes as
            thresholded.
    """

    rounds: int = 20
    tolerance: float = 1e-7
    momentum: float = 1.0
    newton: int = 0
    refinements: int = 3
    arrangements: int = 1
    paper_exact: bool = False

    def __post_init__(self) -> None:
        if (
            min(self.rounds, self.newton, self.refinements, self.tolerance, self.momentum, self.arrangements)
            < 0
        ):
            raise RecipeError(
                f"Rounds ({self.rounds}), Newton steps ({self.newton}), refinements ({self.refinements}), "
                f"tolerance ({self.tolerance}) and momentum ({self.momentum}) of the factorization cannot be "
                "negative."
            )


_SHORT: Final = 10
"""Rounds up to which a run that begins with Newton steps ends lower than one without."""


def alternation_of(rounds: int, *, paper_exact: bool = False) -> Alternation:
    """The best alternation of that many rounds: short ones begin with five Newton steps."""
    return Alternation(rounds=rounds, newton=5 if rounds <= _SHORT else 0, paper_exact=paper_exact)


@dataclass(frozen=True)
class Factors:
    """A weight as ``dictionary @ codes``, in full precision.

    Attributes:
        dictionary: A = L⁻ᵀD, shape (in, k), float64: multiplies the activations as they are.
        codes: S, shape (k, out), float64; exactly zero outside of `support`.
        support: entries of the codes that the pattern keeps, exactly as many as it says in every group.
        pattern: which codes may be non-zero.
        error: relative whitened error ``‖X(W − A S)‖ / ‖X W‖``.
        objective: relative squared whitened error after each round of the alternation, never rising.
        converged: the alternation ended by itself, before its last allowed round.
    """

    dictionary: Float64[Tensor, "inputs atoms"]
    codes: Float64[Tensor, "atoms outputs"]
    support: Bool[Tensor, "atoms outputs"]
    pattern: Pattern
    error: float
    objective: tuple[float, ...] = ()
    converged: bool = True

    @property
    def atoms(self) -> int:
        """k, the number of atoms."""
        return self.dictionary.shape[1]


def check_problem(
    weight: Float[Tensor, "inputs outputs"], whitening: Whitening, atoms: int, pattern: Pattern
) -> None:
    """Refuse what no method can factorize.

    Raises:
        RecipeError: more atoms than inputs, or a pattern that does not divide them.
        InputError: a whitening of another layer, or a weight with NaN or infinity.
    """
    inputs, outputs = weight.shape
    if not 1 <= atoms <= inputs:
        raise RecipeError(
            f"A weight of {inputs} inputs and {outputs} outputs cannot have {atoms} atoms: use 1 to {inputs}."
        )
    if atoms % pattern.of:
        raise RecipeError(f"{atoms} atoms do not split into groups of {pattern.of} (pattern {pattern}).")
    if whitening.factor.shape[0] != inputs:
        raise InputError(
            f"The Gram matrix has {whitening.factor.shape[0]} inputs, the weight {inputs}: "
            "they belong to different layers."
        )
    if not bool(torch.isfinite(weight).all()):
        raise InputError(
            f"A weight of {inputs} inputs and {outputs} outputs has NaN or infinite entries: "
            "the checkpoint is damaged."
        )


def zero_factors(whitening: Whitening, outputs: int, atoms: int, pattern: Pattern) -> Factors:
    """Factors of a weight that is zero: orthonormal atoms, zero codes, no error."""
    factor = whitening.factor
    dictionary = torch.eye(factor.shape[0], atoms, dtype=factor.dtype, device=factor.device)
    codes, support = threshold(factor.new_zeros(atoms, outputs), pattern)
    return Factors(whitening.unapply(dictionary), codes, support, pattern, 0.0, (0.0,))
