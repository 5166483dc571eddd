"""A model as it is found: a folder or a hub id, its task, its matrices, its weights read when they are needed.

Code that comes with a model is never run. What matrices there are, and of which shapes, is asked of the model that
transformers builds from the configuration, on the device ``meta``: nothing is declared twice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from compot_deploy.errors import InputError, UnsupportedModelError
from compot_deploy.models.hints import ARCHITECTURES, Architecture, find_architecture
from compot_deploy.models.sites import Layout, Site, blocks_of, discover
from compot_deploy.models.skeleton import on_meta, without_parameters
from compot_deploy.models.tasks import Task, task_of
from compot_deploy.models.weights import Held, LazyTensors, Renamed, read_json, weight_files

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that a tokenizer may consist of; copied along where present."""

_HUB_PATTERNS: Final = [
    "*.json",
    "*.safetensors",
    "tokenizer.model",
    "merges.txt",
    "*.jinja",
    "vocab.txt",
    "*/config.json",
]
_CONTEXT: Final = 2048
"""Tokens that a model is taken to read where its configuration does not say."""

_COMPUTED: Final = (r"rotary_emb\.inv_freq$", r"position_ids$", r"\.masked_bias$")
"""Buffers that old checkpoints store, and that models compute."""

_OLD_NAMES: Final = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))


@dataclass(frozen=True)
class ModelSource:
    """An opened model.

    Attributes:
        folder: where it is.
        config: config.json.
        settings: the configuration as transformers understands it, every default filled in.
        task: what the model is for.
        architecture: what exporters know about models of this type; None for most.
        tensors: weights by name in the model, read on access.
        files: the weight files.
    """

    folder: Path
    config: Mapping[str, Any]
    settings: Any
    task: Task
    architecture: Architecture | None
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]
    meta: Any = field(repr=False)
    """The model on the device ``meta``."""

    @cached_property
    def layout(self) -> Layout:
        """Blocks and matrices, from one forward pass of shapes.

        Raises:
            UnsupportedModelError: the pass cannot be made, or shows no matrices.
        """
        batch: dict[str, Any] = {"input_ids": torch.zeros(1, 4, dtype=torch.int64, device="meta")}
        try:
            layout = discover(self.meta, batch)
        except Exception as error:  # whatever a model's own code says
            raise UnsupportedModelError(
                f"A {self.model_type} cannot be looked at: its forward pass stops with {_first_line(error)}."
            ) from None
        if not layout.groups:
            raise UnsupportedModelError(
                f"A {self.model_type} has no linear layers in its blocks, so there is nothing to compress."
            )
        return layout

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        """Every matrix of the blocks, by name."""
        return {site.name: site for site in self.layout.sites}

    @cached_property
    def outside(self) -> tuple[str, ...]:
        """Linears that stand outside of the blocks and are no tables, by name: poolers, classifiers."""
        layout = self.layout
        return tuple(
            name
            for name, module in self.meta.named_modules()
            if isinstance(module, nn.Linear)
            and name not in self.sites
            and name not in (layout.embedding, layout.head)
            and f"{name}.weight" in self.tensors
            and not any(name.startswith(f"{block}.") for block in layout.blocks)
        )

    @property
    def model_type(self) -> str:
        """``model_type`` of the configuration."""
        return str(self.settings.model_type)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.layout.blocks)

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the embedding knows."""
        return int(self.settings.get_text_config().vocab_size)

    @property
    def context(self) -> int:
        """Longest sequence that the model was made for, in tokens."""
        longest = int(getattr(self.settings.get_text_config(), "max_position_embeddings", None) or _CONTEXT)
        for name, table in self.meta.named_modules():
            # RoBERTa and its relatives count positions from the one behind that of padding.
            if name.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None:
                longest = min(longest, table.num_embeddings - table.padding_idx - 1)
        return longest

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return self.layout.tied

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config.json and every weight file, in name order."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in self.files:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                for chunk in iter(lambda: file.read(1 << 22), b""):
                    digest.update(chunk)
        return digest.hexdigest()

    def shape(self, name: str) -> tuple[int, int]:
        """(in, out) of a matrix, (hidden, vocabulary) of a table, without reading its values."""
        if name in self.sites:
            return self.sites[name].shape
        outputs, inputs = self.meta.get_submodule(name).weight.shape
        return inputs, outputs

    def weight(self, name: str) -> Tensor:
        """Values of a matrix as (in, out), of a table as (hidden, vocabulary); a view of what is stored."""
        site = self.sites.get(name)
        if site is None:
            return self.tensors[f"{name}.weight"].T
        stored = self.tensors[site.parameter]
        stored = stored if site.index is None else stored[site.index]
        return stored.T if site.transposed else stored

    def skeleton(self, *, device: torch.device, dtype: torch.dtype, head: bool) -> Any:
        """The model with everything outside of its blocks in place; blocks stay on ``meta`` until `load`.

        Args:
            device: where it will run.
            dtype: of its parameters.
            head: also fill what comes behind the blocks: without, the table of an output head is not read.
        """
        model = without_parameters(self.settings, self.task, dtype)
        inside = tuple(f"{path}." for path in self.layout.blocks)
        last = self.layout.head
        state = {}
        for name in model.state_dict():
            behind = last is not None and name.startswith(f"{last}.")
            if not name.startswith(inside) and (head or not behind) and name in self.tensors:
                state[name] = self.tensors[name].to(device, dtype)
        model.load_state_dict(state, strict=False, assign=True)
        if head:
            model.tie_weights()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        return model

    def load(self, model: Any, block: str, *, device: torch.device, dtype: torch.dtype) -> None:
        """Read the weights of one block into a skeleton.

        Raises:
            InputError: a tensor is missing or damaged.
        """
        module = model.get_submodule(block)
        prefix = f"{block}." if block else ""
        state = {}
        for name in module.state_dict():
            if prefix + name in self.tensors:
                tensor = self.tensors[prefix + name]
                state[name] = tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        module.load_state_dict(state, strict=False, assign=True)

    def replace(
        self, module: nn.Module, block: str, weights: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        """Put other values in the place of matrices of a loaded block, by site name, as (in, out)."""
        prefix = f"{block}." if block else ""
        for name, weight in weights.items():
            site = self.sites[name]
            parameter = module.get_parameter(site.parameter.removeprefix(prefix))
            values = (weight.T if site.transposed else weight).to(parameter.device, dtype)
            if site.index is None:
                parent = module.get_submodule(site.parameter.removeprefix(prefix).rpartition(".")[0])
                setattr(parent, site.parameter.rpartition(".")[2], nn.Parameter(values, requires_grad=False))
            else:
                parameter.data[site.index] = values

    def unload(self, module: nn.Module) -> None:
        """Forget the weights of a block."""
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def open_source(model: str | Path, *, allow_pickle: bool = False, ask_hub: bool = True) -> ModelSource:
    """Open a local folder or a hub id; reads names and configuration, no weights.

    Args:
        model: a folder with config.json and safetensors, or a hub id such as ``org/name``.
        allow_pickle: read ``.bin`` files by torch's weights-only reader when there are no safetensors.
        ask_hub: ask the hub for a hub id; otherwise only what was had from it before is looked at.

    Raises:
        InputError: not there, not a transformers folder, damaged, or pickles without the flag.
        UnsupportedModelError: a model type, a class or a feature that is not handled.
    """
    folder = Path(model)
    if not folder.exists():
        folder = _download(str(model), ask_hub)
    if not folder.is_dir():
        raise InputError(f"{folder} is a file. Give the folder that holds config.json.")
    config = read_json(folder, "config.json")
    task = task_of(config)
    model_type = config.get("model_type")
    architecture = find_architecture(config) if model_type in ARCHITECTURES else None
    if architecture is not None:
        _check_sizes(folder, config)
    if task is not None and not task.generates:
        architecture = None  # hints are about decoders; a classifier of the same type has another head
    if task is None:
        (name,) = config["architectures"][:1]
        raise UnsupportedModelError(
            f"{folder}: a {name} is not supported: its head would be lost. Decoders, encoders, classifiers and masked "
            "language models of transformers are."
        )
    settings = _settings(folder, config)
    if getattr(settings, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{folder}: a {model_type} has an encoder and a decoder, which is not supported."
        )
    meta = on_meta(settings, task)
    files = LazyTensors(weight_files(folder, allow_pickle))
    tensors = _tensors(folder, files, meta, task)
    return ModelSource(
        folder=folder,
        config=config,
        settings=settings,
        task=task,
        architecture=architecture,
        tensors=tensors,
        files=tuple(sorted(set(files.files.values()))),
        meta=meta,
    )


def may_be_absent(name: str) -> bool:
    """Whether a checkpoint may lack a parameter: encoders may come without a pooler, which nothing here reads."""
    return ".pooler." in f".{name}"


def _check_sizes(folder: Path, config: Mapping[str, Any]) -> None:
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise InputError(
                f"{folder / 'config.json'}: {key} is {config.get(key)!r}, not a positive number."
            )


def _settings(folder: Path, config: Mapping[str, Any]) -> Any:
    """The configuration as transformers understands it."""
    from transformers import AutoConfig

    model_type = config.get("model_type")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers' own errors share no base class
        if isinstance(model_type, str) and model_type in ARCHITECTURES:
            raise InputError(f"{folder / 'config.json'} is not understood: {_first_line(error)}.") from None
        raise UnsupportedModelError(
            f"The model type {model_type!r} is not supported: transformers does not know it, or it needs code of its "
            f"own, which is never run. Decoders with a native graph are {', '.join(sorted(ARCHITECTURES))}."
        ) from None


def _tensors(folder: Path, files: LazyTensors, meta: Any, task: Task) -> Mapping[str, Tensor]:
    """The weights by their names in the model, lazily where the names of the files allow it.

    Some checkpoints are older than the code of their model: transformers renames, splits and stacks tensors while it
    loads them. Such a model is loaded as a whole.
    """
    unknown = set(files) - set(_names(files, meta).values())
    try:
        found = _matched(folder, files, meta)
    except InputError:
        loaded = _loaded(folder, task) if unknown else None
        if loaded is None:
            raise
        return loaded
    _check_nothing_is_lost(folder, unknown - set(found.names.values()), meta, task)
    return found


def _check_nothing_is_lost(folder: Path, unknown: set[str], meta: Any, task: Task) -> None:
    """Refuse weights that the model would compute without: biases that the configuration denies, for example.

    Heads of other tasks may be there beside an encoder; what is computed and not learned may be there anywhere.
    """
    computed = (*_COMPUTED, *(getattr(meta, "_keys_to_ignore_on_load_unexpected", None) or ()))
    prefix = f"{getattr(meta, 'base_model_prefix', '')}."
    inside = tuple(f"{path}." for path in blocks_of(meta))
    inside += tuple(path.removeprefix(prefix) for path in inside)
    # Masks, which older releases store: transformers 4 keeps them as buffers and names no pattern for them.
    buffers = {name.removeprefix(prefix) for name, _ in meta.named_buffers()}
    for name in sorted(unknown):
        if any(re.search(pattern, name) for pattern in computed) or name.removeprefix(prefix) in buffers:
            continue
        if task.generates or name.startswith(inside) or name.removeprefix(prefix).startswith(inside):
            raise InputError(
                f"{folder}: the model that config.json promises does not know: {name}. It would compute without it."
            )


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
    state = {name: value for name, value in model.state_dict().items() if name not in found["missing_keys"]}
    return Held(state, folder)


def _matched(folder: Path, files: LazyTensors, meta: Any) -> Renamed:
    """Every parameter of the model with the tensor of the checkpoint that holds it.

    Raises:
        InputError: a tensor is missing, or has another shape than the configuration says.
    """
    names = _names(files, meta)
    tied = _second_names(meta)
    for name, parameter in meta.named_parameters():
        stored = names.get(name) or next(
            (names[other] for other in tied.get(name, ()) if other in names), None
        )
        if stored is None:
            if may_be_absent(name):
                continue
            hint = ""
            if ".".join(name.split(".")[-2:]) == "lm_head.weight":
                hint = ", and config.json does not tie it to the embedding"
            raise InputError(f"{folder}: the tensor {name} is missing; config.json promises it{hint}.")
        names[name] = stored
        shape, wanted = files.shape(stored), tuple(parameter.shape)
        if shape != wanted:
            raise InputError(f"{folder}: {stored} is {shape}, but config.json says {wanted}.")
    return Renamed(files, names)


def _names(files: LazyTensors, meta: Any) -> dict[str, str]:
    """Name in the model to name in the files: as they are, with or without the prefix of the base model."""
    prefix = f"{meta.base_model_prefix}." if getattr(meta, "base_model_prefix", "") else ""
    current = {}
    for stored in files:
        name = stored
        for old, new in _OLD_NAMES:
            name = name.replace(old, new) if name.endswith(old) else name
        current[name] = stored
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _download(model: str, ask_hub: bool) -> Path:
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or "\\" in model:
        raise InputError(f"The folder {model} does not exist.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_PATTERNS, local_files_only=not ask_hub))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        if not ask_hub:
            raise InputError(
                f"there is no folder {model} here, and the hub is not asked for it unasked"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{model} is neither a local folder nor a model that the hub answers for ({reason})."
        ) from None
