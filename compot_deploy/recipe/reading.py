"""Recipes from files and keywords, and back to files; every value is checked against the type of its option."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from compot_deploy.core.parsing import UnreadableError, decoded, toml_of
from compot_deploy.errors import InputError, RecipeError
from compot_deploy.recipe.option_types import accepts, describe, fits, hints
from compot_deploy.recipe.options import Recipe


def recipe_to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, one commented option a line; options left unset are commented out."""
    lines = ["# A compot-deploy recipe: use it with --recipe FILE."]
    group = None
    for option in fields(recipe):
        if option.metadata["group"] != group:
            group = option.metadata["group"]
            lines += ["", f"# {group}"]
        value = getattr(recipe, option.name)
        unit = f" [{option.metadata['unit']}]" if option.metadata["unit"] else ""
        line = f"{option.name} = {_toml_value(value)}" if value is not None else f"# {option.name} ="
        lines.append(f"{line}  # {option.metadata['help']}{unit}")
    return "\n".join(lines) + "\n"


def recipe_from_toml(path: Path, **overrides: Any) -> Recipe:
    """Read a recipe file; `overrides` win over the file.

    Raises:
        InputError: the file is missing or is not TOML.
        RecipeError: an unknown key, or a value of the wrong type.
    """
    try:
        values = toml_of(decoded(path.read_bytes()))
    except FileNotFoundError:
        raise InputError(f"The recipe {path} does not exist.") from None
    except (UnreadableError, OSError) as error:
        raise InputError(f"The recipe {path} cannot be read: {error}.") from None
    return recipe_from_mapping({**values, **overrides}, origin=str(path))


def recipe_from_mapping(values: Mapping[str, Any], origin: str) -> Recipe:
    """A recipe from parsed values, each checked against its option's type.

    Args:
        values: option to value; lists are taken for tuples, integers for floats.
        origin: where the values come from, for the error message.

    Raises:
        RecipeError: an unknown option, or a value of the wrong type.
    """
    types = hints()
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise RecipeError(f"{origin}: unknown key {unknown[0]!r}. Known keys: {', '.join(sorted(types))}.")
    checked: dict[str, Any] = {}
    for name, value in values.items():
        kind = types[name]
        converted = tuple(value) if isinstance(value, list) else value
        if isinstance(converted, str) and name in ("format", *_SEPARATED):
            converted = (converted,)
        if isinstance(converted, tuple) and name in _SEPARATED:
            converted = separated(converted)
        if isinstance(converted, int) and not isinstance(converted, bool) and name == "heal":
            converted = str(converted)  # a number of steps
        whole = isinstance(converted, int) and not isinstance(converted, bool)
        if whole and accepts(kind, float) and not accepts(kind, int):
            converted = _as_float(value)
        if not fits(converted, kind):
            raise RecipeError(f"{origin}: {name} = {value!r} is not {describe(kind)}.")
        checked[name] = converted
    return Recipe(**checked)


_SEPARATED: Final = ("compare", "tasks")
"""Lists that may be written with commas."""


def separated(values: Sequence[Any]) -> tuple[str, ...]:
    """A list whose entries may be lists with commas."""
    return tuple(part for entry in values for part in str(entry).split(","))


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
