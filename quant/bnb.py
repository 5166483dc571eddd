"""bitsandbytes: NF4, FP4 and int8 as its own library rounds them, with scales that every format here can hold.

The library takes the largest magnitude of a block as its scale, in float32. Formats here keep float16, so that
largest magnitude is first rounded to float16 (for int8: to 127 times a float16), which moves one weight of the
block by 2⁻¹¹ of itself at most, and whatever exceeds it then is clipped to it. What the library makes of that
block is taken as it is: its codes are the codes, its scale is the float16.

Zeros stay exact: all three tables hold 0 and map 0 to it.

Sources: QLoRA (arXiv 2305.14314) for NF4; LLM.int8() (arXiv 2208.07339) for the vector-wise int8, one scale per
output, which is repeated for every group because runtimes have groups.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Quantized
from compot_deploy.errors import InputError, MissingDependencyError, RecipeError
from compot_deploy.quant.feedback import Inputs

BLOCKS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that the library has for 4 bits."""

_LARGEST: Final = torch.finfo(torch.float16).max


def require_bitsandbytes() -> Any:
    """The functions of bitsandbytes.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        raise MissingDependencyError("bitsandbytes", "bnb", "The quantizer bnb") from None
    return functional


def bnb(
    weight: Float[Tensor, "inputs outputs"],
    gram: Inputs | None,
    grid: Grid,
    *,
    support: Bool[Tensor, "inputs outputs"] | None = None,
) -> Quantized:
    """Quantize with bitsandbytes: no error feedback, a table made for normal weights.

    Args:
        weight: what to quantize.
        gram: not used; it is here so that all quantizers look alike.
        grid: nf4 or fp4 with a block size of the library, or 8 bits with any group. A last group may be
            shorter; it is filled with zeros for the library.
        support: entries outside become exactly 0; None allows all.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
        RecipeError: a grid that the library does not have.
        InputError: a weight whose scale does not fit float16.
    """
    functional = require_bitsandbytes()
    work = weight.float()
    if support is not None:
        work = torch.where(support, work, 0.0)
    if grid.codebook == "integer":
        if grid.bits != 8:
            raise RecipeError(f"bitsandbytes has nf4, fp4 and int8, not int{grid.bits}.")
        return _int8(functional, work, grid)
    if grid.group not in BLOCKS:
        raise RecipeError(f"bitsandbytes has blocks of {', '.join(map(str, BLOCKS))}, not {grid.group}.")
    return _four_bit(functional, work, grid)


def _four_bit(functional: Any, work: Float[Tensor, "inputs outputs"], grid: Grid) -> Quantized:
    inputs, outputs = work.shape
    groups = grid.groups(inputs)
    rows = torch.nn.functional.pad(work.T, (0, groups * grid.group - inputs))
    blocks, scales = _fitted(rows.reshape(outputs, groups, grid.group), 1.0)
    flat = blocks.reshape(outputs, -1).contiguous()
    packed, state = functional.quantize_4bit(
        flat, blocksize=grid.group, quant_type=grid.codebook, compress_statistics=False
    )
    absmax = state.absmax.float().view(outputs, groups)
    if not torch.equal(absmax, scales.float()):
        raise InputError("bitsandbytes chose other scales than the largest weight of each block: update it.")
    codes = packed.view(-1)
    both = torch.stack((codes >> 4, codes & 15), dim=1).view(outputs, -1)[:, :inputs].to(torch.int8)
    integers = both - 7 if grid.codebook == "nf4" else torch.where(both < 8, both, 8 - both)
    return Quantized(integers.T.contiguous(), scales.T.contiguous(), grid)


def _int8(functional: Any, work: Float[Tensor, "inputs outputs"], grid: Grid) -> Quantized:
    outputs = work.shape[1]
    rows, scales = _fitted(work.T.reshape(outputs, 1, -1), 127.0)
    integers, absmax, _ = functional.int8_vectorwise_quant(rows.view(outputs, -1).contiguous())
    if not torch.equal(absmax.float(), 127.0 * scales.float().view(-1)):
        raise InputError("bitsandbytes chose other scales than the largest weight of each output: update it.")
    repeated = scales.T.expand(grid.groups(work.shape[0]), outputs)
    return Quantized(integers.T.contiguous(), repeated.contiguous(), grid)


def _fitted(
    blocks: Float[Tensor, "outputs groups size"], steps: float
) -> tuple[Float[Tensor, "outputs groups size"], Tensor]:
    """Blocks whose largest magnitude is `steps` times a float16, and that float16."""
    largest = blocks.abs().amax(2, keepdim=True)
    if float(largest.max()) / steps > _LARGEST:
        raise InputError(
            f"A weight of {float(largest.max()):.3g} needs a scale beyond float16 ({_LARGEST:.0f}): the "
            "checkpoint holds a value that no format here can store."
        )
    scale = (largest / steps).half()
    limit = scale.float() * steps
    clipped = torch.minimum(torch.maximum(blocks, -limit), limit)
    return torch.where(blocks.abs() == largest, blocks.sign() * limit, clipped), scale[:, :, 0]
