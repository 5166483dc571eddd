"""Settings for every test: no network, few threads, one seed; warnings of our own are errors; long tests say so."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from shapes import check_shapes_of

check_shapes_of("compot_deploy")

LONGEST = 10.0
"""Seconds that a test may take without the mark `slow`."""

SLACK = 6.0
"""A busy machine counts up to so many times the seconds of a quiet one."""

_TOOK = pytest.StashKey[float]()

_OWN = ("compot_deploy", *sorted(path.stem for path in Path(__file__).parent.rglob("*.py")))

FILTERS = (
    "default",
    "error::pytest.PytestWarning",
    rf"error:::({'|'.join(_OWN)})(\.|\Z)",
    # Deprecations of others are shown, even where they are counted as ours because we make the call: a release of
    # somebody else's breaks nobody's tests. `make newest` is where they are errors.
    "default::DeprecationWarning",
    "default::PendingDeprecationWarning",
    "default::FutureWarning",
    # beartype cannot resolve forward references of third-party stubs; the check is skipped, nothing else changes.
    "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning",
    # SWIG types of compiled third-party modules.
    "ignore:builtin type .* has no __module__ attribute:DeprecationWarning",
)
"""Warnings of our own modules are errors, those of others are not. Later lines win."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first, so that at the end no worker waits for another one's long file."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """Nothing of what was imported is looked through again for garbage: a million objects, each time half a second."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    for line in FILTERS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def _traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers of one run share what they traced; their folders lie side by side."""
    try:
        from traces import traces_kept_in
    except ImportError:  # an environment without onnx
        yield
        return
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own
    with traces_kept_in(shared / "traces"):
        yield


@pytest.fixture(scope="session", autouse=True)
def _short_reports() -> Iterator[None]:
    """Evaluations of tiny models go on for a few tokens, and draw nothing."""
    try:
        from short import short_reports
    except ImportError:  # a copy of this file, beside tests of its own
        yield
        return
    with short_reports():
        yield


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
