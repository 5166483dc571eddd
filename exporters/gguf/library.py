"""llama.cpp's C interface in the prebuilt wheel of the extra ``llama``, by ctypes; nothing is compiled here.

llama.cpp promises no stable layout, so nothing is assumed: structures passed by value are opaque blobs in which
only fields with a recognizable default are set, and `check_layout` compares `ggml_tensor` with tensors that the
library itself builds. Whatever differs is refused, naming the versions that work.
"""

from __future__ import annotations

import ctypes as C
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from compot_deploy.errors import CompotDeployError, MissingDependencyError

PACKAGE: Final = "xllamacpp"
TESTED: Final = ("2026.10.11549",)
"""Versions of the wheel that the whole test suite ran with."""

TYPE_F32: Final = 0
TYPE_Q1_0: Final = "q1_0"

Pointer = C.c_void_p


class UnsupportedLlamaError(CompotDeployError):
    """A llama.cpp library whose interface is not the one that was tested."""

    exit_code = 4

    def __init__(self, found: str, reason: str) -> None:
        super().__init__(
            f"{PACKAGE} {found} cannot run factorized files: {reason}. "
            f"Versions that work: {', '.join(TESTED)}. Install one with: pip install {PACKAGE}=={TESTED[-1]}"
        )


class LlamaError(CompotDeployError):
    """llama.cpp refused a file or failed while it ran; the message repeats what it said."""


class Parameters(C.Structure):
    """llama_model_params or llama_context_params: larger than any version, touched by offset."""

    _fields_ = [("words", C.c_uint64 * 64)]


class Batch(C.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", C.c_int32),
        ("token", C.POINTER(C.c_int32)),
        ("embd", Pointer),
        ("pos", C.POINTER(C.c_int32)),
        ("n_seq_id", C.POINTER(C.c_int32)),
        ("seq_id", C.POINTER(C.POINTER(C.c_int32))),
        ("logits", C.POINTER(C.c_int8)),
    ]


class GgmlTensor(C.Structure):
    """ggml_tensor, as in plugin.c; `check_layout` compares it with the library."""

    _fields_ = [
        ("type", C.c_int32),
        ("buffer", Pointer),
        ("ne", C.c_int64 * 4),
        ("nb", C.c_size_t * 4),
        ("op", C.c_int32),
        ("op_params", C.c_int32 * 16),
        ("flags", C.c_int32),
        ("src", Pointer * 10),
        ("view_src", Pointer),
        ("view_offs", C.c_size_t),
        ("data", Pointer),
        ("name", C.c_char * 64),
        ("extra", Pointer),
        ("padding", C.c_char * 8),
    ]


class GgmlInit(C.Structure):
    """ggml_init_params."""

    _fields_ = [("mem_size", C.c_size_t), ("mem_buffer", Pointer), ("no_alloc", C.c_bool)]


class GgufInit(C.Structure):
    """gguf_init_params."""

    _fields_ = [("no_alloc", C.c_bool), ("ctx", Pointer)]


class ContextFields:
    """Byte offsets in llama_context_params, each recognized by its default."""

    CONTEXT = 0
    BATCH = 4
    UBATCH = 8
    FLASH_ATTENTION = 52
    EVAL_CALLBACK = 88
    EVAL_DATA = 96
    TYPE_K = 104
    TYPE_V = 108


_DEFAULTS: Final = {
    0: 512,
    4: 2048,
    8: 512,
    40: -1,
    44: -1,
    48: -1,
    52: -1,
    88: 0,
    92: 0,
    96: 0,
    100: 0,
    104: 1,
    108: 1,
}

LogCallback = C.CFUNCTYPE(None, C.c_int, C.c_char_p, Pointer)
SetTensorCallback = C.CFUNCTYPE(None, C.POINTER(GgmlTensor), Pointer)

_i32, _i64, _size, _bool, _text, _f32 = C.c_int32, C.c_int64, C.c_size_t, C.c_bool, C.c_char_p, C.c_float
_tensor = C.POINTER(GgmlTensor)
_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (LogCallback, Pointer)),
    "llama_model_default_params": (Parameters, ()),
    "llama_context_default_params": (Parameters, ()),
    "llama_model_load_from_file": (Pointer, (_text, Parameters)),
    "llama_model_init_from_user": (Pointer, (Pointer, SetTensorCallback, Pointer, Parameters)),
    "llama_model_free": (None, (Pointer,)),
    "llama_model_get_vocab": (Pointer, (Pointer,)),
    "llama_model_n_ctx_train": (_i32, (Pointer,)),
    "llama_init_from_model": (Pointer, (Pointer, Parameters)),
    "llama_free": (None, (Pointer,)),
    "llama_set_n_threads": (None, (Pointer, _i32, _i32)),
    "llama_get_memory": (Pointer, (Pointer,)),
    "llama_memory_clear": (None, (Pointer, _bool)),
    "llama_batch_init": (Batch, (_i32, _i32, _i32)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (_i32, (Pointer, Batch)),
    "llama_get_logits_ith": (C.POINTER(_f32), (Pointer, _i32)),
    "llama_vocab_n_tokens": (_i32, (Pointer,)),
    "llama_vocab_is_eog": (_bool, (Pointer, _i32)),
    "llama_vocab_type": (_i32, (Pointer,)),
    "llama_tokenize": (_i32, (Pointer, _text, _i32, C.POINTER(_i32), _i32, _bool, _bool)),
    "llama_token_to_piece": (_i32, (Pointer, _i32, C.c_char_p, _i32, _i32, _bool)),
    "ggml_quantize_chunk": (_size, (C.c_int, Pointer, Pointer, _i64, _i64, _i64, Pointer)),
    "ggml_init": (Pointer, (GgmlInit,)),
    "ggml_free": (None, (Pointer,)),
    "ggml_tensor_overhead": (_size, ()),
    "ggml_new_tensor_1d": (_tensor, (Pointer, C.c_int, _i64)),
    "ggml_new_tensor_2d": (_tensor, (Pointer, C.c_int, _i64, _i64)),
    "ggml_new_tensor_3d": (_tensor, (Pointer, C.c_int, _i64, _i64, _i64)),
    "ggml_set_name": (_tensor, (_tensor, _text)),
    "ggml_mul_mat": (_tensor, (Pointer, _tensor, _tensor)),
    "ggml_add": (_tensor, (Pointer, _tensor, _tensor)),
    "ggml_mul": (_tensor, (Pointer, _tensor, _tensor)),
    "ggml_get_rows": (_tensor, (Pointer, _tensor, _tensor)),
    "ggml_custom_4d": (
        _tensor,
        (Pointer, C.c_int, _i64, _i64, _i64, _i64, C.POINTER(Pointer), C.c_int, Pointer, C.c_int, Pointer),
    ),
    "ggml_type_name": (_text, (C.c_int,)),
    "ggml_nbytes": (_size, (_tensor,)),
    "ggml_backend_tensor_set": (None, (_tensor, Pointer, _size, _size)),
    "gguf_init_empty": (Pointer, ()),
    "gguf_init_from_file": (Pointer, (_text, GgufInit)),
    "gguf_free": (None, (Pointer,)),
    "gguf_set_kv": (None, (Pointer, Pointer)),
    "gguf_set_val_str": (None, (Pointer, _text, _text)),
    "gguf_add_tensor": (None, (Pointer, _tensor)),
    "gguf_write_to_file": (_bool, (Pointer, _text, _bool)),
}


class Library:
    """The loaded shared library; functions of `_SIGNATURES` are attributes, typed as llama.h has them.

    Attributes:
        version: of the wheel.
        log: what llama.cpp said since `clear_log`, for error messages.
    """

    def __init__(self, path: Path, version: str) -> None:
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # llama.cpp would start a debugger when it aborts
        self.version = version
        self.log: list[str] = []
        self._handle = C.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            try:
                function = getattr(self._handle, name)
            except AttributeError:
                raise UnsupportedLlamaError(version, f"it has no function {name}") from None
            function.restype, function.argtypes = result, list(arguments)
        self._log_callback = LogCallback(self._remember)
        self.llama_log_set(self._log_callback, None)
        self.llama_backend_init()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(self.__dict__["_handle"], name)

    def _remember(self, level: int, text: bytes, data: Any) -> None:
        if level >= 3:  # warnings and errors
            self.log = [*self.log[-20:], text.decode("utf-8", "replace")]

    def clear_log(self) -> None:
        """Forget what was said."""
        self.log = []

    @property
    def said(self) -> str:
        """The last words, on one line."""
        return " ".join("".join(self.log).split())[-300:]

    def type_number(self, name: str) -> int:
        """The number of a ggml type, by its name.

        Raises:
            UnsupportedLlamaError: there is none.
        """
        for number in range(64):
            found = self.ggml_type_name(number)
            if found is not None and found.decode().lower() == name:
                return number
        raise UnsupportedLlamaError(self.version, f"it has no tensor type {name}")


@lru_cache(maxsize=1)
def load_library() -> Library:
    """The library, loaded once.

    Raises:
        MissingDependencyError: the wheel is not installed.
        UnsupportedLlamaError: a function is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise MissingDependencyError(PACKAGE, "llama", "Running GGUF files, and writing K and IQ types,")
    found = sorted(path for end in ("so", "pyd", "dylib") for path in Path(folders[0]).glob(f"*.{end}"))
    version = importlib.metadata.version(PACKAGE)
    if not found:
        raise UnsupportedLlamaError(version, "it has no shared library")
    return Library(found[0], version)


class Operations:
    """Numbers of the operations that the plug-in knows, asked from the library."""

    def __init__(self, mul_mat: int, get_rows: int, custom: int, add: int, mul: int) -> None:
        self.mul_mat, self.get_rows, self.custom, self.add, self.mul = mul_mat, get_rows, custom, add, mul


@lru_cache(maxsize=1)
def check_layout() -> Operations:
    """Compare `GgmlTensor` and the defaults of the parameters with what the library builds.

    Raises:
        UnsupportedLlamaError: anything differs, or the version was never tested.
    """
    library = load_library()

    def refuse(reason: str) -> UnsupportedLlamaError:
        return UnsupportedLlamaError(library.version, reason)

    if library.version not in TESTED:
        raise refuse("it was never tested")
    check_parameters(library)
    size = int(library.ggml_tensor_overhead())
    if size - C.sizeof(GgmlTensor) != 32:
        raise refuse(f"a tensor takes {size} bytes, {C.sizeof(GgmlTensor) + 32} are expected")
    context = library.ggml_init(GgmlInit(1 << 20, None, True))
    try:
        a = library.ggml_new_tensor_2d(context, TYPE_F32, 96, 7)
        b = library.ggml_new_tensor_2d(context, TYPE_F32, 96, 5)
        ids = library.ggml_new_tensor_1d(context, 26, 3)
        library.ggml_set_name(a, b"a matrix")
        product, rows = library.ggml_mul_mat(context, a, b), library.ggml_get_rows(context, a, ids)
        sources = (Pointer * 1)(C.cast(b, Pointer))
        marker = 0x1234_5678_9ABC
        custom = library.ggml_custom_4d(context, TYPE_F32, 7, 5, 1, 1, sources, 1, marker, -1, marker + 1)
        added, scaled = library.ggml_add(context, a, a), library.ggml_mul(context, a, a)
        first, node = a.contents, product.contents
        words = bytes(custom.contents.op_params)
        checks = {
            "type": first.type == TYPE_F32 and node.type == TYPE_F32,
            "ne": list(first.ne) == [96, 7, 1, 1] and list(node.ne) == [7, 5, 1, 1],
            "nb": list(first.nb) == [4, 384, 2688, 2688],
            "name": first.name == b"a matrix",
            "src": node.src[0] == C.addressof(first) and node.src[1] == C.addressof(b.contents),
            "src of rows": rows.contents.src[0] == C.addressof(first)
            and list(rows.contents.ne)[:2] == [96, 3],
            "data": first.data is None and first.view_src is None and first.extra is None,
            "op": len({t.contents.op for t in (a, product, rows, custom, added, scaled)}) == 6
            and first.op == 0,
            "op_params": (
                int.from_bytes(words[:8], "little") == marker
                and int.from_bytes(words[8:12], "little", signed=True) == -1
                and int.from_bytes(words[16:24], "little") == marker + 1
            ),
        }
        wrong = [name for name, fits in checks.items() if not fits]
        if wrong:
            raise refuse(f"ggml_tensor has another layout ({', '.join(wrong)})")
        return Operations(
            node.op, rows.contents.op, custom.contents.op, added.contents.op, scaled.contents.op
        )
    finally:
        library.ggml_free(context)


def check_parameters(library: Library) -> None:
    """Compare the defaults of llama_context_params with the fields that are set here.

    Raises:
        UnsupportedLlamaError: a field is not where it was.
    """
    raw = bytes(library.llama_context_default_params())
    for offset, expected in _DEFAULTS.items():
        found = int.from_bytes(raw[offset : offset + 4], "little", signed=True)
        if found != expected:
            raise UnsupportedLlamaError(
                library.version,
                f"llama_context_params holds {found} at byte {offset}, {expected} is expected",
            )


def set_field(parameters: Parameters, offset: int, value: int, size: int = 4) -> None:
    """Set one field of a parameter blob."""
    C.memmove(C.addressof(parameters) + offset, value.to_bytes(size, "little", signed=value < 0), size)
