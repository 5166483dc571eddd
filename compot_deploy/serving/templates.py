"""The chat template of a served model: one conversation at a time, and a bad request where it refuses."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Final

from compot_deploy.models.templates import TemplateError, TemplateLimits, TemplateProcess
from compot_deploy.serving.limits import DEFAULTS, Limits
from compot_deploy.serving.request import Message, RequestError

QUEUE_SECONDS: Final = 30.0
"""That a conversation waits for those before it to be rendered."""


class ChatTemplate:
    """A template that many threads may ask; see `compot_deploy.models.templates.TemplateProcess`.

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
        bounds = TemplateLimits(limits.render_seconds, limits.render_bytes, longest)
        self._template = TemplateProcess(source, tokens, bounds)
        self._lock = threading.Lock()

    @property
    def _process(self) -> subprocess.Popen[bytes] | None:
        return self._template.process

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to where the answer begins.

        Raises:
            RequestError: the template refuses the conversation, fails, or takes too much time or memory for it.
        """
        if not self._lock.acquire(timeout=QUEUE_SECONDS):
            raise RequestError("The chat template is busy: try again.", status=503, code="busy")
        try:
            return self._template.render(messages, answer=True)
        except TemplateError as error:
            raise RequestError(
                f"The chat template refuses these messages: {error}.", "messages", code="template_failed"
            ) from None
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._template.close()
