"""Tiny random models of every type that GGUF takes, with the features of their configurations switched on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import tiny
import torch
import transformers
from torch import nn

from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense, Matrix
from compot_deploy.models.compressed import CompressedModel, Tables
from compot_deploy.models.experts import unstack
from compot_deploy.models.source import open_source

_SMALL: Final[Mapping[str, Any]] = {**tiny.COMMON, "initializer_range": 0.1}
_WINDOW: Final = 8
"""Far shorter than the texts that are compared."""

_LONG: Final[Mapping[str, Any]] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "long_factor": [1.0 + at for at in range(4)],
    "short_factor": [1.0 + at / 4 for at in range(4)],
}


def _layers(period: int, count: int) -> list[str]:
    return ["full_attention" if (at + 1) % period == 0 else "sliding_attention" for at in range(count)]


@dataclass(frozen=True)
class Case:
    """A configuration.

    Attributes:
        made: the class of its configuration.
        changes: of it.
        dropped: what the class does not have.
    """

    made: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def config(self) -> Any:
        values = {key: value for key, value in _SMALL.items() if key not in self.dropped}
        return getattr(transformers, self.made)(**values | dict(self.changes))


_GEMMA: Final = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": _WINDOW}

CASES: Final[Mapping[str, Case]] = {
    "llama": Case("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": Case("Qwen2Config"),
    "qwen3": Case("Qwen3Config", {"head_dim": 32}),
    "gemma": Case("GemmaConfig", {"head_dim": 32}),
    "gemma2": Case("Gemma2Config", {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": Case("Gemma3TextConfig", {**_GEMMA, "num_hidden_layers": 4, "layer_types": _layers(3, 4)}),
    "phi": Case("PhiConfig", {"partial_rotary_factor": 0.5}),
    "phi3": Case("Phi3Config"),
    "phi3 long": Case(
        "Phi3Config",
        {
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 512,
            "rope_parameters": _LONG,
        },
    ),
    "smollm3": Case("SmolLM3Config", {"num_hidden_layers": 5}),
    "granite": Case(
        "GraniteConfig",
        {
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "olmo": Case("OlmoConfig"),
    "olmo2": Case("Olmo2Config"),
    "olmo3": Case(
        "Olmo3Config", {"sliding_window": _WINDOW, "num_hidden_layers": 5, "layer_types": _layers(4, 5)}
    ),
    "starcoder2": Case("Starcoder2Config", {"sliding_window": None}),
    "stablelm": Case("StableLmConfig", {"use_qkv_bias": True}),
    "stablelm parallel": Case("StableLmConfig", {"use_parallel_residual": True}),
    "cohere": Case("CohereConfig", {"logit_scale": 0.5}),
    "cohere2": Case(
        "Cohere2Config",
        {"sliding_window": _WINDOW, "num_hidden_layers": 5, "layer_types": _layers(4, 5), "logit_scale": 0.5},
    ),
    "exaone4": Case(
        "Exaone4Config",
        {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": tiny.LLAMA3_ROPE,
        },
    ),
    "granite linear": Case(
        "GraniteConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
    ),
    "ernie4_5": Case("Ernie4_5Config", {"head_dim": 32}),
    "gpt2": Case("GPT2Config", {"n_positions": 256}, ("intermediate_size", "num_key_value_heads")),
    "bloom": Case("BloomConfig", {}, ("intermediate_size", "num_key_value_heads")),
    "nemotron": Case("NemotronConfig"),
    "hunyuan_v1_dense": Case("HunYuanDenseV1Config", {"head_dim": 32}),
    "arcee": Case(
        "ArceeConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "seed_oss": Case("SeedOssConfig", {"head_dim": 32}),
    "glm4": Case("Glm4Config", {"head_dim": 32, "attention_bias": True}),
    "lfm2": Case("Lfm2Config", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}),
    "qwen2_moe": Case(
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "qwen3_moe": Case(
        "Qwen3MoeConfig",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": Case("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": Case("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "gpt_oss": Case(
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "sliding_window": _WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gpt_neox": Case("GPTNeoXConfig", {"hidden_act": "gelu_new"}, ("num_key_value_heads",)),
}
"""By what they show: the type of the model first."""


def save(folder: Path, case: str, **changes: Any) -> Path:
    """A complete model folder; norms and biases are random too."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CASES[case].config()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
    made.save_pretrained(folder)
    tiny.tokenizer_files(folder)
    return folder


def model(folder: Path, change: Any = None) -> CompressedModel:
    """A folder with every linear passed through `change`; None keeps it in float32."""
    source = open_source(folder)
    layout = source.layout
    matrices: dict[str, Matrix] = {}
    tables = [name for name in (layout.embedding, None if layout.tied else layout.head) if name]
    for name in (*source.sites, *tables):
        weight = source.weight(name).float().contiguous()
        matrices[name] = change(name, weight) if change and name not in tables else Dense(weight)
    taken = {f"{name}.weight" for name in (*matrices, layout.head)}
    tensors = {name: source.tensors[name].float() for name in source.tensors if name not in taken}
    return CompressedModel(
        source.architecture,
        source.config,
        matrices,
        tensors,
        layout.tied,
        str(folder),
        Tables(layout.embedding, layout.head),
    )


def _tabulated(x: torch.Tensor) -> torch.Tensor:
    """GELU as llama.cpp looks it up: a table of float16 by float16."""
    looked_up = nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x >= 10, x, torch.where(x <= -10, torch.zeros_like(x), looked_up))


def torch_logits(folder: Path, tokens: torch.Tensor, compressed: CompressedModel) -> torch.Tensor:
    """What transformers makes of the same matrices, float32, attention spelled out, GELU from llama.cpp's table."""
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    made = made.float().eval()
    unstack(made)
    for module in made.modules():
        if "gelu" in type(module).__name__.lower():
            module.forward = _tabulated
    with torch.no_grad():
        for name, matrix in compressed.matrices.items():
            weight = made.get_submodule(name).weight
            value = matrix.dequantize()
            turned = type(made.get_submodule(name)).__name__ != "Conv1D"
            weight.copy_(value.T if turned else value)
        return torch.as_tensor(made(tokens).logits[0])


GRID: Final = Grid(4, 32)
