"""The ranges of the numbers of a configuration, as a strict dataclass: what transformers checks its own with.

transformers checks types, and only from version 5 on; a context of -1 or a billion layers are of the right type.
"""

# ruff: noqa: RUF009 - fields are made by calls here.
# Annotations are looked at while the class is made, so they must not be texts here.

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Union

from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError

from compot_deploy.errors import InputError

_LONGEST: Final = 2**31 - 1
"""Positions and ids: formats count them in 32 bits."""


# Spelled out: huggingface_hub before version 1 does not know the shorter way.
_Count = Union[int, None]  # noqa: UP007
_Counts = Union[int, list[int], None]  # noqa: UP007
_Number = Union[float, int, None]  # noqa: UP007


def _within(least: int | float, most: int | float) -> Any:
    """A field whose value, or each of whose values, lies within a range; None where a class has none of its name."""

    def check(value: Any) -> None:
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is not None and not least <= one <= most:  # NaN lies nowhere
                raise ValueError(f"is {one}, not between {least:,} and {most:,}")

    return validated_field(check, default=None)


@strict
@dataclass
class Ranges:
    """Settings of a text model by the names that transformers has for all classes; some have a value for each layer."""

    hidden_size: _Counts = _within(1, 2**20)
    intermediate_size: _Counts = _within(1, 2**24)
    num_hidden_layers: _Count = _within(1, 10_000)
    num_attention_heads: _Counts = _within(1, 2**16)
    num_key_value_heads: _Counts = _within(1, 2**16)
    head_dim: _Counts = _within(1, 2**16)
    vocab_size: _Count = _within(1, _LONGEST)
    max_position_embeddings: _Count = _within(1, _LONGEST)
    rms_norm_eps: _Number = _within(0, 1)
    layer_norm_eps: _Number = _within(0, 1)


@strict
@dataclass
class Rope:
    """Settings of one rotary embedding."""

    rope_theta: _Number = _within(1e-3, 1e30)
    factor: _Number = _within(1e-6, 1e9)


def check_ranges(settings: Any, path: Path) -> None:
    """Refuse numbers that no model has.

    Args:
        settings: a configuration of transformers.
        path: of its file, for messages.

    Raises:
        InputError: names the setting, its value and its range.
    """
    text = settings.get_text_config()
    _check(Ranges, {field.name: getattr(text, field.name, None) for field in fields(Ranges)}, path)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: the settings of its rotary embedding are {rope!r}, not an object.")
    of_layers = [value for value in rope.values() if isinstance(value, dict)]
    for one in of_layers or [rope]:
        _check(
            Rope,
            {field.name: one.get(field.name, getattr(text, field.name, None)) for field in fields(Rope)},
            path,
        )
    heads, groups = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise InputError(
            f"{path}: {heads} query heads cannot share {groups} key and value heads (num_key_value_heads) evenly."
        )
    padding, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(padding, int) and isinstance(rows, int) and not -rows <= padding < rows:
        raise InputError(
            f"{path}: pad_token_id is {padding}, and the model knows ids 0 to {rows - 1} (vocab_size {rows}). Resize "
            "the embedding, or name a token that the model has."
        )


def _check(kind: Any, values: dict[str, Any], path: Path) -> None:
    made = kind()
    for name, value in values.items():
        try:
            setattr(made, name, value)  # checks it
        except StrictDataclassError as error:
            cause = error.__cause__
            said = str(cause) if type(cause) is ValueError else f"is {value!r}, not a number"
            raise InputError(f"{path}: {name} {said}.") from None
