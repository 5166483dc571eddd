"""Laws of work files: what is read is what was written under that name; whatever happened to a file is noticed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from damage import DAMAGES, Damage

from compot_deploy.core import disk, work_files
from compot_deploy.core.work_files import is_sound, read_tensors, read_value, write_tensors, write_value
from compot_deploy.errors import InputError

TENSORS: Final = {"a": torch.arange(60.0).view(6, 10), "digest": torch.arange(3), "é": torch.zeros(0)}
VALUE: Final = {"some": [1, 2.5, None, "text", float("inf")], "digest": '{"digest": "'}


def _tensors(path: Path) -> Any:
    return {name: tensor.tolist() for name, tensor in read_tensors(path).items()}


WRITERS: Final[dict[str, tuple[str, Callable[[Path], None], Callable[[Path], Any]]]] = {
    "tensors": (
        "x.safetensors",
        lambda path: write_tensors(path, TENSORS, {"layout": '"digest":"'}),
        _tensors,
    ),
    "value": ("x.json", lambda path: write_value(path, VALUE), read_value),
}
EXPECTED: Final[dict[str, Any]] = {
    "tensors": {name: tensor.tolist() for name, tensor in TENSORS.items()},
    "value": VALUE,
}


@pytest.fixture(params=WRITERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def written(kind: str, tmp_path: Path) -> Path:
    """A file of a kind, beside another of the same kind and below a second run's folder of the same names."""
    name, write, _ = WRITERS[kind]
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        write(tmp_path / run / name)
        write(tmp_path / run / f"other-{name}")
    return tmp_path / "one" / name


def test_what_is_read_is_what_was_written(kind: str, written: Path) -> None:
    assert is_sound(written)
    assert WRITERS[kind][2](written) == EXPECTED[kind]
    assert sorted(path.name for path in written.parent.iterdir()) == sorted(
        [written.name, f"other-{written.name}"]
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_every_kind_is_noticed_and_made_good(damage: str, kind: str, written: Path) -> None:
    DAMAGES[damage](Damage(written))
    assert not is_sound(written)
    with pytest.raises(InputError, match="Run the same command again"):
        WRITERS[kind][2](written)
    WRITERS[kind][1](written)
    assert WRITERS[kind][2](written) == EXPECTED[kind]


def test_every_single_byte_counts(written: Path) -> None:
    whole = written.read_bytes()
    for place in range(len(whole)):
        written.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        work_files._matches.cache_clear()  # files of one size are written here faster than a clock ticks
        assert not is_sound(written), f"byte {place}"
    for length in range(len(whole)):
        written.write_bytes(whole[:length])
        work_files._matches.cache_clear()
        assert not is_sound(written), f"{length} bytes"
    written.write_bytes(whole)
    work_files._matches.cache_clear()
    assert is_sound(written)


def test_a_folder_that_was_moved_whole_keeps_its_work(kind: str, written: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = written.parent.rename(tmp_path / "elsewhere" / written.parent.name)
    assert WRITERS[kind][2](moved / written.name) == EXPECTED[kind]


def test_what_cannot_be_written_leaves_what_was_there(
    kind: str, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted((path.name, path.read_bytes()) for path in written.parent.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="the disk is full"), disk.disk_errors(written):
        WRITERS[kind][1](written)
    assert sorted((path.name, path.read_bytes()) for path in written.parent.iterdir()) == before
    assert is_sound(written)


def test_data_and_name_are_flushed_before_and_after_the_rename(
    kind: str, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    replace, sync = Path.replace, os.fsync

    def flushed(descriptor: int) -> None:
        seen.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")  # noqa: PTH112
        sync(descriptor)

    def renamed(self: Path, to: Path) -> Path:
        seen.append("rename")
        return replace(self, to)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    WRITERS[kind][1](written)
    assert seen == ["file", "rename", "folder"] or not Path("/proc/self/fd").exists()


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from compot_deploy.core.disk import disk_errors
from compot_deploy.core.work_files import write_tensors
from compot_deploy.errors import InputError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    with disk_errors(Path(sys.argv[1]), "Advice."):
        write_tensors(Path(sys.argv[1]) / "x.safetensors", {"x": torch.zeros(100_000)}, {})
except InputError as error:
    sys.stdout.write(str(error))
"""


def test_the_error_of_safetensors_is_one_sentence_too(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "could not be written: a file would grow beyond the largest size allowed here" in done.stdout
    assert done.stdout.endswith("Advice.")
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_a_killed_run_is_in_nobodys_way(kind: str, written: Path) -> None:
    part = written.with_name(written.name + ".part")
    part.mkdir()
    (part / "something").write_text("x")
    WRITERS[kind][1](written)
    assert is_sound(written) and not part.exists()
    outside = written.parent.parent / "outside"
    outside.write_text("not ours")
    part.symlink_to(outside)
    WRITERS[kind][1](written)
    assert is_sound(written) and outside.read_text() == "not ours"
    shutil.rmtree(written.parent)
    assert not is_sound(written)
