"""The C plug-in of this package, by ctypes: kernels over GGUF leaves, and their place in llama.cpp's graph."""

from __future__ import annotations

import ctypes as C
import importlib.util
from functools import lru_cache
from typing import Final

import numpy as np
from jaxtyping import Float32, UInt8

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.errors import MissingDependencyError

KINDS: Final = {"F32": 0, "F16": 1, "BF16": 2, "Q4_0": 3, "Q8_0": 4, "planes": 5, "columns": 6}
ISAS: Final = ("scalar", "avx2", "avx512", "neon")


class Leaf(C.Structure):
    """compot_leaf of kernels.h; keeps the array that it points into alive."""

    _fields_ = [
        ("kind", C.c_int32),
        ("bits", C.c_int32),
        ("of", C.c_int32),
        ("group", C.c_int32),
        ("inputs", C.c_int64),
        ("outputs", C.c_int64),
        ("row_bytes", C.c_int64),
        ("nbytes", C.c_int64),
        ("data", C.c_void_p),
    ]


def leaf(
    rows: UInt8[np.ndarray, "rows bytes"],
    kind: str,
    inputs: int,
    outputs: int,
    grid: Grid | None = None,
    pattern: Pattern | None = None,
) -> Leaf:
    """Describe the bytes of one leaf to the plug-in; `rows` must be contiguous and outlive the result."""
    if not rows.flags.c_contiguous:
        raise ValueError("The rows of a leaf must be contiguous.")
    result = Leaf(
        kind=KINDS[kind],
        bits=grid.bits if grid else 0,
        of=1 if pattern is None or pattern.is_dense else pattern.of,
        group=min(grid.group, 2**30) if grid else 0,
        inputs=inputs,
        outputs=outputs,
        row_bytes=rows.shape[1],
        nbytes=rows.nbytes,
        data=rows.ctypes.data,
    )
    result.keep = rows
    return result


class Plugin:
    """The loaded extension."""

    def __init__(self, path: str) -> None:
        handle = C.CDLL(path)
        signatures: dict[str, tuple[object, list[object]]] = {
            "compot_check": (C.c_int, [C.POINTER(Leaf)]),
            "compot_best": (C.c_int, []),
            "compot_use": (C.c_int, [C.c_int]),
            "compot_product": (C.c_int, [C.POINTER(Leaf), C.c_void_p, C.c_int64, C.c_void_p]),
            "compot_plugin_new": (C.c_void_p, [C.c_int] * 6 + [C.c_int64, C.c_int]),
            "compot_plugin_add": (
                C.c_int,
                [C.c_void_p, C.c_char_p, C.c_int, C.POINTER(Leaf), C.c_int32],
            ),
            "compot_plugin_neutral": (C.c_int, [C.c_void_p, C.c_char_p]),
            "compot_plugin_bytes": (C.c_int64, [C.c_void_p]),
            "compot_plugin_exact": (None, [C.c_void_p, C.c_int]),
            "compot_plugin_ready": (C.c_int, [C.c_void_p]),
            "compot_plugin_error": (C.c_char_p, [C.c_void_p]),
            "compot_plugin_runs": (C.c_int64, [C.c_void_p]),
            "compot_plugin_free": (None, [C.c_void_p]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(handle, name)
            function.restype, function.argtypes = result, arguments
        self.c = handle
        self.callback = C.cast(handle.compot_plugin_callback, C.c_void_p).value or 0

    @property
    def isa(self) -> str:
        """The instruction set that this machine gets."""
        return ISAS[self.c.compot_best()]

    def use(self, isa: str) -> str:
        """Switch the kernels, for tests and benchmarks; returns what is in force."""
        return ISAS[self.c.compot_use(ISAS.index(isa))]

    def product(
        self, of: Leaf, x: Float32[np.ndarray, "tokens inputs"]
    ) -> Float32[np.ndarray, "tokens outputs"]:
        """``x`` times a leaf, in one thread.

        Raises:
            ValueError: the leaf contradicts itself.
        """
        x = np.ascontiguousarray(x, np.float32)
        y = np.empty((len(x), of.outputs), np.float32)
        wrong = self.c.compot_product(C.byref(of), x.ctypes.data, len(x), y.ctypes.data)
        if wrong:
            raise ValueError(f"The leaf is refused with number {wrong}.")
        return y


@lru_cache(maxsize=1)
def load_plugin() -> Plugin:
    """The plug-in, loaded once.

    Raises:
        MissingDependencyError: the package was installed without a compiler.
    """
    spec = importlib.util.find_spec("compot_deploy.llama._plugin")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "compot_deploy.llama._plugin (built by a C compiler)",
            "llama",
            "Running factorized GGUF files at speed",
        )
    return Plugin(spec.origin)


def has_plugin() -> bool:
    """Whether the package was built with its plug-in."""
    return importlib.util.find_spec("compot_deploy.llama._plugin") is not None
