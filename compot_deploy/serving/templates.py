"""Messages to the text that a model was trained on, by the chat template of its file."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

from compot_deploy.errors import CompotDeployError, MissingDependencyError
from compot_deploy.serving.limits import DEFAULTS, Limits
from compot_deploy.serving.request import Message, RequestError

START_SECONDS: Final = 60.0
"""That the process of a template may take to load jinja2, on a slow machine with a cold disk."""

QUEUE_SECONDS: Final = 30.0
"""That a conversation waits for those before it to be rendered."""


class ChatTemplate:
    """A template in a process of its own, which is ended and made anew when it takes too much; see `render`.

    Args:
        source: a Jinja template.
        tokens: its variables ``bos_token``, ``eos_token`` and the like.
        longest: characters of a rendered conversation.
        limits: of time and memory.

    Raises:
        MissingDependencyError: jinja2 is not installed.
        CompotDeployError: the process does not start.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str], longest: int = 1 << 20, limits: Limits = DEFAULTS
    ) -> None:
        if importlib.util.find_spec("jinja2") is None:
            raise MissingDependencyError("jinja2", "llama", "Rendering the chat template of a model")
        self._source, self._tokens, self._longest, self._limits = source, dict(tokens), longest, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        with self._lock:
            self._start()

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to where the answer begins.

        Raises:
            RequestError: the template refuses the conversation, fails, or takes too much time or memory for it.
        """
        # Hugging Face has the last two as None where nobody gives any: templates ask whether they are none.
        variables = {
            **self._tokens, "messages": list(messages), "add_generation_prompt": True, "tools": None, "documents": None,
        }  # fmt: skip
        question = json.dumps({"source": self._source, "variables": variables}).encode() + b"\n"
        if not self._lock.acquire(timeout=QUEUE_SECONDS):
            raise RequestError("The chat template is busy: try again.", status=503, code="busy")
        try:
            reply = self._ask(question)
        finally:
            self._lock.release()
        if "error" in reply:
            raise RequestError(
                f"The chat template refuses these messages: {reply['error']}.",
                "messages",
                code="template_failed",
            )
        return str(reply["text"])

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, question: bytes) -> dict[str, Any]:
        """One exchange; a process that breaks it off is made anew for the next."""
        process = self._process or self._start()
        seconds = self._limits.render_seconds
        reply = self._exchange(process, question, seconds)
        if reply is None:
            self._end()
            memory = self._limits.render_bytes >> 20
            return {"error": f"it takes more than {seconds:g} seconds or {memory} MiB"}
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "compot_deploy.serving.render",
                str(self._limits.render_bytes), str(self._limits.render_seconds), str(self._longest),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if self._exchange(self._process, b"", START_SECONDS) is None:
            self._end()
            raise CompotDeployError("The process for chat templates does not start.")
        return self._process

    def _exchange(
        self, process: subprocess.Popen[bytes], question: bytes, seconds: float
    ) -> dict[str, Any] | None:
        """Write, and read a line; None where the process ends, or is ended here because it takes too long."""
        assert process.stdin is not None and process.stdout is not None
        alarm = threading.Timer(seconds, process.kill)
        alarm.start()
        try:
            process.stdin.write(question)
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            return None
        finally:
            alarm.cancel()
        reply = json.loads(line) if line.endswith(b"\n") else None
        return reply if isinstance(reply, dict) else None

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was left to be written
                    pipe.close()
        process.wait()
