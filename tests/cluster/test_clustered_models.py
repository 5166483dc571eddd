"""Laws of models that a cluster compresses: every bit is that of one process, and Ctrl-C leaves nobody behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest
import tiny
from divided import recipes_in, result_of
from folders import differences
from machines import machines
from places import few_schemes
from texts import write_lines

from compot_deploy.cluster.connection import workers_of
from compot_deploy.recipe import Recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    return recipes_in(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def alone(recipes: dict[str, Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("alone")
    with few_schemes():
        return {name: result_of(recipe, root / name) for name, recipe in recipes.items()}


def test_a_compressed_model_is_that_of_one_process(
    recipes: dict[str, Recipe], alone: dict[str, str], tmp_path: Path
) -> None:
    """Matrices, plan, errors, importance; whatever plans them, for 1, 2 and 4 workers."""
    assert len(set(alone.values())) == len(alone)
    with few_schemes(), machines(1) as some:
        for count in (1, 2, 4):
            asked = recipes if count == 2 else {"predicted": recipes["predicted"]}
            with workers_of(some.address) as workers:
                for name, recipe in asked.items():
                    assert result_of(recipe, tmp_path / f"{name} {count}", workers) == alone[name], (
                        name,
                        count,
                    )
            for _ in range(count):
                some.join(1)


PROGRAM: Final = """
import sys, torch
torch.set_num_threads(1)
from compot_deploy.cli import main
sys.exit(main())
"""
CHECK: Final = ["--evaluation-tokens", "256", "--max-perplexity-ratio", "1e9", "--format", "huggingface"]


def processes_of(session: int, scratch: Path) -> list[int]:
    """Processes that have not ended, of a session, or with a folder for temporary files."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, own = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            said = (path / "environ").read_bytes() + (path / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z" and (int(own) == session or str(scratch).encode() in said):
            found.append(int(path.name))
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_interrupted_run_leaves_nobody_behind_and_goes_on(tmp_path: Path) -> None:
    """Ctrl-C while workers compute; what the same command writes then is what one process writes, in every file."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    scratch, text = tmp_path / "scratch", write_lines(tmp_path / "text.txt")
    scratch.mkdir()
    model = tiny.save(tmp_path / "model", num_hidden_layers=2)
    flags = [str(model), "--calibration", str(text), "--samples", "4", "--length", "32", "--bits", "2.6"]
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch), "HOME": str(home)}

    def start(out: Path, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *flags, *CHECK, "--out", str(out), *more],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    out, before = tmp_path / "clustered" / "out", set(Path("/tmp").glob("compot-ray-*"))
    run = start(out, "--cluster", "local")
    assert run.stderr is not None
    told = []
    while not (told and told[-1].startswith("Measure candidates")):
        told.append(run.stderr.readline())
        assert told[-1], told
    time.sleep(2.0)  # workers have begun
    os.killpg(run.pid, signal.SIGINT)  # what a terminal does
    assert "the same command goes on from there" in run.communicate(timeout=60)[1].replace("\n", " ")
    assert run.returncode == 75
    deadline = time.monotonic() + 30
    while processes_of(run.pid, scratch) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(run.pid, scratch) == []
    assert list(scratch.iterdir()) == list(home.iterdir()) == []
    assert set(Path("/tmp").glob("compot-ray-*")) <= before
    assert not out.exists() and list(out.parent.glob(".out.work-*"))
    for again in (start(out, "--cluster", "local"), start(tmp_path / "alone" / "out")):
        complaint = again.communicate(timeout=300)[1]
        assert again.returncode == 0, complaint
    assert list(differences(tmp_path / "alone" / "out", out)) == []
