"""The API in the manner of OpenAI's, asked over HTTP: the same laws for a GGUF file and an ONNX folder."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from servers import Served, ask, completed, events

from compot_deploy.serving.generation import Chooser
from compot_deploy.serving.request import Sampling

pytestmark = pytest.mark.consumer

CHAT = "/v1/chat/completions"
PATHS = pytest.mark.parametrize("path", ["/v1/completions", CHAT])


def question(path: str, text: str = "hi") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}


def said(choice: dict[str, Any]) -> str:
    """Text of a choice or of an event."""
    if "text" in choice:
        return str(choice["text"])
    return str(choice.get("message", choice.get("delta")).get("content", ""))


def test_health_and_models(served: Served) -> None:
    assert ask(served.url + "/health") == (200, '{"status": "ok"}')
    assert json.loads(ask(served.url + "/v1/models")[1])["data"][0]["id"] == "small"
    assert ask(served.url + "/v1/models/small")[0] == 200
    assert ask(served.url + "/v1/models/other")[0] == ask(served.url + "/v2", {})[0] == 404


def test_a_completion_is_the_greedy_text(served: Served) -> None:
    text, made = served.greedy("Once upon a time", 9)
    ids = served.service.engine.encode("Once upon a time", rendered=False)
    answer = completed(served.url, prompt="Once upon a time", max_tokens=9, temperature=0, model="small")
    assert answer["choices"][0]["text"] == text
    assert answer["object"] == "text_completion"
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": len(made),
        "total_tokens": len(ids) + len(made),
    }
    assert completed(served.url, prompt=ids, max_tokens=9, temperature=0)["choices"] == answer["choices"]


@PATHS
def test_a_stream_is_the_same_text_in_pieces(served: Served, path: str) -> None:
    body = {**question(path), "max_tokens": 12, "seed": 5, "temperature": 1.5, "top_p": 0.9}
    choice = completed(served.url, path, **body)["choices"][0]
    pieces = [event["choices"][0] for event in events(served.url, path, **body)]
    assert "".join(map(said, pieces)) == said(choice) and len(pieces) > 3
    assert [p["finish_reason"] for p in pieces][-1] == choice["finish_reason"]
    assert all(p["finish_reason"] is None for p in pieces[:-1])


@PATHS
def test_a_stream_tells_its_numbers_of_tokens_if_asked(served: Served, path: str) -> None:
    body = {**question(path), "max_tokens": 5, "temperature": 0}
    whole = completed(served.url, path, **body)
    *others, last = events(served.url, path, **body, stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(event["usage"] is None and event["choices"] for event in others)
    assert all("usage" not in event for event in events(served.url, path, **body))


def test_a_conversation_is_rendered_by_the_template(served: Served) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}
    ]
    answer = completed(served.url, CHAT, messages=messages, max_tokens=4, temperature=0)
    ids = served.service.engine.encode("user: one two\n", rendered=True)
    message = {"role": "assistant", "content": served.greedy(ids, 4)[0], "refusal": None}
    assert answer["choices"][0]["message"] == message
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_stop_ends_the_text_before_it_streamed_or_not(served: Served) -> None:
    text, _ = served.greedy("Once", 16)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    expected = text[: text.index(stop)]
    body = {"prompt": "Once", "max_tokens": 16, "temperature": 0, "stop": ["never there", stop]}
    choice = completed(served.url, **body)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    assert "".join(said(e["choices"][0]) for e in events(served.url, **body)) == expected
    choice = completed(served.url, **body, logprobs=0)["choices"][0]
    assert all(offset < len(expected) for offset in choice["logprobs"]["text_offset"])
    assert len(choice["logprobs"]["tokens"]) >= 1


def test_the_context_ends_an_answer(served: Served) -> None:
    ids = served.service.engine.encode("Once", rendered=False)
    answer = completed(served.url, prompt=ids, max_tokens=10**30, temperature=0)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == served.service.engine.context + 1
    full = completed(served.url, prompt=[3] * served.service.engine.context, max_tokens=4, temperature=0)
    assert full["usage"]["completion_tokens"] == 1


def test_a_seed_repeats_an_answer_and_another_changes_it(served: Served) -> None:
    texts = [
        completed(served.url, prompt="Once", max_tokens=12, temperature=2, seed=seed)["choices"][0]["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_logprobs_of_a_conversation_are_those_of_the_logits(served: Served) -> None:
    body = {
        **question(CHAT),
        "max_tokens": 6,
        "temperature": 1.7,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 4,
    }
    choice = completed(served.url, CHAT, **body)["choices"][0]
    engine, content = served.service.engine, choice["logprobs"]["content"]
    seen: list[np.ndarray] = []
    draw = Chooser(Sampling(temperature=1.7, seed=3))

    def watch(logits: np.ndarray) -> int:
        seen.append(logits.astype(np.float64))
        return draw(logits)

    made = list(engine.tokens(engine.encode("user: hi\n", rendered=True), 6, watch))
    assert choice["message"]["content"] == engine.decode(made)
    for token, entry, logits in zip(made, content, seen, strict=True):
        logs = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        assert entry["token"] == engine.decode([token])
        assert math.isclose(entry["logprob"], logs[token], abs_tol=1e-9)
        told = [other["logprob"] for other in entry["top_logprobs"]]
        assert np.allclose(told, np.sort(logs)[::-1][:4], atol=1e-9)
        assert entry["bytes"] in (None, list(entry["token"].encode()))
        assert (entry["bytes"] is None) == ("\ufffd" in entry["token"])
    pieces = [event["choices"][0]["logprobs"] for event in events(served.url, CHAT, **body)]
    assert [entry for piece in pieces if piece for entry in piece["content"]] == content
    assert completed(served.url, CHAT, **question(CHAT), max_tokens=2)["choices"][0]["logprobs"] is None


def test_logprobs_of_a_completion_stand_where_their_tokens_do(served: Served) -> None:
    body = {"prompt": "Once", "max_tokens": 8, "temperature": 0, "logprobs": 3}
    choice = completed(served.url, **body)["choices"][0]
    told = choice["logprobs"]
    assert {len(values) for values in told.values()} == {8}
    for token, logprob, top, offset in zip(*told.values(), strict=True):
        assert top[token] == logprob == max(top.values()) and 1 <= len(top) <= 3
        assert "\ufffd" in token or choice["text"].startswith(token, offset)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", b"{", 400, "not JSON"),
        ("/v1/completions", b"[1]", 400, "object"),
        ("/v1/completions", b"\xff", 400, "not JSON"),
        ("/v1/completions", b"[" * 100_000, 400, "not JSON"),
        ("/v1/completions", {}, 400, "prompt must be"),
        ("/v1/completions", {"prompt": []}, 400, "no tokens"),
        ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt must be"),
        ("/v1/completions", {"prompt": [10**9]}, 400, "outside the vocabulary"),
        ("/v1/completions", {"prompt": [-1]}, 400, "outside the vocabulary"),
        ("/v1/completions", {"prompt": [3] * 65}, 400, "65 tokens, the context holds 64"),
        ("/v1/completions", {"prompt": "a\ud800"}, 400, "half of a UTF-16 pair"),
        ("/v1/completions", {"prompt": "a", "model": "gpt"}, 404, "'gpt' is not served"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
        ("/v1/completions", {"prompt": "a", "temperature": 3}, 400, "temperature"),
        ("/v1/completions", {"prompt": "a", "temperature": 10**999}, 400, "temperature"),
        ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        ("/v1/completions", {"prompt": "a", "top_p": True}, 400, "top_p"),
        ("/v1/completions", {"prompt": "a", "seed": -1}, 400, "seed"),
        ("/v1/completions", {"prompt": "a", "stop": [""]}, 400, "stop"),
        ("/v1/completions", {"prompt": "a", "stream": 1}, 400, "stream"),
        ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "need stream"),
        ("/v1/completions", {"prompt": "a", "n": 2}, 400, "n is not supported but for 1"),
        ("/v1/completions", {"prompt": "a", "logprobs": 6}, 400, "logprobs must be a whole number from 0 to 5"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix is not supported"),
        (CHAT, {"messages": []}, 400, "at least one"),
        (CHAT, {"messages": ["a"]}, 400, "role and a content"),
        (CHAT, {"messages": [{"role": "x", "content": "a"}]}, 400, "no x"),
        (CHAT, {**question(CHAT), "top_logprobs": 2}, 400, "needs logprobs"),
        (CHAT, {**question(CHAT), "logprobs": 2}, 400, "logprobs must be true or false"),
        (CHAT, {**question(CHAT), "tools": [{}]}, 400, "tools is not supported"),
        (CHAT, {**question(CHAT), "response_format": {"type": "json_object"}}, 400, '{"type": "text"}'),
    ],
)  # fmt: skip
def test_a_bad_request_is_told_what_is_wrong(
    served: Served, path: str, body: Any, status: int, words: str
) -> None:
    got, text = ask(served.url + path, body)
    assert got == status and words in json.loads(text)["error"]["message"]
    assert completed(served.url, prompt="a", max_tokens=1)["object"] == "text_completion"  # it still answers


def test_what_changes_nothing_may_be_said(served: Served) -> None:
    idle = {
        "response_format": {"type": "text"}, "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "tools": [],
        "tool_choice": "none", "logit_bias": None, "user": "me", "modalities": ["text"], "logprobs": False,
        "stream": False, "stream_options": None, "stop": None, "max_tokens": None, "max_completion_tokens": 3,
    }  # fmt: skip
    answer = completed(served.url, CHAT, **question(CHAT), **idle)
    assert answer["usage"]["completion_tokens"] <= 3


def test_without_a_template_chat_is_refused(served: Served) -> None:
    template, served.service.template = served.service.template, None
    try:
        status, text = ask(served.url + CHAT, question(CHAT))
    finally:
        served.service.template = template
    assert status == 400 and json.loads(text)["error"]["code"] == "no_chat_template"
