"""Text as people have it: whatever a file is called and however it is written, its texts are read and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoTokenizer

from compot_deploy.errors import InputError
from compot_deploy.models import templates
from compot_deploy.models.text_files import TextFile, read_text_file, record_of, records_of_lines
from compot_deploy.models.tokens import load_tokenizer, windows_of_records

TEXTS = ["one\u2028line", "two\x85lines", "three\x0blines", "four"]
COMMON = {"samples": 9, "length": 64, "seed": 0, "source": "t", "vocabulary": 320}


def texts_of(file: TextFile) -> list[str | None]:
    assert file.records is not None
    return [record.text for record in file.records]


def lines_of(key: str = "text") -> str:
    return "\n".join(json.dumps({key: text}, ensure_ascii=False) for text in TEXTS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.txt", "a.data", "a"])
def test_records_end_at_line_feeds_alone_whatever_the_file_is_called(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(lines_of(), encoding="utf-8", newline="\n")
    assert texts_of(read_text_file(tmp_path / name)) == TEXTS


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a"])
def test_an_array_is_as_many_texts_as_it_has_entries(name: str, tmp_path: Path) -> None:
    for value in ([{"text": text} for text in TEXTS], TEXTS):
        if name == "a.json" or value is not TEXTS:
            (tmp_path / name).write_text(json.dumps(value, indent=1))
            assert texts_of(read_text_file(tmp_path / name)) == TEXTS


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines_of(), encoding="utf-8")
    (tmp_path / "a.txt").write_text("\ufeffthe fox", encoding="utf-8")
    assert texts_of(read_text_file(tmp_path / "a.jsonl")) == TEXTS
    assert read_text_file(tmp_path / "a.txt") == TextFile("a.txt", "the fox", None)


def test_text_that_looks_like_a_record_and_is_none_stays_text(tmp_path: Path) -> None:
    for text in ('{"a": 1} is an object', "[1] a footnote", '{"no": "text"}\nmore'):
        (tmp_path / "a.txt").write_text(text)
        assert read_text_file(tmp_path / "a.txt").records is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"text": "a"}\n{"text": ', "a.jsonl, line 2 cannot be read: it is not JSON"),
        ('{"prompt": "a"}', 'line 1 has neither "text"'),
        ('{"messages": []}', "line 1 has no messages"),
        ('{"messages": [{"text": "a"}]}', 'a message without "role"'),
        ('{"conversations": [{"from": "nobody", "value": "a"}]}', "who speaks as 'nobody'"),
        ('{"text": "\\ud800"}', "half of a UTF-16 pair"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "thousands of digits"),
    ],
)
def test_a_record_that_is_none_is_named_with_its_place(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=words):
        read_text_file(tmp_path / "a.jsonl")


def test_conversations_of_other_tools_are_messages() -> None:
    said = [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    wanted = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    assert list(record_of({"conversations": said}, "here").messages) == wanted
    assert list(record_of({"messages": wanted}, "here").messages) == wanted


# -- conversations and the model's own template ----------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['role'] + ': ' + m['content'] + eos_token }}"
    "{% endfor %}{% if tools %}{{ tools | length }} tools{% endif %}"
)
USER = {"role": "user", "content": "the quick fox"}


def folder_with(tmp_path: Path, template: Any) -> Path:
    tiny.tokenizer_files(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return tmp_path


def test_a_conversation_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """The begin token once, where the template writes it; the tokenizer would add another."""
    folder = folder_with(tmp_path, TEMPLATE)
    theirs = AutoTokenizer.from_pretrained(folder)
    for record in ({"messages": [USER]}, {"messages": [USER], "tools": [{"name": "t"}]}):
        (window,) = windows_of_records([record_of(record, "here")], load_tokenizer(folder), **COMMON).windows
        wanted = theirs.apply_chat_template(
            record["messages"], tools=record.get("tools"), tokenize=True, return_dict=False
        )
        assert window.tolist() == wanted[:64] and window.tolist()[:2].count(1) == 1


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (TEMPLATE, [{"role": "system", "content": "s"}, USER], "t, line 1.*roles must alternate"),
        (TEMPLATE, [{"role": "user", "content": None}], "t, line 1: the chat template refuses"),
        ("{% for", [USER], "t, line 1: the chat template refuses"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", [USER], "seconds"),
        ([{"name": "rag", "template": "{{ messages[0].content }}"}], [USER], "chat templates rag and none"),
    ],
    ids=["refused", "content", "syntax", "endless", "named"],
)
def test_a_template_that_refuses_is_named_with_the_line(
    template: Any, messages: list[Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "DEFAULT_LIMITS", templates.TemplateLimits(seconds=0.5))
    records = records_of_lines(json.dumps({"messages": messages}), "t")
    with pytest.raises(InputError, match=words) as raised:
        windows_of_records(records, load_tokenizer(folder_with(tmp_path, template)), **COMMON)
    assert "\n" not in str(raised.value)


def test_of_named_templates_the_default_one_is_taken(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    tokenizer = load_tokenizer(folder_with(tmp_path, named))
    (window,) = windows_of_records([record_of({"messages": [USER]}, "here")], tokenizer, **COMMON).windows
    assert window.tolist() == tokenizer.encode(USER["content"])
