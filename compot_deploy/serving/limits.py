"""What clients may take of the machine, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Limits:
    """Bounds of one server; each holds for all clients together or for each request, as it says.

    Attributes:
        connections: open at once, a thread for each. One more is told that the server is busy, and closed.
        waiting: requests that wait for the model or have it; fewer than the connections, so that a server with
            much to do still answers who asks for its health.
        request_seconds: from the connection until its request has come in whole.
        write_seconds: until a client has taken a piece of its answer. A client that does not read holds the model
            for that long.
        render_seconds: that a chat template may take for one conversation.
        render_bytes: of memory that the process of the template may take, program included; where the system
            counts them (Linux).
        stop_seconds: that running requests have to end when the server is told to stop.
    """

    connections: int = 128
    waiting: int = 64
    request_seconds: float = 30.0
    write_seconds: float = 10.0
    render_seconds: float = 2.0
    render_bytes: int = 512 << 20
    stop_seconds: float = 10.0

    def body(self, context: int) -> int:
        """Bytes of a request, and characters of a rendered template: 64 for each position, at least 1 MiB.

        The longest prompt that fits is shorter: a token has four or five characters of text, and as a number in
        JSON up to eight.
        """
        return max(1 << 20, 64 * context)


DEFAULTS: Final = Limits()
