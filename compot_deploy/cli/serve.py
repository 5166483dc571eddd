"""An exported ONNX folder as a web page on this machine, where the browser itself runs the model.

The server only hands out files: those of the page, which ``make web`` built into ``compot_deploy/web-bundle``, and
those of the folder, below ``/model/``. Both are looked up in tables made at start, the bundle's ``bundle.json``
and the folder's verified manifest, so that no request can name any other file. It listens on 127.0.0.1 alone
and answers only requests that were addressed to it by that name, which keeps other web sites from reading the
folder through a name of theirs that points here.

Every answer isolates the page (COOP, COEP), which is what lets a browser give WebAssembly threads, and forbids
it to load from or send to anywhere else (CSP).

::

    with PageServer(folder, port=8377) as server:
        print(server.url)
        server.serve_forever()
"""

from __future__ import annotations

import errno
import json
import os
import re
import socketserver
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Final

from compot_deploy import __version__
from compot_deploy.errors import ArtifactError, InputError, MissingBundleError, RecipeError
from compot_deploy.exporters.artifact import file_record, verify
from compot_deploy.exporters.manifest import MANIFEST, FileRecord, Manifest

HOST: Final = "127.0.0.1"
"""The server is for this machine's browser and nobody else."""

DEFAULT_PORT: Final = 8377

BUNDLE: Final = Path(__file__).parents[1] / "web-bundle"
"""What ``make web`` builds; its name is no identifier, so that it is never taken for a Python package."""

MODEL: Final = "/model/"
"""Where the folder lies on the server."""

_BUNDLE_FORMAT: Final = 1
_PIECE: Final = 1 << 18  # bytes read and sent at a time

_PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; "
    "style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report is one self-contained file; the sandbox keeps its scripts, if any, away from this server.
_DOCUMENT_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; font-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox allow-scripts allow-popups"
)
_DATA_POLICY: Final = "default-src 'none'; frame-ancestors 'none'; sandbox"

_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".json": "application/json",
        ".md": "text/plain; charset=utf-8",
        ".toml": "text/plain; charset=utf-8",
        ".txt": "text/plain; charset=utf-8",
        ".jinja": "text/plain; charset=utf-8",
        ".xml": "text/plain; charset=utf-8",
    }
)


@dataclass(frozen=True)
class ServedFile:
    """A file that may be asked for.

    Attributes:
        path: on disk.
        bytes: its size.
        sha256: of its contents, in hexadecimal.
        type: its media type.
        policy: what a browser lets it do.
        modified: its time of change in nanoseconds when it was verified; another time means another file.
    """

    path: Path
    bytes: int
    sha256: str
    type: str
    policy: str
    modified: int


class PageServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves one exported folder; listens as soon as it is made.

    Args:
        folder: an ONNX folder that compot-deploy wrote; every file is compared with its manifest.
        port: to listen on; 0 takes any free one.
        bundle: the built page; `BUNDLE` unless given.

    Raises:
        MissingBundleError: the page was not built.
        ArtifactError: not a folder of ours, damaged, or not one that a browser can generate text from.
        InputError: the port is not free.
        RecipeError: no such port.
    """

    # Without this a port stays busy for a minute after the last server; on Windows it would let two share one.
    allow_reuse_address = os.name != "nt"
    daemon_threads = True

    def __init__(self, folder: Path, port: int = DEFAULT_PORT, *, bundle: Path | None = None) -> None:
        if not 0 <= port <= 65535:
            raise RecipeError(f"--port {port}: give a number from 0 (any free port) to 65535.")
        self.files: Mapping[str, ServedFile] = {**page_files(bundle or BUNDLE), **model_files(folder)}
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            reason = {
                errno.EADDRINUSE: "another program listens there",
                errno.EACCES: "the system keeps it for itself",
            }.get(error.errno or 0, error.strerror or str(error))
            raise InputError(
                f"Port {port} of {HOST} is not to be had: {reason}. Choose another with --port, or --port 0 for "
                "any free one."
            ) from error
        self.port: int = self.server_address[1]
        ends = ("", ":80") if self.port == 80 else (f":{self.port}",)
        self.hosts = frozenset(name + end for name in (HOST, "localhost") for end in ends)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that hangs up in the middle of a download, which is its right."""


def page_files(bundle: Path) -> dict[str, ServedFile]:
    """The files of the page by their path on the server.

    Raises:
        MissingBundleError: it was not built, or not completely, or by another version.
    """
    listing = bundle / "bundle.json"
    remedy = (
        "build it with `make web` in a checkout, which needs Node.js and npm, or install a wheel that has it."
    )
    if not listing.is_file():
        raise MissingBundleError(
            f"The page that `serve` shows was not built: {listing} does not exist; {remedy}"
        )
    try:
        document = json.loads(listing.read_text(encoding="utf-8"))
        if document["format"] != _BUNDLE_FORMAT:
            raise ValueError(f"its format is {document['format']}, not {_BUNDLE_FORMAT}")
        entries = [*document["files"]]
        files = {"/" + entry["path"]: _page_file(bundle, entry) for entry in entries}
        files["/bundle.json"] = _served(
            bundle, file_record(bundle, "bundle.json"), "application/json", _DATA_POLICY
        )
        files["/"] = files["/index.html"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MissingBundleError(f"The page in {bundle} is damaged ({error}); {remedy}") from error
    return files


def model_files(folder: Path) -> dict[str, ServedFile]:
    """The files of an exported folder by their path on the server: those of its manifest, and the manifest.

    Raises:
        ArtifactError: see `PageServer`.
    """
    manifest = verify(folder)
    _check_runs_in_a_browser(folder, manifest)
    files = {}
    for record in (file_record(folder, MANIFEST), *manifest.files):
        kind = _TYPES.get(Path(record.path).suffix, "application/octet-stream")
        policy = _DOCUMENT_POLICY if kind.startswith("text/html") else _DATA_POLICY
        files[MODEL + record.path] = _served(folder, record, kind, policy)
    return files


def _check_runs_in_a_browser(folder: Path, manifest: Manifest) -> None:
    listed = {record.path for record in manifest.files}
    advice = "Export a decoder with --format onnx and serve that folder."
    if "onnx/model.onnx" not in listed:
        raise ArtifactError(
            f"{folder} holds no onnx/model.onnx (it was written for {manifest.exporter}), and a browser runs nothing "
            f"else. {advice}"
        )
    for path in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if path not in listed:
            raise ArtifactError(
                f"{folder} holds no {path}, without which a browser cannot turn text into tokens. {advice}"
            )
    from compot_deploy.exporters.onnx.tensors import read_graph

    graph = read_graph(folder / "onnx" / "model.onnx").graph
    outputs = [output.name for output in graph.output]
    if "logits" not in outputs or not any(name.startswith("present.") for name in outputs):
        raise ArtifactError(
            f"{folder}/onnx/model.onnx returns {', '.join(outputs[:3])}, not logits and a key-value cache, so it "
            f"generates no text. {advice}"
        )


def _page_file(bundle: Path, entry: Mapping[str, Any]) -> ServedFile:
    path, kind, size = str(entry["path"]), str(entry["type"]), entry["bytes"]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", path):
        raise ValueError(f"it names the file {path!r}")
    policy = _PAGE_POLICY if kind.startswith(("text/html", "text/javascript")) else _DATA_POLICY
    record = file_record(bundle, path)
    if (record.bytes, record.sha256) != (size, entry["sha256"]):
        raise ValueError(f"{path} is not the file that was built")
    return _served(bundle, record, kind, policy)


def _served(root: Path, record: FileRecord, kind: str, policy: str) -> ServedFile:
    path = root / record.path
    return ServedFile(path, record.bytes, record.sha256, kind, policy, path.stat().st_mtime_ns)


@dataclass(frozen=True)
class _Span:
    """Bytes `start` to `end` of a file, `end` left out."""

    start: int
    end: int


def requested_span(header: str | None, size: int) -> _Span | None:
    """What a Range header asks for; None for the whole file.

    One range is honoured. Several, or a header that is not understood, mean the whole file, as RFC 9110 (14.2)
    allows.

    Raises:
        ValueError: the range lies outside the file.
    """
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", (header or "").strip())
    if not found or found[1] == found[2] == "":
        return None
    first, last = found.groups()
    if first == "":  # the last so many bytes
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), size if last == "" else min(int(last) + 1, size)
        if last != "" and int(last) < start:
            return None
    if start >= end:
        raise ValueError(f"bytes {start} and up of a file of {size}")
    return _Span(start, end)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version = f"compot-deploy/{__version__}"
    sys_version = ""
    timeout = 60  # seconds that a silent connection may take up a thread

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def _refuse_method(self) -> None:
        self.close_connection = True  # a body may follow that nobody reads
        self._fail(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD are answered.", {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse_method

    def _answer(self, send_body: bool) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            self._fail(HTTPStatus.MISDIRECTED_REQUEST, f"This server is {self.server.url} and no other.")
            return
        # Following a link to the page is fine, wherever it stands; reading the files from elsewhere is not.
        followed = (self.headers.get("Sec-Fetch-Mode"), self.headers.get("Sec-Fetch-Dest")) == (
            "navigate",
            "document",
        )
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and not followed:
            self._fail(HTTPStatus.FORBIDDEN, "Other sites may not read from this server.")
            return
        # The table has plain paths only: an encoded, dotted or doubled one is not in it.
        file = self.server.files.get(urllib.parse.unquote(self.path.partition("?")[0]))
        if file is None:
            self._fail(HTTPStatus.NOT_FOUND, "There is no such file here.")
            return
        try:
            opened = file.path.open("rb")
        except OSError as error:
            self._fail(HTTPStatus.GONE, f"{file.path.name} cannot be read any more: {error.strerror}.")
            return
        with opened:
            status = os.fstat(opened.fileno())
            if (status.st_size, status.st_mtime_ns) != (file.bytes, file.modified):
                self._fail(
                    HTTPStatus.GONE, f"{file.path.name} has changed since it was verified: start serve again."
                )
                return
            self._send(file, opened, send_body)

    def _send(self, file: ServedFile, opened: IO[bytes], send_body: bool) -> None:
        tag = f'"{file.sha256}"'
        headers = {"ETag": tag, "Cache-Control": "no-cache", "Accept-Ranges": "bytes"}
        known = [name.strip().removeprefix("W/") for name in self.headers.get("If-None-Match", "").split(",")]
        if tag in known or "*" in known:
            self._head(HTTPStatus.NOT_MODIFIED, headers, file.policy)
            return
        headers["Content-Type"] = file.type
        asked = self.headers.get("Range") if self.headers.get("If-Range", tag) == tag else None
        try:
            span = requested_span(asked, file.bytes)
        except ValueError:
            size = {"Content-Range": f"bytes */{file.bytes}"}
            self._fail(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "The file is shorter than that.", size)
            return
        status = HTTPStatus.OK
        if span is not None:
            status = HTTPStatus.PARTIAL_CONTENT
            headers["Content-Range"] = f"bytes {span.start}-{span.end - 1}/{file.bytes}"
        span = span or _Span(0, file.bytes)
        headers["Content-Length"] = str(span.end - span.start)
        self._head(status, headers, file.policy)
        if send_body:
            opened.seek(span.start)
            left = span.end - span.start
            while left > 0 and (piece := opened.read(min(left, _PIECE))):
                self.wfile.write(piece)
                left -= len(piece)
            self.close_connection |= left > 0  # the file was cut short meanwhile

    def _fail(self, status: HTTPStatus, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        body = f"{sentence}\n".encode()
        known = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body))}
        self._head(status, {**known, "Cache-Control": "no-store", **(headers or {})}, _DATA_POLICY)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: HTTPStatus, headers: Mapping[str, str], policy: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what could not be parsed as a request, without echoing it."""
        self.close_connection = True
        self.request_version = "HTTP/1.1"  # what was asked in another version gets headers all the same
        self._fail(HTTPStatus(code), "That is not a request that this server understands.")
