"""What runs on a worker: it is found by its name on the other machine, and called."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TypeVar

import torch

from compot_deploy import __version__
from compot_deploy.cluster.tensors import send_packed
from compot_deploy.core.code_version import code_version
from compot_deploy.core.memory import give_back_freed_memory, use_one_heap
from compot_deploy.errors import InputError

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Versions:
    """What a result depends on beside its inputs.

    Attributes:
        package: of compot-deploy.
        sources: hash of the code that computes, for one version number stands for many of them.
        torch: as installed.
        transformers: as installed.
        numpy: as installed.
    """

    package: str
    sources: str
    torch: str
    transformers: str
    numpy: str

    def differs(self, other: Versions) -> str:
        """The first difference to another machine, in words; empty without."""
        for one in fields(self):
            own, others = getattr(self, one.name), getattr(other, one.name)
            if own != others and one.name == "sources":
                return f"other sources of compot-deploy {self.package} ({others} there, {own} here)"
            if own != others:
                name = "compot-deploy" if one.name == "package" else one.name
                return f"{name} {others}, and this machine has {own}"
        return ""


@lru_cache(maxsize=1)
def versions() -> Versions:
    """Those of this machine."""
    return Versions(
        package=__version__,
        sources=code_version()[:12],
        torch=torch.__version__,
        transformers=importlib.metadata.version("transformers"),
        numpy=importlib.metadata.version("numpy"),
    )


@dataclass(frozen=True)
class Terms:
    """On which terms a task is computed.

    Attributes:
        threads: of torch; sums are cut by their number, so it is that of the process that asks.
        versions: of that process.
    """

    threads: int
    versions: Versions


def refusal(node: str, difference: str) -> str:
    """Why a machine cannot take part."""
    return (
        f"The worker on {node} has {difference}: results would not be the same. Install the same on every machine of "
        "the cluster."
    )


def run(terms: Terms, function: Callable[[Shared, Item], Result], shared: Shared, item: Item) -> Result:
    """Compute one result.

    Raises:
        InputError: this machine has other versions.
    """
    difference = terms.versions.differs(versions())
    if difference:
        raise InputError(refusal(platform.node(), difference))
    _prepare()
    torch.set_num_threads(terms.threads)
    try:
        return function(shared, item)
    finally:
        give_back_freed_memory()


@lru_cache(maxsize=1)
def _prepare() -> None:
    import ray

    send_packed(ray)
    use_one_heap()
