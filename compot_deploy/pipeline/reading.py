"""How a folder reads and ends text: the token ids of texts made to differ, chat templates, the tokens that end a text.

Losses are measured on token ids, so they do not see a tokenizer that turns words into other ids, and what a user types
is words. So the original's ids of some texts are compared with those of the folder's own tokenizer; of a GGUF file,
with llama.cpp's reading of it as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compot_deploy.accuracy.gate import Criterion, criterion
from compot_deploy.errors import InputError
from compot_deploy.exporters.gguf.token_check import TEXTS
from compot_deploy.models.generation import end_tokens, read_generation
from compot_deploy.models.tokens import open_tokenizer
from compot_deploy.models.weights import read_json


@dataclass(frozen=True)
class Reading:
    """How a folder reads text.

    Attributes:
        ids: text to token ids, special ones included.
        words: token ids, a window of the evaluation text for example, to text; by the ids as JSON.
        template: hash of the chat templates; empty where there are none.
        ends: ids that end a text, sorted.
    """

    ids: Mapping[str, tuple[int, ...]]
    words: Mapping[str, str] = field(default_factory=dict)
    template: str = ""
    ends: tuple[int, ...] = ()


def reading_of(folder: Path, config: Mapping[str, Any], windows: Sequence[Sequence[int]] = ()) -> Reading:
    """How the tokenizer and the settings of a folder read text.

    Args:
        folder: a model, or an artifact.
        config: of its model.
        windows: token ids to be read back.

    Raises:
        InputError: no tokenizer, or damaged settings.
    """
    tokenizer = open_tokenizer(folder)
    words = {json.dumps(list(window)): str(tokenizer.decode(list(window))) for window in windows}
    template = getattr(tokenizer, "chat_template", None) or ""
    return Reading(
        ids={text: tuple(tokenizer(text, verbose=False).input_ids) for text in (*TEXTS, *words.values())},
        words=words,
        template=hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
        if template
        else "",
        ends=tuple(sorted(end_tokens(read_generation(folder), config))),
    )


class ReadingCheck:
    """Compares how a folder reads text with how the original does.

    Args:
        wanted: the original's.
        folder: an artifact.
        exporter: that wrote it.
    """

    def __init__(self, wanted: Reading, folder: Path, exporter: str) -> None:
        self._wanted, self._exporter = wanted, exporter
        self._differences: list[str] = []
        self._settings: list[str] = []
        config = read_json(folder, "config.json") if (folder / "config.json").is_file() else {}
        config = config.get(
            "base_config", config
        )  # of a type of our own: that of the model that it stands for
        windows = [json.loads(window) for window in wanted.words]
        try:
            found = reading_of(folder, config, windows)
        except InputError as error:
            self._differences.append(str(error))
            return
        self._compare(found.ids, "the folder's tokenizer")
        for window, words in wanted.words.items():
            if found.words.get(window) != words:
                self._differences.append(
                    f"the folder's tokenizer writes other words for the tokens {window[:40]}…"
                )
        if found.template != wanted.template:
            self._settings.append("the chat template is another one")
        if config and found.ends != wanted.ends:
            self._settings.append(f"text ends with the tokens {list(found.ends)}, not {list(wanted.ends)}")

    def visit(self, roles: Sequence[str], runner: Any) -> None:
        """Ask a runtime that reads text itself: llama.cpp."""
        tokenize = getattr(runner, "tokenize", None)
        if "exported" in roles and tokenize is not None:
            self._compare({text: tuple(tokenize(text)) for text in TEXTS}, runner.name)

    def criteria(self) -> Iterator[Criterion]:
        """What was found; nothing may differ."""
        for name, found, what in (
            ("tokenizer", self._differences, "texts that are read otherwise than the original reads them"),
            ("text_settings", self._settings, "settings of text that are not the original's"),
        ):
            first = f" ({found[0]})" if found else ""
            yield criterion(name, float(len(found)), 0.0, "at most", what + first)

    def _compare(self, found: Mapping[str, tuple[int, ...]], who: str) -> None:
        for text, ids in self._wanted.ids.items():
            if text in found and found[text] != ids:
                cut = text if len(text) <= 30 else f"{text[:29]}…"
                self._differences.append(
                    f"{who} reads {cut!r} as {list(found[text][:5])}…, not {list(ids[:5])}…"
                )
