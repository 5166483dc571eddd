"""What can go wrong, and the exit code that each kind of it has.

The tree::

    CompotDeployError
    ├── InputError                 2   bad usage or input: the user can mend it
    │   ├── RecipeError            2   an option outside its range, or two that contradict each other
    │   └── ArtifactError          2   a folder or file that does not match its manifest, or is damaged
    ├── UnsupportedModelError      3   an architecture (or a feature of one) that is not handled
    ├── MissingDependencyError     4   an optional package or runtime is not installed
    ├── MissingBundleError         4   the page of `compot-deploy serve` was not built
    └── InterruptedRunError       75   stopped on request; the same command resumes

A failed accuracy gate is not an exception: it is a verdict, and exit code 1 (`EXIT_GATE_FAILED`), which means nothing
else. Whatever is not of this tree was not foreseen: exit code 70 (`EXIT_UNFORESEEN`), and the traceback in a file.

Every message is one sentence or two: what, where, why, and what to do next, with both numbers where two
numbers disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    pass


EXIT_OK: Final = 0
EXIT_GATE_FAILED: Final = 1
EXIT_BAD_INPUT: Final = 2
EXIT_UNSUPPORTED_MODEL: Final = 3
EXIT_MISSING_DEPENDENCY: Final = 4
EXIT_UNFORESEEN: Final = 70
EXIT_INTERRUPTED: Final = 75


class CompotDeployError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code: int = EXIT_BAD_INPUT


class InputError(CompotDeployError):
    """Bad usage or input; nothing was written."""


class RecipeError(InputError):
    """An option outside its range, or two options that contradict each other."""


class ArtifactError(InputError):
    """An exported folder or file that is damaged or does not match its manifest."""


class UnsupportedModelError(CompotDeployError):
    """An architecture, or a feature of one, that is not handled; raised before any heavy work."""

    exit_code = EXIT_UNSUPPORTED_MODEL


class MissingDependencyError(CompotDeployError):
    """An optional package is not installed; the message names the extra that brings it."""

    exit_code = EXIT_MISSING_DEPENDENCY

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}, which is not installed. "
            f'Install it with: pip install "compot-deploy[{extra}]"'
        )
        self.package, self.extra = package, extra


class MissingBundleError(CompotDeployError):
    """The browser's part of the package was not built; the message names the command that builds it."""

    exit_code = EXIT_MISSING_DEPENDENCY


class InterruptedRunError(CompotDeployError):
    """Stopped on request; finished layers are kept, and the same command goes on from there."""

    exit_code = EXIT_INTERRUPTED


EXIT_CODES = (
    "exit codes: 0 done and gate passed, 1 gate failed, 2 bad usage or input, 3 unsupported model, "
    "4 missing runtime or extra, 70 an error that nobody foresaw (its log says how to report it), "
    "75 interrupted (the same command resumes)"
)
"""For the end of every help text."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line without its full stop; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def a_few(names: Sequence[str]) -> str:
    """The first three of some names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
