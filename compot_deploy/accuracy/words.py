"""Word errors: how many words of one text must be inserted, removed or replaced to make another.

Texts are compared as listeners compare them: in lower case, without punctuation, "twenty-one" as two words. Numbers
stay as they are written.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from compot_deploy.accuracy.metrics import Estimate

_WORD: Final = re.compile(r"\w+(?:'\w+)*")


@dataclass(frozen=True)
class WordErrors:
    """Of one text against another.

    Attributes:
        errors: words inserted, removed or replaced, the fewest that make one of the other.
        words: of the text that is taken as right.
    """

    errors: int
    words: int


def words_of(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    plain = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    return _WORD.findall(plain)


def word_errors(right: str, written: str) -> WordErrors:
    """The Levenshtein distance of two texts in words.

    "the cat sat" written as "a cat sat down" has two errors of three words.
    """
    one, other = words_of(right), words_of(written)
    row = list(range(len(other) + 1))
    for number, word in enumerate(one, start=1):
        before, row[0] = row[0], number
        for place, seen in enumerate(other, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != seen))
    return WordErrors(row[-1], len(one))


def error_rate(counts: Sequence[WordErrors]) -> Estimate:
    """Errors of all texts per word of all texts; its standard error takes texts as independent."""
    words, errors = sum(one.words for one in counts), sum(one.errors for one in counts)
    if not words:
        return Estimate(math.nan, math.nan)
    rate = errors / words
    if len(counts) < 2:
        return Estimate(rate, math.nan)
    spread = sum((one.errors - rate * one.words) ** 2 for one in counts)
    return Estimate(rate, math.sqrt(spread * len(counts) / (len(counts) - 1)) / words)
