"""Quantizing a dictionary and its codes, one after the other, each with its own Gram.

Letters: ``A`` the dictionary, ``S`` the codes, hats for what is quantized. The inputs of A have Gram ``G``.
The inputs of S are what Â makes of them, so their Gram is ``ÂᵀGÂ`` and follows from G: no second calibration.
As long as A is exact that is the identity and rounding is optimal; once A is quantized it is not, so the
codes are fitted again to Â before they are quantized themselves, which mends a part of the error of Â.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Dense, Leaf
from compot_deploy.numerics.factors import Factors
from compot_deploy.numerics.least_squares import refit_codes
from compot_deploy.numerics.whiten import Whitening, relative_error
from compot_deploy.quant import Quantizer, gptq

_BALANCE: Final = 0.5


@dataclass(frozen=True)
class QuantizedFactors:
    """What goes into a `compot_deploy.core.matrix.FactorPair`, and what it cost.

    Attributes:
        dictionary: shape (in, k).
        codes: shape (k, out); exactly zero outside the pattern.
        pattern: which codes may be non-zero.
        unquantized_error: relative whitened error of the factors that came in.
        error: relative whitened error of these.
    """

    dictionary: Leaf
    codes: Leaf
    pattern: Pattern
    unquantized_error: float
    error: float


def quantize_factors(
    factors: Factors,
    weight: Float[Tensor, "inputs outputs"],
    whitening: Whitening,
    *,
    dictionary_grid: Grid | None,
    code_grid: Grid | None,
    quantizer: Quantizer = gptq,
    paper_exact: bool = False,
) -> QuantizedFactors:
    """Quantize A with G, fit S again to Â, quantize S with ``ÂᵀGÂ``.

    The order of atoms is free: for a pattern over whole columns they are sorted so that those whose errors
    weigh most come first, where feedback can still mend them. The atoms of an N:M pattern stay in place.

    Args:
        factors: from one of `compot_deploy.numerics.methods`.
        weight: W, what the factors stand for.
        whitening: of the inputs.
        dictionary_grid: None keeps the dictionary in float32.
        code_grid: None keeps the codes in float32.
        quantizer: for both factors.
        paper_exact: do not fit the codes again.
    """
    whitened = whitening.apply(weight)
    rms = _rms(factors)
    dictionary = factors.dictionary * rms
    codes, support = factors.codes / rms[:, None], factors.support

    first: Leaf
    if dictionary_grid is None:
        first = Dense(dictionary.float())
    else:
        first = quantizer(dictionary, whitening.feedback, dictionary_grid)
    directions = whitening.apply(first.dequantize())
    gram = directions.T @ directions
    if not paper_exact and dictionary_grid is not None:
        codes = refit_codes(gram, directions.T @ whitened, codes, support)

    if factors.pattern.is_dense or factors.pattern.of == factors.atoms:
        order = torch.argsort(gram.diagonal() * codes.square().sum(1), descending=True, stable=True)
        first = _reorder(first, order)
        gram, directions = gram[order][:, order], directions[:, order]
        codes, support = codes[order], support[order]

    second: Leaf
    if code_grid is None:
        second = Dense(codes.float())
    elif bool(gram.any()):
        second = quantizer(codes, gram, code_grid, support=support)
    else:  # a dictionary that rounded to zero: any codes do
        second = quantizer(torch.zeros_like(codes), torch.eye(*gram.shape).to(gram), code_grid)
    error = relative_error(whitened, whitened - directions @ second.dequantize().double())
    return QuantizedFactors(first, second, factors.pattern, factors.error, error)


def _rms(factors: Factors) -> Float64[Tensor, " atoms"]:
    """Per atom, the factor that moves from the codes to the dictionary.

    Groups of codes share a scale across neighbouring atoms: the nearer their sizes, the better it fits. But
    equal sizes would also spread the error equally over strong and weak atoms; the root is between the two.
    """
    count = factors.support.sum(1).clamp_min(1)
    rms = (factors.codes.square().sum(1) / count).sqrt()
    used = rms > 0
    if not bool(used.any()):
        return torch.ones_like(rms)
    overall = rms[used].square().mean().sqrt()
    return torch.where(used, overall * (rms / overall) ** _BALANCE, overall)


def _reorder(leaf: Leaf, order: Tensor) -> Leaf:
    """The columns of a leaf in another order."""
    if isinstance(leaf, Dense):
        return Dense(leaf.weight[:, order])
    return type(leaf)(leaf.integers[:, order], leaf.scales[:, order], leaf.grid)
