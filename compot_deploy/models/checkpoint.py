"""A checkpoint and the model that its configuration promises: which tensor fills which parameter, and what is refused.

Names may have the prefix of the base model or lack it, a tied table may be stored under either of its names, and old
files have old spellings. Everything here is decided from names, shapes and types; of the values only a head that
contradicts its configuration is looked at.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from compot_deploy.errors import InputError, UnsupportedModelError, a_few
from compot_deploy.models.experts import name_of_today, unstack
from compot_deploy.models.sites import blocks_of
from compot_deploy.models.skeleton import on_meta
from compot_deploy.models.tasks import Task
from compot_deploy.models.weights import Held, LazyTensors, Renamed

_COMPUTED: Final = (r"rotary_emb\.inv_freq$", r"position_ids$", r"\.masked_bias$")
"""Buffers that old checkpoints store, and that models compute."""

_OLD_NAMES: Final = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))

_FLOATS: Final = ("F64", "F32", "F16", "BF16")
"""Types of weights that are read, as safetensors calls them."""

_QUANTIZED: Final = re.compile(
    r"(weight_scale(_inv)?|weight_packed|weight_shape|weight_zero_point|weight_g_idx|input_scale|scale_inv|SCB|"
    r"absmax|quant_map|nested_absmax|nested_quant_map|qweight|qzeros|g_idx|scales|_quantization_metadata|"
    r"quant_state\..*|weight_format|blocks|[kv]_scale)$"
)
"""Last parts of names that quantized checkpoints of all kinds have beside, or in the place of, their weights."""

_ADAPTER: Final = re.compile(
    r"(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save|base_layer)\."
)
_VALUE_HEAD: Final = ("v_head.", "value_head.")
"""What reinforcement learning leaves beside a decoder: it reads the last hidden state, and nothing reads it."""

_ADAPTER_CONFIG: Final = "adapter_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model and the tensors that fill it.

    Attributes:
        settings: the configuration, its word about tied tables corrected where the files say otherwise.
        meta: the model on the device ``meta``.
        tensors: by name in the model, read on access.
        notes: what a report must say.
    """

    settings: Any
    meta: Any
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]


def match_checkpoint(folder: Path, files: LazyTensors, settings: Any, task: Task) -> Checkpoint:
    """The model of a configuration with every parameter found in the files, lazily where their names allow it.

    Some checkpoints are older than the code of their model: transformers renames, splits and stacks tensors while it
    loads them. Such a model is loaded as a whole.

    Raises:
        InputError: a tensor is missing, or of another shape than promised, or would be left out without a word.
        UnsupportedModelError: the checkpoint is quantized already, or is an adapter.
    """
    layers = getattr(settings.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > max(len(files), 1):  # before a model of a billion layers is made
        raise InputError(
            f"{folder}: config.json says num_hidden_layers {layers:,}, but the checkpoint has {len(files)} tensors."
        )
    meta, notes = on_meta(settings, task), []
    _check_kind(folder, set(files) - set(_names(files, meta).values()))
    tensors, unknown = _matched_or_loaded(folder, files, meta, task)
    untied = _heads_of_their_own(tensors, meta)
    if untied:
        settings = _untied(settings)
        meta = on_meta(settings, task)
        if _heads_of_their_own(tensors, meta):
            raise InputError(
                f"{folder}: {untied[0]} is not the embedding, and a {settings.model_type} always ties them."
            )
        tensors, unknown = _matched_or_loaded(folder, files, meta, task)
        notes.append(
            f"config.json ties {untied[0]} to the embedding, but the checkpoint has another table under that name: "
            "the checkpoint's is used, as in transformers 5"
        )
    ignored = _ignored(folder, unknown, meta, task)
    if ignored:
        notes.append(f"{a_few(ignored)} of the checkpoint is no part of the {task.noun} and is left out")
    return Checkpoint(settings, meta, tensors, tuple(notes))


def may_be_absent(name: str) -> bool:
    """Whether a checkpoint may lack a parameter: encoders may come without a pooler, which nothing here reads."""
    return ".pooler." in f".{name}"


def _check_kind(folder: Path, unknown: Collection[str]) -> None:
    """Refuse quantized checkpoints and adapters, which names that the model does not know tell."""
    if (folder / _ADAPTER_CONFIG).is_file():
        raise UnsupportedModelError(
            f"{folder} holds an adapter ({_ADAPTER_CONFIG}) beside the weights, which transformers would add to them. "
            "Merge it (peft: merge_and_unload), or remove its files."
        )
    names = sorted(unknown)
    adapter = next((name for name in names if _ADAPTER.search(name)), None)
    if adapter is not None:
        raise UnsupportedModelError(
            f"{folder}: {adapter} belongs to an adapter that is not merged. Merge it (peft: merge_and_unload)."
        )
    quantized = next(
        (name for name in names if _QUANTIZED.search(name.rpartition(".")[2]) or ".quant_state." in name),
        None,
    )
    if quantized is not None:
        raise UnsupportedModelError(
            f"{folder}: this checkpoint is quantized already, as {quantized} tells. Give the one in floating point "
            "that it was made from."
        )


def _matched_or_loaded(
    folder: Path, files: LazyTensors, meta: Any, task: Task
) -> tuple[Mapping[str, Tensor], set[str]]:
    """The tensors by their names in the model, and the names in the files that fill nothing."""
    unknown = set(files) - set(_names(files, meta).values())
    try:
        found = _matched(folder, files, meta)
    except InputError:
        loaded = _loaded(folder, task) if unknown else None
        if loaded is None:
            raise
        return loaded, set()
    return found, unknown - set(found.names.values())


def _ignored(folder: Path, unknown: Iterable[str], meta: Any, task: Task) -> list[str]:
    """Tensors that may be left out with a note.

    Heads of other tasks may be there beside an encoder; what is computed and not learned may be there anywhere.

    Raises:
        InputError: a weight that the model would compute without: biases that the configuration denies, for example.
    """
    computed = (*_COMPUTED, *(getattr(meta, "_keys_to_ignore_on_load_unexpected", None) or ()))
    prefix = f"{getattr(meta, 'base_model_prefix', '')}."
    inside = tuple(f"{path}." for path in blocks_of(meta))
    inside += tuple(path.removeprefix(prefix) for path in inside)
    # Masks, which older releases store: transformers 4 keeps them as buffers and names no pattern for them.
    buffers = {name.removeprefix(prefix) for name, _ in meta.named_buffers()}
    ignored = []
    for name in sorted(unknown):
        if any(re.search(pattern, name) for pattern in computed) or name.removeprefix(prefix) in buffers:
            continue
        if name.startswith(_VALUE_HEAD):
            ignored.append(name)
        elif task.generates or name.startswith(inside) or name.removeprefix(prefix).startswith(inside):
            raise InputError(
                f"{folder}: the model that config.json promises does not know: {name}. It would compute without it."
            )
    return ignored


def _loaded(folder: Path, task: Task) -> Mapping[str, Tensor] | None:
    """All weights as transformers loads them; None where it finds that some are missing, too."""
    import transformers

    try:
        model, found = getattr(transformers, task.auto_class).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype="auto", output_loading_info=True
        )
    except Exception:  # what is wrong was said better before
        return None
    missing = [key for key in found["missing_keys"] if not may_be_absent(key)]
    if missing or found["mismatched_keys"]:
        return None
    unstack(model)
    state = {name: value for name, value in model.state_dict().items() if name not in found["missing_keys"]}
    return Held(state, folder)


def _matched(folder: Path, files: LazyTensors, meta: Any) -> Renamed:
    """Every parameter of the model with the tensor of the checkpoint that holds it.

    Raises:
        InputError: a tensor is missing, or has another shape than the configuration says.
        UnsupportedModelError: a tensor of integers, of 8 bits or of complex numbers.
    """
    names, computed = _names(files, meta), dict[str, Tensor]()
    tied = _second_names(meta)
    for name, parameter in meta.named_parameters():
        stored = names.get(name) or next(
            (names[other] for other in tied.get(name, ()) if other in names), None
        )
        if stored is None:
            made = _computed(meta, name)
            if made is not None:
                computed[name] = made
            if made is not None or may_be_absent(name):
                continue
            hint = ""
            if ".".join(name.split(".")[-2:]) == "lm_head.weight":
                hint = ", and config.json does not tie it to the embedding"
            raise InputError(f"{folder}: the tensor {name} is missing; config.json promises it{hint}.")
        names[name] = stored
        if files.kind(stored) not in _FLOATS:
            raise UnsupportedModelError(
                f"{folder}: {stored} is of the type {files.kind(stored)}, and weights are read in floating point of 16 "
                "bits and more. Give the checkpoint that was not quantized."
            )
        shape, wanted = files.shape(stored), tuple(parameter.shape)
        if shape != wanted:
            raise InputError(f"{folder}: {stored} is {shape}, but config.json says {wanted}.")
    return Renamed(files, names, computed)


def _computed(meta: Any, name: str) -> Tensor | None:
    """A parameter that the model makes itself: sines and cosines of positions, which Marian does not store."""
    patterns = getattr(meta, "_keys_to_ignore_on_load_missing", None) or ()
    if not any(re.search(pattern, name) for pattern in patterns):
        return None
    path, _, last = name.rpartition(".")
    module = copy.deepcopy(meta.get_submodule(path)).to_empty(device="cpu")
    create = getattr(module, "create_weight", None)
    return None if create is None or last != "weight" else create().detach().float()


def _names(files: LazyTensors, meta: Any) -> dict[str, str]:
    """Name in the model to name in the files: as they are, with or without the prefix of the base model."""
    prefix = f"{meta.base_model_prefix}." if getattr(meta, "base_model_prefix", "") else ""
    current = {}
    for stored in files:
        name = stored
        for old, new in _OLD_NAMES:
            name = name.replace(old, new) if name.endswith(old) else name
        current[name] = stored
        current.setdefault(name_of_today(name), stored)
    found = {}
    for name in meta.state_dict():
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in current:
                found[name] = current[candidate]
                break
    return found


def _second_names(meta: Any) -> dict[str, tuple[str, ...]]:
    """Other names of parameters that stand in a model twice."""
    names: dict[int, list[str]] = {}
    for name, parameter in meta.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: tuple(group[1:]) for group in names.values() if len(group) > 1}


def _heads_of_their_own(tensors: Mapping[str, Tensor], meta: Any) -> tuple[str, ...]:
    """Names of heads that the configuration ties to the embedding, and that the files hold with other values."""
    if not isinstance(tensors, Renamed):
        return ()
    return tuple(
        other
        for name, others in _second_names(meta).items()
        for other in others
        if name in tensors
        and other in tensors
        and tensors.names[other] != tensors.names[name]
        and not torch.equal(tensors[name], tensors[other])
    )


def _untied(settings: Any) -> Any:
    """The same configuration with a head of its own."""
    made = type(settings).from_dict(json.loads(settings.to_json_string(use_diff=False)))
    for part in (made, made.get_text_config()):
        part.tie_word_embeddings = False
    return made
