"""A GGUF header read with every number checked against the file, in pure Python.

Runtimes trust the sizes that a file states. This reader runs first and trusts none: lengths, counts,
offsets and shapes are compared with the bytes that exist, before anything is allocated or sliced.

    magic "GGUF" | u32 version | u64 tensors | u64 keys
    key: string, u32 type, value          string: u64 length, UTF-8 bytes
    tensor: string, u32 dims, u64 per dim (innermost first), u32 type, u64 offset
    padding to general.alignment | tensor data
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import UInt8

from compot_deploy.errors import ArtifactError
from compot_deploy.exporters.gguf.ggml_types import BY_NUMBER

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_DIMS: Final = 4
MAX_NAME: Final = 63
"""ggml_tensor holds 64 bytes of name, a terminating zero included."""

_SCALARS: Final[Mapping[int, str]] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_ARRAYS: Final[Mapping[int, str]] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8",
    11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING: Final = 8
_ARRAY: Final = 9


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies.

    Attributes:
        name: as in the file.
        kind: name of the ggml type, ``Q4_0`` for example.
        shape: outermost first, as numpy counts; the last entry is ggml's ``ne[0]``.
        offset: from the start of the file, in bytes.
        nbytes: size in bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A checked header and the mapped bytes behind it.

    Attributes:
        path: the file.
        metadata: keys and values; arrays of numbers are numpy arrays, arrays of strings are lists.
        tensors: by name, in file order.
        data: the whole file, mapped read-only.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data: UInt8[np.ndarray, " bytes"]

    def bytes_of(self, name: str) -> UInt8[np.ndarray, "rows bytes"]:
        """The bytes of a tensor, one row of the matrix per row; a view into the file."""
        tensor = self.tensors[name]
        flat = self.data[tensor.offset : tensor.offset + tensor.nbytes]
        rows = int(np.prod(tensor.shape[:-1], dtype=np.int64)) if len(tensor.shape) > 1 else 1
        return flat.reshape(rows, -1)

    def text(self, key: str) -> str:
        """A string value that must be there.

        Raises:
            ArtifactError: the key is absent or not a string.
        """
        value = self.metadata.get(key)
        if not isinstance(value, str):
            raise ArtifactError(
                f"{self.path.name}: the key {key} is missing or not a string. Export it again."
            )
        return value

    def count(self, key: str) -> int:
        """A positive whole number that must be there.

        Raises:
            ArtifactError: the key is absent or not a positive whole number.
        """
        value = self.metadata.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArtifactError(f"{self.path.name}: the key {key} is missing or not a positive number.")
        return value


def read_header(path: str | Path) -> GgufFile:
    """Read and check the header of a GGUF file.

    Raises:
        ArtifactError: not GGUF, another version, truncated, or any number that contradicts the file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size < 24:
            raise ArtifactError(f"{path.name}: {size} bytes are too few for a GGUF file of at least 24.")
        data = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}.") from error
    return parse(data, path)


def parse(data: UInt8[np.ndarray, " bytes"], path: Path) -> GgufFile:
    """`read_header` on bytes that are in memory already."""
    cursor = _Cursor(data, path.name)
    magic = cursor.take(4)
    if magic != MAGIC:
        raise ArtifactError(f"{path.name}: starts with {magic!r}, not {MAGIC!r}: this is not a GGUF file.")
    version = cursor.number("<I")
    if version not in VERSIONS:
        raise ArtifactError(
            f"{path.name}: GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read."
        )
    tensor_count, key_count = cursor.number("<Q"), cursor.number("<Q")
    # The shortest key takes 13 bytes and the shortest tensor 32: more than fit are not worth a loop.
    if tensor_count > cursor.left // 24 or key_count > cursor.left // 12:
        raise ArtifactError(
            f"{path.name}: {tensor_count} tensors and {key_count} keys cannot fit in {len(data)} bytes."
        )
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        if key in metadata:
            raise ArtifactError(f"{path.name}: the key {key!r} appears twice.")
        metadata[key] = cursor.value(cursor.number("<I"))
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if (
        isinstance(alignment, bool)
        or not isinstance(alignment, int)
        or alignment < 1
        or alignment & (alignment - 1)
    ):
        raise ArtifactError(f"{path.name}: an alignment of {alignment!r} is not a power of two.")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    end = start
    for name, kind, shape, offset, nbytes in infos:
        if name in tensors:
            raise ArtifactError(f"{path.name}: the tensor {name!r} appears twice.")
        if offset % alignment:
            raise ArtifactError(f"{path.name}: tensor {name!r} at {offset} is not aligned to {alignment}.")
        if start + offset < end:
            raise ArtifactError(f"{path.name}: tensor {name!r} at {offset} overlaps the one before it.")
        end = start + offset + nbytes
        if end > len(data):
            raise ArtifactError(
                f"{path.name}: tensor {name!r} ends at byte {end}, the file has {len(data)}: it is truncated."
            )
        tensors[name] = GgufTensor(name, kind, shape, start + offset, nbytes)
    return GgufFile(path, metadata, tensors, data)


def _tensor_info(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int, int]:
    name = cursor.string()
    if not 0 < len(name.encode()) <= MAX_NAME:
        raise ArtifactError(
            f"{cursor.name}: a tensor name of {len(name.encode())} bytes; 1 to {MAX_NAME} are allowed."
        )
    dims = cursor.number("<I")
    if not 1 <= dims <= MAX_DIMS:
        raise ArtifactError(
            f"{cursor.name}: tensor {name!r} has {dims} dimensions; 1 to {MAX_DIMS} are allowed."
        )
    sizes = [cursor.number("<Q") for _ in range(dims)]
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    stored = BY_NUMBER.get(kind)
    if stored is None:
        raise ArtifactError(f"{cursor.name}: tensor {name!r} has the unknown type {kind}.")
    elements = 1
    for size in sizes:
        elements *= size  # Python integers do not overflow
    if min(sizes) < 1 or elements >= 2**62 or sizes[0] % stored.block:
        raise ArtifactError(
            f"{cursor.name}: tensor {name!r} has the impossible shape {sizes} for {stored.name}."
        )
    return name, stored.name, tuple(reversed(sizes)), offset, stored.row_bytes(elements)


class _Cursor:
    """A position in the header; every step is checked against the end of the file."""

    def __init__(self, data: UInt8[np.ndarray, " bytes"], name: str) -> None:
        self.data, self.name, self.at = memoryview(data.data), name, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def skip(self, count: int) -> int:
        """Move on by `count` bytes; returns the position before."""
        if count > self.left:
            raise ArtifactError(
                f"{self.name}: {count} bytes are announced at {self.at}, {self.left} are left: truncated."
            )
        before = self.at
        self.at += count
        return before

    def take(self, count: int) -> bytes:
        before = self.skip(count)
        return bytes(self.data[before : self.at])

    def number(self, form: str) -> Any:
        before = self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.data, before)[0]

    def string(self) -> str:
        raw = self.take(self.number("<Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ArtifactError(
                f"{self.name}: a string before byte {self.at} is not UTF-8: damaged."
            ) from None

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ArtifactError(f"{self.name}: a value of the unknown type {kind} at byte {self.at}.")
        of, count = self.number("<I"), self.number("<Q")
        if of == _STRING:
            if count > self.left // 8:
                raise ArtifactError(f"{self.name}: {count} strings cannot fit in {self.left} bytes.")
            return [self.string() for _ in range(count)]
        if of not in _ARRAYS:
            raise ArtifactError(f"{self.name}: an array of the unknown type {of} at byte {self.at}.")
        dtype = np.dtype(_ARRAYS[of])
        before = self.skip(count * dtype.itemsize)
        return np.frombuffer(self.data[before : self.at], dtype)
