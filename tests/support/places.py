"""Where models of any kind lie in tests of the pipeline, and folders that were made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import any_models
import pytest

from compot_deploy.cli import main
from compot_deploy.planning import settings

KINDS: Final = ("gpt2", "opt", "bert")
"""Two decoders, one with and one without biases of its own kind, and an encoder."""

FORMATS: Final = ("onnx", "huggingface")

SMALL: Final = ["--samples", "8", "--length", "32", "--evaluation-tokens", "256"]


@contextmanager
def few_schemes() -> Iterator[None]:
    """A plan among a handful of schemes, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "_GROUPS", {2: (64,), 4: (32,), 8: (32,)})
        patch.setattr(settings, "_FINER_RATES", (1.0, 1.9, 2.7))
        yield


@dataclass(frozen=True)
class Place:
    """Folders of tiny models, and a text that they can read."""

    root: Path

    def model(self, kind: str) -> Path:
        """The folder of a model."""
        folder = self.root / kind.replace(" ", "-")
        return folder if folder.exists() else any_models.save(folder, kind)

    @property
    def text(self) -> Path:
        """Lines of words."""
        return self.root / "text.txt"

    def limits(self, kind: str) -> list[str]:
        """With which a random model passes its gate."""
        if kind in any_models.READERS:
            return ["--min-cosine", "-1"] if kind in ("bert", "distilbert") else ["--min-top1", "0.01"]
        return ["--max-perplexity-ratio", "1000"]

    def flags(self, kind: str, *more: str) -> list[str]:
        """Of a command, without its output."""
        return [
            str(self.model(kind)), "--calibration", str(self.text), *SMALL, *self.limits(kind), *more,
        ]  # fmt: skip


class Exported:
    """Folders of both formats, of each kind made once: linears in 3.4 bits, planned."""

    def __init__(self, place: Place, root: Path) -> None:
        self._place, self._root = place, root
        self.codes: dict[str, int] = {}

    def folder(self, kind: str, form: str = "onnx") -> Path:
        """One of them."""
        if kind not in self.codes:
            both = ["--format", "onnx", "--format", "huggingface", "--bits", "3.4"]
            with few_schemes():
                command = [*self._place.flags(kind, *both), "--out", str(self._root / kind)]
                self.codes[kind] = main(command)
        return self._root / kind / form
