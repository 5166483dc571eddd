"""Files of the original model that a folder takes over as they are."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path


def copy_present(source: str, folder: Path, names: Iterable[str]) -> None:
    """Copy those files that there are.

    Args:
        source: folder of the original model; empty where there is none.
        folder: where they go.
        names: of the files.
    """
    for name in names:
        if source and (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)
