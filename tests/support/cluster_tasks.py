"""Functions that a worker of a cluster finds by their names."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compot_deploy.errors import InputError


@dataclass(frozen=True)
class Told:
    """What a task says about where it ran."""

    number: int
    process: int
    threads: int
    numbers: str


def square(shared: int, item: int) -> int:
    """Later ones are done first."""
    time.sleep(0.05 * max(0, 4 - item))
    return shared + item * item


def factor(weight: Tensor, number: int) -> Told:
    """The bits of a factorization, which LAPACK cuts into as many parts as there are threads."""
    vectors = torch.linalg.eigh(weight @ weight.T + number)[1]
    bits = hashlib.sha256(vectors.numpy().tobytes()).hexdigest()
    return Told(number, os.getpid(), torch.get_num_threads(), bits)


def dies_once(folder: Path, number: int) -> int:
    """Every task says that it began; the third kills its worker, the first time that it runs."""
    with (folder / "began.txt").open("a") as file:
        file.write(f"{number}\n")
    died = folder / "died"
    if number == 3 and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return number * number


def always_dies(_: None, number: int) -> int:
    """Its worker is killed as often as it is tried."""
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def where(_: None, number: int) -> tuple[int, str]:
    """On which machine it runs."""
    import ray

    time.sleep(0.3)
    return number, ray.get_runtime_context().get_node_id()


def refuses(_: None, number: int) -> int:
    """Says that its input is wrong."""
    raise InputError(f"layers.{number}: a weight is not finite.")
