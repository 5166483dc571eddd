"""A model and a data set by their names on a hub, from a hub on this computer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from fake_hub import serve

pytestmark = pytest.mark.slow

SMALL = ["--samples", "8", "--length", "64", "--evaluation-tokens", "256", "--max-perplexity-ratio", "100"]


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


def test_a_model_is_had_by_its_hub_id(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "tiny", "llama")
    text = tmp_path / "text.txt"
    text.write_text(tiny.WORDS * 100)
    with serve({"someone/tiny": folder}, {}) as hub:
        done = run(
            hub, tmp_path / "home", "someone/tiny", "--out", str(tmp_path / "out"),
            "--calibration", str(text), *SMALL,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "onnx" / "model.onnx").exists()


def test_a_model_that_the_hub_does_not_have_is_one_sentence(tmp_path: Path) -> None:
    with serve({}, {}) as hub:
        done = run(hub, tmp_path / "home", "someone/else", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "neither a local folder nor a model that the hub answers for" in " ".join(done.stderr.split())


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the extra datasets is not installed"
)
def test_a_data_set_is_had_by_its_name(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "tiny", "llama")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "train.txt").write_text((tiny.WORDS + "\n") * 100)
    with serve({}, {"someone/texts": texts}) as hub:
        done = run(
            hub, tmp_path / "home", str(folder), "--out", str(tmp_path / "out"),
            "--calibration", "someone/texts", *SMALL,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = (tmp_path / "out" / "compot" / "manifest.json").read_text()
    assert '"calibration": "someone/texts"' in manifest
