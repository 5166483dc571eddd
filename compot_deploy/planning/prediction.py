"""Errors of the schemes of one input without making them: grids on some outputs, factorized schemes from the spectrum.

An output is quantized for itself, so a sample of the outputs tells what a grid costs all of them. The error of an
output goes with the square of its steps; that ratio is what the sample measures. Two grids are tried for real, by all
matrices of an input side by side; the others follow from what rounding to nearest loses.

A factorized scheme loses what its atoms lose at their bits, and all of what has no atom (`water_filling`). That is a
model, and it decides what a plan looks at: a scheme that a plan chooses is made and measured, and the plan made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized
from compot_deploy.numerics.whiten import Whitening
from compot_deploy.planning.rate_points import between
from compot_deploy.planning.schemes import Joint, Plain, Scheme
from compot_deploy.planning.water_filling import predicted_error
from compot_deploy.quant import QUANTIZERS, gptq_side_by_side, rtn

_OUTPUTS: Final = 96
"""Outputs of each matrix that grids are tried on: errors are then known to 2 or 3 %."""

_STEPS: Final = 64
"""Inputs whose largest weight says how coarse the steps of an output are."""

_SPARSE: Final = 0.9
"""Error of sparse codes as part of what dense ones of the same bytes are predicted to have."""


def sampled_errors(
    plain: Sequence[Plain],
    weights: Mapping[str, Float[Tensor, "inputs outputs"]],
    whitening: Whitening,
    quantizer: str,
) -> dict[str, dict[Scheme, float]]:
    """Squared relative error of every grid for every matrix.

    Args:
        plain: schemes; the one that leaves a matrix as it is has no error.
        weights: of one input, by name.
        whitening: of that input.
        quantizer: by name.
    """
    samples = {name: weight[:, :: -(-weight.shape[1] // _OUTPUTS)] for name, weight in weights.items()}
    scales = {name: _scale(weight, samples[name], whitening) for name, weight in weights.items()}
    found: dict[str, dict[Scheme, float]] = {name: {} for name in weights}
    for scheme in plain:
        if scheme.grid is None:
            for name in weights:
                found[name][scheme] = 0.0
    side_by_side = torch.cat(list(samples.values()), dim=1).float()
    widths = [sample.shape[1] for sample in samples.values()]
    grids = [scheme.grid for scheme in plain if scheme.grid is not None]
    factor = whitening.factor.T.float()

    def made(tried: Sequence[Grid]) -> dict[Grid, list[float]]:
        wholes = _quantized(side_by_side, tried, whitening, quantizer)
        return {
            grid: [
                float((factor @ part).square().sum())
                for part in (side_by_side - whole.dequantize()).split(widths, dim=1)
            ]
            for grid, whole in zip(tried, wholes, strict=True)
        }

    errors = (
        _by_rounding(side_by_side, widths, grids, whitening, made) if quantizer == "gptq" else made(grids)
    )
    for grid, parts in errors.items():
        for name, part in zip(weights, parts, strict=True):
            found[name][Plain(grid)] = part * scales[name]
    return found


def _by_rounding(
    weight: Float[Tensor, "inputs outputs"],
    widths: Sequence[int],
    grids: Sequence[Grid],
    whitening: Whitening,
    made: Callable[[Sequence[Grid]], Mapping[Grid, Sequence[float]]],
) -> dict[Grid, list[float]]:
    """What GPTQ will leave of each matrix on each grid, from two grids that it is tried on.

    GPTQ's loss is, up to a factor of each matrix, that of rounding to nearest with every input weighed by what its
    error costs GPTQ, ``Σ_i C_ii ‖w_i − round(w_i)‖²`` (see `compot_deploy.quant.feedback`). The factor is measured on
    the finest grid of 4 bits and on the coarsest with groups as small, and goes evenly between them.

    Args:
        weight: sampled outputs of some matrices side by side.
        widths: outputs of each.
        grids: that there are.
        whitening: of their input.
        made: tries grids for real.
    """
    cost = whitening.feedback.cost.float()
    rounded = {}
    for grid in grids:
        missed = weight - rtn(weight, None, grid, importance=cost).dequantize()
        rounded[grid] = [float(cost @ part.square().sum(1)) for part in missed.split(widths, dim=1)]
    probes = _probes(grids)
    real = made(probes)
    found: dict[Grid, list[float]] = {}
    for grid in grids:
        found[grid] = []
        for number, loss in enumerate(rounded[grid]):
            factors = [_ratio(real[probe][number], rounded[probe][number]) for probe in probes]
            place = (grid.bits - probes[0].bits) / max(1, probes[-1].bits - probes[0].bits)
            along = min(1.0, max(0.0, place))
            found[grid].append(loss * factors[0] ** (1 - along) * factors[-1] ** along)
    return found | {probe: list(losses) for probe, losses in real.items()}


def _probes(grids: Sequence[Grid]) -> list[Grid]:
    """The finest grid of 4 bits or less, for what is finer is never what a plan is short of; and the coarsest one.

    Both with groups of one size, where there is one like that: they go through one pass then.
    """
    if not grids:
        return []
    ordered = sorted(grids, key=lambda grid: grid.bits + 16 / grid.group)
    fine = next((grid for grid in reversed(ordered) if grid.bits <= 4), ordered[-1])
    alike = (grid for grid in ordered if grid.group == fine.group and grid.bits < fine.bits)
    return list(dict.fromkeys((next(alike, ordered[0]), fine)))


def _ratio(real: float, rounded: float) -> float:
    return real / rounded if real > 0.0 and rounded > 0.0 else 1.0


def spectral_errors(listed: Mapping[Scheme, int], energies: Sequence[float]) -> dict[Scheme, float]:
    """Predicted squared relative errors of factorized schemes; `listed` says their bytes."""
    joint = {scheme: size for scheme, size in listed.items() if isinstance(scheme, Joint)}
    dense = {scheme: predicted_error(energies, scheme.tiers) for scheme in joint if scheme.is_dense}
    points = [(joint[scheme], error) for scheme, error in dense.items()]
    found: dict[Scheme, float] = {}
    for scheme, size in joint.items():
        if scheme in dense:
            found[scheme] = dense[scheme]
        elif points:
            found[scheme] = _SPARSE * between(points, size)
    return found


def _quantized(
    weight: Float[Tensor, "inputs outputs"], grids: Sequence[Grid], whitening: Whitening, quantizer: str
) -> Sequence[Quantized]:
    if quantizer == "gptq":
        return gptq_side_by_side([(weight, grid) for grid in grids], whitening.feedback)
    return [QUANTIZERS[quantizer](weight, whitening.feedback, grid) for grid in grids]


def _scale(
    weight: Float[Tensor, "inputs outputs"], sample: Float[Tensor, "inputs some"], whitening: Whitening
) -> float:
    """What the whitened square of the sample's errors is multiplied with, to be the relative one of all outputs."""
    whole = float((whitening.factor.T.float() @ weight.float()).square().sum())
    steps, some = (float(output_steps(one).square().sum()) for one in (weight, sample))
    return steps / some / whole if whole > 0.0 and some > 0.0 else 0.0


def output_steps(weight: Float[Tensor, "inputs outputs"]) -> Float[Tensor, " outputs"]:
    """How coarse the steps of each output are: the root mean square over groups of the largest weight."""
    largest = torch.stack([group.abs().amax(0) for group in weight.split(_STEPS)])
    return largest.square().mean(0).sqrt()
