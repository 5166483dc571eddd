"""An answer, piece by piece: whose turn it is, how tokens are drawn, and where the text ends."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from compot_deploy.serving.engines import Opened
from compot_deploy.serving.limits import DEFAULTS, Limits
from compot_deploy.serving.request import Request, RequestError, Sampling
from compot_deploy.serving.templates import ChatTemplate

_LOOK_SECONDS = 0.5  # between two looks at whether a client that waits is still there


class ClientLeftError(ConnectionError):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Scored:
    """A token, and how likely the model took it to be, at temperature 1.

    Attributes:
        text: of the token alone; bytes that are no character are U+FFFD.
        logprob: natural logarithm of its probability.
        alternatives: the likeliest tokens in its place, likeliest first; as many as were asked for.
        offset: characters of the answer before it.
    """

    text: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """A piece of an answer; the last one says why it ends.

    Attributes:
        text: to be added to what came before.
        scored: tokens that begin in it, where the request asks for probabilities.
        reason: None, ``stop`` or ``length``.
        made: tokens made so far.
    """

    text: str
    scored: tuple[Scored, ...]
    reason: str | None
    made: int


class Chooser:
    """Logits to the next token, and to the probabilities that are told.

    Args:
        sampling: how tokens are drawn, and how many probabilities are told.

    Attributes:
        scores: (id, logarithm of its probability) of the last token and of the alternatives; empty where none are
            wanted.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self.scores: tuple[tuple[int, float], ...] = ()

    def __call__(self, logits: Float32[np.ndarray, " vocabulary"]) -> int:
        """The next token."""
        token = self._draw(logits)
        if self._sampling.alternatives is not None:
            self.scores = scores(logits, token, self._sampling.alternatives)
        return token

    def _draw(self, logits: Float32[np.ndarray, " vocabulary"]) -> int:
        temperature, top_p = self._sampling.temperature, self._sampling.top_p
        if temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / temperature
        weights = np.exp(scaled - scaled.max())
        order = np.argsort(-weights, kind="stable")
        sums = np.cumsum(weights[order])
        kept = min(int(np.searchsorted(sums, top_p * sums[-1])) + 1, len(order))
        drawn = int(np.searchsorted(sums[:kept], self._random.random() * sums[kept - 1], side="right"))
        return int(order[min(drawn, kept - 1)])


def scores(
    logits: Float32[np.ndarray, " vocabulary"], token: int, alternatives: int
) -> tuple[tuple[int, float], ...]:
    """(id, logarithm of its probability) of a token, then of the likeliest, ids rising among equals."""
    wide = logits.astype(np.float64)
    peak = wide.max()
    logs = wide - (peak + np.log(np.exp(wide - peak).sum()))
    best = np.argsort(-logs, kind="stable")[:alternatives]
    return tuple((int(at), max(float(logs[at]), -9999.0)) for at in (token, *best))  # JSON has no infinity


class Text:
    """Tokens to text as they come, in time that does not grow with the text.

    A tokenizer may treat a token by what stands before it (it drops a leading space, it joins bytes), so
    tokens are decoded together with some before them, of which the text is known, and the text that is new is given
    out. What ends in U+FFFD may be half of a character and waits for the rest.

    Args:
        decode: ids to text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._whole = 0  # tokens of the window up to the last end of a character
        self._sent = 0  # characters of the window's text that were given out

    def add(self, token: int) -> str:
        """Text that is certain with one more token."""
        self._window.append(token)
        text = self._decode(self._window)
        end = len(text.rstrip("\ufffd"))
        new, self._sent = text[self._sent : end], max(self._sent, end)
        if end == len(text):
            # The next window begins after the last end but one, if there is any text for what follows to stand after.
            kept = self._window[self._whole :]
            seen = self._decode(kept)
            if seen:
                self._window, self._sent = kept, len(seen)
            self._whole = len(self._window)
        return new

    def rest(self) -> str:
        """What never became certain."""
        return self._decode(self._window)[self._sent :]


class Turns:
    """First come, first served, one at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tickets: deque[object] = deque()
        self._change = threading.Condition()

    @contextmanager
    def turn(self, gone: Callable[[], bool]) -> Iterator[None]:
        """Wait for the turn, and have it until the context ends.

        Raises:
            RequestError: too many wait already.
            ClientLeftError: `gone` became true.
        """
        ticket = object()
        with self._change:
            if len(self._tickets) >= self._most:
                raise RequestError(f"{self._most} requests wait already: try again.", status=503, code="busy")
            self._tickets.append(ticket)
        try:
            with self._change:
                while self._tickets[0] is not ticket:
                    self._change.wait(_LOOK_SECONDS)
                    if gone():
                        raise ClientLeftError
            yield
        finally:
            with self._change:
                self._tickets.remove(ticket)
                self._change.notify_all()


class Service:
    """A model, and what may be asked of it; one request is answered at a time.

    Args:
        opened: the model; `close` closes it.
        name: the id that clients name it by; None takes the name of its file.
        limits: see `Limits`.

    Raises:
        MissingDependencyError: the file has a chat template and jinja2 is not installed.
    """

    def __init__(self, opened: Opened, name: str | None = None, limits: Limits = DEFAULTS) -> None:
        self.engine, self.name, self.limits = opened.engine, name or opened.name, limits
        self.created = int(time.time())
        self.turns = Turns(limits.waiting)
        self.template: ChatTemplate | None = None
        if opened.template is not None:
            longest = limits.body(self.engine.context)
            self.template = ChatTemplate(opened.template, opened.words, longest, limits)

    def close(self) -> None:
        """Close the model and end the process of the template; nobody may be answered any more."""
        if self.template is not None:
            self.template.close()
        self.engine.close()

    def prompt(self, request: Request) -> list[int]:
        """Token ids of the text or conversation of a request.

        Raises:
            RequestError: it is empty, too long, outside the vocabulary, or refused by the chat template.
        """
        parameter = "messages" if request.chat else "prompt"
        if not request.chat:
            prompt = request.prompt
            ids = self.engine.encode(prompt, rendered=False) if isinstance(prompt, str) else list(prompt)
        elif self.template is None:
            raise RequestError(
                f"{self.name} has no chat template: use /v1/completions.", code="no_chat_template"
            )
        else:
            ids = self.engine.encode(self.template.render(request.messages), rendered=True)
        if not ids:
            raise RequestError(f"{parameter} has no tokens: give at least one.", parameter)
        if len(ids) > self.engine.context:
            raise RequestError(
                f"{parameter} has {len(ids)} tokens, the context holds {self.engine.context}: shorten it.",
                parameter,
                code="context_length_exceeded",
            )
        if not all(0 <= token < self.engine.vocabulary for token in ids):
            raise RequestError(
                f"{parameter} has ids outside the vocabulary of {self.engine.vocabulary}.", parameter
            )
        return ids

    def answer(
        self, prompt: Sequence[int], sampling: Sampling, gone: Callable[[], bool] = lambda: False
    ) -> Generator[Piece, None, None]:
        """Pieces of an answer; waits for its turn. Text that may begin a stop is held back until it is decided.

        Close it in any case: an unfinished answer holds the model.

        Args:
            prompt: at least one id.
            sampling: how.
            gone: whether nobody waits for the answer any more; asked before each token, and while it waits.

        Raises:
            RequestError: too many wait already.
            ClientLeftError: `gone` became true.
        """
        with self.turns.turn(gone):
            yield from self._pieces(prompt, sampling, gone)

    def _pieces(
        self, prompt: Sequence[int], sampling: Sampling, gone: Callable[[], bool]
    ) -> Generator[Piece, None, None]:
        most = min(sampling.max_tokens, self.engine.context - len(prompt) + 1)
        held = max((len(stop) for stop in sampling.stop), default=1) - 1
        chooser, text = Chooser(sampling), Text(self.engine.decode)
        unsent, sent, made = "", 0, 0
        scored: list[Scored] = []

        def cut(end: int, reason: str | None = None, tokens: int | None = None) -> Piece:
            """The first `end` characters of what is unsent, with the tokens that begin in them, or the first few."""
            nonlocal unsent, sent, scored
            tokens = sum(one.offset < sent + end for one in scored) if tokens is None else tokens
            piece = Piece(unsent[:end], tuple(scored[:tokens]), reason, made)
            unsent, sent, scored = unsent[end:], sent + end, scored[tokens:]
            return piece

        for token in self.engine.tokens(prompt, most, chooser):
            if gone():
                raise ClientLeftError
            made += 1
            if chooser.scores:
                scored.append(self._scored(chooser.scores, sent + len(unsent)))
            unsent += text.add(token)
            found = [at for at in (unsent.find(stop) for stop in sampling.stop) if at >= 0]
            if found:
                yield cut(min(found), "stop")
                return
            if len(unsent) > held:
                yield cut(len(unsent) - held)
        unsent += text.rest()
        yield cut(len(unsent), "stop" if made < most else "length", len(scored))

    def _scored(self, pairs: Sequence[tuple[int, float]], offset: int) -> Scored:
        (text, logprob), *others = [(self.engine.decode([token]), logprob) for token, logprob in pairs]
        return Scored(text, logprob, tuple(others), offset)
