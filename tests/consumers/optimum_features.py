"""Embeddings of ONNX folders through optimum, in an environment of its own (it pins transformers < 4.58).

Usage: python tests/consumers/optimum_features.py TOKENS FOLDER EXPECTED

TOKENS is a JSON file with ``input_ids`` and ``attention_mask``; EXPECTED one with the hidden states that onnxruntime
gives for them. Exit code 0 if optimum gives the same up to rounding, 1 if not. The environment is that of
`optimum_generate.py`, and as there nothing of compot-deploy is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForFeatureExtraction
from transformers import AutoTokenizer, pipeline


def same_features(tokens: Path, folder: Path, expected: Path) -> bool:
    model = ORTModelForFeatureExtraction.from_pretrained(folder)
    batch = {name: torch.tensor(rows) for name, rows in json.loads(tokens.read_text()).items()}
    found = model(**batch).last_hidden_state
    wanted = torch.tensor(json.loads(expected.read_text()))
    mask = batch["attention_mask"].bool()
    difference = float((found - wanted)[mask].abs().max())
    extract = pipeline("feature-extraction", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    width = len(extract("word3 word4")[0][0])
    print(f"{folder.name}: largest difference {difference:.1e}, width {width}")
    return difference < 1e-5 and width == wanted.shape[-1]


if __name__ == "__main__":
    sys.exit(0 if same_features(*(Path(argument) for argument in sys.argv[1:])) else 1)
