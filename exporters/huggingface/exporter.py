"""The Hugging Face folder: safetensors and a configuration of our own type, for ``from_pretrained``.

::

    config.json  compot_modeling.py  generation_config.json  tokenizer files
    model.safetensors                      or shards of it, with model.safetensors.index.json

Factors are stored packed, at their true size, each shared dictionary once; see `compot_deploy.core.packed` for the
bytes and `compot_deploy.transformers_plugin.layout` for the configuration. What is given is written bit for bit, one
matrix in memory at a time but for the shard that is being filled. How a model keeps its weights is asked of
transformers, so any model goes.

A model of plain linears on bitsandbytes' grids with floating-point tables is written in bitsandbytes' own layout
instead, under the model type of the original, for everybody who has bitsandbytes: `bnb_folder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from compot_deploy.core.diagnostics import Diagnostic
from compot_deploy.core.grid import Grid
from compot_deploy.core.json_files import write_object
from compot_deploy.core.matrix import Dense, Factorized, Matrix, Quantized
from compot_deploy.core.packed import PackedStorage, pack
from compot_deploy.errors import ArtifactError, RecipeError
from compot_deploy.exporters.files import copy_generation, copy_present
from compot_deploy.exporters.huggingface.bnb import BnbStorage
from compot_deploy.exporters.huggingface.bnb_folder import is_bnb, read_bnb, write_bnb
from compot_deploy.exporters.huggingface.matrices import FolderMatrices, FolderTensors
from compot_deploy.exporters.huggingface.shards import Shards
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.experts import same_place
from compot_deploy.models.outline import outline_of, outline_of_config
from compot_deploy.models.source import TOKENIZER_FILES, ModelSource
from compot_deploy.transformers_plugin.folder import (
    AUTO_MAP,
    CODE,
    CODE_TEXT,
    KNOWN_CODE,
    MODEL_TYPE,
    POINTER,
    base_config,
    door_name,
    read_config,
    reveal,
)
from compot_deploy.transformers_plugin.layout import (
    Entry,
    dense_places,
    entry_of,
    from_json,
    leaf_name,
    loose_tensors,
    sharers,
    to_json,
)
from compot_deploy.transformers_plugin.modules import looks_up_rows
from compot_deploy.transformers_plugin.weight_files import check_tensors

SHARD_BYTES: Final = 2_000_000_000
"""A shard is closed before it grows beyond this; small enough for every file host."""


@dataclass(frozen=True)
class HuggingFaceOptions:
    """What there is to choose about the folder.

    Attributes:
        shard_bytes: a file is closed before it grows beyond this.
        layout: ``compot``, our own, for everything; ``bnb``, bitsandbytes' own, for plain linears on its grids.
    """

    shard_bytes: int = SHARD_BYTES
    layout: Literal["compot", "bnb"] = "compot"


@dataclass(frozen=True)
class HuggingFaceExporter:
    """CompressedModel in, transformers folder out, and back.

    Attributes:
        name: under which the exporter is known.
    """

    name: str = "huggingface"

    def options(self, recipe_options: Mapping[str, Any]) -> HuggingFaceOptions:
        """Bitsandbytes' layout for what it can hold whole: plain linears, tables as they are."""
        plain = recipe_options.get("quantizer") == "bnb" and recipe_options.get("method") == "plain"
        floating = recipe_options.get("embeddings") == recipe_options.get("head") == "none"
        return HuggingFaceOptions(layout="bnb" if plain and floating else "compot")

    def supports(self, source: ModelSource) -> str | None:
        """Every matrix of a block must be a linear of its own: that is what packed factors take the place of."""
        for site in source.layout.sites:
            kind = (
                type(source.meta.get_submodule(site.name)).__name__
                if site.is_module
                else "part of a parameter"
            )
            if kind not in ("Linear", "Conv1D"):
                return f"{site.name} of this {source.model_type} is a {kind}, and only linears are stored packed."
        return None

    def ways(self, source: ModelSource) -> Mapping[str, str | None]:
        """Packed factors and integers; bitsandbytes' layout is a matter of the recipe."""
        return {"packed": self.supports(source)}

    def context(self, config: Mapping[str, Any]) -> int | None:
        """As many positions as the model."""
        return None

    def storage(self, options: HuggingFaceOptions) -> PackedStorage | BnbStorage:
        """What a leaf takes in the file."""
        return BnbStorage() if options.layout == "bnb" else PackedStorage()

    def multiplies_out(self, options: HuggingFaceOptions) -> bool:
        """Factors are stored, not their product."""
        return False

    def check(
        self, source: ModelSource, grids: Mapping[str, Grid | None], options: HuggingFaceOptions
    ) -> None:
        """Refuse what cannot be stored; every grid can be.

        Raises:
            RecipeError: a packed table for an embedding that does more than look up rows, or linears that
                bitsandbytes' layout does not have.
        """
        table = source.layout.embedding
        if table is not None and grids.get("embedding") is not None:
            module = source.meta.get_submodule(table)
            if not looks_up_rows(module):
                raise RecipeError(
                    f"--embeddings: the token table of a {source.model_type} is a {type(module).__name__}, which does "
                    "more than to look up rows; use --embeddings none."
                )
        if options.layout == "bnb" and not all(site.transposed for site in source.layout.sites):
            raise RecipeError(
                f"--quantizer bnb: bitsandbytes' layout keeps linears as (out, in), and those of a {source.model_type} "
                "are (in, out); store tables as integers (--embeddings int8) for a layout of our own."
            )

    def write(self, model: CompressedModel, folder: Path, options: HuggingFaceOptions) -> None:
        """Write every file but the manifest into an existing folder."""
        self._write(model, folder, options, Shards(folder, options.shard_bytes))

    def dry_run(self, model: CompressedModel, folder: Path, options: HuggingFaceOptions) -> int:
        """Write as `write` does, for matrices of stand-ins; returns the bytes that the tensor files lack."""
        shards = Shards(folder, options.shard_bytes, counted=True)
        self._write(model, folder, options, shards)
        return shards.missing

    def _write(
        self, model: CompressedModel, folder: Path, options: HuggingFaceOptions, shards: Shards
    ) -> None:
        if options.layout == "bnb":
            write_bnb(model, folder, shards)
            return
        outline = outline_of(model)
        owners: dict[str, str] = {}
        entries: list[Entry] = []
        for name, matrix in model.matrices.items():
            if isinstance(matrix, Dense) and same_place(name) is None:
                for place in dense_places(model, outline, name):
                    shards.add(place, outline.stored(name, matrix.weight))
                continue
            entry = entry_of(name, matrix, owners)
            entries.append(entry)
            for tensor, value in _stored(entry, matrix):
                shards.add(tensor, value)
        for name, loose in loose_tensors(model, outline):
            shards.add(name, loose)
        shards.finish()
        entries += sharers(model, outline, entries)
        config = {
            "architectures": [door_name(outline.task.auto_class)],
            "auto_map": AUTO_MAP,
            "base_config": base_config(model),
            "compot": to_json(entries, type(outline.meta).__name__),
            # What loads the folder computes in the type of the original, as it would have done itself.
            "dtype": model.config.get("dtype") or model.config.get("torch_dtype") or "float32",
            "hidden_size": POINTER,
            "model_type": MODEL_TYPE,
        }
        write_object(folder / "config.json", config, indent=1)
        (folder / CODE).write_text(CODE_TEXT, encoding="utf-8", newline="\n")
        copy_generation(model.source, folder)
        copy_present(model.source, folder, TOKENIZER_FILES)

    def read(self, folder: Path) -> Mapping[str, Matrix]:
        """Every matrix of a folder, read when it is asked for.

        Raises:
            ArtifactError: files and configuration disagree, or point elsewhere.
        """
        return self.read_model(folder).matrices

    def read_model(self, folder: Path) -> CompressedModel:
        """The whole model of a folder, from its own files alone: what `write` was given.

        Raises:
            ArtifactError: a file is missing or damaged, or files and configuration disagree.
            UnsupportedModelError: a base model of a task that is not known here; load it with transformers.
        """
        if is_bnb(folder):
            return read_bnb(folder)
        where = str(folder / "config.json")
        config = read_config(folder)
        entries = from_json(config.get("compot"), where)
        base = {**reveal(config["base_config"]), "architectures": [config["compot"]["architecture"]]}
        outline = outline_of_config(base, where)
        if any(entry.owner is not None and entry.name == outline.layout.head for entry in entries):
            # The head uses the packed table of the embedding.
            base["tie_word_embeddings"] = True
            outline = outline_of_config(base, where)
        files = check_tensors(folder, entries, where)
        matrices = FolderMatrices(entries, files, outline, where)
        return outline.compressed(base, matrices, FolderTensors(files), str(folder))

    def lint(self, folder: Path) -> tuple[Diagnostic, ...]:
        """What is wrong about the structure of a folder; the first error hides what comes after it."""
        try:
            if is_bnb(folder):
                for matrix in read_bnb(folder).matrices.values():
                    _ = matrix.shape  # every linear is read and compared
                return ()
            config = read_config(folder)
            check_tensors(folder, from_json(config.get("compot"), "config.json"), "config.json")
        except ArtifactError as error:
            return (Diagnostic("error", "config.json", str(error)),)
        code = folder / CODE
        if not code.is_file() or code.read_text(encoding="utf-8") not in KNOWN_CODE:
            return (
                Diagnostic(
                    "error",
                    CODE,
                    "This file is code that trust_remote_code would run, and it is not the one that compot-deploy "
                    "writes: do not load the folder with trust_remote_code; export the model again.",
                ),
            )
        return ()


EXPORTER: Final = HuggingFaceExporter()
"""For whoever needs this one and not the table of all."""


def _stored(entry: Entry, matrix: Matrix) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a matrix itself stores."""
    if isinstance(matrix, Factorized):
        chain = [leaf for pair in matrix.pairs for leaf in (pair.dictionary, pair.codes)]
    else:
        chain = [matrix]
    if any((leaf.integers if isinstance(leaf, Quantized) else leaf.weight).is_meta for leaf in chain):
        for name, shape, dtype in entry.tensors():
            yield name, torch.empty(shape, dtype=dtype, device="meta")
        return
    own = {name for name, _, _ in entry.tensors()}
    for number, (leaf, scheme) in enumerate(zip(chain, entry.schemes, strict=True)):
        prefix = f"{entry.name}.{leaf_name(number, len(chain))}"
        if f"{prefix}.{next(iter(scheme.tensors))}" in own:
            for name, tensor in pack(leaf, scheme.pattern).items():
                yield f"{prefix}.{name}", tensor
