"""Messages to the text that a model was trained on, by the chat template that came with it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from compot_deploy.errors import CompotDeployError, InputError, MissingDependencyError

START_SECONDS: Final = 60.0
"""That the process of a template may take to load jinja2, on a slow machine with a cold disk."""


class TemplateError(InputError):
    """A template refuses a conversation, fails, or takes too much for it; the message is the reason alone."""


@dataclass(frozen=True)
class TemplateLimits:
    """What a template may take for one conversation.

    Attributes:
        seconds: until it has rendered.
        bytes: of memory that its process may take, program included; where the system counts them (Linux).
        characters: of the text.
    """

    seconds: float = 10.0
    bytes: int = 512 << 20
    characters: int = 1 << 24


DEFAULT_LIMITS: Final = TemplateLimits()


class TemplateProcess:
    """A template in a process of its own, which is ended and made anew when it takes too much; see `render`.

    Not for several threads at once.

    Args:
        source: a Jinja template.
        tokens: its variables ``bos_token``, ``eos_token`` and the like.
        limits: of time, memory and text; None takes `DEFAULT_LIMITS`.

    Raises:
        MissingDependencyError: jinja2 is not installed.
        CompotDeployError: the process does not start.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], limits: TemplateLimits | None = None) -> None:
        if importlib.util.find_spec("jinja2") is None:
            raise MissingDependencyError("jinja2", "llama", "Rendering the chat template of a model")
        self._source, self._tokens, self._limits = source, dict(tokens), limits or DEFAULT_LIMITS
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        answer: bool = False,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: as Hugging Face has them.
            tools: that the model may call.
            answer: up to where the next answer begins.

        Raises:
            TemplateError: the template refuses the conversation, fails, or takes too much for it.
        """
        # Hugging Face has the last two as None where nobody gives any: templates ask whether they are none.
        variables = {
            **self._tokens, "messages": list(messages), "add_generation_prompt": answer,
            "tools": None if tools is None else list(tools), "documents": None,
        }  # fmt: skip
        question = json.dumps({"source": self._source, "variables": variables}).encode() + b"\n"
        process = self.process or self.start()
        reply = self._exchange(process, question, self._limits.seconds)
        if reply is None:
            self.close()
            memory = self._limits.bytes >> 20
            raise TemplateError(f"it takes more than {self._limits.seconds:g} seconds or {memory} MiB")
        if "error" in reply:
            raise TemplateError(" ".join(str(reply["error"]).split()))
        return str(reply["text"])

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process, which loads jinja2."""
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "compot_deploy.models.render",
                str(self._limits.bytes), str(self._limits.seconds), str(self._limits.characters),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if self._exchange(self.process, b"", START_SECONDS) is None:
            self.close()
            raise CompotDeployError("The process for chat templates does not start.")
        return self.process

    def close(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was left to be written
                    pipe.close()
        process.wait()

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
