"""An ONNX folder in ONNX Runtime: as it is deployed, or with its products computed at another accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx

from compot_deploy.errors import ArtifactError, MissingDependencyError, first_line
from compot_deploy.exporters.onnx.tensors import GRAPH, read_graph


@dataclass(frozen=True)
class LeveledGraph:
    """A graph whose matrix products run at a chosen accuracy, its tensors still in their file.

    Attributes:
        graph: the serialized graph, to be given to an inference session.
        entries: session options without which the session would not find the tensors, or would fuse
            DequantizeLinear and MatMul at another accuracy.
    """

    graph: bytes
    entries: Mapping[str, str]


def with_accuracy_level(path: Path, level: int) -> LeveledGraph:
    """The graph at `path` with the accuracy level of every MatMulNBits replaced; nothing is written.

    Level 0 computes in float32 with the exact integers and scales: the oracle that tells whether a file holds
    what it should. The file itself is deployed at level 4.

    Args:
        path: ``onnx/model.onnx`` of a folder.
        level: 0 to 4, as documented for MatMulNBits.

    Raises:
        ArtifactError: the file is no ONNX graph that a session can be made of.
    """
    model = _read_sound(path)
    for graph_or_function in (model.graph, *model.functions):
        _set_accuracy_level(graph_or_function, level)
    return LeveledGraph(
        graph=model.SerializeToString(deterministic=True),
        entries={
            "session.model_external_initializers_file_folder_path": str(path.resolve().parent),
            "session.qdq_matmulnbits_accuracy_level": str(level),
        },
    )


def _set_accuracy_level(graph: onnx.GraphProto | onnx.FunctionProto, level: int) -> None:
    """Change the attributes where they are, so that nothing else about the bytes changes."""
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            found = [attribute for attribute in node.attribute if attribute.name == "accuracy_level"]
            if not found:
                node.attribute.append(onnx.helper.make_attribute("accuracy_level", level))
            for attribute in found:
                attribute.i = level
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                _set_accuracy_level(subgraph, level)


def open_session(
    folder: Path, accuracy_level: int | None = None, threads: int = 0, graph: str = GRAPH
) -> Any:
    """An onnxruntime session of a folder, on the CPU.

    Args:
        folder: an ONNX folder.
        accuracy_level: None loads the file as deployed; 0 runs the same integers and scales in float32, the
            oracle for what the file holds.
        threads: of one operator; 0 leaves it to onnxruntime.
        graph: which one, of a folder with several.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ArtifactError: the folder lacks the graph, or onnxruntime refuses it.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError("onnxruntime", "onnx", "Running an exported ONNX folder") from None
    path = folder / graph
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist: {folder} is not an exported ONNX folder.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Several sessions and torch take turns; a pool that spins while it waits steals the others' time.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model: str | bytes = str(path)
    if accuracy_level is None:
        _read_sound(path)
    else:
        leveled = with_accuracy_level(path, accuracy_level)
        for key, value in leveled.entries.items():
            options.add_session_config_entry(key, value)
        model = leveled.graph
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base class but this
        raise ArtifactError(
            f"{path} does not load in ONNX Runtime {onnxruntime.__version__}: {first_line(error)}. A file that "
            "onnxruntime cannot load is damaged, or needs a newer onnxruntime: export the model again."
        ) from error


def _read_sound(path: Path) -> onnx.ModelProto:
    """A graph without sizes that end the process in ONNX Runtime, which cuts them to 32 bits and divides by them.

    Raises:
        ArtifactError: names the node that has one; or the file is no graph, see `read_graph`.
    """
    model = read_graph(path)
    nodes = [node for graph in (model.graph, *model.functions) for node in graph.node]
    for node in nodes:
        for attribute in node.attribute if node.domain == "com.microsoft" else ():
            least = 1 if attribute.name in _DIVISORS else -_LARGEST
            if attribute.type == onnx.AttributeProto.INT and not least <= attribute.i <= _LARGEST:
                raise ArtifactError(
                    f"{path}: {node.op_type} {node.name} has {attribute.name} = {attribute.i}, which no runtime can "
                    "compute with. Export the model again."
                )
    return model


_LARGEST: Final = 2**31 - 1
_DIVISORS: Final = ("num_heads", "kv_num_heads", "block_size", "bits", "K", "N")
"""Attributes of ONNX Runtime's own operators that something is divided by."""


def runtime_name(accuracy_level: int | None) -> str:
    """What a session of `open_session` runs in and how, for reports."""
    import onnxruntime

    setting = "as deployed" if accuracy_level is None else f"accuracy level {accuracy_level}"
    return f"onnxruntime {onnxruntime.__version__}, {setting}"
