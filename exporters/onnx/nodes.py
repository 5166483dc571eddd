"""The nodes and tensors of an ONNX graph.

Facts about ONNX Runtime that shape it, each pinned by a test:

* Scales are stored as float16 and cast; ONNX Runtime folds the cast when it loads.
* IR 10: newer ones do not load everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from compot_deploy.exporters.onnx.tensors import Extent, TensorWriter

IR_VERSION: Final = 10
MICROSOFT: Final = "com.microsoft"

TRACED: Final = "compot.traced"
"""Metadata of a graph that was traced, and what for: ``features`` or ``generation``."""

INLINE_BYTES: Final = 1024
"""Tensors up to this size are kept in the graph, larger ones in the data file."""

FloatType: TypeAlias = Literal["float32", "float16", "bfloat16"]

_FLOAT_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOAT_KINDS: Final = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
FLOAT_TYPES: Final = {kind: _FLOAT_DTYPES[name] for name, kind in _FLOAT_KINDS.items()}
"""torch's type of each floating-point type of ONNX that is written here."""


def node_path(module: str) -> str:
    """``model.layers.0.self_attn.q_proj`` as ``/model/layers.0/attn/q_proj``."""
    path = "/" + module.replace("self_attn", "attn").replace(".", "/")
    return re.sub(r"/(\d+)(?=/|$)", r".\1", path)


class Part:
    """Names of the facts that are written onto nodes, so that a file can be read back by itself."""

    MATRIX: Final = "compot.matrix"
    ROLE: Final = "compot.role"
    PAIR: Final = "compot.pair"
    DICTIONARY: Final = "compot.dictionary"
    PATTERN: Final = "compot.pattern"
    INPUTS: Final = "compot.inputs"

    PLAIN: Final = "plain"
    DICTIONARY_ROLE: Final = "dictionary"
    CODES: Final = "codes"
    EMBEDDING: Final = "embedding"
    TIED_HEAD: Final = "tied_head"


@dataclass
class Nodes:
    """Nodes and tensors of a graph as they are added; a value is named by its string.

    Attributes:
        writer: of the data file.
        floats: type in which floating-point matrices are stored.
        nodes: so far.
        tensors: so far, by name.
    """

    writer: TensorWriter
    floats: FloatType
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: dict[str, TensorProto] = field(default_factory=dict)

    def tensor(self, name: str, data: Tensor, kind: int, shape: Sequence[int]) -> str:
        """Add a stored tensor under a name of its own."""
        if data.numel() * data.element_size() <= INLINE_BYTES:
            proto = self._declare(name, kind, shape)
            known = torch.zeros_like(data, device="cpu") if data.is_meta else data.contiguous()
            proto.raw_data = known.view(-1).view(torch.uint8).numpy().tobytes()
        else:
            self.alias(name, self.writer.append(data), kind, shape)
        return name

    def alias(self, name: str, extent: Extent, kind: int, shape: Sequence[int]) -> str:
        """Add a tensor whose bytes are in the data file already."""
        proto = self._declare(name, kind, shape)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", self.writer.location),
            ("offset", str(extent.offset)),
            ("length", str(extent.length)),
        ):
            entry = proto.external_data.add()
            entry.key, entry.value = key, value
        return name

    def _declare(self, name: str, kind: int, shape: Sequence[int]) -> TensorProto:
        if name in self.tensors:
            raise ValueError(f"The tensor {name} is in the graph already.")
        proto = TensorProto(name=name, data_type=kind, dims=list(shape))
        self.tensors[name] = proto
        return proto

    def constant(self, value: int | float | Sequence[int], kind: int = TensorProto.INT64) -> str:
        """A small constant, one tensor per value and type."""
        name = f"/constants/{TensorProto.DataType.Name(kind)}/{value}".replace(" ", "")
        if name not in self.tensors:
            dtype = {
                TensorProto.INT64: torch.int64,
                TensorProto.INT32: torch.int32,
                TensorProto.FLOAT: torch.float32,
            }[kind]
            data = torch.tensor(value, dtype=dtype)
            self.tensor(name, data, kind, data.shape)
        return name

    def float_tensor(self, name: str, data: Tensor) -> str:
        """A float32 tensor, as it stands."""
        return self.tensor(name, data.detach().float(), TensorProto.FLOAT, data.shape)

    def stored_float(self, name: str, weight: Tensor) -> str:
        """A floating-point matrix in the file's floating-point type, which must hold it exactly."""
        stored = weight.detach().to(_FLOAT_DTYPES[self.floats])
        if not weight.is_meta and not torch.equal(stored.to(weight.dtype), weight.detach()):
            raise ValueError(f"{name} ({weight.dtype}) cannot be stored in {self.floats} without an error.")
        return self.tensor(name, stored, _FLOAT_KINDS[self.floats], stored.shape)

    def as_float(self, stored: str, path: str) -> str:
        """A stored tensor as float32."""
        if self.tensors[stored].data_type == TensorProto.FLOAT:
            return stored
        return self.node("Cast", [stored], path, to=TensorProto.FLOAT)

    def scales(self, name: str, path: str, scales: Tensor) -> str:
        """Scales as float32, stored as float16."""
        stored = self.tensor(f"{name}.scales", scales, TensorProto.FLOAT16, scales.shape)
        return self.node("Cast", [stored], f"{path}/scales/Cast", to=TensorProto.FLOAT)

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        *,
        domain: str = "",
        outputs: Sequence[str] | None = None,
        metadata: Mapping[str, str] | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node; returns its first output."""
        made = helper.make_node(
            operator,
            list(inputs),
            list(outputs or [f"{name}/output_0"]),
            name=name,
            domain=domain,
            **attributes,
        )
        for key, value in (metadata or {}).items():
            entry = made.metadata_props.add()
            entry.key, entry.value = key, value
        self.nodes.append(made)
        return str(made.output[0])
