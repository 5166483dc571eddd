"""Pieces of an answer in the JSON that OpenAI's clients read: whole, or as the events of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from compot_deploy.serving.generation import Piece, Scored
from compot_deploy.serving.request import Request


class Reply:
    """The form of one answer.

    Args:
        request: what is answered.
        model: its id.
        prompt_tokens: how many tokens the prompt has.
    """

    def __init__(self, request: Request, model: str, prompt_tokens: int) -> None:
        self._request, self._prompt_tokens = request, prompt_tokens
        kind = "text_completion"
        if request.chat:
            kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self._head = {
            "id": ("chatcmpl-" if request.chat else "cmpl-") + uuid.uuid4().hex,
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """All pieces as one object."""
        got = list(pieces)
        text = "".join(piece.text for piece in got)
        said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = self._choice(
            said if self._request.chat else {"text": text},
            [one for piece in got for one in piece.scored],
            got[-1].reason,
        )
        return {**self._head, "choices": [choice], "usage": self._usage(got[-1].made)}

    def events(self, pieces: Iterable[Piece]) -> Iterable[dict[str, Any]]:
        """What a stream says: the role, each piece as it comes, why it ends, and the numbers of tokens if asked."""
        if self._request.chat:
            yield self._chunk({"role": "assistant", "content": ""}, (), None)
        made = 0
        for piece in pieces:
            made = piece.made
            if piece.text or piece.scored:
                yield self._chunk({"content": piece.text}, piece.scored, None)
            if piece.reason:
                yield self._chunk({}, (), piece.reason)
        if self._request.usage:
            yield {**self._head, "choices": [], "usage": self._usage(made)}

    def _chunk(
        self, delta: Mapping[str, str], scored: Iterable[Scored], reason: str | None
    ) -> dict[str, Any]:
        said = {"delta": delta} if self._request.chat else {"text": delta.get("content", "")}
        chunk = {**self._head, "choices": [self._choice(said, list(scored), reason)]}
        return {**chunk, "usage": None} if self._request.usage else chunk

    def _choice(self, said: Mapping[str, Any], scored: list[Scored], reason: str | None) -> dict[str, Any]:
        told = None
        if scored:
            told = _of_conversation(scored) if self._request.chat else _of_completion(scored)
        return {"index": 0, **said, "logprobs": told, "finish_reason": reason}

    def _usage(self, made: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self._prompt_tokens + made,
        }


def _of_conversation(scored: Iterable[Scored]) -> dict[str, Any]:
    def entry(text: str, logprob: float) -> dict[str, Any]:
        # A part of a character is no text, and its bytes are not known.
        known = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": known}

    content = [
        {**entry(one.text, one.logprob), "top_logprobs": [entry(*other) for other in one.alternatives]}
        for one in scored
    ]
    return {"content": content, "refusal": None}


def _of_completion(scored: list[Scored]) -> dict[str, Any]:
    return {
        "tokens": [one.text for one in scored],
        "token_logprobs": [one.logprob for one in scored],
        # The likeliest and the token itself; of several with one text the likeliest is told.
        "top_logprobs": [dict(((one.text, one.logprob), *reversed(one.alternatives))) for one in scored],
        "text_offset": [one.offset for one in scored],
    }
