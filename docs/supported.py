"""Write the table of docs/supported-models.md from the code.

    python docs/supported.py

Each type is asked of a small configuration with nothing but defaults: the same questions as ``compot-deploy supports``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from compot_deploy.exporters.gguf.kinds import KINDS
from compot_deploy.models.hints import ARCHITECTURES
from compot_deploy.pipeline.supported import Supported, supported

PAGE: Final = Path(__file__).with_name("supported-models.md")
START: Final = "<!-- written by docs/supported.py -->\n"
END: Final = "<!-- end of what docs/supported.py writes -->\n"

TEXT_TO_TEXT: Final = ("t5", "mt5", "bart", "mbart", "marian", "pegasus", "m2m_100")
DECODERS: Final = ("opt", "gptj", "gemma3n_text", "gemma4_text", "qwen3_5_text", "phimoe", "deepseek_v3")
ENCODERS: Final = (
    "bert",
    "distilbert",
    "roberta",
    "xlm-roberta",
    "mpnet",
    "modernbert",
    "nomic_bert",
    "deberta-v2",
    "albert",
)
OTHERS: Final = (*DECODERS, *ENCODERS, "whisper", *TEXT_TO_TEXT)
"""Types that GGUF does not have, and that people ask for."""

_SIZES: Final = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TOWERS: Final = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "decoder_start_token_id": 1,
}
_CHANGES: Final[dict[str, dict[str, Any]]] = {
    "gemma2": {"head_dim": 256},
    "gemma3_text": {"head_dim": 256},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "phi3": {"max_position_embeddings": 4096},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "gpt_neox": {"hidden_act": "gelu_new"},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 4},
    "gptj": {"rotary_dim": 8},
    "phimoe": {"num_local_experts": 4},
    "deepseek_v3": {
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "qwen3_5_text": {
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "gemma3n_text": {
        "head_dim": 16,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [128] * 4,
    },
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "num_local_experts": 4,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "distilbert": {"dim": 64, "n_heads": 4, "n_layers": 4, "hidden_dim": 128},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    "mt5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    **dict.fromkeys(TEXT_TO_TEXT[2:], _TOWERS),
    "whisper": _TOWERS,
}


def row(model_type: str) -> Supported:
    """What the code says of a type."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.for_model(model_type, **_SIZES | _CHANGES.get(model_type, {})).to_dict()
        mappings = (
            auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES if model_type == "whisper" else {},
            auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if model_type in TEXT_TO_TEXT else {},
            auto.MODEL_MAPPING_NAMES if model_type in ENCODERS else {},
            auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        )
        name = next(mapping[model_type] for mapping in mappings if model_type in mapping)
        (Path(folder) / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
        return supported(folder)


def table(model_types: Sequence[str]) -> str:
    """The table, in Markdown."""
    lines = [
        "| model type | task | ONNX | GGUF, dense | GGUF, factors | Hugging Face |",
        "|---|---|---|---|---|---|",
    ]
    for model_type in model_types:
        found = row(model_type)
        ways = {(way.format, way.name): way for way in found.ways}
        onnx = next((way for way in found.ways if way.format == "onnx"), None)
        cells = [onnx.name if onnx is not None and onnx.objection is None else "no"]
        rest = (("gguf", "dense"), ("gguf", "sparse"), ("huggingface", "packed"))
        cells += ["yes" if key in ways and ways[key].objection is None else "no" for key in rest]
        lines.append(f"| {model_type} | {found.task or '—'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def types() -> tuple[str, ...]:
    """Every type of the table: those with a graph of their own first."""
    return (*sorted(ARCHITECTURES), *sorted(set(KINDS) - set(ARCHITECTURES)), *OTHERS)


def page(text: str) -> str:
    """A page with its table written anew."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table(types())}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
