"""What the plan has to beat: other ways to make all linears of a model small, with every byte counted.

Each takes the original weights and the whitenings of their inputs, which is the same calibration for all, and
returns the weights that a model would compute with and the bytes that they need. Bytes are integers or
indices, scales, zero points and masks; headers, alignment, and tables that are the same for every matrix are
left out for everyone.

* GPTQ as published: scales from the range of a group, with zero points, one pass. (The GPTQ of this package,
  with searched scales and coordinate descent, is stronger, and another baseline.)
* SVD-LLM, COMPOT as published, CoSpaDi: uniform over the model, then both factors in 4 bits by GPTQ.
* bitsandbytes NF4, by its own code; knows no calibration.
* llama.cpp's types, by its own code, with the diagonal of the Gram as importance. Most of them need rows of
  a multiple of 256 inputs. Two ways where rows are not: *fallback* takes what llama.cpp's own quantizer
  takes, a wider type; *padded* fills rows up with zeros of no importance and counts only the true part of
  the bytes, which flatters the type: no file can be that small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol

import numpy as np
import torch
from cospadi import cospadi
from torch import Tensor

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.storage import PaperStorage
from compot_deploy.exporters.gguf.ggml_types import GGML_TYPES
from compot_deploy.numerics.factors import Alternation, Factors
from compot_deploy.numerics.methods import METHODS
from compot_deploy.numerics.quantize_factors import quantize_factors
from compot_deploy.numerics.spectrum import singular_spectrum
from compot_deploy.numerics.whiten import Whitening
from compot_deploy.planning.sizing import MatrixSize, Precision, Sparsity
from compot_deploy.planning.spectral import ALLOCATIONS
from compot_deploy.quant import gptq

VERSION: Final = 1
"""Of everything here that changes a figure; part of every key of a cache."""

SPECTRAL_VERSION: Final = VERSION + 1
"""Of what `spectral` allocates."""

STORAGE: Final = PaperStorage()
LLAMA_TYPES: Final = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL",
    "Q4_0", "Q4_K",
)  # fmt: skip
LLAMA_FALLBACK: Final = ("Q2_K", "Q3_K", "Q4_K")
"""Types that are shown with llama.cpp's fallback as well; the others lie between them."""

_NF4_BLOCK: Final = 64
_NF4_NESTED: Final = 256
_TEXTBOOK_DAMPING: Final = 1e-2


class Linears(Protocol):
    """The linears of a model, and what their inputs look like on calibration text."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """By name, shape (in, out)."""
        ...

    def whitening_of(self, name: str) -> Whitening:
        """Of the input of a linear."""
        ...


@dataclass(frozen=True)
class Small:
    """All linears, made small.

    Attributes:
        weights: what the model computes with, by name, shape (in, out).
        bytes: that they need together.
        file_bytes: of a file that can exist, where `bytes` flatters the method.
    """

    weights: Mapping[str, Tensor]
    bytes: float
    file_bytes: float | None = None


@dataclass(frozen=True)
class Baseline:
    """A method at one size.

    Attributes:
        family: methods of one curve in a plot.
        method: for a table; unique.
        make: from the linears.
        seconds: it takes about so long on the encoder, for the time that is left.
        version: of all that its figures depend on.
    """

    family: str
    method: str
    make: Callable[[Linears], Small]
    seconds: float = 5.0
    version: int = VERSION


def baselines(
    factorized_bits: Sequence[float],
    cospadi_bits: Sequence[float],
    types: Sequence[str] = LLAMA_TYPES,
) -> tuple[Baseline, ...]:
    """All of them; factorized ones at the given bits per weight, and these types of llama.cpp."""
    found = [
        Baseline(
            "GPTQ as published",
            f"GPTQ as published int{bits}/g{group}",
            partial(_each, partial(textbook, grid=Grid(bits, group))),
            15.0,
        )
        for bits in (2, 3, 4)
        for group in (32, 128)
    ]
    found += [
        Baseline(
            "bitsandbytes NF4",
            "bitsandbytes NF4" + (", double quantization" if double else ""),
            partial(_each, partial(nf4, double=double)),
        )
        for double in (True, False)
    ]
    for padded, way, kinds in (
        (True, "rows padded", LLAMA_TYPES),
        (False, "with fallback", LLAMA_FALLBACK),
    ):
        found += [
            Baseline(
                f"llama.cpp, {way}",
                f"llama.cpp {kind}, {way}",
                partial(_padded, kind=kind)
                if padded
                else partial(_each, partial(llama, kind=kind, padded=False)),
            )
            for kind in kinds
            if kind in types
        ]
    found += [
        Baseline(
            f"{title}, then int4",
            f"{title}, then int4, for {bits:g} bits",
            partial(then_int4, method=method, bits=bits),
            seconds,
        )
        for method, title, sizes, seconds in (
            ("svd-llm", "SVD-LLM", factorized_bits, 40.0),
            ("compot", "COMPOT as published", factorized_bits, 60.0),
            ("cospadi", "CoSpaDi", cospadi_bits, 300.0),
        )
        for bits in sizes
    ]
    return tuple(found)


def _each(make: Callable[[Tensor, Whitening], tuple[Tensor, float]], linears: Linears) -> Small:
    """One linear after the other, each for itself."""
    weights: dict[str, Tensor] = {}
    total = 0.0
    for name, weight in linears.weights.items():
        weights[name], size = make(weight, linears.whitening_of(name))
        total += size
    return Small(weights, total)


def _padded(linears: Linears, *, kind: str) -> Small:
    """A ggml type with rows filled up to whole blocks, and what a file of such rows takes."""
    from compot_deploy.exporters.gguf.quantize import row_bytes

    small = _each(partial(llama, kind=kind, padded=True), linears)
    shapes = [weight.shape for weight in linears.weights.values()]
    block = GGML_TYPES[kind].block
    return replace(
        small,
        file_bytes=sum(outputs * row_bytes(kind, inputs + -inputs % block) for inputs, outputs in shapes),
    )


# -- one matrix: what it becomes, and its bytes ----------------------------------------------------------


def textbook(weight: Tensor, whitening: Whitening, *, grid: Grid) -> tuple[Tensor, float]:
    """GPTQ as published (arXiv 2210.17323): a group's smallest and largest weight are the ends of its grid.

    A scale of 16 bits and a zero point of as many bits as an integer, for each group and output.
    """
    gram = whitening.gram
    gram.diagonal().add_(_TEXTBOOK_DAMPING * float(gram.diagonal().mean()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    upper = torch.linalg.cholesky(inverse, upper=True)
    work, top = weight.double().clone(), 2**grid.bits - 1
    inputs, outputs = work.shape
    result = torch.empty_like(work)
    scale = zero = torch.empty(0)
    for row in range(inputs):
        if row % grid.group == 0:
            group = work[row : row + grid.group]
            low, high = group.amin(0).clamp_max(0.0), group.amax(0).clamp_min(0.0)
            scale = ((high - low) / top).clamp_min(1e-7).half().double()
            zero = (-low / scale).round().clamp(0, top)
        result[row] = ((work[row] / scale + zero).round().clamp(0, top) - zero) * scale
        error = (work[row] - result[row]) / upper[row, row]
        work[row:] -= upper[row, row:, None] * error
    bits = grid.bits * inputs * outputs + (16 + grid.bits) * grid.groups(inputs) * outputs
    return result.float(), bits / 8


def nf4(weight: Tensor, whitening: Whitening, *, double: bool) -> tuple[Tensor, float]:
    """NF4 by bitsandbytes in blocks of 64: a float32 per block, or a byte and a float32 per 256 of those."""
    import bitsandbytes.functional as bnb

    rows = weight.float().T.contiguous()  # as torch stores a linear: blocks run along its inputs
    packed, state = bnb.quantize_4bit(
        rows, blocksize=_NF4_BLOCK, quant_type="nf4", compress_statistics=double
    )
    return bnb.dequantize_4bit(packed, state).T.contiguous(), nf4_bytes(rows.numel(), double=double)


def nf4_bytes(numbers: int, *, double: bool) -> float:
    """Of so many weights: indices of 4 bits, and their blocks' scales."""
    blocks = math.ceil(numbers / _NF4_BLOCK)
    scales = blocks + 4 * math.ceil(blocks / _NF4_NESTED) + 4 if double else 4 * blocks
    return math.ceil(numbers / 2) + scales


def llama(weight: Tensor, whitening: Whitening, *, kind: str, padded: bool) -> tuple[Tensor, float]:
    """A ggml type by llama.cpp's own code; see the module for rows that do not fit its blocks."""
    from compot_deploy.exporters.gguf.quantize import dequantize, fitting_type, quantize, row_bytes

    rows = weight.float().T.contiguous().numpy()
    importance = whitening.gram.diagonal().float().numpy()
    importance = importance / importance.mean()
    outputs, inputs = rows.shape
    if padded:
        filled = inputs + -inputs % GGML_TYPES[kind].block
        rows = np.pad(rows, ((0, 0), (0, filled - inputs)))
        importance = np.pad(importance, (0, filled - inputs))
        size = outputs * row_bytes(kind, filled) * inputs / filled
    else:
        kind = fitting_type(kind, inputs)
        size = float(outputs * row_bytes(kind, inputs))
    found = dequantize(quantize(rows, kind, None if kind.startswith("F") else importance), kind)
    return torch.from_numpy(found[:, :inputs].T.copy()), size


# -- factorized, the whole model -------------------------------------------------------------------------


def factorize(
    method: str, weight: Tensor, whitening: Whitening, atoms: int, pattern: Pattern, *, published: bool = True
) -> Factors:
    """By `svd-llm`, `compot` or `cospadi`."""
    if method == "cospadi":
        return cospadi(weight, whitening, atoms, pattern)
    return METHODS[method](weight, whitening, atoms, pattern, Alternation(paper_exact=published))


def then_int4(linears: Linears, *, method: str, bits: float) -> Small:
    """Factorized with uniform allocation for a number of bits per weight, then both factors in 4 bits.

    Dictionaries have groups of 64, codes of 16. A linear for which not even one group of atoms fits stays
    plain, with groups of 64, so the bits that come out may be more than those asked for.
    """
    grid, codes = Grid(4, 64), Grid(4, 16)
    allocation = ALLOCATIONS["uniform"](
        _sizes(linears),
        ratio=1.0 - bits / 4.25,
        storage=STORAGE,
        precision=Precision(grid, grid, codes),
        sparsity=_sparsity(method),
    )
    made = {}
    for name, choice in allocation.choices.items():
        weight, whitening = linears.weights[name], linears.whitening_of(name)
        if not choice.factorized:
            made[name] = gptq(weight, whitening.gram, grid).dequantize()
            continue
        quantized = quantize_factors(
            factorize(method, weight, whitening, choice.atoms, choice.pattern),
            weight,
            whitening,
            dictionary_grid=grid,
            code_grid=codes,
            paper_exact=True,
        )
        made[name] = (quantized.dictionary.dequantize() @ quantized.codes.dequantize()).float()
    return Small(made, allocation.bytes)


def floating(linears: Linears, *, method: str, rule: str, ratio: float, published: bool = True) -> Small:
    """Factorized in 16 bits, as the paper counts them; linears that do not gain stay as they are."""
    allocation = ALLOCATIONS[rule](_sizes(linears), ratio=ratio, storage=STORAGE, sparsity=_sparsity(method))
    made = {}
    for name, choice in allocation.choices.items():
        weight = linears.weights[name]
        if choice.factorized:
            factors = factorize(
                method, weight, linears.whitening_of(name), choice.atoms, choice.pattern, published=published
            )
            weight = (factors.dictionary @ factors.codes).float()
        made[name] = weight
    return Small(made, allocation.bytes)


def paper_row(ratios: Sequence[float], cospadi_ratios: Sequence[float]) -> tuple[Baseline, ...]:
    """The paper's comparison in kind: allocations and methods without quantization."""
    found = []
    for ratio in ratios:
        for rule in ALLOCATIONS:
            methods = [("svd-llm", "SVD-LLM", 15.0), ("compot", "COMPOT as published", 90.0)]
            if rule == "uniform" and ratio in cospadi_ratios:
                methods.append(("cospadi", "CoSpaDi", 900.0))
            for method, title, seconds in methods:
                found.append(
                    Baseline(
                        f"{title}, {rule}",
                        f"{title}, {rule}, {ratio:.0%}",
                        partial(floating, method=method, rule=rule, ratio=ratio),
                        seconds,
                        SPECTRAL_VERSION if rule == "spectral" else VERSION,
                    )
                )
    return tuple(found)


def _sparsity(method: str) -> Sparsity:
    return Sparsity(pattern=DENSE) if method == "svd-llm" else Sparsity()


def _sizes(linears: Linears) -> list[MatrixSize]:
    return [
        MatrixSize(name, weight.shape[0], weight.shape[1], singular_spectrum(weight))
        for name, weight in linears.weights.items()
    ]
