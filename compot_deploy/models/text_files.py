"""Text files as people have them: running text, or records, one a line or in an array.

What a file is, its name says (``.json``, ``.jsonl``, ``.ndjson``), or its first line where that is a record. A record
ends at a line feed and nowhere else: U+2028 and its relatives stand inside of texts. A byte order mark is no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compot_deploy.core.parsing import UnreadableError, decoded, json_of
from compot_deploy.errors import InputError

_LINES: Final = (".jsonl", ".jsonlines", ".ndjson", ".ldjson", ".jl")
_WHOLE: Final = ".json"

ENDINGS: Final = (".txt", ".md", _WHOLE, *_LINES)
"""Of names that mean a file, even where there is none."""

_ROLES: Final[Mapping[str, str]] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "system": "system", "tool": "tool",
    "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""Who speaks in lists of ``{"from", "value"}``, as Hugging Face's templates call them."""

_KEYS: Final = ("text", "messages", "conversations")


@dataclass(frozen=True)
class Record:
    """One text of several, or one conversation.

    Attributes:
        where: for messages.
        text: of a text; None for a conversation.
        messages: of a conversation, as Hugging Face has them.
        tools: that a conversation may call.
    """

    where: str
    text: str | None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class TextFile:
    """What was read.

    Attributes:
        name: of the file.
        text: of all of it.
        records: where it consists of some; None for running text.
    """

    name: str
    text: str
    records: tuple[Record, ...] | None


def read_text_file(path: Path) -> TextFile:
    """Running text, or the records of a file.

    Raises:
        InputError: missing, empty, not text; or a record that is none.
    """
    text, ending = read_text(path), path.suffix.lower()
    if ending in _LINES:
        return TextFile(path.name, text, records_of_lines(text, path.name))
    if ending == _WHOLE:
        return TextFile(path.name, text, _records_of_json(text, path.name))
    if _begins_with_record(text):
        return TextFile(path.name, text, _records_of_json(text, path.name))
    return TextFile(path.name, text, None)


def read_text(path: Path) -> str:
    """Text of a UTF-8 file.

    Raises:
        InputError: missing, empty, or not text.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"The text {path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"The text {path} cannot be read: {getattr(error, 'strerror', error)}.") from None
    try:
        text = decoded(raw)
    except UnreadableError as error:
        raise InputError(f"{path} cannot be read: {error}. Give a plain text or JSON lines file.") from None
    if "\0" in text:
        raise InputError(f"{path} is binary, not text. Give a plain text or JSON lines file.")
    if not text.strip():
        raise InputError(f"{path} is empty. Give a text that resembles what the model will read.")
    return text


def records_of_lines(text: str, source: str) -> tuple[Record, ...]:
    """One record a line; empty lines are left out.

    Raises:
        InputError: names the line that is no record.
    """
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{source}, line {number}"
            found.append(record_of(_json(line, where), where))
    return tuple(found)


def record_of(value: Any, where: str) -> Record:
    """A record of ``{"text"}``, ``{"messages"}``, ``{"conversations"}``, or a text by itself.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(value, str):
        return Record(where, value)
    if isinstance(value, dict):
        if isinstance(value.get("text"), str):
            return Record(where, value["text"])
        for key in ("messages", "conversations"):
            if isinstance(value.get(key), list):
                tools = value.get("tools")
                messages = tuple(_message(entry, where) for entry in value[key])
                if not messages:
                    raise InputError(f"{where} has no {key}: leave it out, or give some.")
                return Record(where, None, messages, tuple(tools) if isinstance(tools, list) else None)
    raise InputError(f'{where} has neither "text" nor "messages" nor "conversations".')


def _message(entry: Any, where: str) -> Mapping[str, Any]:
    if isinstance(entry, dict) and isinstance(entry.get("role"), str):
        return entry
    if isinstance(entry, dict) and "from" in entry and isinstance(entry.get("value"), str):
        role = _ROLES.get(str(entry["from"]))
        if role is not None:
            return {"role": role, "content": entry["value"]}
        raise InputError(f"{where}: nobody knows who speaks as {entry['from']!r}: use {', '.join(_ROLES)}.")
    raise InputError(f'{where} has a message without "role" and "content".')


def _records_of_json(text: str, source: str) -> tuple[Record, ...]:
    """An array of records, one record, or one a line."""
    try:
        value = json_of(text)
    except UnreadableError:
        if len([line for line in text.split("\n") if line.strip()]) > 1 and text.lstrip()[:1] != "[":
            return records_of_lines(text, source)
        value = _json(text, source)
    if isinstance(value, list):
        return tuple(
            record_of(entry, f"{source}, record {number}") for number, entry in enumerate(value, start=1)
        )
    return (record_of(value, source),)


def _begins_with_record(text: str) -> bool:
    """Whether the first line of a file is a record, whatever its name says."""
    first = text.lstrip().split("\n", 1)[0].strip()
    if first[:1] == "[":  # an array: of records, or anything at all in brackets
        first = text.strip()
    elif first[:1] != "{":
        return False
    try:
        value = json_of(first)
    except UnreadableError:
        return False
    value = value[0] if isinstance(value, list) and value else value
    return isinstance(value, dict) and any(key in value for key in _KEYS)


def _json(text: str, where: str) -> Any:
    try:
        return json_of(text)
    except UnreadableError as error:
        raise InputError(f"{where} cannot be read: {error}.") from None
