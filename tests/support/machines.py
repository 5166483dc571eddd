"""Ray's own test cluster: machines that are groups of processes on this one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

STORE: Final = 100 * 2**20


class Machines:
    """A cluster whose first machine computes nothing."""

    def __init__(self, *processors: int) -> None:
        from ray.cluster_utils import Cluster

        first = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=first)
        self.address = str(self._cluster.address)
        for count in processors:
            self.join(count)

    def join(self, processors: int) -> Any:
        """Another machine."""
        return self._cluster.add_node(num_cpus=processors, object_store_memory=STORE)

    def leave(self, node: Any) -> None:
        """A machine is switched off."""
        self._cluster.remove_node(node)

    def stop(self) -> None:
        """Switch all of them off."""
        self._cluster.shutdown()


@contextmanager
def machines(*processors: int) -> Iterator[Machines]:
    """Machines with so many processors, on which the tests' own modules are found."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        made = Machines(*processors)
        try:
            yield made
        finally:
            made.stop()
