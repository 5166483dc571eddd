"""The types of options, from the annotations of `Recipe`: for command lines and for values that come from files."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

from compot_deploy.recipe.options import Recipe


def hints() -> dict[str, Any]:
    """The type of every option."""
    return get_type_hints(Recipe)


def option_type(name: str) -> tuple[type, tuple[Any, ...], bool]:
    """(scalar type, choices, repeatable) of an option, for building a command line."""
    kind = hints()[name]
    choices = choices_of(kind)
    if choices:
        return str, choices, False
    if get_origin(kind) is tuple:
        return str, (), True
    for candidate in (bool, int, float, str):
        if accepts(kind, candidate):
            return candidate, (), False
    raise TypeError(name)  # unreachable: every option has one of these types


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The values of an option that has only some; empty for others."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) not in (None, Literal, tuple) else (kind,)


def accepts(kind: Any, candidate: type) -> bool:
    """Whether an option takes values of a type."""
    return candidate in _members(kind)


def fits(value: Any, kind: Any) -> bool:
    """Whether an option takes a value."""
    if choices_of(kind):
        return value in choices_of(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return accepts(kind, bool)
    return any((member is type(None) and value is None) or member is type(value) for member in _members(kind))


def describe(kind: Any) -> str:
    """What an option takes, in words."""
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", type(None): ""}
    if choices_of(kind):
        return "one of " + ", ".join(choices_of(kind))
    if get_origin(kind) is tuple:
        return "a list of strings"
    return " or ".join(filter(None, (names.get(member, str(member)) for member in _members(kind))))
