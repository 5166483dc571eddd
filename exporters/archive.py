"""A folder as one zip file for transport, where the zeros of sparse codes cost next to nothing.

Codes lie dense in an ONNX file, so that runtimes execute them at full speed; half of them zero, they shrink to
less than 3 bits per entry when compressed. The same files in give the same bytes out: names are sorted, times
and permissions fixed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, cast

from compot_deploy.core.disk import disk_errors, put_in_place
from compot_deploy.errors import InputError
from compot_deploy.exporters.staging import aside_of

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that zip can hold


def archive_path(folder: Path) -> Path:
    """Where the archive of a folder lies: beside it."""
    return folder.with_name(folder.name + ".zip")


def write_archive(folder: Path, force: bool = False) -> Path:
    """Zip a finished folder into a file beside it, atomically.

    Args:
        folder: an exported folder.
        force: replace an existing archive.

    Raises:
        InputError: the archive exists and `force` is not given; or the disk refuses it.
    """
    target = archive_path(folder)
    check_archive(folder, force)
    temporary = aside_of(target, "staging")
    advice = f"{folder} itself is finished; make room, and zip it, or run again with --force."
    try:
        with disk_errors(target, advice):
            with temporary.open("xb") as file:
                _zip(folder, _Stream(file))
            put_in_place(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def check_archive(folder: Path, force: bool) -> None:
    """Refuse to overwrite an archive unasked.

    Raises:
        InputError: it exists and `force` is not given.
    """
    if archive_path(folder).exists() and not force:
        raise InputError(f"{archive_path(folder)} exists already: choose another --out, or use --force.")


def transport_bytes(folder: Path, without: Collection[str] = ()) -> int:
    """Size of the archive that `write_archive` would make of the files as they are; nothing is written.

    Args:
        folder: an exported folder.
        without: paths inside it that do not count.
    """
    stream = _Stream(None)
    _zip(folder, stream, without)
    return stream.end


def _zip(folder: Path, file: _Stream, without: Collection[str] = ()) -> None:
    with zipfile.ZipFile(cast(IO[bytes], file), "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if name in without:
                continue
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            # zipfile has to know in advance whether a member may pass 2 GiB.
            entry.file_size = path.stat().st_size
            with path.open("rb") as source, archive.open(entry, "w") as member:
                while chunk := source.read(1 << 20):
                    member.write(chunk)


class _Stream:
    """A file that only goes forward, written or just counted: both ways zipfile makes the same bytes."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file = file
        self.end = 0

    def write(self, data: bytes) -> int:
        self.end += len(data)
        return len(data) if self._file is None else self._file.write(data)

    def flush(self) -> None:
        """Nothing is buffered here."""
