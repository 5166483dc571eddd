"""The tensor types of ggml: number in a file, entries and bytes of a block.

The package `gguf` has the same table. Importing it brings a tokenizer library and a YAML reader along, 4 MB of
resident memory that a program which only runs a model has no use for; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True)
class GgmlType:
    """How a type stores a row.

    Attributes:
        name: as ggml prints it, in capitals: ``Q4_0``.
        number: in the header of a file.
        block: entries that share scales; rows are whole blocks.
        nbytes: bytes of a block.
    """

    name: str
    number: int
    block: int
    nbytes: int

    def row_bytes(self, inputs: int) -> int:
        """Bytes of a row of `inputs` entries, a multiple of the block."""
        return inputs // self.block * self.nbytes


_TABLE: Final = (
    ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("BF16", 30, 1, 2), ("F64", 28, 1, 8),
    ("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4), ("I64", 27, 1, 8),
    ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 40),
    ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292),
    ("IQ1_S", 19, 256, 50), ("IQ1_M", 29, 256, 56), ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74),
    ("IQ2_S", 22, 256, 82), ("IQ3_XXS", 18, 256, 98), ("IQ3_S", 21, 256, 110), ("IQ4_NL", 20, 32, 18),
    ("IQ4_XS", 23, 256, 136),
    ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36),
    ("Q1_0", 41, 128, 18),
)  # fmt: skip

GGML_TYPES: Final[Mapping[str, GgmlType]] = MappingProxyType({row[0]: GgmlType(*row) for row in _TABLE})
"""By name."""

BY_NUMBER: Final[Mapping[int, GgmlType]] = MappingProxyType({t.number: t for t in GGML_TYPES.values()})
"""By the number in a file."""
