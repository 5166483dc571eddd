"""Our integers in ggml's standard blocks, bit-exactly, in both directions: Q4_0 and Q8_0.

::

    Q4_0   18 bytes per 32 inputs: float16 scale, then byte i holds inputs i (low) and 16+i (high), plus 8
    Q8_0   34 bytes per 32 inputs: float16 scale, then 32 signed bytes

A grid of up to 4 bits is exact in Q4_0 and one of up to 8 bits in Q8_0, when its group is a multiple of
32 inputs: the scale is repeated in every block of its group. (ggml-common.h, block_q4_0 and block_q8_0.)
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from jaxtyping import Float16, Int8, UInt8

from compot_deploy.core.grid import Grid
from compot_deploy.errors import ArtifactError, RecipeError

BLOCK: Final = 32
BLOCK_BYTES: Final = {"Q4_0": 18, "Q8_0": 34}


def block_type(grid: Grid) -> str:
    """The narrowest standard type that holds a grid exactly."""
    return "Q4_0" if grid.bits <= 4 else "Q8_0"


def padded(inputs: int) -> int:
    """Inputs rounded up to whole blocks."""
    return -(-inputs // BLOCK) * BLOCK


def check_group(grid: Grid, inputs: int) -> None:
    """Refuse a group that blocks of 32 cannot express.

    Raises:
        RecipeError: the group is not a multiple of 32 and does not cover the whole column.
    """
    if grid.group % BLOCK and grid.group < inputs:
        raise RecipeError(
            f"Groups of {grid.group} inputs cannot be stored in GGUF: blocks have {BLOCK} inputs. "
            f"Use a group of 32, 64 or 128."
        )


def pack_blocks(
    integers: Int8[np.ndarray, "inputs outputs"],
    scales: Float16[np.ndarray, "groups outputs"],
    group: int,
    kind: str,
) -> UInt8[np.ndarray, "outputs bytes"]:
    """Integers (inputs, outputs), inputs a multiple of 32, as rows of blocks, one row per output."""
    inputs, outputs = integers.shape
    if inputs % BLOCK:
        raise ValueError(f"{inputs} inputs do not split into blocks of {BLOCK}.")
    blocks = inputs // BLOCK
    of_block = np.minimum(np.arange(blocks) * BLOCK // group, len(scales) - 1)
    head = np.ascontiguousarray(scales[of_block].T).astype("<f2").view(np.uint8).reshape(outputs, blocks, 2)
    rows = np.ascontiguousarray(integers.T).reshape(outputs, blocks, BLOCK)
    if kind == "Q8_0":
        body = rows.view(np.uint8)
    else:
        if rows.size and not -8 <= rows.min() <= rows.max() <= 7:
            raise ValueError(f"Integers from {rows.min()} to {rows.max()} do not fit Q4_0.")
        offset = (rows + np.int8(8)).view(np.uint8)
        body = offset[..., :16] | (offset[..., 16:] << np.uint8(4))
    return np.concatenate([head, body], axis=-1).reshape(outputs, -1)


def unpack_blocks(
    rows: UInt8[np.ndarray, "outputs bytes"], inputs: int, group: int, kind: str
) -> tuple[Int8[np.ndarray, "inputs outputs"], Float16[np.ndarray, "groups outputs"]]:
    """The inverse of `pack_blocks`; rows beyond `inputs` are padding and stay in the result.

    Raises:
        ArtifactError: blocks of one group carry different scales.
    """
    outputs = rows.shape[0]
    blocks = np.ascontiguousarray(rows).reshape(outputs, -1, BLOCK_BYTES[kind])
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float16)
    body = np.ascontiguousarray(blocks[..., 2:])
    if kind == "Q8_0":
        values = body.view(np.int8)
    else:
        offset = np.concatenate([body & np.uint8(15), body >> np.uint8(4)], axis=-1)
        values = (offset.astype(np.int16) - 8).astype(np.int8)
    groups = math.ceil(inputs / group)
    of_block = np.minimum(np.arange(blocks.shape[1]) * BLOCK // group, groups - 1)
    first = np.searchsorted(of_block, np.arange(groups))
    chosen = scales[:, first]
    if not np.array_equal(chosen[:, of_block].view(np.uint16), scales.view(np.uint16)):
        raise ArtifactError(f"Blocks of one group of {group} inputs carry different scales: damaged file.")
    integers = values.reshape(outputs, -1)
    return np.ascontiguousarray(integers.T), np.ascontiguousarray(chosen.T)
