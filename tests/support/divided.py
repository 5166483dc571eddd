"""What compression gives as one hash, for recipes that divide their work in different ways; and workers far away."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import tiny
from texts import write_lines

from compot_deploy.cluster import ALONE, Workers
from compot_deploy.exporters.artifact import digest
from compot_deploy.models.source import open_source
from compot_deploy.pipeline.compress import compress
from compot_deploy.planning.settings import resolve
from compot_deploy.recipe import Recipe

OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "predicted": {"bits": 2.6, "search": "predicted"},
    "measured block by block": {"bits": 2.6, "search": "coarse", "sequential": True},
    "by rule": {"method": "compot", "allocation": "spectral", "rounds": 2},
}


class Far:
    """Workers elsewhere: everything goes there and back as bytes, and what comes last is done first."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    @property
    def alone(self) -> bool:
        """No."""
        return False

    def map(self, function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any]) -> Iterator[Any]:
        """See `compot_deploy.cluster.Workers.map`."""
        sent = [pickle.dumps((function, shared, item)) for item in items]
        self.asked += [function.__name__] * len(sent)
        done = [pickle.dumps(_call(*pickle.loads(one))) for one in reversed(sent)]
        return iter([pickle.loads(one) for one in reversed(done)])


def _call(function: Callable[[Any, Any], Any], shared: Any, item: Any) -> Any:
    return function(shared, item)


def recipes_in(root: Path) -> dict[str, Recipe]:
    """Recipes for a tiny model, which is written there."""
    common: dict[str, Any] = {
        "model": str(tiny.save(root / "model", num_hidden_layers=2)),
        "calibration": str(write_lines(root / "text.txt")),
        "samples": 48,
        "length": 32,
        "evaluation_tokens": 64,
    }
    return {name: Recipe(**common, **options) for name, options in OPTIONS.items()}


def result_of(recipe: Recipe, work: Path, workers: Workers = ALONE) -> str:
    """Everything that compression gives."""
    work.mkdir()
    made = compress(resolve(recipe, open_source(str(recipe.model))), work, workers=workers)
    told = {
        "matrices": {name: digest(matrix) for name, matrix in made.model.matrices.items()},
        "linears": [asdict(record) for record in made.linears],
        "notes": made.notes,
        "plan": str(made.plan),
        "sensitivities": dict(made.sensitivities),
        "importance": {name: values.tolist() for name, values in made.importance.items()},
    }
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
