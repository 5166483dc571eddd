"""COMPOT: a weight matrix as an orthonormal dictionary times sparse codes, without training.

Source: COMPOT (arXiv 2602.15200). Letters: ``W~ = LᵀW`` the whitened weight (m × n), ``D`` the dictionary
(m × k, ``DᵀD = I``), ``S`` the codes (k × n, sparse), ``A = L⁻ᵀD`` the dictionary that is deployed,
``Ŵ = A S``. The problem is ``min ‖W~ − D S‖²``, and for orthonormal D both halves have exact solutions:

* codes: the largest entries of ``DᵀW~``, as many as the pattern keeps (hard thresholding);
* dictionary: the polar factor of ``W~Sᵀ`` (orthogonal Procrustes).

Departures, which `Alternation.paper_exact` switches off. The alternation converges slowly, so the matrix
whose polar factor is taken is extrapolated, ``W~Sᵀ`` plus its last change: eight such rounds reach what
twenty plain ones do, at no cost per round; a round that overshoots is taken back and repeated plainly. Five
Newton steps (`newton`) reach it too, each at three quarters of the cost, and then fall behind. When
the alternation is over, orthogonality has done its work and is dropped: the dictionary becomes the
least-squares one (ROCKET, arXiv 2602.11008) and the non-zeros are re-fitted on their support (GeoPair, arXiv
2609.25963), in turns; same bytes, never more error.

Precision: the alternation multiplies in float32 and takes the polar factor in float64. The codes of a
round enter only through *which* entries are kept, and the objective of a round, ``‖W~‖² − ‖S‖²``, is summed
in float64; a round that does not lower it is not kept. What leaves this module was computed in float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from compot_deploy.core.grid import Pattern
from compot_deploy.numerics.arrange import arrange, arrangeable
from compot_deploy.numerics.coding import keep_largest, threshold
from compot_deploy.numerics.factors import Alternation, Factors, check_problem, zero_factors
from compot_deploy.numerics.least_squares import refine
from compot_deploy.numerics.newton import Newton
from compot_deploy.numerics.procrustes import orthonormalize, polar
from compot_deploy.numerics.spectrum import principal_directions
from compot_deploy.numerics.whiten import Whitening, relative_error


def compot(
    weight: Float[Tensor, "inputs outputs"],
    whitening: Whitening,
    atoms: int,
    pattern: Pattern,
    alternation: Alternation = Alternation(),
) -> Factors:
    """COMPOT with an SVD initialization; by default its result is then refined by least squares.

    Any shape, from one atom to as many as inputs; a weight of rank below `atoms` is met exactly.

    Args:
        weight: W, shape (in, out).
        whitening: of the inputs.
        atoms: k, at most the number of inputs.
        pattern: of the codes; ``Pattern(s, k)`` is the paper's, s of all atoms in each column.
        alternation: length and departures from the paper.

    Raises:
        RecipeError: more atoms than inputs, or a pattern that does not divide them.
        InputError: a weight with NaN or infinity.
    """
    check_problem(weight, whitening, atoms, pattern)
    whitened = whitening.apply(weight)
    energy = float(whitened.square().sum())
    rows = whitened.shape[0]
    if energy == 0.0:
        return zero_factors(whitening, weight.shape[1], atoms, pattern)
    rotation = None
    if rows > whitened.shape[1] and atoms <= whitened.shape[1]:
        # All that matters of a tall matrix lies in the span of its columns.
        rotation, whitened = torch.linalg.qr(whitened)

    # A start is only a start; where five rounds have to do, half its time is worth saving.
    start = whitened.float() if alternation.newton and not alternation.paper_exact else whitened
    dictionary = _spread(principal_directions(start, atoms).double(), pattern)
    objective: tuple[float, ...] = ()
    for number in range(1 + alternation.arrangements if arrangeable(pattern, atoms) else 1):
        if number:
            dictionary = dictionary[:, arrange(dictionary.T @ whitened, pattern)]
        dictionary, further, converged = _alternate(whitened, dictionary, pattern, alternation)
        objective += tuple(value for value in further if not objective or value < objective[-1])

    # The support once more in float64: at a near tie float32 may have chosen the smaller entry.
    codes, support = threshold(dictionary.T @ whitened, pattern)
    if alternation.refinements and not alternation.paper_exact and not pattern.is_dense:
        dictionary, codes = refine(whitened, dictionary, codes, support, alternation.refinements)
    error = relative_error(whitened, whitened - dictionary @ codes)
    if rotation is not None:
        dictionary = rotation @ dictionary
    return Factors(whitening.unapply(dictionary), codes, support, pattern, error, objective, converged)


def _alternate(
    whitened: Float64[Tensor, "rows outputs"],
    dictionary: Float64[Tensor, "rows atoms"],
    pattern: Pattern,
    alternation: Alternation,
) -> tuple[Float64[Tensor, "rows atoms"], tuple[float, ...], bool]:
    """Rounds of coding and Procrustes from an orthonormal dictionary.

    Returns:
        The orthonormal dictionary of the last round that was kept, the objective after each of those, and
        whether the alternation ended by itself.
    """
    target = (
        (whitened / whitened.norm()).float().T.contiguous()
    )  # outputs first: a column's codes lie together
    momentum = 0.0 if alternation.paper_exact else alternation.momentum
    newton = Newton() if alternation.newton and not alternation.paper_exact else None
    coefficients = target @ dictionary.float()
    codes = keep_largest(coefficients, pattern)
    objective = [_lost(codes)]
    product = target.T @ codes
    previous = product
    for turn in range(alternation.rounds):
        pushed = previous is not product
        found = None
        if newton is not None and turn < alternation.newton:
            found = newton.step(dictionary.float(), coefficients, codes, product)
        else:
            newton = None
        if found is None:
            wanted = product + momentum * (product - previous) if pushed else product
            candidate = polar(wanted.double())  # orthonormal to 1e-8: all that float32 products can use
        else:
            candidate = found.double()
        following_coefficients = target @ candidate.float()
        following_codes = keep_largest(following_coefficients, pattern)
        gain = objective[-1] - _lost(following_codes)
        if gain > 0:
            dictionary, coefficients, codes = candidate, following_coefficients, following_codes
            objective.append(objective[-1] - gain)
            following = target.T @ codes
            previous, product = (product if momentum and newton is None else following), following
        if newton is not None:
            if found is not None and gain > alternation.tolerance:
                newton.keep()
            elif found is None or not newton.forget():
                newton = None  # from here on Procrustes
        elif gain <= alternation.tolerance:
            if not pushed:
                return orthonormalize(dictionary), tuple(objective), True
            previous = product  # overshot: once more without
    return orthonormalize(dictionary), tuple(objective), False


def _spread(dictionary: Float64[Tensor, "rows atoms"], pattern: Pattern) -> Float64[Tensor, "rows atoms"]:
    """Atoms dealt out so that a group of neighbours has one from each energy class (order is free).

    Sorted by energy, the first groups would hold strong atoms only and have to drop some of them.
    """
    atoms = dictionary.shape[1]
    order = torch.arange(atoms, device=dictionary.device).reshape(pattern.of, atoms // pattern.of).T
    return dictionary[:, order.flatten()]


def _lost(codes: Float[Tensor, "atoms outputs"]) -> float:
    """Relative squared error: with ``‖W~‖ = 1`` and orthonormal D it is ``1 − ‖S‖²``."""
    norm = float(torch.linalg.vector_norm(codes, dtype=torch.float64))  # widens as it adds: no copy
    return max(0.0, 1.0 - norm * norm)
