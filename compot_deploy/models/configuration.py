"""What a configuration means: the object that transformers builds of it is the one source of every setting.

config.json may leave out what has a default, hold what its class ignores, or say one thing twice in the styles of two
generations of transformers. So nobody reads a setting from the file: transformers builds its object, the ranges of
its numbers are checked, and everything else, calibration and exporters alike, takes what the object says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from compot_deploy.core.json_files import read_object
from compot_deploy.core.parsing import strict
from compot_deploy.errors import (
    ArtifactError,
    CompotDeployError,
    InputError,
    UnsupportedModelError,
    first_line,
)
from compot_deploy.models.hints import ARCHITECTURES
from compot_deploy.models.ranges import check_ranges
from compot_deploy.models.rotary import ROPE_KEYS, portable_config
from compot_deploy.models.weights import read_json

CONFIG: Final = "config.json"

_DROPPED: Final = ("transformers_version", "_name_or_path", "auto_map", "torch_dtype")
"""Keys that say nothing about the model."""

_MOST_LABELS: Final = 1_000_000
"""Of a classifier: transformers makes a name for each before anybody can look."""

_CONTEXT: Final = 2048
"""Tokens that a model is taken to read where its configuration does not say."""


def read_settings(folder: Path) -> Any:
    """The configuration of a model folder as transformers understands it.

    Raises:
        InputError: config.json is missing, damaged, refused by transformers, or has a number out of its range.
        UnsupportedModelError: a type that transformers does not know; a model that is quantized already.
    """
    from transformers import AutoConfig

    path = folder / CONFIG
    raw = read_json(folder, CONFIG)
    _check_raw(raw, path)
    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if raw.get("rope_parameters") and not hasattr(type(settings)(), "rope_parameters"):
            # transformers 4 does not know what version 5 writes, and would rotate by its defaults.
            settings = type(settings).from_dict(portable_config(raw))
    except Exception as error:  # transformers' own errors share no base class
        raise InputError(f"{path} is not understood: {_reason(error)}.") from None
    _check_settings(settings, raw, path)
    return settings


def settings_of(config: Mapping[str, Any], where: str, kind: type[CompotDeployError] = InputError) -> Any:
    """A configuration that is in memory as transformers understands it.

    Args:
        config: keys and values.
        where: for messages.
        kind: of the error.

    Raises:
        kind: transformers refuses it, or a number is out of its range.
        UnsupportedModelError: a type that transformers does not know.
    """
    path = Path(where)
    _check_raw(config, path)
    values = {k: v for k, v in config.items() if k not in ("auto_map", "quantization_config")}
    try:
        if any(key in values for key in ROPE_KEYS):
            values = portable_config(values)
        settings = for_model(values)
    except Exception as error:  # KeyError, TypeError, validation: whatever a damaged file provokes
        raise kind(f"{where} is not understood: {_reason(error)}.") from None
    try:
        check_ranges(settings, path)
    except InputError as error:
        raise kind(str(error)) from None
    return settings


def for_model(values: Mapping[str, Any]) -> Any:
    """A configuration as transformers' own object, with what it says of its head.

    T5's configuration takes every head for a tied one, and scales its input unless the file says that it is not tied.
    """
    from transformers import AutoConfig

    settings = AutoConfig.for_model(**values)
    for name in _ABOUT_HEADS:
        if name in values and hasattr(settings, name):
            setattr(settings, name, values[name])
    return settings


_ABOUT_HEADS: Final = ("tie_word_embeddings", "scale_decoder_outputs")


def config_of(settings: Any) -> dict[str, Any]:
    """What transformers understood, as a configuration in which every setting stands; JSON in the strict sense.

    Left out is what every configuration has and this one leaves at its default.

    Raises:
        InputError: a value that JSON does not know.
    """
    from transformers import PretrainedConfig

    every = PretrainedConfig().to_dict()
    try:
        values = settings.to_dict()
    except Exception as error:  # it makes names of types, for example, of whatever stands in their place
        raise InputError(
            f"The configuration of this {settings.model_type} cannot be written: {_reason(error)}."
        ) from None
    try:
        own = type(settings)().to_dict()
    except Exception:  # a class without defaults
        own = {}
    usual = {key for key, value in every.items() if own.get(key) == value}
    kept = {
        key: value
        for key, value in values.items()
        if key not in _DROPPED and not (key in usual and value == every[key])
    }
    kept["model_type"] = settings.model_type
    try:
        return dict(strict(kept))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The configuration of this {settings.model_type} cannot be written: {error}."
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an exported folder with every setting in it.

    Raises:
        ArtifactError: it is missing or damaged, or transformers refuses it.
        UnsupportedModelError: a type that transformers does not know.
    """
    path = folder / CONFIG
    return config_of(settings_of(read_object(path), str(path), ArtifactError))


def context_of(settings: Any) -> int:
    """Longest sequence that a model was made for, in tokens, as far as its configuration says."""
    return int(getattr(settings.get_text_config(), "max_position_embeddings", None) or _CONTEXT)


def _check_raw(config: Mapping[str, Any], path: Path) -> None:
    """Refuse what transformers would choke on, or would not say in a sentence."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{path}: the model type {model_type!r} is not supported: transformers does not know it, or it needs code "
            f"of its own, which is never run. Decoders with a native graph are {', '.join(sorted(ARCHITECTURES))}."
        )
    classes = config.get("architectures")
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ):
        raise InputError(f"{path}: architectures is {classes!r}, not a list of names of classes.")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key), Mapping | None):
            raise InputError(f"{path}: {key} is {config[key]!r}, not an object.")
    labels = config.get("num_labels")
    if isinstance(labels, int) and not 0 <= labels <= _MOST_LABELS:
        raise InputError(f"{path}: num_labels is {labels}, not between 0 and {_MOST_LABELS:,}.")
    for key in ("dtype", "torch_dtype"):
        named = config.get(key)
        if named is None or named == "auto" or isinstance(named, dict):
            continue
        found = getattr(torch, named.removeprefix("torch."), None) if isinstance(named, str) else None
        if not isinstance(found, torch.dtype):
            raise InputError(f"{path}: {key} is {named!r}, which is no type of torch's; float32 is one.")


def _check_settings(settings: Any, raw: Mapping[str, Any], path: Path) -> None:
    """Refuse a model that is quantized already, and numbers that no model has."""
    quantized = raw.get("quantization_config")
    if quantized is None:
        quantized = raw.get("compression_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
        if not method:
            raise InputError(
                f"{path}: quantization_config names no quant_method, and transformers refuses it. Remove the key, if "
                "the weights are floating point."
            )
        raise UnsupportedModelError(
            f"{path}: this checkpoint is quantized already ({method}). Give the one in floating point that it was made "
            "from."
        )
    check_ranges(settings, path)


def _reason(error: Exception) -> str:
    """What transformers says, its last line where that is the reason of a validation."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}".rstrip(".")[:300]
    if isinstance(error, KeyError):
        return f"{type(error).__name__}: {first_line(error)}"
    return first_line(error)[:300]
