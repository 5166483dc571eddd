"""A file that somebody names appears whole; what is no file is written to and still stands."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from compot_deploy.core.outputs import check_output, write_output
from compot_deploy.errors import InputError
from compot_deploy.pipeline.provenance import public_name


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_output(tmp_path / "a", b"one", "It")
    write_output(tmp_path / "a", b"two", "It")
    assert (tmp_path / "a").read_bytes() == b"two" and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_gets_everything_and_still_stands(tmp_path: Path) -> None:
    pipe, content, read = tmp_path / "pipe", os.urandom(1 << 18), []
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="It cannot be written"):  # nobody reads
        write_output(pipe, content, "It")
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    while reader.is_alive() and not read:
        try:
            write_output(pipe, content, "It")
            break
        except InputError:  # the reader is on its way
            continue
    reader.join()
    assert read == [content] and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="this system has no such device")
def test_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (Path("/dev/null"), tmp_path / "link"):
        write_output(path, b"text", "It")
    assert (tmp_path / "link").is_symlink() and stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_place_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone" / "a"):
        with pytest.raises(InputError, match="It cannot be written"):
            check_output(path, "It")


def test_a_name_that_is_no_text_is_published_as_text(tmp_path: Path) -> None:
    assert public_name("/somewhere/m\udcff") == "m?" and public_name("m") == "m"
