"""A model and a data set by their names on a hub, from a hub on this computer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from fake_hub import serve

pytestmark = pytest.mark.slow

SMALL = ["--method", "plain", "--samples", "8", "--length", "64", "--evaluation-tokens", "256"]


def run(hub: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
    return subprocess.run(
        [sys.executable, "-m", "compot_deploy", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_model_and_a_data_set_are_had_by_their_names(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "tiny", "llama")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "train.txt").write_text((tiny.WORDS + "\n") * 100)
    # Without the extra datasets a text is a file.
    text = "someone/texts" if importlib.util.find_spec("datasets") else str(texts / "train.txt")
    with serve({"someone/tiny": folder}, {"someone/texts": texts}) as hub:
        done = run(
            hub, tmp_path / "home", "someone/tiny", "--out", str(tmp_path / "out"),
            "--calibration", text, *SMALL, "--max-perplexity-ratio", "100",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "onnx" / "model.onnx").exists()
    recipe = json.loads((tmp_path / "out" / "compot" / "manifest.json").read_text())["recipe"]
    assert (recipe["model"], recipe["calibration"]) == (
        "someone/tiny",
        text if "someone" in text else "train.txt",
    )


def test_a_model_that_the_hub_does_not_have_is_one_sentence(tmp_path: Path) -> None:
    with serve({}, {}) as hub:
        done = run(hub, tmp_path / "home", "someone/else", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "neither a local folder nor a model that the hub answers for" in " ".join(done.stderr.split())
