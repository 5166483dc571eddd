"""Serve one GGUF file of any layout over HTTP, in the manner of OpenAI's API: ``python -m compot_deploy.llama.server``.

The server of the llama.cpp wheel opens files by itself and cannot be given the plug-in, so factorised files have
one here: the standard library's HTTP server, one model, one request at a time.

    GET  /health, /v1/models
    POST /v1/completions, /v1/chat/completions      with and without "stream"
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import numpy as np

from compot_deploy.errors import CompotDeployError, InputError, MissingDependencyError
from compot_deploy.exporters.gguf.reader import read_header
from compot_deploy.llama.model import LlamaModel, find_gguf

LONGEST_BODY: Final = 10_000_000
"""Bytes of a request that are read."""

DEFAULT_TOKENS: Final = 128
"""Tokens of an answer when the request does not say."""

_UNSUPPORTED: Final = (
    "logprobs", "top_logprobs", "echo", "suffix", "tools", "functions", "response_format", "logit_bias",
    "presence_penalty", "frequency_penalty",
)  # fmt: skip


class RequestError(Exception):
    """What is wrong with a request, as the client is told."""

    def __init__(
        self, message: str, parameter: str | None = None, *, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.parameter, self.status, self.code = parameter, status, code


@dataclass(frozen=True)
class Sampling:
    """How an answer is made.

    Attributes:
        max_tokens: most tokens of it.
        temperature: 0 takes the likeliest token each time.
        top_p: tokens are drawn from the likeliest whose probabilities reach this sum.
        seed: of the draws; None draws anew each time.
        stop: texts that end the answer, and are not part of it.
        stream: piece by piece.
    """

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool

    def chooser(self) -> Callable[[np.ndarray], int] | None:
        """A function from logits to the next token; None for the likeliest."""
        if self.temperature == 0:
            return None
        random = np.random.default_rng(self.seed)

        def choose(logits: np.ndarray) -> int:
            scaled = logits.astype(np.float64) / self.temperature
            weights = np.exp(scaled - scaled.max())
            order = np.argsort(-weights, kind="stable")
            sums = np.cumsum(weights[order])
            kept = int(np.searchsorted(sums, self.top_p * sums[-1])) + 1
            kept = min(kept, len(order))
            drawn = int(np.searchsorted(sums[:kept], random.random() * sums[kept - 1], side="right"))
            return int(order[min(drawn, kept - 1)])

        return choose


@dataclass(frozen=True)
class Answer:
    """A piece of an answer; the last one says why it ends.

    Attributes:
        text: to be added to what came before.
        reason: None, ``stop`` or ``length``.
        tokens: made so far.
    """

    text: str
    reason: str | None
    tokens: int


class ChatTemplate:
    """The template of the file, rendered as Hugging Face renders it, in a sandbox.

    Args:
        source: a Jinja template.
        tokens: ``bos_token`` and ``eos_token`` as text.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        try:
            import jinja2.sandbox
        except ImportError:
            raise MissingDependencyError("jinja2", "llama", "Rendering the chat template of a file") from None
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = time.strftime
        self._template = environment.from_string(source)
        self._tokens = dict(tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation, up to where the answer begins.

        Raises:
            RequestError: the template refuses the conversation.
        """
        import jinja2

        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except jinja2.TemplateError as error:
            raise RequestError(f"The chat template refuses these messages: {error}", "messages") from error


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


class Service:
    """A model, and what may be asked of it; one request is answered at a time.

    Args:
        model: open; it is not closed here.
        name: the id that clients name it by.
        template: of the file, if it has one.
    """

    def __init__(self, model: LlamaModel, name: str, template: ChatTemplate | None) -> None:
        self.model, self.name, self.template = model, name, template
        self.created = int(time.time())
        self._lock = threading.Lock()

    def prompt(self, body: Mapping[str, Any], chat: bool) -> list[int]:
        """Token ids of the prompt or conversation of a request.

        Raises:
            RequestError: it is absent, malformed, empty or too long.
        """
        if chat:
            ids = self._conversation(body.get("messages"))
        else:
            prompt = body.get("prompt")
            if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
                prompt = prompt[0]
            if isinstance(prompt, str):
                ids = self.model.tokenize(prompt)
            elif isinstance(prompt, list) and all(type(token) is int for token in prompt):
                ids = prompt
            else:
                raise RequestError("prompt must be one text, or the token ids of one.", "prompt")
        parameter = "messages" if chat else "prompt"
        if not ids:
            raise RequestError(f"{parameter} has no tokens: give at least one.", parameter)
        if len(ids) > self.model.context:
            raise RequestError(
                f"{parameter} has {len(ids)} tokens, the context holds {self.model.context}: shorten it.",
                parameter,
                code="context_length_exceeded",
            )
        if not all(0 <= token < self.model.vocabulary for token in ids):
            raise RequestError(
                f"{parameter} has ids outside the vocabulary of {self.model.vocabulary}.", parameter
            )
        return ids

    def _conversation(self, messages: object) -> list[int]:
        if self.template is None:
            raise RequestError(
                f"{self.name} has no chat template: use /v1/completions.", code="no_chat_template"
            )
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
            read.append({"role": role, "content": content})
        return self.model.tokenize(self.template.render(read), special=False, markers=True)

    def answer(self, prompt: Sequence[int], sampling: Sampling) -> Generator[Answer, None, None]:
        """Pieces of an answer; waits for its turn. Text that may begin a stop is held back until it is decided."""
        longest = max((len(text) for text in sampling.stop), default=1)
        with self._lock:
            made: list[int] = []
            sent, text, room = 0, "", self.model.context - len(prompt) + 1
            for token in self.model.tokens(prompt, sampling.max_tokens, sampling.chooser()):
                made.append(token)
                text = self.model.detokenize(made)
                found = [
                    at
                    for at in (text.find(stop, max(0, sent - longest)) for stop in sampling.stop)
                    if at >= 0
                ]
                if found:
                    yield Answer(text[sent : min(found)], "stop", len(made))
                    return
                end = len(text) - (longest - 1)
                if text.endswith("\ufffd"):  # half of a character: wait for the rest
                    end = min(end, len(text) - 1)
                if end > sent:
                    yield Answer(text[sent:end], None, len(made))
                    sent = end
            ended = len(made) < min(sampling.max_tokens, room)
            yield Answer(text[sent:], "stop" if ended else "length", len(made))


def read_sampling(body: Mapping[str, Any], context: int) -> Sampling:
    """The settings of a request.

    Raises:
        RequestError: one is of the wrong type, outside its range, or not supported.
    """
    for name in _UNSUPPORTED:
        if body.get(name):
            raise RequestError(f"{name} is not supported.", name)
    if body.get("n", 1) not in (1, None) or body.get("best_of", 1) not in (1, None):
        raise RequestError("Only one answer at a time is supported: n must be 1.", "n")
    tokens = body.get("max_completion_tokens")
    tokens = body.get("max_tokens") if tokens is None else tokens
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise RequestError("max_tokens must be a whole number from 1.", "max_tokens")
    seed = body.get("seed")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise RequestError("seed must be a whole number from 0.", "seed")
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(s, str) and s for s in stops):
        raise RequestError("stop must be a text, or a list of at most 4, none of them empty.", "stop")
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise RequestError("stream must be true or false.", "stream")
    temperature = _number(body, "temperature", 1.0, 0.0, 2.0)
    top_p = _number(body, "top_p", 1.0, 0.0, 1.0)
    return Sampling(
        min(DEFAULT_TOKENS if tokens is None else tokens, context),
        temperature,
        top_p,
        seed,
        tuple(stops),
        stream,
    )


def _number(body: Mapping[str, Any], name: str, default: float, lowest: float, highest: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or not lowest <= value <= highest:
        raise RequestError(f"{name} must be a number from {lowest:g} to {highest:g}.", name)
    return float(value)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "compot-deploy"
    timeout = 60
    service: Service

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are not logged."""

    def do_GET(self) -> None:
        """Health and the list of models."""
        service = self.service
        model = {
            "id": service.name, "object": "model", "created": service.created, "owned_by": "compot-deploy",
        }  # fmt: skip
        path = self.path.partition("?")[0]
        if path == "/health":
            self._json(200, {"status": "ok"})
        elif path == "/v1/models":
            self._json(200, {"object": "list", "data": [model]})
        elif path == f"/v1/models/{service.name}":
            self._json(200, model)
        else:
            self._refuse(RequestError(f"There is no {path} to get.", status=404, code="not_found"))

    def do_POST(self) -> None:
        """Completions."""
        chat = {"/v1/completions": False, "/v1/chat/completions": True}.get(self.path.partition("?")[0])
        try:
            body = self._body()
            if chat is None:
                raise RequestError(f"There is no {self.path} to post to.", status=404, code="not_found")
            asked = body.get("model")
            if asked is not None and asked != self.service.name:
                raise RequestError(
                    f"The model {asked!r} is not served here, {self.service.name!r} is.",
                    "model",
                    status=404,
                    code="model_not_found",
                )
            sampling = read_sampling(body, self.service.model.context)
            prompt = self.service.prompt(body, chat)
            # closed in any case: an unfinished answer holds the model
            with contextlib.closing(self.service.answer(prompt, sampling)) as pieces:
                self._complete(prompt, sampling, chat, pieces)
        except RequestError as error:
            self._refuse(error)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True  # the client is gone
        except CompotDeployError as error:
            self._refuse(RequestError(str(error), status=500, code="failed"))

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            self.close_connection = True
            raise RequestError("The request needs a Content-Length.", status=411)
        if int(length) > LONGEST_BODY:
            self.close_connection = True
            raise RequestError(f"The request has {length} bytes, {LONGEST_BODY} are read.", status=413)
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"The request is not JSON: {error}.") from error
        if not isinstance(body, dict):
            raise RequestError("The request must be a JSON object.")
        return body

    def _complete(
        self, prompt: Sequence[int], sampling: Sampling, chat: bool, pieces: Iterator[Answer]
    ) -> None:
        head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self.service.name,
        }
        if sampling.stream:
            self._stream(head, pieces, chat)
            return
        text, last = "", Answer("", None, 0)
        for last in pieces:
            text += last.text
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": last.reason}
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": last.tokens,
            "total_tokens": len(prompt) + last.tokens,
        }
        self._json(200, {**head, "choices": [choice], "usage": usage})

    def _stream(self, head: dict[str, Any], pieces: Iterator[Answer], chat: bool) -> None:
        if chat:
            head["object"] = "chat.completion.chunk"
        self.close_connection = True  # the end of the answer is the end of the connection
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()

        def send(event: Mapping[str, Any] | str) -> None:
            line = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
            self.wfile.write(f"data: {line}\n\n".encode())
            self.wfile.flush()

        def choice(delta: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
            said = {"delta": delta} if chat else {"text": delta.get("content", "")}
            return {**head, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]}

        if chat:
            send(choice({"role": "assistant", "content": ""}, None))
        try:
            for piece in pieces:
                if piece.text:
                    send(choice({"content": piece.text}, None))
                if piece.reason:
                    send(choice({}, piece.reason))
            send("[DONE]")
        except CompotDeployError as error:  # too late for a status
            send({"error": {"message": str(error), "type": "server_error", "param": None, "code": "failed"}})

    def _refuse(self, error: RequestError) -> None:
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        about = {"message": str(error), "type": kind, "param": error.parameter, "code": error.code}
        self._json(error.status, {"error": about})

    def _json(self, status: int, body: Mapping[str, Any]) -> None:
        data = json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True


def make_server(service: Service, host: str = "127.0.0.1", port: int = 8080) -> ThreadingHTTPServer:
    """An HTTP server that listens; call ``serve_forever`` on it.

    Args:
        service: what it serves.
        host: address to listen on; only this machine by default.
        port: 0 takes a free one.

    Raises:
        InputError: the address cannot be had.
    """
    handler = type("Handler", (_Handler,), {"service": service})
    try:
        return _Server((host, port), handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"Cannot listen on {host}:{port}: {error}. Choose another with --port.") from error


def open_service(
    path: str | Path, *, threads: int = 1, context: int | None = None, name: str | None = None
) -> Service:
    """Open a file, or the only one of a folder, with its chat template.

    Raises:
        ArtifactError, InputError, MissingDependencyError, UnsupportedLlamaError, LlamaError: see `LlamaModel`.
    """
    file = find_gguf(Path(path))
    metadata = read_header(file).metadata
    source = metadata.get("tokenizer.chat_template")
    words = metadata.get("tokenizer.ggml.tokens", [])
    tokens = {}
    for which in ("bos", "eos"):
        number = metadata.get(f"tokenizer.ggml.{which}_token_id")
        known = number is not None and 0 <= int(number) < len(words)
        tokens[f"{which}_token"] = str(words[int(number)]) if known and number is not None else ""
    template = ChatTemplate(source, tokens) if isinstance(source, str) else None
    model = LlamaModel(file, threads=threads, context=context)
    if not model.has_tokenizer:
        model.close()
        raise InputError(f"{file.name} has no tokenizer, which serving text needs: export it with one.")
    return Service(model, name or file.stem, template)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted; returns an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m compot_deploy.llama.server",
        description="Serve a GGUF file in the manner of OpenAI's API.",
    )
    parser.add_argument("path", type=Path, help="a GGUF file of any layout, or a folder with exactly one")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=None, help="positions to keep (default: up to 4096)")
    parser.add_argument("--name", default=None, help="id of the model (default: the file's name)")
    given = parser.parse_args(arguments)
    try:
        service = open_service(given.path, threads=given.threads, context=given.context, name=given.name)
        with service.model, make_server(service, given.host, given.port) as server:
            sys.stdout.write(f"{service.name} on http://{given.host}:{server.server_address[1]}/v1\n")
            sys.stdout.flush()
            server.serve_forever()
    except CompotDeployError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
