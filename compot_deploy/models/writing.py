"""How a decoder that reads an encoder writes: how its text begins and ends, and which tokens it never writes.

Everything is read from the model's own files, generation_config.json first. Texts are written greedily: beams,
penalties and shortest lengths that a model suggests are not taken up, so two models can be held against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float32

from compot_deploy.errors import InputError
from compot_deploy.models.generation import end_tokens, read_generation

_LONGEST: Final = 128
"""Tokens of a text, where nothing says it."""


@dataclass(frozen=True)
class Writer:
    """How a decoder is begun with, and where it ends.

    Attributes:
        beginning: tokens that a text begins with; the language stands behind the first one.
        languages: tokens of languages, of which the model itself chooses one; empty if it knows one only.
        end: tokens that end a text.
        suppressed: tokens that are never written.
        suppressed_first: tokens that are not written first.
        longest: tokens of a text, its beginning included.
    """

    beginning: tuple[int, ...]
    languages: tuple[int, ...]
    end: frozenset[int]
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]
    longest: int

    def chooser(self) -> Callable[[Float32[np.ndarray, " vocabulary"]], int]:
        """The next token from its logits, most likely first; a new one for every text."""
        banned = list(self.suppressed)
        first = [*banned, *self.suppressed_first]

        def choose(logits: np.ndarray) -> int:
            nonlocal first
            allowed = logits.copy()
            allowed[first] = -np.inf
            first = banned
            return int(allowed.argmax())

        return choose


def start_token(folder: Path, said: Any) -> int:
    """The token that a decoder begins with.

    Raises:
        InputError: nothing says which one.
    """
    if isinstance(said, bool) or not isinstance(said, int):
        raise InputError(f"{folder}: decoder_start_token_id is {said!r}, so no text can begin.")
    return said


def load_writer(folder: Path, config: Mapping[str, Any]) -> Writer:
    """The writer of a folder whose model reads text and writes text.

    Args:
        folder: of the model.
        config: its config.json.

    Raises:
        InputError: a file is missing or cannot be read.
    """
    generation = read_generation(folder)

    def asked(name: str) -> Any:
        return generation.get(name, config.get(name))

    start, forced = start_token(folder, asked("decoder_start_token_id")), asked("forced_bos_token_id")
    banned = [words[0] for words in asked("bad_words_ids") or () if len(words) == 1]
    longest = int(generation.get("max_length") or _LONGEST)
    return Writer(
        beginning=(start,) if forced is None else (start, int(forced)),
        languages=(),
        end=frozenset(end_tokens(generation, config)),
        suppressed=(*(asked("suppress_tokens") or ()), *banned),
        suppressed_first=tuple(asked("begin_suppress_tokens") or ()),
        longest=min(longest, int(config.get("max_position_embeddings") or longest)),
    )
