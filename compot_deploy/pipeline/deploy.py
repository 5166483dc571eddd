"""The whole method on one screen: model → calibration → plan → matrices → files → verdict.

Every stage leaves its result in the work folder, a file per block or per input, so a run that was stopped goes on where
it was. The work folder stands beside the output, its name derived from everything that decides its content, and is
removed when the output is complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compot_deploy.cluster.connection import workers_of
from compot_deploy.embedded import MODEL
from compot_deploy.errors import RecipeError
from compot_deploy.exporters.archive import check_archive
from compot_deploy.exporters.signature import read_signing_key
from compot_deploy.exporters.staging import check_target
from compot_deploy.models.source import open_source
from compot_deploy.pipeline.check import Deployment
from compot_deploy.pipeline.compress import compress, context_of, draft_of
from compot_deploy.pipeline.export import export, finished
from compot_deploy.pipeline.limits import gate_of
from compot_deploy.pipeline.memory import check_memory
from compot_deploy.pipeline.task_accuracy import questions_of
from compot_deploy.pipeline.texts import evaluation_of
from compot_deploy.pipeline.workspace import (
    is_finished,
    kept_when_interrupted,
    remove_work,
    reserved,
    targets_of,
    work_folder,
)
from compot_deploy.planning.draft import Draft
from compot_deploy.planning.settings import resolve
from compot_deploy.progress import Progress, silent
from compot_deploy.recipe import Recipe, recipe_from_mapping


def deploy(
    model: str | None = None, *, progress: Progress = silent, **options: Any
) -> tuple[Deployment, ...]:
    """Compress a model, export it, check it: the command line as a function.

    Args:
        model: a local folder or hub id; None takes the small model that ships with the package.
        progress: told how far the work is.
        **options: fields of `compot_deploy.recipe.Recipe`; same names as the flags.

    Returns:
        One deployment per format.

    Raises:
        CompotDeployError: see `compot_deploy.errors`; a failed gate is not raised, it is in the report.
    """
    return run(recipe_from_mapping({"model": model, **options}, origin="deploy()"), progress)


def plan(model: str | None = None, *, progress: Progress = silent, **options: Any) -> Draft:
    """What a budget would be spent on, nothing exported: ``compot-deploy plan`` as a function.

    Args:
        model: a local folder or hub id; None takes the small model that ships with the package.
        progress: told how far the work is.
        **options: fields of `compot_deploy.recipe.Recipe`; same names as the flags.
    """
    values = {"model": model, "allocation": "knapsack", **options}
    return plan_only(recipe_from_mapping(values, origin="plan()"), progress)


def run(recipe: Recipe, progress: Progress = silent, work: Path | None = None) -> tuple[Deployment, ...]:
    """Everything, from a recipe: check what can be checked, compress, then export and evaluate each format.

    Args:
        recipe: what to do.
        progress: told how far the work is.
        work: folder for what is finished, kept afterwards, so that recipes that differ in their budgets alone share
            what was measured; None takes one of its own and removes it.

    Raises:
        CompotDeployError: see `compot_deploy.errors`; another run that writes the same output is an `InputError`.
    """
    key = None if recipe.sign is None else read_signing_key(Path(recipe.sign))
    with reserved(recipe, work):
        source = open_source(recipe.model or MODEL, allow_pickle=recipe.allow_pickle)
        targets = targets_of(recipe)
        own = work_folder(recipe, source) if work is None else work
        there = {kind for kind, target in targets.items() if is_finished(own, recipe, kind, target)}
        for kind, target in targets.items():
            if kind in there:
                continue
            check_target(target, recipe.force)
            if recipe.archive:
                check_archive(target, recipe.force)
        gate = gate_of(recipe, source.task)
        questions = questions_of(recipe.tasks, recipe.task_samples, source.task)
        settings = resolve(recipe, source)
        check_memory(settings)
        with kept_when_interrupted(own), workers_of(recipe.cluster) as workers:
            compression = compress(settings, own, progress, workers)
            evaluation = evaluation_of(recipe, source, own, progress)
            deployments = tuple(
                finished(target, recipe)
                if kind in there
                else export(
                    settings,
                    compression,
                    evaluation,
                    gate,
                    kind,
                    target,
                    own,
                    progress,
                    workers=workers,
                    key=key,
                    questions=questions,
                )
                for kind, target in targets.items()
            )
        if work is None:
            remove_work(own, recipe)
    return deployments


def plan_only(recipe: Recipe, progress: Progress = silent) -> Draft:
    """Measure and plan, export nothing; a later run of the same settings goes on with the measurements.

    Raises:
        RecipeError: the recipe's allocation is not the knapsack.
    """
    if not recipe.planned:
        raise RecipeError(
            f"--allocation {recipe.allocator} has no rate–distortion points to plan with: use knapsack."
        )
    with reserved(recipe):
        source = open_source(recipe.model or MODEL, allow_pickle=recipe.allow_pickle)
        settings = resolve(recipe, source)
        check_memory(settings)
        work = work_folder(recipe, source)
        with kept_when_interrupted(work), workers_of(recipe.cluster) as workers:
            return draft_of(settings, context_of(settings, work, progress, workers))
