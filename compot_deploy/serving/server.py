"""HTTP for one service: who may ask, how much, and errors that are always JSON.

    GET  /health, /v1/models, /v1/models/ID
    POST /v1/completions, /v1/chat/completions      with and without "stream"

The standard library's server, a thread for each connection and one request on each: a framework would bring five
packages, and its own limits, checks and errors would all have to be replaced.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import logging
import os
import re
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any, Final

from compot_deploy.errors import CompotDeployError, InputError
from compot_deploy.serving.generation import Service
from compot_deploy.serving.reply import Reply
from compot_deploy.serving.request import RequestError, read_request

_POSTS: Final = {"/v1/completions": False, "/v1/chat/completions": True}
"""Path to whether it is for conversations."""

_HOST: Final = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")

_LINGER_SECONDS: Final = 2.0
"""For a client to read a refusal, before what it still sends breaks the connection; and the bytes that are let pass."""
_LINGER_BYTES: Final = 64 << 20

_log = logging.getLogger(__name__)


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens as soon as it is made; call ``serve_forever`` or ``handle_request`` on it, and `stop` at the end.

    Args:
        service: what it serves.
        host: address to listen on; only this machine by default.
        port: 0 takes a free one.
        names: host names that clients may address it by, besides addresses and ``localhost``.

    Raises:
        InputError: the address cannot be had.
    """

    daemon_threads = True
    allow_reuse_address = (
        os.name != "nt"
    )  # without it a port stays busy for a minute; there, two could share one
    request_queue_size = 128

    def __init__(
        self, service: Service, host: str = "127.0.0.1", port: int = 8080, names: Iterable[str] = ()
    ) -> None:
        self.service = service
        self.names = {"localhost", host.lower(), *(name.lower() for name in names)}
        self.stopping = False
        self.reading = (
            threading.Lock()
        )  # one body is parsed at a time: as objects it may take fifty times its bytes
        self._open: set[socket.socket] = set()
        self._change = threading.Condition()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"Cannot listen on {host}:{port}: {error}. Choose another with --port."
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_address[1]}/v1"

    def trusts(self, host: str) -> bool:
        """Whether a request that names this host is meant for this server.

        A web site that lets its own name point here (DNS rebinding) is told by the name: browsers send it.
        """
        found = _HOST.fullmatch(host)
        if not found:
            return False
        name = found["name"].strip("[]").lower()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, if there are not too many."""
        with self._change:
            full = len(self._open) >= self.service.limits.connections
            if not full:
                self._open.add(request)
        if full:
            error = RequestError("The server is busy: try again.", status=503, code="busy")
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.send(_head(503, len(data := _encoded(error.body()))) + data)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, and make room for another."""
        super().shutdown_request(request)
        with self._change:
            self._open.discard(request)
            self._change.notify_all()

    def stop(self) -> bool:
        """End what is running; whether all of it has ended in time."""
        self.stopping = True
        with self._change:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)  # as if its client had left
            return self._change.wait_for(lambda: not self._open, self.service.limits.stop_seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that leaves, which is its right."""
        if not isinstance(sys.exc_info()[1], OSError):
            _log.exception("A connection failed.")


class _Arriving(io.RawIOBase):
    """What a client sends, until a deadline."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._end = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    """One connection, and the one request on it."""

    server: Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        arriving = _Arriving(self.connection, self.server.service.limits.request_seconds)
        self.rfile = io.BufferedReader(arriving)
        self.streaming = False
        self.unread = True  # something may still come that nobody reads

    def handle(self) -> None:
        self.close_connection = True
        self.handle_one_request()

    def finish(self) -> None:
        """Closing with something unread would break the connection before its client has read the answer."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            end, left = time.monotonic() + _LINGER_SECONDS, _LINGER_BYTES if self.unread else 0
            self.connection.settimeout(_LINGER_SECONDS)
            while left > 0 and time.monotonic() < end and (got := self.connection.recv(1 << 16)):
                left -= len(got)
        super().finish()

    def parse_request(self) -> bool:
        """Also refuse what another web site has sent through its visitor's browser."""
        if not super().parse_request():
            return False
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not self.server.trusts(hosts[0]):
            self.send_error(421, "This server is not of that name: use its address, or --allow-host.")
            return False
        own = [f"{scheme}://{hosts[0]}".lower() for scheme in ("http", "https")]  # the second behind a proxy
        site = self.headers.get("Sec-Fetch-Site", "none")
        if self.headers.get("Origin", own[0]).lower() not in own or site not in ("none", "same-origin"):
            self.send_error(403, "Other sites may not ask this server.")
            return False
        return True

    def do_GET(self) -> None:
        """Health and the list of models."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Completions."""
        self._answer(self._post)

    def _answer(self, what: Any) -> None:
        try:
            what(self.path.partition("?")[0])
        except RequestError as error:
            self._refuse(error)
        except (ConnectionError, TimeoutError):  # the client is gone, or does not read
            if self.server.stopping:
                self._refuse(RequestError("The server is stopping.", status=503, code="stopping"))
        except CompotDeployError as error:
            self._refuse(RequestError(str(error), status=500, code="failed"))
        except Exception:
            _log.exception("A request failed.")
            self._refuse(RequestError("The server failed; its log says why.", status=500, code="failed"))

    def _get(self, path: str) -> None:
        service = self.server.service
        self.unread = False
        model = {
            "id": service.name, "object": "model", "created": service.created, "owned_by": "compot-deploy",
        }  # fmt: skip
        if path == "/health":
            self._send(200, {"status": "ok"})
        elif path == "/v1/models":
            self._send(200, {"object": "list", "data": [model]})
        elif urllib.parse.unquote(path) == f"/v1/models/{service.name}":
            self._send(200, model)
        else:
            raise RequestError(f"There is no {path} to get.", status=404, code="not_found")

    def _post(self, path: str) -> None:
        service = self.server.service
        if path not in _POSTS:
            raise RequestError(f"There is no {path} to post to.", status=404, code="not_found")
        data = self._body()
        with self.server.reading:
            request = read_request(data, _POSTS[path], service.name)
        del data
        prompt = service.prompt(request)
        reply = Reply(request, service.name, len(prompt))
        with contextlib.closing(service.answer(prompt, request.sampling, self._gone)) as pieces:
            if request.stream:
                self._stream(reply.events(pieces))
            else:
                whole = reply.whole(pieces)
        if not request.stream:
            self._send(200, whole)  # the next request has the model by now

    def _body(self) -> bytes:
        lengths = self.headers.get_all("Content-Length", [])
        if (
            len(lengths) != 1
            or not re.fullmatch(r"[0-9]{1,12}", lengths[0])
            or "Transfer-Encoding" in self.headers
        ):
            raise RequestError("The request needs a Content-Length, and no Transfer-Encoding.", status=411)
        length, most = int(lengths[0]), self.server.service.limits.body(self.server.service.engine.context)
        if length > most:
            raise RequestError(f"The request has {length} bytes, {most} are read.", status=413)
        try:
            data = self.rfile.read(length)
        except TimeoutError:
            raise RequestError("The request did not come in time.", status=408) from None
        if len(data) < length:
            raise ConnectionResetError
        self.unread = False
        return data

    def _gone(self) -> bool:
        """Whether the client has left: it has ended the connection. Whatever else it sends is not read."""
        try:
            self.connection.setblocking(False)
            return not self.connection.recv(1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _stream(self, events: Iterable[Mapping[str, Any]]) -> None:
        for event in events:
            if not self.streaming:
                self._write(_head(200, None, "text/event-stream; charset=utf-8"))
                self.streaming = True
            self._write(b"data: " + _encoded(event) + b"\n\n")
        self._write(b"data: [DONE]\n\n")

    def _refuse(self, error: RequestError) -> None:
        with contextlib.suppress(OSError):
            if self.streaming:  # too late for a status
                self._write(b"data: " + _encoded(error.body()) + b"\n\n")
            else:
                self._send(error.status, error.body())

    def _send(self, status: int, body: Mapping[str, Any]) -> None:
        data = _encoded(body)
        self._write(_head(status, len(data)) + (b"" if self.command == "HEAD" else data))

    def _write(self, data: bytes) -> None:
        self.connection.settimeout(self.server.service.limits.write_seconds)
        self.connection.sendall(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library finds wrong with a request, as JSON."""
        sentence = (
            message if code in (403, 421) and message else f"That is no request for this server: {message}."
        )
        self._refuse(RequestError(sentence, status=code, code="forbidden" if code in (403, 421) else None))

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are not logged."""


def _encoded(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def _head(status: int, length: int | None, kind: str = "application/json; charset=utf-8") -> bytes:
    """Status and headers; the end of the connection is the end of a body without a length."""
    phrase = BaseHTTPRequestHandler.responses.get(status, ("",))[0]
    lines = [f"HTTP/1.1 {status} {phrase}", "Server: compot-deploy", f"Content-Type: {kind}"]
    lines += [] if length is None else [f"Content-Length: {length}"]
    lines += ["Retry-After: 1"] if status == 503 else []
    lines += ["Cache-Control: no-store", "X-Content-Type-Options: nosniff", "Connection: close", "", ""]
    return "\r\n".join(lines).encode()
