"""The small model that ships with the package, so that everything runs without a download."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
MODEL = HERE / "model"
TRAINING_TEXT = HERE / "text" / "train.txt.xz"
HELD_OUT_TEXT = HERE / "text" / "heldout.txt"
