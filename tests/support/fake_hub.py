"""A hub on this computer: the few answers of huggingface.co that downloading a model or a data set needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(models: dict[str, Path], datasets: dict[str, Path]) -> Iterator[str]:
    """Serve folders by id, and give the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._answer()

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            kind, table = "models", models
            if parts[0] == "api":
                kind, parts = parts[1], parts[2:]
                table = models if kind == "models" else datasets
                folder = table.get("/".join(parts[:2]))
                if folder is None:
                    return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return self._api("/".join(parts[:2]), folder, parts[2:])
            if parts[0] == "datasets":
                table, parts = datasets, parts[1:]
            folder = table.get("/".join(parts[:2]))
            if folder is None or len(parts) < 5 or parts[2] != "resolve":
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            path = folder.joinpath(*parts[4:])
            if not path.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content = path.read_bytes()
            tag = f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"'
            return self._send(200, content, {"ETag": tag, "X-Repo-Commit": COMMIT})

        def _api(self, name: str, folder: Path, rest: list[str]) -> None:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            entries = [
                {
                    "type": "file",
                    "path": path.relative_to(folder).as_posix(),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest(),
                }
                for path in files
            ]
            if rest[:1] == ["tree"]:
                return self._json(entries)
            if rest[:1] == ["paths-info"]:
                text = self._body.decode()
                wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
                return self._json([entry for entry in entries if entry["path"] in wanted])
            siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in entries]
            return self._json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
