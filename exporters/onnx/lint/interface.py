"""Rules about versions, names of inputs and outputs, and how values are wired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from compot_deploy.core.diagnostics import Diagnostic
from compot_deploy.exporters.onnx.interface import BRANCH, HEARD
from compot_deploy.exporters.onnx.lint.subject import Subject, in_graph
from compot_deploy.exporters.onnx.nodes import MICROSOFT

OPSETS: Final = range(13, 24)
"""Opsets of the standard domain that ONNX Runtime 1.23 loads."""

IR_VERSIONS: Final = range(7, 12)
"""IR versions that ONNX Runtime 1.23 loads."""

_TEXT_INPUTS: Final = ("input_ids", "attention_mask", "token_type_ids")

_TEXT_OUTPUTS: Final = ("last_hidden_state", "logits")
"""What consumers give to an encoder or classifier, and what they read."""


def lint_interface(subject: Subject) -> Iterator[Diagnostic]:
    """Everything about the graph as a whole."""
    yield from _versions(subject)
    yield from _interface(subject)
    yield from _wiring(subject)


def _versions(subject: Subject) -> Iterator[Diagnostic]:
    if subject.model.ir_version not in IR_VERSIONS:
        yield in_graph(
            "error",
            "ir_version",
            f"IR {subject.model.ir_version} does not load everywhere: "
            f"use {IR_VERSIONS.start} to {IR_VERSIONS.stop - 1}.",
        )
    known = {"": OPSETS, MICROSOFT: range(1, 2)}
    for entry in subject.model.opset_import:
        domain = entry.domain or "ai.onnx"
        if entry.domain not in known:
            yield in_graph(
                "error", "opset_import", f"The domain {domain} needs a library of custom operators."
            )
        elif entry.version not in known[entry.domain]:
            yield in_graph(
                "error",
                "opset_import",
                f"Opset {entry.version} of {domain} does not load everywhere: "
                f"use {known[entry.domain].start} to {known[entry.domain].stop - 1}.",
            )


def _interface(subject: Subject) -> Iterator[Diagnostic]:
    """Names of inputs and outputs, which every consumer goes by."""
    graph = subject.model.graph
    inputs, outputs = [i.name for i in graph.input], [o.name for o in graph.output]
    if subject.task == "features":
        yield from _features(subject, inputs, outputs)
        return
    if subject.task in ("encoder", "decoder"):
        yield from _tower(subject, inputs, outputs)
        return
    declared = subject.config.get("num_hidden_layers")
    states = [name for name in inputs if name.startswith(("past_conv.", "past_recurrent."))]
    stateful = {int(name.rpartition(".")[2]) for name in states}
    layers = -(-sum(name.startswith("past_key_values.") for name in inputs) // 2) + len(stateful)
    if isinstance(declared, int) and declared != layers:
        yield in_graph(
            "error", "inputs", f"There are caches of {layers} layers, and config.json says {declared}."
        )
    caches = [(layer, kind) for layer in range(layers) if layer not in stateful for kind in ("key", "value")]
    for found, expected, what in (
        (
            inputs,
            ["input_ids", "attention_mask", *(f"past_key_values.{i}.{kind}" for i, kind in caches), *states],
            "input",
        ),
        (
            outputs,
            [
                "logits",
                *(f"present.{i}.{kind}" for i, kind in caches),
                *(name.replace("past_", "present_", 1) for name in states),
            ],
            "output",
        ),
    ):
        for name in expected:
            if name not in found:
                yield in_graph("error", f"{what}s", f"The {what} {name} is missing; consumers look for it.")
        for name in found:
            if name not in expected:
                yield in_graph("warning", f"{what}s", f"The {what} {name} is none that consumers know.")


_DECODER_LAYERS: Final = (
    "decoder_layers",
    "decoder_num_hidden_layers",
    "num_decoder_layers",
    "num_hidden_layers",
)
"""What configurations call the number of a decoder's blocks."""


def _tower(subject: Subject, inputs: list[str], outputs: list[str]) -> Iterator[Diagnostic]:
    """One of two towers: what the encoder gives is what the decoder reads, and every cache goes in and comes out."""
    if subject.task == "encoder":
        expected, given = [], ["last_hidden_state"]
        if len(inputs) != 1 and set(inputs) != {"input_ids", "attention_mask"}:
            yield in_graph(
                "error",
                "inputs",
                f"It has the inputs {', '.join(inputs)}; consumers give sound, or input_ids and attention_mask.",
            )
    else:
        layers = next((subject.config[name] for name in _DECODER_LAYERS if name in subject.config), 0)
        caches = [
            f"{layer}.{side}.{kind}"
            for layer in range(layers)
            for side in ("decoder", "encoder")
            for kind in ("key", "value")
        ]
        expected = ["input_ids", HEARD, BRANCH, *(f"past_key_values.{name}" for name in caches)]
        given = ["logits", *(f"present.{name}" for name in caches)]
    for found, names, what in ((inputs, expected, "input"), (outputs, given, "output")):
        for name in names:
            if name not in found:
                yield in_graph("error", f"{what}s", f"The {what} {name} is missing; consumers look for it.")


def _features(subject: Subject, inputs: list[str], outputs: list[str]) -> Iterator[Diagnostic]:
    """A graph that reads whole texts: tokens in, hidden states or logits out."""
    for name in _TEXT_INPUTS[:2]:
        if name not in inputs:
            yield in_graph("error", "inputs", f"The input {name} is missing; consumers look for it.")
    if not set(outputs) & set(_TEXT_OUTPUTS):
        yield in_graph(
            "error",
            "outputs",
            f"None of the outputs {', '.join(_TEXT_OUTPUTS)} is there; consumers look for one.",
        )
    for what, found, known in (("input", inputs, _TEXT_INPUTS), ("output", outputs, _TEXT_OUTPUTS)):
        for name in found:
            if name not in known:
                yield in_graph("warning", f"{what}s", f"The {what} {name} is none that consumers know.")
    for value in subject.model.graph.input:
        sizes = [size.dim_param for size in value.type.tensor_type.shape.dim]
        if not all(sizes):
            yield in_graph(
                "warning", "inputs", f"{value.name} takes texts of one number and length only, {sizes}."
            )


def _wiring(subject: Subject) -> Iterator[Diagnostic]:
    graph = subject.model.graph
    names = Counter(node.name for node in graph.node)
    known = {value.name for value in graph.input} | set(subject.reader.protos)
    used = {value.name for value in graph.output}
    for node in graph.node:
        if not node.name.startswith("/"):
            yield in_graph("warning", node.name or node.op_type, "The node's name is not a path.")
        if names[node.name] > 1:
            yield in_graph("error", node.name, f"{names[node.name]} nodes have this name.")
        for value in node.input:
            if value and value not in known:
                yield in_graph(
                    "error", node.name, f"It reads {value}, which nothing before it computes or stores."
                )
        known.update(value for value in node.output if value)
        used.update(node.input)
    for value in graph.output:
        if value.name not in known:
            yield in_graph("error", "outputs", f"Nothing computes the output {value.name}.")
    for name in subject.reader.protos:
        if name not in used:
            yield in_graph("warning", name, "The tensor is stored, but nothing reads it.")
    if graph.sparse_initializer:
        yield in_graph(
            "warning",
            "sparse_initializer",
            f"{len(graph.sparse_initializer)} sparse tensors: onnxruntime makes them dense when it loads.",
        )
