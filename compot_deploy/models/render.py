"""The process in which the chat template of a file runs.

    python -m compot_deploy.models.render BYTES SECONDS LONGEST

A template is a program that came with the model. Jinja's sandbox keeps it from the machine, but not from looping
without end or asking for all memory, so it runs in a process of its own and under limits. A line of JSON comes in for
each conversation, ``{"source", "variables"}``, and one goes out, ``{"text"}`` or ``{"error"}``; the first line out,
``{"ready"}``, says that jinja2 is loaded. A process that ends instead has hit a limit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2


def main() -> None:
    """Answer lines until there are no more."""
    most_bytes, seconds, longest = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    _bound_memory(most_bytes)
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401  before the first conversation, whose time is counted

    _say({"ready": True})
    for line in sys.stdin.buffer:
        # Who asks ends a process that takes too long; this one ends itself where nobody is left.
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
        asked = json.loads(line)
        _say(_render(asked["source"], asked["variables"], longest))
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def _render(source: str, variables: dict[str, Any], longest: int) -> dict[str, Any]:
    try:
        text = _template(source).render(**variables)
        text.encode()  # half of a UTF-16 pair is no text
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # whatever a program can raise
        return {"error": str(error) or type(error).__name__}
    if len(text) > longest:
        return {"error": f"its text has {len(text)} characters, {longest} are read"}
    return {"text": text}


@functools.lru_cache(maxsize=1)
def _template(source: str) -> jinja2.Template:
    """A template with all that Hugging Face gives to one."""
    import jinja2.ext
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _generation()]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = time.strftime
    return environment.from_string(source)


def _generation() -> type[jinja2.ext.Extension]:
    """``{% generation %}`` marks what the model said, for training; here it is what it encloses."""
    import jinja2.ext

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012  as jinja2 has it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _tojson(value: Any, indent: int | None = None) -> str:
    """As Hugging Face has it; jinja2's own escapes what HTML would misread."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _bound_memory(most: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    with contextlib.suppress(ValueError, OSError):  # a lower bound is set already, or the system has none
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _say(message: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
