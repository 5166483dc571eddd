"""The ONNX folder of a model that has no graph of ours: its forward pass is traced.

Encoders, classifiers and decoders outside `compot_deploy.models.hints` come this way; `build_traced` makes
the graph. A decoder gets the inputs and outputs that a graph of ours has, caches and left padding included,
so everything that reads those folders reads this one. The difference: attention is the standard operator,
not GroupQueryAttention, so the cache is copied for each token and decoding is slower.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import nn

from compot_deploy.core.json_files import write_object
from compot_deploy.core.matrix import Matrix
from compot_deploy.exporters.onnx.config import GenaiDecoder, genai_json, generation_config_json
from compot_deploy.exporters.onnx.exporter import OnnxOptions
from compot_deploy.exporters.onnx.files import copy_tokenizer
from compot_deploy.exporters.onnx.interface import Interface, config_of, interface_of
from compot_deploy.exporters.onnx.matrices import OnnxMatrices
from compot_deploy.exporters.onnx.placeholders import matrices_of
from compot_deploy.exporters.onnx.shape import portable_config
from compot_deploy.exporters.onnx.tensors import DATA, GRAPH
from compot_deploy.exporters.onnx.tracing import build_traced, interface_task

_PLAIN_NAMES: Final = ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")
"""Names of sizes that consumers know; a configuration may have names of its own for them."""

_SENTENCE_FILES: Final = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
"""How token embeddings become one of a sentence, as sentence-transformers reads it; copied where present."""


def export(
    model: nn.Module,
    folder: Path,
    matrices: Mapping[str, Matrix] | None = None,
    options: OnnxOptions = OnnxOptions(),  # noqa: B008 - frozen
    source: Path | None = None,
) -> Mapping[str, Matrix]:
    """Write the ONNX folder of any text model of transformers; linters and optimum read it like any other.

    ::

        config.json  tokenizer files  how sentences are pooled, where the original says it
        onnx/model.onnx  onnx/model.onnx_data

    Args:
        model: of transformers, in float32 and in evaluation mode; it is as it was afterwards.
        folder: an existing folder.
        matrices: by module path, (in, out); the token embedding as (hidden, vocabulary). Modules of the model
            with an attribute ``matrix`` need not be named. Whatever is not here is written in float32.
        options: of the export; `context` is not used.
        source: folder of the original model, for tokenizer and pooling; None copies none.

    Returns:
        What was written, in the model's order. A matrix that the output does not depend on, a pooler's for
        example, is not traced and not written.

    Raises:
        MissingDependencyError, UnsupportedModelError, RecipeError, InputError: see `build_traced` and
            `matrices_of`.

    Example:
        >>> model = AutoModel.from_pretrained("encoder").eval()
        >>> matrices = {
        ...     name: rtn(module.weight.detach().T, None, Grid(4, 32))
        ...     for name, module in model.named_modules()
        ...     if isinstance(module, nn.Linear)
        ... }
        >>> export(model, folder, matrices, source=Path("encoder"))
    """
    found = matrices_of(model, matrices)
    graph, data = folder / GRAPH, folder / DATA
    graph.parent.mkdir(exist_ok=True)
    with data.open("wb") as file:
        proto = build_traced(model, file, data.name, found, options)
    graph.write_bytes(proto.SerializeToString(deterministic=True))
    held = set(OnnxMatrices(graph)) if found else set()
    written = {name: matrix for name, matrix in found.items() if name in held}
    config = _config_json(model)
    write_object(folder / "config.json", config)
    if interface_task(proto) == "generation":
        original = getattr(model, "generation_config", None)
        values = {} if original is None else original.to_dict()
        generation = generation_config_json(config, _set(values))
        write_object(folder / "generation_config.json", generation)
        facts = _genai_decoder(model, interface_of(model))
        if facts is not None:
            write_object(folder / "genai_config.json", genai_json(facts, generation, GRAPH))
    if source is not None:
        copy_tokenizer(source, folder)
        for name in (*_SENTENCE_FILES, "vocab.txt"):
            if (source / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, folder / name)
    return written


def _config_json(model: nn.Module) -> dict[str, Any]:
    """The configuration, readable in transformers 4 and 5, with what transformers.js needs to know."""
    dropped = ("quantization_config", "auto_map", "_name_or_path", "transformers_version", "torch_dtype")
    values = {key: value for key, value in config_of(model).to_dict().items() if key not in dropped}
    if "rope_parameters" in values or "rope_theta" in values:
        values = portable_config(values)
    names = getattr(
        config_of(model), "attribute_map", {}
    )  # GPT-2 says n_layer where others say num_hidden_layers
    values |= {name: values[own] for name, own in names.items() if own in values and name in _PLAIN_NAMES}
    values["architectures"] = [type(model).__name__]
    values["dtype"] = "float32"
    values["transformers.js_config"] = {"use_external_data_format": True, "dtype": "fp32"}
    return dict(sorted(values.items()))


def _genai_decoder(model: nn.Module, interface: Interface) -> GenaiDecoder | None:
    """What onnxruntime-genai wants to know; None for layers of different sizes, which it cannot run."""
    config, sizes = config_of(model), set(interface.cache)
    context = getattr(config, "max_position_embeddings", None)
    if len(sizes) != 1 or not isinstance(context, int):
        return None
    ((key_value_heads, head_size),) = sizes
    return GenaiDecoder(
        model_type="decoder",
        context=context,
        vocabulary=int(interface.output_sizes[-1]),
        hidden=int(config.hidden_size),
        layers=len(interface.cache),
        heads=int(config.num_attention_heads),
        key_value_heads=key_value_heads,
        head_size=head_size,
        shares_buffer=False,
    )


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
