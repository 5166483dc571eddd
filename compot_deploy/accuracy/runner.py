"""Tokens in, logits out: what the accuracy checker compares, whatever the runtime.

A runner hides a runtime behind two calls. `Runner.logits` reads windows of tokens and yields the logits a few
positions at a time, so that nobody ever holds the logits of a whole text; `Runner.generate` continues a
prompt greedily. Both walk through the key-value cache, the way the model is used when it is deployed, so a
broken cache shows up in every figure. The loops `stream` and `greedy` are shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from compot_deploy.errors import InputError

State = TypeVar("State")
"""What a runtime carries from one call to the next: its key-value cache."""


@runtime_checkable
class Runner(Protocol):
    """A model that can be asked for logits and for greedy text."""

    @property
    def name(self) -> str:
        """What is run and how, for reports: ``onnxruntime 1.32.0, as deployed``."""
        ...

    @property
    def vocabulary(self) -> int:
        """Width of the logits; every token id must be below it."""
        ...

    @property
    def context(self) -> int | None:
        """Longest sequence that the model can read, None where it does not say."""
        ...

    def logits(
        self, tokens: Int64[Tensor, "batch length"], chunk: int
    ) -> Iterator[Float[Tensor, "batch positions vocabulary"]]:
        """Logits at every position, float32 on the CPU, in pieces of `chunk` positions, the last one shorter.

        Args:
            tokens: windows without padding, each read from its start with an empty cache.
            chunk: positions per piece, at least 1.
        """
        ...

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        """Exactly `new_tokens` greedy tokens after the prompt; end-of-text tokens do not stop it."""
        ...


@runtime_checkable
class SideBySide(Protocol):
    """A runner that can continue several prompts at once, for which it reads its weights once."""

    def generate_all(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[int, ...]]:
        """What `Runner.generate` gives for each prompt, up to the rounding of products of other shapes."""
        ...


def texts_of(runner: Runner, prompts: Sequence[Sequence[int]], new_tokens: int) -> Iterable[tuple[int, ...]]:
    """Greedy texts of some prompts: side by side where the runner can do that, one by one otherwise."""
    if isinstance(runner, SideBySide):
        return runner.generate_all(prompts, new_tokens)
    return (runner.generate(prompt, new_tokens) for prompt in prompts)


@runtime_checkable
class RunnerFactory(Protocol):
    """Opens an artifact of one kind."""

    def __call__(self, folder: Path, *, exact: bool = False, threads: int = 0) -> Runner:
        """A runner for an exported folder or file.

        Args:
            folder: the artifact.
            exact: the float32 reference: switch the runtime's approximations off (int8 activations, float16 cache), so
                that what remains is the error of the exported file. The deployed settings otherwise.
            threads: of the runtime; 0 lets it choose.
        """
        ...


Advance = Callable[[Tensor, State | None], tuple[Tensor, State]]
"""(tokens, state) → (logits of these tokens, next state): one call into a runtime; no state is the start."""

Choose = Callable[[Float32[np.ndarray, " vocabulary"]], int]
"""Logits of the next token → the token."""


def stream(
    advance: Advance[State], tokens: Int64[Tensor, "batch length"], chunk: int
) -> Iterator[Float[Tensor, "batch positions vocabulary"]]:
    """Walk windows through a runtime, `chunk` positions per call."""
    state: State | None = None
    for piece in tokens.split(chunk, dim=1):
        logits, state = advance(piece, state)
        yield logits.float().cpu()


def continued(
    advance: Advance[State],
    prompt: Sequence[int],
    choose: Choose | None = None,
    chunk: int | None = None,
) -> Iterator[int]:
    """Token after token, without end; each is computed when it is asked for.

    Args:
        advance: one call into a runtime.
        prompt: at least one token.
        choose: the next token from its logits; None takes the most likely, among equals the lowest id.
        chunk: positions of the prompt per call, which bounds the memory of their logits; None reads it at once.

    Raises:
        InputError: the prompt is empty.
    """
    _check_prompt(prompt)
    state: State | None = None
    pieces = torch.tensor([list(prompt)]).split(chunk or len(prompt), dim=1)
    while True:
        for piece in pieces:
            logits, state = advance(piece, state)
        last = logits[0, -1].float().cpu()
        token = int(last.argmax()) if choose is None else choose(last.numpy())
        yield token
        pieces = (torch.tensor([[token]]),)


def greedy(advance: Advance[State], prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
    """The first `new_tokens` of the most likely tokens after a prompt; see `continued`."""
    return tuple(itertools.islice(continued(advance, prompt), new_tokens))


def greedy_all(
    advance: Advance[State], prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[tuple[int, ...]]:
    """`greedy` for several prompts, those of one length side by side."""
    for prompt in prompts:
        _check_prompt(prompt)
    found: dict[int, tuple[int, ...]] = {}
    for length in {len(prompt) for prompt in prompts}:
        numbers = [number for number, prompt in enumerate(prompts) if len(prompt) == length]
        tokens, written = torch.tensor([list(prompts[number]) for number in numbers]), []
        state: State | None = None
        for _ in range(new_tokens):
            logits, state = advance(tokens, state)
            tokens = logits[:, -1:].float().cpu().argmax(-1)
            written.append(tokens)
        rows = torch.cat(written, dim=1).tolist()
        found |= {number: tuple(row) for number, row in zip(numbers, rows, strict=True)}
    return [found[number] for number in range(len(prompts))]


def _check_prompt(prompt: Sequence[int]) -> None:
    if not prompt:
        raise InputError("A prompt without tokens cannot be continued: give at least one token.")
