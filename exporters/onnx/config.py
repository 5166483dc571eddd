"""The configuration files of an ONNX folder, for every consumer that reads one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compot_deploy.models.configuration import settings_of
from compot_deploy.models.decoder_shape import decoder_shape
from compot_deploy.models.hints import Architecture
from compot_deploy.models.rotary import portable_config


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
    settings = settings_of(config, f"The configuration of this {architecture.model_type}")
    theta = (getattr(settings, "rope_parameters", None) or {}).get("rope_theta") or settings.rope_theta
    result["rope_theta"] = result["rope_parameters"]["rope_theta"] = float(theta)
    if not result.get("architectures"):
        result["architectures"] = [_causal_class(settings)]
    result["head_dim"] = decoder_shape(architecture, config).head_size
    result["tie_word_embeddings"] = tied
    result["dtype"] = "float32"
    result["transformers.js_config"] = {"use_external_data_format": True, "dtype": "fp32"}
    return dict(sorted(result.items()))


def _causal_class(settings: Any) -> str:
    """The class that transformers takes for a decoder of this configuration."""
    from transformers import AutoModelForCausalLM

    return str(AutoModelForCausalLM._model_mapping[type(settings)].__name__)


def generation_config_json(config: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: the original's, with the special tokens of config.json where it has none."""
    result = {key: value for key, value in original.items() if key != "transformers_version"}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
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
    decoder = GenaiDecoder(
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
    return genai_json(decoder, generation, filename)


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


def genai_json(decoder: GenaiDecoder, generation: Mapping[str, Any], filename: str) -> dict[str, Any]:
    """genai_config.json of a graph with the usual names; see `genai_config_json`."""
    end = generation.get("eos_token_id")
    first_end = end[0] if isinstance(end, list) and end else end
    padding = generation.get("pad_token_id")
    model: dict[str, Any] = {
        "type": decoder.model_type,
        "context_length": decoder.context,
        "vocab_size": decoder.vocabulary,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": filename,
            "head_size": decoder.head_size,
            "hidden_size": decoder.hidden,
            "num_attention_heads": decoder.heads,
            "num_hidden_layers": decoder.layers,
            "num_key_value_heads": decoder.key_value_heads,
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
        "max_length": decoder.context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": decoder.shares_buffer,
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
