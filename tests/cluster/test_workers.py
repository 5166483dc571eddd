"""Laws of divided work: whoever computes it, in whatever order, the results are those of one process, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cluster_tasks
import pytest
import torch
from machines import machines

import compot_deploy
from compot_deploy.cluster import ALONE
from compot_deploy.cluster.connection import workers_of
from compot_deploy.errors import InputError

pytestmark = pytest.mark.slow


def own_answer(*_: object) -> None:
    """Of this process to SIGTERM."""


@contextmanager
def answer_kept() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, own_answer)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def test_results_are_those_of_one_process_whatever_happens_to_workers(tmp_path: Path) -> None:
    numbers, weight = range(12), torch.randn(300, 300)
    with machines(2) as some, answer_kept(), workers_of(some.address) as many:
        assert not many.alone
        assert signal.getsignal(signal.SIGTERM) is own_answer
        # the order is that of the inputs
        expected = list(ALONE.map(cluster_tasks.square, 7, numbers))
        assert list(many.map(cluster_tasks.square, 7, numbers)) == expected
        # a worker that is killed costs its task, and nothing else
        found = list(many.map(cluster_tasks.dies_once, tmp_path, numbers))
        assert found == [number * number for number in numbers]
        began = [int(line) for line in (tmp_path / "began.txt").read_text().split()]
        assert sorted(began) == sorted([*numbers, 3])
        # one that is killed each time is given up
        with pytest.raises(InputError, match="A task was lost, and again each time"):
            list(many.map(cluster_tasks.always_dies, None, [1]))
        # complaints are those of the function
        with pytest.raises(InputError, match=r"^layers\.4: a weight is not finite\.$"):
            list(many.map(cluster_tasks.refuses, None, [4]))
        # bits are those of this number of threads
        told = list(many.map(cluster_tasks.factor, weight, numbers))
        alone = list(ALONE.map(cluster_tasks.factor, weight, numbers))
        assert [(one.number, one.numbers) for one in told] == [(one.number, one.numbers) for one in alone]
        assert {one.threads for one in told} == {torch.get_num_threads()}
        assert os.getpid() not in {one.process for one in told}
        # inputs are made when they are needed
        made: list[int] = []
        coming = many.map(cluster_tasks.square, 0, (made.append(number) or number for number in range(1000)))
        assert next(coming) == 0 and len(made) < 20
    del coming
    assert not sys.modules["ray"].is_initialized()


def test_two_threads_are_two_threads_on_the_workers() -> None:
    weight, before = torch.randn(300, 300), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with machines(2) as some:
            with workers_of(some.address) as many:
                told = list(many.map(cluster_tasks.factor, weight, range(4)))
            alone = list(ALONE.map(cluster_tasks.factor, weight, range(4)))
            assert [one.numbers for one in told] == [one.numbers for one in alone]
            assert {one.threads for one in told} == {2}
            torch.set_num_threads(3)
            refused = pytest.raises(InputError, match=r"3 threads here.* has 2 .*set OMP_NUM_THREADS=2")
            with refused, workers_of(some.address):
                pass
    finally:
        torch.set_num_threads(before)


def test_a_machine_that_joins_late_is_used_and_one_that_leaves_is_not_missed() -> None:
    with machines(2) as some, workers_of(some.address) as many:
        results = many.map(cluster_tasks.where, None, range(60))
        found = [next(results)]
        late = some.join(2)
        found += [next(results) for _ in range(39)]
        assert len({node for _, node in found}) == 2
        some.leave(late)
        found += list(results)
    assert [number for number, _ in found] == list(range(60))


def test_a_machine_of_another_version_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it joins when work is on its way, and where it is there from the beginning."""
    package = Path(compot_deploy.__file__).parent
    shutil.copytree(package, tmp_path / "compot_deploy", ignore=shutil.ignore_patterns("*.so", "web-bundle*"))
    entry = tmp_path / "compot_deploy" / "__init__.py"
    entry.write_text(entry.read_text().replace(f'"{compot_deploy.__version__}"', '"0.0.9"'))
    monkeypatch.chdir(tmp_path / "compot_deploy")  # a worker looks first where the driver stands
    message = r"The worker on .* has compot-deploy 0\.0\.9, and this machine has .*Install the same on every"
    with machines(2) as some:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
        with workers_of(some.address) as many:
            results = many.map(cluster_tasks.where, None, range(100))
            next(results)
            some.join(2)
            with pytest.raises(InputError, match=message):
                list(results)
        with pytest.raises(InputError, match=message), workers_of(some.address):
            pass
