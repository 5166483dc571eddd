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

import onnx
from onnx import TensorProto

from compot_deploy.core.diagnostics import Finding, errors
from compot_deploy.core.grid import Grid
from compot_deploy.core.json_files import read_object, write_object
from compot_deploy.core.matrix import Matrix
from compot_deploy.errors import RecipeError, UnsupportedModelError
from compot_deploy.exporters.onnx.config import config_json, genai_config_json, generation_config_json
from compot_deploy.exporters.onnx.decoder import build_decoder
from compot_deploy.exporters.onnx.expansion import expansion_nodes, lint_folding
from compot_deploy.exporters.onnx.files import copy_tokenizer, read_optional
from compot_deploy.exporters.onnx.lint.folder import errors_first, lint_onnx
from compot_deploy.exporters.onnx.matrices import OnnxMatrices
from compot_deploy.exporters.onnx.nodes import FloatType
from compot_deploy.exporters.onnx.shape import check_supported, decoder_shape
from compot_deploy.exporters.onnx.storage import OnnxCodes, OnnxOps, OnnxStorage, unsupported_grid
from compot_deploy.exporters.onnx.tensors import DATA, GRAPH, external_extent
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.hints import find_architecture
from compot_deploy.models.source import ModelSource


@dataclass(frozen=True)
class OnnxOptions:
    """What there is to choose about the folder.

    Attributes:
        ops: ``matmulnbits``: the contrib operator, 2, 4 and 8 bits; ``qdq``: linears as the standard
            DequantizeLinear and MatMul, 4 and 8 bits, which ONNX Runtime fuses to the same kernel when it
            loads. Attention, norms and the embedding are contrib operators either way.
        context: longest sequence, prompt and answer together; None takes the model's own. The rotary tables
            take 4·head_size bytes for each token of it.
        floats: type in which floating-point matrices are stored. It must hold them exactly; bfloat16 and
            float16 halve the file of an unquantized checkpoint of that type, and are cast when loaded.
        codes: ``dense``: an exact zero takes as much as any other code; ``packed``: 4-bit codes of the
            pattern 2:4 take 3 bits in the file instead of 4, and integers of 3 bits can be written at all; both
            are expanded when the file is loaded, to the graph, speed and memory of 4 bits. Others lie dense
            either way. Only with ``matmulnbits``.

    Raises:
        RecipeError: packed codes with ``qdq``.
    """

    ops: OnnxOps = "matmulnbits"
    context: int | None = None
    floats: FloatType = "float32"
    codes: OnnxCodes = "dense"

    def __post_init__(self) -> None:
        if self.codes == "packed" and self.ops != "matmulnbits":
            raise RecipeError(
                f"--onnx-codes packed expands to MatMulNBits and cannot be written as --onnx-ops {self.ops}: "
                "leave one of them out."
            )


@dataclass(frozen=True)
class OnnxExporter:
    """CompressedModel in, ONNX folder out, and back.

    Attributes:
        name: under which the exporter is known.
    """

    name: str = "onnx"

    def options(self, knobs: Mapping[str, Any]) -> OnnxOptions:
        """Options from a recipe's knobs (``onnx_ops``, ``onnx_codes``); others are ignored."""
        ops = knobs.get("onnx_ops", "matmulnbits")
        if ops not in get_args(OnnxOps):
            raise RecipeError(f"--onnx-ops {ops}: choose one of {', '.join(get_args(OnnxOps))}.")
        codes = knobs.get("onnx_codes", "dense")
        if codes not in get_args(OnnxCodes):
            raise RecipeError(f"--onnx-codes {codes}: choose one of {', '.join(get_args(OnnxCodes))}.")
        return OnnxOptions(ops=cast(OnnxOps, ops), codes=cast(OnnxCodes, codes))

    def supports(self, source: ModelSource) -> str | None:
        """Whether the graph can express what the configuration asks for."""
        if source.architecture is None:
            return f"there is no graph for a {source.model_type} here."
        try:
            check_supported(source.architecture, source.config)
        except UnsupportedModelError as error:
            return str(error)
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
        """
        for role, grid in grids.items():
            complaint = grid and unsupported_grid(grid, options.ops, role == "embedding", options.codes)
            if complaint:
                raise RecipeError(f"{role}: {complaint}")
        assert source.architecture is not None
        longest = decoder_shape(source.architecture, source.config).context
        if options.context is not None and not 1 <= options.context <= longest:
            raise RecipeError(
                f"A context of {options.context} tokens is out of range: the model has 1 to {longest}."
            )

    def write(self, model: CompressedModel, folder: Path, options: OnnxOptions) -> None:
        """Write every file but the manifest into an existing folder, one matrix in memory at a time.

        Raises:
            UnsupportedModelError, RecipeError: as `check`, and for a factorized embedding.
            ValueError: shapes that the configuration contradicts.
            InputError: a file of the original model cannot be read.
        """
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
        generation = generation_config_json(model.config, read_optional(source, "generation_config.json"))
        context = options.context or decoder_shape(model.architecture, model.config).context
        write_object(folder / "config.json", config_json(model.architecture, model.config, model.tied))
        write_object(folder / "generation_config.json", generation)
        write_object(
            folder / "genai_config.json",
            genai_config_json(model.architecture, model.config, generation, context, GRAPH),
        )
        if source is not None:
            copy_tokenizer(source, folder)

    def rehearse(self, model: CompressedModel, folder: Path, options: OnnxOptions) -> int:
        """Write as `write` does, for matrices of stand-ins; returns the bytes that the data file lacks."""
        self.write(model, folder, options)
        graph = onnx.load(folder / GRAPH, load_external_data=False).graph
        extents = [
            external_extent(tensor)[1]
            for tensor in graph.initializer
            if tensor.data_location == TensorProto.EXTERNAL
        ]
        end = max((extent.offset + extent.length for extent in extents), default=0)
        return end - (folder / DATA).stat().st_size

    def read(self, folder: Path) -> Mapping[str, Matrix]:
        """Every matrix of a folder, read back from the graph and its data file when it is asked for.

        Names, pairs and patterns come from the graph itself, not from the manifest.

        Raises:
            ArtifactError: the graph cannot be read, or was not written by this exporter.
        """
        return OnnxMatrices(folder / GRAPH)

    def read_model(self, folder: Path) -> CompressedModel:
        """The whole model of a folder, from its own files alone: what `write` was given.

        Raises:
            ArtifactError: a file is missing or cannot be read.
            UnsupportedModelError: a configuration of another kind of model.
        """
        matrices = OnnxMatrices(folder / GRAPH)
        config = read_object(folder / "config.json")
        architecture = find_architecture(config)
        return CompressedModel(
            architecture=architecture,
            config=config,
            matrices=matrices,
            tensors=matrices.vectors,
            tied=architecture.head not in matrices,
            source=str(folder),
        )

    def lint(self, folder: Path) -> tuple[Finding, ...]:
        """What is wrong or remarkable about the structure of a folder.

        A folder with packed codes that is otherwise in order is also loaded in onnxruntime, if that is
        installed, to see whether it expands them once and for all: see `unfolded_nodes`.
        """
        findings = lint_onnx(folder)
        if errors(findings) or not expansion_nodes(folder):
            return findings
        return errors_first((*findings, *lint_folding(folder)))
