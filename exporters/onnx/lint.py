"""Structural lint of an ONNX folder: what a runtime would refuse, compute wrongly, or run slowly.

Nothing is executed. Tensors are looked at one at a time through the mapped data file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto
from torch import Tensor

from compot_deploy.core.diagnostics import Finding, Severity
from compot_deploy.errors import ArtifactError
from compot_deploy.exporters.onnx.expansion import EXPANSION_TABLE, EXPANSIONS, Expansion, expansion_of
from compot_deploy.exporters.onnx.graph import ACCURACY_LEVEL, MICROSOFT, TRACED, Part
from compot_deploy.exporters.onnx.tensors import DATA, GRAPH, Extent, TensorReader, external_extent
from compot_deploy.exporters.packing import (
    BLOCKS,
    BNB_BLOCKS,
    BNB_TYPES,
    GATHER_BITS,
    NBITS_BITS,
    POSITIONS,
    TWO_BIT_BLOCKS,
)

OPSETS: Final = range(13, 24)
"""Opsets of the standard domain that ONNX Runtime 1.23 loads."""

IR_VERSIONS: Final = range(7, 12)
"""IR versions that ONNX Runtime 1.23 loads."""

_BITS: Final = {
    TensorProto.FLOAT: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.INT64: 64,
    TensorProto.INT32: 32,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.BOOL: 8,
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
}

_FLOATS: Final = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}

_ZERO_BYTES: Final = {2: 0xAA, 4: 0x88, 8: 0x80}
"""A byte of MatMulNBits codes that are all zero, by bits."""

_CHUNK: Final = 1 << 24
"""Bytes that are looked at at once."""

_CONSUMER_FILES: Final = {
    None: ("config.json", "generation_config.json", "genai_config.json"),
    "generation": ("config.json", "generation_config.json"),
    "features": ("config.json",),
}
"""By what the graph was traced for; None for a graph of ours."""

_TEXT_INPUTS: Final = ("input_ids", "attention_mask", "token_type_ids")
_TEXT_OUTPUTS: Final = ("last_hidden_state", "logits")
"""What consumers give to an encoder or classifier, and what they read."""


def lint_onnx(folder: Path) -> tuple[Finding, ...]:
    """Everything that is structurally wrong or doubtful about a folder, errors first.

    Args:
        folder: as `OnnxExporter.write` makes it.
    """
    path = folder / GRAPH
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        return (Finding("error", GRAPH, "The graph is missing: export the model again."),)
    except Exception as error:  # protobuf's own error types differ between its implementations
        return (Finding("error", GRAPH, f"The graph cannot be parsed: {error}."),)
    return errors_first(_Lint(folder, model).run())


def errors_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Findings by severity, otherwise in their order."""
    order: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
    return tuple(sorted(findings, key=lambda finding: order[finding.severity]))


@dataclass
class _Lint:
    folder: Path
    model: ModelProto
    reader: TensorReader = field(init=False)

    def __post_init__(self) -> None:
        self.reader = TensorReader(self.model.graph, (self.folder / GRAPH).parent)

    def run(self) -> Iterator[Finding]:
        yield from self._versions()
        yield from self._interface()
        yield from self._wiring()
        for node in self.model.graph.node:
            if node.op_type == "MatMulNBits":
                yield from self._nbits(node)
            elif node.op_type == "MatMulBnb4":
                yield from self._bnb4(node)
            elif node.op_type == "GatherBlockQuantized":
                yield from self._gather(node)
            elif node.op_type == "DequantizeLinear":
                yield from self._dequantize(node)
        two = sum(
            node.op_type == "MatMulNBits" and _integers(node).get("bits") == 2
            for node in self.model.graph.node
        )
        if two:
            yield self._at(
                "note", "MatMulNBits", f"{two} products with 2 bits: they need ONNX Runtime 1.24 or later."
            )
        packed = sum(
            node.op_type == "MatMulNBits" and expansion_of(node.input[1], self.producers) is not None
            for node in self.model.graph.node
        )
        if packed:
            yield self._at(
                "note", "MatMulNBits", f"{packed} products with packed codes: they are expanded when loaded."
            )
        for tensor in self.model.graph.initializer:
            yield from self._tensor(tensor)
        yield from self._data_file()
        yield from self._tied()
        yield from self._files()

    # -- helpers --

    @cached_property
    def producers(self) -> Mapping[str, NodeProto]:
        return {value: node for node in self.model.graph.node for value in node.output if value}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return _json(self.folder / "config.json") or {}

    @staticmethod
    def _at(severity: Severity, where: str, sentence: str) -> Finding:
        return Finding(severity, f"{GRAPH}: {where}", sentence)

    def _dims(self, value: str) -> tuple[int, ...] | None:
        """Shape of a stored tensor, through a cast; None if it is not stored."""
        node = self.producers.get(value)
        name = str(node.input[0]) if node is not None and node.op_type == "Cast" else value
        return tuple(self.reader.protos[name].dims) if name in self.reader.protos else None

    @cached_property
    def task(self) -> str | None:
        """What the graph was traced for; None for a graph of ours."""
        found = {entry.key: entry.value for entry in self.model.metadata_props}.get(TRACED)
        return found if found is None or found in _CONSUMER_FILES else "features"

    # -- the graph --

    def _versions(self) -> Iterator[Finding]:
        if self.model.ir_version not in IR_VERSIONS:
            yield self._at(
                "error",
                "ir_version",
                f"IR {self.model.ir_version} does not load everywhere: "
                f"use {IR_VERSIONS.start} to {IR_VERSIONS.stop - 1}.",
            )
        known = {"": OPSETS, MICROSOFT: range(1, 2)}
        for entry in self.model.opset_import:
            domain = entry.domain or "ai.onnx"
            if entry.domain not in known:
                yield self._at(
                    "error", "opset_import", f"The domain {domain} needs a library of custom operators."
                )
            elif entry.version not in known[entry.domain]:
                yield self._at(
                    "error",
                    "opset_import",
                    f"Opset {entry.version} of {domain} does not load everywhere: "
                    f"use {known[entry.domain].start} to {known[entry.domain].stop - 1}.",
                )

    def _interface(self) -> Iterator[Finding]:
        """Names of inputs and outputs, which every consumer goes by."""
        graph = self.model.graph
        inputs, outputs = [i.name for i in graph.input], [o.name for o in graph.output]
        if self.task == "features":
            yield from self._features(inputs, outputs)
            return
        declared = self.config.get("num_hidden_layers")
        layers = -(-sum(name.startswith("past_key_values.") for name in inputs) // 2)
        if isinstance(declared, int) and declared != layers:
            yield self._at(
                "error", "inputs", f"There are caches of {layers} layers, and config.json says {declared}."
            )
        caches = [(layer, kind) for layer in range(layers) for kind in ("key", "value")]
        for found, expected, what in (
            (
                inputs,
                ["input_ids", "attention_mask", *(f"past_key_values.{i}.{kind}" for i, kind in caches)],
                "input",
            ),
            (outputs, ["logits", *(f"present.{i}.{kind}" for i, kind in caches)], "output"),
        ):
            for name in expected:
                if name not in found:
                    yield self._at(
                        "error", f"{what}s", f"The {what} {name} is missing; consumers look for it."
                    )
            for name in found:
                if name not in expected:
                    yield self._at("warning", f"{what}s", f"The {what} {name} is none that consumers know.")

    def _features(self, inputs: list[str], outputs: list[str]) -> Iterator[Finding]:
        """A graph that reads whole texts: tokens in, hidden states or logits out."""
        for name in _TEXT_INPUTS[:2]:
            if name not in inputs:
                yield self._at("error", "inputs", f"The input {name} is missing; consumers look for it.")
        if not set(outputs) & set(_TEXT_OUTPUTS):
            yield self._at(
                "error",
                "outputs",
                f"None of the outputs {', '.join(_TEXT_OUTPUTS)} is there; consumers look for one.",
            )
        for what, found, known in (("input", inputs, _TEXT_INPUTS), ("output", outputs, _TEXT_OUTPUTS)):
            for name in found:
                if name not in known:
                    yield self._at("warning", f"{what}s", f"The {what} {name} is none that consumers know.")
        for value in self.model.graph.input:
            sizes = [size.dim_param for size in value.type.tensor_type.shape.dim]
            if not all(sizes):
                yield self._at(
                    "warning", "inputs", f"{value.name} takes texts of one number and length only, {sizes}."
                )

    def _wiring(self) -> Iterator[Finding]:
        graph = self.model.graph
        names = Counter(node.name for node in graph.node)
        known = {value.name for value in graph.input} | set(self.reader.protos)
        used = {value.name for value in graph.output}
        for node in graph.node:
            if not node.name.startswith("/"):
                yield self._at("warning", node.name or node.op_type, "The node's name is not a path.")
            if names[node.name] > 1:
                yield self._at("error", node.name, f"{names[node.name]} nodes have this name.")
            for value in node.input:
                if value and value not in known:
                    yield self._at(
                        "error", node.name, f"It reads {value}, which nothing before it computes or stores."
                    )
            known.update(value for value in node.output if value)
            used.update(node.input)
        for value in graph.output:
            if value.name not in known:
                yield self._at("error", "outputs", f"Nothing computes the output {value.name}.")
        for name in self.reader.protos:
            if name not in used:
                yield self._at("warning", name, "The tensor is stored, but nothing reads it.")
        if graph.sparse_initializer:
            yield self._at(
                "warning",
                "sparse_initializer",
                f"{len(graph.sparse_initializer)} sparse tensors: onnxruntime makes them dense when it loads.",
            )

    # -- operators --

    def _nbits(self, node: NodeProto) -> Iterator[Finding]:
        settings = _integers(node)
        bits, block = settings.get("bits", 4), settings.get("block_size", 0)
        yield from self._grid(node, bits, block, NBITS_BITS)
        level = settings.get("accuracy_level", 0)
        if level != ACCURACY_LEVEL:
            yield self._at(
                "warning",
                node.name,
                f"accuracy_level is {level}: it runs 3 to 300 times slower than at {ACCURACY_LEVEL}.",
            )
        if len(node.input) > 3 and node.input[3]:
            yield self._at(
                "warning", node.name, "It has zero points; the grid here is symmetric and needs none."
            )
        if len(node.input) > 4 and node.input[4]:
            yield self._at(
                "error",
                node.name,
                "It has a g_idx: onnxruntime computes wrong numbers with it, or refuses it.",
            )
        inputs, outputs = settings.get("K", 0), settings.get("N", 0)
        if bits in NBITS_BITS and block in BLOCKS:
            blocks = -(-inputs // block)
            yield from self._shape(node, 2, (outputs, blocks))
            expansion = expansion_of(node.input[1], self.producers)
            if expansion is None:
                yield from self._shape(node, 1, (outputs, blocks, block * bits // 8))
                yield from self._zeros(node.input[1], bits)
            else:
                yield from self._expansion(node, expansion, (outputs, blocks, block * bits // 8))

    def _bnb4(self, node: NodeProto) -> Iterator[Finding]:
        settings = _integers(node)
        block, inputs, outputs = (settings.get(name, 0) for name in ("block_size", "K", "N"))
        if settings.get("quant_type") not in BNB_TYPES.values():
            yield self._at(
                "error", node.name, f"quant_type is {settings.get('quant_type')}, and there are 0 and 1."
            )
        if block not in BNB_BLOCKS or inputs % block:
            yield self._at(
                "error",
                node.name,
                f"{inputs} inputs in blocks of {block}: a block would cross from one output to the next.",
            )
            return
        yield from self._shape(node, 1, (inputs * outputs // 2,))
        yield from self._shape(node, 2, (inputs // block * outputs,))

    def _expansion(
        self, node: NodeProto, expansion: Expansion, shape: tuple[int, int, int]
    ) -> Iterator[Finding]:
        """Packed codes of one product: sizes, positions, and what they are expanded with."""
        outputs, blocks, block_bytes = shape
        groups = blocks * block_bytes // 2
        for name in (expansion.values, expansion.patterns):
            found = self._dims(name)
            if found != (outputs, groups, 1):
                yield self._at(
                    "error", name, f"It has the shape {found}, and should have {(outputs, groups, 1)}."
                )
        kind = EXPANSIONS.get(expansion.table, EXPANSIONS[EXPANSION_TABLE])
        for name, expected in (
            (expansion.table, kind.rows().flatten().tolist()),
            (expansion.weights, [1, kind.factor]),
            (expansion.nodes[-1].input[1], list(shape)),
        ):
            if self._stored(name) != expected:
                yield self._at(
                    "error", name, f"{node.name} expands its codes with it, and it holds other numbers."
                )
        if kind.table != EXPANSION_TABLE:
            return  # every byte and half byte is a row of the table
        yield from self._zeros(expansion.values, 4)
        try:
            patterns = self.reader.bytes_of(expansion.patterns)
        except ArtifactError:
            return  # reported with the tensor itself
        largest = max(
            (int(((part & 15).maximum(part >> 4)).max()) for part in patterns.split(_CHUNK)), default=0
        )
        if largest >= len(POSITIONS):
            yield self._at(
                "error",
                expansion.patterns,
                f"It has a pattern {largest}, and they are numbered 0 to {len(POSITIONS) - 1}.",
            )

    def _stored(self, name: str) -> list[int] | None:
        """The numbers of a small stored tensor of integers, None if it is not there."""
        try:
            data = self.reader.bytes_of(name)
        except ArtifactError:
            return None
        wide = self.reader.protos[name].data_type == TensorProto.INT64
        return [int(number) for number in (data.clone().view(torch.int64) if wide else data)]

    def _gather(self, node: NodeProto) -> Iterator[Finding]:
        settings = _integers(node)
        bits, block = settings.get("bits", 4), settings.get("block_size", 0)
        yield from self._grid(node, bits, block, GATHER_BITS)
        table = self._dims(node.input[0])
        if table is not None and bits in GATHER_BITS and block in BLOCKS:
            yield from self._shape(node, 2, (table[0], table[-1] * 8 // bits // block))
            yield from self._zeros(node.input[0], bits)

    def _grid(self, node: NodeProto, bits: int, block: int, allowed: tuple[int, ...]) -> Iterator[Finding]:
        if bits not in allowed:
            yield self._at("error", node.name, f"{bits} bits: onnxruntime runs {allowed} here.")
        if block not in BLOCKS:
            yield self._at("error", node.name, f"Blocks of {block}: onnxruntime runs {BLOCKS}.")
        elif bits == 2 and block not in TWO_BIT_BLOCKS:
            yield self._at(
                "warning",
                node.name,
                f"2 bits in blocks of {block} have no fast kernel: use {TWO_BIT_BLOCKS}.",
            )

    def _dequantize(self, node: NodeProto) -> Iterator[Finding]:
        settings = _integers(node)
        block, axis = settings.get("block_size", 0), settings.get("axis", 1)
        if block not in BLOCKS or axis != 0:
            yield self._at(
                "warning",
                node.name,
                f"Blocks of {block} along axis {axis} are not fused with the product: use axis 0 and {BLOCKS}.",
            )
            return
        dims = self._dims(node.input[0])
        if dims is not None:
            yield from self._shape(node, 1, (-(-dims[0] // block), dims[1]))
            yield from self._zeros(node.input[0], None)

    def _shape(self, node: NodeProto, position: int, expected: tuple[int, ...]) -> Iterator[Finding]:
        found = self._dims(node.input[position])
        if found is not None and found != expected:
            yield self._at(
                "error", node.name, f"Input {position} has the shape {found}, and should have {expected}."
            )

    # -- tensors --

    def _zeros(self, name: str, bits: int | None) -> Iterator[Finding]:
        """Integers that are all zero; `bits` of unsigned codes, None for signed integers."""
        if name not in self.reader.protos:
            return
        zero = 0 if bits is None else _ZERO_BYTES[bits]
        try:
            data = self.reader.bytes_of(name)
        except ArtifactError:
            return  # reported with the tensor itself
        if all(bool((chunk == zero).all()) for chunk in data.split(_CHUNK)):
            yield self._at("warning", name, "Every integer is zero: the matrix computes nothing.")

    def _tensor(self, proto: TensorProto) -> Iterator[Finding]:
        """One tensor: its place, its size, its values."""
        bits = _BITS.get(proto.data_type)
        if bits is None:
            kind = TensorProto.DataType.Name(proto.data_type)
            yield self._at("error", proto.name, f"The type {kind} is none that this format uses.")
            return
        try:
            data = self.reader.bytes_of(proto.name)
        except ArtifactError as error:
            yield self._at("error", proto.name, str(error))
            return
        count = 1
        for size in proto.dims:
            count *= size
        expected = -(-count * bits // 8)
        if data.numel() != expected:
            yield self._at(
                "error",
                proto.name,
                f"{tuple(proto.dims)} of {bits} bits take {expected:,} bytes, and {data.numel():,} are stored.",
            )
            return
        dtype = _FLOATS.get(proto.data_type)
        if dtype is not None:
            yield from self._values(proto, data, dtype)

    def _values(self, proto: TensorProto, data: Tensor, dtype: torch.dtype) -> Iterator[Finding]:
        if data.data_ptr() % dtype.itemsize:
            yield self._at("warning", proto.name, "It is not aligned and cannot be mapped into memory.")
            data = data.clone()
        broken, nonzero = 0, False
        for chunk in data.split(_CHUNK):
            values = chunk.view(dtype)
            broken += int((~torch.isfinite(values)).sum())
            nonzero = nonzero or bool(values.any())
        if broken:
            yield self._at(
                "error",
                proto.name,
                f"{broken:,} of its {data.numel() // dtype.itemsize:,} values are NaN or infinite.",
            )
        if not nonzero and not proto.name.startswith("/constants/"):
            yield self._at("warning", proto.name, "Every value is zero.")

    def _data_file(self) -> Iterator[Finding]:
        """Tensors overlap only where they are the same bytes; nothing lies behind the last one."""
        extents: dict[Extent, str] = {}
        end = 0
        for proto in self.model.graph.initializer:
            if proto.data_location == TensorProto.EXTERNAL:
                try:
                    location, extent = external_extent(proto)
                except ArtifactError:
                    continue  # reported with the tensor itself
                if location != Path(DATA).name:
                    yield self._at(
                        "warning",
                        proto.name,
                        f"It lies in {location!r}; some consumers look for {Path(DATA).name}.",
                    )
                    continue
                extents.setdefault(extent, proto.name)
                end = max(end, extent.offset + extent.length)
        previous: tuple[Extent, str] | None = None
        for extent, name in sorted(extents.items(), key=lambda item: (item[0].offset, item[0].length)):
            if previous is not None and extent.offset < previous[0].offset + previous[0].length:
                yield self._at("error", name, f"Its bytes overlap those of {previous[1]}.")
            previous = (extent, name)
        path = self.folder / DATA
        size = path.stat().st_size if path.is_file() else 0
        if size > end:
            yield Finding("warning", DATA, f"{size - end:,} bytes behind the last tensor belong to none.")

    def _tied(self) -> Iterator[Finding]:
        """A model with tied embeddings has one table, and head and embedding read the same bytes of it."""
        if self.task == "features":
            return  # whatever config.json ties, there is no head
        roles = {_fact(node, Part.ROLE): node for node in self.model.graph.node}
        head, table = roles.get(Part.TIED_HEAD), roles.get(Part.EMBEDDING)
        if self.config.get("tie_word_embeddings") and table is not None and head is None:
            yield self._at(
                "warning", "lm_head", "config.json ties the head to the embedding, and the graph stores both."
            )
        if head is not None and table is not None:
            places = [self._extent(head.input[1]), self._extent(table.input[0])]
            if places[0] != places[1]:
                yield self._at("error", head.name, "The tied head does not read the table of the embedding.")

    def _extent(self, name: str) -> object:
        """Where a value is stored: its place in the data file, or its name."""
        proto = self.reader.protos.get(name)
        if proto is not None and proto.data_location == TensorProto.EXTERNAL:
            try:
                return external_extent(proto)
            except ArtifactError:
                return name
        return name

    def _files(self) -> Iterator[Finding]:
        for name in _CONSUMER_FILES[self.task]:
            path = self.folder / name
            if not path.is_file():
                yield Finding("warning", name, "The file is missing; some consumers need it.")
            elif _json(path) is None:
                yield Finding("error", name, "The file holds no JSON object.")
        if self.task is not None:
            return
        value: Any = _json(self.folder / "genai_config.json")
        for key in ("model", "decoder", "filename"):
            value = value.get(key) if isinstance(value, dict) else None
        filename = value if isinstance(value, str) else GRAPH
        if not (self.folder / filename).is_file():
            yield Finding("error", "genai_config.json", f"It names the graph {filename}, which is not there.")


def _integers(node: NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def _fact(node: NodeProto, key: str) -> str | None:
    return next((entry.value for entry in node.metadata_props if entry.key == key), None)


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
