"""A request in the manner of OpenAI's API: read, checked, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

DEFAULT_TOKENS: Final = 128
"""Tokens of an answer when the request does not say."""

MOST_STOPS: Final = 4
MOST_ALTERNATIVES: Final = {False: 5, True: 20}
"""Alternatives to each token that may be asked for; of completions and of conversations, as in OpenAI's API."""

_UNSUPPORTED: Final = (
    "echo", "suffix", "tools", "functions", "function_call", "logit_bias", "presence_penalty", "frequency_penalty",
    "audio", "prediction", "web_search_options",
)  # fmt: skip
_IDLE: Final[Mapping[str, tuple[object, ...]]] = {
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "n": (1,),
    "best_of": (1,),
}
"""What may be said as long as it changes nothing."""

Message: TypeAlias = Mapping[str, str]
"""``role`` and ``content`` of one message."""


class RequestError(Exception):
    """What is wrong with a request, as the client is told."""

    def __init__(
        self, message: str, parameter: str | None = None, *, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.parameter, self.status, self.code = parameter, status, code

    def body(self) -> dict[str, Any]:
        """As JSON, in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": self.code}}


@dataclass(frozen=True)
class Sampling:
    """How an answer is made.

    Attributes:
        max_tokens: most tokens of it.
        temperature: 0 takes the likeliest token each time.
        top_p: tokens are drawn from the likeliest whose probabilities reach this sum.
        seed: of the draws; None draws anew each time.
        stop: texts that end the answer, and are not part of it.
        alternatives: likeliest tokens told beside each token, with their probabilities; None tells none, not even
            that of the token.
    """

    max_tokens: int = DEFAULT_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    alternatives: int | None = None


@dataclass(frozen=True)
class Request:
    """What a client wants.

    Attributes:
        chat: an answer to a conversation, rather than the continuation of a text.
        prompt: a text, or the token ids of one; empty for a conversation.
        messages: of a conversation; none for a continuation.
        sampling: how the answer is made.
        stream: piece by piece.
        usage: a stream ends with the numbers of tokens.
    """

    chat: bool
    prompt: str | tuple[int, ...]
    messages: tuple[Message, ...]
    sampling: Sampling
    stream: bool
    usage: bool


def read_request(data: bytes, chat: bool, model: str) -> Request:
    """A request from the body of its HTTP request.

    Args:
        data: JSON in UTF-8.
        chat: it was sent to ``/v1/chat/completions``.
        model: the only id that it may name.

    Raises:
        RequestError: malformed, outside a range, or something that is not supported.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The request is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise RequestError("The request must be a JSON object.")
    asked = body.get("model")
    if asked is not None and asked != model:
        raise RequestError(
            f"The model {asked!r} is not served here, {model!r} is.",
            "model",
            status=404,
            code="model_not_found",
        )
    for name in _UNSUPPORTED:
        if body.get(name):
            raise RequestError(f"{name} is not supported.", name)
    for name, idle in _IDLE.items():
        if body.get(name) is not None and body[name] not in idle:
            raise RequestError(f"{name} is not supported but for {json.dumps(idle[0])}.", name)
    stream = _flag(body, "stream", "stream")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or (options and not stream):
        raise RequestError("stream_options must be an object, and need stream.", "stream_options")
    return Request(
        chat,
        "" if chat else _prompt(body.get("prompt")),
        _messages(body.get("messages")) if chat else (),
        _sampling(body, chat),
        stream,
        _flag(options, "include_usage", "stream_options"),
    )


def _sampling(body: Mapping[str, Any], chat: bool) -> Sampling:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(s, str) and s for s in stops)
    ):
        raise RequestError(
            f"stop must be a text, or a list of at most {MOST_STOPS}, none of them empty.", "stop"
        )
    tokens = _whole(body, "max_completion_tokens", 1) or _whole(body, "max_tokens", 1)
    return Sampling(
        tokens or DEFAULT_TOKENS,
        _number(body, "temperature", 1.0, 0.0, 2.0),
        _number(body, "top_p", 1.0, 0.0, 1.0),
        _whole(body, "seed", 0),
        tuple(stops),
        _alternatives(body, chat),
    )


def _alternatives(body: Mapping[str, Any], chat: bool) -> int | None:
    """Completions ask for a number of them by ``logprobs``, conversations by ``logprobs`` and ``top_logprobs``."""
    if not chat:
        return None if body.get("logprobs") is False else _whole(body, "logprobs", 0, MOST_ALTERNATIVES[chat])
    wanted = _flag(body, "logprobs", "logprobs")
    number = _whole(body, "top_logprobs", 0, MOST_ALTERNATIVES[chat])
    if number is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs to be true.", "top_logprobs")
    return (number or 0) if wanted else None


def _prompt(prompt: object) -> str | tuple[int, ...]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return _encodable(prompt, "prompt")
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return tuple(prompt)
    raise RequestError("prompt must be one text, or the token ids of one.", "prompt")


def _messages(messages: object) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one message.", "messages")
    read = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise RequestError("Each message needs a role and a content, both text.", "messages")
        read.append({"role": _encodable(role, "messages"), "content": _encodable(content, "messages")})
    return tuple(read)


def _encodable(text: str, name: str) -> str:
    r"""JSON can write halves of characters (``"\ud800"``) that no text has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} holds half of a UTF-16 pair, which is no character.", name) from None
    return text


def _flag(body: Mapping[str, Any], name: str, parameter: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false.", parameter)
    return bool(value)


def _whole(body: Mapping[str, Any], name: str, lowest: int, highest: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or value < lowest or (highest is not None and value > highest):
        upto = "" if highest is None else f" to {highest}"
        raise RequestError(f"{name} must be a whole number from {lowest}{upto}.", name)
    return value


def _number(body: Mapping[str, Any], name: str, default: float, lowest: float, highest: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not lowest <= value <= highest:  # NaN lies nowhere
        raise RequestError(f"{name} must be a number from {lowest:g} to {highest:g}.", name)
    return float(value)
