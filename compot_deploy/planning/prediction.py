"""Errors of the schemes of one input without making them: grids on some outputs, factorized schemes from the spectrum.

An output is quantized for itself, so a sample of the outputs tells what a grid costs all of them. The error of an
output goes with the square of its steps; that ratio is what the sample measures. Grids of one group size are made side
by side, in one pass for all matrices of the input.

A factorized scheme loses what its atoms lose at their bits, and all of what has no atom (`water_filling`). That is a
model, and it decides what a plan looks at: a scheme that a plan chooses is made and measured, and the plan made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from compot_deploy.quant import QUANTIZERS, gptq_side_by_side

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
    for grid, whole in zip(grids, _quantized(side_by_side, grids, whitening, quantizer), strict=True):
        missed = (side_by_side - whole.dequantize()).split(widths, dim=1)
        for name, part in zip(weights, missed, strict=True):
            found[name][Plain(grid)] = float((factor @ part).square().sum()) * scales[name]
    return found


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
