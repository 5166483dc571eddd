"""Tiny random models of every supported architecture, saved as real Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORDS = (
    "the quick brown fox jumps over the lazy dog while a small model reads every word of this text and "
    "learns nothing at all because its weights are random numbers "
)

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Wider than the default of 0.02, so that attention and activations are far from linear.
    "initializer_range": 0.15,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config(kind: str, **changes: Any) -> Any:
    """Configuration of a tiny `kind`: llama, llama3 (tied, scaled rope), mistral, qwen2 or qwen3."""
    import transformers

    version = int(transformers.__version__.split(".")[0])
    rope: dict[str, Any] = (
        {"rope_parameters": LLAMA3_ROPE}
        if version >= 5
        else {
            "rope_theta": 10000.0,
            "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"},
        }
    )
    match kind:
        case "llama":
            return transformers.LlamaConfig(**COMMON | changes)
        case "llama3":
            return transformers.LlamaConfig(**COMMON | rope | {"tie_word_embeddings": True} | changes)
        case "mistral":
            return transformers.MistralConfig(**COMMON | {"sliding_window": None} | changes)
        case "qwen2":
            return transformers.Qwen2Config(**COMMON | changes)
        case "qwen3":
            return transformers.Qwen3Config(
                **COMMON | {"head_dim": 32, "tie_word_embeddings": True} | changes
            )
    raise ValueError(kind)


KINDS = ("llama", "llama3", "mistral", "qwen2", "qwen3")


def model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in float32, evaluation mode; biases and norms are random too."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(config(kind, **changes), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return made.float().eval()


def tokenizer_files(folder: Path, ending: bool = False) -> None:
    """A byte-level BPE tokenizer of at most 320 entries that puts token 1 first and, with `ending`, token 2 last."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [WORDS],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ending else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", '
        '"pad_token": "<pad>", "model_max_length": 256, "clean_up_tokenization_spaces": false}'
    )


def save(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A complete model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model(kind, **changes).save_pretrained(folder)
    tokenizer_files(folder)
    return folder
