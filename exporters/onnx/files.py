"""Files of the original model that an ONNX folder takes over: tokenizer, pooling of sentences; readable everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

from compot_deploy.core.json_files import write_object
from compot_deploy.errors import InputError
from compot_deploy.exporters.onnx.config import portable_tokenizer_config
from compot_deploy.models.source import TOKENIZER_FILES

SENTENCE_FILES: Final = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
"""How token embeddings become one of a sentence, as sentence-transformers reads it; copied where present."""


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, readable in transformers 4 and 5."""
    for name in TOKENIZER_FILES:
        if name == "tokenizer_config.json":
            settings = read_optional(source, name)
            if settings:
                write_object(folder / name, portable_tokenizer_config(settings))
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def read_optional(source: Path | None, name: str) -> dict[str, Any]:
    """A JSON object of the original model, empty where there is none."""
    if source is None or not (source / name).is_file():
        return {}
    try:
        value = json.loads((source / name).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{source / name} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{source / name} does not hold a JSON object.")
    return value


def copy_sentence_files(source: Path, folder: Path) -> None:
    """Copy what says how sentences are pooled."""
    for name in SENTENCE_FILES:
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
