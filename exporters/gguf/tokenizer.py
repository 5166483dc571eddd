"""A Hugging Face tokenizer as GGUF keys, for both kinds that decoders use.

llama.cpp tokenizes with code of its own and picks it by ``tokenizer.ggml.model`` and ``tokenizer.ggml.pre``.
A wrong choice splits text differently and says nothing: see `pre_tokenizers`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from compot_deploy.errors import UnsupportedModelError
from compot_deploy.exporters.gguf.kinds import Value
from compot_deploy.exporters.gguf.pre_tokenizers import IGNORES_MERGES, pre_tokenizer_of
from compot_deploy.exporters.gguf.token_check import check_tokens
from compot_deploy.models.generation import end_tokens, read_generation
from compot_deploy.models.tokens import open_tokenizer

_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Any of these is a tokenizer, which transformers reads; llama.cpp gets it from what transformers made of it."""

_ENDS: Final = (
    "eos_token_id",
    "eot_token_id",
    "eom_token_id",
    "fim_pad_token_id",
    "fim_rep_token_id",
    "fim_sep_token_id",
)
"""Keys whose tokens llama.cpp ends a text at. The last three are named after infilling, for which it also wants others
that are never written here."""

_PHI3: Final = re.compile("phi-?3", re.IGNORECASE)
_PHI3_TOKENS: Final = frozenset(("<unk>", "<s>", "<|endoftext|>"))

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of ``tokenizer.ggml.token_type``."""


@dataclass(frozen=True)
class TokenizerKeys:
    """Keys to write, and what the reader of the file should know.

    Attributes:
        keys: full key names and values.
        notes: differences between the two tokenizers that no key expresses.
    """

    keys: Mapping[str, Value]
    notes: tuple[str, ...]


def tokenizer_keys(source: str | Path, config: Mapping[str, Any]) -> TokenizerKeys:
    """The tokenizer of a model folder, compared with llama.cpp's reading of it; made once.

    Args:
        source: folder with tokenizer.json, or whatever transformers reads as a fast tokenizer.
        config: the model's configuration; gives the vocabulary size and the end of a sequence.

    Raises:
        InputError: a damaged tokenizer.
        UnsupportedModelError: a kind of tokenizer that llama.cpp has no code for, or that is not known here.
    """
    folder = Path(source)
    needed = {key: config.get(key) for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    seen = tuple(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.iterdir() if folder.is_dir() else ())
        if path.suffix in (".json", ".model", ".txt", ".jinja")
    )
    return _tokenizer_keys(folder, json.dumps(needed), seen)


@lru_cache(maxsize=2)
def _tokenizer_keys(folder: Path, needed: str, seen: tuple[tuple[str, int, int], ...]) -> TokenizerKeys:
    config = json.loads(needed)
    if not any((folder / name).is_file() for name in _FILES):
        return TokenizerKeys(
            {"tokenizer.ggml.model": "none"}, ("The model folder has no tokenizer, so the file has none.",)
        )
    tokenizer = open_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"{folder}: the tokenizer has no fast version, so it cannot go into GGUF."
        )
    state = json.loads(backend.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"A {model.get('type')} tokenizer cannot be written for this architecture; a BPE one can."
        )
    keys: dict[str, Value] = {}
    notes: list[str] = []
    tokens, types = _vocabulary(state, int(config["vocab_size"]), notes)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    if not merges:
        raise UnsupportedModelError("A tokenizer without merges cannot be written: GGUF has no empty arrays.")
    if model.get("byte_fallback"):
        keys["tokenizer.ggml.model"] = "llama"
        keys["tokenizer.ggml.pre"] = "default"
        keys["tokenizer.ggml.scores"] = _scores(tokens, types, merges)
        keys["tokenizer.ggml.add_space_prefix"] = _adds_space(state)
    else:
        keys["tokenizer.ggml.model"] = "gpt2"
        keys["tokenizer.ggml.merges"] = merges
        if state.get("normalizer"):
            notes.append(
                f"llama.cpp skips the normalizer {state['normalizer'].get('type')}: "
                f"text in another Unicode form gets other tokens."
            )
    keys["tokenizer.ggml.tokens"] = tokens
    keys["tokenizer.ggml.token_type"] = types
    keys.update(_special_tokens(tokenizer, config, folder, notes))
    if keys["tokenizer.ggml.model"] == "gpt2":
        pre = pre_tokenizer_of(tokenizer, state, keys, notes)
        keys["tokenizer.ggml.pre"] = pre
        if bool(model.get("ignore_merges")) != (pre in IGNORES_MERGES):
            notes.append(
                f"ignore_merges is {bool(model.get('ignore_merges'))} in the tokenizer, "
                f"llama.cpp's {pre} has it {pre in IGNORES_MERGES}: a rare word may split differently."
            )
    notes += check_tokens(tokenizer, {**keys, "general.name": model_name(folder.name, tokens)})
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str) and template:
        keys["tokenizer.chat_template"] = template
    return TokenizerKeys(keys, tuple(notes))


def model_name(name: str, tokens: Collection[str]) -> str:
    """A name to write: in what is called Phi-3, llama.cpp looks for tokens of its own choice, and fails without."""
    written = name.encode("utf-8", "replace").decode()
    return written if set(tokens) >= _PHI3_TOKENS else _PHI3.sub("phi 3", written)


def _vocabulary(state: Mapping[str, Any], size: int, notes: list[str]) -> tuple[list[str], list[int]]:
    """Text and type of every id; ids without a token are filled, as the embedding has a row for them."""
    model = state["model"]
    added = {int(entry["id"]): entry for entry in state.get("added_tokens", [])}
    known: dict[int, str] = {int(index): text for text, index in model["vocab"].items()}
    known.update({index: entry["content"] for index, entry in added.items()})
    beyond = [index for index in known if index >= size]
    if any(index not in added for index in beyond):
        raise UnsupportedModelError(
            f"The tokenizer has ids up to {max(known)}, the embedding only {size} rows."
        )
    if beyond:
        # transformers adds special tokens of its own to some tokenizers; the model cannot read them either.
        notes.append(
            f"{len(beyond)} added tokens without an embedding row are left out: {known[beyond[0]]!r}."
        )
        known = {index: text for index, text in known.items() if index < size}
    if len(known) < size:
        notes.append(f"{size - len(known)} of {size} embedding rows have no token and are named [PADn].")
    tokens: list[str] = []
    types: list[int] = []
    taken = set(known.values())
    for index in range(size):
        text = known.get(index)
        if text is None:
            tokens.append(f"[PAD{index}]" if f"[PAD{index}]" not in taken else f"[PAD{index}] of no token")
            types.append(UNUSED)
            continue
        tokens.append(text)
        if text == model.get("unk_token"):
            types.append(UNKNOWN)
        elif index in added:
            types.append(CONTROL if added[index].get("special") else USER_DEFINED)
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types.append(BYTE)
        else:
            types.append(NORMAL)
    twice = [text for text, count in Counter(tokens).items() if count > 1]
    if twice:
        raise UnsupportedModelError(
            f"The tokenizer has {twice[0]!r} twice, and llama.cpp keeps tokens by their text: it cannot go into GGUF."
        )
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """Minus the rank of the merge that makes a token: llama.cpp merges the best score first.

    Some sentencepiece conversions list several merges for one token; the earliest decides.
    """
    rank: dict[str, int] = {}
    for position, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), position)
    last = len(merges)
    return [
        -float(rank.get(text, last + index)) if kind == NORMAL else 0.0
        for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
    ]


def _adds_space(state: Mapping[str, Any]) -> bool:
    """Whether text gets a leading space: a Prepend normalizer, or a Metaspace that prepends."""
    normalizer = state.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    pre = state.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    return any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps
    )


def _special_tokens(
    tokenizer: Any, config: Mapping[str, Any], folder: Path, notes: list[str]
) -> dict[str, Value]:
    """Ids of special tokens, and whether the tokenizer adds them, found by asking it."""
    keys: dict[str, Value] = {}
    size = int(config["vocab_size"])
    ends = tokenizer.eos_token_id, *end_tokens(read_generation(folder), config)
    known = [one for one in dict.fromkeys(ends) if one is not None and 0 <= one < size]
    if len(known) > len(_ENDS):
        left = ", ".join(map(str, known[len(_ENDS) :]))
        notes.append(
            f"llama.cpp has room for {len(_ENDS)} tokens that end a text; it does not stop at {left}."
        )
    begin = tokenizer.bos_token_id
    if begin is None:
        begin = config.get("bos_token_id")
    named = {
        "bos_token_id": begin,
        **dict(zip(_ENDS, known, strict=False)),
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    for name, index in named.items():
        if isinstance(index, int) and 0 <= index < size:
            keys[f"tokenizer.ggml.{name}"] = index
    ids = list(tokenizer("a")["input_ids"])
    keys["tokenizer.ggml.add_bos_token"] = bool(ids) and begin is not None and ids[0] == begin
    keys["tokenizer.ggml.add_eos_token"] = bool(ids) and bool(known) and ids[-1] == known[0]
    return keys
