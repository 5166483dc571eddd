"""argv → Recipe → pipeline → printed report.

::

    compot-deploy [MODEL] --quant int4 --format onnx [--out DIR]    compress, export, check
    compot-deploy plan MODEL --bits 2.2                             what would be chosen, and what it costs
    compot-deploy check DIR                                         check an exported folder again
    compot-deploy report DIR                                        write its report.html again
    compot-deploy supports MODEL                                    what it can become, from its configuration
    compot-deploy inspect DIR                                       what is in it, layer by layer
    compot-deploy run DIR -p "prompt"                               text from it, with tokens per second
    compot-deploy serve DIR                                         the same in a browser, which runs the model
    compot-deploy keygen NAME                                       a pair of keys for --sign and check --trusted-key
    compot-deploy demo                                              the model that ships, four ways, in one table

Exit codes: 0 done and gate passed · 1 gate failed (the folder is kept, marked) · 2 bad usage or input ·
3 unsupported model · 4 missing runtime or extra · 70 an error that nobody foresaw · 75 interrupted, the same command
resumes.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType

from rich.console import Console
from rich.text import Text

from compot_deploy.cli.arguments import NAMES, parse_recipe
from compot_deploy.cli.crash import crash_sentence
from compot_deploy.cli.output import console, quiet_libraries
from compot_deploy.cli.printing import forgive_characters, settle
from compot_deploy.core.disk import FULL, refusal
from compot_deploy.core.memory import use_one_heap
from compot_deploy.errors import EXIT_BAD_INPUT, EXIT_UNFORESEEN, CompotDeployError, InterruptedRunError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    ours = argv is None  # the process, its streams and its libraries
    arguments = list(sys.argv[1:] if argv is None else argv)
    if ours:
        forgive_characters()
        use_one_heap()
    out, err = console(sys.stdout), console(sys.stderr)
    given = list(arguments)
    requests: list[int] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        requests.append(signum)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        quiet_libraries(warnings_too=ours)
        return command_for(arguments)(out, err)
    except CompotDeployError as error:
        _tell(err, str(error))
        return error.exit_code
    except SystemExit:  # --help, --version
        raise
    except BaseException as error:  # libraries written in Rust throw what is no `Exception`
        # Libraries written in C may answer an interruption with an exception of their own.
        if requests or isinstance(error, KeyboardInterrupt):
            err.print("compot-deploy: Interrupted; the same command goes on with what is finished.")
            return InterruptedRunError.exit_code
        refused = refusal(error, FULL)
        if refused is not None:  # by whatever disk the folder for temporary files is on, for example
            place = getattr(error, "filename", None) or tempfile.gettempdir()
            _tell(
                err,
                f"{place} could not be written: {refused}. Make room, or set TMPDIR to a folder that has it.",
            )
            return EXIT_BAD_INPUT
        _tell(err, crash_sentence(error, given))
        return EXIT_UNFORESEEN
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if ours:
            settle()


def command_for(arguments: list[str]) -> Callable[[Console, Console], int]:
    """The command that is asked for, with what is told to it.

    Commands load torch, which takes seconds; ``--help`` and what is wrong with an option are answered before.
    """
    named = bool(arguments) and arguments[0] in NAMES
    recipe = None if named else parse_recipe(arguments)
    from compot_deploy.cli import commands

    if recipe is not None:
        return partial(commands.deploy_command, recipe)
    return partial(commands.COMMANDS[arguments[0]], arguments[1:])


def _tell(err: Console, sentence: str) -> None:
    err.print(Text(f"compot-deploy: {sentence}"), style="bold red" if err.is_terminal else "", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
