"""A server of a small model in this process, and questions to it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compot_deploy.serving.engines import Opened, open_model
from compot_deploy.serving.generation import Service
from compot_deploy.serving.limits import Limits
from compot_deploy.serving.server import Server

CONTEXT = 64
LIMITS = Limits(render_seconds=1.0, request_seconds=2.0, write_seconds=2.0)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if messages[0].role == 'x' %}{{ raise_exception('no x') }}{% endif %}"
    "{% if messages[0].role == 'endless' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}"
)


@dataclass(frozen=True)
class Served:
    """A server that runs in this process.

    Attributes:
        url: without a path.
        service: what it serves.
        server: itself.
    """

    url: str
    service: Service
    server: Server

    def greedy(self, prompt: str | list[int], most: int) -> tuple[str, list[int]]:
        """Text and ids of the likeliest tokens, asked of the engine itself."""
        engine = self.service.engine
        ids = engine.encode(prompt, rendered=False) if isinstance(prompt, str) else prompt
        made = list(engine.tokens(ids, most, lambda logits: int(logits.argmax())))
        return engine.decode(made), made


class ToyEngine:
    """Writes what it was given, byte by byte, whatever the prompt; the byte is the token."""

    context, vocabulary = 1000, 256

    def __init__(self, text: bytes, seconds: float = 0.0) -> None:
        self.text, self.seconds, self.computed = text, seconds, 0

    def encode(self, text: str, rendered: bool) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    def tokens(self, prompt: Sequence[int], most: int, choose: Callable[[np.ndarray], int]) -> Iterator[int]:
        if bytes(prompt) == b"fail":
            raise RuntimeError("planted")
        for byte in self.text[:most]:
            time.sleep(self.seconds)
            self.computed += 1
            choose(np.eye(256, dtype=np.float32)[byte] * 9)
            yield byte

    def close(self) -> None:
        pass


@contextlib.contextmanager
def serving(
    model: Path | ToyEngine, limits: Limits = LIMITS, template: str | None = TEMPLATE
) -> Iterator[Served]:
    """Serve a model until the context ends."""
    if isinstance(model, Path):
        opened = replace(open_model(model, context=CONTEXT), template=template)
    else:
        opened = Opened(model, "toy", template, {})
    with contextlib.closing(Service(opened, limits=limits)) as service:
        with Server(service, port=0) as server:
            thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
            thread.start()
            yield Served(server.url.removesuffix("/v1"), service, server)
            server.shutdown()
            thread.join()
        assert server.stop()


@contextlib.contextmanager
def started(path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own and its URL without a path; ended with the context, if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "compot_deploy.serving", str(path), "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().split()[-1].removesuffix("/v1")
        finally:
            process.kill()


def ask(url: str, body: Any = None) -> tuple[int, str]:
    """Status and text of an answer; a body makes it a POST."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def completed(base: str, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    """An answer that must come."""
    status, text = ask(base + path, body)
    assert status == 200, text
    answer = json.loads(text)
    assert isinstance(answer, dict)
    return answer


def events(base: str, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    """The events of a stream that must come whole."""
    status, text = ask(base + path, {**body, "stream": True})
    assert status == 200, text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
