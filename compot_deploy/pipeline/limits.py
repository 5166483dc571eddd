"""Which limits of a recipe apply to a model: every limit that somebody set is honoured, or refused before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from compot_deploy.accuracy.gate import Gate
from compot_deploy.errors import RecipeError
from compot_deploy.models.tasks import Task, TaskKind
from compot_deploy.recipe import Recipe, default_of, recipe_options

_MEASURED: Final[Mapping[TaskKind, frozenset[str]]] = {
    "generation": frozenset(("max_perplexity_ratio", "max_kl", "min_top1")),
    "masked": frozenset(("max_kl", "min_top1")),
    "classification": frozenset(("max_kl", "min_top1")),
    "token-classification": frozenset(("max_kl", "min_top1")),
    "embedding": frozenset(("min_cosine",)),
}
"""Limits on the total loss that a task has figures for."""

TOTAL_LIMITS: Final = frozenset(name for names in _MEASURED.values() for name in names)
"""Limits on the total loss, which need the original model."""

_COLLAPSED_TOP1: Final = 0.5
"""Share of the original's choices that a classifier keeps at least, where no limit is set: catches collapse only."""


def gate_of(recipe: Recipe, task: Task) -> Gate:
    """The limits of a recipe, for a task.

    Raises:
        RecipeError: a limit that was set and that the task has no figure for.
    """
    measured = _MEASURED[task.kind]
    defaults = {option.name: default_of(option) for option in recipe_options()}
    limits = {name: getattr(recipe, name) for name in TOTAL_LIMITS}
    for name, limit in limits.items():
        if name not in measured and limit != defaults[name]:
            flag, able = (
                "--" + name.replace("_", "-"),
                ", ".join("--" + n.replace("_", "-") for n in sorted(measured)),
            )
            raise RecipeError(
                f"{flag} does not apply to a {task.noun}: it is evaluated by {able}. Leave it out."
            )
    set_here = {name: limit for name, limit in limits.items() if name in measured}
    if task.classifies and not task.generates and not any(value is not None for value in set_here.values()):
        set_here["min_top1"] = _COLLAPSED_TOP1
    return Gate(**set_here, max_export_nmse=recipe.max_export_nmse)
