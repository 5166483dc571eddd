"""Any model class of transformers with compressed matrices in it.

The compressed model *is* the base class (a subclass made on demand), with its own configuration, so that
generation, pipelines, peft and everything else find what they expect. Only three things differ: some linears
are `CompotLinear`, loading (`compot_deploy.transformers_plugin.doors`) refuses what does not fit instead of filling
it with random numbers, and saving writes our configuration.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from compot_deploy.core.matrix import Matrix
from compot_deploy.errors import ArtifactError
from compot_deploy.models.experts import unstack
from compot_deploy.transformers_plugin.configuration import CompotConfig
from compot_deploy.transformers_plugin.folder import CODE, CODE_TEXT, hide
from compot_deploy.transformers_plugin.layout import Entry, to_json
from compot_deploy.transformers_plugin.modules import CompotEmbedding, CompotLinear, LeafModule, row_scale


class CompotMixin:
    """What a compressed model does differently; goes before the model class that it is mixed into."""

    config: Any
    _compot_base: type

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        unstack(self)  # type: ignore[arg-type]
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
                found[entry.name] = module.leaves[0].leaf()
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
        Entry(renamed[e.name], e.schemes, renamed[e.owner] if e.owner else None, e.dictionary)
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
    owner = made[entry.owner] if entry.owner else None
    if isinstance(old, nn.Embedding):
        if entry.factorized or not isinstance(owner, CompotEmbedding | None):
            raise ArtifactError(f"config.json lists {entry.name} with factors, and it is an embedding.")
        new = CompotEmbedding(entry.schemes[0], old.padding_idx, old.weight.dtype, row_scale(old), owner)
    else:
        new = CompotLinear(entry.schemes, bias=old.bias is not None, owner=owner)
        if old.bias is not None:
            new.bias = old.bias
    model.set_submodule(entry.name, new)
    return new


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear and Conv1D by path, in order; compressed ones and peft's own left out."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, CompotLinear)
    }
