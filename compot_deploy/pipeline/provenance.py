"""What published files say about where a model comes from: settings and hashes, and no path of the machine."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from compot_deploy import __version__
from compot_deploy.recipe import Recipe

_PLACES: Final = ("out", "force", "archive")
"""Options that say nothing about what was made."""

_FILES: Final = ("model", "calibration", "evaluation")


def published(recipe: Recipe) -> Recipe:
    """A recipe as others may read it: of a local path its last part, of the output, the workers and the key nothing.

    A hub id or the name of a data set stays as it is. Hashes, which stand beside the names, say what was meant.
    """
    kept: dict[str, Any] = {name: public_name(getattr(recipe, name)) for name in _FILES}
    kept["tasks"] = tuple(str(public_name(task)) for task in recipe.tasks)
    return replace(recipe, out=None, force=False, cluster=None, sign=None, **kept)


def public_name(place: str | None) -> str | None:
    """The last part of a local path; anything else as it is. What UTF-8 does not have is a question mark."""
    if place is None:
        return None
    path = Path(place)
    name = path.resolve().name if path.is_absolute() or path.exists() else place
    return name.encode("utf-8", "replace").decode()


def stamp(recipe: Recipe, calibration: str) -> dict[str, str]:
    """What a file that stands alone says about where it comes from; the same run writes the same bytes.

    Args:
        recipe: what was asked for.
        calibration: hash of the calibration tokens.
    """
    settings = asdict(published(recipe)).items()
    values = {name: value for name, value in settings if name not in _PLACES and value is not None}
    return {
        "recipe": json.dumps(values, sort_keys=True),
        "calibration": calibration,
        "version": __version__,
    }
