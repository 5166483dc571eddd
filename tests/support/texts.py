"""Text that tiny models of any kind can read: lines of several lengths, no two alike."""

from __future__ import annotations

import random
from pathlib import Path

import tiny


def write_lines(path: Path, count: int = 200) -> Path:
    """Lines of 5 to 14 words each."""
    words, chance = tiny.WORDS.split(), random.Random(0)
    lines = [" ".join(chance.choices(words, k=5 + number % 10)) for number in range(count)]
    path.write_text("\n".join(f"{number} {line}" for number, line in enumerate(lines)) + "\n")
    return path
