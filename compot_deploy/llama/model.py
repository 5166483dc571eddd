"""Load a GGUF file of any layout into llama.cpp, and ask it for logits or text.

A dense file is llama.cpp's own business. For a factorised one llama.cpp gets the metadata under the base
architecture and placeholders of its narrowest type, whose memory is never touched: norms, biases and matrices
in its own types are handed over one by one (`llama_model_init_from_user`), and the plug-in computes the rest from the
mapped file. Without a plug-in the factors are multiplied out when the file is loaded.
"""

from __future__ import annotations

import ctypes as C
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float32

from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.exporters.gguf import index as gguf_index
from compot_deploy.exporters.gguf.library import (
    TYPE_F32,
    TYPE_Q1_0,
    ContextFields,
    GgmlInit,
    GgmlTensor,
    GgufInit,
    LlamaError,
    SetTensorCallback,
    UnsupportedLlamaError,
    check_layout,
    check_parameters,
    load_library,
    set_field,
)
from compot_deploy.exporters.gguf.reader import GgufFile, read_header
from compot_deploy.llama.parts import EMBEDDING, HEAD, Parts, Tensor
from compot_deploy.llama.plugin import Leaf, has_plugin, load_plugin

Execution: TypeAlias = Literal["auto", "plugin", "float", "expand"]

MAX_THREADS: Final = 512
"""ggml's own limit, GGML_MAX_N_THREADS."""


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
            parts = Parts(file, gguf_index.FactorizedIndex({}, {}))
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
        parts = Parts(file, index)
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
        parts: Parts,
        values: dict[str, Tensor],
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
        values: dict[str, Tensor],
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
