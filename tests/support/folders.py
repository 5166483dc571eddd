"""Two exported folders compared: every byte but the times that reports hold, and what follows from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMES = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\+00:00|Z)?)?( UTC)?")
"""When a report was written, as each of its files spells it."""

REPORTS = ("compot/report.json", "compot/report.html", "compot/report.junit.xml", "README.md")
MANIFEST = "compot/manifest.json"


def differences(first: Path, second: Path) -> Iterator[str]:
    """What differs between two folders of one recipe, a line for each file."""
    one, two = _files(first), _files(second)
    for name in sorted(one.keys() ^ two.keys()):
        yield f"{name} is only in {first if name in one else second}"
    for name in sorted(one.keys() & two.keys()):
        if _content(name, one[name]) != _content(name, two[name]):
            yield f"{name} differs"


def _files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def _content(name: str, path: Path) -> Any:
    if name in REPORTS:
        return TIMES.sub("TIME", path.read_text(encoding="utf-8"))
    if name == MANIFEST:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["files"] = [
            {**record, "sha256": None, "bytes": None} if record["path"] in REPORTS else record
            for record in manifest["files"]
        ]
        return manifest
    return path.read_bytes()
