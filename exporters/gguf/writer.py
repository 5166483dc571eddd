"""A model as one GGUF file: the header first, then every tensor, one at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from compot_deploy.exporters.gguf import metadata as gguf_metadata
from compot_deploy.exporters.gguf.index import ARCHITECTURE
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.plan import TensorPlan
from compot_deploy.exporters.gguf.rows import Entry
from compot_deploy.exporters.gguf.tokenizer import tokenizer_keys
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.decoder_shape import decoder_shape

_FILE_TYPES: Final = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "BF16": 32}
_FILE_TYPE_GUESSED: Final = 1024


@dataclass(frozen=True)
class GgufResult:
    """What was written.

    Attributes:
        path: the file.
        nbytes: its size.
        matrix_bytes: bytes of each matrix, a shared dictionary counted with its first user.
        kinds: how each GGUF tensor was stored, ``Q4_0`` or ``planes int4/g64 2:4`` for example.
        notes: everything that differs from what was asked: wider types, padding, tokenizer notes.
    """

    path: Path
    nbytes: int
    matrix_bytes: Mapping[str, int]
    kinds: Mapping[str, str]
    notes: tuple[str, ...]


def write(model: CompressedModel, path: str | Path, options: GgufOptions | None = None) -> GgufResult:
    """Write a model as one GGUF file, which appears whole or not at all.

    Args:
        model: any mix of dense, quantized and factorized matrices.
        path: the file; its folder must exist.
        options: layout and types; None writes the dense layout.

    Raises:
        RecipeError: a grid that the layout cannot hold, or a type that needs importance weights.
        UnsupportedModelError: a feature that GGUF has no key for.
        MissingDependencyError: a K or IQ type without llama.cpp's library.
    """
    from gguf import GGUFWriter

    options = options or GgufOptions()
    path = Path(path)
    keys, notes = _metadata(model, options)
    plan = TensorPlan(model, options)
    notes += plan.notes
    temporary = path.with_name(f".{path.name}.partial")
    architecture = model.native.ggml_name if options.layout == "dense" else ARCHITECTURE
    writer = GGUFWriter(temporary, architecture)
    try:
        _write_header(writer, keys | plan.keys(), plan.entries)
        for entry in plan.entries:
            rows = entry.rows()
            if rows.nbytes != entry.nbytes:
                raise RuntimeError(
                    f"{entry.name}: {rows.nbytes} bytes instead of the planned {entry.nbytes}."
                )
            writer.write_tensor_data(rows)
        writer.close()
        temporary.replace(path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return GgufResult(
        path=path,
        nbytes=path.stat().st_size,
        matrix_bytes=plan.matrix_bytes,
        kinds={entry.name: entry.described for entry in plan.entries},
        notes=tuple(notes),
    )


def write_header(model: CompressedModel, path: str | Path, options: GgufOptions | None = None) -> int:
    """Write what stands before the tensors of a file, whose values are not looked at.

    Returns:
        Bytes that would follow: the tensors, and what aligns them.
    """
    from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFWriter

    options = options or GgufOptions()
    keys, _ = _metadata(model, options)
    plan = TensorPlan(model, options)
    writer = GGUFWriter(path, model.native.ggml_name if options.layout == "dense" else ARCHITECTURE)
    try:
        _write_header(writer, keys | plan.keys(), plan.entries)
    finally:
        writer.close()
    sizes = (Path(path).stat().st_size, *(entry.nbytes for entry in plan.entries))
    return sum(math.ceil(size / GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT for size in sizes) - sizes[0]


def _write_header(writer: Any, keys: Mapping[str, gguf_metadata.Value], entries: Sequence[Entry]) -> None:
    for key, value in keys.items():
        gguf_metadata.add_key(writer, key, value)
    for entry in entries:
        _announce(writer, entry)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _metadata(
    model: CompressedModel, options: GgufOptions
) -> tuple[dict[str, gguf_metadata.Value], list[str]]:
    architecture, config = model.native, model.config
    tokenizer = tokenizer_keys(model.source, config)
    notes = list(tokenizer.notes)
    shape = decoder_shape(architecture, config)
    if (window := gguf_metadata.context_length(shape)) < shape.context:
        notes.append(
            f"llama.cpp has no sliding window for {architecture.model_type}: the context of {shape.context} "
            f"positions is cut to the window of {window}, within which both agree."
        )
    file_type = (
        _FILE_TYPES.get(options.type, _FILE_TYPE_GUESSED) if options.layout == "dense" else _FILE_TYPE_GUESSED
    )
    name = options.name or Path(model.source).name or architecture.model_type
    keys: dict[str, gguf_metadata.Value] = {
        "general.name": name.encode("utf-8", "replace").decode(),
        "general.quantization_version": 2,
        "general.file_type": file_type,
    }
    for key, text in options.provenance.items():
        keys[f"compot.{key}"] = text
    keys |= gguf_metadata.hyperparameters(architecture, config)
    keys |= tokenizer.keys
    return keys, notes


def _announce(writer: Any, entry: Entry) -> None:
    from gguf import GGMLQuantizationType

    floats = {"F32": np.float32, "F16": np.float16, "I8": np.int8}
    if entry.kind in floats:
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(floats[entry.kind]), entry.nbytes)
    else:
        byte_shape = (*entry.shape[:-1], entry.nbytes // math.prod(entry.shape[:-1]))
        writer.add_tensor_info(
            entry.name,
            byte_shape,
            np.dtype(np.uint8),
            entry.nbytes,
            raw_dtype=GGMLQuantizationType[entry.kind],
        )
