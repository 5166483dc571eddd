"""The original and a model that is being compressed, block by block and input by input, on the same text.

Both stand in front of the same block. For every input of it, in running order, both are run as far as what reads it:
what the compressed model has there, what the original had, and what a residual stream lacks by then, are summed. Then
the matrices that read it are replaced, and the next input of the block already feels them. Experts come last and all at
once, each for the tokens that the compressed model sends to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from compot_deploy.cluster import ALONE, Workers
from compot_deploy.errors import UnsupportedModelError
from compot_deploy.models.block_run import (
    BlockAtWork,
    Given,
    Part,
    add_grams,
    at_work,
    fill_unreached,
    hidden_of,
    outputs_of,
    run_part,
)
from compot_deploy.models.experts import same_place
from compot_deploy.models.sites import (
    MULTIPLIED_AT_ONCE,
    Gram,
    InputGroup,
    Products,
    Seen,
    Site,
    add_gram,
    real_rows,
)
from compot_deploy.models.source import ModelSource
from compot_deploy.models.streaming import BlockStream
from compot_deploy.models.tasks import Batch


@dataclass(frozen=True)
class Disturbed:
    """An input of the compressed model, X', beside the original's, X.

    Attributes:
        gram: ``X'ᵀX'``.
        cross: ``X'ᵀX``; None where `lacking` says more, and where rows of both are not the same tokens.
        lacking: of a matrix W that adds to the residual stream: ``X'ᵀ(R + XW − X'W)``, R what the stream lacks before.
    """

    gram: Gram
    cross: Float64[Tensor, "inputs inputs"] | None
    lacking: Float64[Tensor, "inputs outputs"] | None


Make: TypeAlias = Callable[[InputGroup, Disturbed], Mapping[str, Tensor]]
"""An input, to the weights (in, out) that take the place of all that read it, by site name."""


class SideBySide:
    """Two streams of one model; use it in a ``with`` statement.

    Args:
        source: the model.
        batches: what both read.
        device: where they run.
        dtype: of weights and activations.
        workers: who runs the blocks.
    """

    def __init__(
        self,
        source: ModelSource,
        batches: Sequence[Batch],
        *,
        device: str = "cpu",
        dtype: str = "float32",
        workers: Workers = ALONE,
    ) -> None:
        self._source, self._workers, self._dtype = source, workers, getattr(torch, dtype)
        model = source.skeleton(device=torch.device(device), dtype=self._dtype, head=False)
        # Tables are read by both, and held once.
        twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        self._original, self._changed = (
            BlockStream(source, batches, device=device, dtype=dtype, workers=workers, model=one)
            for one in (model, twin)
        )

    def __enter__(self) -> SideBySide:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End both."""
        self._original.close()
        self._changed.close()

    def advance(self, make: Make) -> None:
        """Replace the matrices of the next block, input by input, and move both models through it."""
        path, original = self._original.open_next()
        _, changed = self._changed.open_next()
        groups = self._source.layout.of(path)
        first = next(self._original.parts())
        writers = writers_of(at_work(original, path, (), goes_on=True), groups, first.given[0])
        apart = [group for group in groups if same_place(group.sites[0].name) is not None]
        for number, group in enumerate(groups):
            if group in apart:
                continue
            own = [site for one in groups[: number + 1] for site in one.sites if site in writers]
            weights = make(group, self._disturbed(original, changed, path, group, own))
            self._source.replace(changed, path, weights, dtype=self._dtype)
        if apart:
            self._replace_experts(changed, path, apart, make)
        self._original.run_through()
        self._changed.run_through()

    def _replace_experts(
        self, changed: nn.Module, path: str, groups: Sequence[InputGroup], make: Make
    ) -> None:
        """All experts from one run: both models send other tokens to them, so there is nothing to compare."""
        grams: dict[str, Gram] = {}
        work = at_work(changed, path, groups, goes_on=False)
        for ran in self._workers.map(run_part, work, self._changed.parts()):
            add_grams(grams, ran.grams)
        fill_unreached(grams, groups)
        for group in groups:
            known = grams.get(group.name)
            gram = _nothing(group) if known is None else Gram(known.matrix.cpu(), known.tokens)
            weights = make(group, Disturbed(gram, None, None))
            self._source.replace(changed, path, weights, dtype=self._dtype)

    def pass_over(self, weights: Mapping[str, Tensor]) -> None:
        """Move both models through the next block, whose matrices were made before."""
        path, _ = self._original.open_next()
        _, changed = self._changed.open_next()
        self._source.replace(changed, path, weights, dtype=self._dtype)
        self._original.run_through()
        self._changed.run_through()

    def _disturbed(
        self, original: nn.Module, changed: nn.Module, path: str, group: InputGroup, writers: Sequence[Site]
    ) -> Disturbed:
        work = Pair(
            at_work(original, path, (), goes_on=False),
            at_work(changed, path, (), goes_on=False),
            group,
            tuple(writers) if group.sites[0] in writers else (),
        )
        sums = _Sums(_nothing(group))
        for found in self._workers.map(run_pair, work, self._pairs()):
            sums.add(found)
        return sums.total()

    def _pairs(self) -> Iterator[PairOfParts]:
        for one, other in zip(self._original.parts(), self._changed.parts(), strict=True):
            yield PairOfParts(one, other)


@dataclass(frozen=True)
class Pair:
    """A block of both models at work.

    Attributes:
        original: with the original's weights.
        changed: with those that were made up to now.
        group: the input that is looked at.
        writers: sites that have added to the residual stream up to what reads it, itself the last; none where it does
            not add to one.
    """

    original: BlockAtWork
    changed: BlockAtWork
    group: InputGroup
    writers: tuple[Site, ...]


@dataclass(frozen=True)
class PairOfParts:
    """The same batches in front of both."""

    original: Part
    changed: Part


@dataclass(frozen=True)
class PartOfSums:
    """What some batches say; see `Disturbed`. Without `comparable` there is a Gram alone."""

    gram: Gram | None
    cross: Tensor | None
    lacking: Tensor | None
    comparable: bool


def run_pair(work: Pair, pair: PairOfParts) -> PartOfSums:
    """Run a block of both models on some batches, up to what reads an input."""
    site, grams = work.group.sites[0], dict[str, Gram]()
    total: Tensor | None = None
    comparable = True
    for one, other, masks in zip(pair.original.given, pair.changed.given, pair.changed.masks, strict=True):
        before, after = _run_until(work.original, one, site), _run_until(work.changed, other, site)
        if not (before and after):  # not asked for these texts
            comparable = False
            continue
        reads = [seen[-1].values for seen in (before, after)]
        rows = real_rows(reads[1], *masks)
        add_gram(grams, site.name, rows)
        comparable = comparable and _token_by_token(reads[0], reads[1], masks)
        if not comparable:
            continue
        asked = real_rows(reads[0], *masks)
        if work.writers:
            lacks = hidden_of(one) - hidden_of(other)
            for writer in work.writers:
                lacks = lacks + (_product(before, writer) - _product(after, writer)).reshape(lacks.shape)
            asked = real_rows(lacks, *masks)
        total = _add_product(total, rows, asked)
    gram = grams.get(site.name)
    if not comparable or total is None:
        return PartOfSums(gram, None, None, comparable)
    cross, lacking = (None, total) if work.writers else (total, None)
    return PartOfSums(gram, cross, lacking, comparable)


def writers_of(work: BlockAtWork, groups: Sequence[InputGroup], given: Given) -> frozenset[Site]:
    """Sites whose outputs a block adds to what it is called with; none where it gives something else than that sum.

    Found by running it: the sum is compared with what it gives. Where something stands between the two (a norm, a
    factor), there are none.
    """
    mode = Products(work.block, work.path, keep_products=True)
    with torch.no_grad(), mode:
        outputs = outputs_of(work.block.forward(*given.args, **given.kwargs))
    try:
        hidden = hidden_of(given)
    except UnsupportedModelError:
        return frozenset()
    alone = {group.sites[0] for group in groups if len(group.sites) == 1}
    found = [
        one
        for one in mode.seen
        if one.site in alone
        and one.product is not None
        and one.site.outputs == hidden.shape[-1]
        and one.product.numel() == hidden.numel()
    ]
    if not outputs or not found or len({one.site for one in found}) != len(found):
        return frozenset()
    total = hidden.float()
    for one in found:
        assert one.product is not None
        total = total + one.product.reshape(hidden.shape).float()
    if total.shape != outputs[0].shape:
        return frozenset()
    error, size = (total - outputs[0].float()).square().mean(), outputs[0].float().square().mean()
    return frozenset(one.site for one in found) if bool(error <= 1e-6 * size) else frozenset()


class _Sums:
    """Parts of sums, one after the other."""

    def __init__(self, gram: Gram) -> None:
        self._gram = gram
        self._rest: dict[str, Tensor] = {}
        self._comparable = True

    def add(self, part: PartOfSums) -> None:
        """Add a part."""
        self._comparable = self._comparable and part.comparable
        if part.gram is not None:
            tokens = self._gram.tokens + part.gram.tokens
            self._gram = Gram(self._gram.matrix.add_(part.gram.matrix.cpu()), tokens)
        for name, value in (("cross", part.cross), ("lacking", part.lacking)):
            if value is not None:
                value = value.cpu()
                self._rest[name] = self._rest[name].add_(value) if name in self._rest else value

    def total(self) -> Disturbed:
        """Of all parts."""
        rest = self._rest if self._comparable else {}
        return Disturbed(self._gram, rest.get("cross"), rest.get("lacking"))


def _nothing(group: InputGroup) -> Gram:
    inputs = group.sites[0].inputs
    return Gram(torch.zeros(inputs, inputs, dtype=torch.float64), 0)


class _Reached(BaseException):
    """Unwinds a block whose rest is not wanted."""


class _Until(Products):
    """Sees products up to that of one site, and ends the run there."""

    def __init__(self, work: BlockAtWork, last: Site) -> None:
        super().__init__(work.block, work.path, keep_products=True)
        self._last = last

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        result = super().__torch_function__(function, types, args, kwargs)
        if self.seen and self.seen[-1].site == self._last:
            raise _Reached
        return result


def _run_until(work: BlockAtWork, given: Given, site: Site) -> list[Seen]:
    """All products up to that of a site; none where it is not asked."""
    mode = _Until(work, site)
    try:
        with torch.no_grad(), mode:
            work.block.forward(*given.args, **given.kwargs)
    except _Reached:
        return mode.seen
    return []


def _product(seen: Sequence[Seen], site: Site) -> Tensor:
    (found,) = [one.product for one in seen if one.site == site]
    assert found is not None
    return found


def _token_by_token(one: Tensor, other: Tensor, masks: Sequence[Tensor]) -> bool:
    """Whether rows of two inputs belong to the same places of the text."""
    if one.shape != other.shape:
        return False
    rows = one.shape[:-1].numel()
    return any(rows == real.numel() or (one.dim() > 2 and len(one) == len(real)) for real in masks)


def _add_product(
    total: Tensor | None, rows: Float[Tensor, "rows inputs"], asked: Float[Tensor, "rows outputs"]
) -> Float64[Tensor, "inputs outputs"]:
    if total is None:
        total = rows.new_zeros(rows.shape[1], asked.shape[1], dtype=torch.float64)
    for one, other in zip(rows.split(MULTIPLIED_AT_ONCE), asked.split(MULTIPLIED_AT_ONCE), strict=True):
        total += one.float().T @ other.float()
    return total
