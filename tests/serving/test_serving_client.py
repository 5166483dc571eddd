"""OpenAI's own Python client understands every answer."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from servers import Served, ToyEngine, serving

if find_spec("openai") is None:
    pytest.skip("the package openai is not installed", allow_module_level=True)

TEXT = "the \u20ac brown fox "
MESSAGES = [{"role": "user", "content": "hi"}]
GREEDY = {"model": "toy", "temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def toy() -> Iterator[Served]:
    with serving(ToyEngine(TEXT.encode())) as served:
        yield served


@pytest.fixture(scope="module")
def client(toy: Served) -> Iterator[Any]:
    import openai  # takes long, and where the tests are collected nobody needs it

    with openai.OpenAI(base_url=toy.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").object == "model"


def test_a_conversation(client: Any) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, response_format={"type": "text"}, **GREEDY)
    assert type(answer).model_validate(answer.to_dict()) == answer
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "the \ufffd")
    assert choice.finish_reason == "length" and choice.logprobs is None and choice.message.refusal is None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6 and answer.object == "chat.completion"


def test_a_conversation_in_pieces(client: Any) -> None:
    stream = client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "the \ufffd"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage.completion_tokens == 6
    assert {chunk.id for chunk in chunks} == {last.id} and last.object == "chat.completion.chunk"


def test_the_client_collects_a_stream_by_itself(client: Any) -> None:
    asked = {
        **GREEDY,
        "messages": MESSAGES,
        "max_tokens": 50,
        "stop": "ro",
        "logprobs": True,
        "top_logprobs": 1,
    }
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert final.choices[0].message.content == "the \u20ac b" and len(final.choices[0].logprobs.content) == 9


def test_logprobs_of_a_conversation(client: Any) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content][:4] == list("the ")
    assert [entry.bytes for entry in content] == [[116], [104], [101], [32], None, None]
    assert all(-0.1 < entry.logprob < 0 and len(entry.top_logprobs) == 2 for entry in content)
    assert all(entry.top_logprobs[0].token == entry.token for entry in content)


def test_a_completion(client: Any) -> None:
    answer = client.completions.create(prompt="a", logprobs=2, stop="ro", **{**GREEDY, "max_tokens": 50})
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("the \u20ac b", "stop")
    told = choice.logprobs
    assert told.text_offset == [0, 1, 2, 3, 4, 4, 4, 5, 6]
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == 9
    assert answer.object == "text_completion"


def test_a_completion_in_pieces(client: Any) -> None:
    chunks = list(client.completions.create(prompt=[1, 2], stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "the \ufffd"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_errors_are_the_clients_own(client: Any, toy: Served) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(prompt="a" * 2000, **GREEDY)
    assert (bad.value.code, bad.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(prompt="a", model="gpt")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.InternalServerError):
        client.completions.create(prompt="fail", **GREEDY)
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(messages=MESSAGES, response_format={"type": "json_object"}, **GREEDY)
    with pytest.raises(openai.APIStatusError) as misdirected:
        client.with_options(default_headers={"Host": "evil.example"}).models.list()
    assert misdirected.value.status_code == 421
