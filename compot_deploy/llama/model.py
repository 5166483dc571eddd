"""A GGUF file of any layout in llama.cpp, to be asked for logits or text."""

from __future__ import annotations

import ctypes as C
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
from jaxtyping import Float32

from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.exporters.gguf import index as gguf_index
from compot_deploy.exporters.gguf.library import (
    TYPE_F32,
    ContextFields,
    LlamaError,
    check_parameters,
    load_library,
    set_field,
)
from compot_deploy.exporters.gguf.reader import read_header
from compot_deploy.llama.generation import Generation
from compot_deploy.llama.headers import refusal
from compot_deploy.llama.loading import Execution, Loading
from compot_deploy.llama.plugin import load_plugin
from compot_deploy.llama.probe import check_keys, probe

MAX_THREADS: Final = 512
"""ggml's own limit, GGML_MAX_N_THREADS."""


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
        foreign: the file came from anywhere: it is loaded in a child process first, see `probe`.

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
        foreign: bool = False,
    ) -> None:
        self._context: int | None = None
        self._loaded: Loading | None = None
        if not 1 <= threads <= MAX_THREADS:
            raise InputError(f"{threads} threads are impossible: llama.cpp takes 1 to {MAX_THREADS}.")
        self.path, self.threads = Path(path), threads
        file = read_header(path)
        self.layout = gguf_index.read_layout(file)
        self._library = load_library()
        check_parameters(self._library)
        base = file.text("general.architecture" if self.layout == "dense" else "compot.base_architecture")
        check_keys(file, base)
        longest = file.count(f"{base}.context_length")
        self.context = min(longest, 4096) if context is None else context
        if not 1 <= self.context <= longest:
            raise InputError(
                f"A context of {context} positions: {self.path.name} was made for 1 to {longest}."
            )
        self._batch = max(1, min(batch, self.context))
        if foreign:
            probe(self.path)
        self._loaded = Loading(file, self._library, threads, self._batch)
        try:
            if self.layout == "dense":
                self._loaded.dense(execution)
            else:
                self._loaded.factorized(execution)
            self.execution = self._loaded.execution
            self._open_context(self._loaded, exact)
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
        if self._loaded:
            self._loaded.free()
        self._context = self._loaded = None

    @property
    def _state(self) -> int | None:
        return self._loaded.state if self._loaded else None

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self._library.llama_vocab_n_tokens(self._vocab))

    @property
    def factorized_runs(self) -> int:
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
            prompt: text, in which special tokens are read as such, or token ids.
            max_tokens: most tokens to add; the context may end sooner.
            on_token: called with each piece of text as it comes.
            stop: end at an end-of-generation token.

        Raises:
            InputError: see `logits`.
        """
        ids = self._checked(self.tokenize(prompt, markers=True) if isinstance(prompt, str) else prompt)
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

    def _open_context(self, loaded: Loading, exact: bool) -> None:
        parameters = self._library.llama_context_default_params()
        set_field(parameters, ContextFields.CONTEXT, self.context)
        set_field(parameters, ContextFields.BATCH, self._batch)
        set_field(parameters, ContextFields.UBATCH, self._batch)
        if exact:
            set_field(parameters, ContextFields.FLASH_ATTENTION, 0)
            set_field(parameters, ContextFields.TYPE_K, TYPE_F32)
            set_field(parameters, ContextFields.TYPE_V, TYPE_F32)
        if loaded.state:
            set_field(parameters, ContextFields.EVAL_CALLBACK, load_plugin().callback, 8)
            set_field(parameters, ContextFields.EVAL_DATA, loaded.state, 8)
        self._library.clear_log()
        self._context = self._library.llama_init_from_model(loaded.model, parameters)
        if not self._context:
            raise refusal(self._library, self.path, "make a context for")
        self._library.llama_set_n_threads(self._context, self.threads, self.threads)
        self._vocab = self._library.llama_model_get_vocab(loaded.model)

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
    with LlamaModel(path, threads=threads, context=context, foreign=True) as model:
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
