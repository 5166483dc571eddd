"""SVD-LLM (arXiv 2403.07378): the weight truncated to its best rank, measured on the inputs that it sees."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from compot_deploy.core.grid import DENSE, Pattern
from compot_deploy.errors import RecipeError
from compot_deploy.numerics.factors import Alternation, Factors, check_problem, zero_factors
from compot_deploy.numerics.spectrum import principal_directions
from compot_deploy.numerics.whiten import Whitening, relative_error


def svd_llm(
    weight: Float[Tensor, "inputs outputs"],
    whitening: Whitening,
    atoms: int,
    pattern: Pattern = DENSE,
    alternation: Alternation = Alternation(),
) -> Factors:
    """Truncated SVD of the whitened weight (SVD-LLM, arXiv 2403.07378): the best of rank `atoms`.

    Args:
        weight: W, shape (in, out).
        whitening: of the inputs.
        atoms: rank.
        pattern: must be dense.
        alternation: not used; the solution is closed.

    Raises:
        RecipeError: a sparse pattern, or more atoms than inputs.
        InputError: a weight with NaN or infinity.
    """
    if not pattern.is_dense:
        raise RecipeError(f"svd-llm has dense codes and cannot keep {pattern}: use the method compot.")
    check_problem(weight, whitening, atoms, pattern)
    whitened = whitening.apply(weight)
    if not bool(whitened.any()):
        return zero_factors(whitening, weight.shape[1], atoms, pattern)
    dictionary = principal_directions(whitened, atoms)
    codes = dictionary.T @ whitened
    error = relative_error(whitened, whitened - dictionary @ codes)
    support = torch.ones_like(codes, dtype=torch.bool)
    return Factors(whitening.unapply(dictionary), codes, support, pattern, error, (error**2,))
