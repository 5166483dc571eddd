"""Nothing of what libraries have to say reaches the terminal of whoever runs the command, unless they ask for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from compot_deploy.cli.arguments import NAMES
from compot_deploy.cli.commands import COMMANDS

PROGRAM = """
import sys
from compot_deploy.cli import entry

def chatter(arguments, out, err):
    import warnings
    import transformers
    from compot_deploy.embedded import MODEL
    transformers.AutoModelForCausalLM.from_pretrained(MODEL)  # draws a bar
    transformers.utils.logging.get_logger("transformers.models").warning("advice")
    warnings.warn_explicit("deprecated", FutureWarning, "theirs.py", 1, module="transformers")
    return 0

entry.command_for = lambda arguments: lambda out, err: chatter(arguments[1:], out, err)
sys.argv = ["compot-deploy", "chatter"]
sys.exit(entry.main())
"""

ASKED = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "0",
    "TRANSFORMERS_VERBOSITY": "warning",
    "PYTHONWARNINGS": "default",
}


@pytest.mark.parametrize(
    "asked",
    [pytest.param(False, id="by itself"), pytest.param(True, id="when asked", marks=pytest.mark.nightly)],
)
def test_libraries_speak_only_when_asked_to(asked: bool) -> None:
    quiet = {name: value for name, value in os.environ.items() if name not in ASKED}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**quiet, **ASKED} if asked else quiet,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [word for word in ("%|", "advice", "deprecated") if word in done.stderr]
    assert said == (["%|", "advice", "deprecated"] if asked else []), done.stderr[-2000:]
    assert asked or (done.stdout, done.stderr) == ("", "")


ANSWERED = """
import contextlib, sys
from compot_deploy.cli import entry

with contextlib.suppress(SystemExit):
    print(entry.main(sys.argv[1:]))
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--help"], "usage: compot-deploy"), (["--version"], "compot-deploy"), (["--bits", "x"], "2")],
    ids=" ".join,
)
def test_help_and_bad_options_are_answered_before_torch_is_loaded(arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ANSWERED, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(said)
    assert done.stdout.endswith("\n[]\n"), done.stdout[-200:]


def test_every_command_is_known_by_its_name() -> None:
    assert tuple(COMMANDS) == NAMES
