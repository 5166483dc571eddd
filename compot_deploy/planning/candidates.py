"""The schemes that are tried for the matrices of one input, and what each is really worth.

A candidate is measured on its quantized values, never on a model of them. Matrices that read one input share
a Gram; for them every factorized scheme is tried twice, with one dictionary for all and with one for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import assert_never

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Matrix, Quantized
from compot_deploy.core.storage import Storage
from compot_deploy.numerics.factors import Alternation, alternation_of
from compot_deploy.numerics.joint import SHORT_ALTERNATION, Tier, joint, split
from compot_deploy.numerics.methods import METHODS
from compot_deploy.numerics.quantize_factors import quantize_factors
from compot_deploy.numerics.spectrum import squared_singular_values
from compot_deploy.numerics.whiten import Whitening
from compot_deploy.planning.schemes import GridChoice, Joint, Plain, Scheme, Separate
from compot_deploy.planning.water_filling import water_filling
from compot_deploy.quant import Quantizer, gptq

VERSION: Final = 2
"""Of the numerics that measure a candidate; part of every key, so that stale measurements are not used."""


@dataclass(frozen=True)
class Search:
    """Which schemes are tried.

    Attributes:
        grids: what the format holds.
        rates: bits per weight at which a factorized scheme is made by water-filling.
        sparse: (k/min(m, n), k/s) of COMPOT schemes with a head of `head` atoms in 8 bits.
        unstructured: whether those schemes are tried with the strongest codes of a whole column.
        patterns: fixed patterns of neighbouring atoms that they are tried with, such as 2:4.
        head: strongest atoms that sparse schemes keep in 8 bits.
        rounds: of joint quantization.
        alternation: of the factorization of sparse tiers.
        unquantized: whether a matrix may stay as it is.
        floating: sizes of factorized schemes in floating point, as parts of the unquantized matrix.
        floating_per_kept: k/s of those.
        predicted: errors of grids are measured on some outputs, those of factorized schemes predicted from the spectrum
            and measured where a plan chooses them, see `compot_deploy.planning.prediction`.
        tolerance: by which part a scheme must be predicted to lie below the lower hull of the measured ones to be
            measured as well, see `compot_deploy.planning.pruning`; 0 measures all.
        method: ``auto`` chooses among everything; ``compot`` and ``svd-llm`` factorize every matrix that gets smaller
            by it; ``plain`` factorizes none.
        plain: the scheme that a factorized one has to be smaller than.
    """

    grids: GridChoice
    rates: tuple[float, ...] = (0.7, 1.0, 1.3, 1.6, 1.9)
    sparse: tuple[tuple[float, float], ...] = ((0.15, 2.0), (0.3, 2.0))
    unstructured: bool = True
    patterns: tuple[Pattern, ...] = ()
    head: int = 8
    rounds: int = 2
    alternation: Alternation = SHORT_ALTERNATION
    unquantized: bool = False
    floating: tuple[float, ...] = ()
    floating_per_kept: float = 2.0
    predicted: bool = False
    tolerance: float = field(default=0.0, repr=False)  # not in names of what no tolerance has a say in
    method: str = field(default="auto", repr=False)
    plain: Plain = field(default=Plain(None), repr=False)

    def takes(self, scheme: Scheme, size: int, plain_size: int) -> bool:
        """Whether a method lets a scheme be chosen.

        Args:
            scheme: of one matrix, or of all of an input.
            size: its bytes.
            plain_size: bytes of the same without factorization.
        """
        if self.method == "auto":
            return True
        if isinstance(scheme, Plain):
            return self.method == "plain"
        dense = isinstance(scheme, Joint) and scheme.is_dense
        return self.method != "plain" and size < plain_size and (self.method == "compot" or dense)


@dataclass(frozen=True)
class Realized:
    """A scheme as matrices.

    Attributes:
        matrices: by name.
        errors: relative squared whitened error of each.
        factors: before they were quantized, multiplied out; of schemes that have such factors.
        unquantized_errors: of those, relative squared.
    """

    matrices: Mapping[str, Matrix]
    errors: Mapping[str, float]
    factors: Mapping[str, Dense] = field(default_factory=dict)
    unquantized_errors: Mapping[str, float] = field(default_factory=dict)


def energies_of(weight: Float[Tensor, "inputs outputs"], whitening: Whitening) -> list[float]:
    """Squared singular values of the whitened weight, largest first."""
    return list(squared_singular_values(whitening.apply(weight)).tolist())


def schemes(
    weight: Float[Tensor, "inputs outputs"],
    whitening: Whitening,
    storage: Storage,
    search: Search,
    energies: Sequence[float] | None = None,
) -> tuple[Scheme, ...]:
    """What to try for a weight, or for several side by side: plain grids, then factorized schemes.

    Args:
        weight: W.
        whitening: of its input.
        storage: what a byte is.
        search: which schemes are tried.
        energies: of `energies_of`, where they are known.
    """
    inputs, outputs = weight.shape
    found: list[Scheme] = [Plain(grid) for grid in search.grids.grids]
    if search.unquantized:
        found.append(Plain(None))
    rates = search.rates if search.grids.groups else ()
    if rates and energies is None:
        energies = energies_of(weight, whitening)
    for rate in rates:
        assert energies is not None
        tiers = water_filling(
            energies,
            inputs,
            outputs,
            budget=int(rate * inputs * outputs / 8),
            storage=storage,
            grids=search.grids,
        )
        if tiers:
            found.append(Joint(tiers))
    found += _sparse_schemes(inputs, outputs, search)
    found += _floating_schemes(inputs, outputs, storage, search)
    return tuple(dict.fromkeys(found))


def _sparse_schemes(inputs: int, outputs: int, search: Search) -> list[Scheme]:
    groups = search.grids.groups
    if 4 not in groups or 8 not in groups:
        return []
    found: list[Scheme] = []
    rank = min(inputs, outputs)
    for share, per_kept in search.sparse:
        atoms = int(share * rank) // search.grids.step * search.grids.step
        if atoms < search.grids.step or atoms + search.head > rank:
            continue
        kept = [Pattern(max(1, int(atoms / per_kept)), atoms)] if search.unstructured else []
        kept += [pattern for pattern in search.patterns if atoms % pattern.of == 0]
        code_group = max(groups[4])
        dictionary_group = 64 if 64 in groups[4] else max(groups[4])
        head = Tier(search.head, Grid(8, max(groups[8])), Grid(8, min(groups[8])))
        for pattern in kept:
            tail = Tier(atoms, Grid(4, dictionary_group), Grid(4, code_group), pattern)
            found.append(Joint((head, tail) if search.head else (tail,)))
    return found


def _floating_schemes(inputs: int, outputs: int, storage: Storage, search: Search) -> list[Scheme]:
    found: list[Scheme] = []
    plain = Plain(None).bytes(inputs, outputs, storage)

    def at(atoms: int) -> Joint:
        kept = max(1, int(atoms / search.floating_per_kept))
        pattern = DENSE if kept == atoms else Pattern(kept, atoms)
        return Joint((Tier(atoms, None, None, pattern),))

    for share in search.floating:
        low, high = 0, min(inputs, outputs)
        while low < high:
            middle = (low + high + 1) // 2
            if at(middle).bytes(inputs, outputs, storage) <= share * plain:
                low = middle
            else:
                high = middle - 1
        if low:
            found.append(at(low))
    return found


def realize(
    scheme: Scheme,
    weights: Mapping[str, Float[Tensor, "inputs outputs"]],
    whitening: Whitening,
    search: Search,
    *,
    dictionary_name: str | None = None,
    quantizer: Quantizer = gptq,
) -> Realized:
    """Make the matrices of a scheme; a factorized scheme gives all of `weights` one dictionary.

    Args:
        scheme: what to make.
        weights: by name, of one input.
        whitening: of that input.
        search: rounds and alternation.
        dictionary_name: for several matrices; None takes the name of the only one.
        quantizer: of plain grids.
    """
    if isinstance(scheme, Separate):
        (name,) = weights
        return _separate(scheme, name, weights[name], whitening, quantizer)
    weight = torch.cat(list(weights.values()), dim=1)
    matrices: dict[str, Matrix] = {}
    match scheme:
        case Plain():
            if scheme.grid is None:
                matrices.update({name: Dense(value.float()) for name, value in weights.items()})
            else:
                # Every output is quantized for itself: side by side they take one pass.
                whole = quantizer(weight.float(), whitening.feedback, scheme.grid)
                sizes = [value.shape[1] for value in weights.values()]
                parts = zip(whole.integers.split(sizes, 1), whole.scales.split(sizes, 1), strict=True)
                for name, (integers, scales) in zip(weights, parts, strict=True):
                    matrices[name] = Quantized(integers.contiguous(), scales.contiguous(), scheme.grid)
        case Joint():
            factors = joint(
                weight, whitening, scheme.tiers, rounds=search.rounds, alternation=search.alternation
            )
            shared = dictionary_name or "+".join(weights)
            matrices.update(split(factors, {name: value.shape[1] for name, value in weights.items()}, shared))
        case _:
            assert_never(scheme)
    errors = {
        name: whitening.error(weights[name], matrix.dequantize()) ** 2 for name, matrix in matrices.items()
    }
    return Realized(matrices, errors)


def _separate(
    scheme: Separate,
    name: str,
    weight: Float[Tensor, "inputs outputs"],
    whitening: Whitening,
    quantizer: Quantizer,
) -> Realized:
    factors = METHODS[scheme.method](
        weight,
        whitening,
        scheme.atoms,
        scheme.pattern,
        alternation_of(scheme.rounds, paper_exact=scheme.paper_exact),
    )
    quantized = quantize_factors(
        factors,
        weight,
        whitening,
        dictionary_grid=scheme.dictionary,
        code_grid=scheme.codes,
        quantizer=quantizer,
        paper_exact=scheme.paper_exact,
    )
    return Realized(
        {name: Factorized((FactorPair(quantized.dictionary, quantized.codes, name, quantized.pattern),))},
        {name: quantized.error**2},
        {name: Dense((factors.dictionary.double() @ factors.codes.double()).float())},
        {name: quantized.unquantized_error**2},
    )
