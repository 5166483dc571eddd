"""Text from an exported folder with onnxruntime and a tokenizer alone, as an application would.

Only the first function uses compot-deploy, to make the folder; the second one is what goes into an app.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from compot_deploy.pipeline.deploy import deploy


def make(folder: Path) -> None:
    """An ONNX folder of the model that ships."""
    deploy(None, out=str(folder), samples=16, length=128, rounds=5, evaluation_tokens=512)


def write(folder: Path, prompt: str, tokens: int) -> str:
    """Continue a prompt greedily, one token at a time, with the cache that the graph hands back."""
    os.environ.setdefault(
        "ORT_DISABLE_TELEMETRY", "1"
    )  # it reports to its maker unless told so before the import
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "model.onnx"), options)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cache = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values.")
    }
    ids = tokenizer.encode(prompt).ids
    step, written = ids, list(ids)
    for _ in range(tokens):
        feeds = {
            "input_ids": np.array([step], np.int64),
            "attention_mask": np.ones((1, len(written)), np.int64),
            **cache,
        }
        logits, *present = session.run(None, feeds)
        cache = dict(zip(cache, present, strict=True))
        step = [int(logits[0, -1].argmax())]
        written += step
    return tokenizer.decode(written)


def main() -> None:
    """Make a folder, and write with it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make(folder)
        for prompt in ("Return a", "If the argument is"):
            started = time.perf_counter()
            text = write(folder, prompt, 32)
            print(f"{text!r} ({32 / (time.perf_counter() - started):.0f} tokens/s, loading included)")


if __name__ == "__main__":
    main()
