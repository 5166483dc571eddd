"""The C check of the kernels: sanitizers on this machine, NEON under an emulator; skipped where a tool is missing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "compot_deploy" / "llama" / "check_kernels.sh"


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("what", ["native", "neon", "neon-dotprod"])
def test_kernels_agree_with_the_slow_product_and_read_nothing_else(what: str) -> None:
    needed = ["cc"] if what == "native" else ["aarch64-linux-gnu-gcc", "qemu-aarch64"]
    missing = [tool for tool in needed if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    done = subprocess.run([str(SCRIPT), what], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "0 failures" in done.stdout
