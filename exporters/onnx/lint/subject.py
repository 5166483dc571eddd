"""What every rule of the lint looks at: a folder, its graph and its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from onnx import ModelProto, NodeProto, TensorProto

from compot_deploy.core.diagnostics import Diagnostic, Severity
from compot_deploy.core.parsing import UnreadableError, decoded, json_of
from compot_deploy.errors import ArtifactError
from compot_deploy.exporters.onnx.nodes import TRACED
from compot_deploy.exporters.onnx.tensors import GRAPH, TensorReader, external_extent

CHUNK: Final = 1 << 24
"""Bytes that are looked at at once."""

TASKS: Final = ("generation", "features", "encoder", "decoder")
"""What a graph is traced for."""


@dataclass
class Subject:
    """A folder that is looked at, its graph, and what all rules ask of them.

    Attributes:
        folder: as `OnnxExporter.write` makes it.
        model: its graph, loaded without its tensors.
        graph: where that lies, relative to the folder.
        reader: of its tensors, one at a time through the mapped data file.
    """

    folder: Path
    model: ModelProto
    graph: str = GRAPH
    reader: TensorReader = field(init=False)

    def __post_init__(self) -> None:
        self.reader = TensorReader(self.model.graph, (self.folder / self.graph).parent)

    @cached_property
    def producers(self) -> Mapping[str, NodeProto]:
        """Node by output."""
        return {value: node for node in self.model.graph.node for value in node.output if value}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json; empty where it is missing or damaged."""
        return json_object(self.folder / "config.json") or {}

    @cached_property
    def task(self) -> str | None:
        """What the graph was traced for; None for a native graph."""
        found = {entry.key: entry.value for entry in self.model.metadata_props}.get(TRACED)
        return found if found is None or found in TASKS else "features"

    def dims(self, value: str) -> tuple[int, ...] | None:
        """Shape of a stored tensor, through a cast; None if it is not stored."""
        node = self.producers.get(value)
        name = str(node.input[0]) if node is not None and node.op_type == "Cast" else value
        return tuple(self.reader.protos[name].dims) if name in self.reader.protos else None

    def stored(self, name: str) -> list[int] | None:
        """The numbers of a small stored tensor of integers, None if it is not there."""
        try:
            data = self.reader.bytes_of(name)
        except ArtifactError:
            return None
        wide = self.reader.protos[name].data_type == TensorProto.INT64
        return [int(number) for number in (data.clone().view(torch.int64) if wide else data)]

    def extent(self, name: str) -> object:
        """Where a value is stored: its place in the data file, or its name."""
        proto = self.reader.protos.get(name)
        if proto is not None and proto.data_location == TensorProto.EXTERNAL:
            try:
                return external_extent(proto)
            except ArtifactError:
                return name
        return name


def in_graph(severity: Severity, where: str, sentence: str) -> Diagnostic:
    """A diagnostic about a place in the graph."""
    return Diagnostic(severity, f"{GRAPH}: {where}", sentence)


def integers_of(node: NodeProto) -> dict[str, int]:
    """The attributes of a node that are integers."""
    return {attribute.name: attribute.i for attribute in node.attribute}


def metadata_of(node: NodeProto, key: str) -> str | None:
    """What is written onto a node under a key; None where nothing is."""
    return next((entry.value for entry in node.metadata_props if entry.key == key), None)


def json_object(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none."""
    try:
        value = json_of(decoded(path.read_bytes()))
    except (OSError, UnreadableError):
        return None
    return value if isinstance(value, dict) else None
