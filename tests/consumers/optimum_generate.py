"""Greedy text of ONNX folders through optimum, in an environment of its own (it pins transformers < 4.58).

Usage: python tests/consumers/optimum_generate.py PROMPTS FOLDER EXPECTED [FOLDER EXPECTED …]

PROMPTS is a JSON file with ``input_ids`` and ``attention_mask`` (a left-padded batch); each EXPECTED one with
the token ids of the whole sequences. Exit code 0 if optimum generates the same everywhere, 1 if not. Setup::

    python -m venv .venv-optimum
    .venv-optimum/bin/pip install torch==2.13.0 optimum-onnx==0.1.0 onnxruntime transformers==4.57.6

Nothing of compot-deploy is imported: this is what a user of optimum would write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def same_tokens(folder: Path, prompts: Path, expected: Path) -> bool:
    model = ORTModelForCausalLM.from_pretrained(folder)
    # optimum-onnx 0.1.0 takes hidden_size / num_attention_heads for the head size of a Qwen3.
    model.embed_size_per_head = model.config.head_dim
    AutoTokenizer.from_pretrained(folder)  # transformers 4 must be able to read it
    batch = {name: torch.tensor(rows) for name, rows in json.loads(prompts.read_text()).items()}
    wanted = torch.tensor(json.loads(expected.read_text()))
    new = wanted.shape[1] - batch["input_ids"].shape[1]
    found = model.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    same = torch.equal(found, wanted)
    print(f"{folder.name}: {'same tokens' if same else f'{found.tolist()}, expected {wanted.tolist()}'}")
    return same


if __name__ == "__main__":
    prompts, *pairs = (Path(argument) for argument in sys.argv[1:])
    verdicts = [
        same_tokens(folder, prompts, expected)
        for folder, expected in zip(pairs[::2], pairs[1::2], strict=True)
    ]
    sys.exit(0 if all(verdicts) else 1)
