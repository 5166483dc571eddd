"""Files that llama.cpp would abort on: found from their keys, and whatever is left in a process that may die.

llama.cpp answers some contradictions with ``abort``, which takes the whole process along. So what is known to do that
is refused from the header, and a file that came from anywhere is loaded once in a child before it is loaded here.

    python -m compot_deploy.llama.probe FILE
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final, NoReturn

from compot_deploy.errors import ArtifactError, CompotDeployError
from compot_deploy.exporters.gguf.reader import GgufFile

_SIZES: Final = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "vocab_size",
)
"""Keys of an architecture that count something; those that are there must."""

_SECONDS: Final = 60.0
_BYTES_PER_SECOND: Final = 20_000_000.0
"""That a child may take: to start, and for a file on a slow disk."""


def check_keys(file: GgufFile, base: str) -> None:
    """Refuse what llama.cpp aborts on, as far as it is known.

    Args:
        file: its header.
        base: the architecture whose keys it has.

    Raises:
        ArtifactError: names the key.
    """
    for size in _SIZES:
        value = file.metadata.get(f"{base}.{size}")
        if value is not None and not hasattr(value, "__len__"):  # some architectures count by block
            file.count(f"{base}.{size}")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(set(tokens)) < len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise ArtifactError(
            f"{file.path.name}: the token {twice!r} is in its vocabulary twice, and llama.cpp aborts on that: damaged "
            "file."
        )
    for key, values in file.metadata.items():
        if key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type") and isinstance(tokens, list):
            count = len(values) if hasattr(values, "__len__") else 0
            if count != len(tokens):
                raise ArtifactError(
                    f"{file.path.name}: {key} has {count} entries for {len(tokens)} tokens: damaged file."
                )


def probe(path: Path) -> None:
    """Load a file in a child process, and refuse it where that process dies.

    What the child finds to say is left to whoever loads the file next.

    Raises:
        ArtifactError: llama.cpp aborts on the file, or never comes to an end.
    """
    seconds = _SECONDS + path.stat().st_size / _BYTES_PER_SECOND
    try:
        done = subprocess.run(
            [*COMMAND, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ArtifactError(f"{path.name}: llama.cpp does not load it in {seconds:.0f} seconds.") from None
    if done.returncode not in (0, _REFUSED):
        raise ArtifactError(
            f"{path.name}: llama.cpp aborts while it loads this file (exit code {done.returncode} of its process), "
            "which contradicts itself: export the model again."
        )


COMMAND: Final = (sys.executable, "-m", "compot_deploy.llama.probe")
"""What the child runs; the path of the file comes behind it."""

_REFUSED: Final = 9
"""The child got an answer that is no abort."""


def end() -> NoReturn:
    """Load the file that is named last, and end the process."""
    from compot_deploy.llama.model import LlamaModel

    try:
        LlamaModel(sys.argv[-1], threads=1).close()
    except (CompotDeployError, OSError, MemoryError):
        os._exit(_REFUSED)
    os._exit(0)  # nothing is left to be tidied up, and no library's own end is waited for


if __name__ == "__main__":
    end()
