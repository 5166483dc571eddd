"""Workers of a Ray cluster.

Inputs and results travel through Ray's object store; no folder is shared. A task whose worker or machine dies is
computed again elsewhere, by Ray. A machine that joins gets the next tasks, for how many are on their way follows the
cluster.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Final, TypeVar

import torch

from compot_deploy.cluster import task
from compot_deploy.cluster.tensors import send_packed
from compot_deploy.errors import CompotDeployError, InputError, first_line

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")

_ATTEMPTS: Final = 4
"""Deaths of its worker that a task survives: one that needs more memory than there is kills them for ever."""

_SECONDS: Final = 1.0
"""Between two looks at how large the cluster is."""

_PATIENCE: Final = 120.0
"""Seconds that a cluster without a machine for the tasks is waited for."""


def checked_workers(ray: Any) -> RayWorkers:
    """Workers that can compute what this process would.

    Raises:
        InputError: no machine has enough processors, or one has other versions.
    """
    terms = task.Terms(torch.get_num_threads(), task.versions())
    send_packed(ray)
    workers = RayWorkers(ray, terms)
    most = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    if most < terms.threads:
        raise InputError(
            f"torch computes with {terms.threads} threads here, and the largest machine of the cluster has {most} "
            f"processors for Ray: set OMP_NUM_THREADS={max(1, most)}."
        )
    workers.check_versions()
    return workers


class RayWorkers:
    """The processors of a Ray cluster, as many for a task as torch has threads here.

    Args:
        ray: the module, connected.
        terms: of every task.
    """

    def __init__(self, ray: Any, terms: task.Terms) -> None:
        self._ray, self._terms = ray, terms
        self._run = ray.remote(task.run).options(num_cpus=terms.threads, max_retries=_ATTEMPTS)
        self._looked, self._slots = -_SECONDS, 0
        self._since = time.monotonic()

    @property
    def alone(self) -> bool:
        """No."""
        return False

    def check_versions(self) -> None:
        """Ask every machine what it has.

        Raises:
            InputError: something else than this one.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ask = self._ray.remote(_asking())
        asked = {
            node["NodeManagerHostname"]: ask.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote()
            for node in self._ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) >= self._terms.threads
        }
        for name, answer in asked.items():
            found = self._ray.get(answer)
            if isinstance(found, str):
                raise InputError(task.refusal(name, f"no compot-deploy that could be asked ({found})"))
            difference = self._terms.versions.differs(task.Versions(**found))
            if difference:
                raise InputError(task.refusal(name, difference))

    def map(
        self, function: Callable[[Shared, Item], Result], shared: Shared, items: Iterable[Item]
    ) -> Iterator[Result]:
        """See `Workers.map`."""
        sent = self._ray.put(shared)
        terms = self._ray.put(self._terms)
        coming = iter(items)
        outstanding: deque[Any] = deque()
        running: set[Any] = set()
        more = True
        try:
            while True:
                while more and self._has_room(len(running), len(outstanding)):
                    try:
                        item = next(coming)
                    except StopIteration:
                        more = False
                        break
                    answer = self._run.remote(terms, function, sent, item)
                    del item  # the store has it
                    outstanding.append(answer)
                    running.add(answer)
                if not outstanding:
                    return
                if running:
                    ready, _ = self._ray.wait(
                        list(running), num_returns=1, timeout=_SECONDS, fetch_local=False
                    )
                    running.difference_update(ready)
                while outstanding and outstanding[0] not in running:
                    yield self._result(outstanding.popleft())
        finally:
            if self._ray.is_initialized():  # asked after its end, Ray would begin again
                for answer in outstanding:
                    with suppress(Exception):
                        self._ray.cancel(answer)

    def _has_room(self, running: int, outstanding: int) -> bool:
        """Whether another task may be on its way: enough that nobody waits, few enough that they fit into memory."""
        slots = self._slots_now()
        return running < slots + slots // 2 + 1 and outstanding < 4 * slots + 4

    def _slots_now(self) -> int:
        """Tasks that the cluster computes at a time, as it is now.

        Raises:
            InputError: it has had no machine for them for a while.
        """
        now = time.monotonic()
        if now - self._looked >= _SECONDS:
            self._looked = now
            self._slots = sum(
                int(node["Resources"].get("CPU", 0)) // self._terms.threads
                for node in self._ray.nodes()
                if node["Alive"]
            )
            if self._slots:
                self._since = now
            elif now - self._since > _PATIENCE:
                raise InputError(
                    f"The cluster has had no machine with {self._terms.threads} processors for {_PATIENCE:.0f} s. Add "
                    "one with ray start, then run the same command: it goes on with what is finished."
                )
        return self._slots

    def _result(self, answer: Any) -> Any:
        try:
            return self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CompotDeployError):
                raise error.cause from None
            self.check_versions()  # a machine that joined later may not even know the function
            raise error.cause or error from None
        except self._ray.exceptions.RayError as error:
            raise InputError(
                f"A task was lost, and again each time that it was repeated ({first_line(error)}). The memory of a "
                "machine may not be enough for it: use more memory for each task, or fewer tasks on a machine, then "
                "run the same command: it goes on with what is finished."
            ) from None


def _asking() -> Callable[[], Any]:
    """A function that is sent as it is: a machine that has no compot-deploy, or an old one, answers it too."""

    def ask() -> Any:
        try:
            from dataclasses import asdict

            from compot_deploy.cluster.task import versions

            return asdict(versions())
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    return ask
