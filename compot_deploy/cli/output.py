"""What a person sees: tables, a line or a bar of progress, nothing of third parties' chatter."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Final, Protocol, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from compot_deploy.cli.printing import Forgiving
from compot_deploy.progress import Progress

_PROSE: Final = ("Greedy text", "Structure", "Gate")
"""Tables that are read, not compared down a column."""

_SECONDS_BETWEEN_LINES: Final = 20.0


class ProgressOnScreen(Progress, Protocol):
    """A progress that takes the screen for a while."""

    def __enter__(self) -> Progress:
        """Begin."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the screen as it is."""
        ...


class _Bars:
    """Draws one bar per label."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, done: int, total: int, label: str) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        elif done < self._bars.tasks[self._tasks[label]].completed:  # the same for another model or format
            self._bars.reset(self._tasks[label])
        self._bars.update(self._tasks[label], completed=done, total=total)


@dataclass
class _Stage:
    """What is known of the work of one label.

    Attributes:
        began: when it was first heard of.
        first: units that were done then.
        told: when a line was printed.
        done: units that were done when it was last heard of.
    """

    began: float
    first: int
    told: float
    done: int


class _Lines:
    """Prints a line when a stage begins and every 20 seconds while it lasts."""

    def __init__(self, stream: Console) -> None:
        self._stream = stream
        self._stages: dict[str, _Stage] = {}

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, done: int, total: int, label: str) -> None:
        now, stage = time.monotonic(), self._stages.get(label)
        if stage is None or done < stage.done:  # fewer than before: the same for another model or format
            self._stages[label] = _Stage(now, done, now, done)
            self._stream.print(Text(f"{label}: {done} of {total}"))
            return
        stage.done = done
        if now - stage.told >= _SECONDS_BETWEEN_LINES and done > stage.first:
            stage.told = now
            left = (now - stage.began) / (done - stage.first) * (total - done)
            self._stream.print(Text(f"{label}: {done} of {total}, about {_minutes(left)} left"))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def console(stream: Any) -> Console:
    """A console that never fails; without a terminal tables get room rather than being folded at 80."""
    file = Forgiving(stream)
    return Console(file=cast(IO[str], file), width=None if file.isatty() else 140, highlight=False)


def progress_on(stream: Console) -> ProgressOnScreen:
    """Bars on a terminal; elsewhere (a file, a pipe, CI) a line now and then, with the time that is left."""
    if not stream.is_terminal:
        return _Lines(stream)
    return _Bars(
        Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=stream,
        )
    )


def print_table(out: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of finished strings."""
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=title in _PROSE)
    for number, column in enumerate(columns):
        left = number == 0 or title in _PROSE
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(re.sub(r"\s*\n\s*", " ⏎ ", cell.strip())) for cell in row))
    out.print(table)


_QUIET: Final = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' own bars too
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Variable to the value that keeps the library that reads it quiet; it is read on import."""


def quiet_libraries(*, warnings_too: bool) -> None:
    """Keep the progress bars, the advice and the warnings of libraries out of ours.

    Whoever has set one of the variables, or asks Python for warnings (``-W``, ``PYTHONWARNINGS``), gets what they asked
    for.

    Args:
        warnings_too: also those that Python shows, in the whole process: for a process that is ours alone.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # It misses an optional kernel, aloud, whenever it is imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if warnings_too and not sys.warnoptions:
        warnings.simplefilter("ignore")
