"""JSON objects of a folder, read with distrust and written alike everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compot_deploy.errors import ArtifactError, InputError


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a folder.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: give a folder that compot-deploy wrote.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} does not hold a JSON object.")
    return value


def write_object(path: Path, value: Mapping[str, Any], *, indent: int = 2) -> None:
    """Write a JSON object as every file of a folder has it.

    Raises:
        InputError: a value that JSON does not know.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False)
    except TypeError as error:
        raise InputError(f"{path.name} cannot be written: {error}.") from None
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
