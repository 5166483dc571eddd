"""config.json of a compressed folder as a whole: our type, the code that it points to, and what is refused.

A folder comes from anywhere: nothing in it is run, and what points elsewhere is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from compot_deploy.core.json_files import read_object
from compot_deploy.errors import ArtifactError
from compot_deploy.models.compressed import CompressedModel, tied_config
from compot_deploy.transformers_plugin.layout import shares_packed_table

MODEL_TYPE: Final = "compot"

CODE: Final = "compot_modeling.py"
"""The file that ``auto_map`` points to: it imports our package or says that it is missing."""

BASE_TYPE: Final = "base_model_type"
"""Stands for ``model_type`` in the base configuration: transformers hands a class any nested configuration whose
``model_type`` is that of the class, and the class would fill the model with random weights."""

POINTER: Final = "see base_config"
"""Stands where other model classes look for a number, so that one of them cannot take this file for its own and
fill a model of its default size with random weights."""

AUTO_CLASSES: Final = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
)

_FIRST: Final = AUTO_CLASSES[:7]
"""The classes of version 0.1, whose folders are read as well."""


def door_name(auto_class: str) -> str:
    """Name of our class behind an Auto class: AutoModelForCausalLM → CompotForCausalLM."""
    return "CompotModel" if auto_class == "AutoModel" else auto_class.replace("AutoModel", "Compot")


def _auto_map(classes: Sequence[str]) -> dict[str, str]:
    return {
        "AutoConfig": "compot_modeling.CompotConfig",
        **{name: f"compot_modeling.{door_name(name)}" for name in classes},
    }


AUTO_MAP: Final = _auto_map(AUTO_CLASSES)

_KNOWN_MAPS: Final = (AUTO_MAP, _auto_map(_FIRST))


def _code(classes: Sequence[str]) -> str:
    return f'''\
"""This model was compressed by compot-deploy, and runs with it: ``import compot_deploy`` is all it takes."""

try:
    from compot_deploy.transformers_plugin import (
        CompotConfig,
{"".join(f"        {door_name(name)},{chr(10)}" for name in classes)}    )
except ImportError as error:
    raise ImportError(
        "The weights of this model are packed factors that only compot-deploy can unpack, and it is not "
        "installed here. Install it with: pip install compot-deploy"
    ) from error
'''


CODE_TEXT: Final = _code(AUTO_CLASSES)

KNOWN_CODE: Final = (
    CODE_TEXT,
    _code(_FIRST),
    _code(_FIRST).replace("compot_deploy.transformers_plugin", "compot_deploy.huggingface"),
)
"""What the file may hold: ours, and what version 0.1 wrote."""


def base_config(model: CompressedModel) -> dict[str, Any]:
    """The base configuration as it is stored: a packed table is shared by the layout, not by transformers."""
    return hide(tied_config(model.config, model.head, model.tied and not shares_packed_table(model)))


def hide(config: Mapping[str, Any]) -> dict[str, Any]:
    """A base configuration for `base_config`; `reveal` is the inverse."""
    without = ("auto_map", "quantization_config", "transformers_version", "_name_or_path", "compot")
    kept = {key: value for key, value in config.items() if key not in without}
    kept[BASE_TYPE] = kept.pop("model_type")
    return kept


def reveal(config: Mapping[str, Any]) -> dict[str, Any]:
    """A base configuration as transformers knows it."""
    found = dict(config)
    found["model_type"] = found.pop(BASE_TYPE)
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a compressed folder: our type, our auto_map, nothing that would run code.

    Raises:
        ArtifactError: it is missing, damaged, of another type, or points elsewhere.
    """
    path = folder / "config.json"
    config = read_object(path)
    check_config(config, str(path))
    return config


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration that is not ours or points to other code; see `read_config`."""
    if config.get("model_type") != MODEL_TYPE:
        raise ArtifactError(
            f"{where} is of the type {config.get('model_type')!r}, not {MODEL_TYPE!r}: compot-deploy did not "
            "write it."
        )
    auto_map = config.get("auto_map")
    if auto_map not in _KNOWN_MAPS:
        odd = auto_map if not isinstance(auto_map, Mapping) else _difference(auto_map)
        raise ArtifactError(
            f"{where}: auto_map points to {odd!r}, which is not the module that compot-deploy writes. It could "
            "run any code, so the folder is refused; export the model again."
        )
    base = config.get("base_config")
    if not isinstance(base, Mapping) or not isinstance(base.get(BASE_TYPE), str):
        raise ArtifactError(f"{where} lacks the configuration of the base model. Export the model again.")
    for key in ("auto_map", "quantization_config"):
        if base.get(key):
            raise ArtifactError(
                f"{where}: base_config has {key!r}, which a compressed model cannot have. Export it again."
            )
    if base[BASE_TYPE] == MODEL_TYPE or "model_type" in base:
        raise ArtifactError(f"{where}: base_config is itself a compressed model. Export the model again.")


def _difference(auto_map: Mapping[str, Any]) -> str:
    for name, target in auto_map.items():
        if AUTO_MAP.get(name) != target:
            return f"{target}"
    return f"{len(auto_map)} of {len(AUTO_MAP)} classes"
