"""Tiny random models whose encoder reads text and whose decoder writes it, saved as real folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import tiny
import torch
import transformers

VOCABULARY: Final = 320
TOKENS: Final = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}


def _t5(**changes: Any) -> Any:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 2}
    distances = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    return transformers.T5Config(vocab_size=VOCABULARY, **sizes | distances | TOKENS | changes)


def _bart(kind: str) -> Callable[..., Any]:
    def made(**changes: Any) -> Any:
        sizes = {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 256,
            "init_std": 0.2,
        }
        settings = getattr(transformers, f"{kind}Config")
        return settings(vocab_size=VOCABULARY, **sizes | TOKENS | changes)

    return made


CONFIGS: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        "t5": _t5,
        "bart": _bart("Bart"),
        "marian": _bart("Marian"),
        "pegasus": _bart("Pegasus"),
        "m2m_100": _bart("M2M100"),
        "mbart": _bart("MBart"),
    }
)


def model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in float32, evaluation mode; biases, norms and whatever is added to logits are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = transformers.AutoModelForSeq2SeqLM.from_config(CONFIGS[kind](**changes)).float().eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
            for name, buffer in made.named_buffers():
                if name == "final_logits_bias":
                    buffer += torch.randn_like(buffer)
    made.generation_config = transformers.GenerationConfig(**TOKENS, max_length=12, bad_words_ids=[[0]])
    return made


def save(folder: Path, kind: str, seed: int = 0, **changes: Any) -> Path:
    """A complete model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model(kind, seed, **changes).save_pretrained(folder)
    tiny.tokenizer_files(folder, ending=True)
    return folder
