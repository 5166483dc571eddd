"""The ONNX folder: one folder that onnxruntime, onnxruntime-genai, optimum and transformers.js read.

::

    config.json  generation_config.json  genai_config.json  tokenizer files
    onnx/model.onnx  onnx/model.onnx_data

The exporter never quantizes: what it is given is what it writes, bit for bit, and `OnnxExporter.read` gives it
back from the files alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from onnx import TensorProto

from compot_deploy.core.diagnostics import Diagnostic, errors
from compot_deploy.core.grid import Grid
from compot_deploy.core.json_files import write_object
from compot_deploy.core.matrix import Matrix
from compot_deploy.errors import RecipeError, UnsupportedModelError
from compot_deploy.exporters.onnx import traced
from compot_deploy.exporters.onnx.config import config_json, genai_config_json, generation_config_json
from compot_deploy.exporters.onnx.decoder import build_decoder
from compot_deploy.exporters.onnx.expansion import expansion_nodes, lint_folding
from compot_deploy.exporters.onnx.files import copy_tokenizer
from compot_deploy.exporters.onnx.lint.folder import errors_first, lint_onnx
from compot_deploy.exporters.onnx.matrices import FolderMatrices
from compot_deploy.exporters.onnx.options import OnnxOptions
from compot_deploy.exporters.onnx.shape import check_supported
from compot_deploy.exporters.onnx.storage import OnnxCodes, OnnxOps, OnnxStorage, unsupported_grid
from compot_deploy.exporters.onnx.tensors import DATA, GRAPH, data_of, external_extent, graphs_of, read_graph
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.configuration import read_config
from compot_deploy.models.decoder_shape import decoder_shape
from compot_deploy.models.generation import read_generation
from compot_deploy.models.hints import Architecture, find_architecture
from compot_deploy.models.source import ModelSource


@dataclass(frozen=True)
class OnnxExporter:
    """CompressedModel in, ONNX folder out, and back.

    Attributes:
        name: under which the exporter is known.
    """

    name: str = "onnx"

    def options(self, recipe_options: Mapping[str, Any]) -> OnnxOptions:
        """Options from a recipe's options (``onnx_ops``, ``onnx_codes``); others are ignored."""
        ops = recipe_options.get("onnx_ops", "matmulnbits")
        if ops not in get_args(OnnxOps):
            raise RecipeError(f"--onnx-ops {ops}: choose one of {', '.join(get_args(OnnxOps))}.")
        codes = recipe_options.get("onnx_codes", "dense")
        if codes not in get_args(OnnxCodes):
            raise RecipeError(f"--onnx-codes {codes}: choose one of {', '.join(get_args(OnnxCodes))}.")
        return OnnxOptions(ops=cast(OnnxOps, ops), codes=cast(OnnxCodes, codes))

    def supports(self, source: ModelSource) -> str | None:
        """Native graphs express most of what a configuration can ask for; everything else is traced."""
        if source.architecture is None:
            return traced.objection(source)
        try:
            check_supported(source.architecture, source.config)
        except UnsupportedModelError as error:
            return str(error)
        return None

    def ways(self, source: ModelSource) -> Mapping[str, str | None]:
        """A graph built by hand where there is one, otherwise torch's exporter."""
        return {"traced" if source.architecture is None else "native graph": self.supports(source)}

    def context(self, config: Mapping[str, Any]) -> int | None:
        """As many positions as the model."""
        return None

    def storage(self, options: OnnxOptions) -> OnnxStorage:
        """What a leaf takes in the file."""
        return OnnxStorage(
            ops=options.ops,
            float_bytes=4 if options.floats == "float32" else 2,
            codes=options.codes,
        )

    def multiplies_out(self, options: OnnxOptions) -> bool:
        """The graph multiplies with dictionary and codes, one after the other."""
        return False

    def check(self, source: ModelSource, grids: Mapping[str, Grid | None], options: OnnxOptions) -> None:
        """Refuse what cannot be written, before any work is done for it.

        Args:
            source: a model that `supports` has no objection to.
            grids: grid by role (``dictionary``, ``codes``, ``head`` and so on; the token embedding is
                ``embedding``), None for floating point.
            options: of the export.

        Raises:
            RecipeError: a grid that ONNX cannot store, or a context out of range.
            MissingDependencyError: a model that is traced, and no onnxscript, or a torch that is too old.
            UnsupportedModelError: a model that torch's exporter cannot trace.
        """
        for role, grid in grids.items():
            complaint = grid and unsupported_grid(grid, options.ops, role == "embedding", options.codes)
            if complaint:
                raise RecipeError(f"{role}: {complaint}")
        if source.architecture is None:
            traced.check(source)
            return
        longest = decoder_shape(source.architecture, source.config).context
        if options.context is not None and not 1 <= options.context <= longest:
            raise RecipeError(
                f"A context of {options.context} tokens is out of range: the model has 1 to {longest}."
            )

    def write(self, model: CompressedModel, folder: Path, options: OnnxOptions) -> tuple[str, ...]:
        """Write every file but the manifest into an existing folder, one matrix in memory at a time.

        Returns:
            What was left out, because the output does not depend on it.

        Raises:
            UnsupportedModelError, RecipeError: as `check`, and for a factorized embedding.
            ValueError: shapes that the configuration contradicts.
            InputError: a file of the original model cannot be read.
        """
        if model.architecture is None:
            return traced.write(model, folder, options)
        self._write_native(model, model.architecture, folder, options)
        return ()

    def _write_native(
        self, model: CompressedModel, architecture: Architecture, folder: Path, options: OnnxOptions
    ) -> None:
        graph, data = folder / GRAPH, folder / DATA
        graph.parent.mkdir(exist_ok=True)
        with data.open("wb") as file:
            proto = build_decoder(
                model,
                file,
                data.name,
                ops=options.ops,
                context=options.context,
                floats=options.floats,
                codes=options.codes,
            )
        graph.write_bytes(proto.SerializeToString(deterministic=True))
        source = Path(model.source) if model.source else None
        generation = generation_config_json(model.config, read_generation(source) if source else {})
        context = options.context or decoder_shape(architecture, model.config).context
        write_object(folder / "config.json", config_json(architecture, model.config, model.tied))
        write_object(folder / "generation_config.json", generation)
        write_object(
            folder / "genai_config.json",
            genai_config_json(architecture, model.config, generation, context, GRAPH),
        )
        if source is not None:
            copy_tokenizer(source, folder)

    def dry_run(self, model: CompressedModel, folder: Path, options: OnnxOptions) -> int:
        """Write as `write` does, for matrices of stand-ins; returns the bytes that the data file lacks."""
        self.write(model, folder, options)
        missing = 0
        for name in graphs_of(folder):
            graph = read_graph(folder / name).graph
            extents = [
                external_extent(tensor)[1]
                for tensor in graph.initializer
                if tensor.data_location == TensorProto.EXTERNAL
            ]
            end = max((extent.offset + extent.length for extent in extents), default=0)
            missing += end - (folder / data_of(name)).stat().st_size
        return missing

    def read(self, folder: Path) -> Mapping[str, Matrix]:
        """Every matrix of a folder, read back from the graph and its data file when it is asked for.

        Names, pairs and patterns come from the graph itself, not from the manifest.

        Raises:
            ArtifactError: the graph cannot be read, or was not written by this exporter.
        """
        return FolderMatrices(folder)

    def read_model(self, folder: Path) -> CompressedModel:
        """The whole model of a folder, from its own files alone: what `write` was given.

        Raises:
            ArtifactError: a file is missing or cannot be read.
            UnsupportedModelError: a configuration of another kind of model.
        """
        matrices = FolderMatrices(folder)
        if matrices.traced:
            return traced.read_model(folder, matrices)
        config = read_config(folder)
        architecture = find_architecture(config)
        return CompressedModel(
            architecture=architecture,
            config=config,
            matrices=matrices,
            tensors=matrices.vectors,
            tied=architecture.head not in matrices,
            source=str(folder),
        )

    def lint(self, folder: Path) -> tuple[Diagnostic, ...]:
        """What is wrong or remarkable about the structure of a folder.

        A folder with packed codes that is otherwise in order is also loaded in onnxruntime, if that is
        installed, to see whether it expands them once and for all: see `unfolded_nodes`.
        """
        diagnostics = lint_onnx(folder)
        if errors(diagnostics) or not expansion_nodes(folder):
            return diagnostics
        return errors_first((*diagnostics, *lint_folding(folder)))
