"""Tiny random models of the architectures that people ship, as real folders with a tokenizer; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

_SIZES: Final[Mapping[str, Any]] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOWS: Final = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_FULL: Final = {"layer_types": ["full_attention", "full_attention"]}
_EXPERTS: Final = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL: Final = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GEMMA: Final = {"head_dim": 16, "query_pre_attn_scalar": 16, **_WINDOWS}
_LATENT: Final = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_DELTA: Final = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_POSITIONS: Final = {"pad_token_id": 1, "max_position_embeddings": 258}
"""RoBERTa and its relatives count positions from the one behind that of padding."""


@dataclass(frozen=True)
class Kind:
    """A type of model.

    Attributes:
        name: its class in transformers.
        changes: to the sizes that all have.
        dropped: sizes that its configuration would take for something else.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


KINDS: Final[Mapping[str, Kind]] = {
    # decoders
    "llama": Kind("LlamaForCausalLM"),
    "mistral": Kind("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": Kind("Qwen2ForCausalLM"),
    "qwen3": Kind("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3_5_text": Kind("Qwen3_5ForCausalLM", _DELTA),
    "gemma": Kind("GemmaForCausalLM", {"head_dim": 16}),
    "gemma2": Kind("Gemma2ForCausalLM", _GEMMA),
    "gemma3_text": Kind("Gemma3ForCausalLM", _GEMMA),
    "gemma3n_text": Kind(
        "Gemma3nForCausalLM",
        {
            "head_dim": 16,
            "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0, 0.0],
            "intermediate_size": [128, 128],
            **_WINDOWS,
        },
    ),
    "gemma4_text": Kind(
        "Gemma4ForCausalLM",
        {
            "head_dim": 16,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
            **_WINDOWS,
        },
    ),
    "phi": Kind("PhiForCausalLM", {"partial_rotary_factor": 0.5}),
    "phi3": Kind("Phi3ForCausalLM", {"sliding_window": None, "original_max_position_embeddings": 256}),
    "smollm3": Kind("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2}),
    "lfm2": Kind(
        "Lfm2ForCausalLM", {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]}
    ),
    "granite": Kind(
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "olmo": Kind("OlmoForCausalLM"),
    "olmo2": Kind("Olmo2ForCausalLM"),
    "olmo3": Kind("Olmo3ForCausalLM", _WINDOWS),
    "starcoder2": Kind("Starcoder2ForCausalLM", {"sliding_window": None}),
    "stablelm": Kind("StableLmForCausalLM", {"num_key_value_heads": 4}),
    "cohere": Kind("CohereForCausalLM"),
    "cohere2": Kind("Cohere2ForCausalLM", {"head_dim": 16, **_WINDOWS}),
    "exaone4": Kind("Exaone4ForCausalLM", {"sliding_window": None, **_FULL}),
    "ernie4_5": Kind("Ernie4_5ForCausalLM", {"head_dim": 16}),
    "hunyuan_v1_dense": Kind("HunYuanDenseV1ForCausalLM", {"head_dim": 16}),
    "glm4": Kind("Glm4ForCausalLM", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "nemotron": Kind("NemotronForCausalLM", {"head_dim": 16}),
    "opt": Kind("OPTForCausalLM", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gpt2": Kind("GPT2LMHeadModel", {"n_positions": 256}, ("intermediate_size", "num_key_value_heads")),
    "gpt_neox": Kind("GPTNeoXForCausalLM", {}, ("num_key_value_heads",)),
    "gptj": Kind("GPTJForCausalLM", {"rotary_dim": 8}, ("intermediate_size", "num_key_value_heads")),
    "bloom": Kind("BloomForCausalLM", {}, ("intermediate_size", "num_key_value_heads")),
    "mpt": Kind("MptForCausalLM", {"max_seq_len": 256, "expansion_ratio": 2}),
    "falcon": Kind("FalconForCausalLM", {"multi_query": True}, ("num_key_value_heads",)),
    "mamba2": Kind(
        "Mamba2ForCausalLM", {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "expand": 2}
    ),
    # mixtures of experts
    "mixtral": Kind("MixtralForCausalLM", {**_LOCAL, "sliding_window": None}),
    "qwen2_moe": Kind("Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": Kind("Qwen3MoeForCausalLM", {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_next": Kind("Qwen3NextForCausalLM", {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 32}),
    "olmoe": Kind("OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "phimoe": Kind("PhimoeForCausalLM", {**_LOCAL, "sliding_window": None}),
    "gpt_oss": Kind("GptOssForCausalLM", {**_LOCAL, "head_dim": 16, **_WINDOWS}),
    "deepseek_v2": Kind("DeepseekV2ForCausalLM", _LATENT),
    "deepseek_v3": Kind("DeepseekV3ForCausalLM", _LATENT),
    "granitemoehybrid": Kind(
        "GraniteMoeHybridForCausalLM",
        {
            **_LOCAL,
            "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
    ),
    # encoders
    "bert": Kind("BertModel"),
    "bert, tokens": Kind("BertForTokenClassification", {"num_labels": 3}),
    "roberta": Kind("RobertaModel", _POSITIONS),
    "xlm-roberta": Kind("XLMRobertaModel", _POSITIONS),
    "mpnet": Kind("MPNetModel", _POSITIONS),
    "modernbert": Kind("ModernBertModel", {"cls_token_id": 1, "sep_token_id": 2}),
    "distilbert": Kind("DistilBertModel", {"hidden_dim": 128}, ("intermediate_size", "num_key_value_heads")),
    "deberta-v2": Kind(
        "DebertaV2Model",
        {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]},
    ),
    "nomic_bert": Kind("NomicBertModel"),
    "albert": Kind("AlbertModel", {"embedding_size": 32}),
}
"""By model type; what follows a comma tells a task apart."""

WORDS: Final = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "while",
    "a",
    "small",
    "model",
    "reads",
    "every",
    "word",
    "of",
    "this",
    "text",
    "and",
    "learns",
    "nothing",
    "at",
    "all",
    "because",
    "its",
    "weights",
    "are",
    "random",
    "numbers",
]


def save(folder: Path, kind: str) -> Path:
    """A complete model folder: random weights at which attention is far from even, norms and biases random too."""
    import transformers

    made = KINDS[kind]
    sizes = {name: value for name, value in _SIZES.items() if name not in made.dropped}
    config = transformers.AutoConfig.for_model(kind.partition(",")[0], **sizes | dict(made.changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, made.name)(config).float().eval()
        _enlarge(model)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


def _enlarge(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))


def _save_tokenizer(folder: Path) -> None:
    """Bytes and a few merges, one token in front of every text."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", '
        '"pad_token": "<pad>", "model_max_length": 256, "clean_up_tokenization_spaces": false}'
    )


def write_text(path: Path, lines: int = 240) -> Path:
    """Lines of several lengths, no two alike."""
    rows = (
        " ".join(WORDS[(7 * at + 3 * word) % len(WORDS)] for word in range(5 + at % 10))
        for at in range(lines)
    )
    path.write_text("\n".join(f"{number} {row}" for number, row in enumerate(rows)) + "\n", encoding="utf-8")
    return path
