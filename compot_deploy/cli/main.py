"""argv → Recipe → pipeline → printed report.

::

    compot-deploy [MODEL] --quant int4 --format onnx [--out DIR]    compress, export, check
    compot-deploy plan MODEL --bits 2.2                             what would be chosen, and what it costs
    compot-deploy check DIR                                         check an exported folder again
    compot-deploy report DIR                                        write its report.html again
    compot-deploy inspect DIR                                       what is in it, layer by layer
    compot-deploy run DIR -p "prompt"                               text from it, with tokens per second
    compot-deploy serve DIR                                         the same in a browser, which runs the model
    compot-deploy demo                                              the model that ships, four ways, in one table

Exit codes: 0 done and gate passed · 1 gate failed (the folder is kept, marked) · 2 bad usage or input ·
3 unsupported model · 4 missing runtime or extra · 75 interrupted, the same command resumes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from rich.console import Console
from rich.text import Text

from compot_deploy.cli.commands import COMMANDS, deploy_command
from compot_deploy.cli.output import console, quiet_libraries
from compot_deploy.errors import EXIT_OK, CompotDeployError, InterruptedRunError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    out, err = console(sys.stdout), console(sys.stderr)
    command: Callable[[list[str], Console, Console], int] = deploy_command
    if arguments and arguments[0] in COMMANDS:
        command = COMMANDS[arguments.pop(0)]
    requests: list[int] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        requests.append(signum)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        quiet_libraries(warnings_too=argv is None)
        return command(arguments, out, err)
    except CompotDeployError as error:
        err.print(Text(f"compot-deploy: {error}"), style="bold red" if err.is_terminal else "")
        return error.exit_code
    except KeyboardInterrupt:
        err.print("compot-deploy: Interrupted; the same command goes on with what is finished.")
        return InterruptedRunError.exit_code
    except BrokenPipeError:
        # Whoever read the output has gone; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception:
        # Libraries written in C may answer an interruption with an exception of their own.
        if not requests:
            raise
        err.print("compot-deploy: Interrupted; the same command goes on with what is finished.")
        return InterruptedRunError.exit_code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
