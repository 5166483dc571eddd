"""A model run block by block: one block's weights in memory, whatever the model.

A forward pass is a coroutine that pauses in front of every block. All batches stand in front of block i; it is loaded,
run on every batch under a mode that sees its products, replaced where the caller wants, run again, dropped; then i + 1.
Masks, positions, rotary embeddings and encoder states are made by the model's own code: nothing of it is rebuilt here.

Each pass runs in a thread of its own, but never two at a time: threads stand in for coroutines that torch modules,
which know nothing of ``yield``, cannot be.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compot_deploy.cluster import ALONE, Workers
from compot_deploy.core.memory import give_back_freed_memory
from compot_deploy.models.block_run import (
    Given,
    Part,
    add_grams,
    add_seen,
    at_work,
    fill_unreached,
    outputs_of,
    parts_of,
    run_part,
)
from compot_deploy.models.sites import Gram, Products, add_gram, real_rows
from compot_deploy.models.skeleton import unload
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tasks import Batch

Replacements: TypeAlias = Callable[[Mapping[str, Gram]], Mapping[str, Tensor]]
"""Grams of a block, by name of the input group, to the weights (in, out) that it goes on with, by site name."""


_HEAD: Final = "head"

Finish: TypeAlias = Callable[[Tensor, Batch, list[Tensor], tuple[Tensor, Tensor] | None], None]
"""Output of a batch, what the last block gave, and what the head multiplied and gave."""


class BlockStream:
    """Runs a model over batches one block after the other.

    Call `advance` for block 0, 1, 2 …; each call moves all batches through one block. A caller that wants later
    blocks to see compressed earlier ones passes the replaced weights. Use it in a ``with`` statement, or call
    `close`: passes that stand in the middle of the model are ended then.

    Args:
        source: the model.
        batches: what it reads.
        device: where it runs.
        dtype: of weights and activations.
        finish: also run what comes behind the last block, head included; see `outputs`.
        at_head: given the Gram of what the output head reads, as soon as all batches have come there; None where the
            model has not asked its head. The head itself is not run. Not for a stream that finishes.
        differentiates: keep what gradients need of everything that the model does between its blocks; see `left`.
        heard: given the number of each batch and what the output head reads of it, where `at_head` is given.
        workers: who runs the blocks, where the stream does not finish.
        model: skeleton to run, of this source, device and type; None makes one.
    """

    def __init__(
        self,
        source: ModelSource,
        batches: Sequence[Batch],
        *,
        device: str = "cpu",
        dtype: str = "float32",
        finish: bool = False,
        at_head: Callable[[Gram | None], None] | None = None,
        heard: Callable[[int, Tensor], None] | None = None,
        differentiates: bool = False,
        workers: Workers = ALONE,
        model: Any = None,
    ) -> None:
        self._workers = workers
        self._source, self._finish, self._differentiates = source, finish, differentiates
        self._at_head = None if finish or source.layout.head is None else at_head
        self._head: dict[str, Gram] = {}
        self._heard = heard
        self._device, self._dtype = torch.device(device), getattr(torch, dtype)
        self._model = model
        if model is None:
            self._model = source.skeleton(device=self._device, dtype=self._dtype, head=finish)
        self._batches = [batch.to(self._device) for batch in batches]
        self._passes: list[_Pass] = []
        self._next = 0

    def __enter__(self) -> BlockStream:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all passes."""
        self.close()

    def advance(self, *, capture: bool = True, replacements: Replacements | None = None) -> dict[str, Gram]:
        """Run the next block over every batch.

        Args:
            capture: collect Grams; without, only the hidden states move on.
            replacements: makes, from the Grams, weights that take the place of the original's *after* the Grams
                were taken, so what flows on is the output of the compressed block.

        Returns:
            Name of the input group to Gram; empty without `capture`.

        Raises:
            InputError: the weights of the block are damaged.
        """
        path, block = self.open_next()
        # A model without blocks is one itself, and ends where a pass is: it is run there.
        run = self._run_here if self._finish or not path else self._run_in_parts
        grams = run(block, path, capture, replacements is None)
        if capture:
            fill_unreached(grams, self._source.layout.of(path))
        if replacements is not None:
            weights = replacements({name: _on_cpu(gram) for name, gram in grams.items()})
            self._source.replace(block, path, weights, dtype=self._dtype)
            run(block, path, False, True)
        self._leave(block)
        return {name: _on_cpu(gram) for name, gram in grams.items()}

    def open_next(self) -> tuple[str, nn.Module]:
        """Load the block that all batches stand in front of; its path, and itself.

        Raises:
            InputError: the weights of the block are damaged.
        """
        if not self._passes:
            self._start()
        path = self._source.layout.blocks[self._next]
        block = self._model.get_submodule(path)
        self._source.load(self._model, path, device=self._device, dtype=self._dtype)
        for one in self._passes:
            if one.at != path:
                raise RuntimeError(f"A batch stands in front of {one.at!r} where {path!r} was expected.")
        return path, block

    def parts(self) -> Iterator[Part]:
        """The batches in front of the block, in parts, with what it is going to be called with."""
        for part in parts_of(list(zip(self._passes, self._batches, strict=True))):
            yield Part(tuple(one.given for one, _ in part), tuple(batch.masks for _, batch in part))

    def run_through(self) -> None:
        """Run the block that was opened, as it is now, and leave it."""
        path = self._source.layout.blocks[self._next]
        block = self._model.get_submodule(path)
        self._run_in_parts(block, path, False, True)
        self._leave(block)

    def _leave(self, block: nn.Module) -> None:
        unload(block)
        self._next += 1
        if self._next == len(self._source.layout.blocks) and not self._finish:
            self.close()
            if self._at_head is not None:
                found = self._head.get(_HEAD)
                self._at_head(None if found is None else _on_cpu(found))

    def _run_in_parts(self, block: nn.Module, path: str, capture: bool, goes_on: bool) -> dict[str, Gram]:
        grams: dict[str, Gram] = {}
        work = at_work(block, path, self._source.layout.of(path) if capture else (), goes_on=goes_on)
        passes = iter(self._passes)
        for ran in self._workers.map(run_part, work, self.parts()):
            add_grams(grams, ran.grams)
            for result in ran.results:
                next(passes).take(result)
        return grams

    def _run_here(self, block: nn.Module, path: str, capture: bool, goes_on: bool) -> dict[str, Gram]:
        grams: dict[str, Gram] = {}
        for one, batch in zip(self._passes, self._batches, strict=True):
            if capture:
                mode = Products(block, path)
                one.look(mode, go_on=goes_on)
                add_seen(grams, self._source.layout.of(path), mode, path, batch.masks)
                mode.seen.clear()  # the pass stands in front of the next block and still knows its mode
            elif goes_on:
                one.go_on()
        return grams

    def skip_to(self, number: int, replacements: Callable[[str], Replacements] | None = None) -> None:
        """Run the blocks before a given one without looking at them.

        Args:
            number: of the block that comes next afterwards.
            replacements: of each of these blocks, by path.
        """
        while self._next < number:
            path = self._source.layout.blocks[self._next]
            self.advance(capture=False, replacements=None if replacements is None else replacements(path))

    @property
    def model(self) -> Any:
        """The model that runs; blocks that are not at work have no weights."""
        return self._model

    @property
    def batches(self) -> list[Batch]:
        """What it reads, where it runs."""
        return self._batches

    def given(self) -> list[Given]:
        """What the next block is going to be called with, batch by batch."""
        if not self._passes:
            self._start()
        return [one.given for one in self._passes]

    def left(self) -> list[list[Tensor]]:
        """What the last block gave, batch by batch: leaves of what the model computes of it behind the block."""
        return [one.left for one in self._passes]

    def looked_up(self, number: int) -> list[tuple[Tensor, Tensor]]:
        """Ids that a batch looked up in the token table, and the rows: leaves, like what blocks give."""
        return self._passes[number].rows

    def finish_with(self, use: Finish) -> None:
        """Run the last block and what comes behind it, one batch at a time; needs ``finish``.

        Args:
            use: what to do with the output of a batch, with what the last block gave, and with what the output head
                multiplied and gave, where the model has a head.
        """
        if not self._passes:
            self._start()
        path = self._source.layout.blocks[self._next]
        self._source.load(self._model, path, device=self._device, dtype=self._dtype)
        products: list[tuple[Tensor, Tensor]] = []
        head = self._source.layout.head
        watched = None
        if head is not None:
            watched = self._model.get_submodule(head).register_forward_hook(
                lambda _, args, product: products.append((args[0], product))
            )
        for one, batch in zip(self._passes, self._batches, strict=True):
            one.go_on()
            output = self._source.task.output(one.result)
            use(output, batch, one.left, products.pop() if products else None)
            one.result = None
        if watched is not None:
            watched.remove()
        unload(self._model.get_submodule(path))
        self._next += 1

    def outputs(self) -> list[Tensor]:
        """What the model gives for each batch, all blocks run; needs ``finish``."""
        return [self._source.task.output(one.result) for one in self._passes]

    def close(self) -> None:
        """End passes that stand in the middle of the model, and give the model its own methods back."""
        for one in self._passes:
            one.end()
        if not self._finish:
            self._passes = []
            give_back_freed_memory()
        replaced = [*self._source.layout.blocks, *([self._source.layout.head] if self._at_head else [])]
        for path in replaced:
            self._model.get_submodule(str(path)).__dict__.pop("forward", None)

    def _start(self) -> None:
        by_thread: dict[int, _Pass] = {}

        def paused(path: str, real: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                return by_thread[threading.get_ident()].stand_before(path, real, args, kwargs)

            return forward

        for path in self._source.layout.blocks:
            module = self._model.get_submodule(path)
            module.forward = paused(path, module.forward)
        last = None if self._finish or self._at_head is not None else self._source.layout.blocks[-1]
        if self._at_head is not None:
            assert self._source.layout.head is not None
            self._model.get_submodule(self._source.layout.head).forward = self._stop_at_head(by_thread)
        table = None
        if self._differentiates:
            place = self._source.layout.embedding
            table = torch.empty(0) if place is None else self._model.get_submodule(place).weight
        for batch in self._batches:
            one = _Pass(self._model, batch, by_thread, last, table)
            self._passes.append(one)
            one.begin()

    def _stop_at_head(self, by_thread: Mapping[int, _Pass]) -> Any:
        """What runs in the place of the head: nothing behind its input matters."""

        def forward(values: Tensor, *_: Any, **__: Any) -> Any:
            one = by_thread[threading.get_ident()]
            add_gram(self._head, _HEAD, real_rows(values, *one.masks))
            if self._heard is not None:
                self._heard(self._passes.index(one), values)
            raise _Ended

        return forward


class _Ended(BaseException):
    """Unwinds a pass whose rest is not wanted."""


class _LookedUp(TorchFunctionMode):
    """Sees which rows of a table are looked up, and lets gradients end there."""

    def __init__(self, table: Tensor, seen: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._table, self._seen = table, seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        result = function(*args, **(kwargs or {}))
        if function is nn.functional.embedding and args[1] is self._table:
            result = result.detach().requires_grad_(True)
            self._seen.append((args[0], result))
        return result


class _Pass(threading.Thread):
    """One batch on its way through the model. It and its caller run in turn, never together."""

    def __init__(
        self,
        model: Any,
        batch: Batch,
        by_thread: dict[int, _Pass],
        last: str | None,
        table: Tensor | None,
    ) -> None:
        super().__init__(daemon=True)
        self._model, self._batch, self._by_thread, self._last = model, batch, by_thread, last
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._mode: Products | None = None
        self._only_look = False
        self._ending = False
        self._taken: list[Any] = []
        self._error: BaseException | None = None
        self.at: str | None = None
        """Path of the block in front of which the pass stands; None when it is through."""
        self.result: Any = None
        self.given = Given((), {})
        """What that block is going to be called with."""
        self.left: list[Tensor] = []
        """What the last block gave, where that is kept."""
        self.rows: list[tuple[Tensor, Tensor]] = []
        """What was looked up in the token table, where gradients are kept."""
        self._differentiates, self._table = table is not None, table

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """Which tokens of the batch are text."""
        return self._batch.masks

    def begin(self) -> None:
        """Run up to the first block."""
        self.start()
        self._wait()

    def look(self, mode: Products, *, go_on: bool) -> None:
        """Run the block under a mode; without `go_on` its output is thrown away and the pass stays in front of it."""
        self._mode, self._only_look = mode, not go_on
        self._turn.release()
        self._wait()

    def go_on(self) -> None:
        """Run the block, and on to the next one."""
        self._mode = None
        self._turn.release()
        self._wait()

    def take(self, result: Any) -> None:
        """Go on to the next block with what somebody else got from this one."""
        self._taken.append(result)
        self.go_on()

    def end(self) -> None:
        """Leave the model where it stands."""
        if self.is_alive():
            self._ending = True
            self._turn.release()
            self.join()

    def run(self) -> None:
        """The whole forward pass, in its own thread."""
        self._by_thread[threading.get_ident()] = self
        try:
            looking = nullcontext() if self._table is None else _LookedUp(self._table, self.rows)
            with torch.set_grad_enabled(self._differentiates), looking:
                self.result = self._model(**self._batch.arguments, **self._no_cache())
        except _Ended:
            pass
        except BaseException as error:  # handed to whoever waits
            self._error = error
        self.at = None
        self._back.release()

    def stand_before(self, path: str, real: Any, args: Any, kwargs: Any) -> Any:
        """What runs in the place of a block."""
        while True:
            self.at, self.given = path, Given(args, kwargs)
            self._back.release()
            self._turn.acquire()
            if self._ending:
                raise _Ended
            only_look = self._mode is not None and self._only_look
            if self._taken:
                return self._end_or_give(path, self._taken.pop())
            with torch.no_grad(), self._mode or nullcontext():
                result = real(*args, **kwargs)
            if only_look:
                continue
            return self._end_or_give(path, result)

    def _end_or_give(self, path: str, result: Any) -> Any:
        if path == self._last:
            raise _Ended
        self.given = Given((), {})
        if self._differentiates:
            self.left = [value.requires_grad_(True) for value in outputs_of(result)]
        return result

    def _wait(self) -> None:
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def _no_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if takes_cache(self._model) else {}


def takes_cache(model: nn.Module) -> bool:
    """Whether the forward pass can be told to keep no cache."""
    return "use_cache" in inspect.signature(type(model).forward).parameters


def _on_cpu(gram: Gram) -> Gram:
    return Gram(gram.matrix.cpu(), gram.tokens)
