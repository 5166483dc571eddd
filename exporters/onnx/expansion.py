"""Packed codes in an ONNX graph: the nodes that expand them, how they are found, whether a runtime folds them.

ONNX Runtime folds the five nodes (Cast, Concat, MatMulInteger, Gather, Reshape) when it loads a graph; where it
does not, every run expands the codes again, 20 to 100 times slower. A test pins it, and `lint_folding` looks.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from onnx import NodeProto
from torch import Tensor

from compot_deploy.core.diagnostics import Diagnostic
from compot_deploy.errors import ArtifactError, MissingDependencyError
from compot_deploy.exporters.onnx.packed_codes import POSITIONS, expansion_table, three_bit_table
from compot_deploy.exporters.onnx.tensors import GRAPH, graphs_of, read_graph

EXPANSION_TABLE: Final = "/constants/two_of_four/table"
EXPANSION_WEIGHTS: Final = "/constants/two_of_four/weights"
THREE_BITS_TABLE: Final = "/constants/three_bits/table"
THREE_BITS_WEIGHTS: Final = "/constants/three_bits/weights"


@dataclass(frozen=True)
class ExpansionKind:
    """What all packed integers of one layout share in a graph.

    Attributes:
        table: name of the tensor with MatMulNBits' bytes by row.
        weights: name of the tensor (1, factor), which makes ``half + factor·value`` of a row as a product,
            because no standard operator adds two bytes.
        factor: see `weights`.
        half: suffix of the tensor of half bytes.
        rows: makes the table.
    """

    table: str
    weights: str
    factor: int
    half: str
    rows: Callable[[], Tensor]


EXPANSIONS: Final = {
    kind.table: kind
    for kind in (
        ExpansionKind(EXPANSION_TABLE, EXPANSION_WEIGHTS, len(POSITIONS), "patterns", expansion_table),
        ExpansionKind(THREE_BITS_TABLE, THREE_BITS_WEIGHTS, 16, "nibbles", three_bit_table),
    )
}


@dataclass(frozen=True)
class Expansion:
    """The nodes that make MatMulNBits' bytes of packed codes, and the tensors that they read.

    Attributes:
        nodes: Cast, Concat, MatMulInteger, Gather and Reshape, as they run.
        values: two codes of every four.
        patterns: their positions.
        weights: what turns both into a row of the table.
        table: the bytes.
    """

    nodes: tuple[NodeProto, ...]
    values: str
    patterns: str
    weights: str
    table: str


def expansion_of(value: str, producers: Mapping[str, NodeProto]) -> Expansion | None:
    """The expansion that makes `value`, as `GraphBuilder.expanded` writes it; None if it is made in another way.

    Args:
        value: what a MatMulNBits multiplies with.
        producers: node by output.
    """
    nodes: list[NodeProto] = []
    for operator, follow in (("Reshape", 0), ("Gather", 1), ("MatMulInteger", 0), ("Concat", 0), ("Cast", 0)):
        node = producers.get(value)
        if node is None or node.op_type != operator or len(node.input) != (1 if operator == "Cast" else 2):
            return None
        nodes.append(node)
        value = node.input[follow]
    _, gather, product, concat, cast = nodes
    return Expansion(
        nodes=tuple(reversed(nodes)),
        values=str(concat.input[1]),
        patterns=str(cast.input[0]),
        weights=str(product.input[1]),
        table=str(gather.input[0]),
    )


def unfolded_nodes(folder: Path, disabled_optimizers: Sequence[str] = ()) -> tuple[str, ...]:
    """Nodes for the expansion of packed codes that are still there when onnxruntime has loaded a folder.

    Each of them would run for every token: a graph with all of them decodes 20 to 100 times slower. The
    folder is loaded as an application would, and the profiler tells what is executed for one token; nothing
    as large as the weights is written.

    Args:
        folder: an ONNX folder.
        disabled_optimizers: of onnxruntime, to see what happens without them.

    Returns:
        Names of nodes in the order of the graph; none for a folder without packed codes.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ArtifactError: onnxruntime refuses the file.
    """
    expansion = expansion_nodes(folder)
    if not expansion:
        return ()
    executed = {
        name for graph in graphs_of(folder) for name in _executed_nodes(folder / graph, disabled_optimizers)
    }
    return tuple(name for name in expansion if name in executed)


def expansion_nodes(folder: Path) -> tuple[str, ...]:
    """Names of all nodes that expand packed codes, in the order of the graph; none for a folder without any."""
    names: list[str] = []
    for place in graphs_of(folder):
        graph = read_graph(folder / place).graph
        producers = {output: node for node in graph.node for output in node.output if output}
        found = (
            expansion_of(node.input[1], producers) for node in graph.node if node.op_type == "MatMulNBits"
        )
        names += [node.name for expansion in found if expansion is not None for node in expansion.nodes]
    return tuple(names)


def _executed_nodes(graph: Path, disabled_optimizers: Sequence[str]) -> frozenset[str]:
    """Names of the nodes that onnxruntime executes for one token without a past."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError("onnxruntime", "onnx", "Loading an ONNX folder") from None
    with tempfile.TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        try:
            session = onnxruntime.InferenceSession(
                str(graph),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(disabled_optimizers),
            )
            session.run(None, {entry.name: _least(entry) for entry in session.get_inputs()})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        except Exception as error:  # the runtime's exceptions share no base class but this
            raise ArtifactError(f"onnxruntime cannot run {graph}: {error}") from error
    return frozenset(
        event["name"].removesuffix("_kernel_time") for event in events if event.get("cat") == "Node"
    )


def _least(entry: Any) -> Any:
    """The smallest input that a graph takes: one of everything, and nothing of a past."""
    least = 0 if entry.name.startswith("past_key_values.") else 1
    sizes = [size if isinstance(size, int) else least for size in entry.shape]
    if entry.name.startswith("past_key_values."):
        sizes[0] = 1
    kind = _KINDS[entry.type]
    return (torch.ones if kind == torch.int64 else torch.zeros)(sizes, dtype=kind).numpy()


_KINDS: Final = {
    "tensor(int64)": torch.int64,
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bool)": torch.bool,
}


def lint_folding(folder: Path) -> Iterator[Diagnostic]:
    """An error if onnxruntime does not fold the expansion; a note where it is not installed to tell."""
    try:
        left = unfolded_nodes(folder)
    except MissingDependencyError:
        yield Diagnostic(
            "note",
            GRAPH,
            "onnxruntime is not installed, so it was not checked that the expansion of packed codes is folded.",
        )
    except ArtifactError as error:
        yield Diagnostic("error", GRAPH, str(error))
    else:
        if left:
            yield Diagnostic(
                "error",
                f"{GRAPH}: {left[0]}",
                f"The expansion nodes were not folded, {len(left)} are left after loading: decoding would be "
                "up to 100x slower; use another onnxruntime, or export with --onnx-codes dense.",
            )
