"""Steps of Adam on relative changes: a scale becomes ``s (1 + d)``, and d is what is stepped on.

Scales of one model differ by factors of a thousand, and a step that is right for one is the end of another: one
absolute size for all broke a model at once. Of vectors (norm weights, biases) every number may move, those near zero
too, so their unit is the root of the mean square of the vector.

What stands in the model is rounded to its stored type after every step, and gradients are those at the rounded values:
so what is tuned is what is stored.

Adam (arXiv 1412.6980), with the letters of its algorithm 1: m, v, b1, b2, e.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from compot_deploy.core.matrix import Quantized

_B1: Final = 0.9
_B2: Final = 0.95
_E: Final = 1e-8

SCALE_RATE: Final = 0.04
"""Size of a step of a scale, as a part of it, for integers of 0 bits; every bit halves it. So the largest integer of a
grid moves by the same part of the distance of two integers, whatever its bits."""

NARROW: Final = 256
"""Inputs up to which a step has its full size; it is smaller the more there are, so that what steps of one sign add to
an output does not grow with the width of the matrix."""

VECTOR_RATE: Final = 1e-3
"""Size of a step of a number of a vector, as a part of the vector's unit."""


class NotFiniteError(ArithmeticError):
    """A loss or a gradient is not a number any more."""


@dataclass
class Tuned:
    """A tensor that is tuned.

    Attributes:
        base: its values before.
        unit: what a change of 1 is, of the base's shape or one for all.
        stored: type that it is stored in.
        rate: size of a step, in units.
        change: from the base, in units.
        m: running mean of the gradient.
        v: running mean of its square.
    """

    base: Tensor
    unit: Tensor
    stored: torch.dtype
    rate: float
    change: Tensor = field(init=False)
    m: Tensor = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.change, self.m, self.v = (torch.zeros_like(self.base) for _ in range(3))

    @property
    def value(self) -> Tensor:
        """As it is stored, in float32."""
        return (self.base + self.unit * self.change).to(self.stored).float()

    def step(self, gradient: Tensor, number: int, part: float) -> None:
        """Move against a gradient.

        Args:
            gradient: of the loss at the value.
            number: of the step, from 1.
            part: of the rate.

        Raises:
            NotFiniteError: the gradient is not finite.
        """
        gradient = gradient * self.unit
        if not bool(torch.isfinite(gradient).all()):
            raise NotFiniteError
        self.m.mul_(_B1).add_(gradient, alpha=1 - _B1)
        self.v.mul_(_B2).addcmul_(gradient, gradient, value=1 - _B2)
        m = self.m / (1 - _B1**number)
        v = self.v / (1 - _B2**number)
        self.change.sub_(part * self.rate * m / (v.sqrt() + _E))


def tuned_scales(leaf: Quantized, device: str) -> Tuned:
    """Scales of a leaf."""
    base, part = leaf.scales.to(device, torch.float32), NARROW / max(NARROW, leaf.shape[0])
    return Tuned(base, base, leaf.scales.dtype, SCALE_RATE * 2.0**-leaf.grid.bits * part)


def tuned_vector(values: Tensor, device: str) -> Tuned:
    """Norm weights or biases; those that are all zero stay so."""
    base = values.to(device, torch.float32, copy=True)
    return Tuned(base, base.square().mean().sqrt(), values.dtype, VECTOR_RATE)


class Tuning:
    """Everything that is tuned, by block and key; None stands for what is outside of the blocks.

    Takes 20 bytes a scale: of one for 32 weights as much as half a byte a weight.
    """

    def __init__(self, parts: Mapping[str | None, Mapping[str, Tuned]]) -> None:
        self._parts = parts
        self._best = self.values()

    def of(self, block: str | None) -> Mapping[str, Tuned]:
        """What is tuned of a block."""
        return self._parts[block]

    @property
    def count(self) -> int:
        """Numbers that are tuned."""
        return sum(one.base.numel() for _, one in self._all())

    def values(self) -> dict[str, Tensor]:
        """By key, as they are stored."""
        return {key: one.value.to("cpu", one.stored) for key, one in self._all()}

    @property
    def best(self) -> Mapping[str, Tensor]:
        """Values that were kept last."""
        return self._best

    def keep(self) -> None:
        """The values as they are now are the best."""
        self._best = self.values()

    def state(self) -> dict[str, Tensor]:
        """Everything that a later run needs to go on."""
        found = {f"best {key}": value for key, value in self._best.items()}
        for key, one in self._all():
            found |= {f"change {key}": one.change, f"m {key}": one.m, f"v {key}": one.v}
        return {key: value.cpu() for key, value in found.items()}

    def go_on(self, state: Mapping[str, Tensor]) -> None:
        """Be what `state` told."""
        for key, one in self._all():
            for name in ("change", "m", "v"):
                getattr(one, name).copy_(state[f"{name} {key}"])
        self._best = {key: state[f"best {key}"] for key in self._best}

    def _all(self) -> Iterable[tuple[str, Tuned]]:
        return ((key, one) for part in self._parts.values() for key, one in part.items())


def part_of_rate(number: int, steps: int) -> float:
    """How much of the full rate a step has, from 1: a short way up, then half a cosine down."""
    warm = min(5, max(1, steps // 10))
    if number <= warm:
        return number / warm
    return 0.5 * (1 + math.cos(math.pi * (number - warm) / max(1, steps - warm + 1)))
