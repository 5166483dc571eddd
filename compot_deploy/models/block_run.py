"""One block run on a part of the batches: a pure function of the block and of what it is called with.

The parts are the same however many there are to run them, and what is summed is summed within a part first and then
part after part. So Grams are the same to the last bit, whoever computes them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.models.experts import same_place
from compot_deploy.models.sites import Gram, InputGroup, Products, add_gram, real_rows

PARTS: Final = 8
"""Of all batches, at most. Each has Grams of its own for a while, and so many machines can calibrate at a time."""

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Given:
    """What a block is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def replaced(self, others: Mapping[int, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with other tensors, by the identity of those in whose place they stand."""
        args = tuple(others.get(id(value), value) for value in self.args)
        return args, {name: others.get(id(value), value) for name, value in self.kwargs.items()}

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of numbers among its arguments, each once."""
        found = {id(value): value for value in (*self.args, *self.kwargs.values()) if has_numbers(value)}
        return list(found.values())


def has_numbers(value: Any) -> bool:
    """Whether something is a tensor of numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def hidden_of(given: Given) -> Tensor:
    """The hidden states that a block is called with: its first argument."""
    found = given.args[0] if given.args else given.kwargs.get("hidden_states")
    if not isinstance(found, Tensor):
        raise UnsupportedModelError(
            "A block that is not called with hidden states first has no gradients here."
        )
    return found


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors of numbers that a block gives: its result, or those of several."""
    return [value for value in (result if isinstance(result, tuple) else (result,)) if has_numbers(value)]


@dataclass(frozen=True)
class BlockAtWork:
    """A block with its weights, and what is looked for.

    Attributes:
        block: to run.
        path: of it.
        groups: inputs whose Grams are collected.
        goes_on: whether what it gives is wanted.
    """

    block: nn.Module
    path: str
    groups: tuple[InputGroup, ...]
    goes_on: bool


@dataclass(frozen=True)
class Part:
    """Some batches in front of a block.

    Attributes:
        given: what the block is called with, for each.
        masks: which of its tokens are text, for each: see `compot_deploy.models.tasks.Batch.masks`.
    """

    given: tuple[Given, ...]
    masks: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class Ran:
    """What came of a part.

    Attributes:
        results: of each batch, where they are wanted.
        grams: by name of the input group.
    """

    results: list[Any] = field(default_factory=list)
    grams: dict[str, Gram] = field(default_factory=dict)


def at_work(block: nn.Module, path: str, groups: Sequence[InputGroup], *, goes_on: bool) -> BlockAtWork:
    """A block as its class runs it, whatever stands in the place of its forward pass."""
    bare = copy.copy(block)
    bare.__dict__.pop("forward", None)
    return BlockAtWork(bare, path, tuple(groups), goes_on)


def parts_of(entries: Sequence[Entry]) -> list[Sequence[Entry]]:
    """Batches in parts that follow each other, as even as can be."""
    count = min(PARTS, len(entries))
    ends = [len(entries) * number // count for number in range(count + 1)] if count else []
    return [entries[start:end] for start, end in pairwise(ends)]


def run_part(work: BlockAtWork, part: Part) -> Ran:
    """Run a block on some batches."""
    ran = Ran()
    for given, masks in zip(part.given, part.masks, strict=True):
        mode = Products(work.block, work.path)
        with torch.no_grad(), mode:
            result = work.block.forward(*given.args, **given.kwargs)
        add_seen(ran.grams, work.groups, mode, work.path, masks)
        if work.goes_on:
            ran.results.append(result)
    return ran


def add_seen(
    sums: dict[str, Gram],
    groups: Sequence[InputGroup],
    mode: Products,
    path: str,
    masks: Sequence[Tensor],
) -> None:
    """Add what one batch showed of a block; every group by its first site, which other sites of the group read too."""
    firsts = {group.sites[0]: group.name for group in groups}
    for seen, values in mode.groups(path) if firsts else ():
        for site in seen.sites:
            if site in firsts:
                add_gram(sums, firsts[site], real_rows(values, *masks))


def fill_unreached(grams: dict[str, Gram], groups: Sequence[InputGroup]) -> None:
    """Give inputs of experts that no token reached what their neighbours read: the sum of their Grams, of 0 tokens."""
    reached = [
        (same_place(group.sites[0].name), grams[group.name]) for group in groups if group.name in grams
    ]
    for group in groups:
        place = same_place(group.sites[0].name)
        neighbours = [gram.matrix for other, gram in reached if other == place]
        if group.name not in grams and place is not None and neighbours:
            grams[group.name] = Gram(torch.stack(neighbours).sum(0), 0)


def add_grams(sums: dict[str, Gram], more: Mapping[str, Gram]) -> None:
    """Add the Grams of a part to those of the parts before it, in place."""
    for name, gram in more.items():
        known = sums.get(name)
        total = gram.matrix if known is None else known.matrix.add_(gram.matrix)
        sums[name] = Gram(total, gram.tokens + (known.tokens if known else 0))
