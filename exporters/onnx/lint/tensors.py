"""Rules about stored tensors: their place, their size, their values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from onnx import TensorProto
from torch import Tensor

from compot_deploy.core.diagnostics import Diagnostic
from compot_deploy.errors import ArtifactError
from compot_deploy.exporters.onnx.lint.subject import CHUNK, Subject, in_graph
from compot_deploy.exporters.onnx.nodes import FLOAT_TYPES
from compot_deploy.exporters.onnx.tensors import Extent, data_of, external_extent

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


def lint_tensors(subject: Subject) -> Iterator[Diagnostic]:
    """Every tensor, then the data file that they lie in."""
    for tensor in subject.model.graph.initializer:
        yield from _tensor(subject, tensor)
    yield from _data_file(subject)


def _tensor(subject: Subject, proto: TensorProto) -> Iterator[Diagnostic]:
    """One tensor: its place, its size, its values."""
    bits = _BITS.get(proto.data_type)
    if bits is None:
        kind = TensorProto.DataType.Name(proto.data_type)
        yield in_graph("error", proto.name, f"The type {kind} is none that this format uses.")
        return
    try:
        data = subject.reader.bytes_of(proto.name)
    except ArtifactError as error:
        yield in_graph("error", proto.name, str(error))
        return
    count = 1
    for size in proto.dims:
        count *= size
    expected = -(-count * bits // 8)
    if data.numel() != expected:
        yield in_graph(
            "error",
            proto.name,
            f"{tuple(proto.dims)} of {bits} bits take {expected:,} bytes, and {data.numel():,} are stored.",
        )
        return
    dtype = FLOAT_TYPES.get(proto.data_type)
    if dtype is not None:
        yield from _values(subject, proto, data, dtype)


def _values(subject: Subject, proto: TensorProto, data: Tensor, dtype: torch.dtype) -> Iterator[Diagnostic]:
    if data.data_ptr() % dtype.itemsize:
        yield in_graph("warning", proto.name, "It is not aligned and cannot be mapped into memory.")
        data = data.clone()
    broken, nonzero = 0, False
    for chunk in data.split(CHUNK):
        values = chunk.view(dtype)
        broken += int((~torch.isfinite(values)).sum())
        nonzero = nonzero or bool(values.any())
    if broken:
        yield in_graph(
            "error",
            proto.name,
            f"{broken:,} of its {data.numel() // dtype.itemsize:,} values are NaN or infinite.",
        )
    if not nonzero and not proto.name.startswith("/constants/"):
        yield in_graph("warning", proto.name, "Every value is zero.")


def _data_file(subject: Subject) -> Iterator[Diagnostic]:
    """Tensors overlap only where they are the same bytes; nothing lies behind the last one."""
    extents: dict[Extent, str] = {}
    end, data = 0, data_of(subject.graph)
    for proto in subject.model.graph.initializer:
        if proto.data_location == TensorProto.EXTERNAL:
            try:
                location, extent = external_extent(proto)
            except ArtifactError:
                continue  # reported with the tensor itself
            if location != Path(data).name:
                yield in_graph(
                    "warning",
                    proto.name,
                    f"It lies in {location!r}; some consumers look for {Path(data).name}.",
                )
                continue
            extents.setdefault(extent, proto.name)
            end = max(end, extent.offset + extent.length)
    previous: tuple[Extent, str] | None = None
    for extent, name in sorted(extents.items(), key=lambda item: (item[0].offset, item[0].length)):
        if previous is not None and extent.offset < previous[0].offset + previous[0].length:
            yield in_graph("error", name, f"Its bytes overlap those of {previous[1]}.")
        previous = (extent, name)
    path = subject.folder / data
    size = path.stat().st_size if path.is_file() else 0
    if size > end:
        yield Diagnostic("warning", data, f"{size - end:,} bytes behind the last tensor belong to none.")
