"""Joint quantization: a dictionary and its codes are made for each other, integers and all.

Quantizing A and then S, each as well as it goes, throws away what the factorization gained: ``A = L⁻ᵀD``
amplifies directions of little energy, and the codes were fitted to a dictionary that no longer exists. Here
the two take turns, each fitted to the integers of the other, and the best round is kept.

Letters: ``W`` the weight (m × n), ``G`` the Gram of its inputs, ``A`` the dictionary (m × k), ``S`` the codes
(k × n), hats for what is on a grid, ``H = ÂᵀGÂ`` the Gram that the codes see, ``C = ÂᵀGW``. A round is

* ``A = W Sᵀ(SSᵀ)⁻¹``, the best dictionary for the codes (whitening cancels in it), then GPTQ with ``G``;
* the support chosen anew against ``Â``, the codes fitted to it on that support, then GPTQ with ``H``;
* coordinate descent on both sets of integers.

Precision follows energy: atoms are dealt out in *tiers*, strongest first, each with grids and a pattern of
its own. A direction that carries most of a matrix needs eight bits, one at the noise needs two or none
(reverse water-filling; see `compot_deploy.planning.water_filling`). Tiers are quantized in order, and what one
loses is part of what the next ones are fitted to.

The objective, the squared whitened error ``‖Lᵀ(W − ÂŜ)‖²``, is evaluated in float64 on the integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Leaf, Quantized
from compot_deploy.errors import InputError, RecipeError
from compot_deploy.numerics.coding import threshold
from compot_deploy.numerics.compot import compot
from compot_deploy.numerics.factors import Alternation
from compot_deploy.numerics.least_squares import refit_codes
from compot_deploy.numerics.spectrum import principal_directions
from compot_deploy.numerics.whiten import Whitening
from compot_deploy.quant import gptq, rtn
from compot_deploy.quant.descent import descend

_BALANCE: Final = 0.5
"""How far codes are made alike in size across the atoms of a tier: 0 not at all, 1 completely."""

SHORT_ALTERNATION: Final = Alternation(rounds=8, refinements=1)
"""Joint rounds choose supports again and re-fit everything: more rounds before them gain nothing."""

_DICTIONARY_SWEEPS: Final = 1
_QUICK_FIT: Final = 20
_FULL_FIT: Final = 40
"""Steps of conjugate gradients; the Gram of the codes is near the identity, so they converge fast."""


@dataclass(frozen=True)
class Tier:
    """Atoms that are stored alike.

    Attributes:
        atoms: how many.
        dictionary: grid of their columns of A; None is float32.
        codes: grid of their rows of S; None is float32.
        pattern: of their codes. `of` counts the atoms of this tier only.
    """

    atoms: int
    dictionary: Grid | None
    codes: Grid | None
    pattern: Pattern = DENSE

    def __post_init__(self) -> None:
        if self.atoms < 1 or self.atoms % self.pattern.of:
            raise RecipeError(f"{self.atoms} atoms do not split into groups of {self.pattern.of}.")

    def __str__(self) -> str:
        grids = f"{self.dictionary or 'float'}·{self.codes or 'float'}"
        return f"{self.atoms} x {grids}" + ("" if self.pattern.is_dense else f" {self.pattern}")


@dataclass(frozen=True)
class JointFactors:
    """Quantized factors of one weight, or of several side by side.

    Attributes:
        tiers: as asked for.
        dictionaries: Â of each tier, shape (in, atoms).
        codes: Ŝ of each tier, shape (atoms, out); exactly zero outside the pattern.
        error: relative whitened error ``‖Lᵀ(W − ΣÂŜ)‖ / ‖LᵀW‖``.
        objective: its square, after each round, of the best so far: never rises.
    """

    tiers: tuple[Tier, ...]
    dictionaries: tuple[Leaf, ...]
    codes: tuple[Leaf, ...]
    error: float
    objective: tuple[float, ...]

    def dequantize(self) -> Float[Tensor, "inputs outputs"]:
        """ΣÂŜ in float64."""
        products = [
            dictionary.dequantize().double() @ codes.dequantize().double()
            for dictionary, codes in zip(self.dictionaries, self.codes, strict=True)
        ]
        return torch.stack(products).sum(0)


def split(factors: JointFactors, outputs: Mapping[str, int], dictionary_name: str) -> dict[str, Factorized]:
    """The matrices that were factorized side by side, each with its columns of the codes.

    All of them refer to the dictionaries by one name, under which a file stores them once.

    Args:
        factors: of the concatenated weight.
        outputs: columns of each matrix, in the order in which they were concatenated.
        dictionary_name: for `FactorPair.dictionary_name`.
    """
    result = {}
    start = 0
    for name, width in outputs.items():
        pairs = tuple(
            FactorPair(
                dictionary, _columns(codes, slice(start, start + width)), dictionary_name, tier.pattern
            )
            for tier, dictionary, codes in zip(
                factors.tiers, factors.dictionaries, factors.codes, strict=True
            )
        )
        result[name] = Factorized(pairs)
        start += width
    if start != factors.codes[0].shape[1]:
        raise ValueError(
            f"{dictionary_name}: {start} columns are asked for, the codes have {factors.codes[0].shape[1]}."
        )
    return result


def joint(
    weight: Float[Tensor, "inputs outputs"],
    whitening: Whitening,
    tiers: Sequence[Tier],
    *,
    rounds: int = 2,
    sweeps: int = 1,
    alternation: Alternation = SHORT_ALTERNATION,
) -> JointFactors:
    """Factorize and quantize a weight in one go.

    Args:
        weight: W, shape (in, out); concatenate the weights of one input to share the dictionary.
        whitening: of the inputs.
        tiers: strongest atoms first. Sparse tiers must come last.
        rounds: turns of {dictionary, codes}; the best is kept.
        sweeps: of coordinate descent over the codes per turn.
        alternation: for the factorization of sparse tiers.

    Raises:
        RecipeError: no tier, more atoms than inputs, or a dense tier behind a sparse one.
        InputError: a weight with NaN or infinity.
    """
    tiers = tuple(tiers)
    _check(weight, tiers)
    problem = _Problem(weight.double(), whitening)
    if problem.energy == 0.0:
        return _zero(weight, tiers)
    codes = _first_codes(weight, whitening, tiers, alternation)
    places = _places(tiers)
    best: tuple[tuple[Leaf, ...], tuple[Leaf, ...]] | None = None
    objective: list[float] = []
    for _ in range(rounds):
        dictionaries, codes = _quantize_dictionary(problem, tiers, codes)
        seen = _Seen.through(dictionaries, problem)
        codes = _choose_support(seen, tiers, codes)
        order = _order(seen, tiers, codes)
        codes, seen = _Codes(codes.values[order], codes.support[order]), seen.reordered(order)
        quantized = _quantize_codes(seen, tiers, codes, sweeps)
        codes = _Codes(_stack(quantized), codes.support)
        lost = seen.lost(codes.values)
        if best is None or lost < objective[-1]:
            ordered = (
                _columns(leaf, order[place] - place.start)
                for leaf, place in zip(dictionaries, places, strict=True)
            )
            best = tuple(ordered), quantized
        objective.append(min(lost, *objective[-1:]) if objective else lost)
    assert best is not None
    share = max(0.0, objective[-1]) / problem.energy
    return JointFactors(
        tiers, *best, share**0.5, tuple(max(0.0, value) / problem.energy for value in objective)
    )


class _Problem:
    """What does not change: the weight, and how its errors are measured."""

    def __init__(self, weight: Float64[Tensor, "inputs outputs"], whitening: Whitening):
        self.weight = weight
        self.gram, self.feedback = whitening.gram, whitening.feedback
        self.pulled = self.gram @ weight
        self.energy = float((self.pulled * weight).sum())


@dataclass(frozen=True)
class _Seen:
    """The problem as the codes see it through quantized dictionaries: H, C, and the energy of the weight."""

    gram: Float64[Tensor, "atoms atoms"]
    correlation: Float64[Tensor, "atoms outputs"]
    energy: float

    @classmethod
    def through(cls, dictionaries: Sequence[Leaf], problem: _Problem) -> _Seen:
        stacked = torch.cat([leaf.dequantize().double() for leaf in dictionaries], dim=1)
        gram = stacked.T @ problem.gram @ stacked
        return cls((gram + gram.T) / 2, stacked.T @ problem.pulled, problem.energy)

    def reordered(self, order: Int64[Tensor, " atoms"]) -> _Seen:
        return _Seen(self.gram[order][:, order], self.correlation[order], self.energy)

    def lost(self, codes: Float64[Tensor, "atoms outputs"]) -> float:
        """``‖Lᵀ(W − ÂS)‖²``."""
        return self.energy + float(((self.gram @ codes - 2 * self.correlation) * codes).sum())


@dataclass(frozen=True)
class _Codes:
    """Codes of all tiers, one below the other, and where they may be non-zero."""

    values: Float64[Tensor, "atoms outputs"]
    support: Bool[Tensor, "atoms outputs"]


def _first_codes(
    weight: Float[Tensor, "inputs outputs"],
    whitening: Whitening,
    tiers: Sequence[Tier],
    alternation: Alternation,
) -> _Codes:
    """Principal components for the dense tiers; COMPOT on what they leave for each sparse one."""
    dense = sum(tier.atoms for tier in tiers if tier.pattern.is_dense)
    remaining = weight.double()
    values, supports = [], []
    if dense:
        whitened = whitening.apply(weight)
        directions = principal_directions(whitened, dense)
        values.append(directions.T @ whitened)
        supports.append(torch.ones_like(values[0], dtype=torch.bool))
        remaining = remaining - whitening.unapply(directions @ values[0])
    for tier in tiers:
        if not tier.pattern.is_dense:
            factors = compot(remaining, whitening, tier.atoms, tier.pattern, alternation)
            values.append(factors.codes)
            supports.append(factors.support)
            remaining = remaining - factors.dictionary @ factors.codes
    return _Codes(torch.cat(values), torch.cat(supports))


def _quantize_dictionary(
    problem: _Problem, tiers: Sequence[Tier], codes: _Codes
) -> tuple[tuple[Leaf, ...], _Codes]:
    """Â for the codes, and the codes in the units of its columns."""
    values = codes.values
    gram = values @ values.T
    gram.diagonal().add_(1e-10 * gram.diagonal().mean().clamp_min(1e-300))
    dictionary = torch.linalg.solve(gram, values @ problem.weight.T).T
    rms = _rms(codes, tiers)
    dictionary, values = dictionary * rms, values / rms[:, None]
    leaves: list[Leaf] = []
    for place, tier in zip(_places(tiers), tiers, strict=True):
        part = dictionary[:, place].contiguous()
        if tier.dictionary is None:
            leaves.append(Dense(part.float()))
        else:
            leaves.append(gptq(part, problem.feedback, tier.dictionary, sweeps=_DICTIONARY_SWEEPS))
    return tuple(leaves), _Codes(values, codes.support)


def _choose_support(seen: _Seen, tiers: Sequence[Tier], codes: _Codes) -> _Codes:
    """Sparse tiers: keep the entries that lower the objective most, after one step down its gradient."""
    support = codes.support
    if not all(tier.pattern.is_dense for tier in tiers):
        fitted = refit_codes(seen.gram, seen.correlation, codes.values, support, steps=_QUICK_FIT)
        curvature = seen.gram.diagonal().clamp_min(1e-300)[:, None]
        moved = fitted + (seen.correlation - seen.gram @ fitted) / curvature
        support = support.clone()
        for place, tier in zip(_places(tiers), tiers, strict=True):
            if not tier.pattern.is_dense:
                support[place] = threshold((moved * curvature.sqrt())[place], tier.pattern)[1]
        codes = _Codes(torch.where(support, fitted, 0.0), support)
    return _Codes(refit_codes(seen.gram, seen.correlation, codes.values, support, steps=_FULL_FIT), support)


def _quantize_codes(seen: _Seen, tiers: Sequence[Tier], codes: _Codes, sweeps: int) -> tuple[Leaf, ...]:
    """Tier after tier, each fitted to what is left, then descent over all of them in turn."""
    places = _places(tiers)
    free = codes.values.clone()  # what is not quantized yet
    values = torch.zeros_like(free)
    leaves: list[Leaf] = []
    for number, (place, tier) in enumerate(zip(places, tiers, strict=True)):
        rest = slice(place.start, None)
        if number:
            wanted = seen.correlation[rest] - seen.gram[rest, : place.start] @ values[: place.start]
            free[rest] = refit_codes(
                seen.gram[rest, rest], wanted, free[rest], codes.support[rest], steps=_QUICK_FIT
            )
        if tier.codes is None:
            leaves.append(Dense(free[place].float()))
        else:
            leaves.append(
                gptq(
                    free[place],
                    _schur(seen.gram, place),
                    tier.codes,
                    support=None if tier.pattern.is_dense else codes.support[place],
                    sweeps=sweeps,
                )
            )
        values[place] = leaves[-1].dequantize().double()
    if len(tiers) == 1:
        return tuple(leaves)
    for number, (place, tier) in enumerate(zip(places, tiers, strict=True)):
        leaf = leaves[number]
        others = values.clone()
        others[place] = 0.0
        wanted = seen.correlation[place] - seen.gram[place] @ others
        inner, support = seen.gram[place, place], codes.support[place]
        target = refit_codes(inner, wanted, values[place], support, steps=_FULL_FIT)
        if isinstance(leaf, Quantized):
            leaves[number] = descend(
                leaf, target, inner, support=None if tier.pattern.is_dense else support, sweeps=sweeps
            )
        else:
            leaves[number] = Dense(target.float())
        values[place] = leaves[number].dequantize().double()
    return tuple(leaves)


def _schur(gram: Float64[Tensor, "atoms atoms"], place: slice) -> Float64[Tensor, "part part"]:
    """The Gram of a tier, given that those behind it will be fitted to what it loses."""
    inner, behind = gram[place, place], slice(place.stop, None)
    later = gram[behind, behind]
    if not later.shape[0]:
        return inner
    ridge = 1e-9 * later.diagonal().mean().clamp_min(1e-300)
    later = later + ridge * torch.eye(later.shape[0], dtype=gram.dtype, device=gram.device)
    reduced = inner - gram[place, behind] @ torch.linalg.solve(later, gram[behind, place])
    return (reduced + reduced.T) / 2


def _rms(codes: _Codes, tiers: Sequence[Tier]) -> Float64[Tensor, " atoms"]:
    """Per atom, the factor that moves from the codes to the dictionary; see `quantize_factors`."""
    count = codes.support.sum(1).clamp_min(1)
    rms = (codes.values.square().sum(1) / count).sqrt()
    result = torch.ones_like(rms)
    for place in _places(tiers):
        part = rms[place]
        used = part > 0
        if bool(used.any()):
            overall = part[used].square().mean().sqrt()
            result[place] = torch.where(used, overall * (part / overall) ** _BALANCE, overall)
    return result


def _order(seen: _Seen, tiers: Sequence[Tier], codes: _Codes) -> Int64[Tensor, " atoms"]:
    """Atoms of each tier by what their errors weigh, heaviest first; N:M patterns stay in place."""
    weight = seen.gram.diagonal() * codes.values.square().sum(1)
    result = torch.arange(weight.shape[0], device=weight.device)
    for place, tier in zip(_places(tiers), tiers, strict=True):
        if tier.pattern.is_dense or tier.pattern.of == tier.atoms:
            result[place] = place.start + torch.argsort(weight[place], descending=True, stable=True)
    return result


def _places(tiers: Sequence[Tier]) -> tuple[slice, ...]:
    """The rows of each tier among all atoms."""
    stops = list(accumulate(tier.atoms for tier in tiers))
    return tuple(slice(stop - tier.atoms, stop) for stop, tier in zip(stops, tiers, strict=True))


def _columns(leaf: Leaf, columns: slice | Int64[Tensor, " columns"]) -> Leaf:
    if isinstance(leaf, Dense):
        return Dense(leaf.weight[:, columns].contiguous())
    return Quantized(leaf.integers[:, columns].contiguous(), leaf.scales[:, columns].contiguous(), leaf.grid)


def _stack(leaves: Sequence[Leaf]) -> Float64[Tensor, "rows outputs"]:
    return torch.cat([leaf.dequantize().double() for leaf in leaves])


def _zero(weight: Float[Tensor, "inputs outputs"], tiers: tuple[Tier, ...]) -> JointFactors:
    """Factors of a weight that is zero: rounding it to any grid is exact."""

    def leaf(rows: int, columns: int, grid: Grid | None) -> Leaf:
        zeros = torch.zeros(rows, columns, device=weight.device)
        return Dense(zeros) if grid is None else rtn(zeros, None, grid)

    inputs, outputs = weight.shape
    return JointFactors(
        tiers,
        tuple(leaf(inputs, tier.atoms, tier.dictionary) for tier in tiers),
        tuple(leaf(tier.atoms, outputs, tier.codes) for tier in tiers),
        0.0,
        (0.0,),
    )


def _check(weight: Float[Tensor, "inputs outputs"], tiers: tuple[Tier, ...]) -> None:
    inputs, outputs = weight.shape
    atoms = sum(tier.atoms for tier in tiers)
    if not 1 <= atoms <= inputs:
        raise RecipeError(
            f"A weight of {inputs} inputs and {outputs} outputs cannot have {atoms} atoms: use 1 to {inputs}."
        )
    sparse = [not tier.pattern.is_dense for tier in tiers]
    if sparse != sorted(sparse):
        raise RecipeError("Tiers with sparse codes come last: what they lose, dense ones cannot mend.")
    if not bool(torch.isfinite(weight).all()):
        raise InputError(
            f"A weight of {inputs} inputs and {outputs} outputs has NaN or infinite entries: "
            "the checkpoint is damaged."
        )
