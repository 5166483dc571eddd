"""Kill planned runs at random moments, go on with them, and compare what comes out with an undisturbed run.

    python tests/attack/kills.py --moments 20 --seed 0

A run is a process that is forked when everything is imported, so a moment is one of the run's own work, from the first
byte on disk to the last. A run that goes on is killed again with a chance of one in three.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tiny
import torch
from folders import differences
from forked import finish, start

OPTIONS: Final = ["--bits", "2.6", "--search", "predicted", "--samples", "6", "--length", "48", "--archive"]
OPTIONS_OF_CHECK: Final = ["--evaluation-tokens", "256", "--max-perplexity-ratio", "1e9"]


def attack(model: Path, root: Path, moments: int, seed: int, options: Sequence[str] = OPTIONS) -> list[str]:
    """What went wrong; nothing if every run that was killed gave what an undisturbed one gives."""
    chance, wrong = random.Random(seed), []
    whole = root / "whole" / "out"
    arguments = [str(model), *options, *OPTIONS_OF_CHECK, "--out"]
    began = time.monotonic()
    code, printed = finish(*start([*arguments, str(whole)]))
    took = time.monotonic() - began
    if code != 0:
        return [f"the undisturbed run ends with {code}: {printed[-400:]}"]
    killed = 0
    for number in range(moments):
        out = root / f"killed-{number}" / "out"
        left, code, told = took, -1, list[str]()
        for attempt in range(20):
            process, reading = start([*arguments, str(out)])
            after, killer = 0.0, None
            if attempt == 0 or chance.random() < 1 / 3:
                after = chance.random() * left
                killer = threading.Timer(after, _kill, [process])
                killer.start()
                left -= after
            code, printed = finish(process, reading)
            if killer is not None:
                killer.cancel()
            told.append(f"{code} after {after:.2f} s" if code < 0 else f"{code}")
            killed += code < 0
            if code >= 0:
                break
        what = f"moment {number} ({', '.join(told)})"
        done = code == 2 and "exists already" in printed  # killed when nothing was left to do
        if code != 0 and not done:
            wrong.append(f"{what}: exit {code}: {printed[-400:]}")
            continue
        wrong += [f"{what}: {line}" for line in differences(whole, out)]
        beside = sorted(path.name for path in out.parent.iterdir())
        if beside != ["out", "out.zip"]:
            wrong.append(f"{what}: left behind: {beside}")
        sys.stdout.write(f"{what}: {'as undisturbed' if not wrong else wrong[-1]}\n")
        sys.stdout.flush()
        shutil.rmtree(out.parent)
    sys.stdout.write(f"{moments} runs of {took:.1f} s, killed {killed} times, {len(wrong)} wrong\n")
    return wrong


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny.save(Path(scratch) / "model")
        wrong = attack(model, Path(scratch), options.moments, options.seed)
    for line in wrong:
        sys.stdout.write(f"WRONG {line}\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
