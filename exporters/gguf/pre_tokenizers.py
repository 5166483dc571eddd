"""Which of llama.cpp's pre-tokenizers splits text as a tokenizer does.

The usual ones are recognized by what they do, their expression. For others, every one that llama.cpp has is asked to
read hundreds of texts that keep them apart (a few sentences are read alike by many); the first that reads all of them
as the tokenizer does is taken, and there may be none.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from compot_deploy.errors import CompotDeployError, UnsupportedModelError
from compot_deploy.exporters.gguf.kinds import Value
from compot_deploy.exporters.gguf.library import LlamaError, load_library
from compot_deploy.exporters.gguf.token_check import TEXTS, ids_of, read_by

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SUFFIX: Final = rf"{_CONTRACTIONS}?"
_MARKS: Final = r" ?[^\s\p{L}\p{N}]+"
_TAIL: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER: Final = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER: Final = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"

EXPRESSIONS: Final[Mapping[str, str]] = {
    rf"{_WORD}|\p{{N}}{{1,3}}|{_MARKS}[\r\n]*|{_TAIL}": "llama-bpe",
    rf"{_WORD}|\p{{N}}|{_MARKS}[\r\n]*|{_TAIL}": "qwen2",
    rf"{_LOWER}|{_UPPER}|\p{{N}}|{_MARKS}[\r\n/]*|{_TAIL}": "tekken",
    rf"{_LOWER}{_SUFFIX}|{_UPPER}{_SUFFIX}|\p{{N}}{{1,3}}|{_MARKS}[\r\n/]*|{_TAIL}": "gpt-4o",
}
"""Expression of the pre-tokenizer to llama.cpp's name for it, as in llama-vocab.cpp."""

IGNORES_MERGES: Final = ("llama-bpe", "tekken")
"""Pre-tokenizers for which llama.cpp takes a whole word from the vocabulary before it merges."""

OTHERS: Final = (
    "starcoder", "command-r", "dbrx", "olmo", "falcon", "deepseek-llm", "deepseek-coder", "deepseek-v3",
    "chatglm-bpe", "stablelm2", "refact", "exaone", "exaone4", "exaone-moe", "hunyuan", "hunyuan-dense",
    "kimi-k2", "bloom", "gpt3-finnish", "qwen35", "seed-coder", "minimax-m2", "grok-2", "afmoe", "bailingmoe",
    "superbpe", "trillion", "minerva-7b", "chameleon", "viking", "poro-chat", "smaug-bpe", "codeshell",
    "jais-2", "tiny_aya", "youtu", "solar-open", "megrez", "lfm2", "granite-docling",
    *dict.fromkeys(EXPRESSIONS.values()), "smollm", "gpt-2", "default",
)  # fmt: skip
"""All that llama.cpp has, those of well-known models first; a name that a version does not know is passed over."""

_FRAGMENTS: Final = (
    "the", "Word", "CamelCase", "UPPER", "mixedCASE", "iPhone15Pro", "x", "_id_", "'s", "'S", "'ll", "'LL",
    "'ve", "'re", "'d", "'M", "'t", "'", '"', "1", "12", "123", "1234", "1234567", "3.14", "0xDEAD",
    "1e-10", "١٢٣", "½", "²", "café", "e\u0301", "naïve", "Straße", "über", "привет", "Ελληνικά", "עברית",
    "العربية", "ไทย", "नमस्ते", "አማርኛ", "日本語", "中文", "한국어", "かな", "カナ", "。", "，", "「", "…",
    "—", "«", "”", "•", "°", "±", "×", "€", "$", "%", "#", "@", "&", "*", "(", ")", "[", "]", "{", "}", "<",
    ">", "/", "\\", "|", "~", "`", "^", "=", "==", "+", "-", "--", "_", ".", "...", ",", ";", ":", "!",
    "?!", "//", "🙂", "👩\u200d🚀", "👍🏽", "✓", "∑", "\t", "\t\t", "\n", "\n\n", "\r\n", " \n", "\n ",
    "  ", "   ", "    ", "\u00a0", "\u3000", "\u2003", "\u200b", "http://a.b/c?d=e", "user@example.org",
)  # fmt: skip
_LINES: Final = 600


@cache
def separating() -> tuple[str, ...]:
    """Texts at which pre-tokenizers differ: fragments of all kinds, with and without a space between them."""
    chance = random.Random(0)
    return tuple(
        "".join(
            chance.choice(_FRAGMENTS) + chance.choice(("", "", " ", " ", "  "))
            for _ in range(chance.randint(2, 12))
        )
        for _ in range(_LINES)
    )


def pre_tokenizer_of(
    tokenizer: Any, state: Mapping[str, Any], keys: Mapping[str, Value], notes: list[str]
) -> str:
    """llama.cpp's name of a tokenizer's pre-tokenizer.

    Args:
        tokenizer: of transformers.
        state: its tokenizer.json.
        keys: everything else that is written of it.
        notes: a choice by reading is added.

    Raises:
        UnsupportedModelError: none splits text this way, as far as llama.cpp could be asked.
    """
    try:
        return detect_pre_tokenizer(state)
    except UnsupportedModelError as error:
        found = _by_reading(tokenizer, keys)
        if found is None:
            raise error
        notes.append(
            f"llama.cpp's pre-tokenizer {found} was chosen because it reads {len(separating())} texts as the model's "
            "tokenizer does."
        )
        return found


def _by_reading(tokenizer: Any, keys: Mapping[str, Value]) -> str | None:
    try:
        library = load_library()
    except CompotDeployError:
        return None
    texts = (*TEXTS, *separating())
    wanted = [list(tokenizer(text)["input_ids"]) for text in texts]
    for name in OTHERS:
        try:
            with read_by(library, {**keys, "tokenizer.ggml.pre": name}) as vocabulary:
                if all(
                    ids_of(library, vocabulary, text) == ids for text, ids in zip(texts, wanted, strict=True)
                ):
                    return name
        except LlamaError:
            continue
    return None


def detect_pre_tokenizer(state: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer in a tokenizer.json.

    Raises:
        UnsupportedModelError: no known name splits text this way.
    """
    pre = state.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre]) if pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") for step in steps]
    byte_level = steps[-1]
    if kinds[-1] == "ByteLevel" and not byte_level.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and byte_level.get("use_regex", True):
            return "gpt-2"
        if (
            kinds == ["Digits", "ByteLevel"]
            and steps[0].get("individual_digits")
            and byte_level.get("use_regex", True)
        ):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not byte_level.get("use_regex", True):
            expression = steps[0].get("pattern", {}).get("Regex")
            if (
                expression in EXPRESSIONS
                and steps[0].get("behavior") == "Isolated"
                and not steps[0].get("invert")
            ):
                return EXPRESSIONS[expression]
    raise UnsupportedModelError(
        f"The pre-tokenizer {json.dumps(pre)[:300]} is not one that llama.cpp is known to "
        f"have; known are gpt-2, smollm, {', '.join(EXPRESSIONS.values())}."
    )
