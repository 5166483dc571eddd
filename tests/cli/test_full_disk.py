"""Law of full disks: wherever one refuses a byte there is one sentence and exit code 2; nothing is half-written."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import any_models
import pytest
import tiny
from forked import finish, start

if sys.platform == "win32":
    pytest.skip("forks", allow_module_level=True)

SMALL: Final = [
    "--samples",
    "2",
    "--length",
    "32",
    "--evaluation-tokens",
    "256",
    "--max-perplexity-ratio",
    "1e9",
]
WAYS: Final = {
    "onnx": ["--method", "plain", "--archive"],
    "gguf": ["--method", "plain", "--format", "gguf"],
    "huggingface": ["--method", "compot", "--format", "huggingface", "--rounds", "2"],
    "traced": ["--method", "plain"],
}
LIMITS: Final = (0, 40, 3_000, 30_000, 70_000, 150_000)
"""Bytes that a file may have: from none at all to more than any of the files has."""


def limited(limit: int) -> Callable[[], None]:
    """Let no file of this process grow beyond a limit: a disk that fills up, without one."""
    import resource

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return prepare


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tiny_one = tiny.save(root / "llama", num_hidden_layers=1)
    return dict.fromkeys(WAYS, tiny_one) | {"traced": any_models.save(root / "gpt2", "gpt2")}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_disk_that_is_full_at_any_byte_is_one_sentence(
    way: str, models: dict[str, Path], tmp_path: Path
) -> None:
    codes = []
    for limit in LIMITS:
        folder = tmp_path / str(limit)
        folder.mkdir()
        command = [str(models[way]), *SMALL, *WAYS[way], "--out", str(folder / "out")]
        code, printed = finish(*start(command, limited(limit)))
        codes.append(code)
        if code:
            said = re.sub(r"\s+", " ", printed[printed.index("compot-deploy:") :]).strip()
            assert code == 2, printed
            assert re.search(r"could not be written: a file would grow|cannot be kept in", said), printed
            assert "Traceback" not in printed and said.count("compot-deploy:") == 1, printed
            left = {path.name for path in folder.iterdir() if ".work-" not in path.name}
            assert left <= ({"out"} if "zip" in said else set()), left
    assert codes[0] == 2 and codes[-1] == 0, codes
