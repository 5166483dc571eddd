"""The ONNX folder of a model that has no native graph: its forward pass is traced.

Encoders, classifiers and decoders outside of `compot_deploy.models.hints` come this way. A decoder gets the inputs and
outputs that a native graph has, caches and left padding included, so everything that reads those folders reads this
one. The difference: attention is the standard operator, not GroupQueryAttention, so the cache is copied for each token
and decoding is slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from compot_deploy.core.json_files import write_object
from compot_deploy.errors import UnsupportedModelError
from compot_deploy.exporters.onnx.assembly import assemble
from compot_deploy.exporters.onnx.config import GenaiDecoder, genai_json, generation_config_json
from compot_deploy.exporters.onnx.files import copy_sentence_files, copy_tokenizer
from compot_deploy.exporters.onnx.graph import GraphBuilder
from compot_deploy.exporters.onnx.interface import Interface, towers_of
from compot_deploy.exporters.onnx.matrices import FolderMatrices
from compot_deploy.exporters.onnx.options import OnnxOptions
from compot_deploy.exporters.onnx.tensors import GRAPH, TensorWriter, data_of
from compot_deploy.exporters.onnx.tracing import Trace, traces
from compot_deploy.models.compressed import CompressedModel, tied_config
from compot_deploy.models.configuration import for_model, read_config
from compot_deploy.models.generation import read_generation
from compot_deploy.models.outline import outline_of_config
from compot_deploy.models.rotary import portable_config
from compot_deploy.models.source import ModelSource

_PLAIN_NAMES: Final = ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")
"""Names of sizes that consumers know; a configuration may have names of its own for them."""


def objection(source: ModelSource) -> str | None:
    """Why a model cannot be traced, as far as its shapes tell; None if it can be."""
    stacked = next((site.name for site in source.layout.sites if not site.is_module), None)
    if stacked is not None:
        return f"{stacked} of this {source.model_type} is a part of a larger parameter, which ONNX cannot hold apart."
    try:
        towers_of(source.meta, source.task)
    except UnsupportedModelError as error:
        return str(error)
    return None


def check(source: ModelSource) -> None:
    """Trace the model, so that what torch's exporter cannot do is known before any work.

    Raises:
        MissingDependencyError, UnsupportedModelError: see `traces`.
    """
    layout = source.layout
    traces(tied_config(source.config, layout.head, layout.tied), source.task)


def write(model: CompressedModel, folder: Path, options: OnnxOptions) -> tuple[str, ...]:
    """Write the folder; returns what was left out of it."""
    config = model.stored_config
    made = traces(config, model.task)
    for place, traced in made.items():
        graph, data = folder / place, folder / data_of(place)
        graph.parent.mkdir(exist_ok=True)
        with data.open("wb") as file:
            builder = GraphBuilder(
                TensorWriter(file, data.name), options.floats, ops=options.ops, codes=options.codes
            )
            proto = assemble(traced, model.matrices, model.tensors, builder)
        graph.write_bytes(proto.SerializeToString(deterministic=True))
    source = Path(model.source) if model.source else None
    _write_files(next(iter(made.values())), config, source, folder)
    held = set(FolderMatrices(folder))
    missing = [name for name in model.matrices if name not in held]
    return tuple(f"{name} is left out: the output does not depend on it." for name in missing)


def read_model(folder: Path, matrices: FolderMatrices) -> CompressedModel:
    """The whole model of a folder, from its own files alone.

    Raises:
        ArtifactError: config.json cannot be read.
        UnsupportedModelError: a configuration that transformers has no model for.
    """
    config = read_config(folder)
    outline = outline_of_config(config, str(folder / "config.json"))
    return outline.compressed(config, matrices, matrices.tensors, str(folder))


def _write_files(traced: Trace, config: Mapping[str, Any], source: Path | None, folder: Path) -> None:
    """Everything beside the graph."""
    settings = for_model(config)
    values = _config_json(settings, traced.class_name)
    write_object(folder / "config.json", values)
    if traced.interface.task in ("generation", "encoder"):
        generation = generation_config_json(values, read_generation(source) if source else {})
        write_object(folder / "generation_config.json", generation)
        decoder = None if traced.interface.task == "encoder" else _genai_decoder(settings, traced.interface)
        if decoder is not None:
            write_object(folder / "genai_config.json", genai_json(decoder, generation, GRAPH))
    if source is not None:
        copy_tokenizer(source, folder)
        copy_sentence_files(source, folder)


def _config_json(settings: Any, class_name: str) -> dict[str, Any]:
    """The configuration, readable in transformers 4 and 5, with what transformers.js needs to know."""
    dropped = ("quantization_config", "auto_map", "_name_or_path", "transformers_version", "torch_dtype")
    values = {key: value for key, value in settings.to_dict().items() if key not in dropped}
    if "rope_parameters" in values or "rope_theta" in values:
        values = portable_config(values)
    names = getattr(settings, "attribute_map", {})  # GPT-2 says n_layer where others say num_hidden_layers
    values |= {name: values[own] for name, own in names.items() if own in values and name in _PLAIN_NAMES}
    values["architectures"] = [class_name]
    values["dtype"] = "float32"
    values["transformers.js_config"] = {"use_external_data_format": True, "dtype": "fp32"}
    return dict(sorted(values.items()))


def _genai_decoder(settings: Any, interface: Interface) -> GenaiDecoder | None:
    """What onnxruntime-genai wants to know; None for layers of different sizes or with states, which it cannot run."""
    sizes, context = set(interface.cache), getattr(settings, "max_position_embeddings", None)
    if len(sizes) != 1 or interface.states or not isinstance(context, int):
        return None
    ((key_value_heads, head_size, *of_values),) = sizes
    if of_values:
        return None
    return GenaiDecoder(
        model_type="decoder",
        context=context,
        vocabulary=int(interface.output_sizes[-1]),
        hidden=int(settings.hidden_size),
        layers=len(interface.cache),
        heads=int(settings.num_attention_heads),
        key_value_heads=key_value_heads,
        head_size=head_size,
        shares_buffer=False,
    )
