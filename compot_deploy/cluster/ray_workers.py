"""Workers of a Ray cluster: of this machine for the time of a run, or of many machines.

Inputs and results travel through Ray's object store; no folder is shared. A task whose worker or machine dies is
computed again elsewhere, by Ray. A machine that joins gets the next tasks, for how many are on their way follows the
cluster. Nobody is told of any of this: Ray's usage statistics are switched off in `compot_deploy.silence`, and its
dashboard is not started.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any, Final, TypeVar

import torch

from compot_deploy.cluster import task
from compot_deploy.cluster.workers import ALONE, Workers
from compot_deploy.errors import (
    CompotDeployError,
    InputError,
    MissingDependencyError,
    RecipeError,
    first_line,
)

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")

_ATTEMPTS: Final = 4
"""Deaths of its worker that a task survives: one that needs more memory than there is kills them for ever."""

_SECONDS: Final = 1.0
"""Between two looks at how large the cluster is."""

_PATIENCE: Final = 120.0
"""Seconds that a cluster without a machine for the tasks is waited for."""

_ANSWER: Final = 5.0
"""Seconds in which an address answers."""


@contextmanager
def workers_of(cluster: str | None) -> Iterator[Workers]:
    """Who computes, as ``--cluster`` says; for the time of a ``with`` statement.

    Args:
        cluster: ``local`` starts Ray on this machine and ends it afterwards; ``auto`` takes the cluster that this
            machine is a part of, an address a certain one of those. None is this process alone.

    Raises:
        MissingDependencyError: Ray is not installed.
        InputError: no cluster answers; none of its machines has enough processors; a worker has other versions.
    """
    if cluster is None:
        yield ALONE
        return
    try:
        import ray
    except ImportError:
        raise MissingDependencyError("ray", "ray", f"--cluster {cluster}") from None
    if ray.is_initialized():
        if cluster != "auto":
            raise RecipeError(
                f"--cluster {cluster}: this process is connected to a Ray cluster already. Use --cluster auto."
            )
        yield _checked(ray)
        return
    with _local(ray) if cluster == "local" else _joined(ray, cluster):
        yield _checked(ray)


_QUIET: Final = MappingProxyType({"log_to_driver": False, "logging_level": logging.ERROR})


@contextmanager
def _local(ray: Any) -> Iterator[None]:
    """Ray on this machine, for nobody else, and gone afterwards with everything that it wrote."""
    folder = tempfile.mkdtemp(prefix="compot-ray-", dir=_short_place())
    with _own_token(ray):
        try:
            with _signals_kept():
                ray.init(
                    address="local",
                    num_cpus=_processors(),
                    include_dashboard=False,
                    _temp_dir=folder,
                    _node_ip_address="127.0.0.1",
                    **_QUIET,
                )
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def _short_place() -> str:
    """Where temporary files belong; where that is a long path, what every Unix has, for names of sockets are short."""
    place = tempfile.gettempdir()
    return place if len(place) <= _SHORT or not os.access("/tmp", os.W_OK) else "/tmp"


_SHORT: Final = 23
"""Characters that a socket's name leaves: 107 without what Ray puts below."""


@contextmanager
def _own_token(ray: Any) -> Iterator[None]:
    """A password for this run. Left to itself, Ray writes one into the home directory, where it stays."""
    if {"RAY_AUTH_MODE", _TOKEN, f"{_TOKEN}_PATH"} & os.environ.keys():
        yield
        return
    os.environ[_TOKEN] = secrets.token_hex(32)
    try:
        yield
    finally:
        del os.environ[_TOKEN]
        os.environ.pop("RAY_AUTH_MODE", None)  # set by Ray
        with suppress(Exception):  # a part of Ray that it does not promise
            ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


_TOKEN: Final = "RAY_AUTH_TOKEN"


@contextmanager
def _joined(ray: Any, cluster: str) -> Iterator[None]:
    """A part of a cluster that runs.

    Raises:
        InputError: there is none.
    """
    if cluster != "auto":
        host, _, port = cluster.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
        except OSError as error:
            raise InputError(
                f"--cluster {cluster}: nobody answers there ({first_line(error)}). Give the address that ray start "
                "--head printed, or use --cluster local."
            ) from None
    try:
        with _signals_kept():
            ray.init(address=cluster, **_QUIET)
    except Exception as error:  # of many kinds: ConnectionError, RuntimeError, ValueError, TimeoutError
        with suppress(Exception):
            ray.shutdown()
        if cluster == "auto":
            raise InputError(
                f"--cluster auto: this machine is no part of a Ray cluster that could be joined ({first_line(error)}). "
                "Start one with ray start --head, or use --cluster local."
            ) from None
        raise InputError(
            f"--cluster {cluster}: this machine could not join the Ray cluster there ({first_line(error)}). Make it "
            f"one of its machines with ray start --address={cluster}."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray answers SIGTERM by itself from its beginning on; who called us has an answer already."""
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with suppress(ValueError):  # not the main thread, where Ray leaves signals alone
            signal.signal(signal.SIGTERM, kept)


def _checked(ray: Any) -> RayWorkers:
    """Workers that can compute what this process would.

    Raises:
        InputError: no machine has enough processors, or one has other versions.
    """
    terms = task.Terms(torch.get_num_threads(), task.versions())
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
