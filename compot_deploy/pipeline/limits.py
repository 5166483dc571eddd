"""Which limits of a recipe apply to a model: every limit that somebody set is honoured, or refused before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from compot_deploy.accuracy.evaluate import Evaluation
from compot_deploy.accuracy.gate import Criterion, Gate, criterion
from compot_deploy.errors import RecipeError
from compot_deploy.models.tasks import Task, TaskKind
from compot_deploy.recipe import Recipe, default_of, override, recipe_options

_MEASURED: Final[Mapping[TaskKind, frozenset[str]]] = {
    "generation": frozenset(("max_perplexity_ratio", "max_kl", "min_top1", "min_recovery")),
    "masked": frozenset(("max_kl", "min_top1")),
    "classification": frozenset(("max_kl", "min_top1")),
    "token-classification": frozenset(("max_kl", "min_top1")),
    "embedding": frozenset(("min_cosine", "min_recovery")),
    "speech": frozenset(("max_kl", "min_top1", "max_wer_increase")),
    "text-to-text": frozenset(("max_kl", "min_top1")),
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


FEWEST_POSITIONS: Final = 256
"""Tokens below which figures are chance: the standard error of a perplexity ratio is a tenth of itself there."""

_PER_TEXT: Final = 16
"""Tokens that a text counts as, for a model that reads whole texts."""


def limits_of_check(recipe: Recipe, given: Mapping[str, Any], task: Task) -> tuple[Recipe, str]:
    """The limits that a folder is held to, and a sentence that says whose they are.

    A folder may come from anybody, and its recipe with it: its own limits count where they are stricter than what
    everybody gets by default. Limits that whoever checks gives count as they are.

    Args:
        recipe: the folder's, with the given limits in it.
        given: by option, from a gate file or the command line.
        task: what the model is for.
    """
    defaults = {option.name: default_of(option) for option in recipe_options()}
    used: dict[str, Any] = {}
    told = []
    for name in sorted((*_MEASURED[task.kind], "max_export_nmse")):
        own, default = getattr(recipe, name), defaults[name]
        if name == "min_top1" and default is None and task.classifies and not task.generates:
            default = _COLLAPSED_TOP1
        if name in given:
            used[name], whose = given[name], "given"
        elif own is None or (default is not None and _looser(name, own, default)):
            used[name], whose = default, "the default"
            if own is not None:
                whose += f", for the folder's {own:g} is looser"
        else:
            used[name], whose = own, "the default" if own == default else "the folder's own"
        if used[name] is not None:
            told.append(f"--{name.replace('_', '-')} {used[name]:g} ({whose})")
    return override(recipe, **used), f"limits: {'; '.join(told)}."


def _looser(name: str, one: float, other: float) -> bool:
    return one > other if name.startswith("max") else one < other


def positions_criterion(evaluation: Evaluation, task: Task, least: int) -> Criterion:
    """Whether there was text enough to tell anything."""
    if task.generates:
        return criterion(
            "min_positions", float(evaluation.text.tokens), float(least), "at least", "tokens that were read"
        )
    texts = len(evaluation.text.windows)
    return criterion(
        "min_texts", float(texts), float(-(-least // _PER_TEXT)), "at least", "texts that were read"
    )


def least_positions(recipe: Recipe, length: int) -> int:
    """How many tokens an export is evaluated on, at least: as many as were asked for, where those are few.

    Args:
        recipe: of the export.
        length: of a window.
    """
    if recipe.min_positions is not None:
        return recipe.min_positions
    asked = max(1, recipe.evaluation_tokens // length) * length
    return min(FEWEST_POSITIONS, asked)
