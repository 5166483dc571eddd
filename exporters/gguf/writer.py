"""A model as one GGUF file: the header first, then every tensor, one at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from compot_deploy.exporters.gguf.index import ARCHITECTURE
from compot_deploy.exporters.gguf.kinds import Value
from compot_deploy.exporters.gguf.metadata import Described, add_key, describe
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.plan import TensorPlan
from compot_deploy.exporters.gguf.rows import Entry
from compot_deploy.exporters.gguf.tokenizer import model_name, tokenizer_keys
from compot_deploy.models.compressed import CompressedModel

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
    described = describe(model.config)
    keys, notes = _metadata(model, described, options)
    plan = TensorPlan(model, described, options)
    notes += plan.notes
    temporary = path.with_name(f".{path.name}.partial")
    architecture = described.kind.ggml if options.layout == "dense" else ARCHITECTURE
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
    described = describe(model.config)
    keys, _ = _metadata(model, described, options)
    plan = TensorPlan(model, described, options)
    writer = GGUFWriter(path, described.kind.ggml if options.layout == "dense" else ARCHITECTURE)
    try:
        _write_header(writer, keys | plan.keys(), plan.entries)
    finally:
        writer.close()
    sizes = (Path(path).stat().st_size, *(entry.nbytes for entry in plan.entries))
    return sum(math.ceil(size / GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT for size in sizes) - sizes[0]


def _write_header(writer: Any, keys: Mapping[str, Value], entries: Sequence[Entry]) -> None:
    for key, value in keys.items():
        add_key(writer, key, value)
    for entry in entries:
        _announce(writer, entry)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _metadata(
    model: CompressedModel, described: Described, options: GgufOptions
) -> tuple[dict[str, Value], list[str]]:
    tokenizer = tokenizer_keys(model.source, model.config)
    notes = list(tokenizer.notes)
    if described.promised < described.context:
        notes.append(
            f"llama.cpp reads a {model.model_type} as transformers does within {described.promised} positions only (it "
            "has no sliding window for this type, or takes rotary factors for long texts by the size of its context): "
            f"the context of {described.context} is cut to those."
        )
    file_type = (
        _FILE_TYPES.get(options.type, _FILE_TYPE_GUESSED) if options.layout == "dense" else _FILE_TYPE_GUESSED
    )
    name = options.name or Path(model.source).name or model.model_type
    tokens = tokenizer.keys.get("tokenizer.ggml.tokens", ())
    keys: dict[str, Value] = {
        "general.name": model_name(name, tokens),  # type: ignore[arg-type]
        "general.quantization_version": 2,
        "general.file_type": file_type,
    }
    for key, text in options.provenance.items():
        keys[f"compot.{key}"] = text
    keys |= described.keys
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
