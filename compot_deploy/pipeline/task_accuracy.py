"""Accuracy on tasks of a folder, beside its original: what `--tasks` asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compot_deploy.accuracy.gate import Gate
from compot_deploy.accuracy.harness import (
    TaskFigures,
    Tasks,
    figures_of,
    find_tasks,
    recovery_criteria,
    score_tasks,
)
from compot_deploy.accuracy.runners import RUNNERS
from compot_deploy.accuracy.torch_runner import torch_runner
from compot_deploy.errors import RecipeError
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tasks import Task
from compot_deploy.models.tokens import open_tokenizer
from compot_deploy.progress import Progress
from compot_deploy.report.document import Report, with_criteria


def wanted_tasks(given: Sequence[str], samples: int | None, task: Task) -> Tasks | None:
    """The tasks that were asked for, with their questions; None where none was.

    Args:
        given: names and files.
        samples: most questions of each.
        task: what the model is for.

    Raises:
        RecipeError: a model that writes no text.
        InputError, MissingDependencyError: see `find_tasks`.
    """
    if not given:
        return None
    if not task.generates:
        raise RecipeError(f"--tasks asks for text, and a {task.noun} writes none. Leave it out.")
    return find_tasks(given, samples)


def with_tasks(
    report: Report,
    tasks: Tasks | None,
    folder: Path,
    kind: str,
    original: ModelSource | None,
    gate: Gate,
    progress: Progress,
) -> Report:
    """The report with what the folder scores, beside its original, and the limit on it; one model in memory at a time.

    Args:
        report: of the folder.
        tasks: to be asked; None leaves the report as it is.
        folder: as exported.
        kind: of the folder.
        original: of the folder; None where it is not there.
        gate: its limit on the share of the score that is kept.
        progress: told how far the work is.
    """
    if tasks is None:
        return report
    what = f"Ask {', '.join(tasks.names)}"
    steps = 1 if original is None else 2
    progress(0, steps, what)
    runner: Any = RUNNERS[kind](folder)
    exported = score_tasks(runner, open_tokenizer(folder), tasks)
    getattr(runner, "close", lambda: None)()
    del runner
    progress(1, steps, what)
    before = None
    if original is not None:
        before = score_tasks(torch_runner(original), open_tokenizer(original.folder), tasks)
        progress(2, steps, what)
    figures: tuple[TaskFigures, ...] = figures_of(exported, before)
    return with_criteria(replace(report, tasks=figures), recovery_criteria(figures, gate.min_recovery))
