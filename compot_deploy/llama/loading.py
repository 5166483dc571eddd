"""A GGUF file on its way into llama.cpp: as it is, or tensor by tensor with the plug-in behind it.

A dense file is llama.cpp's own business. For a factorized one llama.cpp gets the metadata under the base
architecture and placeholders of its narrowest type, whose memory is never touched: norms, biases and matrices
in its own types are handed over one by one (`llama_model_init_from_user`), and the plug-in computes the rest from the
mapped file. Without a plug-in the factors are multiplied out when the file is loaded.
"""

from __future__ import annotations

import ctypes as C
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from compot_deploy.errors import ArtifactError
from compot_deploy.exporters.gguf import index as gguf_index
from compot_deploy.exporters.gguf.kinds import may_be_handed_over
from compot_deploy.exporters.gguf.library import (
    TYPE_F32,
    TYPE_Q1_0,
    GgmlTensor,
    Library,
    SetTensorCallback,
    UnsupportedLlamaError,
    check_layout,
)
from compot_deploy.exporters.gguf.reader import GgufFile
from compot_deploy.llama.headers import described_file, expanded_file, refusal
from compot_deploy.llama.parts import EMBEDDING, HEAD, Parts, Tensor
from compot_deploy.llama.plugin import Leaf, has_plugin, load_plugin

Execution: TypeAlias = Literal["auto", "plugin", "float", "expand"]

_NEUTRAL_ENDS: Final = ("scale", ".bias")
_NEUTRAL_STARTS: Final = ("rope_", "cls.", "dense_2.", "dense_3.")
"""Optional tensors that have a value which changes nothing; those of dense layers and classifiers serve embeddings."""


class Loading:
    """What llama.cpp and the plug-in hold of one file; `free` gives it back.

    Args:
        file: its header.
        library: llama.cpp.
        threads: of the plug-in.
        batch: most tokens computed at a time.

    Attributes:
        model: llama.cpp's model, once it is loaded.
        state: the plug-in's, where it has matrices.
        execution: how factors run; ``native`` for a dense file as llama.cpp reads it.
    """

    def __init__(self, file: GgufFile, library: Library, threads: int, batch: int) -> None:
        self._file, self._library, self._threads, self._batch = file, library, threads, batch
        self._keep: list[object] = []
        self.model: int | None = None
        self.state: int | None = None
        self.execution = "native"

    def free(self) -> None:
        """Free everything; the object is of no use afterwards."""
        if self.model:
            self._library.llama_model_free(self.model)
        if self.state:
            load_plugin().c.compot_plugin_free(self.state)
        self.model = self.state = None

    def dense(self, execution: Execution) -> None:
        """A file that llama.cpp reads by itself; expanded it is handed over in float32."""
        if execution == "expand" and _may_hand_over():
            self.execution = "expand"
            parts = Parts(self._file, gguf_index.FactorizedIndex({}, {}))
            if may_be_handed_over(parts.base):
                self._hand_over(parts, parts.expanded(), {})
                return
            with expanded_file(self._library, parts) as path:
                self._load(path)
            return
        self._load(str(self._file.path))

    def _load(self, path: str) -> None:
        self._library.clear_log()
        parameters = self._library.llama_model_default_params()
        self.model = self._library.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            raise refusal(self._library, self._file.path, "load")

    def factorized(self, execution: Execution) -> None:
        """A file whose factors the plug-in runs, or that are multiplied out."""
        check_layout()
        index = gguf_index.read_index(self._file)
        use_plugin = execution in ("plugin", "float") or (execution == "auto" and has_plugin())
        self.execution = "float" if execution == "float" else "plugin" if use_plugin else "expand"
        parts = Parts(self._file, index)
        if use_plugin:
            self._attach(parts)
            # llama.cpp rounds activations for what is not F32: for a head of its own in Q8_0 or F16, for example.
            hold = parts.floating if self.execution == "float" else parts.native
            values = {name: hold(name) for name in parts.natives}
            if parts.tied and not parts.one_table and EMBEDDING in values:
                values[HEAD] = values[EMBEDDING]
            placeholders = parts.placeholders
        else:
            values, placeholders = parts.expanded(), {}
        self._hand_over(parts, values, placeholders)

    def _attach(self, parts: Parts) -> None:
        """Give the plug-in its matrices, after one row of each kind of leaf agreed with numpy."""
        plugin = load_plugin()
        operations = check_layout()
        parts.self_test(plugin)
        linears = parts.linears()
        state = plugin.c.compot_plugin_new(
            operations.mul_mat,
            operations.get_rows,
            operations.custom,
            operations.add,
            operations.mul,
            len(linears) + 1,
            self._batch,
            self._threads,
        )
        if not state:
            raise MemoryError("The plug-in got no memory.")
        self.state = state
        plugin.c.compot_plugin_exact(state, int(self.execution == "float"))
        for name, pairs, leaves, bundle in linears:
            array = (Leaf * len(leaves))(*leaves)
            wrong = plugin.c.compot_plugin_add(state, name.encode(), pairs, array, bundle)
            if wrong == 23:
                raise MemoryError(f"The plug-in got no memory for {name}.")
            if wrong:
                raise ArtifactError(
                    f"{self._file.path.name}: the plug-in refuses {name} with number {wrong}: damaged file."
                )
            parts.release_pages()  # the plug-in keeps integers in an order of its own
        wrong = plugin.c.compot_plugin_ready(state)
        if wrong:
            raise MemoryError(f"The plug-in could not prepare {len(linears)} matrices (number {wrong}).")
        self._keep.append(parts)

    def _hand_over(
        self,
        parts: Parts,
        values: dict[str, Tensor],
        placeholders: dict[str, tuple[int, int]],
    ) -> None:
        """Build the model from metadata and tensors in memory."""
        library = self._library
        shapes = {name: (kind.lower(), shape) for name, (kind, shape, _) in values.items()}
        for name, shape in placeholders.items():
            # Rows that the narrowest type cannot have are kept in the next best: nothing is ever read.
            shapes[name] = (TYPE_Q1_0 if shape[1] % 128 == 0 else "f32", shape)
        with described_file(library, parts, shapes) as described:
            problems: list[str] = []

            def fill(pointer: Any, data: Any) -> None:
                try:
                    self._fill(pointer.contents, values, placeholders)
                except Exception as error:  # an exception must not cross llama.cpp's frames
                    problems.append(f"{pointer.contents.name.decode()}: {error}")

            callback = SetTensorCallback(fill)
            library.clear_log()
            parameters = library.llama_model_default_params()
            self.model = library.llama_model_init_from_user(described, callback, None, parameters)
            if problems:
                raise ArtifactError(f"{self._file.path.name}: {problems[0]}")
            if not self.model:
                raise refusal(self._library, self._file.path, "load")
        parts.release_pages()

    def _fill(
        self,
        tensor: GgmlTensor,
        values: dict[str, Tensor],
        placeholders: dict[str, tuple[int, int]],
    ) -> None:
        name = tensor.name.decode()
        nbytes = int(self._library.ggml_nbytes(C.byref(tensor)))
        if name in placeholders:
            return
        if name in values:
            array = np.ascontiguousarray(values[name][2]())
        elif tensor.type == TYPE_F32 and (name.endswith(_NEUTRAL_ENDS) or name.startswith(_NEUTRAL_STARTS)):
            # Optional tensors that the file has none of: scales are one, biases zero.
            neutral = 1.0 if name.endswith("scale") or name.startswith("rope_") else 0.0
            array = np.full(nbytes // 4, neutral, np.float32)
            if self.state and name.endswith((".scale", ".bias")):
                load_plugin().c.compot_plugin_neutral(self.state, name.encode())
        else:
            raise ArtifactError(f"llama.cpp asks for {name}, which the file does not have")
        if array.nbytes != nbytes:
            raise ArtifactError(f"llama.cpp wants {nbytes} bytes, the file has {array.nbytes}")
        self._library.ggml_backend_tensor_set(C.byref(tensor), array.ctypes.data, 0, nbytes)


def _may_hand_over() -> bool:
    """Whether the library is one whose tensors are known; any other still reads dense files by itself."""
    try:
        check_layout()
    except UnsupportedLlamaError:
        return False
    return True
