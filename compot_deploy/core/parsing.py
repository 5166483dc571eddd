"""JSON, TOML and text that somebody else wrote, read with distrust: whatever is wrong with it becomes one reason.

Python's own readers also stop with a `RecursionError` at a thousand brackets and with a `ValueError` of another kind
at a number of five thousand digits, take NaN for a number, and keep half of a UTF-16 pair that nothing can write.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10 only
    import tomli as tomllib

MARK: Final = "\ufeff"
"""The byte order mark, with which some editors begin a UTF-8 file; it is no text."""


class UnreadableError(ValueError):
    """What was read is not what it should be; the message is one reason, without a full stop."""


def decoded(raw: bytes) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        UnreadableError: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8").removeprefix(MARK)
    except UnicodeDecodeError as error:
        raise UnreadableError(f"it is not UTF-8 text (byte {error.start})") from None


def json_of(text: str) -> Any:
    """What JSON says. NaN and infinity, which JSON does not know and Python writes, become None.

    Raises:
        UnreadableError: it is not JSON; it is nested too deeply, or holds a number or a text that nothing can use.
    """
    try:
        value = json.loads(text, parse_constant=lambda _: None)
        if "\\u" in text or "\\U" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise UnreadableError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise UnreadableError("a text in it holds half of a UTF-16 pair, which no file can hold") from None
    except json.JSONDecodeError as error:
        raise UnreadableError(f"it is not JSON: {error}") from None
    except ValueError:  # the one that Python raises at more than 4,300 digits
        raise UnreadableError("a number in it has thousands of digits") from None
    return value


def toml_of(text: str) -> dict[str, Any]:
    """What TOML says.

    Raises:
        UnreadableError: it is not TOML, or nested too deeply, or holds a number that nothing can use.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UnreadableError("it is nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise UnreadableError(f"it is not TOML: {error}") from None
    except ValueError:
        raise UnreadableError("a number in it has thousands of digits") from None


def strict(value: Any) -> Any:
    """A value as JSON knows it: keys are texts, what is no number is None.

    Raises:
        TypeError: something that JSON does not know.
    """
    return json.loads(json.dumps(value, ensure_ascii=False), parse_constant=lambda _: None)
