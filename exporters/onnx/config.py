"""What a configuration says about a decoder, and the configuration files that ONNX consumers read.

transformers 4.56 to 5.x write configurations in two styles; both are read, and what is written is readable in
both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from compot_deploy.errors import InputError, UnsupportedModelError
from compot_deploy.models.hints import Architecture

ROPE_TYPES: Final = ("default", "linear", "dynamic", "yarn", "llama3")
"""Kinds of rotary embedding whose tables do not change while a sequence grows within the context."""


@dataclass(frozen=True)
class DecoderShape:
    """Sizes and constants of a decoder, every default filled in.

    Attributes:
        layers: number of blocks.
        hidden: width of the residual stream.
        heads: query heads.
        key_value_heads: key and value heads.
        head_size: width of one head.
        intermediate: width inside the MLP.
        vocabulary: number of token ids.
        norm_epsilon: of every norm.
        context: longest sequence, prompt and answer together; rows of the rotary tables.
        windows: of each block, how many of the last keys a query sees, itself included; None sees all.
    """

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    norm_epsilon: float
    context: int
    windows: tuple[int | None, ...]

    @property
    def fused_rotary(self) -> bool:
        """Whether GroupQueryAttention can rotate by itself: it takes heads of multiples of 16."""
        return self.head_size % 16 == 0

    def linear(self, name: str) -> tuple[int, int]:
        """(in, out) of a linear by the last part of its path."""
        queries, keys = self.heads * self.head_size, self.key_value_heads * self.head_size
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
            "lm_head": (self.hidden, self.vocabulary),
        }[name]


@dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines of the rotary embedding, shape (context, head_size / 2) each, float32."""

    cosine: Tensor
    sine: Tensor


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that transformers 4.56 and 5.x read alike.

    Version 5 keeps the rotary embedding in ``rope_parameters``; version 4 in ``rope_theta`` and
    ``rope_scaling``, and ignores the other. Written are all three, saying the same.

    Raises:
        UnsupportedModelError: the rotary embedding differs between layer types.
    """
    result = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    rope = dict(config.get("rope_scaling") or {}) or dict(config.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedModelError(
            f"A {config.get('model_type')} whose rotary embedding differs between layer types is not supported."
        )
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = rope.pop("rope_theta", None) or config.get("rope_theta")
    if theta is not None:
        result["rope_theta"] = theta
    result["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rope}
    result["rope_parameters"] = {"rope_type": kind, **rope}
    if theta is not None:
        result["rope_parameters"]["rope_theta"] = theta
    return result


def check_supported(architecture: Architecture, config: Mapping[str, Any]) -> None:
    """Refuse what the graph cannot express, from the configuration alone.

    Raises:
        UnsupportedModelError: a rotary embedding that changes with the sequence length or turns only a part
            of each head, or sizes that do not fit each other.
    """
    portable = portable_config(config)
    name = architecture.model_type
    rope = portable["rope_parameters"]
    if rope["rope_type"] not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"A {name} with rotary embedding of type {rope['rope_type']!r} is not supported in ONNX: "
            f"its angles change with the length of the text. Supported are: {', '.join(ROPE_TYPES)}."
        )
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) or 1.0
    if partial != 1.0:
        raise UnsupportedModelError(
            f"A {name} with partial_rotary_factor={partial} is not supported in ONNX: only 1.0 is."
        )
    shape = decoder_shape(architecture, config)
    if shape.heads % shape.key_value_heads:
        raise UnsupportedModelError(
            f"{shape.heads} query heads cannot share {shape.key_value_heads} key and value heads evenly."
        )
    if shape.head_size % 8:
        raise UnsupportedModelError(
            f"A {name} with heads of {shape.head_size} is not supported in ONNX: "
            "GroupQueryAttention takes multiples of 8."
        )


def decoder_shape(architecture: Architecture, config: Mapping[str, Any]) -> DecoderShape:
    """Sizes of the decoder, with the defaults of transformers where config.json is silent."""
    settings = transformers_config(config)
    layers = int(settings.num_hidden_layers)
    return DecoderShape(
        layers=layers,
        hidden=int(settings.hidden_size),
        heads=int(settings.num_attention_heads),
        key_value_heads=int(getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads),
        head_size=architecture.head_size(
            {
                "head_dim": getattr(settings, "head_dim", None),
                "hidden_size": settings.hidden_size,
                "num_attention_heads": settings.num_attention_heads,
            }
        ),
        intermediate=int(settings.intermediate_size),
        vocabulary=int(settings.vocab_size),
        norm_epsilon=float(settings.rms_norm_eps),
        context=int(settings.max_position_embeddings),
        windows=_windows(settings, layers),
    )


def rotary_tables(config: Mapping[str, Any], rows: int) -> RotaryTables:
    """The tables that transformers' own rotary embedding would compute, in the same float32 steps."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(transformers_config(config))
    angles = torch.outer(torch.arange(rows, dtype=torch.float32), rotary.inv_freq.float())
    scaling = float(rotary.attention_scaling)
    return RotaryTables(cosine=angles.cos() * scaling, sine=angles.sin() * scaling)


def transformers_config(config: Mapping[str, Any]) -> Any:
    """The configuration as an object of the installed transformers, defaults filled in.

    Raises:
        InputError: transformers refuses it.
    """
    from transformers import AutoConfig

    values = {
        k: v for k, v in portable_config(config).items() if k not in ("quantization_config", "auto_map")
    }
    model_type = values.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # validation errors differ from version to version
        raise InputError(f"transformers refuses the configuration of this {model_type}: {error}") from error


def _windows(settings: Any, layers: int) -> tuple[int | None, ...]:
    """The window of each block, as transformers' model classes read it."""
    # A key that the class does not know (sliding_window in a llama) is kept by the configuration and ignored
    # by the model, so ask a configuration with nothing but defaults what it knows.
    known = type(settings)()
    window = getattr(settings, "sliding_window", None) if hasattr(known, "sliding_window") else None
    if window is None:
        return (None,) * layers
    if not hasattr(known, "layer_types"):
        return (int(window),) * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in settings.layer_types)


# --- files that consumers read -----------------------------------------------------------------------


def config_json(architecture: Architecture, config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """config.json for transformers 4 and 5, optimum and transformers.js.

    The original, with the rotary embedding in both styles, and with what transformers.js needs to know: that
    the tensors lie beside the graph, and that inputs and outputs are float32.

    Args:
        architecture: of the model.
        config: the original configuration, in either style.
        tied: the head is the embedding.
    """
    dropped = ("quantization_config", "auto_map", "_name_or_path", "transformers_version", "torch_dtype")
    result = {key: value for key, value in portable_config(config).items() if key not in dropped}
    settings = transformers_config(config)
    theta = (getattr(settings, "rope_parameters", None) or {}).get("rope_theta") or settings.rope_theta
    result["rope_theta"] = result["rope_parameters"]["rope_theta"] = float(theta)
    result.setdefault("architectures", [_MODEL_CLASSES[architecture.model_type]])
    result["head_dim"] = decoder_shape(architecture, config).head_size
    result["tie_word_embeddings"] = tied
    result["dtype"] = "float32"
    result["transformers.js_config"] = {"use_external_data_format": True, "dtype": "fp32"}
    return dict(sorted(result.items()))


_MODEL_CLASSES: Final = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def generation_config_json(config: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: the original's, with the special tokens of config.json where it has none."""
    result = {key: value for key, value in original.items() if key != "transformers_version"}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if result.get(key) is None and config.get(key) is not None:
            result[key] = config[key]
    return result


def genai_config_json(
    architecture: Architecture,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    context: int,
    filename: str,
) -> dict[str, Any]:
    """genai_config.json for onnxruntime-genai.

    Args:
        architecture: of the model.
        config: the model's configuration.
        generation: what `generation_config_json` returned.
        context: longest sequence that the graph takes.
        filename: of the graph, relative to the folder.
    """
    shape = decoder_shape(architecture, config)
    facts = GenaiDecoder(
        model_type=architecture.genai_type,
        context=context,
        vocabulary=shape.vocabulary,
        hidden=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        key_value_heads=shape.key_value_heads,
        head_size=shape.head_size,
        shares_buffer=True,
    )
    return genai_json(facts, generation, filename)


@dataclass(frozen=True)
class GenaiDecoder:
    """What onnxruntime-genai wants to know about a graph.

    Attributes:
        model_type: ``model.type``; "decoder" is any graph with a cache.
        context: longest sequence that the graph takes.
        vocabulary: number of token ids.
        hidden: width of the residual stream.
        layers: number of blocks.
        heads: query heads.
        key_value_heads: key and value heads.
        head_size: width of one head.
        shares_buffer: the graph writes into the cache that it reads, as GroupQueryAttention does.
    """

    model_type: str
    context: int
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    shares_buffer: bool


def genai_json(facts: GenaiDecoder, generation: Mapping[str, Any], filename: str) -> dict[str, Any]:
    """genai_config.json of a graph with the usual names; see `genai_config_json`."""
    end = generation.get("eos_token_id")
    first_end = end[0] if isinstance(end, list) and end else end
    padding = generation.get("pad_token_id")
    model: dict[str, Any] = {
        "type": facts.model_type,
        "context_length": facts.context,
        "vocab_size": facts.vocabulary,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": filename,
            "head_size": facts.head_size,
            "hidden_size": facts.hidden,
            "num_attention_heads": facts.heads,
            "num_hidden_layers": facts.layers,
            "num_key_value_heads": facts.key_value_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    tokens = {
        "bos_token_id": generation.get("bos_token_id"),
        "eos_token_id": end,
        # The runtime pads batches itself and insists on a token to do it with.
        "pad_token_id": padding if padding is not None else first_end,
    }
    model |= {key: value for key, value in tokens.items() if value is not None}
    search = {
        "do_sample": False,
        "early_stopping": True,
        "max_length": facts.context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": facts.shares_buffer,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    chosen = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    search |= {key: generation[key] for key in chosen if generation.get(key) is not None}
    return {"model": model, "search": search}


def portable_tokenizer_config(original: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json that transformers 4 reads as well.

    Version 5 names its class TokenizersBackend, which nothing else knows, and lists extra tokens where version
    4 wants a mapping; the older spellings mean the same in both.
    """
    result = dict(original)
    if result.get("tokenizer_class") == "TokenizersBackend":
        result["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(result.get("extra_special_tokens"), list):
        tokens = result.pop("extra_special_tokens")
        result["additional_special_tokens"] = [*result.get("additional_special_tokens", []), *tokens]
    return result
