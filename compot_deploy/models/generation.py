"""generation_config.json: which tokens end a text, asked by everything that stops or writes down where to stop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from compot_deploy.errors import InputError
from compot_deploy.models.weights import read_json

GENERATION: Final = "generation_config.json"


def read_generation(folder: Path) -> dict[str, Any]:
    """What a folder says about generating text; empty where there is no such file.

    Raises:
        InputError: the file is damaged, or its token ids are no ids.
    """
    path = folder / GENERATION
    if not path.is_file():
        return {}
    values = read_json(folder, GENERATION)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = values.get(key)
        for one in ids if isinstance(ids, list) else [ids]:
            if one is not None and (isinstance(one, bool) or not isinstance(one, int)):
                raise InputError(f"{path}: {key} is {ids!r}, not a token id or a list of them.")
    return values


def end_tokens(generation: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a text: those of the generation settings, as in transformers, or else of the configuration."""
    found: Any = next(
        (said for values in (generation, config) if (said := values.get("eos_token_id")) is not None), []
    )
    return tuple(dict.fromkeys(found if isinstance(found, list) else [found]))
