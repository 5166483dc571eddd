"""Accuracy on tasks of a folder, beside its original: what `--tasks` asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compot_deploy.accuracy.gate import Gate
from compot_deploy.accuracy.harness import (
    Tasks,
    TaskScore,
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


class Questions:
    """Tasks that were asked for; the original answers them once, however many folders there are.

    Args:
        tasks: with their questions.
    """

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._what = f"Ask {', '.join(tasks.names)}"
        self._original: tuple[TaskScore, ...] | None = None

    def asked(
        self,
        report: Report,
        folder: Path,
        kind: str,
        original: ModelSource | None,
        gate: Gate,
        progress: Progress,
    ) -> Report:
        """The report with what the folder scores, beside its original, and the limit on it; one model at a time.

        Args:
            report: of the folder.
            folder: as exported.
            kind: of the folder.
            original: of the folder, always the same; None where it is not there.
            gate: its limit on the share of the score that is kept.
            progress: told how far the work is.
        """
        progress(0, 2, self._what)
        runner: Any = RUNNERS[kind](folder)
        exported = score_tasks(runner, open_tokenizer(folder), self._tasks)
        getattr(runner, "close", lambda: None)()
        del runner
        progress(1, 2, self._what)
        if original is not None and self._original is None:
            runner = torch_runner(original)
            self._original = score_tasks(runner, open_tokenizer(original.folder), self._tasks)
        progress(2, 2, self._what)
        figures = figures_of(exported, self._original)
        return with_criteria(replace(report, tasks=figures), recovery_criteria(figures, gate.min_recovery))


def questions_of(given: Sequence[str], samples: int | None, task: Task) -> Questions | None:
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
    return Questions(find_tasks(given, samples))
