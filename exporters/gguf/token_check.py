"""Whether llama.cpp reads text as the model's own tokenizer does, asked of llama.cpp before any work is done.

A file of the tokenizer's keys and a model of one tiny block is loaded, and texts made to differ are turned into ids on
both sides. A difference in ordinary text is a refusal: the model would read other tokens than it was trained on.
Where only special tokens in writing are read differently (llama.cpp has no word for what Hugging Face does around
some), that is a note, with an example.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from compot_deploy.errors import CompotDeployError, UnsupportedModelError
from compot_deploy.exporters.gguf.kinds import Value
from compot_deploy.exporters.gguf.library import Library, LlamaError, load_library
from compot_deploy.exporters.gguf.metadata import add_key

TEXTS: Final = (
    "Hello, world! The quick brown fox jumps over 13 lazy dogs.",
    "trailing ",
    "two  spaces,   three,\tand\ttabs\n\nnew\n lines\r\nof both kinds\n",
    "I'll, WE'VE, don't, can't; it's 'quoted' and \"quoted\"",
    "3.14159 1,000,000 2026-11-30 0x1F 1e-9 100% $5 #42",
    "x=y+1; f(a)[b]{c} -> <d> && !e || ~g ... ?! -- __init__ /* h */ // i",
    "CamelCaseWords snake_case_words UPPER lower MiXeD",
    "café naïve Straße über coöperate Ångström",
    "привет мир, Ελληνικά, עברית, العربية ١٢٣",
    "日本語と中文，以及한국어。",
    "🙂 👩‍🚀 ✓ → ∑ ½ ²",
    "a\u00a0b\u200bc\u2028d",
    "aaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!................",
    "http://a.b/c?d=e&f=g user@example.org C:\\path\\file.txt",
)
"""Ordinary and awkward, all in the normal form NFC."""

_LEADING: Final = " a space before"
"""Sentencepiece's tokenizers put a space before a text; whether also before one that begins with a space, llama.cpp
cannot be told."""

_AROUND: Final = ("a{}b", "a {} b", "{}a", "{} a", "a{}")
"""Special tokens inside of text."""

_MOST_SPECIAL: Final = 16

_WIDTH: Final = 32
"""Of the tiny model: the least that llama.cpp takes for one head."""


def check_tokens(tokenizer: Any, keys: Mapping[str, Value]) -> tuple[str, ...]:
    """Compare llama.cpp's reading of text with a tokenizer's.

    Args:
        tokenizer: of transformers.
        keys: of the same tokenizer, to be written.

    Returns:
        Notes: what is read differently, or why nobody could ask.

    Raises:
        UnsupportedModelError: ordinary text is read as other tokens.
    """
    try:
        library = load_library()
    except CompotDeployError:
        return ("llama.cpp's reading of text was not compared with the tokenizer's: its library is missing.",)
    notes: list[str] = []
    with read_by(library, keys) as vocabulary:
        for text in TEXTS:
            wanted, found = list(tokenizer(text)["input_ids"]), ids_of(library, vocabulary, text)
            if wanted != found:
                raise UnsupportedModelError(
                    f"--format gguf: llama.cpp reads {_cut(text)} as the tokens {_some(found, wanted)}, and the "
                    f"model's tokenizer as {_some(wanted, found)}: the file would read other "
                    "words. Use another --format."
                )
        size = len(keys["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
        special = [token.content for index, token in tokenizer.added_tokens_decoder.items() if index < size]
        around = [place.format(word) for word in special[:_MOST_SPECIAL] for place in _AROUND]
        for texts, what in (
            ([_LEADING], "text that begins with a space"),
            (around, "text around special tokens, which prompts write out,"),
        ):
            for text in texts:
                wanted, found = list(tokenizer(text)["input_ids"]), ids_of(library, vocabulary, text)
                if wanted != found:
                    notes.append(
                        f"llama.cpp reads {what} otherwise than Hugging Face does: {text!r} is {_some(found, wanted)} "
                        f"there and {_some(wanted, found)} here, and no key of GGUF says so."
                    )
                    break
    return tuple(notes)


@contextmanager
def read_by(library: Library, keys: Mapping[str, Value]) -> Iterator[int]:
    """llama.cpp's vocabulary of some keys, until the context ends.

    Raises:
        LlamaError: it refuses them.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.gguf"
        _write_tiny(path, keys)
        library.clear_log()
        model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not model:
            raise LlamaError(f"llama.cpp cannot read the tokenizer: {library.said}")
        try:
            yield library.llama_model_get_vocab(model)
        finally:
            library.llama_model_free(model)


def ids_of(library: Library, vocabulary: int, text: str) -> list[int]:
    """A text as llama.cpp reads it."""
    raw = text.encode()
    room = len(raw) + 8
    buffer = (ctypes.c_int32 * room)()
    count = library.llama_tokenize(vocabulary, raw, len(raw), buffer, room, True, True)
    return list(buffer[: max(count, 0)])


def _write_tiny(path: Path, keys: Mapping[str, Value]) -> None:
    from gguf import GGUFWriter

    tokens = len(keys["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    writer = GGUFWriter(path, "llama")
    sizes: dict[str, Value] = {
        "llama.vocab_size": tokens,
        "llama.context_length": 64,
        "llama.embedding_length": _WIDTH,
        "llama.block_count": 1,
        "llama.feed_forward_length": _WIDTH,
        "llama.attention.head_count": 1,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": _WIDTH,
    }
    for key, value in {**sizes, **keys}.items():
        add_key(writer, key, value)
    square = np.zeros((_WIDTH, _WIDTH), np.float16)
    writer.add_tensor("token_embd.weight", np.zeros((tokens, _WIDTH), np.float16))
    writer.add_tensor("output_norm.weight", np.zeros(_WIDTH, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(_WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _cut(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _some(ids: list[int], others: list[int]) -> str:
    """The ids from shortly before the first that differs."""
    first = next((n for n, (one, two) in enumerate(zip(ids, others, strict=False)) if one != two), 0)
    start = max(0, first - 1)
    return f"{'… ' if start else ''}{ids[start : start + 5]}{' …' if len(ids) > start + 5 else ''}"
