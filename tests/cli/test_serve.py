"""Laws of the page server: it hands out exactly what the manifest and the bundle list, to this machine alone."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from compot_deploy import __version__, cli
from compot_deploy.cli import serve
from compot_deploy.cli.serve import PageServer, requested_span
from compot_deploy.errors import (
    EXIT_BAD_INPUT,
    EXIT_MISSING_DEPENDENCY,
    EXIT_OK,
    ArtifactError,
    InputError,
    MissingBundleError,
)
from compot_deploy.exporters.artifact import write_manifest
from compot_deploy.exporters.manifest import MANIFEST, MANIFEST_FORMAT, Manifest

DATA = bytes(range(256)) * 40
PAGE = {
    "index.html": ("text/html; charset=utf-8", b"<!doctype html><title>page</title>"),
    "app.js": ("text/javascript; charset=utf-8", b"export {};"),
    "runtime.wasm": ("application/wasm", b"\0asm\1\0\0\0"),
}


def write_bundle(bundle: Path) -> Path:
    bundle.mkdir()
    files = []
    for name, (kind, content) in PAGE.items():
        (bundle / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files.append({"path": name, "bytes": len(content), "sha256": digest, "type": kind})
    (bundle / "bundle.json").write_text(json.dumps({"format": 1, "files": files}))
    return bundle


def write_folder(folder: Path, outputs: tuple[str, ...] = ("logits", "present.0.key"), **more: str) -> Path:
    """A folder that looks like an exported decoder; only its graph's outputs are ever read."""
    (folder / "onnx").mkdir(parents=True)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", *outputs)]
    nodes = [helper.make_node("Identity", ["x"], [name]) for name in outputs]
    graph = helper.make_graph(nodes, "decoder", value[:1], value[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), folder / "onnx/model.onnx"
    )
    (folder / "onnx" / "model.onnx_data").write_bytes(DATA)
    texts = {"config.json": "{}", "tokenizer.json": "{}", "tokenizer_config.json": "{}", **more}
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    write_manifest(
        folder,
        Manifest(
            format=MANIFEST_FORMAT,
            exporter="onnx",
            package=__version__,
            model_type="llama",
            tied=True,
            recipe={},
            calibration=None,
            seed=None,
            metadata={},
            versions={},
            matrices=(),
            files=(),
        ),
    )
    return folder


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


def ask(server: PageServer, path: str, method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=names)
        response = connection.getresponse()
        return Answer(response.status, dict(response.headers), response.read())
    finally:
        connection.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("page") / "bundle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(
        tmp_path_factory.mktemp("export") / "small",
        **{"compot/report.json": '{"passed": true}', "compot/report.html": "<p>all</p>", "README.md": "# x"},
    )
    (folder / "secret.txt").write_text("not in the manifest")
    (folder.parent / "outside.txt").write_text("not in the folder")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, bundle: Path) -> Iterator[PageServer]:
    with PageServer(folder, 0, bundle=bundle) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _complaint(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


# -- what is served ------------------------------------------------------------------------------------


def test_every_listed_file_is_served_as_it_is(server: PageServer, folder: Path, bundle: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    for record in manifest["files"]:
        answer = ask(server, "/model/" + record["path"])
        assert answer.status == 200
        assert answer.body == (folder / record["path"]).read_bytes()
        assert answer.headers["ETag"] == f'"{record["sha256"]}"'
        assert answer.headers["Content-Length"] == str(record["bytes"])
    assert ask(server, f"/model/{MANIFEST}").body == (folder / MANIFEST).read_bytes()
    for name, (kind, content) in PAGE.items():
        answer = ask(server, "/" + name)
        assert (answer.status, answer.headers["Content-Type"], answer.body) == (200, kind, content)
    assert ask(server, "/?threads=2").body == PAGE["index.html"][1]
    assert ask(server, "/bundle.json").body == (bundle / "bundle.json").read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        "/model/secret.txt",
        "/secret.txt",
        "/model",
        "/model/",
        "/model/onnx",
        "/model/onnx/",
        "/model/../outside.txt",
        "/model/../../outside.txt",
        "/model/%2e%2e/outside.txt",
        "/model/..%2foutside.txt",
        "/model/%2e%2e%2foutside.txt",
        "/model/%252e%252e/outside.txt",
        "/model/..\\outside.txt",
        "/model/onnx/../secret.txt",
        "/model/onnx/../config.json",
        "/model//config.json",
        "/model/config.json/",
        "/model/./config.json",
        "/model/config.json%00",
        "/model/CONFIG.JSON",
        "/model//etc/passwd",
        "//etc/passwd",
        "/etc/passwd",
        "/..%5c..%5coutside.txt",
        "/bundle",
        "model/config.json",
    ],
)
def test_no_other_path_leads_anywhere(server: PageServer, path: str) -> None:
    answer = ask(server, path)
    assert answer.status == 404
    assert answer.body == b"There is no such file here.\n"


@settings(max_examples=60, deadline=None)
@given(path=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40))
def test_a_path_is_served_only_if_it_is_in_the_table(server: PageServer, path: str) -> None:
    name = "/" + unquote(path.partition("?")[0]).lstrip("/")  # http.server reads several slashes as one
    known = name in server.files
    assert (ask(server, "/" + path).status == 200) == known


def test_every_answer_isolates_the_page_and_lets_it_reach_nobody_else(server: PageServer) -> None:
    answers = [
        ask(server, "/"),
        ask(server, "/app.js"),
        ask(server, "/runtime.wasm"),
        ask(server, "/model/onnx/model.onnx_data"),
        ask(server, "/model/onnx/model.onnx_data", Range="bytes=1-2"),
        ask(server, "/model/compot/report.html"),
        ask(server, "/nothing"),
        ask(server, "/", "POST"),
        ask(server, "/", Host="elsewhere.example"),
    ]
    for answer in answers:
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        assert (
            "http" not in policy
            and "*" not in policy
            and "unsafe-eval" not in policy.replace("wasm-unsafe-eval", "")
        )
    page = answers[0].headers["Content-Security-Policy"]
    assert "script-src 'self' 'wasm-unsafe-eval'" in page and "unsafe-inline" not in page
    assert "sandbox" in answers[5].headers["Content-Security-Policy"]
    assert "connect-src" not in answers[5].headers["Content-Security-Policy"]


def test_other_sites_cannot_read_through_a_name_that_points_here(server: PageServer) -> None:
    for host in (
        "elsewhere.example",
        f"elsewhere.example:{server.port}",
        f"127.0.0.1.nip.io:{server.port}",
        "",
    ):
        assert ask(server, "/model/config.json", Host=host).status == 421
    for host in ("127.0.0.1", "localhost"):
        assert ask(server, "/model/config.json", Host=f"{host}:{server.port}").status == 200
    for site in ("cross-site", "same-site"):
        assert ask(server, "/model/config.json", Sec_Fetch_Site=site).status == 403
        opened = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
        assert ask(server, "/", **opened).status == 200
        assert ask(server, "/", **{**opened, "Sec_Fetch_Dest": "iframe"}).status == 403


def test_only_reading_is_understood(server: PageServer) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer = ask(server, "/", method)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
    assert ask(server, "/", "BREW").status == 501
    whole, head = ask(server, "/app.js"), ask(server, "/app.js", "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["Content-Length"] == whole.headers["Content-Length"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for path in ("/app.js", "/nothing", "/app.js"):  # a body after HEAD would be read as the next answer
        connection.request("HEAD", path)
        assert connection.getresponse().read() == b""
    connection.request("GET", "/app.js")
    assert connection.getresponse().read() == whole.body
    connection.close()


# -- parts and caches ----------------------------------------------------------------------------------


@given(size=st.integers(1, 50), first=st.integers(0, 60), last=st.integers(0, 60))
def test_a_range_is_the_slice_that_it_names(size: int, first: int, last: int) -> None:
    data = bytes(range(size))

    def part(header: str) -> bytes | None:
        try:
            span = requested_span(header, size)
        except ValueError:
            return b""
        return None if span is None else data[span.start : span.end]

    assert part(f"bytes={first}-") == data[first:]
    assert part(f"bytes=-{first}") == (data[-first:] if first else b"")
    assert part(f"bytes={first}-{last}") == (None if last < first else data[first : last + 1])


@pytest.mark.parametrize(
    "header", ["", "bytes=", "bytes=-", "bytes=1-2,4-5", "lines=1-2", "bytes=a-b", "bytes=1"]
)
def test_a_range_that_is_not_understood_means_the_whole_file(server: PageServer, header: str) -> None:
    answer = ask(server, "/model/onnx/model.onnx_data", Range=header)
    assert (answer.status, answer.body) == (200, DATA)


def test_parts_of_a_file_are_served_as_such(server: PageServer) -> None:
    path = "/model/onnx/model.onnx_data"
    answer = ask(server, path, Range="bytes=100-1099")
    assert (answer.status, answer.body) == (206, DATA[100:1100])
    assert answer.headers["Content-Range"] == f"bytes 100-1099/{len(DATA)}"
    beyond = ask(server, path, Range=f"bytes={len(DATA)}-")
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{len(DATA)}")
    tag = ask(server, path, "HEAD").headers["ETag"]
    assert ask(server, path, Range="bytes=0-9", If_Range=tag).status == 206
    assert ask(server, path, Range="bytes=0-9", If_Range='"another"').body == DATA


def test_a_cached_file_is_confirmed_by_its_hash(server: PageServer) -> None:
    tag = ask(server, "/model/config.json").headers["ETag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        answer = ask(server, "/model/config.json", If_None_Match=known)
        assert (answer.status, answer.body, answer.headers["ETag"]) == (304, b"", tag)
    assert ask(server, "/model/config.json", If_None_Match='"other"').status == 200
    assert ask(server, "/model/config.json").headers["Cache-Control"] == "no-cache"


def test_a_file_that_changes_after_it_was_verified_is_not_served(tmp_path: Path, bundle: Path) -> None:
    folder = write_folder(tmp_path / "small")
    with PageServer(folder, 0, bundle=bundle) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            weights = folder / "onnx" / "model.onnx_data"
            assert ask(server, "/model/onnx/model.onnx_data").status == 200
            weights.write_bytes(DATA[::-1])
            os.utime(weights, ns=(0, time.time_ns() + 1))
            answer = ask(server, "/model/onnx/model.onnx_data")
            assert answer.status == 410
            assert b"model.onnx_data has changed since it was verified" in answer.body
            weights.unlink()
            assert ask(server, "/model/onnx/model.onnx_data").status == 410
            assert ask(server, "/model/config.json").status == 200
        finally:
            server.shutdown()
            thread.join()


def test_a_browser_that_hangs_up_disturbs_nobody(
    server: PageServer, capfd: pytest.CaptureFixture[str]
) -> None:
    for request in (b"", b"GET", b"GET / HTTP/1.1\r\n", b"nonsense\r\n\r\n", b"\x16\x03\x01\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET / HTTP/9.9\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 505")
    assert ask(server, "/").status == 200
    assert capfd.readouterr() == ("", "")


def test_only_this_machine_is_listened_to(server: PageServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


# -- bad input -----------------------------------------------------------------------------------------


def test_a_busy_port_is_named_with_the_way_out(
    server: PageServer,
    folder: Path,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(serve, "BUNDLE", bundle)
    assert cli.main(["serve", str(folder), "--no-open", "--port", str(server.port)]) == EXIT_BAD_INPUT
    complaint = _complaint(capsys)
    assert f"Port {server.port} of 127.0.0.1 is not to be had: another program listens there" in complaint
    assert "--port 0" in complaint
    assert cli.main(["serve", str(folder), "--no-open", "--port", "70000"]) == EXIT_BAD_INPUT
    assert "--port 70000: give a number from 0" in _complaint(capsys)


def test_a_folder_that_no_browser_can_run_is_refused_with_advice(tmp_path: Path, bundle: Path) -> None:
    no_graph, encoder, no_tokenizer, damaged = (tmp_path / name for name in "abcd")
    for folder, complaint in (
        (tmp_path / "absent", "is not a folder"),
        (tmp_path, "has no compot/manifest.json"),
        (no_graph, "no onnx/model.onnx"),
        (encoder, "returns last_hidden_state, not logits"),
        (no_tokenizer, "no tokenizer.json"),
        (damaged, "is damaged"),
    ):
        if folder is encoder:
            write_folder(folder, outputs=("last_hidden_state",))
        elif folder in (no_graph, no_tokenizer, damaged):
            write_folder(folder)
        missing = {no_graph: "onnx/model.onnx", no_tokenizer: "tokenizer.json"}.get(folder)
        if missing is not None:
            manifest = json.loads((folder / MANIFEST).read_text())
            manifest["files"] = [record for record in manifest["files"] if record["path"] != missing]
            (folder / MANIFEST).write_text(json.dumps(manifest))
        if folder is damaged:
            (folder / "onnx" / "model.onnx_data").write_bytes(DATA[::-1])
        with pytest.raises(ArtifactError, match=complaint):
            PageServer(folder, 0, bundle=bundle)


def test_a_page_that_was_not_built_is_named_with_the_command_that_builds_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "BUNDLE", tmp_path / "absent")
    assert cli.main(["serve", str(folder), "--no-open", "--port", "0"]) == EXIT_MISSING_DEPENDENCY
    assert "was not built" in (complaint := _complaint(capsys)) and "`make web`" in complaint


@pytest.mark.parametrize("damage", ["content", "missing", "format", "path", "json", "index"])
def test_a_damaged_page_is_not_served(folder: Path, tmp_path: Path, damage: str) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    listing = bundle / "bundle.json"
    document = json.loads(listing.read_text())
    if damage == "content":
        (bundle / "app.js").write_bytes(b"export{}; ")
    elif damage == "missing":
        (bundle / "app.js").unlink()
    elif damage == "format":
        document["format"] = 2
    elif damage == "path":
        (tmp_path / "outside.js").write_bytes(PAGE["app.js"][1])
        document["files"][1]["path"] = "../outside.js"
    elif damage == "index":
        del document["files"][0]
    listing.write_text("{" if damage == "json" else json.dumps(document))
    with pytest.raises(MissingBundleError, match=r"damaged.*`make web`"):
        PageServer(folder, 0, bundle=bundle)


def test_ctrl_c_ends_it_cleanly_and_frees_the_port(
    folder: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "BUNDLE", bundle)
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def interrupt() -> None:
        while not opened:
            time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", port)):  # an open connection does not hold it up
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert cli.main(["serve", str(folder), "--port", str(port)]) == EXIT_OK
    thread.join()
    assert opened == [f"http://127.0.0.1:{port}/"]
    out = capsys.readouterr().out
    assert f"http://127.0.0.1:{port}/ runs {folder}" in out and out.endswith("Stopped.\n")
    with PageServer(folder, port, bundle=bundle):
        pass


def test_the_browser_opens_only_if_that_is_wanted(
    folder: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "BUNDLE", bundle)
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve_forever", stop)
    assert cli.main(["serve", str(folder), "--no-open", "--port", "0"]) == EXIT_OK
    assert opened == []


def test_errors_are_of_the_right_kind() -> None:
    assert MissingBundleError("x").exit_code == EXIT_MISSING_DEPENDENCY
    assert InputError("x").exit_code == EXIT_BAD_INPUT
