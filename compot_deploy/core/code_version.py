"""Which code computes: a hash of the sources, so that work of another version is not taken for this one's.

A version number does not tell: between two releases, and in a checkout, the same number stands for different code.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final

from compot_deploy import __version__

ROOMS: Final = (
    "cluster",
    "core",
    "embedded",
    "exporters",
    "healing",
    "models",
    "numerics",
    "pipeline",
    "planning",
    "quant",
    "recipe",
)
"""Packages whose code decides what work files hold: all but those that evaluate, report, serve and talk."""

LIBRARIES: Final = ("torch", "transformers", "tokenizers", "numpy")
"""Packages that compute for it."""


@lru_cache(maxsize=1)
def code_version() -> str:
    """sha256 over the version, the sources of what computes, and the versions of the libraries that compute for it."""
    digest = hashlib.sha256(__version__.encode())
    for name, path in sources():
        digest.update(f"\0{name}\0".encode() + path.read_bytes())
    for library in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"\0{library} {importlib.metadata.version(library)}".encode())
    return digest.hexdigest()


def sources() -> Iterator[tuple[str, Path]]:
    """Every source file of what computes, by a name that does not depend on where it is installed."""
    for room in ROOMS:
        found = importlib.util.find_spec(f"compot_deploy.{room}")
        for place in () if found is None else found.submodule_search_locations or ():
            for path in sorted(Path(place).rglob("*")):
                if path.suffix in (".py", ".xz") and path.is_file():
                    yield f"{room}/{path.relative_to(place).as_posix()}", path
