"""The server in the manner of OpenAI's API, asked over HTTP."""

from __future__ import annotations

import json
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("xllamacpp", reason="the extra llama is not installed")

import tiny
from reference_gguf import compressed, shared_change

from compot_deploy.core.grid import DENSE, Grid
from compot_deploy.errors import InputError, MissingDependencyError
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.writer import write
from compot_deploy.llama import LlamaModel
from compot_deploy.llama import server as module
from compot_deploy.llama.server import ChatTemplate, Sampling, Service, make_server, open_service

pytestmark = pytest.mark.consumer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if messages[0].role == 'x' %}{{ raise_exception('no x') }}{% endif %}"
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    model = compressed(
        tiny.save(folder / "llama3", "llama3"), shared_change(Grid(4, 64), DENSE, 0.6), Grid(8, 64)
    )
    write(model, folder / "small.gguf", GgufOptions(layout="sparse"))
    return folder / "small.gguf"


@pytest.fixture(scope="module")
def served(file: Path) -> Iterator[tuple[str, Service]]:
    service = open_service(file.parent, context=64)
    service.template = ChatTemplate(TEMPLATE, {})
    server = make_server(service, port=0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", service
    server.shutdown()
    server.server_close()
    service.model.close()


def ask(url: str, body: Any = None) -> tuple[int, str]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def completed(base: str, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    status, text = ask(base + path, body)
    assert status == 200, text
    answer = json.loads(text)
    assert isinstance(answer, dict)
    return answer


def events(base: str, path: str, **body: Any) -> list[dict[str, Any]]:
    status, text = ask(base + path, {**body, "stream": True})
    assert status == 200, text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_health_and_models(served: tuple[str, Service]) -> None:
    base, _ = served
    assert ask(base + "/health") == (200, '{"status": "ok"}')
    assert json.loads(ask(base + "/v1/models")[1])["data"][0]["id"] == "small"
    assert ask(base + "/v1/models/small")[0] == 200
    assert ask(base + "/v1/models/other")[0] == ask(base + "/v2", {})[0] == 404


def test_a_completion_is_the_greedy_text(served: tuple[str, Service]) -> None:
    base, service = served
    expected = service.model.generate("Once upon a time", max_tokens=9)
    answer = completed(base, prompt="Once upon a time", max_tokens=9, temperature=0, model="small")
    assert answer["choices"][0]["text"] == expected.text
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] == len(expected.tokens)
    assert answer["usage"]["prompt_tokens"] == expected.prompt_tokens
    ids = service.model.tokenize("Once upon a time")
    assert completed(base, prompt=ids, max_tokens=9, temperature=0)["choices"] == answer["choices"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_is_the_same_text_in_pieces(served: tuple[str, Service], path: str) -> None:
    base, _ = served
    chat = "chat" in path
    body: dict[str, Any] = {"max_tokens": 12, "seed": 5, "temperature": 1.5, "top_p": 0.9}
    body |= {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    choice = completed(base, path, **body)["choices"][0]
    whole = choice["message"]["content"] if chat else choice["text"]
    pieces = [event["choices"][0] for event in events(base, path, **body)]
    text = "".join(p["delta"].get("content", "") if chat else p["text"] for p in pieces)
    assert text == whole and len(pieces) > 3
    assert [p["finish_reason"] for p in pieces][-1] == choice["finish_reason"]
    assert all(p["finish_reason"] is None for p in pieces[:-1])


def test_a_conversation_is_rendered_by_the_template(served: tuple[str, Service]) -> None:
    base, service = served
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}
    ]
    answer = completed(base, "/v1/chat/completions", messages=messages, max_tokens=4, temperature=0)
    ids = service.model.tokenize("user: one two\n", special=False, markers=True)
    expected = service.model.generate(ids, max_tokens=4)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_stop_ends_the_text_before_it_streamed_or_not(served: tuple[str, Service]) -> None:
    base, service = served
    text = service.model.generate("Once", max_tokens=16).text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    expected = text[: text.index(stop)]
    body = {"prompt": "Once", "max_tokens": 16, "temperature": 0, "stop": ["never there", stop]}
    choice = completed(base, **body)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    assert "".join(e["choices"][0]["text"] for e in events(base, "/v1/completions", **body)) == expected


def test_a_seed_repeats_an_answer_and_another_changes_it(served: tuple[str, Service]) -> None:
    base, _ = served
    texts = [
        completed(base, prompt="Once", max_tokens=12, temperature=2, seed=seed)["choices"][0]["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_draws_follow_the_probabilities_and_top_p() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

    def shares(temperature: float, top_p: float) -> np.ndarray:
        choose = Sampling(1, temperature, top_p, 7, (), False).chooser()
        assert choose is not None
        return np.bincount([choose(logits) for _ in range(4000)], minlength=4) / 4000

    assert np.abs(shares(1.0, 1.0) - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
    assert np.abs(shares(1.0, 0.7) - [0.625, 0.375, 0, 0]).max() < 0.03
    assert np.abs(shares(0.5, 1.0) - np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365).max() < 0.03
    assert shares(1.0, 0.0)[0] == 1
    assert Sampling(1, 0.0, 1.0, None, (), False).chooser() is None


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", b"{", 400, "not JSON"),
        ("/v1/completions", b"[1]", 400, "object"),
        ("/v1/completions", b"\xff", 400, "not JSON"),
        ("/v1/completions", {}, 400, "prompt must be"),
        ("/v1/completions", {"prompt": []}, 400, "no tokens"),
        ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt must be"),
        ("/v1/completions", {"prompt": [10**9]}, 400, "outside the vocabulary"),
        ("/v1/completions", {"prompt": [3] * 65}, 400, "65 tokens, the context holds 64"),
        ("/v1/completions", {"prompt": "a", "model": "gpt"}, 404, "'gpt' is not served"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
        ("/v1/completions", {"prompt": "a", "temperature": 3}, 400, "temperature"),
        ("/v1/completions", {"prompt": "a", "top_p": True}, 400, "top_p"),
        ("/v1/completions", {"prompt": "a", "seed": -1}, 400, "seed"),
        ("/v1/completions", {"prompt": "a", "stop": [""]}, 400, "stop"),
        ("/v1/completions", {"prompt": "a", "stream": 1}, 400, "stream"),
        ("/v1/completions", {"prompt": "a", "n": 2}, 400, "n must be 1"),
        ("/v1/completions", {"prompt": "a", "logprobs": 3}, 400, "logprobs is not supported"),
        ("/v1/chat/completions", {"messages": []}, 400, "at least one"),
        ("/v1/chat/completions", {"messages": ["a"]}, 400, "role and a content"),
        ("/v1/chat/completions", {"messages": [{"role": "x", "content": "a"}]}, 400, "no x"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(
    served: tuple[str, Service], path: str, body: Any, status: int, words: str
) -> None:
    base, _ = served
    got, text = ask(base + path, body)
    assert got == status and words in json.loads(text)["error"]["message"]
    assert completed(base, prompt="a", max_tokens=1)["object"] == "text_completion"  # and it still answers


def test_without_a_template_chat_is_refused(served: tuple[str, Service]) -> None:
    base, service = served
    template, service.template = service.template, None
    try:
        status, text = ask(base + "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    finally:
        service.template = template
    assert status == 400 and json.loads(text)["error"]["code"] == "no_chat_template"


def test_a_client_that_leaves_frees_the_model(served: tuple[str, Service]) -> None:
    base, service = served
    body = json.dumps({"prompt": "a", "max_tokens": 60, "stream": True}).encode()
    with urllib.request.urlopen(base + "/v1/completions", body, timeout=60) as reply:
        reply.readline()
    assert completed(base, prompt="a", max_tokens=1)["usage"]["completion_tokens"] <= 1
    with service._lock:
        pass


def test_a_busy_port_and_a_missing_file_are_one_sentence(
    served: tuple[str, Service], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, service = served
    port = int(base.rpartition(":")[2])
    with pytest.raises(InputError, match="Cannot listen"):
        make_server(service, port=port)
    assert module.main([str(file), "--port", str(port), "--context", "32"]) == 2
    assert "Choose another with --port" in capsys.readouterr().err
    assert module.main([str(file.parent / "nothing.gguf")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_file_brings_its_own_template(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.read_header

    metadata = {**real(file).metadata, "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    monkeypatch.setattr(module, "read_header", lambda path: SimpleNamespace(metadata=metadata))
    service = open_service(file, context=16, name="named")
    with service.model as model:
        words = real(file).metadata["tokenizer.ggml.tokens"]
        bos = words[int(real(file).metadata["tokenizer.ggml.bos_token_id"])]
        assert service.template is not None and service.name == "named"
        assert service.template.render([{"role": "user", "content": "a"}]) == f"{bos}a"
        assert isinstance(model, LlamaModel)


def test_a_missing_template_engine_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(MissingDependencyError, match=r"compot-deploy\[llama\]") as raised:
        module.ChatTemplate("{{ messages[0].content }}", {})
    assert raised.value.package == "jinja2" and raised.value.exit_code == 4
