"""Greedy text of ONNX folders through onnxruntime-genai, in an environment that has nothing else.

Usage: python tests/consumers/genai_generate.py PROMPTS FOLDER EXPECTED [FOLDER EXPECTED …]

PROMPTS is a JSON file with ``input_ids``, rows of equal length; each EXPECTED one with the token ids of the whole
sequences. Exit code 0 if the runtime generates the same everywhere, 1 if not. Setup::

    python -m venv .venv-genai
    .venv-genai/bin/pip install onnxruntime-genai numpy

No torch, no transformers, no compot-deploy: this is what an application has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai


def same_tokens(folder: Path, prompts: Path, expected: Path) -> bool:
    rows = np.array(json.loads(prompts.read_text())["input_ids"], np.int32)
    wanted = json.loads(expected.read_text())
    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    length = len(wanted[0])
    settings.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(rows))
    generator = genai.Generator(model, settings)
    generator.append_tokens(rows)
    while not generator.is_done():
        generator.generate_next_token()
    found = [[int(token) for token in generator.get_sequence(row)] for row in range(len(rows))]
    print(f"{folder.name}: {'same tokens' if found == wanted else f'{found}, expected {wanted}'}")
    return found == wanted


if __name__ == "__main__":
    prompts, *pairs = (Path(argument) for argument in sys.argv[1:])
    verdicts = [
        same_tokens(folder, prompts, expected)
        for folder, expected in zip(pairs[::2], pairs[1::2], strict=True)
    ]
    sys.exit(0 if all(verdicts) else 1)
