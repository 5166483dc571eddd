"""Gradients at every matrix of a model, block by block: one block's weights in memory, and the inputs of all blocks.

Forwards the hidden states in front of every block are kept. Behind the last block the model's own code gives an output,
and a scalar of it its gradient. Backwards each block is loaded once more, run on its kept input with gradients switched
on, and asked for those at its products and at its input, which is the output of the block before.

Who wants to know what the tables do is told by a `TableWatch`: of the output head its input and the gradient of its
output, and of the token table the ids and the gradients of their rows, through whatever stands before the first block.

This needs blocks that hand nothing to each other but hidden states. A model that does otherwise is noticed: what
a block gives is then not what the next one was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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


@runtime_checkable
class TableWatch(Protocol):
    """Who is told what the tables of a model do to the scalars: all batches at the head, then all at the rows."""

    def head(
        self, batch: int, values: Float[Tensor, "rows hidden"], gradients: Sequence[Float[Tensor, "rows out"]]
    ) -> None:
        """What the output head multiplied in a batch, and the gradient of each scalar at what came out."""
        ...

    def rows(
        self, batch: int, ids: Int[Tensor, " rows"], gradients: Sequence[Float[Tensor, "rows hidden"]]
    ) -> None:
        """Which rows of the token table a batch read, and the gradient of each scalar at every one of them.

        Not called for a model that does not look rows up before its first block.
        """
        ...


def products_backwards(
    source: ModelSource,
    batches: Sequence[Batch],
    scalar: Scalar,
    *,
    draws: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    step: Callable[[], None] = lambda: None,
    watch: TableWatch | None = None,
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
        watch: told of the tables: of the head before the first block is given, of the rows behind the last.

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
        behind = stream.finish_with(
            lambda output, batch: [scalar(output, batch) for _ in range(draws)],
            None if watch is None else watch.head,
        )
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
    if watch is not None and source.layout.embedding is not None:
        table = model.get_submodule(source.layout.embedding).weight
        for number, (batch, hidden) in enumerate(zip(batches, gradients, strict=True)):
            found_rows = _at_the_table(model, blocks[0], table, batch, hidden)
            if found_rows is not None:
                watch.rows(number, found_rows.ids, found_rows.gradients)


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


@dataclass(frozen=True)
class _Rows:
    """What was looked up, and the gradient of every scalar at each of the rows."""

    ids: Tensor
    gradients: list[Tensor]


class _Reached(Exception):
    """Leaves a model in front of its first block, with the hidden states there."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _LookedUp(TorchFunctionMode):
    """Sees which rows of a table are looked up, and lets gradients end there."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self._table = table
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        result = function(*args, **(kwargs or {}))
        if function is nn.functional.embedding and args[1] is self._table:
            result = result.detach().requires_grad_(True)
            self.seen.append((args[0], result))
        return result


def _at_the_table(
    model: Any, block: str, table: Tensor, batch: Batch, gradients: Sequence[Tensor]
) -> _Rows | None:
    """Rows that a model looks up before its first block, from the gradients at the block's input; None without any.

    What stands before the first block is run once more, now with gradients.
    """

    def reached(*args: Any, **kwargs: Any) -> Any:
        raise _Reached(hidden_of(Given(args, kwargs)))

    module = model.get_submodule(block)
    module.forward, mode = reached, _LookedUp(table)
    try:
        with torch.enable_grad(), mode:
            model(**batch.arguments)
    except _Reached as stopped:
        hidden = stopped.hidden
    finally:
        del module.forward
    if not mode.seen:
        return None
    ids = torch.cat([one.flatten() for one, _ in mode.seen])
    width = table.shape[-1]
    found = []
    for number, gradient in enumerate(gradients):
        parts = torch.autograd.grad(
            hidden,
            [rows for _, rows in mode.seen],
            gradient.view_as(hidden),
            retain_graph=number + 1 < len(gradients),
        )
        found.append(torch.cat([part.reshape(-1, width) for part in parts]))
    return _Rows(ids, found)
