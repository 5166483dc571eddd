"""Laws of limits: every one that somebody set is honoured or refused, and every model has one on its total loss."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from compot_deploy.accuracy.gate import Gate
from compot_deploy.errors import RecipeError
from compot_deploy.models.tasks import Task, TaskKind
from compot_deploy.pipeline.limits import TOTAL_LIMITS, gate_of
from compot_deploy.recipe import Recipe

KINDS: tuple[TaskKind, ...] = get_args(TaskKind)
SET: dict[str, Any] = {
    "max_perplexity_ratio": 1.5,
    "max_kl": 0.5,
    "min_top1": 0.7,
    "min_cosine": 0.95,
    "max_wer_increase": 0.05,
    "min_recovery": 0.95,
}
FIGURES = {
    "generation": {"max_perplexity_ratio", "max_kl", "min_top1", "min_recovery"},
    "masked": {"max_kl", "min_top1"},
    "classification": {"max_kl", "min_top1"},
    "token-classification": {"max_kl", "min_top1"},
    "embedding": {"min_cosine", "min_recovery"},
    "speech": {"max_kl", "min_top1", "max_wer_increase"},
    "text-to-text": {"max_kl", "min_top1"},
}


def task(kind: TaskKind) -> Task:
    return Task(kind, "AutoModel", "model of this kind")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", SET)
def test_a_limit_applies_where_there_is_a_figure_and_is_refused_where_there_is_none(
    kind: TaskKind, limit: str
) -> None:
    recipe = Recipe(**{limit: SET[limit]}, tasks=("a task",) if limit == "min_recovery" else ())
    if limit in FIGURES[kind]:
        assert getattr(gate_of(recipe, task(kind)), limit) == SET[limit]
        return
    flag = "--" + limit.replace("_", "-")
    with pytest.raises(
        RecipeError, match=rf"{flag} does not apply to a model of this kind: it is evaluated by --m"
    ):
        gate_of(recipe, task(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_word_every_model_has_a_limit_that_catches_collapse(kind: TaskKind) -> None:
    gate = gate_of(Recipe(), task(kind))
    assert gate.needs_reference
    set_here = {name for name in TOTAL_LIMITS if getattr(gate, name) is not None}
    expected = {"generation": "max_perplexity_ratio", "embedding": "min_cosine"}.get(kind, "min_top1")
    assert set_here == {expected}
    assert gate.max_export_nmse == Recipe().max_export_nmse


def test_a_limit_of_ones_own_takes_the_place_of_the_one_against_collapse() -> None:
    assert gate_of(Recipe(max_kl=0.3), task("classification")) == Gate(max_kl=0.3)
    assert gate_of(Recipe(max_perplexity_ratio=None), task("generation")) == Gate()


def test_every_limit_on_the_total_loss_is_known() -> None:
    assert set(SET) == TOTAL_LIMITS
