"""Gradients at every matrix of a model, block by block: one block's weights in memory, and the inputs of all blocks.

Forwards, what every block is called with and what it gives is kept, and what the model's own code does in between
keeps what gradients need: it is little. Behind the last block the model gives an output, and a scalar of it its
gradient at everything that blocks gave. Backwards each block is loaded once more, run on what it was called with,
gradients switched on, and asked for those at its products and at its inputs, which lead on to the blocks before.

So whatever blocks hand to each other is followed: hidden states, or what a decoder hears of an encoder. Who wants to
know what the tables do is told by a `TableWatch`: of the output head its input and the gradient of its output, and of
the token table the ids and the gradients of their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.models.block_run import Given, hidden_of, outputs_of
from compot_deploy.models.sites import Products
from compot_deploy.models.skeleton import unload
from compot_deploy.models.source import ModelSource
from compot_deploy.models.streaming import BlockStream
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


@dataclass
class Flow:
    """One batch on its way back.

    Attributes:
        given: what each block was called with.
        left: what each block gave: leaves of what stands in `given` of later blocks.
        rows: ids of rows of the token table that were looked up between blocks, and the rows: leaves as well.
        gradients: of each draw's scalar at these leaves, by draw and identity of the leaf.
    """

    given: list[Given] = field(default_factory=list)
    left: list[list[Tensor]] = field(default_factory=list)
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    gradients: list[dict[int, Tensor]] = field(default_factory=list)

    def add(
        self, draw: int, value: Tensor, gradient: Tensor | None = None, also: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        """Follow a gradient at a value back to the leaves that it was computed of; returns it at others as well."""
        leaves = [*(leaf for block in self.left for leaf in block), *(rows for _, rows in self.rows)]
        if not leaves:
            return (None,) * len(also)
        parts = torch.autograd.grad(value, [*leaves, *also], gradient, retain_graph=True, allow_unused=True)
        known = self.gradients[draw]
        for leaf, part in zip(leaves, parts, strict=False):
            if part is not None:
                known[id(leaf)] = known[id(leaf)] + part if id(leaf) in known else part
        return parts[len(leaves) :]


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
        UnsupportedModelError: a block gives something else when it is run again.
    """
    blocks = source.layout.blocks
    flows = [Flow(gradients=[{} for _ in range(draws)]) for _ in batches]
    with BlockStream(source, batches, device=device, dtype=dtype, finish=True, differentiates=True) as stream:
        run_forwards(stream, flows, len(blocks), step)
        numbers = iter(range(len(flows)))

        def behind(
            output: Tensor, batch: Batch, left: list[Tensor], head: tuple[Tensor, Tensor] | None
        ) -> None:
            number = next(numbers)
            flow = flows[number]
            flow.left.append(left)
            flow.rows = stream.looked_up(number)
            products = () if head is None or watch is None else head[1:]
            parts = [flow.add(draw, scalar(output, batch), also=products) for draw in range(draws)]
            if watch is not None and head is not None and products:
                values, product = head
                outs = [found for (found,) in parts if found is not None]
                watch.head(
                    number,
                    values.detach().reshape(-1, values.shape[-1]),
                    [found.reshape(-1, product.shape[-1]) for found in outs],
                )

        stream.finish_with(behind)
        step()
        model, batches = stream.model, stream.batches
    for block in reversed(blocks):
        source.load(model, block, device=torch.device(device), dtype=getattr(torch, dtype))
        found: list[Product] = []
        for flow, batch in zip(flows, batches, strict=True):
            found += _through(model, block, flow, batch)
        unload(model.get_submodule(block))
        step()
        yield block, found
    if watch is not None:
        for number, flow in enumerate(flows):
            rows = [
                (ids, leaf) for ids, leaf in flow.rows if all(id(leaf) in known for known in flow.gradients)
            ]
            if rows:
                ids = torch.cat([ids.flatten() for ids, _ in rows])
                at_rows = [
                    torch.cat([known[id(leaf)].reshape(-1, leaf.shape[-1]) for _, leaf in rows])
                    for known in flow.gradients
                ]
                watch.rows(number, ids, at_rows)


def run_forwards(stream: BlockStream, flows: Sequence[Flow], blocks: int, step: Callable[[], None]) -> None:
    """Run all blocks but the last one, and keep in the flows what each is called with and gives."""
    for number in range(blocks):
        for flow, given in zip(flows, stream.given(), strict=True):
            flow.given.append(given)
        if number == blocks - 1:
            return
        stream.advance(capture=False)
        for flow, left in zip(flows, stream.left(), strict=True):
            flow.left.append(left)
        step()


@dataclass(frozen=True)
class Rerun:
    """A block that was run once more, with gradients.

    Attributes:
        before: what it was called with, where gradients go on from there.
        own: the leaves that stood in their place.
        outputs: what it gave.
        left: the leaves that stand for it in what came afterwards.
    """

    before: list[Tensor]
    own: list[Tensor]
    outputs: list[Tensor]
    left: list[Tensor]

    def reached(self, known: dict[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Outputs that a scalar depends on, with its gradients there, which are taken from what is known.

        What depends on no matrix, a table of relative positions for example, leads no further.
        """
        pairs = [
            (output, known.pop(id(leaf)))
            for output, leaf in zip(self.outputs, self.left, strict=True)
            if id(leaf) in known
        ]
        return [(output, gradient) for output, gradient in pairs if output.requires_grad]


def run_again(module: Any, block: str, flow: Flow) -> Rerun:
    """Run the last block of a flow, which is taken off it, on what it was called with.

    Raises:
        UnsupportedModelError: it gives something else.
    """
    given, left = flow.given.pop(), flow.left.pop()
    hidden = hidden_of(given)
    before = [value for value in given.tensors if value.requires_grad or value is hidden]
    own = {id(value): value.detach().requires_grad_(True) for value in before}
    args, kwargs = given.replaced(own)
    with torch.enable_grad():
        outputs = outputs_of(module(*args, **kwargs))
    for output, leaf in zip(outputs, left, strict=True):
        if output.shape != leaf.shape or not torch.allclose(output.detach(), leaf, rtol=1e-3, atol=1e-3):
            raise UnsupportedModelError(f"{block} gives something else when it is run again.")
    return Rerun(before, list(own.values()), outputs, left)


def _through(model: Any, block: str, flow: Flow, batch: Batch) -> list[Product]:
    """Gradients at the products of the last block of a flow, which is taken off it; those at its inputs go on."""
    module = model.get_submodule(block)
    mode = Products(module, block, keep_products=True)
    with mode:
        again = run_again(module, block, flow)
    seen = [one for one in mode.seen if one.product is not None and one.product.requires_grad]
    wanted = [*again.own, *(one.product for one in seen if one.product is not None)]
    texts = batch.real.shape[0]
    found: list[Product] = []
    for draw, known in enumerate(flow.gradients):
        reached = again.reached(known)
        if not reached:
            continue
        values, gradients = zip(*reached, strict=True)
        parts = torch.autograd.grad(values, wanted, gradients, retain_graph=True, allow_unused=True)
        for value, part in zip(again.before, parts, strict=False):
            if part is not None and value.requires_grad:
                flow.add(draw, value, part)
        for one, part in zip(seen, parts[len(again.before) :], strict=True):
            if part is not None:
                found.append(Product(one.site.name, _by_text(one.values, texts), _by_text(part, texts)))
    return found


def _by_text(values: Tensor, texts: int) -> Tensor:
    rows = values.detach().reshape(-1, values.shape[-1])
    return rows.reshape(texts if len(rows) % texts == 0 else 1, -1, rows.shape[-1])
