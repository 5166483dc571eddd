"""The GGUF folder: one file for llama.cpp, beside what transformers needs to read the tokenizer.

::

    model.gguf
    config.json  generation_config.json  tokenizer files

The exporter stores factors exactly in the layouts ``factorized`` and ``sparse``. The layout ``dense`` multiplies
them out and stores the product in a type of llama.cpp's, which rounds: what such a file holds is what is read
back from it, and what it is evaluated by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, get_args

from compot_deploy.core.diagnostics import Diagnostic
from compot_deploy.core.grid import Grid
from compot_deploy.core.json_files import write_object
from compot_deploy.core.matrix import Matrix
from compot_deploy.errors import ArtifactError, RecipeError, UnsupportedModelError
from compot_deploy.exporters.files import copy_generation, copy_present
from compot_deploy.exporters.gguf import quantize as gguf_quantize
from compot_deploy.exporters.gguf.index import LAYOUTS, Layout
from compot_deploy.exporters.gguf.metadata import Described, check_layout, describe
from compot_deploy.exporters.gguf.model import read
from compot_deploy.exporters.gguf.names import GgufNames, loose_names, owner_of
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.reader import read_header
from compot_deploy.exporters.gguf.storage import GgufStorage, ProductStorage
from compot_deploy.exporters.gguf.tokenizer import tokenizer_keys
from compot_deploy.exporters.gguf.writer import write, write_header
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.configuration import CONFIG, read_config
from compot_deploy.models.hints import ARCHITECTURES, find_architecture
from compot_deploy.models.outline import outline_of_config
from compot_deploy.models.rotary import portable_config
from compot_deploy.models.source import TOKENIZER_FILES, ModelSource

FILE: Final = "model.gguf"


@dataclass(frozen=True)
class GgufExporter:
    """CompressedModel in, folder with a GGUF file out, and back.

    Attributes:
        name: under which the exporter is known.
    """

    name: str = "gguf"

    def options(self, recipe_options: Mapping[str, Any]) -> GgufOptions:
        """Options from a recipe's options (``gguf_layout``, ``gguf_type``); others are ignored.

        What is known of a run besides its options may be among them: ``importance``, a mapping of linears to the
        diagonals of their Grams, and ``provenance``, texts by name.

        Raises:
            RecipeError: a layout or type that does not exist, or a type for a layout that carries integers over.
        """
        layout = recipe_options.get("gguf_layout") or "dense"
        if layout not in get_args(Layout):
            raise RecipeError(f"--gguf-layout {layout}: choose one of {', '.join(get_args(Layout))}.")
        kind = str(recipe_options.get("gguf_type") or "auto")
        if kind != "auto":
            gguf_quantize.check_type(kind)
        if kind != "auto" and layout != "dense":
            raise RecipeError(
                f"--gguf-type {kind} is for the layout dense; {layout} carries the integers over as they are: "
                "leave out one of the two."
            )
        return GgufOptions(
            layout=cast(Layout, layout),
            type=kind,
            importance=recipe_options.get("importance"),
            provenance=recipe_options.get("provenance") or {},
        )

    def supports(self, source: ModelSource) -> str | None:
        """Llama.cpp has code for each kind of model, knows tensors by names of its own, and has much built in."""
        if not source.task.generates:
            return (
                f"GGUF has no way for a {source.model_type} that is a {source.task.noun} here: models that write text "
                "have one."
            )
        try:
            _checked(source)
        except UnsupportedModelError as error:
            return str(error)
        return None

    def ways(self, source: ModelSource) -> Mapping[str, str | None]:
        """The three layouts."""
        objection = self.supports(source)
        return {layout: objection or _layout_objection(source, layout) for layout in LAYOUTS}

    def context(self, config: Mapping[str, Any]) -> int | None:
        """Those within which llama.cpp computes what transformers does."""
        return describe(config).promised

    def storage(self, options: GgufOptions) -> GgufStorage | ProductStorage:
        """What a leaf takes in the file."""
        return ProductStorage(options.type) if options.layout == "dense" else GgufStorage(options.layout)

    def multiplies_out(self, options: GgufOptions) -> bool:
        """Whether the file holds products of dictionary and codes, in llama.cpp's own types."""
        return options.layout == "dense"

    def check(self, source: ModelSource, grids: Mapping[str, Grid | None], options: GgufOptions) -> None:
        """Refuse what cannot be written, before any work is done for it.

        Raises:
            RecipeError: a grid that the layout cannot store exactly.
            UnsupportedModelError: a tensor, a rotary embedding or a tokenizer that llama.cpp does not know.
            MissingDependencyError: a type that only llama.cpp's library writes, and it is not installed.
        """
        if options.type != "auto":
            gguf_quantize.check_library(options.type)
        described = _checked(source)
        tokenizer_keys(source.folder, source.config)
        if options.layout == "dense":
            return  # any grid is multiplied out
        check_layout(described, options.layout)
        storage = GgufStorage(options.layout)
        for role, grid in grids.items():
            try:
                storage.check(int(source.settings.hidden_size), grid)
            except RecipeError as error:
                raise RecipeError(f"{role}: {error}") from None

    def write(self, model: CompressedModel, folder: Path, options: GgufOptions) -> tuple[str, ...]:
        """Write every file but the manifest into an existing folder; returns what differs from what was asked."""
        written = write(model, folder / FILE, options)
        _copy_files(model, folder)
        return written.notes

    def dry_run(self, model: CompressedModel, folder: Path, options: GgufOptions) -> int:
        """Write as `write` does, for matrices of stand-ins; returns the bytes that the file lacks."""
        _copy_files(model, folder)
        return write_header(model, folder / FILE, options)

    def read(self, folder: Path) -> Mapping[str, Matrix]:
        """Every matrix of the file, integers and scales bit for bit."""
        return self.read_model(folder).matrices

    def read_model(self, folder: Path) -> CompressedModel:
        """The whole model of a folder, from its own files alone.

        Raises:
            ArtifactError: a file is missing or cannot be read.
        """
        config = read_config(folder)
        if config["model_type"] not in ARCHITECTURES:
            outline = outline_of_config(config, str(folder / CONFIG))
            stored = read(folder / FILE, outline)
            return outline.compressed(config, stored.matrices, stored.tensors, str(folder))
        stored = read(folder / FILE)
        return CompressedModel(
            architecture=find_architecture(config),
            config=config,
            matrices=stored.matrices,
            tensors=stored.tensors,
            tied=stored.tied,
            source=str(folder),
        )

    def lint(self, folder: Path) -> tuple[Diagnostic, ...]:
        """What is wrong about the structure of the file; a damaged one is a single diagnostic."""
        try:
            read_header(folder / FILE)
        except ArtifactError as error:
            return (Diagnostic("error", FILE, str(error)),)
        return ()


def _layout_objection(source: ModelSource, layout: Layout) -> str | None:
    try:
        check_layout(describe(source.config), layout)
    except UnsupportedModelError as error:
        return str(error)
    return None


def _checked(source: ModelSource) -> Described:
    """What llama.cpp is told of a model, with a name for each of its tensors.

    Raises:
        UnsupportedModelError: a type, a feature or a tensor that llama.cpp does not have.
    """
    described = describe(source.config)
    tensors = loose_names(source.tensors)
    names = GgufNames(described.kind, described.sizes, (owner_of(name)[0] for name in tensors))
    for name in tensors:
        names.tensors(name)
    return described


def _copy_files(model: CompressedModel, folder: Path) -> None:
    """What stands beside the file, for whoever reads the tokenizer or checks the folder."""
    write_object(folder / CONFIG, portable_config(model.stored_config))
    copy_generation(model.source, folder)
    copy_present(model.source, folder, TOKENIZER_FILES)
