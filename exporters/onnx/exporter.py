"""The ONNX folder: one folder that onnxruntime, onnxruntime-genai, optimum and transformers.js read.

::

    config.json  generation_config.json  genai_config.json  tokenizer files
    onnx/model.onnx  onnx/model.onnx_data

The exporter never quantizes: what it is given is what it writes, bit for bit, and `OnnxExporter.read` gives it
back from the files alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, get_args

import onnx
import torch
from onnx import NodeProto, TensorProto
from torch import Tensor

from compot_deploy.core.diagnostics import Finding, errors
from compot_deploy.core.grid import Codebook, Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, Leaf, Matrix, Pair, Quantized
from compot_deploy.errors import ArtifactError, InputError, RecipeError, UnsupportedModelError
from compot_deploy.exporters.onnx.config import (
    check_supported,
    config_json,
    decoder_shape,
    genai_config_json,
    generation_config_json,
    portable_tokenizer_config,
)
from compot_deploy.exporters.onnx.decoder import build_decoder
from compot_deploy.exporters.onnx.expansion import (
    THREE_BITS_TABLE,
    expansion_nodes,
    expansion_of,
    lint_folding,
)
from compot_deploy.exporters.onnx.graph import FloatType, Part
from compot_deploy.exporters.onnx.lint import errors_first, lint_onnx
from compot_deploy.exporters.onnx.tensors import DATA, GRAPH, TensorReader, external_extent
from compot_deploy.exporters.packing import (
    BNB_TYPES,
    Blocked,
    NBits,
    OnnxCodes,
    OnnxOps,
    OnnxStorage,
    ThreeBits,
    TwoOfFour,
    unpack_blocked,
    unpack_bnb4,
    unpack_nbits,
    unpack_three_bits,
    unpack_two_of_four,
    unsupported_grid,
)
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.hints import find_architecture
from compot_deploy.models.source import TOKENIZER_FILES, ModelSource


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
        generation = generation_config_json(model.config, _read_json(source, "generation_config.json"))
        context = options.context or decoder_shape(model.architecture, model.config).context
        write_json(folder / "config.json", config_json(model.architecture, model.config, model.tied))
        write_json(folder / "generation_config.json", generation)
        write_json(
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
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{folder / 'config.json'} cannot be read: {error}.") from None
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


class OnnxMatrices(Mapping[str, Matrix]):
    """The matrices of a graph by module path, in block order; each access reads one from the data file."""

    def __init__(self, path: Path) -> None:
        try:
            model = onnx.load(path, load_external_data=False)
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing.") from None
        except Exception as error:  # protobuf's own error types differ between its implementations
            raise ArtifactError(f"{path} is not an ONNX graph: {error}.") from None
        self._reader = TensorReader(model.graph, path.parent)
        self._producer = {output: node for node in model.graph.node for output in node.output if output}
        self._nodes: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            facts = _facts(node)
            if facts.get(Part.ROLE) in (Part.PLAIN, Part.CODES, Part.EMBEDDING):
                self._nodes.setdefault(facts.get(Part.MATRIX, ""), []).append(node)
        if not self._nodes:
            raise ArtifactError(f"{path} has no matrices that compot-deploy wrote.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def vectors(self) -> Mapping[str, Tensor]:
        """Norms and biases by checkpoint name; small enough to be read at once."""
        return {
            name: self._stored(name)
            for name, proto in self._reader.protos.items()
            if len(proto.dims) == 1 and name.endswith((".weight", ".bias"))
        }

    def __getitem__(self, name: str) -> Matrix:
        nodes = self._nodes[name]
        role = _facts(nodes[0]).get(Part.ROLE)
        if role == Part.EMBEDDING:
            return self._table(nodes[0])
        if role == Part.PLAIN:
            return self._leaf(nodes[0])
        return Factorized(tuple(self._pair(node) for node in nodes))

    def _pair(self, node: NodeProto) -> Pair:
        facts = _facts(node)
        source = self._producer.get(node.input[0])
        if source is None or _facts(source).get(Part.ROLE) != Part.DICTIONARY_ROLE:
            raise ArtifactError(f"The node {node.name} holds codes, but no dictionary feeds it.")
        kept, _, of = facts[Part.PATTERN].partition(":")
        return Pair(
            dictionary=self._leaf(source),
            codes=self._leaf(node),
            dictionary_name=facts[Part.DICTIONARY],
            pattern=Pattern(int(kept), int(of)),
        )

    def _leaf(self, node: NodeProto) -> Leaf:
        """The matrix that a product multiplies with."""
        if node.op_type == "MatMulNBits":
            grid = Grid(_attribute(node, "bits"), _attribute(node, "block_size"))
            expansion = expansion_of(node.input[1], self._producer)
            if expansion is not None:
                values = self._reader.bytes_of(expansion.values)
                values = values.view(*self._reader.protos[expansion.values].dims)
                if expansion.table == THREE_BITS_TABLE:
                    three_bits = ThreeBits(
                        values=values,
                        nibbles=self._reader.bytes_of(expansion.patterns),
                        scales=self._scales(node.input[2]),
                    )
                    return unpack_three_bits(three_bits, _attribute(node, "K"), Grid(3, grid.group))
                two_of_four = TwoOfFour(
                    values=values,
                    patterns=self._reader.bytes_of(expansion.patterns),
                    scales=self._scales(node.input[2]),
                )
                return unpack_two_of_four(two_of_four, _attribute(node, "K"), grid)
            return self._nbits(node.input[1], node.input[2], _attribute(node, "K"), grid)
        if node.op_type == "MatMulBnb4":
            return self._bnb4(node)
        weight = self._producer.get(node.input[1])
        if weight is not None and weight.op_type == "DequantizeLinear":
            integers = self._reader.protos[weight.input[0]]
            grid = Grid(4 if integers.data_type == TensorProto.INT4 else 8, _attribute(weight, "block_size"))
            packed = Blocked(self._reader.bytes_of(weight.input[0]), self._scales(weight.input[1]))
            return unpack_blocked(packed, int(integers.dims[0]), grid)
        return Dense(self._floats(node.input[1]))

    def _bnb4(self, node: NodeProto) -> Quantized:
        rows, outputs = _attribute(node, "K"), _attribute(node, "N")
        kinds = {number: name for name, number in BNB_TYPES.items()}
        grid = Grid(4, _attribute(node, "block_size"), cast(Codebook, kinds[_attribute(node, "quant_type")]))
        blob = self._reader.bytes_of(node.input[1]).view(outputs, rows // grid.group, grid.group // 2)
        return unpack_bnb4(NBits(blob, self._scales(node.input[2]).view(outputs, -1)), rows, grid)

    def _table(self, node: NodeProto) -> Leaf:
        """The token embedding, turned from (vocabulary, hidden) to (hidden, vocabulary)."""
        if node.op_type == "Gather":
            return Dense(self._floats(node.input[0]).T)
        grid = Grid(_attribute(node, "bits"), _attribute(node, "block_size"))
        return self._nbits(node.input[0], node.input[2], int(_facts(node)[Part.INPUTS]), grid)

    def _nbits(self, integers: str, scales: str, rows: int, grid: Grid) -> Quantized:
        stored = self._scales(scales)
        blob = self._reader.bytes_of(integers).view(*stored.shape, grid.group * grid.bits // 8)
        return unpack_nbits(NBits(blob, stored), rows, grid)

    def _scales(self, value: str) -> Tensor:
        """The float16 tensor behind the cast."""
        return self._stored(self._before_cast(value))

    def _floats(self, value: str) -> Tensor:
        return self._stored(self._before_cast(value))

    def _before_cast(self, value: str) -> str:
        node = self._producer.get(value)
        return str(node.input[0]) if node is not None and node.op_type == "Cast" else value

    def _stored(self, name: str) -> Tensor:
        data = self._reader.bytes_of(name).clone()  # the mapping is read-only, a matrix need not be
        proto = self._reader.protos[name]
        return data.view(_DTYPES[proto.data_type]).view(*proto.dims)


_DTYPES: Final = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}


def _facts(node: NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def _attribute(node: NodeProto, name: str) -> int:
    for attribute in node.attribute:
        if attribute.name == name:
            return int(attribute.i)
    raise ArtifactError(f"The node {node.name} has no attribute {name}.")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, readable in transformers 4 and 5."""
    for name in TOKENIZER_FILES:
        if name == "tokenizer_config.json":
            settings = _read_json(source, name)
            if settings:
                write_json(folder / name, portable_tokenizer_config(settings))
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _read_json(source: Path | None, name: str) -> dict[str, Any]:
    """A JSON object of the original model, empty where there is none."""
    if source is None or not (source / name).is_file():
        return {}
    try:
        value = json.loads((source / name).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{source / name} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{source / name} does not hold a JSON object.")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as every file of a folder has it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
