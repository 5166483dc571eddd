"""One linear layer: its weight, its Gram and its share of the budget in; its final matrix out."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from compot_deploy.core.matrix import Dense, Factorized, Matrix, Pair
from compot_deploy.numerics.factors import Factors, alternation_of
from compot_deploy.numerics.methods import METHODS
from compot_deploy.numerics.quantize_factors import quantize_factors
from compot_deploy.numerics.whiten import Whitening
from compot_deploy.planning.sizing import Choice
from compot_deploy.quant import QUANTIZERS
from compot_deploy.recipe import Recipe


@dataclass(frozen=True)
class LinearFacts:
    """What happened to one linear, for reports.

    Attributes:
        name: module path.
        error: relative whitened error ``‖X(W − Ŵ)‖ / ‖X W‖`` of the final matrix.
        unquantized_error: the same before quantization; 0 for a matrix that stays plain, None where the
            factors were made on their grids and never existed without.
        ridge: what whitening added to the Gram's diagonal, relative to its mean.
        ridge_escalated: the Gram was singular at the first ridge.
        reason: why the matrix stays plain; empty if it is factorised.
    """

    name: str
    error: float
    unquantized_error: float | None
    ridge: float
    ridge_escalated: bool
    reason: str = ""


@dataclass(frozen=True)
class CompressedLinear:
    """A final matrix and how it came about.

    Attributes:
        matrix: as it will be exported.
        facts: for reports.
        unquantized: the factors before quantization, multiplied out; None for a matrix that stays plain.
    """

    matrix: Matrix
    facts: LinearFacts
    unquantized: Dense | None = None


def compress_linear(
    weight: Float[Tensor, "inputs outputs"], whitening: Whitening, choice: Choice, recipe: Recipe
) -> CompressedLinear:
    """Factorise and quantize one weight as allocated, or only quantize it where it stays plain.

    Args:
        weight: W, shape (in, out), float32.
        whitening: of its inputs.
        choice: atoms and pattern, or plain with the reason.
        recipe: method, quantizer and grids.
    """
    return quantize_linear(
        weight, whitening, choice, recipe, factorize_linear(weight, whitening, choice, recipe)
    )


def factorize_linear(
    weight: Float[Tensor, "inputs outputs"], whitening: Whitening, choice: Choice, recipe: Recipe
) -> Factors | None:
    """The factors of a weight before quantization; None where it stays plain."""
    if not choice.factorized:
        return None
    return METHODS[recipe.method](
        weight,
        whitening,
        choice.atoms,
        choice.pattern,
        alternation_of(recipe.rounds, paper_exact=recipe.paper_exact),
    )


def quantize_linear(
    weight: Float[Tensor, "inputs outputs"],
    whitening: Whitening,
    choice: Choice,
    recipe: Recipe,
    factors: Factors | None,
) -> CompressedLinear:
    """The final form of a weight from its factors; see `compress_linear` for the other arguments."""
    quantizer = QUANTIZERS[recipe.quantizer]
    matrix: Matrix
    product: Dense | None = None
    if factors is None:
        grid = recipe.dictionary_grid
        matrix = Dense(weight.float()) if grid is None else quantizer(weight, whitening.gram, grid)
        error, unquantized = whitening.error(weight, matrix.dequantize()), 0.0
    else:
        quantized = quantize_factors(
            factors,
            weight,
            whitening,
            dictionary_grid=recipe.dictionary_grid,
            code_grid=recipe.code_grid,
            quantizer=quantizer,
            paper_exact=recipe.paper_exact,
        )
        matrix = Factorized((Pair(quantized.dictionary, quantized.codes, choice.name, quantized.pattern),))
        error, unquantized = quantized.error, quantized.unquantized_error
        product = Dense((factors.dictionary.double() @ factors.codes.double()).float())
    facts = LinearFacts(
        name=choice.name,
        error=error,
        unquantized_error=unquantized,
        ridge=whitening.ridge,
        ridge_escalated=whitening.escalated,
        reason=choice.reason,
    )
    return CompressedLinear(matrix, facts, product)
