"""What a model can become, said from its configuration alone: no weights are read and nothing is computed.

Every answer is asked of the code that would do the work: the task of the configuration, the matrices that a pass of
shapes shows, and the exporters' own words about each way of writing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.models.source import ModelSource, promised_source
from compot_deploy.report.inspection import Overview

METHODS: Final = ("plan", "factorize", "plain")
"""``--bits`` or ``--ratio`` with a plan by matrix; ``--allocation uniform``; ``--method plain``."""

_CONSUMERS: Final[Mapping[tuple[str, str], tuple[str, ...]]] = {
    ("onnx", "native graph"): ("onnxruntime", "onnxruntime-genai", "optimum", "transformers.js"),
    ("onnx", "traced"): ("onnxruntime", "optimum", "transformers.js"),
    ("gguf", "dense"): ("llama.cpp and everything built on it", "compot-deploy run"),
    ("gguf", "factorized"): ("compot-deploy run",),
    ("gguf", "sparse"): ("compot-deploy run",),
    ("huggingface", "packed"): ("transformers",),
}


@dataclass(frozen=True)
class Way:
    """One way of writing a model.

    Attributes:
        format: as ``--format`` takes it.
        name: of the way.
        objection: why the model cannot go it, as a sentence; None if it can.
        consumers: what reads the result.
    """

    format: str
    name: str
    objection: str | None
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Supported:
    """A model's row of the support matrix.

    Attributes:
        model: as it was named.
        model_type: of its configuration.
        task: what it is for; None where that is not known here.
        objection: why nothing can be done with it, as a sentence; None if something can.
        methods: how its matrices can be compressed.
        matrices: how many there are in its blocks.
        ways: how it can be written.
    """

    model: str
    model_type: str | None
    task: str | None
    objection: str | None
    methods: tuple[str, ...]
    matrices: int
    ways: tuple[Way, ...]


def supported(model: str | Path) -> Supported:
    """A model's row.

    Raises:
        InputError: not there, or a damaged configuration.
    """
    try:
        source = promised_source(model)
    except UnsupportedModelError as error:
        return Supported(str(model), None, None, str(error), (), 0, ())
    return row_of(source, str(model))


def row_of(source: ModelSource, model: str) -> Supported:
    """The row of a model that is opened."""
    kind = source.task.kind
    try:
        matrices = len(source.layout.names)
    except UnsupportedModelError as error:
        return Supported(model, source.model_type, kind, str(error), (), 0, ())
    ways = tuple(
        Way(format_, name, objection, () if objection else _CONSUMERS[format_, name])
        for format_, exporter in EXPORTERS.items()
        for name, objection in exporter.ways(source).items()
    )
    return Supported(model, source.model_type, kind, None, METHODS, matrices, ways)


def as_data(row: Supported) -> dict[str, Any]:
    """A row as JSON has it."""
    return {
        "model": row.model,
        "model_type": row.model_type,
        "task": row.task,
        "objection": row.objection,
        "methods": list(row.methods),
        "matrices": row.matrices,
        "ways": [
            {
                "format": way.format,
                "way": way.name,
                "supported": way.objection is None,
                "objection": way.objection,
                "consumers": list(way.consumers),
            }
            for way in row.ways
        ],
    }


def overview_of(row: Supported) -> Overview:
    """A row as the terminal shows it."""
    if row.objection is not None:
        return Overview(
            f"{row.model}: not supported", ("format", "way", "supported", "read by"), (), (row.objection,)
        )
    return Overview(
        f"{row.model}: {row.model_type}, {row.task}, {row.matrices} matrices",
        ("format", "way", "supported", "read by"),
        tuple(
            (way.format, way.name, way.objection or "yes", ", ".join(way.consumers) or "—")
            for way in row.ways
        ),
        (
            f"Methods: {', '.join(row.methods)}.",
            "When a model is exported, its tokenizer is compared and its graph traced: that may find more.",
        ),
    )
