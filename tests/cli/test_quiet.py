"""Nothing of what libraries have to say reaches the terminal of whoever runs the command, unless they ask for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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

entry.known_commands = lambda: ({"chatter": chatter}, None)
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


def test_the_command_answers_before_torch_is_loaded() -> None:
    """An interruption or a closed terminal in those seconds is answered like any other."""
    program = "import sys, compot_deploy.cli.entry; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
