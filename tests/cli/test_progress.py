"""Laws of progress: without a terminal a line now and then, and the time that is left is that of the work at hand."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from compot_deploy.cli import output

Step = Callable[[float, int, int, str], list[str]]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Step:
    """(seconds that pass, done, total, label) to the lines that are printed."""
    clock, text = [100.0], io.StringIO()
    monkeypatch.setattr(output.time, "monotonic", lambda: clock[0])
    progress = output.progress_on(Console(file=text, width=140)).__enter__()

    def one(seconds: float, done: int, total: int, label: str) -> list[str]:
        clock[0] += seconds
        text.seek(0)
        text.truncate()
        progress(done, total, label)
        return text.getvalue().splitlines()

    return one


def test_a_stage_says_when_it_begins_and_every_twenty_seconds(step: Step) -> None:
    assert step(0, 0, 10, "Make") == ["Make: 0 of 10"]
    assert step(15, 1, 10, "Make") == []
    assert step(15, 2, 10, "Make") == ["Make: 2 of 10, about 2 min left"]
    assert step(5, 3, 10, "Make") == []
    assert step(25, 6, 10, "Make") == ["Make: 6 of 10, about 40 s left"]


def test_a_stage_that_comes_again_is_timed_anew(step: Step) -> None:
    step(0, 0, 10, "Make")
    step(100, 10, 10, "Make")
    assert step(500, 1, 10, "Make") == ["Make: 1 of 10"]
    assert step(30, 4, 10, "Make") == ["Make: 4 of 10, about 60 s left"]


def test_bars_of_a_stage_that_comes_again_start_again() -> None:
    text = io.StringIO()
    with output.progress_on(Console(file=text, force_terminal=True, width=140)) as progress:
        progress(10, 10, "Make")
        progress(1, 10, "Make")
        (task,) = progress._bars.tasks  # type: ignore[attr-defined]
        assert (task.completed, task.finished) == (1, False)
