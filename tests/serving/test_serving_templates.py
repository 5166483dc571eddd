"""A chat template may say what it likes, and no more than its limits."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="the extra llama is not installed")

from compot_deploy.errors import MissingDependencyError
from compot_deploy.serving.limits import Limits
from compot_deploy.serving.request import RequestError
from compot_deploy.serving.templates import ChatTemplate

LIMITS = Limits(render_seconds=0.5)
USER = [{"role": "user", "content": "hi"}]

Maker = Callable[..., ChatTemplate]


@pytest.fixture
def make() -> Iterator[Maker]:
    made: list[ChatTemplate] = []

    def template(source: str, tokens: dict[str, str] | None = None, **settings: Any) -> ChatTemplate:
        made.append(ChatTemplate(source, tokens or {}, limits=LIMITS, **settings))
        return made[-1]

    yield template
    for one in made:
        one.close()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m.content }}{% endfor %}", "<s>user:hi"),
        ("{% if add_generation_prompt %}assistant{% endif %}", "assistant"),
        ("{% if tools is not none or documents is not none %}tools{% endif %}", ""),
        ("{% for m in messages %}{% break %}{% endfor %}{{ messages | tojson }}", json.dumps(USER)),
        ("{{ {'a': '<é>'} | tojson(indent=1) }}", '{\n "a": "<é>"\n}'),
        ("{% generation %}a{{ messages[0].content }}{% endgeneration %}", "ahi"),
        ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),
        ("{{ messages[0].nothing }}", ""),
        ("{{ strftime_now('%Y') }}", time.strftime("%Y")),
    ],
)
def test_a_template_is_rendered_as_transformers_renders_it(make: Maker, source: str, text: str) -> None:
    assert make(source, {"bos_token": "<s>"}).render(USER) == text
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    theirs, _ = transformers.render_jinja_template(
        [USER], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert theirs == [text]


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (ENDLESS, "more than 0.5 seconds"),
        ("{{ 10 ** (messages | length * 10 ** 10) }}", "more than 0.5 seconds"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for", "unexpected"),
        ("{{ 'a' * 2000000 }}", "2000004 characters, 1048576 are read"),
        ("{{ '\\ud800' }}", "surrogates"),
    ],
)
def test_a_template_that_goes_wrong_is_a_bad_request_and_the_next_is_answered(
    make: Maker, source: str, words: str
) -> None:
    template = make(
        "{% if messages[0].role == 'x' %}" + source + "{% endif %}fine" if source != "{% for" else source
    )
    with pytest.raises(RequestError) as raised:
        template.render([{"role": "x", "content": ""}])
    assert words in str(raised.value) and raised.value.status == 400
    if source != "{% for":
        assert template.render(USER) == "fine"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not count memory")
@pytest.mark.parametrize("source", ["{{ 'a' * 10 ** 10 }}", "{{ ('%' ~ 10 ** 9 ~ 'd') | format(1) }}"])
def test_a_template_gets_no_more_memory_than_its_limit(make: Maker, source: str) -> None:
    template = make(source)
    with pytest.raises(RequestError, match=r"memory|MiB"):
        template.render(USER)


def test_time_is_up_at_the_limit(make: Maker) -> None:
    template = make(ENDLESS)
    begin = time.monotonic()
    with pytest.raises(RequestError, match="seconds"):
        template.render(USER)
    assert 0.5 <= time.monotonic() - begin < 5


def test_conversations_of_many_threads_are_not_mixed_up(make: Maker) -> None:
    template = make("{{ messages[0].content }}" * 50)
    wrong: list[str] = []

    def ask(number: int) -> None:
        for _ in range(20):
            text = template.render([{"role": "user", "content": f"<{number}>"}])
            if text != f"<{number}>" * 50:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_process_is_left(make: Maker) -> None:
    template = make(ENDLESS)
    first = template._process
    with pytest.raises(RequestError):
        template.render(USER)
    with pytest.raises(RequestError):
        template.render(USER)
    template.close()
    assert first is not None and first.returncode is not None and template._process is None
    if os.name == "posix":
        with pytest.raises(ProcessLookupError):
            os.kill(first.pid, 0)


def test_a_missing_template_engine_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=r"compot-deploy\[llama\]") as raised:
        ChatTemplate("{{ messages[0].content }}", {})
    assert raised.value.package == "jinja2" and raised.value.exit_code == 4
