"""Logits of a file, computed in a process of its own, which llama.cpp may take along when it aborts.

python -m compot_deploy.llama.apart FILE LOGITS TOKEN...
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float32

from compot_deploy.errors import CompotDeployError
from compot_deploy.exporters.gguf.library import LlamaError

_SECONDS: Final = 120.0
_REFUSED: Final = 9
"""The child got an answer that is no abort, and has printed it."""


def logits_apart(path: Path, tokens: Sequence[int]) -> Float32[np.ndarray, "tokens vocabulary"]:
    """Logits after each token, nothing rounded.

    Raises:
        LlamaError: llama.cpp refuses the file, aborts on it or never comes to an end.
    """
    target = path.with_suffix(".npy")
    command = (sys.executable, "-m", "compot_deploy.llama.apart", str(path), str(target), *map(str, tokens))
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise LlamaError(f"llama.cpp is not done with {path.name} in {_SECONDS:.0f} seconds.") from None
    if done.returncode == _REFUSED:
        raise LlamaError(done.stdout.strip())
    if done.returncode:
        raise LlamaError(f"llama.cpp aborts on {path.name} (exit code {done.returncode} of its process).")
    return np.asarray(np.load(target))


def _main() -> int:
    from compot_deploy.llama.model import LlamaModel

    path, target, *tokens = sys.argv[1:]
    try:
        with LlamaModel(path, exact=True, context=len(tokens)) as model:
            np.save(target, model.logits([int(token) for token in tokens]))
    except CompotDeployError as error:
        sys.stdout.write(f"{error}\n")
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main())
