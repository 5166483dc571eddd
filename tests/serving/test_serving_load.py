"""Many clients at once, some of which leave: every answer is right, and the server is afterwards as it was before.

``COMPOT_DEPLOY_LOAD=1000`` asks as many questions of each format, which took three minutes and a half on two busy
cores.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cases import nightly
from servers import ask, completed, started

REQUESTS = int(os.environ.get("COMPOT_DEPLOY_LOAD", "75"))
AT_ONCE = 50
PROMPTS = ("the quick brown", "fox", "a small model reads", "every word of this text and learns", "Once")


@dataclass(frozen=True)
class State:
    """Of a process.

    Attributes:
        threads: that it has.
        kilobytes: of memory that are its own and resident.
        files: that it has open.
    """

    threads: int
    kilobytes: int
    files: int


def state(pid: int) -> State:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    facts = {
        name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.split()
    }
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return State(int(facts["Threads"]), int(facts["RssAnon"]), files)


def settled(pid: int, url: str) -> State:
    """The state once nobody is served any more."""
    end = time.monotonic() + 20
    while True:
        now = state(pid)
        time.sleep(0.3)
        if state(pid) == now or time.monotonic() > end:
            assert ask(url + "/health")[0] == 200
            return now


def question(number: int) -> dict[str, Any]:
    sampling = {"temperature": 0} if number % 3 else {"temperature": 1.3, "seed": number % 7, "top_p": 0.95}
    return {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 4 + number % 13, **sampling}


def answered(url: str, number: int, expected: Mapping[str, str]) -> str:
    """Ask as one of several kinds of client; ``right``, ``left``, or what went wrong."""
    draw = random.Random(number)
    body, kind = (
        question(number),
        draw.choice(["whole", "whole", "stream", "leaves", "leaves early", "leaves stream"]),
    )
    data = json.dumps(
        {**body, "stream": "stream" in kind} | ({"max_tokens": 200} if "leaves" in kind else {})
    )
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
    try:
        if kind == "leaves early":
            connection.connect()
            connection.sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
            )
            time.sleep(draw.random() / 10)
            return "left"
        connection.request("POST", "/v1/completions", data)
        if kind == "leaves":
            time.sleep(draw.random() / 2)
            return "left"
        reply = connection.getresponse()
        if kind == "leaves stream":
            for _ in range(draw.randrange(6)):
                reply.readline()
            return "left"
        text = reply.read().decode()
    finally:
        connection.close()
    if reply.status != 200:
        return f"{reply.status}: {text}"
    if kind == "stream":
        *lines, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        got = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
        return "right" if done == "[DONE]" and got == expected[json.dumps(body)] else f"wrong: {got!r}"
    got = json.loads(text)["choices"][0]["text"]
    return "right" if got == expected[json.dumps(body)] else f"wrong: {got!r}"


@pytest.mark.slow
@pytest.mark.consumer
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["gguf", *nightly("onnx")], indirect=True)
def test_many_clients_leave_nothing_behind_and_none_gets_the_answer_of_another(
    models: dict[str, Path], kind: str
) -> None:
    with started(models[kind]) as (process, url), ThreadPoolExecutor(AT_ONCE) as pool:
        questions = {json.dumps(question(number)): question(number) for number in range(REQUESTS)}
        expected = {key: completed(url, **body)["choices"][0]["text"] for key, body in questions.items()}

        def round_of(numbers: range) -> list[str]:
            return list(pool.map(lambda number: answered(url, number, expected), numbers))

        round_of(range(AT_ONCE))  # what is made once is made
        before = settled(process.pid, url)
        outcomes = round_of(range(REQUESTS))
        after = settled(process.pid, url)
        print(
            f"{kind}: {REQUESTS} requests, {outcomes.count('right')} answers, {before} before, {after} after"
        )
        assert set(outcomes) == {"right", "left"}, set(outcomes)
        assert outcomes.count("right") > REQUESTS / 4
        assert (after.threads, after.files) == (before.threads, before.files)
        assert after.kilobytes - before.kilobytes < 6_000, (before, after)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert threading.active_count() < AT_ONCE
