"""ONNX folders of tiny models, with and without a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reference_onnx import rounded, two_pairs
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Matrix
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.onnx.options import OnnxOptions

EXPORTER = EXPORTERS["onnx"]


def int4(name: str, weight: Tensor) -> Matrix:
    return rounded(weight, Grid(4, 32)) if "up_proj" in name or "embed" in name else two_pairs(name, weight)


def export(model: Any, folder: Path, options: OnnxOptions = OnnxOptions()) -> Path:  # noqa: B008
    folder.mkdir()
    EXPORTER.write(model, folder, options)
    return folder


def save_tokenizer(folder: Path) -> None:
    words = {f"w{i}": i for i in range(96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2").save_pretrained(
        folder
    )
