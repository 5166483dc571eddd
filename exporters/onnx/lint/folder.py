"""Structural lint of an ONNX folder: what a runtime would refuse, compute wrongly, or run slowly.

Nothing is executed. Tensors are looked at one at a time through the mapped data file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from compot_deploy.core.diagnostics import Diagnostic, Severity
from compot_deploy.errors import ArtifactError, CompotDeployError, first_line
from compot_deploy.exporters.onnx.lint.interface import lint_interface
from compot_deploy.exporters.onnx.lint.operators import lint_operators
from compot_deploy.exporters.onnx.lint.subject import Subject, in_graph, json_object, metadata_of
from compot_deploy.exporters.onnx.lint.tensors import lint_tensors
from compot_deploy.exporters.onnx.nodes import Part
from compot_deploy.exporters.onnx.tensors import GRAPH, graphs_of, read_graph

_CONSUMER_FILES: Final = {
    None: ("config.json", "generation_config.json", "genai_config.json"),
    "generation": ("config.json", "generation_config.json"),
    "features": ("config.json",),
    "encoder": ("config.json", "preprocessor_config.json"),
    "decoder": ("config.json", "generation_config.json"),
}
"""By what the graph was traced for; None for a native graph."""


def lint_onnx(folder: Path) -> tuple[Diagnostic, ...]:
    """Everything that is structurally wrong or doubtful about a folder, errors first.

    Args:
        folder: as `OnnxExporter.write` makes it.
    """
    found = [diagnostic for graph in graphs_of(folder) for diagnostic in _lint_graph(folder, graph)]
    return errors_first(dict.fromkeys(found))


def _lint_graph(folder: Path, graph: str) -> Iterator[Diagnostic]:
    if not (folder / graph).exists():
        yield Diagnostic("error", graph, "The graph is missing: export the model again.")
        return
    try:
        model = read_graph(folder / graph)
    except ArtifactError as error:
        yield Diagnostic("error", graph, f"The graph cannot be parsed: {error}")
        return
    try:
        for one in _diagnostics(Subject(folder, model, graph)):
            # Rules name the graph of models that have one.
            yield replace(one, where=one.where.replace(GRAPH, graph, 1))
    except (CompotDeployError, MemoryError):
        raise
    except Exception as error:  # rules trust that a node has the inputs of its kind, and tensors those sizes
        told = f"{type(error).__name__}: {first_line(error)}"
        yield Diagnostic(
            "error", graph, f"The graph contradicts itself, and its inspection ends there ({told})."
        )


def errors_first(diagnostics: Iterable[Diagnostic]) -> tuple[Diagnostic, ...]:
    """Diagnostics by severity, otherwise in their order."""
    order: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
    return tuple(sorted(diagnostics, key=lambda diagnostic: order[diagnostic.severity]))


def _diagnostics(subject: Subject) -> Iterator[Diagnostic]:
    yield from lint_interface(subject)
    yield from lint_operators(subject)
    yield from lint_tensors(subject)
    yield from _tied(subject)
    yield from _files(subject)


def _tied(subject: Subject) -> Iterator[Diagnostic]:
    """A model with tied embeddings has one table, and head and embedding read the same bytes of it."""
    if subject.task in ("features", "encoder"):
        return  # whatever config.json ties, there is no head
    roles = {metadata_of(node, Part.ROLE): node for node in subject.model.graph.node}
    head, table = roles.get(Part.TIED_HEAD), roles.get(Part.EMBEDDING)
    if subject.config.get("tie_word_embeddings") and table is not None and head is None:
        yield in_graph(
            "warning", "lm_head", "config.json ties the head to the embedding, and the graph stores both."
        )
    if head is not None and table is not None:
        places = [subject.extent(head.input[1]), subject.extent(table.input[0])]
        if places[0] != places[1]:
            yield in_graph("error", head.name, "The tied head does not read the table of the embedding.")


def _files(subject: Subject) -> Iterator[Diagnostic]:
    hears = "input_ids" not in {value.name for value in subject.model.graph.input}
    for name in _CONSUMER_FILES[subject.task]:
        if name == "preprocessor_config.json" and not hears:
            continue
        path = subject.folder / name
        if not path.is_file():
            yield Diagnostic("warning", name, "The file is missing; some consumers need it.")
        elif json_object(path) is None:
            yield Diagnostic("error", name, "The file holds no JSON object.")
    if subject.task is not None:
        return
    value: Any = json_object(subject.folder / "genai_config.json")
    for key in ("model", "decoder", "filename"):
        value = value.get(key) if isinstance(value, dict) else None
    filename = value if isinstance(value, str) else GRAPH
    if not (subject.folder / filename).is_file():
        yield Diagnostic("error", "genai_config.json", f"It names the graph {filename}, which is not there.")
