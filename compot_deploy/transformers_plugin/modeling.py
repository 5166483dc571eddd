"""Any model class of transformers with compressed matrices in it, and the doors that lead to them.

The compressed model *is* the base class (a subclass made on demand), with its own configuration, so that
generation, pipelines, peft and everything else find what they expect. Only three things differ: some linears
are `CompotLinear`, loading refuses what does not fit instead of filling it with random numbers, and saving
writes our configuration.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compot_deploy.core.matrix import Dense, Matrix, Quantized
from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.transformers_plugin.configuration import CompotConfig
from compot_deploy.transformers_plugin.layout import (
    AUTO_CLASSES,
    CODE,
    CODE_TEXT,
    Entry,
    base_config,
    check_tensors,
    door_name,
    entry_of,
    hide,
    tied_head,
    to_json,
)
from compot_deploy.transformers_plugin.modules import CompotEmbedding, CompotLinear, LeafModule


class CompotMixin:
    """What a compressed model does differently; goes before the model class that it is mixed into."""

    config: Any
    _compot_base: type

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        config = self.config
        entries = CompotConfig(base_config=hide(config.to_dict()), compot=config.compot).entries()
        self._install(_relative(self, entries))

    def _install(self, entries: Sequence[Entry]) -> None:
        """Put empty compressed modules where the entries say."""
        model: Any = self
        made: dict[str, CompotLinear | CompotEmbedding] = {}
        for entry in entries:
            made[entry.name] = _replace(model, entry, made)
        self._compot_entries = tuple(entries)
        config = self.config
        config.compot = to_json(entries, self._compot_base.__name__)

    @property
    def compressed_matrices(self) -> dict[str, Matrix]:
        """The compressed matrices by module path, bit for bit, unpacked now."""
        model: Any = self
        found: dict[str, Matrix] = {}
        for entry in self._compot_entries:
            module = model.get_submodule(entry.name)
            if isinstance(module, CompotEmbedding):
                found[entry.name] = module.matrix.leaf()
            else:
                found[entry.name] = _linear(module).matrix_of(entry.dictionary or entry.name)
        return found

    def unpack(self) -> Any:
        """Keep every factor dequantized beside its packed form: memory for speed, the same numbers.

        Without it a factor is dequantized whenever it is used, which is little beside a long prompt and most of
        the time of a single token. Saving is not affected; moving the model undoes it.

        Returns:
            The model itself.
        """
        model: Any = self
        for module in model.modules():
            if isinstance(module, LeafModule):
                module.keep()
        return self

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it, with our configuration and the file that ``auto_map`` points to."""
        folder = Path(save_directory)
        if not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CODE).write_text(CODE_TEXT, encoding="utf-8")
        with self._stored_configuration():
            return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _stored_configuration(self) -> Iterator[None]:
        config = self.config
        self.config = CompotConfig(base_config=hide(config.to_dict()), compot=config.compot)
        try:
            yield
        finally:
            self.config = config


@functools.cache
def compressed_class(base: type, name: str) -> Any:
    """The subclass of a model class whose matrices are compressed."""
    return type(
        name, (CompotMixin, base), {"_compot_base": base, "__module__": __name__, "__doc__": base.__doc__}
    )


class Door:
    """What an Auto class finds under our type: it leads to the compressed class of the right base.

    Attributes:
        auto_class: name of the Auto class.
    """

    config_class = CompotConfig
    auto_class: str = "AutoModel"

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: CompotConfig | None = None, **kwargs: Any
    ) -> Any:
        """Load a compressed model; see ``transformers.AutoModel.from_pretrained`` for the arguments.

        Raises:
            ArtifactError: the files and the configuration disagree, or something is missing.
            InputError: an argument that would replace packed matrices.
        """
        if config is None:
            config = CompotConfig.from_pretrained(pretrained_model_name_or_path)
        if kwargs.get("quantization_config") is not None:
            raise InputError(
                "A compressed model is quantized already: load it without quantization_config, or quantize the "
                "original."
            )
        kwargs.pop("ignore_mismatched_sizes", None)
        entries, base = config.entries(), cls._base(config, kwargs)
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            check_tensors(folder, entries, str(folder / "config.json"))
        with_info = kwargs.pop("output_loading_info", False)
        concrete = cls._class(base)
        model, info = concrete.from_pretrained(
            pretrained_model_name_or_path, *args, config=base, output_loading_info=True, **kwargs
        )
        _refuse_gaps(model, info, str(config.compot["architecture"]), str(pretrained_model_name_or_path))
        return (model, info) if with_info else model

    @classmethod
    def _from_config(cls, config: CompotConfig, **kwargs: Any) -> Any:
        config.entries()
        base = cls._base(config, kwargs)
        return cls._class(base)._from_config(base, **kwargs)

    @classmethod
    def _base(cls, config: CompotConfig, kwargs: dict[str, Any]) -> Any:
        """The base configuration, with what the caller asked for."""
        base = config.base()
        for key in list(kwargs):
            if key != "dtype" and hasattr(base, key):
                setattr(base, key, kwargs.pop(key))
        # What an Auto class took for our configuration is meant for the base model.
        if config.id2label != CompotConfig().id2label:
            base.id2label, base.label2id = config.id2label, config.label2id
        for key in ("_attn_implementation", "output_attentions", "output_hidden_states"):
            if getattr(config, key, None):
                setattr(base, key, getattr(config, key))
        base.compot = config.compot
        return base

    @classmethod
    def _class(cls, base: Any) -> Any:
        mapping = getattr(transformers, cls.auto_class)._model_mapping
        if type(base) not in mapping:
            raise ArtifactError(
                f"A compressed {base.model_type} has no {cls.auto_class}: use the class that it was made from."
            )
        found = mapping[type(base)]
        if isinstance(found, tuple):
            names = base.architectures or ()
            found = next((kind for kind in found if kind.__name__ in names), found[0])
        return compressed_class(found, door_name(cls.auto_class))


DOORS: Final[Mapping[str, type[Door]]] = MappingProxyType(
    {
        door_name(name): type(door_name(name), (Door,), {"auto_class": name, "__doc__": Door.__doc__})
        for name in AUTO_CLASSES
    }
)
"""By their own names, as ``auto_map`` has them."""


def from_compressed(model: CompressedModel, *, dtype: torch.dtype = torch.float32) -> Any:
    """A compressed model in memory, as it would load from a folder that was exported from it.

    Args:
        model: what the exporters are given.
        dtype: of everything that is not packed.

    Raises:
        InputError: a tensor that the model class does not have.
    """
    owners: dict[str, str] = {}
    entries, values = [], {}
    for name, matrix in model.matrices.items():
        if isinstance(matrix, Dense):
            continue
        values[name] = matrix
        entries.append(entry_of(name, matrix, owners))
    table = model.matrices[model.architecture.embedding]
    if model.tied and isinstance(table, Quantized):
        entries.append(tied_head(model.architecture, entries))
    base = CompotConfig(base_config=base_config(model)).base()
    base_class = transformers.AutoModelForCausalLM._model_mapping[type(base)]
    base.compot = to_json(entries, base_class.__name__)
    made = compressed_class(base_class, door_name("AutoModelForCausalLM"))._from_config(base, dtype=dtype)
    for name, matrix in values.items():
        fill(made.get_submodule(name), matrix)
    state = {f"{name}.weight": m.weight.T for name, m in model.matrices.items() if isinstance(m, Dense)}
    state |= {name: model.tensors[name] for name in model.tensors if not name.endswith("rotary_emb.inv_freq")}
    parameters = dict(made.named_parameters(remove_duplicate=False))
    for name, tensor in state.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise InputError(f"The model has no tensor {name} of the shape {tuple(tensor.shape)} to fill.")
        with torch.no_grad():
            parameters[name].copy_(tensor)
    return made.eval()


def fill(module: nn.Module, matrix: Matrix) -> None:
    """Put the numbers of a matrix into its compressed module."""
    if isinstance(module, CompotEmbedding):
        assert isinstance(matrix, Quantized)
        module.matrix.fill(matrix)
    else:
        _linear(module).fill(matrix)


def _linear(module: nn.Module) -> CompotLinear:
    # peft puts its own module in the place of a linear and keeps the linear inside.
    inner = getattr(module, "base_layer", module)
    assert isinstance(inner, CompotLinear)
    return inner


def _relative(model: Any, entries: Sequence[Entry]) -> list[Entry]:
    """Entries by the paths of this class: a base model has no prefix, and a bare model no head."""
    names = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    renamed: dict[str, str] = {}
    for entry in entries:
        for candidate in (entry.name, entry.name.removeprefix(prefix), prefix + entry.name):
            if candidate in names:
                renamed[entry.name] = candidate
                break
        else:
            # A bare model leaves the head of the one that was saved behind, and nothing else.
            if model._compot_base.__name__ == model.config.compot["architecture"] or entry.name.startswith(
                prefix
            ):
                raise ArtifactError(
                    f"config.json lists {entry.name}, and {type(model).__name__} has no such module. Export the "
                    "model again."
                )
    return [
        Entry(renamed[e.name], e.forms, renamed[e.owner] if e.owner else None, e.dictionary)
        for e in entries
        if e.name in renamed
    ]


def _replace(
    model: Any, entry: Entry, made: Mapping[str, CompotLinear | CompotEmbedding]
) -> CompotLinear | CompotEmbedding:
    old = model.get_submodule(entry.name)
    if isinstance(old, nn.Embedding):
        shape = (old.embedding_dim, old.num_embeddings)
    elif isinstance(old, nn.Linear):
        shape = (old.in_features, old.out_features)
    elif isinstance(old, Conv1D):
        shape = (old.nx, old.nf)
    else:
        raise ArtifactError(
            f"config.json lists {entry.name}, which is a {type(old).__name__}: only linears and embeddings are "
            "compressed. Export the model again."
        )
    if shape != entry.shape:
        raise ArtifactError(
            f"config.json says that {entry.name} is {entry.shape[0]} x {entry.shape[1]}, and in the base model it "
            f"is {shape[0]} x {shape[1]}. Export the model again."
        )
    new: CompotLinear | CompotEmbedding
    if isinstance(old, nn.Embedding):
        if entry.factorized or entry.owner is not None:
            raise ArtifactError(f"config.json lists {entry.name} with factors, and it is an embedding.")
        new = CompotEmbedding(entry.forms[0], old.padding_idx, old.weight.dtype)
    else:
        owner = made[entry.owner] if entry.owner else None
        new = CompotLinear(entry.forms, bias=old.bias is not None, owner=owner)
        if old.bias is not None:
            new.bias = old.bias
    model.set_submodule(entry.name, new)
    return new


def _refuse_gaps(model: Any, info: Mapping[str, Any], saved: str, where: str) -> None:
    """Nothing that belongs to the model may be missing: transformers fills gaps with random numbers."""
    same = model._compot_base.__name__ == saved
    inside = f"{model.base_model_prefix}."
    has_head = hasattr(model, model.base_model_prefix)
    for problem, keys in (("lacks", info["missing_keys"]), ("has another size of", info["mismatched_keys"])):
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in keys)
        # A head of another class than the one saved is new: that is what fine-tuning begins with.
        gaps = [name for name in names if same or not has_head or name.startswith(inside)]
        if gaps:
            raise ArtifactError(
                f"{where} {problem} {gaps[0]} and {len(gaps) - 1} more tensors: nothing was loaded, because they "
                "would hold random numbers. Copy or export the model again."
            )


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear and Conv1D by path, in order; compressed ones and peft's own left out."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, CompotLinear)
    }


def weight_of(module: nn.Module) -> Tensor:
    """Weight of a linear or Conv1D as (in, out)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach() if isinstance(module, Conv1D) else weight.detach().T


for _door in DOORS.values():
    getattr(transformers, _door.auto_class).register(CompotConfig, _door, exist_ok=True)
