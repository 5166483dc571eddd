"""Grids of integers and patterns of non-zeros: the part of `weights` that needs no tensors, and so no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, get_args

from compot_deploy.errors import RecipeError

Codebook: TypeAlias = Literal["integer", "nf4", "fp4"]
"""What an integer stands for: itself, or an entry of one of bitsandbytes' two tables of 4 bits."""

CODEBOOKS: Final[Mapping[str, tuple[float, ...]]] = MappingProxyType(
    {
        # NF4 (QLoRA, arXiv 2305.14314, appendix E): ascending quantiles of a normal distribution; entry 7 is 0.
        "nf4": (
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
            *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
            *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
            *(0.7229568362236023, 1.0),
        ),
        # FP4 (bitsandbytes): a table of 8 magnitudes, then the same with a sign. -0 is never stored: entry 8 - 8
        # of the negative half is left out, so integers run from -7 to 7.
        "fp4": (
            *(-0.25, -0.1666666716337204, -0.5, -0.3333333432674408, -1.0, -0.6666666865348816),
            *(-0.005208333488553762, 0.0, 0.005208333488553762, 0.6666666865348816, 1.0),
            *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        ),
    }
)
"""Values by ``integer + 7``, float32 exactly: integer 0 is exactly zero in both."""


@dataclass(frozen=True)
class Grid:
    """A grid of values with exact zero: ``value = integer · scale``, or ``table[integer] · scale``.

    Others call it a quantization scheme: bits and group size.

    Attributes:
        bits: Bits of one integer, 2, 3, 4 or 8. Integers run from ``-2**(bits-1)`` to ``2**(bits-1) - 1``.
        group: How many consecutive inputs (rows) of one output share a scale. The last group of a column
            may be shorter.
        codebook: ``integer``, or the name of a table of `CODEBOOKS`, which has 4 bits.
    """

    bits: int
    group: int
    codebook: Codebook = "integer"

    def __post_init__(self) -> None:
        if self.codebook not in get_args(Codebook):
            raise RecipeError(f"There is no codebook {self.codebook!r}: use one of {get_args(Codebook)}.")
        if self.codebook != "integer" and self.bits != 4:
            raise RecipeError(f"The codebook {self.codebook} has 4 bits, not {self.bits}.")
        if self.bits not in (2, 3, 4, 8):
            raise RecipeError(f"A grid of {self.bits} bits does not exist here: use 2, 3, 4 or 8.")
        if self.group < 1:
            raise RecipeError(f"A group of {self.group} inputs is impossible: use 32, 64 or 128.")

    @property
    def lowest(self) -> int:
        """The smallest integer of the grid."""
        return -(2 ** (self.bits - 1)) if self.codebook == "integer" else -7

    @property
    def highest(self) -> int:
        """The largest integer of the grid."""
        if self.codebook == "integer":
            return 2 ** (self.bits - 1) - 1
        return self.lowest + len(CODEBOOKS[self.codebook]) - 1

    @property
    def table(self) -> tuple[float, ...] | None:
        """Values by ``integer - lowest``; None where integers stand for themselves."""
        return CODEBOOKS.get(self.codebook)

    def groups(self, rows: int) -> int:
        """Number of scales of one column of ``rows`` inputs, a last partial group included."""
        return math.ceil(rows / self.group)

    def __str__(self) -> str:
        return f"{f'int{self.bits}' if self.codebook == 'integer' else self.codebook}/g{self.group}"


@dataclass(frozen=True)
class Pattern:
    """Which entries of a code matrix may be non-zero: ``kept`` of every ``of`` neighbouring atoms.

    One description covers all of them: ``Pattern(1, 1)`` is dense, ``Pattern(s, k)`` keeps the s strongest
    of all k atoms in each column (the paper's rule), ``Pattern(2, 4)`` and ``Pattern(4, 8)`` are the
    patterns that fast kernels want. Neighbouring means consecutive rows of the codes.
    """

    kept: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= self.of:
            raise RecipeError(f"A pattern cannot keep {self.kept} of {self.of} atoms.")

    @classmethod
    def of_text(cls, text: str) -> Pattern:
        """What `str` wrote.

        Raises:
            RecipeError: it did not write this.
        """
        if text == "dense":
            return cls()
        match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text, re.ASCII)
        if match is None:
            raise RecipeError(f"There is no pattern {text!r}: it is dense, or two numbers such as 2:4.")
        return cls(int(match[1]), int(match[2]))

    @property
    def is_dense(self) -> bool:
        """Whether every entry may be non-zero."""
        return self.kept == self.of

    def __str__(self) -> str:
        return "dense" if self.is_dense else f"{self.kept}:{self.of}"


DENSE = Pattern()
