"""Who may ask a server, and how much; what it says to those who may not; and what it does when a client leaves."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from servers import LIMITS, Served, ToyEngine, ask, completed, serving

from compot_deploy.errors import InputError
from compot_deploy.serving.limits import Limits
from compot_deploy.serving.server import Server

TEXT = b"the quick brown fox "


@pytest.fixture(scope="module")
def toy() -> Iterator[Served]:
    with serving(ToyEngine(TEXT)) as served:
        yield served


@contextlib.contextmanager
def connected(served: Served) -> Iterator[socket.socket]:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        yield connection


def exchanged(served: Served, sent: bytes) -> tuple[int, str, Any]:
    """Status, headers and JSON of what comes back for some bytes."""
    with connected(served) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        got = b""
        while piece := connection.recv(1 << 16):
            got += piece
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode(), json.loads(body)


def post(body: object, path: str = "/v1/completions", host: str = "127.0.0.1", **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(data)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


PROMPT = {"prompt": "a", "max_tokens": 3, "temperature": 0}


# Who may ask


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:80", "10.0.0.7"]
)
def test_an_address_and_localhost_name_this_server(toy: Served, host: str) -> None:
    assert exchanged(toy, post(PROMPT, host=host))[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "127.0.0.1@evil", "a b", "[::1", "127.1"],
)  # fmt: skip
def test_a_name_that_points_here_by_another_hand_is_refused(toy: Served, host: str) -> None:
    status, _, body = exchanged(toy, post(PROMPT, host=host))
    assert status == 421 and body["error"]["code"] == "forbidden"
    status, _, _ = exchanged(toy, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert status == 421


def test_one_host_is_named_and_no_other(toy: Served) -> None:
    assert exchanged(toy, b"GET /health HTTP/1.1\r\n\r\n")[0] == 421
    assert exchanged(toy, b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")[0] == 421
    assert exchanged(toy, b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")[0] == 200


def test_a_name_is_served_where_the_owner_says_so(toy: Served) -> None:
    with Server(toy.service, port=0, names=["model.lan"]) as server:
        assert server.trusts("Model.lan:8080") and not server.trusts("other.lan")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:3000"},
        {"Origin": "http://[bad"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_another_site_may_not_ask(toy: Served, headers: dict[str, str]) -> None:
    computed = toy.service.engine.computed  # type: ignore[attr-defined]
    status, head, body = exchanged(toy, post(PROMPT, host="127.0.0.1:80", **headers))
    assert status == 403 and body["error"]["code"] == "forbidden"
    assert "access-control" not in head.lower()
    assert toy.service.engine.computed == computed  # type: ignore[attr-defined]


@pytest.mark.parametrize("headers", [{"Origin": "http://127.0.0.1:80"}, {"Sec_Fetch_Site": "same-origin"}])
def test_a_page_of_this_server_may(toy: Served, headers: dict[str, str]) -> None:
    assert exchanged(toy, post(PROMPT, host="127.0.0.1:80", **headers))[0] == 200


# How much


LENGTH = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"PUT /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 411),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (LENGTH + b"2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 411),
        (LENGTH + b"-1\r\n\r\n", 411),
        (LENGTH + b"+2\r\n\r\n{}", 411),
        (LENGTH + "²".encode() + b"\r\n\r\n", 411),
        (LENGTH + b"2\r\nContent-Length: 3\r\n\r\n{} ", 411),
        (LENGTH + b"999999999999\r\n\r\n", 413),
        (LENGTH + b"20000000\r\n\r\n" + b" " * 20_000_000, 413),
        (LENGTH + b"10\r\n\r\n{", 408),
    ],
)  # fmt: skip
def test_what_is_no_request_is_told_so_in_json(toy: Served, sent: bytes, status: int) -> None:
    got, head, body = exchanged(toy, sent)
    assert got == status and "application/json" in head
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_a_body_up_to_the_limit_is_read(toy: Served) -> None:
    most = LIMITS.body(ToyEngine.context)
    data = json.dumps(PROMPT).encode()
    assert exchanged(toy, post(data + b" " * (most - len(data))))[0] == 200
    assert exchanged(toy, post(data + b" " * (most - len(data) + 1)))[0] == 413


def test_a_client_that_says_nothing_is_let_go(toy: Served) -> None:
    with connected(toy) as connection:
        connection.sendall(b"POST /v1/comp")
        begin = time.monotonic()
        assert connection.recv(1) == b""
    assert time.monotonic() - begin < LIMITS.request_seconds + 2


def test_a_client_that_sends_a_byte_now_and_then_is_let_go_as_soon(toy: Served) -> None:
    begin = time.monotonic()
    with connected(toy) as connection, contextlib.suppress(OSError):
        while time.monotonic() < begin + 10:
            connection.send(b"a")
            connection.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                if connection.recv(100) == b"":
                    break
    assert time.monotonic() - begin < LIMITS.request_seconds + 3


def test_more_connections_than_the_limit_are_told_so_and_room_is_made_again() -> None:
    with serving(ToyEngine(TEXT), Limits(connections=4)) as served:
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(connected(served)) for _ in range(4)]
            assert until(lambda: len(served.server._open) == 4)
            assert exchanged(served, b"")[0] == 503
            assert threading.active_count() < 20 and len(held) == 4
        assert until(lambda: not served.server._open)
        assert completed(served.url, **PROMPT)["choices"][0]["text"] == "the"


def test_more_requests_than_may_wait_are_told_so_and_health_is_still_known() -> None:
    with serving(ToyEngine(TEXT * 40, 0.01), Limits(waiting=2)) as served:
        with connected(served) as first, connected(served) as second:
            for connection in (first, second):
                connection.sendall(post({"prompt": "a", "max_tokens": 800}))
            assert until(lambda: len(served.service.turns._tickets) == 2)
            status, head, body = exchanged(served, post(PROMPT))
            assert (status, body["error"]["code"]) == (503, "busy") and "Retry-After" in head
            assert ask(served.url + "/health")[0] == 200
        assert until(lambda: not served.service.turns._tickets)


# Clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation_stops_when_its_client_leaves(stream: bool, capfd: pytest.CaptureFixture[str]) -> None:
    engine = ToyEngine(TEXT * 40, 0.005)
    with serving(engine) as served:
        with connected(served) as connection:
            connection.sendall(post({"prompt": "a", "max_tokens": 800, "stream": stream}))
            assert until(lambda: engine.computed > 20)
        assert until(lambda: not served.service.turns._tickets, 2)
        assert engine.computed < 300
        assert completed(served.url, **PROMPT)["choices"][0]["text"] == "the"
    assert capfd.readouterr() == ("", "")


def test_a_client_that_leaves_while_it_waits_is_not_answered() -> None:
    engine = ToyEngine(TEXT * 40, 0.005)
    with serving(engine) as served:
        with connected(served) as first:
            first.sendall(post({"prompt": "a", "max_tokens": 800}))
            assert until(lambda: engine.computed > 0)
            with connected(served) as second:
                second.sendall(post({"prompt": "a", "max_tokens": 800}))
                assert until(lambda: len(served.service.turns._tickets) == 2)
            assert until(lambda: len(served.service.turns._tickets) == 1)
            assert engine.computed < 800
        assert until(lambda: not served.server._open)
        assert engine.computed < 800


def test_a_client_that_leaves_in_the_middle_of_its_request_is_let_go(
    toy: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    for sent in (b"", b"POST", LENGTH + b"100\r\n\r\n{"):
        with connected(toy) as connection:
            connection.sendall(sent)
    assert until(lambda: not toy.server._open)
    assert capfd.readouterr() == ("", "")


def test_a_client_that_does_not_read_frees_the_model() -> None:
    with serving(ToyEngine(b"a" * 999)) as served:
        served.service.engine.decode = lambda tokens: "a" * 100_000 * len(tokens)  # type: ignore[method-assign]
        with connected(served) as connection:
            connection.sendall(post({"prompt": "a", "max_tokens": 900, "stream": True}))
            assert until(lambda: bool(served.service.turns._tickets))
            assert until(lambda: not served.service.turns._tickets, LIMITS.write_seconds + 5)


# Failures


def test_an_unforeseen_failure_is_json_and_told_to_the_log(
    toy: Served, caplog: pytest.LogCaptureFixture
) -> None:
    for stream in (False, True):
        status, text = ask(toy.url + "/v1/completions", {"prompt": "fail", "stream": stream})
        assert status == 500 and "planted" not in text
        assert json.loads(text)["error"]["type"] == "server_error"
    assert len(caplog.records) == 2 and "RuntimeError: planted" in caplog.text
    assert completed(toy.url, **PROMPT)["choices"][0]["text"] == "the"


def test_a_failure_in_the_middle_of_a_stream_is_an_event(toy: Served) -> None:
    engine = ToyEngine(TEXT)
    with serving(engine) as served:
        engine.text = memoryview(TEXT)[:4]  # type: ignore[assignment]
        real, served.service.engine.decode = engine.decode, None  # type: ignore[assignment, method-assign]

        def decode(tokens: Any) -> str:
            if engine.computed == 3:
                raise RuntimeError("planted")
            return real(tokens)

        served.service.engine.decode = decode  # type: ignore[method-assign]
        status, text = ask(served.url + "/v1/completions", {**PROMPT, "max_tokens": 4, "stream": True})
        lines = [line for line in text.split("\n\n") if line]
        assert status == 200 and "error" in json.loads(lines[-1].removeprefix("data: "))
        assert [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]] == ["t", "h"]


def test_what_runs_is_ended_and_told_so_when_the_server_stops() -> None:
    engine = ToyEngine(TEXT * 40, 0.005)
    with serving(engine) as served, connected(served) as connection:
        connection.sendall(post({"prompt": "a", "max_tokens": 800}))
        assert until(lambda: engine.computed > 3)
        assert served.server.stop()
        got = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert got.startswith(b"HTTP/1.1 503 ") and b'"stopping"' in got
        assert engine.computed < 800


def test_a_busy_port_is_one_sentence(toy: Served) -> None:
    with pytest.raises(InputError, match=r"Cannot listen on .* Choose another with --port"):
        Server(toy.service, port=int(toy.url.rpartition(":")[2]))
