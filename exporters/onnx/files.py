"""Files of the original model that an ONNX folder takes over: tokenizer, pooling of sentences; readable everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

from compot_deploy.core.json_files import write_object
from compot_deploy.exporters.onnx.config import portable_tokenizer_config
from compot_deploy.models.source import TOKENIZER_FILES
from compot_deploy.models.weights import read_json

SENTENCE_FILES: Final = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
"""How token embeddings become one of a sentence, as sentence-transformers reads it; copied where present."""


_WHISPER: Final = '"<|startoftranscript|>"'
"""A token that Whisper's tokenizers have, as tokenizer.json spells it."""


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, readable in transformers 4 and 5."""
    for name in TOKENIZER_FILES:
        if name == "tokenizer_config.json":
            settings = read_optional(source, name)
            if settings:
                write_object(folder / name, _named(portable_tokenizer_config(settings), source))
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _named(settings: dict[str, Any], source: Path) -> dict[str, Any]:
    """The class of a tokenizer where consumers go by it: pipelines for speech ask Whisper's own for its timestamps."""
    generic = settings.get("tokenizer_class") in (None, "PreTrainedTokenizerFast")
    vocabulary = source / "tokenizer.json"
    if generic and vocabulary.is_file() and _WHISPER in vocabulary.read_text(encoding="utf-8"):
        return {**settings, "tokenizer_class": "WhisperTokenizer"}
    return settings


def read_optional(source: Path | None, name: str) -> dict[str, Any]:
    """A JSON object of the original model, empty where there is none."""
    return {} if source is None or not (source / name).is_file() else read_json(source, name)


def copy_sentence_files(source: Path, folder: Path) -> None:
    """Copy what says how sentences are pooled."""
    for name in SENTENCE_FILES:
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
