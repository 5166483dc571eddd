"""Accuracy on tasks of a folder, beside its original: what `--tasks` asks for.

Models that write text answer the questions of lm-eval; encoders say how alike pairs of sentences are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compot_deploy.accuracy.gate import Gate
from compot_deploy.accuracy.harness import (
    TaskFigures,
    Tasks,
    TaskScore,
    figures_of,
    find_tasks,
    recovery_criteria,
    score_tasks,
)
from compot_deploy.accuracy.pairs import ENDINGS, Pairs, compare_pairs, cosines, read_pairs
from compot_deploy.accuracy.runners import RUNNERS, TEXT_RUNNERS
from compot_deploy.accuracy.texts import TextRunner, TorchTexts
from compot_deploy.accuracy.torch_runner import torch_runner
from compot_deploy.errors import InputError, RecipeError
from compot_deploy.models.paged import original_to_run
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tasks import EMBEDDING, Task
from compot_deploy.models.tokens import load_tokenizer, open_tokenizer
from compot_deploy.progress import Progress
from compot_deploy.report.document import Report, with_criteria


class Asking(Protocol):
    """One kind of tasks; what a model answers is known to the kind alone."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks."""
        ...

    def of_folder(self, folder: Path, kind: str, context: int) -> Any:
        """What an exported folder answers."""
        ...

    def of_original(self, original: ModelSource, context: int) -> Any:
        """What the original answers."""
        ...

    def compared(self, exported: Any, original: Any | None) -> tuple[TaskFigures, ...]:
        """Scores of both, and the share that the folder keeps."""
        ...


class Questions:
    """Tasks that were asked for; the original answers them once, however many folders there are.

    Args:
        asking: the tasks.
    """

    def __init__(self, asking: Asking) -> None:
        self._asking = asking
        self._original: Any | None = None

    def asked(
        self,
        report: Report,
        folder: Path,
        kind: str,
        original: ModelSource | None,
        gate: Gate,
        context: int,
        progress: Progress,
    ) -> Report:
        """The report with what the folder scores, beside its original, and the limit on it; one model at a time.

        Args:
            report: of the folder.
            folder: as exported.
            kind: of the folder.
            original: of the folder, always the same; None where it is not there.
            gate: its limit on the share of the score that is kept.
            context: tokens that the model reads.
            progress: told how far the work is.
        """
        what = f"Ask {', '.join(self._asking.names)}"
        progress(0, 2, what)
        exported = self._asking.of_folder(folder, kind, context)
        progress(1, 2, what)
        if original is not None and self._original is None:
            self._original = self._asking.of_original(original, context)
        progress(2, 2, what)
        figures = self._asking.compared(exported, self._original)
        return with_criteria(replace(report, tasks=figures), recovery_criteria(figures, gate.min_recovery))


class HarnessTasks:
    """Tasks of lm-eval, for models that write text.

    Args:
        tasks: with their questions.
    """

    def __init__(self, tasks: Tasks) -> None:
        self._tasks, self.names = tasks, tasks.names

    def of_folder(self, folder: Path, kind: str, context: int) -> tuple[TaskScore, ...]:
        """See `Asking`; lm-eval cuts texts at the runner's own context."""
        runner: Any = RUNNERS[kind](folder)
        try:
            return score_tasks(runner, open_tokenizer(folder), self._tasks)
        finally:
            getattr(runner, "close", lambda: None)()

    def of_original(self, original: ModelSource, context: int) -> tuple[TaskScore, ...]:
        """See `Asking`."""
        return score_tasks(torch_runner(original), open_tokenizer(original.folder), self._tasks)

    def compared(
        self, exported: tuple[TaskScore, ...], original: tuple[TaskScore, ...] | None
    ) -> tuple[TaskFigures, ...]:
        """See `Asking`."""
        return figures_of(exported, original)


class ScoredPairs:
    """Pairs of sentences, for encoders.

    Args:
        files: one or more.
        task: that of embeddings.
    """

    def __init__(self, files: Sequence[Pairs], task: Task) -> None:
        self._files, self._task = files, task
        self.names = tuple(one.name for one in files)

    def of_folder(self, folder: Path, kind: str, context: int) -> list[np.ndarray]:
        """See `Asking`."""
        return self._cosines(TEXT_RUNNERS[kind](folder, self._task), folder, context)

    def of_original(self, original: ModelSource, context: int) -> list[np.ndarray]:
        """See `Asking`."""
        return self._cosines(TorchTexts(original_to_run(original), self._task), original.folder, context)

    def _cosines(self, runner: TextRunner, folder: Path, context: int) -> list[np.ndarray]:
        tokenizer = load_tokenizer(folder)
        return [cosines(runner, self._task, tokenizer, one, context) for one in self._files]

    def compared(
        self, exported: list[np.ndarray], original: list[np.ndarray] | None
    ) -> tuple[TaskFigures, ...]:
        """See `Asking`."""
        beside = [None] * len(exported) if original is None else original
        return tuple(map(compare_pairs, self._files, exported, beside))


def questions_of(given: Sequence[str], samples: int | None, task: Task) -> Questions | None:
    """The tasks that were asked for, with their questions; None where none was.

    Args:
        given: names and files.
        samples: most questions of each.
        task: what the model is for.

    Raises:
        RecipeError: a model that neither writes text nor embeds it; tasks of the other kind.
        InputError, MissingDependencyError: see `find_tasks` and `read_pairs`.
    """
    if not given:
        return None
    if task.generates:
        return Questions(HarnessTasks(find_tasks(given, samples)))
    if task.kind != EMBEDDING.kind:
        raise RecipeError(f"--tasks asks decoders and encoders, and a {task.noun} is neither. Leave it out.")
    for name in given:
        if Path(name).suffix.lower() not in ENDINGS:
            raise RecipeError(
                f"--tasks {name}: an {task.noun} writes no text; it is asked how alike sentences are. Give a file of "
                f"pairs with scores ({', '.join(ENDINGS)})."
            )
    files = [read_pairs(Path(name), samples) for name in given]
    twice = next((one.name for one in files if [other.name for other in files].count(one.name) > 1), None)
    if twice is not None:
        raise InputError(f"--tasks: two files are named {twice}, and a report knows them by their names.")
    return Questions(ScoredPairs(files, task))
