"""The forms that are tried for the matrices of one input, and what each is really worth.

A candidate is measured on its quantized values, never on a model of them. Matrices that read one input share
a Gram; for them every factorised form is tried twice, with one dictionary for all and with one for each.
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
from compot_deploy.core.matrix import Dense, Factorized, Matrix, Pair, Quantized
from compot_deploy.core.storage import Storage
from compot_deploy.numerics.factors import Alternation, alternation_of
from compot_deploy.numerics.joint import SHORT_ALTERNATION, Level, joint, split
from compot_deploy.numerics.methods import METHODS
from compot_deploy.numerics.quantize_factors import quantize_factors
from compot_deploy.numerics.whiten import Whitening
from compot_deploy.planning.schemes import Form, GridChoice, Joint, Plain, Separate
from compot_deploy.planning.water_levels import water_levels
from compot_deploy.quant import Quantizer, gptq

VERSION: Final = 2
"""Of the numerics that measure a candidate; part of every key, so that stale measurements are not used."""


@dataclass(frozen=True)
class Search:
    """Which forms are tried.

    Attributes:
        grids: what the format holds.
        rates: bits per weight at which a factorised form is made by water-filling.
        sparse: (k/min(m, n), k/s) of COMPOT forms with a head of `head` atoms in 8 bits.
        unstructured: whether those forms are tried with the strongest codes of a whole column.
        patterns: fixed patterns of neighbouring atoms that they are tried with, such as 2:4.
        head: strongest atoms that sparse forms keep in 8 bits.
        rounds: of joint quantization.
        alternation: of the factorization of sparse levels.
        unquantized: whether a matrix may stay as it is.
        floating: sizes of factorised forms in floating point, as parts of the unquantized matrix.
        floating_per_kept: k/s of those.
        tolerance: by which part a form must promise to lie below the lower hull of the measured ones to be
            measured as well, see `compot_deploy.planning.screening`; 0 measures all.
        method: ``auto`` chooses among everything; ``compot`` and ``svd-llm`` factorise every matrix that gets smaller
            by it; ``plain`` factorises none.
        plain: the form that a factorised one has to be smaller than.
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
    tolerance: float = field(default=0.0, repr=False)  # not in names of what no tolerance has a say in
    method: str = field(default="auto", repr=False)
    plain: Plain = field(default=Plain(None), repr=False)

    def takes(self, form: Form, size: int, plain_size: int) -> bool:
        """Whether a method lets a form be chosen.

        Args:
            form: of one matrix, or of all of an input.
            size: its bytes.
            plain_size: bytes of the same without factorization.
        """
        if self.method == "auto":
            return True
        if isinstance(form, Plain):
            return self.method == "plain"
        dense = isinstance(form, Joint) and all(level.pattern.is_dense for level in form.levels)
        return self.method != "plain" and size < plain_size and (self.method == "compot" or dense)


@dataclass(frozen=True)
class Realized:
    """A form as matrices.

    Attributes:
        matrices: by name.
        errors: relative squared whitened error of each.
        factors: before they were quantized, multiplied out; of forms that have such factors.
        unquantized_errors: of those, relative squared.
    """

    matrices: Mapping[str, Matrix]
    errors: Mapping[str, float]
    factors: Mapping[str, Dense] = field(default_factory=dict)
    unquantized_errors: Mapping[str, float] = field(default_factory=dict)


def energies_of(weight: Float[Tensor, "inputs outputs"], whitening: Whitening) -> list[float]:
    """Squared singular values of the whitened weight, largest first."""
    whitened = whitening.apply(weight)
    gram = whitened @ whitened.T if whitened.shape[0] <= whitened.shape[1] else whitened.T @ whitened
    return list(torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0).tolist())


def forms(
    weight: Float[Tensor, "inputs outputs"],
    whitening: Whitening,
    storage: Storage,
    search: Search,
    energies: Sequence[float] | None = None,
) -> tuple[Form, ...]:
    """What to try for a weight, or for several side by side: plain grids, then factorised forms.

    Args:
        weight: W.
        whitening: of its input.
        storage: what a byte is.
        search: which forms are tried.
        energies: of `energies_of`, where they are known.
    """
    inputs, outputs = weight.shape
    found: list[Form] = [Plain(grid) for grid in search.grids.grids]
    if search.unquantized:
        found.append(Plain(None))
    rates = search.rates if search.grids.groups else ()
    if rates and energies is None:
        energies = energies_of(weight, whitening)
    for rate in rates:
        assert energies is not None
        levels = water_levels(
            energies,
            inputs,
            outputs,
            budget=int(rate * inputs * outputs / 8),
            storage=storage,
            grids=search.grids,
        )
        if levels:
            found.append(Joint(levels))
    found += _sparse_forms(inputs, outputs, search)
    found += _floating_forms(inputs, outputs, storage, search)
    return tuple(dict.fromkeys(found))


def _sparse_forms(inputs: int, outputs: int, search: Search) -> list[Form]:
    groups = search.grids.groups
    if 4 not in groups or 8 not in groups:
        return []
    found: list[Form] = []
    rank = min(inputs, outputs)
    for share, per_kept in search.sparse:
        atoms = int(share * rank) // search.grids.step * search.grids.step
        if atoms < search.grids.step or atoms + search.head > rank:
            continue
        kept = [Pattern(max(1, int(atoms / per_kept)), atoms)] if search.unstructured else []
        kept += [pattern for pattern in search.patterns if atoms % pattern.of == 0]
        code_group = max(groups[4])
        dictionary_group = 64 if 64 in groups[4] else max(groups[4])
        head = Level(search.head, Grid(8, max(groups[8])), Grid(8, min(groups[8])))
        for pattern in kept:
            tail = Level(atoms, Grid(4, dictionary_group), Grid(4, code_group), pattern)
            found.append(Joint((head, tail) if search.head else (tail,)))
    return found


def _floating_forms(inputs: int, outputs: int, storage: Storage, search: Search) -> list[Form]:
    found: list[Form] = []
    plain = Plain(None).bytes(inputs, outputs, storage)

    def at(atoms: int) -> Joint:
        kept = max(1, int(atoms / search.floating_per_kept))
        pattern = DENSE if kept == atoms else Pattern(kept, atoms)
        return Joint((Level(atoms, None, None, pattern),))

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
    form: Form,
    weights: Mapping[str, Float[Tensor, "inputs outputs"]],
    whitening: Whitening,
    search: Search,
    *,
    dictionary_name: str | None = None,
    quantizer: Quantizer = gptq,
) -> Realized:
    """Make the matrices of a form; a factorised form gives all of `weights` one dictionary.

    Args:
        form: what to make.
        weights: by name, of one input.
        whitening: of that input.
        search: rounds and alternation.
        dictionary_name: for several matrices; None takes the name of the only one.
        quantizer: of plain grids.
    """
    if isinstance(form, Separate):
        (name,) = weights
        return _separate(form, name, weights[name], whitening, quantizer)
    weight = torch.cat(list(weights.values()), dim=1)
    matrices: dict[str, Matrix] = {}
    match form:
        case Plain():
            if form.grid is None:
                matrices.update({name: Dense(value.float()) for name, value in weights.items()})
            else:
                # Every output is quantized for itself: side by side they take one pass.
                whole = quantizer(weight.float(), whitening.feedback, form.grid)
                sizes = [value.shape[1] for value in weights.values()]
                parts = zip(whole.integers.split(sizes, 1), whole.scales.split(sizes, 1), strict=True)
                for name, (integers, scales) in zip(weights, parts, strict=True):
                    matrices[name] = Quantized(integers.contiguous(), scales.contiguous(), form.grid)
        case Joint():
            factors = joint(
                weight, whitening, form.levels, rounds=search.rounds, alternation=search.alternation
            )
            shared = dictionary_name or "+".join(weights)
            matrices.update(split(factors, {name: value.shape[1] for name, value in weights.items()}, shared))
        case _:
            assert_never(form)
    errors = {
        name: whitening.error(weights[name], matrix.dequantize()) ** 2 for name, matrix in matrices.items()
    }
    return Realized(matrices, errors)


def _separate(
    form: Separate,
    name: str,
    weight: Float[Tensor, "inputs outputs"],
    whitening: Whitening,
    quantizer: Quantizer,
) -> Realized:
    factors = METHODS[form.method](
        weight, whitening, form.atoms, form.pattern, alternation_of(form.rounds, paper_exact=form.paper_exact)
    )
    quantized = quantize_factors(
        factors,
        weight,
        whitening,
        dictionary_grid=form.dictionary,
        code_grid=form.codes,
        quantizer=quantizer,
        paper_exact=form.paper_exact,
    )
    return Realized(
        {name: Factorized((Pair(quantized.dictionary, quantized.codes, name, quantized.pattern),))},
        {name: quantized.error**2},
        {name: Dense((factors.dictionary.double() @ factors.codes.double()).float())},
        {name: quantized.unquantized_error**2},
    )
