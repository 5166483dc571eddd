"""Inputs of every reader, changed at random: each ends in success or in one sentence of ours, within a time.

    python tests/attack/mutations.py --count 100000 --seed 1
    python tests/attack/mutations.py --reader config --number 17 --seed 1      one of them, with its traceback

Readers run in a child process that is started again when it dies or hangs. What counts as wrong: any exception that is
none of ours, a reader that is not done after `SECONDS`, and the death of the process, but for files in llama.cpp, which
the commands load in a child too.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

sys.path += [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parent)]

import torch
from readers import READERS, mutant, prepare

from compot_deploy.errors import CompotDeployError

SECONDS: Final = 20.0
"""Of wall-clock time that one input may take."""

_PATIENCE: Final = 3 * SECONDS
"""Until a child that its own clock does not stop is ended."""

_MEMORY: Final = 6 << 30
"""Bytes that a reader may ask for beyond what the process has."""


class Hang(BaseException):
    """A reader was not done in time.

    Attributes:
        count: how often that was so: a reader may take this for an error of its input.
    """

    count = 0


@dataclass
class Outcome:
    """What became of the inputs of one reader.

    Attributes:
        tried: inputs.
        passed: read as if nothing was wrong with them.
        died: that took their process along, where that is allowed.
        wrong: what went wrong, with the numbers of the inputs.
        seconds: wall-clock.
    """

    tried: int = 0
    passed: int = 0
    died: int = 0
    wrong: dict[str, list[int]] = field(default_factory=lambda: collections.defaultdict(list))
    seconds: float = 0.0


def attack(reader: str, root: Path, count: int, seed: int, place: Path) -> Outcome:
    """Try inputs of one reader in a child process.

    Args:
        reader: its name.
        root: of the sound inputs, see `prepare`.
        count: of inputs.
        seed: of chance.
        place: folder for spoilt inputs.
    """
    outcome, began = Outcome(tried=count), time.monotonic()
    number = 0
    while number < count:
        ours, theirs = multiprocessing.Pipe()
        child = os.fork()
        if child == 0:
            _child(reader, root, range(number, count), seed, place, theirs)
        theirs.close()
        for number, said in _heard(ours):
            if said is None:
                outcome.passed += 1
            elif said:
                outcome.wrong[said].append(number)
            number += 1
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if number < count:
            if READERS[reader].may_die:
                outcome.died += 1
            else:
                outcome.wrong[f"the process died (status {status})"].append(number)
            number += 1
    outcome.seconds = time.monotonic() - began
    return outcome


def _heard(ours: Connection) -> Iterator[tuple[int, str | None]]:
    """What a child says of each input, until it is done, dead or silent for too long."""
    with ours:
        while ours.poll(_PATIENCE):
            try:
                yield ours.recv()
            except EOFError:
                return


def _child(reader: str, root: Path, numbers: range, seed: int, place: Path, theirs: Connection) -> None:
    """Read the inputs and end the process; never returns."""
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        warnings.simplefilter("ignore")
        faulthandler.disable()  # it tells of deaths where pytest has switched it on
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))
        with suppress(Exception):  # what is imported when it is first needed counts for no input
            READERS[reader].read(root / READERS[reader].folder)
        signal.signal(signal.SIGALRM, _too_long)
        for number in numbers:
            theirs.send((number, tried(reader, root, number, seed, place)))
    finally:
        os._exit(0)


def _too_long(signum: int, frame: object) -> None:
    Hang.count += 1
    raise Hang


def tried(reader: str, root: Path, number: int, seed: int, place: Path) -> str | None:
    """None for an input that is read, nothing for one that is refused in a sentence, else what went wrong."""
    entry = READERS[reader]
    folder = place / reader.replace(" ", "-")
    if not folder.exists():
        shutil.copytree(root / entry.folder, folder)
    data = (root / entry.folder / entry.file).read_bytes()
    (folder / entry.file).write_bytes(mutant(reader, data, seed, number))
    hangs, said = Hang.count, None
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        entry.read(folder)
    except CompotDeployError as error:
        said = "" if str(error).strip() and "\n\n" not in str(error) else f"no sentence: {error!r}"
    except BaseException as error:
        said = _told(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "it is not done in time" if Hang.count > hangs else said


def _told(error: BaseException) -> str:
    """Kind and place of an error: the innermost line of ours, and what stands there."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "compot_deploy" in f.filename or "exporters/" in f.filename
    ]
    place = (
        f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}"
        if frames
        else "nowhere of ours"
    )
    return f"{type(error).__name__} at {place}"


def shares(count: int) -> dict[str, int]:
    """How many inputs of each reader make so many."""
    whole = sum(entry.share for entry in READERS.values())
    return {name: -int(-count * entry.share // whole) for name, entry in READERS.items()}


def main() -> int:
    """Try many, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reader", choices=READERS)
    parser.add_argument("--number", type=int)
    parser.add_argument("--root", type=Path, help="where sound inputs are, or are put")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = options.root or Path(scratch) / "sound"
        if not root.exists():
            prepare(root)
        if options.number is not None:
            return _show(options.reader, root, options.number, options.seed, Path(scratch) / "spoilt")
        counts = shares(options.count)
        if options.reader:
            counts = {options.reader: options.count}
        wrong = tried = 0
        for name, count in counts.items():
            outcome = attack(name, root, count, options.seed, Path(scratch) / "spoilt")
            wrong, tried = wrong + sum(map(len, outcome.wrong.values())), tried + count
            sys.stdout.write(
                f"{name}: {count:,} tried, {outcome.passed:,} read, {outcome.died} took their child along, "
                f"{outcome.seconds:.0f} s\n"
            )
            for what, numbers in sorted(outcome.wrong.items()):
                sys.stdout.write(f"    {len(numbers)} x {what}, number {numbers[0]} first\n")
            sys.stdout.flush()
    sys.stdout.write(f"{tried:,} inputs, {wrong} of them not answered as they should be\n")
    return int(bool(wrong))


def _show(reader: str, root: Path, number: int, seed: int, place: Path) -> int:
    entry: Any = READERS[reader]
    shutil.copytree(root / entry.folder, place)
    (place / entry.file).write_bytes(
        mutant(reader, (root / entry.folder / entry.file).read_bytes(), seed, number)
    )
    entry.read(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
