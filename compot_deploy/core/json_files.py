"""JSON objects of a folder, read with distrust and written alike everywhere."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from compot_deploy.core.parsing import UnreadableError, decoded, json_of, strict
from compot_deploy.errors import ArtifactError, InputError

_KEYS: Final[Mapping[tuple[str, str], str]] = MappingProxyType(
    {
        ("AccuracyReport", "export_reference"): "export_exact",
        ("AccuracyReport", "export_deployed"): "export_shipped",
        ("Frontier", "all_schemes"): "all_forms",
        ("LayerFigures", "sensitivity"): "effect",
        ("Manifest", "metadata"): "facts",
        ("Report", "diagnostics"): "findings",
        ("Report", "notes"): "facts",
    }
)
"""Keys by class and attribute, where files that exist spell a key otherwise than the code does."""


def key_of(kind: type, attribute: str) -> str:
    """How a JSON file spells an attribute of a dataclass."""
    return _KEYS.get((kind.__name__, attribute), attribute)


def as_object(value: Any) -> dict[str, Any]:
    """A dataclass as a JSON object; of what is inside it, keys are the attributes."""
    return {key_of(type(value), name): entry for name, entry in dataclasses.asdict(value).items()}


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a folder.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        value = json_of(decoded(path.read_bytes()))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: give a folder that compot-deploy wrote.") from None
    except (OSError, UnreadableError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} does not hold a JSON object.")
    return value


def write_object(path: Path, value: Mapping[str, Any], *, indent: int = 2) -> None:
    """Write a JSON object as every file of a folder has it; NaN and infinity, which JSON does not know, become null.

    Raises:
        InputError: a value that JSON does not know.
    """
    try:
        text = json.dumps(strict(value), indent=indent, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise InputError(f"{path.name} cannot be written: {error}.") from None
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
