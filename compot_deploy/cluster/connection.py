"""Connections to Ray: to one that is started on this machine for a run, or to a cluster that is there.

Nobody is told of any of this: Ray's usage statistics are switched off in `compot_deploy.silence`, its dashboard is not
started, and what it writes is removed.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any, Final

import torch

from compot_deploy.cluster.ray_workers import checked_workers
from compot_deploy.cluster.workers import ALONE, Workers
from compot_deploy.errors import InputError, MissingDependencyError, RecipeError, first_line

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
        yield checked_workers(ray)
        return
    with _local(ray) if cluster == "local" else _joined(ray, cluster):
        yield checked_workers(ray)


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
        _require_answer(cluster)
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


def _require_answer(cluster: str) -> None:
    """Ray itself asks for minutes where nobody answers, or somebody else.

    Raises:
        InputError: it is so.
    """
    host, _, port = cluster.rpartition(":")
    give = "Give the address that ray start --head printed, or use --cluster local."
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _ANSWER) as connection:
            # What Ray speaks begins as HTTP/2 does, and is answered by settings: a frame of the fourth kind.
            connection.sendall(_GREETING)
            answer = connection.recv(9)
    except OSError as error:
        raise InputError(f"--cluster {cluster}: nobody answers there ({first_line(error)}). {give}") from None
    encrypted = os.environ.get("RAY_USE_TLS", "0") != "0"
    if not encrypted and answer[3:4] != b"\x04":
        raise InputError(f"--cluster {cluster}: what answers there is not Ray. {give}")


_GREETING: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def _processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def advice(cluster: str | None) -> str:
    """That this machine computes one task at a time, where it could compute several; empty otherwise."""
    threads, processors = torch.get_num_threads(), _processors()
    if cluster != "local" or processors < 2 or processors // threads > 1:
        return ""
    return (
        f"--cluster local: torch computes each task with {threads} threads, so one runs at a time on {processors} "
        "processors. With OMP_NUM_THREADS=1 as many run as there are processors, with a memory of its own each."
    )


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray answers SIGTERM by itself from its beginning on; who called us has an answer already."""
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with suppress(ValueError):  # not the main thread, where Ray leaves signals alone
            signal.signal(signal.SIGTERM, kept)
