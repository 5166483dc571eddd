"""No two places outside of the tests share more than twenty lines, whatever the names in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = ("compot_deploy", "exporters", "quant", "benchmarks", "examples", "docs", "web/src", "web/test")
KINDS = (".py", ".c", ".h", ".js", ".mjs", ".css", ".html", ".sh", ".md", ".toml", ".yml")
MOST = 20
"""Lines that two places may share, blank ones and comments aside."""

_COMMENT = re.compile(r"(?:#|//|\*|/\*)")
_NAME = re.compile(
    r"'[^']*'|\"[^\"]*\"|\b(?!(?:if|else|elif|for|while|return|def|class|with|raise|try)\b)\w+"
)


def _sources() -> Iterator[tuple[str, str]]:
    paths = [ROOT / "setup.py", ROOT / "Makefile"]
    for place in PLACES:
        for here, folders, names in os.walk(ROOT / place):
            folders[:] = sorted({*folders} - {"__pycache__", "node_modules", "model", "text"})
            paths += [Path(here) / name for name in sorted(names) if name.endswith(KINDS)]
    for path in paths:
        if path.is_file():
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def _lines(name: str, source: str) -> list[tuple[int, str]]:
    """Number and shape of each line: its names, numbers and texts are one; prose stays as it is."""
    lines = ((number, " ".join(line.split())) for number, line in enumerate(source.splitlines(), 1))
    kept = ((number, line) for number, line in lines if line and not _COMMENT.match(line))
    if name.endswith(".md"):
        return list(kept)
    return [
        (number, _NAME.sub("x", line)) for number, line in kept if not line.startswith(("import", "from"))
    ]


def shared(sources: Mapping[str, str], most: int = MOST) -> list[str]:
    """Each pair of places that share more than `most` lines in a row, by file and first line.

    Tables aside: where a few shapes make up a window, they say nothing of where they came from.
    """
    seen: dict[Sequence[str], tuple[str, int]] = {}
    found: list[str] = []
    for name, source in sources.items():
        lines = _lines(name, source)
        after = 0
        for start in range(len(lines) - most):
            window = tuple(line for _, line in lines[start : start + most + 1])
            if len(set(window)) <= most // 2:
                continue
            other, number = seen.setdefault(window, (name, start))
            if (other, number) != (name, start) and start >= after:
                found.append(f"{other} and {name}:{lines[start][0]}")
                after = start + most
    return found


def test_no_two_places_share_more_than_twenty_lines() -> None:
    sources = dict(_sources())
    assert len(sources) > 250
    assert shared(sources) == []


def test_a_function_that_was_copied_and_renamed_is_found() -> None:
    steps = "\n\n".join(f"    step_{n} = call{'(x)' * n} + value" for n in range(MOST))
    first = f"def first(value):\n{steps}\n"
    second = first.replace("first", "second").replace("value", "other").replace("step", "stage")
    elsewhere = f"BEFORE = 1\n\n# a comment\n{second}"
    assert shared({"a.py": first, "b.py": elsewhere}) == ["a.py and b.py:4"]
    assert shared({"one.py": f"{first}\n{second}"}) == [f"one.py and one.py:{2 * MOST + 2}"]
    shorter = "\n".join(elsewhere.splitlines()[:-1])
    assert shared({"a.py": first, "b.py": shorter}) == []
