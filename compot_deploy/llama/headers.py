"""The header of a GGUF file as llama.cpp holds it: built for tensors in memory, or written in front of expanded ones.

llama.cpp asks for every tensor that an architecture may have when it is handed tensors one by one. What it does with
one that a model lacks is only known for some architectures; files of the others are expanded into a file of their own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from compot_deploy.exporters.gguf.library import GgmlInit, GgufInit, Library, LlamaError
from compot_deploy.llama.parts import Parts

_ALIGNMENT: Final = 32
"""Bytes; what gguf writes by default, and so do we."""


def refusal(library: Library, path: Path, what: str) -> LlamaError:
    """The error of something that llama.cpp would not do, with what it said."""
    said = library.said
    return LlamaError(f"llama.cpp could not {what} {path.name}" + (f": {said}" if said else "."))


@contextmanager
def described_file(
    library: Library, parts: Parts, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> Iterator[int]:
    """llama.cpp's description of a file: the metadata of another under the base architecture, and tensors.

    Args:
        library: llama.cpp.
        parts: of the file that the metadata are of.
        tensors: ggml type, in small letters, and shape by name.

    Raises:
        LlamaError: llama.cpp does not read the header.
    """
    path = parts.file.path
    source = library.gguf_init_from_file(str(path).encode(), GgufInit(True, None))
    if not source:
        raise refusal(library, path, "read the header of")
    described = library.gguf_init_empty()
    count = len(tensors) + 8
    context = library.ggml_init(GgmlInit(count * (int(library.ggml_tensor_overhead()) + 64), None, True))
    try:
        library.gguf_set_kv(described, source)
        library.gguf_set_val_str(described, b"general.architecture", parts.base.encode())
        for name, (kind, shape) in tensors.items():
            make = getattr(library, f"ggml_new_tensor_{len(shape)}d")
            tensor = make(context, library.type_number(kind), *reversed(shape))
            library.ggml_set_name(tensor, name.encode())
            library.gguf_add_tensor(described, tensor)
        yield described
    finally:
        library.ggml_free(context)
        library.gguf_free(described)
        library.gguf_free(source)


@contextmanager
def expanded_file(library: Library, parts: Parts) -> Iterator[str]:
    """A file with every tensor in float32, in memory where the system can, until the context ends.

    Raises:
        LlamaError: the header cannot be written.
    """
    values = {name: parts.floating(name) for name in parts.natives}
    with _file() as path:
        with described_file(
            library, parts, {name: ("f32", shape) for name, (_, shape, _) in values.items()}
        ) as d:
            if not library.gguf_write_to_file(d, path.encode(), True):
                raise refusal(library, parts.file.path, "expand")
        with Path(path).open("ab") as file:
            for _, _, rows in values.values():
                data = np.ascontiguousarray(rows())
                file.write(data.data)
                file.write(b"\0" * (-data.nbytes % _ALIGNMENT))
        parts.release_pages()
        yield path


@contextmanager
def _file() -> Iterator[str]:
    """A name to write to: of memory, or of a temporary file."""
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
        number = os.memfd_create("expanded.gguf")
        try:
            yield f"/proc/self/fd/{number}"
        finally:
            os.close(number)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(Path(folder) / "expanded.gguf")
