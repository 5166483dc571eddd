"""Gradients at every matrix of a model, block by block: one block's weights in memory, and the inputs of all blocks.

Forwards the hidden states in front of every block are kept. Behind the last block the model's own code gives an output,
and a scalar of it its gradient. Backwards each block is loaded once more, run on its kept input with gradients switched
on, and asked for those at its products and at its input, which is the output of the block before.

This needs blocks that hand nothing to each other but hidden states. A model that does otherwise is noticed: what
a block gives is then not what the next one was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.models.sites import Products
from compot_deploy.models.source import ModelSource
from compot_deploy.models.streaming import BlockStream, Given, hidden_of, output_of
from compot_deploy.models.tasks import Batch

Scalar = Callable[[Tensor, Batch], Tensor]
"""Output of the model for a batch → what is differentiated."""


@dataclass(frozen=True)
class Product:
    """What one matrix multiplied, and what its output did to a scalar.

    Attributes:
        name: of the matrix.
        values: its inputs, text by text.
        gradient: of the scalar with respect to its outputs.
    """

    name: str
    values: Float[Tensor, "texts rows inputs"]
    gradient: Float[Tensor, "texts rows outputs"]


def products_backwards(
    source: ModelSource,
    batches: Sequence[Batch],
    scalar: Scalar,
    *,
    draws: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    step: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, list[Product]]]:
    """Block after block, the last one first: its products, for every batch and every draw of the scalar.

    Args:
        source: the model.
        batches: what it reads.
        scalar: called `draws` times for each batch.
        draws: how many gradients are taken of each batch.
        device: where to compute.
        dtype: of weights and activations.
        step: called after every block, forwards and backwards.

    Raises:
        UnsupportedModelError: the model's blocks hand each other more than hidden states.
    """
    blocks = source.layout.blocks
    given: list[list[Given]] = []
    with BlockStream(source, batches, device=device, dtype=dtype, finish=True) as stream:
        for _ in blocks[:-1]:
            given.append(stream.given())
            stream.advance(capture=False)
            step()
        given.append(stream.given())
        behind = stream.finish_with(lambda output, batch: [scalar(output, batch) for _ in range(draws)])
        step()
        model, batches = stream.model, stream.batches
    gradients = [one.gradients for one in behind]
    after = [one.hidden for one in behind]
    for block, inputs in zip(reversed(blocks), reversed(given), strict=True):
        source.load(model, block, device=torch.device(device), dtype=getattr(torch, dtype))
        found: list[Product] = []
        for number, (entry, batch) in enumerate(zip(inputs, batches, strict=True)):
            hidden, products = _through(model, block, entry, after[number], gradients[number], batch)
            after[number], gradients[number] = hidden_of(entry), hidden
            found += products
        source.unload(model.get_submodule(block))
        step()
        yield block, found


def _through(
    model: Any, block: str, given: Given, after: Tensor, gradients: Sequence[Tensor], batch: Batch
) -> tuple[list[Tensor], list[Product]]:
    """Gradients at the input of a block and at its products, from those at its output."""
    module = model.get_submodule(block)
    mode = Products(module, block, keep_products=True)
    hidden = hidden_of(given).detach().requires_grad_(True)
    args, kwargs = given.replaced(hidden)
    with torch.enable_grad(), mode:
        result = module(*args, **kwargs)
    output = output_of(result)
    if output.shape != after.shape or not torch.allclose(output.detach(), after, rtol=1e-3, atol=1e-3):
        raise UnsupportedModelError(f"What {block} gives is not what the block behind it is given.")
    seen = [one for one in mode.seen if one.product is not None and one.product.requires_grad]
    wanted = [hidden, *(one.product for one in seen if one.product is not None)]
    found: list[Product] = []
    before: list[Tensor] = []
    for number, gradient in enumerate(gradients):
        parts = torch.autograd.grad(
            output, wanted, gradient, retain_graph=number + 1 < len(gradients), allow_unused=True
        )
        before.append(torch.zeros_like(hidden) if parts[0] is None else parts[0])
        texts = batch.real.shape[0]
        for one, part in zip(seen, parts[1:], strict=True):
            if part is not None:
                found.append(Product(one.site.name, _by_text(one.values, texts), _by_text(part, texts)))
    return before, found


def _by_text(values: Tensor, texts: int) -> Tensor:
    rows = values.detach().reshape(-1, values.shape[-1])
    return rows.reshape(texts if len(rows) % texts == 0 else 1, -1, rows.shape[-1])
