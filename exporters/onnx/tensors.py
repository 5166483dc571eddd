"""Tensors beside the graph: the data file of an ONNX model, written and read one tensor at a time.

ONNX keeps tensors of more than a few bytes in files of their own (external data), found by name, offset and
length; protobuf's limit of 2 GB then holds for the graph alone. Nothing here keeps more than one tensor in
memory.
"""

from __future__ import annotations

import mmap
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from compot_deploy.errors import ArtifactError, first_line

GRAPH: Final = "onnx/model.onnx"
"""The graph, relative to the folder."""

DATA: Final = "onnx/model.onnx_data"
"""Its tensors; transformers.js looks for exactly this name."""

TOWERS: Final = ("onnx/encoder_model.onnx", "onnx/decoder_model_merged.onnx")
"""The graphs of a model of two towers, relative to the folder; tensors lie beside each as beside `GRAPH`."""


def data_of(graph: str) -> str:
    """The tensors of a graph, relative to the folder."""
    return f"{graph}_data"


def graphs_of(folder: Path) -> tuple[str, ...]:
    """The graphs of a folder: one, or those of the towers."""
    found = tuple(graph for graph in TOWERS if (folder / graph).is_file())
    return (GRAPH,) if (folder / GRAPH).is_file() or not found else TOWERS


def read_graph(path: Path) -> onnx.ModelProto:
    """A graph without its external data.

    Raises:
        ArtifactError: it is missing, no ONNX graph, or has names that are no text.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing.") from None
    except Exception as error:  # protobuf's own error types differ between its implementations
        raise ArtifactError(f"{path} is not an ONNX graph, or it is damaged: {first_line(error)}.") from None
    graph = model.graph
    names = [tensor.name for tensor in graph.initializer]
    for node in graph.node:
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
        names += [text for entry in node.metadata_props for text in (entry.key, entry.value)]
    for value in (*graph.input, *graph.output):
        names += [value.name, *(size.dim_param for size in value.type.tensor_type.shape.dim)]
    # What is no UTF-8 protobuf gives as bytes.
    strange = next((name for name in names if not isinstance(name, str)), None)
    if strange is not None:
        raise ArtifactError(f"{path} has the name {strange!r}, which is no text: it is damaged.")
    return model


@dataclass(frozen=True)
class Extent:
    """Where a tensor lies in the data file."""

    offset: int
    length: int


@dataclass
class TensorWriter:
    """Appends tensors to the data file, one at a time, each where it can be mapped into memory.

    Attributes:
        file: the open data file.
        location: its name, as the graph refers to it.
        position: where the file stands.
    """

    file: BinaryIO
    location: str
    position: int = 0

    def append(self, data: Tensor) -> Extent:
        """Write the bytes of a tensor behind zeros up to a multiple of 64 (of 4096 for more than a MiB).

        Of a tensor without values (on torch's device ``meta``) the place is taken, and nothing is written.
        """
        flat = data.contiguous().view(-1).view(torch.uint8)
        padding = -self.position % (4096 if flat.numel() > 1 << 20 else 64)
        if not flat.is_meta:
            self.file.write(b"\0" * padding)
            self.file.write(flat.numpy().data)
        extent = Extent(offset=self.position + padding, length=flat.numel())
        self.position = extent.offset + extent.length
        return extent


@dataclass
class TensorReader:
    """Reads the tensors of a graph, from the graph itself or from mapped data files.

    Attributes:
        graph: loaded without its external data.
        folder: where the graph lies; data files must lie in it or below.
    """

    graph: onnx.GraphProto
    folder: Path
    protos: dict[str, TensorProto] = field(init=False)
    _maps: dict[str, mmap.mmap] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.protos = {tensor.name: tensor for tensor in self.graph.initializer}

    def bytes_of(self, name: str) -> Tensor:
        """The raw bytes of a tensor, uint8; where it lies in a file, a view of the mapping: never write to it.

        Raises:
            ArtifactError: no such tensor, or its bytes lie outside the folder or the file.
        """
        if name not in self.protos:
            raise ArtifactError(f"The graph uses the tensor {name}, which it does not hold.")
        proto = self.protos[name]
        if proto.data_location != TensorProto.EXTERNAL:
            return _view(bytearray(proto.raw_data), Extent(0, len(proto.raw_data)))
        location, extent = external_extent(proto)
        mapped = self._map(name, location)
        if extent.offset + extent.length > len(mapped):
            raise ArtifactError(
                f"{self.folder / location} has {len(mapped):,} bytes, and the tensor {name} ends at "
                f"{extent.offset + extent.length:,}: the file is truncated or belongs to another graph."
            )
        return _view(mapped, extent)

    def _map(self, name: str, location: str) -> mmap.mmap:
        if location not in self._maps:
            path = data_path(self.folder, location, name)
            try:
                with path.open("rb") as file:
                    self._maps[location] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ArtifactError(
                    f"{path}, which holds the tensor {name}, cannot be read: {error}."
                ) from None
        return self._maps[location]


def _view(buffer: mmap.mmap | bytearray, extent: Extent) -> Tensor:
    if extent.length == 0:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        # The mapping is read-only, because a writable one counts against the memory of the machine.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=torch.uint8, count=extent.length, offset=extent.offset)


def external_extent(proto: TensorProto) -> tuple[str, Extent]:
    """File name and place of an external tensor.

    Raises:
        ArtifactError: an entry is missing or is not a number.
    """
    entries = {entry.key: entry.value for entry in proto.external_data}
    try:
        offset, length = int(entries.get("offset", "0")), int(entries["length"])
        location = entries["location"]
    except (KeyError, ValueError) as error:
        raise ArtifactError(
            f"The tensor {proto.name} has no usable place in a data file ({error})."
        ) from None
    if offset < 0 or length < 0:
        raise ArtifactError(f"The tensor {proto.name} has offset {offset} and length {length}.")
    return location, Extent(offset, length)


def data_path(folder: Path, location: str, name: str) -> Path:
    """The data file of a tensor.

    Raises:
        ArtifactError: it lies outside the folder of the graph.
    """
    root = folder.resolve()
    path = (root / location).resolve()
    if not path.is_relative_to(root) or path == root:
        raise ArtifactError(f"The tensor {name} lies in {location!r}, outside the folder of its graph.")
    return path
