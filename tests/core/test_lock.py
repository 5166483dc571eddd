"""Laws of the lock: one writer of an output at a time, and no killed process ever blocks another."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compot_deploy.core.lock import folder_lock, is_written, lock_path, locked
from compot_deploy.errors import InputError

HOLD = """
import sys, time
from pathlib import Path
from compot_deploy.core.lock import locked
with locked([Path(sys.argv[1])]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_in_one_sentence_that_names_the_first(tmp_path: Path) -> None:
    with locked([tmp_path / "out"]):
        with (
            pytest.raises(InputError, match=r"Another run writes .*out \(process \d+ on "),
            locked([tmp_path / "out"]),
        ):
            raise AssertionError("two writers")
        with locked([tmp_path / "other"]):
            pass
    with locked([tmp_path / "out"]):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "first, second", [("out", "out/onnx"), ("out", "a/../out"), ("out/onnx", "out/onnx")]
)
def test_folders_inside_and_other_spellings_are_the_same_output(
    tmp_path: Path, first: str, second: str
) -> None:
    (tmp_path / "a").mkdir()
    with locked([tmp_path / first]), pytest.raises(InputError), locked([tmp_path / second]):
        raise AssertionError("two writers")


def test_outputs_in_one_folder_are_written_at_once(tmp_path: Path) -> None:
    with locked([tmp_path / "out" / "onnx"]), locked([tmp_path / "out" / "gguf"]):
        pass
    both = [tmp_path / "out", tmp_path / "out" / "onnx"]
    with locked(both), pytest.raises(InputError), locked([tmp_path / "out" / "gguf"]):
        raise AssertionError("the folder around it is written")
    assert list(tmp_path.iterdir()) == []


def test_what_is_made_for_a_lock_is_removed_and_nothing_else(tmp_path: Path) -> None:
    with locked([tmp_path / "a" / "b" / "out"]):
        (tmp_path / "a" / "kept").write_text("x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {holder.pid} "), locked([out]):
        raise AssertionError("two writers")
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=60)
    assert lock_path(out).exists(), "it had no time to remove it"
    with locked([out]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_follows_no_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    lock_path(tmp_path / "out").symlink_to(precious)
    with pytest.raises(OSError), locked([tmp_path / "out"]):
        raise AssertionError("a link was followed")
    assert precious.read_text() == "x"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows opens no folders")
def test_a_folder_says_whether_somebody_writes_it_also_after_a_rename(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    assert not is_written(folder)
    with folder_lock(folder):
        moved = folder.rename(tmp_path / "two")
        assert is_written(moved)
    assert not is_written(moved)
