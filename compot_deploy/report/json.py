"""The report as JSON and back, for machines.

The fields are those of the dataclasses, spelled as `compot_deploy.core.json_files.key_of` says; on the way back every
one of them is checked.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from compot_deploy.accuracy.metrics import METRICS_VERSION
from compot_deploy.core.json_files import key_of
from compot_deploy.core.parsing import UnreadableError, json_of
from compot_deploy.errors import InputError
from compot_deploy.report.document import SCHEMA_VERSION, Report


def to_json(report: Report) -> str:
    """The report as JSON. NaN and infinity, which JSON does not know, become null."""
    document = {"passed": report.passed, **_encode(report)}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str, origin: str = "report.json") -> Report:
    """Read a report back. Null where a number belongs becomes NaN; unknown fields are ignored.

    Args:
        text: what `to_json` made.
        origin: where it comes from, for the error message.

    Raises:
        InputError: not a report, or of another schema or metrics version.
    """
    try:
        document = json_of(text)
    except UnreadableError as error:
        raise InputError(f"{origin} cannot be read: {error}.") from None
    if not isinstance(document, dict):
        raise InputError(f"{origin} is not a report: it holds no JSON object.")
    accuracy = document.get("accuracy")
    for what, found, known in (
        ("schema", document.get("schema_version"), SCHEMA_VERSION),
        (
            "metrics",
            accuracy.get("metrics_version") if isinstance(accuracy, dict) else None,
            METRICS_VERSION,
        ),
    ):
        if found != known:
            raise InputError(
                f"{origin} has the {what} version {found}; this compot-deploy knows version {known}. "
                "Make the report again with this version."
            )
    return _decode(Report, document, origin)


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        return {
            key_of(kind, entry.name): _encode(getattr(value, entry.name))
            for entry in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): _encode(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):  # a half character of broken text could not be written as UTF-8
        return value.encode("utf-8", "replace").decode("utf-8")
    return value


T = TypeVar("T")


def _decode(kind: type[T], value: Any, where: str) -> T:
    """Build a dataclass from parsed JSON, checking every field."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {_describe(value)}, not an object.")
    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(kind):  # type: ignore[arg-type]
        key = key_of(kind, entry.name)
        place = f"{where}: {key}" if ": " not in where else f"{where}.{key}"
        if key in value:
            found[entry.name] = _decode_value(hints[entry.name], value[key], place)
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise InputError(f"{place} is missing.")
    return kind(**found)


def _decode_value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode(kind, value, where)
    if kind is Any:
        return _tuples(value)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _decode_value(inner, value, where)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_decode_value(arguments[0], entry, f"{where}[{n}]") for n, entry in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _decode_value(arguments[1], entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if kind is float and value is None:
        return math.nan
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    wanted = "one of " + ", ".join(map(str, arguments)) if origin is Literal else _NAMES.get(kind, "a list")
    raise InputError(f"{where} is {_describe(value)}, not {wanted}.")


_NAMES: Final = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}


def _describe(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _tuples(value: Any) -> Any:
    """Lists as tuples, the way recipes keep them."""
    if isinstance(value, list):
        return tuple(_tuples(entry) for entry in value)
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return value
