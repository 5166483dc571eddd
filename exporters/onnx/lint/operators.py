"""Rules about the operators that hold matrices: grids, shapes, levels, packed codes, integers that are all zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from onnx import NodeProto

from compot_deploy.core.diagnostics import Diagnostic
from compot_deploy.errors import ArtifactError
from compot_deploy.exporters.bnb4 import BNB_BLOCKS, BNB_TYPES
from compot_deploy.exporters.onnx.expansion import EXPANSION_TABLE, EXPANSIONS, Expansion, expansion_of
from compot_deploy.exporters.onnx.graph import ACCURACY_LEVEL
from compot_deploy.exporters.onnx.lint.subject import CHUNK, Subject, in_graph, integers_of
from compot_deploy.exporters.onnx.packed_codes import POSITIONS
from compot_deploy.exporters.onnx.storage import BLOCKS, GATHER_BITS, NBITS_BITS, TWO_BIT_BLOCKS

_ZERO_BYTES: Final = {2: 0xAA, 4: 0x88, 8: 0x80}
"""A byte of MatMulNBits codes that are all zero, by bits."""


def lint_operators(subject: Subject) -> Iterator[Diagnostic]:
    """Every node that reads integers, then what a runtime must know about all of them."""
    rules = {
        "MatMulNBits": _nbits,
        "MatMulBnb4": _bnb4,
        "GatherBlockQuantized": _gather,
        "DequantizeLinear": _dequantize,
    }
    nodes = subject.model.graph.node
    for node in nodes:
        if node.op_type in rules:
            yield from rules[node.op_type](subject, node)
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    two = sum(integers_of(node).get("bits") == 2 for node in products)
    if two:
        yield in_graph(
            "note", "MatMulNBits", f"{two} products with 2 bits: they need ONNX Runtime 1.24 or later."
        )
    if any(node.op_type == "GatherBlockQuantized" and integers_of(node).get("bits") == 2 for node in nodes):
        yield in_graph(
            "note", "GatherBlockQuantized", "A token table with 2 bits: it needs ONNX Runtime 1.28 or later."
        )
    packed = sum(expansion_of(node.input[1], subject.producers) is not None for node in products)
    if packed:
        yield in_graph(
            "note", "MatMulNBits", f"{packed} products with packed codes: they are expanded when loaded."
        )


def _nbits(subject: Subject, node: NodeProto) -> Iterator[Diagnostic]:
    settings = integers_of(node)
    bits, block = settings.get("bits", 4), settings.get("block_size", 0)
    yield from _grid(subject, node, bits, block, NBITS_BITS)
    level = settings.get("accuracy_level", 0)
    if level != ACCURACY_LEVEL:
        yield in_graph(
            "warning",
            node.name,
            f"accuracy_level is {level}: it runs 3 to 300 times slower than at {ACCURACY_LEVEL}.",
        )
    if len(node.input) > 3 and node.input[3]:
        yield in_graph("warning", node.name, "It has zero points; the grid here is symmetric and needs none.")
    if len(node.input) > 4 and node.input[4]:
        yield in_graph(
            "error",
            node.name,
            "It has a g_idx: onnxruntime computes wrong numbers with it, or refuses it.",
        )
    inputs, outputs = settings.get("K", 0), settings.get("N", 0)
    if bits in NBITS_BITS and block in BLOCKS:
        blocks = -(-inputs // block)
        yield from _shape(subject, node, 2, (outputs, blocks))
        expansion = expansion_of(node.input[1], subject.producers)
        if expansion is None:
            yield from _shape(subject, node, 1, (outputs, blocks, block * bits // 8))
            yield from _zeros(subject, node.input[1], bits)
        else:
            yield from _expansion(subject, node, expansion, (outputs, blocks, block * bits // 8))


def _bnb4(subject: Subject, node: NodeProto) -> Iterator[Diagnostic]:
    settings = integers_of(node)
    block, inputs, outputs = (settings.get(name, 0) for name in ("block_size", "K", "N"))
    if settings.get("quant_type") not in BNB_TYPES.values():
        yield in_graph(
            "error", node.name, f"quant_type is {settings.get('quant_type')}, and there are 0 and 1."
        )
    if block not in BNB_BLOCKS or inputs % block:
        yield in_graph(
            "error",
            node.name,
            f"{inputs} inputs in blocks of {block}: a block would cross from one output to the next.",
        )
        return
    yield from _shape(subject, node, 1, (inputs * outputs // 2,))
    yield from _shape(subject, node, 2, (inputs // block * outputs,))


def _expansion(
    subject: Subject, node: NodeProto, expansion: Expansion, shape: tuple[int, int, int]
) -> Iterator[Diagnostic]:
    """Packed codes of one product: sizes, positions, and what they are expanded with."""
    outputs, blocks, block_bytes = shape
    groups = blocks * block_bytes // 2
    for name in (expansion.values, expansion.patterns):
        found = subject.dims(name)
        if found != (outputs, groups, 1):
            yield in_graph(
                "error", name, f"It has the shape {found}, and should have {(outputs, groups, 1)}."
            )
    kind = EXPANSIONS.get(expansion.table, EXPANSIONS[EXPANSION_TABLE])
    for name, expected in (
        (expansion.table, kind.rows().flatten().tolist()),
        (expansion.weights, [1, kind.factor]),
        (expansion.nodes[-1].input[1], list(shape)),
    ):
        if subject.stored(name) != expected:
            yield in_graph(
                "error", name, f"{node.name} expands its codes with it, and it holds other numbers."
            )
    if kind.table != EXPANSION_TABLE:
        return  # every byte and half byte is a row of the table
    yield from _zeros(subject, expansion.values, 4)
    try:
        patterns = subject.reader.bytes_of(expansion.patterns)
    except ArtifactError:
        return  # reported with the tensor itself
    largest = max((int(((part & 15).maximum(part >> 4)).max()) for part in patterns.split(CHUNK)), default=0)
    if largest >= len(POSITIONS):
        yield in_graph(
            "error",
            expansion.patterns,
            f"It has a pattern {largest}, and they are numbered 0 to {len(POSITIONS) - 1}.",
        )


def _gather(subject: Subject, node: NodeProto) -> Iterator[Diagnostic]:
    settings = integers_of(node)
    bits, block = settings.get("bits", 4), settings.get("block_size", 0)
    yield from _grid(subject, node, bits, block, GATHER_BITS)
    table = subject.dims(node.input[0])
    if table is not None and bits in GATHER_BITS and block in BLOCKS:
        yield from _shape(subject, node, 2, (table[0], table[-1] * 8 // bits // block))
        yield from _zeros(subject, node.input[0], bits)


def _grid(
    subject: Subject, node: NodeProto, bits: int, block: int, allowed: tuple[int, ...]
) -> Iterator[Diagnostic]:
    if bits not in allowed:
        yield in_graph("error", node.name, f"{bits} bits: onnxruntime runs {allowed} here.")
    if block not in BLOCKS:
        yield in_graph("error", node.name, f"Blocks of {block}: onnxruntime runs {BLOCKS}.")
    elif bits == 2 and block not in TWO_BIT_BLOCKS:
        yield in_graph(
            "warning",
            node.name,
            f"2 bits in blocks of {block} have no fast kernel: use {TWO_BIT_BLOCKS}.",
        )


def _dequantize(subject: Subject, node: NodeProto) -> Iterator[Diagnostic]:
    settings = integers_of(node)
    block, axis = settings.get("block_size", 0), settings.get("axis", 1)
    if block not in BLOCKS or axis != 0:
        yield in_graph(
            "warning",
            node.name,
            f"Blocks of {block} along axis {axis} are not fused with the product: use axis 0 and {BLOCKS}.",
        )
        return
    dims = subject.dims(node.input[0])
    if dims is not None:
        yield from _shape(subject, node, 1, (-(-dims[0] // block), dims[1]))
        yield from _zeros(subject, node.input[0], None)


def _shape(
    subject: Subject, node: NodeProto, position: int, expected: tuple[int, ...]
) -> Iterator[Diagnostic]:
    found = subject.dims(node.input[position])
    if found is not None and found != expected:
        yield in_graph(
            "error", node.name, f"Input {position} has the shape {found}, and should have {expected}."
        )


def _zeros(subject: Subject, name: str, bits: int | None) -> Iterator[Diagnostic]:
    """Integers that are all zero; `bits` of unsigned codes, None for signed integers."""
    if name not in subject.reader.protos:
        return
    zero = 0 if bits is None else _ZERO_BYTES[bits]
    try:
        data = subject.reader.bytes_of(name)
    except ArtifactError:
        return  # reported with the tensor itself
    if all(bool((chunk == zero).all()) for chunk in data.split(CHUNK)):
        yield in_graph("warning", name, "Every integer is zero: the matrix computes nothing.")
