"""What can happen to a file on a disk: every kind of damage, done to one file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True)
class Damage:
    """A file, and where others of its kind are.

    Attributes:
        path: to be damaged.
    """

    path: Path

    @property
    def beside(self) -> Path:
        """Another file of the same kind in the same folder; the file itself where there is none."""
        others = sorted(
            other
            for other in self.path.parent.iterdir()
            if other != self.path and other.suffix == self.path.suffix and other.is_file()
        )
        return others[-1] if others else self.path

    @property
    def elsewhere(self) -> Path:
        """The file of the same kind of another run, whose folder lies beside."""
        kind = self.path.name.partition("-")[0]
        runs = sorted(run for run in self.path.parent.parent.iterdir() if run != self.path.parent)
        found = (one for run in runs for one in sorted(run.iterdir()))
        return next(
            one for one in found if one.name.partition("-")[0] == kind and one.suffix == self.path.suffix
        )


def _cut(damage: Damage) -> None:
    os.truncate(damage.path, damage.path.stat().st_size * 2 // 3)


def _flip(place: float) -> Callable[[Damage], None]:
    def flip(damage: Damage) -> None:
        whole = bytearray(damage.path.read_bytes())
        whole[int(place * (len(whole) - 1))] ^= 1
        damage.path.write_bytes(whole)

    return flip


def _longer(damage: Damage) -> None:
    with damage.path.open("ab") as file:
        file.write(b"\0" * 64)


def _other_file(damage: Damage) -> None:
    if damage.beside == damage.path:
        damage.path.write_bytes(b"{}")
    else:
        shutil.copyfile(damage.beside, damage.path)


def _other_run(damage: Damage) -> None:
    shutil.copyfile(damage.elsewhere, damage.path)


def _folder(damage: Damage) -> None:
    damage.path.unlink()
    damage.path.mkdir()
    (damage.path / "something").write_text("x")


def _link_to_nothing(damage: Damage) -> None:
    damage.path.unlink()
    damage.path.symlink_to(damage.path.parent / "nothing")


DAMAGES: Final = MappingProxyType(
    {
        "cut off": _cut,
        "emptied": lambda damage: damage.path.write_bytes(b""),
        "removed": lambda damage: damage.path.unlink(),
        "first bit flipped": _flip(0.0),
        "bit flipped": _flip(0.6),
        "last bit flipped": _flip(1.0),
        "longer": _longer,
        "zeros": lambda damage: damage.path.write_bytes(b"\0" * damage.path.stat().st_size),
        "another file": _other_file,
        "of another run": _other_run,
        "a folder": _folder,
        "a link to nothing": _link_to_nothing,
    }
)
"""Kind of damage to what does it."""
