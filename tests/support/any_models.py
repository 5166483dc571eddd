"""Tiny random models of types that no exporter knows by name, saved as real Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import tiny
import torch
import transformers

VOCABULARY: Final = 320
_SIZES: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_LARGE: Final = {"initializer_range": 0.15}
_TOKENS: Final = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=256,
        n_inner=160,
        **_LARGE,
        **_TOKENS,
    )


def _opt() -> Any:
    return transformers.OPTConfig(
        **_SIZES, ffn_dim=160, max_position_embeddings=256, word_embed_proj_dim=64, init_std=0.15, **_TOKENS
    )


def _gpt_neox() -> Any:
    return transformers.GPTNeoXConfig(
        **_SIZES, intermediate_size=160, max_position_embeddings=256, **_LARGE, **_TOKENS
    )


def _phi3() -> Any:
    return transformers.Phi3Config(
        **_SIZES,
        num_key_value_heads=2,
        intermediate_size=160,
        max_position_embeddings=256,
        original_max_position_embeddings=256,
        **_LARGE,
        **_TOKENS,
    )


def _gemma3() -> Any:
    return transformers.Gemma3TextConfig(
        **_SIZES,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=160,
        max_position_embeddings=256,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        **_LARGE,
        **_TOKENS,
    )


def _bert() -> Any:
    return transformers.BertConfig(
        **_SIZES, intermediate_size=160, max_position_embeddings=256, num_labels=3, pad_token_id=0, **_LARGE
    )


def _distilbert() -> Any:
    return transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=160,
        max_position_embeddings=256,
        pad_token_id=0,
        **_LARGE,
    )


def _roberta() -> Any:
    return transformers.RobertaConfig(
        **_SIZES, intermediate_size=160, max_position_embeddings=258, **_LARGE, pad_token_id=1
    )


def _albert() -> Any:
    """Layers that share their weights."""
    return transformers.AlbertConfig(
        **_SIZES,
        embedding_size=32,
        intermediate_size=160,
        max_position_embeddings=256,
        pad_token_id=0,
        **_LARGE,
    )


def _llama_classes() -> Any:
    """A decoder that exporters know by name, with a head that they do not."""
    return transformers.LlamaConfig(**tiny.COMMON, num_labels=3)


def _opt_projected() -> Any:
    """Linears between the blocks and the tables."""
    made = _opt()
    made.word_embed_proj_dim = 32
    return made


def _gpt2_narrow() -> Any:
    """Rows that are no multiple of a block."""
    made = _gpt2()
    made.n_embd = 48
    return made


def _gpt2_classes() -> Any:
    made = _gpt2()
    made.pad_token_id, made.num_labels = 2, 3
    return made


_EXPERTS: Final = {
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
}


def _qwen2_moe() -> Any:
    """Experts beside one that every token meets."""
    return transformers.Qwen2MoeConfig(
        **_SIZES,
        **_EXPERTS,
        **_LARGE,
        **_TOKENS,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )


def _mixtral() -> Any:
    return transformers.MixtralConfig(**_SIZES, **_EXPERTS, **_LARGE, **_TOKENS, num_local_experts=4)


def _gpt_oss() -> Any:
    """Gate and up in turn, biases, an activation of its own."""
    return transformers.GptOssConfig(
        **_SIZES, **_EXPERTS, **_LARGE, **_TOKENS, num_local_experts=4, head_dim=16, sliding_window=8
    )


def _lfm2() -> Any:
    """A block that keeps the last inputs of a convolution, and one that keeps keys and values."""
    return transformers.Lfm2Config(
        **_SIZES,
        **_LARGE,
        **_TOKENS,
        num_key_value_heads=2,
        intermediate_size=96,
        block_auto_adjust_ff_dim=False,
        max_position_embeddings=256,
        layer_types=["conv", "full_attention"],
    )


def _qwen3_5() -> Any:
    """A block with a recurrence: the gated delta rule."""
    return transformers.Qwen3_5TextConfig(
        **_SIZES,
        **_LARGE,
        **_TOKENS,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=256,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    )


def _deepseek() -> Any:
    """Keys of another size than values, no experts in its only block."""
    return transformers.DeepseekV3Config(
        **{**_SIZES, "num_hidden_layers": 1},
        **_LARGE,
        **_TOKENS,
        intermediate_size=96,
        max_position_embeddings=256,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
    )


_MADE: Final[Mapping[str, tuple[Callable[[], Any], str]]] = MappingProxyType(
    {
        "gpt2": (_gpt2, "GPT2LMHeadModel"),
        "opt": (_opt, "OPTForCausalLM"),
        "gpt_neox": (_gpt_neox, "GPTNeoXForCausalLM"),
        "phi3": (_phi3, "Phi3ForCausalLM"),
        "gemma3": (_gemma3, "Gemma3ForCausalLM"),
        "bert": (_bert, "BertModel"),
        "bert masked": (_bert, "BertForMaskedLM"),
        "bert classes": (_bert, "BertForSequenceClassification"),
        "bert token classes": (_bert, "BertForTokenClassification"),
        "distilbert": (_distilbert, "DistilBertModel"),
        "roberta": (_roberta, "RobertaModel"),
        "gpt2 classes": (_gpt2_classes, "GPT2ForSequenceClassification"),
        "albert": (_albert, "AlbertModel"),
        "llama classes": (_llama_classes, "LlamaForSequenceClassification"),
        "opt projected": (_opt_projected, "OPTForCausalLM"),
        "gpt2 narrow": (_gpt2_narrow, "GPT2LMHeadModel"),
        "lfm2": (_lfm2, "Lfm2ForCausalLM"),
        "qwen3_5": (_qwen3_5, "Qwen3_5ForCausalLM"),
        "deepseek": (_deepseek, "DeepseekV3ForCausalLM"),
        "qwen2_moe": (_qwen2_moe, "Qwen2MoeForCausalLM"),
        "mixtral": (_mixtral, "MixtralForCausalLM"),
        "gpt_oss": (_gpt_oss, "GptOssForCausalLM"),
    }
)

DECODERS: Final = ("gpt2", "opt", "gpt_neox", "phi3", "gemma3")
READERS: Final = (
    "bert",
    "bert masked",
    "bert classes",
    "bert token classes",
    "distilbert",
    "roberta",
    "gpt2 classes",
)
"""Models that read whole texts."""

KINDS: Final = (*DECODERS, *READERS)

EXPERTS: Final = ("qwen2_moe", "mixtral", "gpt_oss")
"""Mixtures of experts."""

UNUSUAL: Final = ("albert", "llama classes", "opt projected", "gpt2 narrow")
"""What only exporters have to be shown."""


def model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in float32, evaluation mode; biases and norms are random too."""
    make, name = _MADE[kind]
    config = make()
    for option, value in changes.items():
        setattr(config, option, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = getattr(transformers, name)(config).float().eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
    return made


def save(folder: Path, kind: str, seed: int = 0, **changes: Any) -> Path:
    """A complete model folder, tokenizer included."""
    folder.mkdir(parents=True, exist_ok=True)
    model(kind, seed, **changes).save_pretrained(folder)
    tiny.tokenizer_files(folder, ending=kind in READERS)
    return folder
