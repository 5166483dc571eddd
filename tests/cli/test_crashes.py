"""A crash is no verdict: 1 is the gate and nothing else, what nobody foresaw is 70, and printing never fails."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compot_deploy.cli import entry as cli
from compot_deploy.cli.output import console
from compot_deploy.cli.printing import Forgiving
from compot_deploy.errors import EXIT_INTERRUPTED, EXIT_UNFORESEEN


class Panic(BaseException):
    """What a library written in Rust throws."""


def _raises(error: BaseException) -> Any:
    def command(arguments: list[str], out: Console, err: Console) -> int:
        raise error

    return command


def _only(monkeypatch: pytest.MonkeyPatch, commands: Any) -> None:
    monkeypatch.setattr(cli, "command_for", lambda arguments: partial(commands[arguments[0]], arguments[1:]))


@pytest.mark.parametrize(
    "error",
    [KeyError("plain"), AssertionError(), RecursionError("deep"), MemoryError(), Panic("out of\nrange")],
)
def test_what_nobody_foresaw_is_one_line_and_a_log(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _only(monkeypatch, {"break": _raises(error)})
    assert cli.main(["break", "--with", "two words"]) == EXIT_UNFORESEEN == 70
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said and type(error).__name__ in said
    (log,) = tmp_path.iterdir()
    assert f"--body-file {log}" in said
    written = log.read_text()
    assert (
        "Traceback (most recent call last)" in written and "compot-deploy break --with 'two words'" in written
    )
    assert (log.stat().st_mode & 0o077) == 0 or os.name == "nt"


def test_a_log_that_cannot_be_written_leaves_the_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    _only(monkeypatch, {"break": _raises(KeyError("plain"))})
    assert cli.main(["break"]) == EXIT_UNFORESEEN
    assert "KeyError: 'plain'" in capsys.readouterr().err


def test_an_interruption_and_a_request_for_help_are_no_crashes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _only(monkeypatch, {"stop": _raises(KeyboardInterrupt()), "help": _raises(SystemExit(0))})
    assert cli.main(["stop"]) == EXIT_INTERRUPTED
    with pytest.raises(SystemExit):
        cli.main(["help"])


# -- printing --------------------------------------------------------------------------------------------


class Lost(io.StringIO):
    """A pipe whose reader has gone, or a disk that is full."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252", "no such encoding"])
def test_characters_that_cannot_be_shown_are_replaced(encoding: str) -> None:
    raw = io.BytesIO()
    known = "utf-8" if encoding.startswith("no") else encoding
    stream = io.TextIOWrapper(raw, encoding=known)
    if known != encoding:
        stream = type("Odd", (io.StringIO,), {"encoding": encoding})()
    for text in ("─ é 日本語", "half \ud800 of a pair", "plain"):
        console(stream).print(text)
    stream.flush()
    shown = raw.getvalue().decode(known) if known == encoding else stream.getvalue()
    assert "plain" in shown and shown.count("\n") == 3


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "No space left"), ValueError("closed file")]
)
def test_what_nobody_reads_is_lost_and_nothing_else(error: Exception) -> None:
    stream = Forgiving(Lost(error))
    for _ in range(2):
        assert stream.write("text") == 4
        stream.flush()
    printer = Console(file=stream, width=80)  # type: ignore[arg-type]
    printer.print("text")


def test_a_stream_that_was_closed_before_the_process_began_takes_nothing() -> None:
    assert console(None).is_terminal is False
    console(None).print("text")
    with pytest.raises(OSError):
        Forgiving(None).fileno()


PROGRAM = """
import sys
from compot_deploy.cli import entry
from compot_deploy.cli.arguments import recipe_parser

def verdict(arguments, out, err):
    out.print("\\u2500 FAILED: \\u65e5\\u672c\\u8a9e " * 50_000)
    err.print("\\u2500")
    recipe_parser("x", "\\u2500").print_help()
    return 1

entry.command_for = lambda arguments: lambda out, err: verdict(arguments[1:], out, err)
sys.argv = ["compot-deploy", "verdict"]
sys.exit(entry.main())
"""


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
def test_the_exit_code_is_the_verdict_whatever_becomes_of_the_output(tmp_path: Path) -> None:
    """All in one program each: an ASCII log, a reader that leaves, streams that are closed."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run = f'"{sys.executable}" "{program}"'
    script = (
        f"{run} > log 2>&1; echo $?; "
        f"( {run}; echo $? > code ) 2> errors | head -c 100 > head; cat code; "
        f"{run} >&- 2>&-; echo $?"
    )
    done = subprocess.run(
        ["sh", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "1", "1"], done.stdout
    log = (tmp_path / "log").read_text(encoding="ascii")
    assert "FAILED" in log and "Traceback" not in log
    assert not re.search(
        "Traceback|Exception ignored|Error", (tmp_path / "errors").read_text(errors="replace")
    )
