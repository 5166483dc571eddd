"""Files of the original model that a folder takes over as they are."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from compot_deploy.core.json_files import write_object
from compot_deploy.models.generation import GENERATION, read_generation


def copy_generation(source: str, folder: Path) -> None:
    """What the original says about generating text, where it says anything; JSON in the strict sense.

    Raises:
        InputError: the file is damaged.
    """
    found = read_generation(Path(source)) if source else {}
    if found:
        write_object(folder / GENERATION, found)


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
