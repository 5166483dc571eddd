"""A model as it is found: a folder or a hub id, its task, its matrices, its weights read when they are needed.

Code that comes with a model is never run. What matrices there are, and of which shapes, is asked of the model that
transformers builds from the configuration, on the device ``meta``: nothing is declared twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from compot_deploy.core.parsing import UnreadableError, decoded, json_of
from compot_deploy.errors import InputError, UnsupportedModelError
from compot_deploy.models import refusals
from compot_deploy.models.checkpoint import match_checkpoint
from compot_deploy.models.configuration import CONFIG, config_of, context_of, read_settings
from compot_deploy.models.example import example_of
from compot_deploy.models.generation import read_generation
from compot_deploy.models.hints import ARCHITECTURES, Architecture, find_architecture
from compot_deploy.models.sites import Layout, Site, discover
from compot_deploy.models.skeleton import on_meta, without_parameters
from compot_deploy.models.tasks import Task, task_of
from compot_deploy.models.weights import LazyTensors, weight_files

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
    "preprocessor_config.json",
    "processor_config.json",
    "normalizer.json",
)
"""Files that a tokenizer may consist of, and those that say how sound is read; copied along where present."""

_HUB_PROMISES: Final = ["config.json", "generation_config.json", "modules.json"]
"""What says which model it is."""

_HUB_PATTERNS: Final = [
    "*.json",
    "*.safetensors",
    "tokenizer.model",
    "merges.txt",
    "*.jinja",
    "vocab.txt",
    "*/config.json",
]


@dataclass(frozen=True)
class ModelSource:
    """An opened model.

    Attributes:
        folder: where it is.
        config: the configuration with every setting in it, as transformers understands config.json.
        settings: the same as transformers' own object.
        task: what the model is for.
        architecture: what exporters know about models of this type; None for most.
        tensors: weights by name in the model, read on access.
        files: the weight files.
        notes: what a report must say about the checkpoint.
    """

    folder: Path
    config: Mapping[str, Any]
    settings: Any
    task: Task
    architecture: Architecture | None
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    meta: Any = field(repr=False)
    """The model on the device ``meta``."""

    @cached_property
    def layout(self) -> Layout:
        """Blocks and matrices, from one forward pass of shapes.

        Raises:
            UnsupportedModelError: the pass cannot be made, or shows no matrices.
        """
        try:
            layout = discover(self.meta, example_of(self.meta, self.task))
        except Exception as error:  # whatever a model's own code says
            raise UnsupportedModelError(
                f"{self.folder}: {refusals.of_a_stopped_pass(self.meta, error)}"
            ) from None
        experts = refusals.stacked(self.meta, layout)
        if experts is not None:
            raise UnsupportedModelError(f"{self.folder}: {refusals.of_experts(self.meta, experts)}")
        if not layout.groups:
            raise UnsupportedModelError(f"{self.folder}: {refusals.of_no_sites(self.meta)}")
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
        longest = context_of(self.settings)
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

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ModelSource:
        """The same model with other values in its tensors, of the same names and shapes."""
        other = replace(self, tensors=tensors)
        # What is known of its matrices is of shapes only, and takes a forward pass to find.
        vars(other).update(layout=self.layout)
        return other

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
        state: dict[str, Tensor] = {}
        read: dict[str, Tensor] = {}
        stored = model.state_dict(keep_vars=True)
        homes = {id(value): name for name, value in stored.items() if name in self.tensors}
        for name, value in stored.items():
            behind = last is not None and name.startswith(f"{last}.")
            # Towers that read one table have it under names of their own.
            home = name if name in self.tensors else homes.get(id(value))
            if name.startswith(inside) or (behind and not head) or home is None:
                continue
            if home not in read:
                # A product is not the same to the last bit wherever in memory its numbers begin, and a file has them
                # anywhere; rows that are only looked up may stay there.
                read[home] = self.tensors[home].to(device, dtype, copy=head)
            state[name] = read[home]
        model.load_state_dict(state, strict=False, assign=True)
        if head:
            model.tie_weights()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
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
                wanted = dtype if tensor.is_floating_point() else tensor.dtype
                state[name] = tensor.to(device, wanted, copy=True)  # see `skeleton`
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
    folder, settings, task = _opened(model, ask_hub, _HUB_PATTERNS)
    config = config_of(settings)
    read_generation(folder)  # damage is found here, and not when the work is done
    files = LazyTensors(weight_files(folder, allow_pickle))
    checkpoint = match_checkpoint(folder, files, settings, task)
    native = task.generates and settings.model_type in ARCHITECTURES
    return ModelSource(
        folder=folder,
        config=config_of(checkpoint.settings),
        settings=checkpoint.settings,
        task=task,
        # Hints are about decoders; a classifier of the same type has another head.
        architecture=find_architecture(config) if native else None,
        tensors=checkpoint.tensors,
        files=tuple(sorted(set(files.files.values()))),
        notes=checkpoint.notes,
        meta=checkpoint.meta,
    )


def promised_source(model: str | Path, *, ask_hub: bool = True) -> ModelSource:
    """A model as its configuration alone promises it: every shape, no weights; the hub gives small files only.

    Raises:
        InputError: not there, or a damaged configuration.
        UnsupportedModelError: a model type, a class or a feature that is not handled.
    """
    folder, settings, task = _opened(model, ask_hub, _HUB_PROMISES)
    config, meta = config_of(settings), on_meta(settings, task)
    native = task.generates and settings.model_type in ARCHITECTURES
    return ModelSource(
        folder=folder,
        config=config,
        settings=settings,
        task=task,
        architecture=find_architecture(config) if native else None,
        tensors=dict(meta.named_parameters()),
        files=(),
        notes=(),
        meta=meta,
    )


def _opened(model: str | Path, ask_hub: bool, patterns: list[str]) -> tuple[Path, Any, Task]:
    """Folder, settings and task of a model."""
    folder = Path(model)
    if not folder.exists():
        folder = _download(str(model), ask_hub, patterns)
    if not folder.is_dir():
        raise InputError(f"{folder} is a file. Give the folder that holds config.json.")
    settings = read_settings(folder)
    task = _task(folder, config_of(settings))
    if getattr(settings, "is_encoder_decoder", False) and not task.has_towers:
        raise UnsupportedModelError(
            f"{folder}: a {settings.model_type} has an encoder and a decoder, and the class in config.json no head "
            "that writes, which is not supported. Name the class for generation under architectures."
        )
    return folder, settings, task


def _task(folder: Path, config: Mapping[str, Any]) -> Task:
    """What a model is for; a head is kept, or the model is refused."""
    classes: list[str] = config.get("architectures") or []
    if not classes and config["model_type"] not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{folder / CONFIG} names no class under architectures, so nobody can tell whether the model has a head, "
            "which would be lost. Add the class that it was saved from."
        )
    task = task_of(config)
    if task is None:
        raise UnsupportedModelError(
            f"{folder}: a {classes[0]} is not supported: its head would be lost. Decoders, encoders, classifiers and "
            "masked language models of transformers are."
        )
    if task.kind == "embedding":
        _check_sentence_layers(folder)
    return task


_POOLING: Final = ("Transformer", "Pooling", "Normalize")
"""Layers of sentence-transformers that have no weights but the model's."""


def _check_sentence_layers(folder: Path) -> None:
    """Refuse a sentence encoder with layers behind its pooling: a projection to other widths, for example."""
    path = folder / "modules.json"
    if not path.is_file():
        return
    try:
        layers = json_of(decoded(path.read_bytes()))
        kinds = [str(layer["type"]).rpartition(".")[2] for layer in layers]
    except (OSError, UnreadableError, TypeError, KeyError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from None
    strange = next((kind for kind in kinds if kind not in _POOLING), None)
    if strange is not None:
        raise UnsupportedModelError(
            f"{path} puts a layer {strange} behind the encoder, which would be lost. Sentence encoders of "
            f"{', '.join(_POOLING)} are supported."
        )


def _download(model: str, ask_hub: bool, patterns: list[str]) -> Path:
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or "\\" in model:
        raise InputError(f"The folder {model} does not exist.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            model,
            allow_patterns=patterns,
            ignore_patterns=["consolidated*"],
            local_files_only=not ask_hub,
        )
        return Path(found)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        if not ask_hub:
            raise InputError(
                f"there is no folder {model} here, and the hub is not asked for it unasked"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{model} is neither a local folder nor a model that the hub answers for ({reason})."
        ) from None
