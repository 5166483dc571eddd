"""Floating point to ggml types, for dense files: gguf-py where it can, llama.cpp's own code for the rest.

The bytes are the same either way. K-quants and IQ types live only in llama.cpp's library, reached by ctypes
through ``ggml_quantize_chunk`` in the wheel of the extra ``llama``; nothing is compiled.
"""

from __future__ import annotations

import ctypes
import importlib.util
from typing import Final

import numpy as np
from jaxtyping import Float32, UInt8

from compot_deploy.errors import RecipeError
from compot_deploy.exporters.gguf.ggml_types import GGML_TYPES

FLOATS: Final = ("F32", "F16", "BF16")
_GGUF_PY: Final = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0")
_LIBRARY: Final = (
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS",
    "IQ3_S", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
_SEARCHED: Final = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Types of gguf-py's for which llama.cpp has a search that importance weights guide."""

TYPES: Final = (*FLOATS, *_GGUF_PY, *_LIBRARY)
NEED_IMPORTANCE: Final = ("IQ1_S", "IQ2_XXS", "IQ2_XS")
"""llama.cpp refuses to quantize to these without importance weights."""

# What llama.cpp's own quantizer takes where rows do not split into blocks of 256 (llama-quant.cpp).
_FALLBACK: Final = {
    **dict.fromkeys(
        ("Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"),
        "IQ4_NL",
    ),
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def check_type(kind: str) -> None:
    """Refuse a type that nobody writes.

    Raises:
        RecipeError: naming the types that are written.
    """
    if kind not in TYPES:
        raise RecipeError(f"The GGUF type {kind!r} is not written. Use one of: {', '.join(TYPES)}.")


def check_library(kind: str) -> None:
    """Refuse a type that only llama.cpp's library writes where the library is not installed.

    Raises:
        MissingDependencyError: naming the extra that brings it.
    """
    if kind in _LIBRARY:
        from compot_deploy.exporters.gguf.library import load_library

        load_library()


def searched(kind: str) -> bool:
    """Whether llama.cpp's rounding to a type is a search that importance weights guide; gguf-py has none."""
    return kind in _LIBRARY or kind in _SEARCHED


def weighs(kind: str) -> bool:
    """Whether importance weights guide the rounding to a type here, where the library may not be installed."""
    return searched(kind) and importlib.util.find_spec("xllamacpp") is not None


def fitting_type(kind: str, inputs: int) -> str:
    """`kind`, or the wider type that rows of `inputs` entries can have."""

    def fits(name: str) -> bool:
        return inputs % GGML_TYPES[name].block == 0

    if fits(kind):
        return kind
    wider = _FALLBACK.get(kind, "F16")
    return wider if fits(wider) else "F16"


def row_bytes(kind: str, inputs: int) -> int:
    """Bytes of one row of `inputs` entries."""
    return GGML_TYPES[kind].row_bytes(inputs)


def quantize(
    rows: Float32[np.ndarray, "outputs inputs"],
    kind: str,
    importance: Float32[np.ndarray, " inputs"] | None = None,
) -> UInt8[np.ndarray, "outputs bytes"]:
    """Rows as the bytes of a ggml type.

    Args:
        rows: one row per output.
        kind: a name from `TYPES` whose block divides the inputs.
        importance: weight of each input in the rounding error, the diagonal of the Gram; ignored for types
            that gguf-py writes where llama.cpp's library is not installed (see `weighs`).

    Raises:
        RecipeError: the type needs importance weights and there are none.
        MissingDependencyError: the type needs llama.cpp's library and it is not installed.
    """
    if kind in FLOATS:
        return _floats(rows, kind)
    if kind in NEED_IMPORTANCE and importance is None:
        raise RecipeError(
            f"{kind} needs importance weights, the diagonals of the Grams. Calibrate, or use IQ2_S or Q2_K."
        )
    if kind in _GGUF_PY and (importance is None or not weighs(kind)):
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize as by_gguf

        return (
            np.ascontiguousarray(by_gguf(rows, GGMLQuantizationType[kind]))
            .view(np.uint8)
            .reshape(len(rows), -1)
        )
    return _by_library(rows, kind, importance)


def dequantize(rows: UInt8[np.ndarray, "outputs bytes"], kind: str) -> Float32[np.ndarray, "outputs inputs"]:
    """Bytes of a ggml type as float32."""
    if kind == "F32":
        return np.ascontiguousarray(rows).view("<f4").astype(np.float32)
    if kind == "F16":
        return np.ascontiguousarray(rows).view("<f2").astype(np.float32)
    if kind == "BF16":
        return (np.ascontiguousarray(rows).view("<u2").astype(np.uint32) << 16).view(np.float32)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as by_gguf

    return np.ascontiguousarray(
        by_gguf(np.ascontiguousarray(rows), GGMLQuantizationType[kind]), dtype=np.float32
    )


def _floats(rows: Float32[np.ndarray, "outputs inputs"], kind: str) -> UInt8[np.ndarray, "outputs bytes"]:
    if kind == "BF16":
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize as by_gguf

        return (
            np.ascontiguousarray(by_gguf(rows, GGMLQuantizationType.BF16))
            .view(np.uint8)
            .reshape(len(rows), -1)
        )
    cast = rows.astype("<f4" if kind == "F32" else "<f2")
    return np.ascontiguousarray(cast).view(np.uint8).reshape(len(rows), -1)


def _by_library(
    rows: Float32[np.ndarray, "outputs inputs"], kind: str, importance: Float32[np.ndarray, " inputs"] | None
) -> UInt8[np.ndarray, "outputs bytes"]:
    from compot_deploy.exporters.gguf.library import load_library

    library = load_library()
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.zeros((len(rows), row_bytes(kind, rows.shape[1])), np.uint8)
    # llama.cpp divides by the sum of the weights: a row of zeros would be not-a-number.
    weights = None
    if importance is not None:
        weights = np.maximum(np.ascontiguousarray(importance, np.float32), np.float32(1e-12))
    written = library.ggml_quantize_chunk(
        GGML_TYPES[kind].number,
        rows.ctypes.data_as(ctypes.c_void_p),
        out.ctypes.data_as(ctypes.c_void_p),
        0,
        rows.shape[0],
        rows.shape[1],
        None if weights is None else weights.ctypes.data_as(ctypes.c_void_p),
    )
    if written != out.nbytes:
        raise RecipeError(f"llama.cpp wrote {written} bytes of {kind}, {out.nbytes} were expected.")
    return out
