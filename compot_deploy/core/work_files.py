"""Files of a work folder, which later runs trust: each holds a digest of itself, which is checked when it is read.

The digest (sha256) covers every byte of the file, its name and the name of its folder, which names the run that it
belongs to: what is cut off, altered, or was put there from another place does not match, and is made again.

Layout: tensors are safetensors whose metadata hold ``digest``; anything else is JSON, ``{"digest": …, "value": …}``.
The 64 digits of the digest count as zeros in the digest.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compot_deploy.core.disk import put_in_place, safetensors_errors
from compot_deploy.errors import InputError

_BLANK: Final = "0" * 64
_JSON_START: Final = b'{"digest": "'
_METADATA_START: Final = b'"digest":"'
_LONGEST_HEADER: Final = 100_000_000
"""What safetensors itself reads."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors with a digest, atomically and flushed."""
    with _temporary(path) as temporary:
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        with safetensors_errors(path):
            save_file(contiguous, temporary, metadata={**metadata, "digest": _BLANK})
        _put_digest(temporary, path)


def write_value(path: Path, value: Any) -> None:
    """Write a value that JSON knows, with a digest, atomically and flushed."""
    with _temporary(path) as temporary:
        rest = json.dumps(value)
        temporary.write_bytes(_JSON_START + _BLANK.encode() + b'", "value": ' + rest.encode() + b"}\n")
        _put_digest(temporary, path)


def is_sound(path: Path) -> bool:
    """Whether a file is there and is what was written under this name; one that is not is made again."""
    try:
        status = path.stat()
    except OSError:
        return False
    # A file that does not change is read once by a process, however often it is asked for.
    return _matches(path, status.st_size, status.st_mtime_ns, status.st_ino)


def digest_of(path: Path) -> str:
    """The digest that a file holds, checked.

    Raises:
        InputError: it is not there any more, or damaged.
    """
    _require(path)
    place = _Place.find(path)
    assert place is not None
    return place.written


def read_value(path: Path) -> Any:
    """What `write_value` wrote.

    Raises:
        InputError: it is not there any more, or damaged.
    """
    _require(path)
    return json.loads(path.read_bytes())["value"]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors that `write_tensors` wrote.

    Raises:
        InputError: it is not there any more, or damaged.
    """
    with open_tensors(path) as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """What `write_tensors` wrote, as safetensors' reader, checked.

    Raises:
        InputError: it is not there any more, or damaged.
    """
    _require(path)
    with safe_open(path, framework="pt") as reader:
        yield reader


def _require(path: Path) -> None:
    if not is_sound(path):
        raise InputError(
            f"{path} was changed or removed while it was needed. Run the same command again: it is made again."
        )


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.with_name(path.name + ".part")
    _clear(temporary)
    temporary.unlink(missing_ok=True)  # of a run that was killed
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _clear(path: Path) -> None:
    """A folder that stands where a file of the work folder belongs is no work of ours."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def _put_digest(temporary: Path, path: Path) -> None:
    found = _Place.find(temporary)
    assert found is not None
    with temporary.open("rb+") as file:
        file.seek(found.start)
        file.write(_digest(temporary, found, path).encode())
    _clear(path)
    put_in_place(temporary, path)


class _Place:
    """Where in a file its digest stands."""

    def __init__(self, start: int, written: str) -> None:
        self.start, self.written = start, written

    @staticmethod
    def find(path: Path) -> _Place | None:
        """None where there is none."""
        with path.open("rb") as file:
            head = file.read(len(_JSON_START))
            if head == _JSON_START:
                start = len(head)
            else:
                length = int.from_bytes(head[:8], "little")
                if len(head) < 8 or length > _LONGEST_HEADER:
                    return None
                file.seek(8)
                before = file.read(length).find(_METADATA_START)
                if before < 0:
                    return None
                start = 8 + before + len(_METADATA_START)
            file.seek(start)
            written = file.read(len(_BLANK))
        return _Place(start, written.decode("latin-1")) if len(written) == len(_BLANK) else None


def _digest(content: Path, place: _Place, path: Path) -> str:
    """Of a file's content as it is, and of the name that it has or gets."""
    hasher = hashlib.sha256(f"{path.absolute().parent.name}/{path.name}\0".encode())
    with content.open("rb") as file:
        hasher.update(file.read(place.start) + _BLANK.encode())
        file.seek(place.start + len(_BLANK))
        while piece := file.read(1 << 20):
            hasher.update(piece)
    return hasher.hexdigest()


@lru_cache(maxsize=4096)
def _matches(path: Path, size: int, modified: int, inode: int) -> bool:
    try:
        place = _Place.find(path)
        return place is not None and _digest(path, place, path) == place.written
    except OSError:
        return False
