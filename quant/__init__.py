"""Quantizers: matrix in, matrix out. torch only; they know nothing of models, files or formats."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized
from compot_deploy.quant.bnb import bnb, require_bitsandbytes
from compot_deploy.quant.feedback import Feedback, Inputs, feedback_of
from compot_deploy.quant.gptq import gptq, gptq_side_by_side
from compot_deploy.quant.rtn import rtn


@runtime_checkable
class Quantizer(Protocol):
    """What every quantizer looks like; `support` marks the entries that may be non-zero."""

    def __call__(
        self,
        weight: Float[Tensor, "inputs outputs"],
        gram: Inputs,
        grid: Grid,
        *,
        support: Bool[Tensor, "inputs outputs"] | None = None,
    ) -> Quantized:
        """Quantize `weight`, for inputs with Gram matrix `gram`, or with what `feedback_of` made of it."""
        ...


QUANTIZERS: Final[Mapping[str, Quantizer]] = MappingProxyType({"gptq": gptq, "rtn": rtn, "bnb": bnb})

__all__ = [
    "QUANTIZERS",
    "Feedback",
    "Quantizer",
    "bnb",
    "feedback_of",
    "gptq",
    "gptq_side_by_side",
    "require_bitsandbytes",
    "rtn",
]
