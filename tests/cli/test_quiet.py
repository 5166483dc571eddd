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

entry.COMMANDS = {"chatter": chatter}
sys.argv = ["compot-deploy", "chatter"]
sys.exit(entry.main())
"""

ASKED = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "0",
    "TRANSFORMERS_VERBOSITY": "warning",
    "PYTHONWARNINGS": "default",
}


@pytest.mark.parametrize("asked", [False, True], ids=["by itself", "when asked"])
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
