"""Load a GGUF file of any layout into llama.cpp, and ask it for logits or text.

A dense file is llama.cpp's own business. For a factorised one llama.cpp gets the metadata under the base
architecture and placeholders of its narrowest type, whose memory is never touched: norms, biases and matrices
in its own types are handed over one by one (`llama_model_init_from_user`), and the plug-in computes the rest from the
mapped file. Without a plug-in the factors are multiplied out when the file is loaded.
"""

from __future__ import annotations

import ctypes as C
import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float32

from compot_deploy.errors import ArtifactError, CompotDeployError, InputError
from compot_deploy.exporters import gguf_index, gguf_quantize
from compot_deploy.exporters.gguf_reader import GgufFile, read_header
from compot_deploy.llama.library import (
    TYPE_F32,
    TYPE_Q1_0,
    ContextFields,
    GgmlInit,
    GgmlTensor,
    GgufInit,
    SetTensorCallback,
    UnsupportedLlamaError,
    check_layout,
    check_parameters,
    load_library,
    set_field,
)
from compot_deploy.llama.plugin import Leaf, Plugin, has_plugin, leaf, load_plugin

Execution: TypeAlias = Literal["auto", "plugin", "float", "expand"]

MAX_THREADS: Final = 512
"""ggml's own limit, GGML_MAX_N_THREADS."""

SELF_TEST: Final = 2e-5
"""Largest difference to numpy allowed for one row when loading, relative to the sum of absolute terms."""

SELF_TEST_OUTPUTS: Final = 32
"""How many outputs of a leaf are compared: a few rows tell, whole matrices would take memory."""

ROWS_ONLY: Final = -2
"""The bundle of a matrix that the plug-in only reads rows of."""

EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"

_RUNNABLE: Final = ("F32", "F16", "BF16", "Q4_0", "Q8_0", "I8")


class LlamaError(CompotDeployError):
    """llama.cpp refused a file or failed while it ran; the message repeats what it said."""


@dataclass(frozen=True)
class Generation:
    """Text, and how fast it came.

    Attributes:
        text: what was generated, without the prompt.
        tokens: its ids.
        prompt_tokens: how many tokens the prompt had.
        prompt_seconds: time until the first token.
        seconds: time for the tokens after the first.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    prompt_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, without the prompt; 0 when fewer than two tokens were made."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 and self.seconds > 0 else 0.0


class LlamaModel:
    """A loaded file and one context; close it, or use it in a ``with``.

    Args:
        path: a GGUF file of any layout.
        threads: threads of llama.cpp.
        context: positions to keep; None takes what the file promises.
        exact: F32 cache and no flash attention, for logits that can be compared; otherwise llama.cpp's defaults.
        execution: ``plugin`` runs factors as they are, on activations in int8; ``float`` does so with nothing
            rounded, slowly; ``expand`` multiplies them out when loading (exact up to float32, and as large as the
            original model; a dense file of any type likewise); ``auto`` takes the plug-in where there is one, and
            leaves dense files to llama.cpp.
        batch: most tokens computed at a time.

    Attributes:
        layout: of the file.
        execution: how its factors run; ``native`` for a dense file as llama.cpp reads it.
        threads: as asked.
        context: positions kept.

    Raises:
        ArtifactError: the file is damaged.
        InputError: too many threads, or a context that the model was not made for.
        MissingDependencyError: no llama.cpp library; or `plugin` or `float` was asked for and was not built.
        UnsupportedLlamaError: the library is not one that was tested.
        LlamaError: llama.cpp refused the file.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int = 1,
        context: int | None = None,
        exact: bool = False,
        execution: Execution = "auto",
        batch: int = 512,
    ) -> None:
        self._model: int | None = None
        self._context: int | None = None
        self._state: int | None = None
        if not 1 <= threads <= MAX_THREADS:
            raise InputError(f"{threads} threads are impossible: llama.cpp takes 1 to {MAX_THREADS}.")
        self.path, self.threads = Path(path), threads
        file = read_header(path)
        self.layout = gguf_index.read_layout(file)
        self._library = load_library()
        check_parameters(self._library)
        longest = self._promised(file)
        self.context = min(longest, 4096) if context is None else context
        if not 1 <= self.context <= longest:
            raise InputError(
                f"A context of {context} positions: {self.path.name} was made for 1 to {longest}."
            )
        self._batch = max(1, min(batch, self.context))
        self._keep: list[object] = []
        self.execution = "native"
        try:
            if self.layout == "dense":
                self._load_dense(file, execution)
            else:
                self._load_factorized(file, execution)
            self._open_context(exact)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free everything; the object is of no use afterwards."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        if self._state:
            load_plugin().c.compot_plugin_free(self._state)
        self._context = self._model = self._state = None

    # --- what it is asked ---------------------------------------------------------------------------------

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self._library.llama_vocab_n_tokens(self._vocab))

    @property
    def factorised_runs(self) -> int:
        """How many matrix products the plug-in has computed."""
        return int(load_plugin().c.compot_plugin_runs(self._state)) if self._state else 0

    @property
    def plugin_bytes(self) -> int:
        """Bytes of integers that the plug-in keeps in memory, in the order in which it reads them."""
        return int(load_plugin().c.compot_plugin_bytes(self._state)) if self._state else 0

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file can turn text into token ids and back."""
        return bool(self._library.llama_vocab_type(self._vocab))

    def tokenize(self, text: str, special: bool = True, markers: bool = False) -> list[int]:
        """Token ids of a text by llama.cpp's own tokenizer.

        Args:
            text: any text.
            special: add what the tokenizer puts first and last.
            markers: read special tokens written out in the text, as chat templates write them.

        Raises:
            LlamaError: the file has no tokenizer.
        """
        raw = text.encode()
        room = len(raw) + 8
        if not self.has_tokenizer:
            raise LlamaError(f"{self.path.name} has no tokenizer: give token ids, or export it with one.")
        buffer = (C.c_int32 * room)()
        count = self._library.llama_tokenize(self._vocab, raw, len(raw), buffer, room, special, markers)
        if count < 0:
            raise LlamaError(f"llama.cpp could not tokenize a text of {len(raw)} bytes ({count}).")
        return list(buffer[:count])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        pieces = bytearray()
        buffer = C.create_string_buffer(512)
        for token in tokens:
            count = self._library.llama_token_to_piece(self._vocab, int(token), buffer, len(buffer), 0, False)
            pieces += buffer.raw[: max(count, 0)]
        return pieces.decode("utf-8", "replace")

    def logits(self, tokens: Sequence[int]) -> Float32[np.ndarray, "tokens vocabulary"]:
        """Logits after each of `tokens`, from an empty context.

        Raises:
            InputError: no tokens, more than the context holds, or ids outside the vocabulary.
        """
        ids = self._checked(tokens)
        self._clear()
        return np.concatenate(
            [self._decode(ids[at : at + self._batch], at, True) for at in range(0, len(ids), self._batch)]
        )

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 128,
        on_token: Callable[[str], None] | None = None,
        stop: bool = True,
    ) -> Generation:
        """Continue a prompt greedily.

        Args:
            prompt: text, or token ids.
            max_tokens: most tokens to add; the context may end sooner.
            on_token: called with each piece of text as it comes.
            stop: end at an end-of-generation token.

        Raises:
            InputError: see `logits`.
        """
        ids = self._checked(self.tokenize(prompt) if isinstance(prompt, str) else prompt)
        begin = first = time.perf_counter()
        made: list[int] = []
        sent = ""
        for token in self.tokens(ids, max_tokens, stop=stop):
            if not made:
                first = time.perf_counter()
            made.append(token)
            if on_token:
                text = self.detokenize(made)
                if not text.endswith("\ufffd"):  # half of a character: wait for the rest
                    on_token(text[len(sent) :])
                    sent = text
        end = time.perf_counter()
        text = self.detokenize(made) if self.has_tokenizer else ""
        return Generation(
            text, tuple(made), len(ids), (first if made else end) - begin, end - first if made else 0.0
        )

    def tokens(
        self,
        prompt: Sequence[int],
        max_tokens: int = 128,
        choose: Callable[[Float32[np.ndarray, " vocabulary"]], int] | None = None,
        stop: bool = True,
    ) -> Iterator[int]:
        """The tokens after a prompt, one by one as they are computed.

        Args:
            prompt: token ids.
            max_tokens: most tokens; the context may end sooner.
            choose: the next token from its logits; None takes the largest.
            stop: end at an end-of-generation token, which is not given out.

        Raises:
            InputError: see `logits`.
        """
        ids = self._checked(prompt)
        self._clear()
        last = np.empty((0, 0), np.float32)
        for at in range(0, len(ids), self._batch):
            last = self._decode(ids[at : at + self._batch], at, False)
        for made in range(max_tokens):
            token = int(last[-1].argmax()) if choose is None else choose(last[-1])
            if stop and self._library.llama_vocab_is_eog(self._vocab, token):
                return
            yield token
            if made + 1 == max_tokens or len(ids) + made + 1 > self.context:
                return
            last = self._decode([token], len(ids) + made, False)

    # --- loading ------------------------------------------------------------------------------------------

    def _promised(self, file: GgufFile) -> int:
        base = file.text("general.architecture" if self.layout == "dense" else "compot.base_architecture")
        return file.count(f"{base}.context_length")

    def _refusal(self, what: str) -> LlamaError:
        said = self._library.said
        return LlamaError(f"llama.cpp could not {what} {self.path.name}" + (f": {said}" if said else "."))

    def _load_dense(self, file: GgufFile, execution: Execution) -> None:
        if execution == "expand" and self._may_hand_over():
            self.execution = "expand"
            parts = _Parts(file, gguf_index.FactorizedIndex({}, {}))
            self._hand_over(file, parts, parts.expanded(), {})
            return
        self._library.clear_log()
        parameters = self._library.llama_model_default_params()
        self._model = self._library.llama_model_load_from_file(str(self.path).encode(), parameters)
        if not self._model:
            raise self._refusal("load")

    def _may_hand_over(self) -> bool:
        """Whether the library is one whose tensors are known; any other still reads dense files by itself."""
        try:
            check_layout()
        except UnsupportedLlamaError:
            return False
        return True

    def _load_factorized(self, file: GgufFile, execution: Execution) -> None:
        check_layout()
        index = gguf_index.read_index(file)
        use_plugin = execution in ("plugin", "float") or (execution == "auto" and has_plugin())
        self.execution = "float" if execution == "float" else "plugin" if use_plugin else "expand"
        parts = _Parts(file, index)
        if use_plugin:
            self._attach(parts)
            # llama.cpp rounds activations for what is not F32: for a head of its own in Q8_0 or F16, for example.
            hold = parts.floating if self.execution == "float" else parts.native
            values = {name: hold(name) for name in parts.natives}
            if parts.tied and EMBEDDING in values:
                values[HEAD] = values[EMBEDDING]
            placeholders = parts.placeholders
        else:
            values, placeholders = parts.expanded(), {}
        self._hand_over(file, parts, values, placeholders)

    def _attach(self, parts: _Parts) -> None:
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
            self.threads,
        )
        if not state:
            raise MemoryError("The plug-in got no memory.")
        self._state = state
        plugin.c.compot_plugin_exact(state, int(self.execution == "float"))
        for name, pairs, leaves, bundle in linears:
            array = (Leaf * len(leaves))(*leaves)
            wrong = plugin.c.compot_plugin_add(state, name.encode(), pairs, array, bundle)
            if wrong == 23:
                raise MemoryError(f"The plug-in got no memory for {name}.")
            if wrong:
                raise ArtifactError(
                    f"{self.path.name}: the plug-in refuses {name} with number {wrong}: damaged file."
                )
            parts.release_pages()  # the plug-in keeps integers in an order of its own
        wrong = plugin.c.compot_plugin_ready(state)
        if wrong:
            raise MemoryError(f"The plug-in could not prepare {len(linears)} matrices (number {wrong}).")
        self._keep.append(parts)

    def _hand_over(
        self,
        file: GgufFile,
        parts: _Parts,
        values: dict[str, tuple[str, tuple[int, ...], Callable[[], np.ndarray]]],
        placeholders: dict[str, tuple[int, int]],
    ) -> None:
        """Build the model from metadata and tensors in memory."""
        library = self._library
        source = library.gguf_init_from_file(str(self.path).encode(), GgufInit(True, None))
        if not source:
            raise self._refusal("read the header of")
        described = library.gguf_init_empty()
        count = len(values) + len(placeholders) + 8
        context = library.ggml_init(GgmlInit(count * (int(library.ggml_tensor_overhead()) + 64), None, True))
        try:
            library.gguf_set_kv(described, source)
            library.gguf_set_val_str(described, b"general.architecture", parts.base.encode())
            narrowest = library.type_number(TYPE_Q1_0)
            for name, (kind, shape, _) in values.items():
                number = library.type_number(kind.lower())
                self._describe(context, described, name, number, shape)
            for name, shape in placeholders.items():
                # Rows that the narrowest type cannot have are kept in the next best: nothing is ever read.
                number = narrowest if shape[1] % 128 == 0 else TYPE_F32
                self._describe(context, described, name, number, shape)

            problems: list[str] = []

            def fill(pointer: Any, data: Any) -> None:
                try:
                    self._fill(pointer.contents, values, placeholders)
                except Exception as error:  # an exception must not cross llama.cpp's frames
                    problems.append(f"{pointer.contents.name.decode()}: {error}")

            callback = SetTensorCallback(fill)
            library.clear_log()
            parameters = library.llama_model_default_params()
            self._model = library.llama_model_init_from_user(described, callback, None, parameters)
            if problems:
                raise ArtifactError(f"{self.path.name}: {problems[0]}")
            if not self._model:
                raise self._refusal("load")
        finally:
            library.ggml_free(context)
            library.gguf_free(described)
            library.gguf_free(source)
        parts.release_pages()

    def _describe(self, context: int, described: int, name: str, number: int, shape: tuple[int, ...]) -> None:
        library = self._library
        if len(shape) == 1:
            tensor = library.ggml_new_tensor_1d(context, number, shape[0])
        else:
            tensor = library.ggml_new_tensor_2d(context, number, shape[1], shape[0])
        library.ggml_set_name(tensor, name.encode())
        library.gguf_add_tensor(described, tensor)

    def _fill(
        self,
        tensor: GgmlTensor,
        values: dict[str, tuple[str, tuple[int, ...], Callable[[], np.ndarray]]],
        placeholders: dict[str, tuple[int, int]],
    ) -> None:
        name = tensor.name.decode()
        nbytes = int(self._library.ggml_nbytes(C.byref(tensor)))
        if name in placeholders:
            return
        if name in values:
            array = np.ascontiguousarray(values[name][2]())
        elif tensor.type == TYPE_F32:
            # Optional tensors that the file has none of: scales are one, biases zero.
            neutral = 1.0 if name.endswith("scale") or name.startswith("rope_") else 0.0
            array = np.full(nbytes // 4, neutral, np.float32)
            if self._state and name.endswith((".scale", ".bias")):
                load_plugin().c.compot_plugin_neutral(self._state, name.encode())
        else:
            raise ArtifactError(f"llama.cpp asks for {name}, which the file does not have")
        if array.nbytes != nbytes:
            raise ArtifactError(f"llama.cpp wants {nbytes} bytes, the file has {array.nbytes}")
        self._library.ggml_backend_tensor_set(C.byref(tensor), array.ctypes.data, 0, nbytes)

    def _open_context(self, exact: bool) -> None:
        parameters = self._library.llama_context_default_params()
        set_field(parameters, ContextFields.CONTEXT, self.context)
        set_field(parameters, ContextFields.BATCH, self._batch)
        set_field(parameters, ContextFields.UBATCH, self._batch)
        if exact:
            set_field(parameters, ContextFields.FLASH_ATTENTION, 0)
            set_field(parameters, ContextFields.TYPE_K, TYPE_F32)
            set_field(parameters, ContextFields.TYPE_V, TYPE_F32)
        if self._state:
            set_field(parameters, ContextFields.EVAL_CALLBACK, load_plugin().callback, 8)
            set_field(parameters, ContextFields.EVAL_DATA, self._state, 8)
        self._library.clear_log()
        self._context = self._library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise self._refusal("make a context for")
        self._library.llama_set_n_threads(self._context, self.threads, self.threads)
        self._vocab = self._library.llama_model_get_vocab(self._model)

    # --- running ------------------------------------------------------------------------------------------

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = [int(token) for token in tokens]
        if not ids:
            raise InputError("The prompt has no tokens: give at least one.")
        if len(ids) > self.context:
            raise InputError(
                f"The prompt has {len(ids)} tokens, the context holds {self.context}: shorten it, or ask for more."
            )
        wrong = [token for token in ids if not 0 <= token < self.vocabulary]
        if wrong:
            raise InputError(f"The token id {wrong[0]} is outside the vocabulary of {self.vocabulary}.")
        return ids

    def _clear(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _decode(
        self, ids: Sequence[int], position: int, everywhere: bool
    ) -> Float32[np.ndarray, "rows vocabulary"]:
        count = len(ids)
        batch = self._library.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for at, token in enumerate(ids):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position + at, 1
                batch.seq_id[at][0] = 0
                batch.logits[at] = int(everywhere or at == count - 1)
            code = self._library.llama_decode(self._context, batch)
        finally:
            self._library.llama_batch_free(batch)
        if self._state:
            problem = load_plugin().c.compot_plugin_error(self._state).decode()
            if problem:
                raise LlamaError(f"The plug-in could not run {problem}.")
        if code:
            raise LlamaError(
                f"llama.cpp failed at position {position} with code {code}. {self._library.said}"
            )
        rows = range(count) if everywhere else (count - 1,)
        width = self.vocabulary
        return np.stack(
            [
                np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context, row), (width,))
                for row in rows
            ]
        )


def _leaf(file: GgufFile, entry: gguf_index.LeafEntry) -> Leaf:
    kind = file.tensors[entry.tensor].kind
    if kind == "I8":
        kind = "columns" if gguf_index.plane_format(entry).narrow else "planes"
    elif kind not in _RUNNABLE:
        raise ArtifactError(
            f"{file.path.name}: {entry.tensor} has the type {kind}, which the plug-in cannot run."
        )
    return leaf(file.bytes_of(entry.tensor), kind, entry.inputs, entry.outputs, entry.grid, entry.pattern)


class _Parts:
    """The tensors of a factorised file, sorted by who handles them."""

    def __init__(self, file: GgufFile, index: gguf_index.FactorizedIndex) -> None:
        self.file, self.index = file, index
        dense = gguf_index.read_layout(file) == "dense"
        self.base = file.text("general.architecture" if dense else "compot.base_architecture")
        factors = {
            name for pairs in index.matrices.values() for p in pairs for name in (p.dictionary, p.codes)
        }
        self.natives: list[str] = []
        self.plain: list[str] = []  # plain matrices that only the plug-in can read
        for name, tensor in file.tensors.items():
            if name in factors:
                continue
            entry = index.leaves.get(name)
            # The embedding is read by the plug-in straight from the file: no copy, whether tied or not.
            special = entry is not None and (
                name == EMBEDDING or tensor.kind == "I8" or tensor.shape != (entry.outputs, entry.inputs)
            )
            (self.plain if special and tensor.kind in _RUNNABLE else self.natives).append(name)
        self.tied = HEAD not in file.tensors and HEAD.rpartition(".")[0] not in index.matrices
        self.placeholders: dict[str, tuple[int, int]] = {}
        for name in self.plain:
            self.placeholders[name] = (index.leaves[name].outputs, index.leaves[name].inputs)
        for stem, pairs in index.matrices.items():
            codes, dictionary = index.leaves[pairs[0].codes], index.leaves[pairs[0].dictionary]
            self.placeholders[f"{stem}.weight"] = (codes.outputs, dictionary.inputs)
        if self.tied and EMBEDDING in self.placeholders:
            # This way of loading gives a tied head a tensor of its own.
            self.placeholders[HEAD] = self.placeholders[EMBEDDING]

    def native(self, name: str) -> tuple[str, tuple[int, ...], Callable[[], np.ndarray]]:
        """Type, shape and bytes of a tensor that llama.cpp takes as it is."""
        tensor = self.file.tensors[name]
        return tensor.kind, tensor.shape, lambda: self.file.bytes_of(name)

    def floating(self, name: str) -> tuple[str, tuple[int, ...], Callable[[], np.ndarray]]:
        """The same in F32, for which llama.cpp rounds nothing."""
        kind, shape, _ = native = self.native(name)
        return native if kind == "F32" else ("F32", shape, lambda: self._product(name))

    def expanded(self) -> dict[str, tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
        """Everything multiplied out or dequantized to F32, so that llama.cpp computes without rounding."""
        result = {name: self.floating(name) for name in self.natives}
        for name, shape in self.placeholders.items():
            result[name] = ("F32", shape, lambda n=name: self._product(n))  # type: ignore[misc]
        if self.tied and HEAD not in result:
            result[HEAD] = result[EMBEDDING]
        return result

    def _product(self, name: str) -> np.ndarray:
        if name == HEAD and self.tied:
            name = EMBEDDING
        stem = name.rpartition(".")[0]
        if name in self.file.tensors and name not in self.index.leaves:
            return gguf_quantize.dequantize(self.file.bytes_of(name), self.file.tensors[name].kind)
        if stem not in self.index.matrices:
            return np.ascontiguousarray(gguf_index.read_values(self.file, self.index.leaves[name]).T)
        total: np.ndarray | None = None
        for pair in self.index.matrices[stem]:
            dictionary = gguf_index.read_values(self.file, self.index.leaves[pair.dictionary]).astype(
                np.float64
            )
            codes = gguf_index.read_values(self.file, self.index.leaves[pair.codes]).astype(np.float64)
            part = dictionary @ codes
            total = part if total is None else total + part
        assert total is not None
        return np.ascontiguousarray(total.T, dtype=np.float32)

    def leaf(self, name: str) -> Leaf:
        """A leaf for the plug-in, pointing into the mapped file."""
        return _leaf(self.file, self.index.leaves[name])

    def linears(self) -> list[tuple[str, int, list[Leaf], int]]:
        """(name of the weight in llama.cpp, pairs, leaves, bundle) of everything the plug-in computes."""
        result: list[tuple[str, int, list[Leaf], int]] = []
        bundles: dict[tuple[str, ...], int] = {}
        for stem, pairs in self.index.matrices.items():
            bundle = bundles.setdefault(tuple(pair.dictionary for pair in pairs), len(bundles))
            leaves = [self.leaf(name) for pair in pairs for name in (pair.dictionary, pair.codes)]
            result.append((f"{stem}.weight", len(pairs), leaves, bundle))
        for name in self.plain:
            result.append((name, 0, [self.leaf(name)], ROWS_ONLY if name == EMBEDDING else -1))
            if name == EMBEDDING and self.tied:
                result.append((HEAD, 0, [self.leaf(name)], -1))
        return result

    def self_test(self, plugin: Plugin) -> None:
        """One product per kind of leaf against numpy.

        Raises:
            LlamaError: the kernels disagree with the file's numbers.
        """
        plugin.use(plugin.isa)
        seen: set[tuple[int, ...]] = set()
        used = [
            name for pairs in self.index.matrices.values() for p in pairs for name in (p.dictionary, p.codes)
        ]
        for name in (*used, *self.plain):
            entry, whole = self.index.leaves[name], self.leaf(name)
            form = (whole.kind, whole.bits, whole.of, whole.group, whole.group < whole.inputs)
            if form in seen:
                continue
            seen.add(form)
            file, few = gguf_index.first_outputs(self.file, entry, SELF_TEST_OUTPUTS)
            # Small whole numbers, a peak of 127 in every unit: rounding changes nothing.
            x = (np.arange(few.inputs) * 37 % 255 - 127).astype(np.float32)[None]
            x[0, ::64] = 127
            got = plugin.product(_leaf(file, few), x)[0]
            weight = gguf_index.read_values(file, few).astype(np.float64)
            terms = x[0][:, None] * weight  # summed without @: the code of a BLAS would stay in memory
            expected, size = terms.sum(axis=0), np.abs(terms).sum(axis=0)
            if not (np.abs(got - expected) <= SELF_TEST * size + 1e-30).all():
                raise LlamaError(
                    f"The plug-in's kernels for {plugin.isa} compute {name} wrongly: worst difference "
                    f"{np.abs(got - expected).max():.3g}. Please report this machine; execution='expand' works."
                )

    def release_pages(self) -> None:
        """Give back the mapped pages of what llama.cpp and the plug-in hold in memory of their own."""
        mapped = getattr(self.file.data, "_mmap", None)
        if mapped is not None and hasattr(mapped, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_tokens: int = 128,
    threads: int = 1,
    context: int | None = None,
    on_token: Callable[[str], None] | None = None,
) -> Generation:
    """Load a GGUF file of any layout, continue a prompt greedily, and free everything: ``compot-deploy run``.

    Args:
        path: the file.
        prompt: text.
        max_tokens: most tokens to add.
        threads: of llama.cpp.
        context: positions to keep; None takes what the file promises, at most 4096.
        on_token: called with each piece of text as it comes.

    Raises:
        ArtifactError, InputError, MissingDependencyError, UnsupportedLlamaError, LlamaError: see `LlamaModel`.
    """
    with LlamaModel(path, threads=threads, context=context) as model:
        return model.generate(prompt, max_tokens=max_tokens, on_token=on_token)


def find_gguf(path: Path) -> Path:
    """The GGUF file of an artifact: the path itself, or the only one in a folder.

    Raises:
        ArtifactError: none, or several.
    """
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise ArtifactError(f"{path} holds {len(found)} GGUF files, one is expected: name the file.")
    return found[0]
