"""Settings for every test: no network, few threads, one seed; a test that takes long says so."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import time
from collections.abc import Generator

import pytest
import torch

LONGEST = 10.0
"""Seconds that a test may take without the mark `slow`."""

SLACK = 3.0
"""A busy machine counts up to so many times the seconds of a quiet one."""

_TOOK = pytest.StashKey[float]()


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


torch.set_num_threads(1)


def _computed() -> float:
    """Seconds of processor time of this process and of those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    started, computed = time.perf_counter(), _computed()
    try:
        return (yield)
    finally:
        # The smaller of both: a busy machine stretches one, processes side by side the other.
        item.stash[_TOOK] = min(time.perf_counter() - started, _computed() - computed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    took = item.stash.get(_TOOK, 0.0)
    if (
        call.when == "call"
        and report.passed
        and took > SLACK * LONGEST
        and item.get_closest_marker("slow") is None
    ):
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} took {took:.1f} s, more than {LONGEST:g} s and the slack of a busy machine. "
            "Make it smaller, or mark it with @pytest.mark.slow."
        )
    return report
