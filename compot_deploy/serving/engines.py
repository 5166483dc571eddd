"""What a server needs of a model: text to ids, ids to more ids, ids to text; through llama.cpp or onnxruntime.

Neither runtime is imported before a file of its format is opened: a GGUF file is served without torch and
transformers.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import numpy as np

from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.exporters.gguf.reader import read_header

if TYPE_CHECKING:
    from compot_deploy.accuracy.onnx_runner import OnnxRunner
    from compot_deploy.llama.model import LlamaModel
    from compot_deploy.models.tokens import Tokenizer

DEFAULT_CONTEXT: Final = 4096
"""Positions that are kept where nobody says, if the model was made for as many."""

_PIECE: Final = 128  # positions of a prompt that onnxruntime reads at a time, the logits of each being kept

Choose = Callable[[np.ndarray], int]
"""Logits of the next token → the token."""


@runtime_checkable
class Engine(Protocol):
    """A model that continues texts, one at a time; the other calls may come from any thread at any time.

    Attributes:
        context: positions of prompt and answer together.
        vocabulary: ids are below it.
    """

    context: int
    vocabulary: int

    def encode(self, text: str, rendered: bool) -> list[int]:
        """Ids of a text; of one that a chat template rendered, which brings its special tokens in writing."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ids; bytes that are no character become U+FFFD."""
        ...

    def tokens(self, prompt: Sequence[int], most: int, choose: Choose) -> Iterator[int]:
        """Up to `most` ids after a prompt, each computed when it is asked for; fewer where the model ends."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


@dataclass(frozen=True)
class Opened:
    """A model, and what its file says besides.

    Attributes:
        engine: of the model.
        name: of its file or folder.
        template: its chat template, if it has one.
        words: variables of the template: ``bos_token`` and the like.
    """

    engine: Engine
    name: str
    template: str | None
    words: Mapping[str, str]


def open_model(path: Path, *, threads: int = 1, context: int | None = None) -> Opened:
    """A GGUF file of any layout, a folder with exactly one, or an ONNX folder.

    Args:
        path: of it.
        threads: of the runtime.
        context: positions to keep; None takes what the model was made for, at most `DEFAULT_CONTEXT`.

    Raises:
        ArtifactError: nothing that can be served lies there.
        InputError: a model that does not write text, or a context that it was not made for.
        MissingDependencyError: the runtime is not installed.
        UnsupportedLlamaError, LlamaError: see `compot_deploy.llama.model.LlamaModel`.
    """
    if path.is_file() or any(path.glob("*.gguf")):
        return _open_gguf(path, threads, context)
    if (path / "onnx" / "model.onnx").is_file():
        return _open_onnx(path, threads, context)
    raise ArtifactError(
        f"{path} holds neither a GGUF file nor onnx/model.onnx: export a model there with --format gguf or onnx."
    )


# GGUF in llama.cpp


class LlamaEngine:
    """A loaded GGUF file."""

    def __init__(self, model: LlamaModel) -> None:
        self.model, self.context, self.vocabulary = model, model.context, model.vocabulary

    def encode(self, text: str, rendered: bool) -> list[int]:
        """See `Engine.encode`; special tokens in writing are read as such in any text."""
        return self.model.tokenize(text, special=not rendered, markers=True)

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Engine.decode`."""
        return self.model.detokenize(tokens)

    def tokens(self, prompt: Sequence[int], most: int, choose: Choose) -> Iterator[int]:
        """See `Engine.tokens`."""
        return self.model.tokens(prompt, most, choose)

    def close(self) -> None:
        """See `Engine.close`."""
        self.model.close()


def _open_gguf(path: Path, threads: int, context: int | None) -> Opened:
    from compot_deploy.llama.model import LlamaModel, find_gguf

    file = find_gguf(path)
    metadata = read_header(file).metadata
    source = metadata.get("tokenizer.chat_template")
    known = metadata.get("tokenizer.ggml.tokens", [])
    words = {}
    for which in ("bos", "eos"):
        number = metadata.get(f"tokenizer.ggml.{which}_token_id")
        inside = number is not None and 0 <= int(number) < len(known)
        words[f"{which}_token"] = str(known[int(number)]) if inside and number is not None else ""
    model = LlamaModel(file, threads=threads, context=context, foreign=True)
    if not model.has_tokenizer:
        model.close()
        raise InputError(f"{file.name} has no tokenizer, which serving text needs: export it with one.")
    return Opened(LlamaEngine(model), file.stem, source if isinstance(source, str) else None, words)


# ONNX in onnxruntime


class OnnxEngine:
    """An ONNX folder behind its runner."""

    def __init__(self, runner: OnnxRunner, tokenizer: Tokenizer, ends: frozenset[int], context: int) -> None:
        self._runner, self._tokenizer, self._ends = runner, tokenizer, ends
        self.context, self.vocabulary = context, runner.vocabulary
        self._lock = threading.Lock()  # a tokenizer of the library cannot be shared by threads at a time

    def encode(self, text: str, rendered: bool) -> list[int]:
        """See `Engine.encode`; special tokens in writing are read as such in any text."""
        with self._lock:
            ids = self._tokenizer.encode(text)
        return ids if rendered else [*self._tokenizer.first, *ids]

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Engine.decode`."""
        with self._lock:
            return self._tokenizer.decode(tokens)

    def tokens(self, prompt: Sequence[int], most: int, choose: Choose) -> Iterator[int]:
        """See `Engine.tokens`."""
        most = min(most, self.context - len(prompt) + 1)
        made = itertools.islice(self._runner.tokens(prompt, choose, _PIECE), most)
        return itertools.takewhile(lambda token: token not in self._ends, made)

    def close(self) -> None:
        """See `Engine.close`; the session goes with the last who holds it."""


def _open_onnx(path: Path, threads: int, context: int | None) -> Opened:
    from compot_deploy.accuracy.onnx_runner import onnx_runner
    from compot_deploy.models.tokens import load_tokenizer

    if not (path / "generation_config.json").is_file():
        raise InputError(
            f"{path} holds a model that gives embeddings or scores and writes no text: read it with onnxruntime or "
            "optimum."
        )
    runner, tokenizer = onnx_runner(path, threads=threads), load_tokenizer(path)
    longest = DEFAULT_CONTEXT if runner.context is None else runner.context
    kept = min(longest, DEFAULT_CONTEXT) if context is None else context
    if not 1 <= kept <= longest:
        raise InputError(f"A context of {kept} positions: {path.name} was made for 1 to {longest}.")
    said = (_read(path / name).get("eos_token_id") for name in ("generation_config.json", "config.json"))
    ends: Any = next((found for found in said if found is not None), [])
    known = frozenset(ends if isinstance(ends, list) else [ends])
    described = _read(path / "tokenizer_config.json")
    return Opened(
        OnnxEngine(runner, tokenizer, known, kept),
        path.resolve().name,
        _template(path, described),
        {name: _word(value) for name, value in described.items() if name.endswith("_token") and value},
    )


def _template(folder: Path, described: Mapping[str, Any]) -> str | None:
    """In a file of its own, or beside the tokenizer: one, or several by name."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = described.get("chat_template")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[-1].get("template") if named else None
    return found if isinstance(found, str) else None


def _word(value: object) -> str:
    """A special token, written as text or as an object."""
    return str(value.get("content", "") if isinstance(value, dict) else value)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file.

    Raises:
        ArtifactError: something else.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} does not hold a JSON object.")
    return found
