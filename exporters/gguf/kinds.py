"""What llama.cpp knows about each type of model, as data: one entry per type, nothing about it anywhere else.

An entry says what the graph of llama.cpp needs to be told (keys), what it has built in and no key changes (`fixed`),
which biases it reads, how rotary embeddings and sliding windows are kept, and what is done to the tensors on their way
into the file. A feature that the graph would ignore is refused by `refusal`, so no file is silently wrong.

Tensor names are not here: gguf-py has them by architecture (`gguf.get_tensor_name_map`). Each entry is proven by the
logits of a tiny random model of its type: torch against the file in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

Value: TypeAlias = str | int | float | bool | list[str] | list[int] | list[float]
"""What a metadata key may hold; integers are written as uint32, floats as float32."""

Order: TypeAlias = Literal["pairs", "by head"]
"""Outputs that llama.cpp has in another order: see `names.py`."""

_SILU: Final = ("silu", "swish")
_TANH_GELU: Final = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
"""llama.cpp's GELU: the approximation by a hyperbolic tangent, which it looks up in a table of float16."""

_NO_BIAS: Final[Mapping[str, tuple[Any, ...]]] = {"attention_bias": (False, None), "mlp_bias": (False, None)}


@dataclass(frozen=True)
class Kind:
    """How llama.cpp runs a type of model.

    Attributes:
        ggml: ``general.architecture``, the name in gguf-py's tables too.
        rms: norms divide by the root of the mean square; otherwise they subtract the mean first.
        activations: names of the activations that the graph has.
        rotary: kinds of rotary embeddings that can be told; empty for models without.
        partial: only a part of a head may be rotated.
        window: how sliding windows are kept: ``cut`` (llama.cpp has none: the context is cut to the window), a
            period (every so-manyth block sees everything), ``key`` (the period is written).
        orders: end of a tensor's stem to the order that its outputs have in the file.
        shift: added to the weights of norms, which torch keeps as differences from it.
        biased: ends of the stems whose biases the graph reads; norms that subtract the mean have theirs.
        keys: further keys, by what follows the architecture's prefix.
        fixed: settings that are built in, with the values that are.
        further: what else is refused, as a sentence's end; None is nothing.
        split: end of a tensor's stem to those of the tensors that its outputs are written as.
        renamed: ends of module paths that gguf-py has by another name.
        head: the graph has a tensor for a head beside the embedding, tied or not.
        factorized: the plug-in runs its factors. Otherwise only dense files are written.
    """

    ggml: str
    rms: bool = True
    activations: tuple[str, ...] = _SILU
    rotary: tuple[str, ...] = ("default", "linear")
    partial: bool = False
    window: int | Literal["cut", "key"] = "cut"
    orders: Mapping[str, Order] = field(default_factory=dict)
    shift: float = 0.0
    biased: tuple[str, ...] = ()
    keys: Mapping[str, Callable[[Any], Value]] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    further: Callable[[Any], str | None] = lambda settings: None
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    head: bool = True
    factorized: bool = True


_PAIRS: Final[Mapping[str, Order]] = {"attn_q": "pairs", "attn_k": "pairs"}
_QKV: Final = ("attn_q", "attn_k", "attn_v")
_ALL_LINEARS: Final = (*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_ALL_ROTARY: Final = ("default", "linear", "llama3", "yarn")

_LLAMA: Final = Kind("llama", orders=_PAIRS, biased=_ALL_LINEARS, rotary=_ALL_ROTARY)


_LARGEST_GEMMAS: Final = (46, 62)
"""Blocks of the 27B models of Gemma 2 and 3: llama.cpp knows them by that number."""


def _query_scale(settings: Any) -> str | None:
    """Gemma divides queries by a setting of its own; llama.cpp by the head size, in its largest by another number."""
    head = settings.head_dim
    if settings.num_hidden_layers in _LARGEST_GEMMAS:
        head = settings.hidden_size / settings.num_attention_heads
    if settings.query_pre_attn_scalar != head:
        return f"query_pre_attn_scalar {settings.query_pre_attn_scalar} where llama.cpp has {head:g} built in"
    return None


_GEMMA: Final = Kind("gemma", shift=1.0, activations=_TANH_GELU, fixed=_NO_BIAS, head=False)

_GEMMA2: Final = replace(
    _GEMMA,
    ggml="gemma2",
    window=2,
    keys={
        "attn_logit_softcapping": lambda s: float(s.attn_logit_softcapping),
        "final_logit_softcapping": lambda s: float(s.final_logit_softcapping),
    },
    further=lambda s: (
        _query_scale(s)
        if s.attn_logit_softcapping and s.final_logit_softcapping
        else "logits without softcaps where llama.cpp has them built in"
    ),
)

_GEMMA3: Final = replace(
    _GEMMA,
    ggml="gemma3",
    head=True,
    window="key",
    fixed={
        **_NO_BIAS,
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    further=_query_scale,
)


def _without_rope(settings: Any) -> str | None:
    """SmolLM3 rotates all blocks but every fourth; which, llama.cpp has built in."""
    wanted = [int((block + 1) % 4 != 0) for block in range(settings.num_hidden_layers)]
    if list(settings.no_rope_layers) != wanted:
        return "blocks without rotary embeddings other than every fourth, which llama.cpp has built in"
    return None


_GRANITE: Final = Kind(
    "granite",
    orders=_PAIRS,
    fixed=_NO_BIAS,
    keys={
        "attention.scale": lambda s: float(s.attention_multiplier),
        "embedding_scale": lambda s: float(s.embedding_multiplier),
        "residual_scale": lambda s: float(s.residual_multiplier),
        "logit_scale": lambda s: float(s.logits_scaling),
    },
)

_COHERE: Final = Kind(
    "command-r",
    rms=False,
    head=False,
    fixed={"attention_bias": (False, None), "use_qk_norm": (False, None)},
    keys={"logit_scale": lambda s: float(s.logit_scale)},
)


def _exaone_windows(settings: Any) -> str | None:
    if any(kind == "sliding_attention" for kind in settings.layer_types or ()):
        return "sliding windows, which llama.cpp has for its model of 64 blocks only"
    return None


def _gpt2_fixed(settings: Any) -> str | None:
    if not settings.scale_attn_weights or settings.scale_attn_by_inverse_layer_idx:
        return "attention that is scaled in another way"
    return None


def _lfm2_width(settings: Any) -> int:
    """LFM2's MLP is narrower than its configuration says, as in the first Llama."""
    width = int(settings.intermediate_size)
    if not settings.block_auto_adjust_ff_dim:
        return width
    width = int(2 * width / 3)
    if settings.block_ffn_dim_multiplier is not None:
        width = int(settings.block_ffn_dim_multiplier * width)
    multiple = int(settings.block_multiple_of)
    return multiple * -(-width // multiple)


def _expert_keys(count: str, width: str) -> dict[str, Callable[[Any], Value]]:
    """Keys of a mixture of experts, by the names of two settings."""
    return {
        "expert_count": lambda s: int(getattr(s, count)),
        "expert_used_count": lambda s: int(s.num_experts_per_tok),
        "expert_feed_forward_length": lambda s: int(getattr(s, width)),
    }


def _dense_blocks(settings: Any) -> str | None:
    """Qwen's mixtures may have blocks without experts, which llama.cpp's do not."""
    if settings.decoder_sparse_step != 1 or settings.mlp_only_layers:
        return "blocks without experts, which llama.cpp does not have there"
    return None


_QWEN2_MOE: Final = Kind(
    "qwen2moe",
    biased=_QKV,
    rotary=_ALL_ROTARY,
    keys={
        **_expert_keys("num_experts", "moe_intermediate_size"),
        "expert_shared_feed_forward_length": lambda s: int(s.shared_expert_intermediate_size),
    },
    fixed={"norm_topk_prob": (False,)},
    further=_dense_blocks,
    factorized=False,
)

KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": Kind("qwen2", biased=_QKV, rotary=_ALL_ROTARY),
        "qwen3": Kind("qwen3", rotary=_ALL_ROTARY),
        "qwen2_moe": _QWEN2_MOE,
        "qwen3_moe": Kind(
            "qwen3moe",
            rotary=_ALL_ROTARY,
            keys=_expert_keys("num_experts", "moe_intermediate_size"),
            fixed={"norm_topk_prob": (True,), **_NO_BIAS},
            further=_dense_blocks,
            factorized=False,
        ),
        "mixtral": replace(
            _LLAMA, keys=_expert_keys("num_local_experts", "intermediate_size"), factorized=False
        ),
        "olmoe": Kind(
            "olmoe",
            keys=_expert_keys("num_experts", "intermediate_size"),
            further=lambda s: (
                "fewer heads of keys than of queries"
                if s.num_key_value_heads not in (None, s.num_attention_heads)
                else None
            ),
            fixed={"norm_topk_prob": (False,), "clip_qkv": (None,), **_NO_BIAS},
            factorized=False,
        ),
        "gpt_oss": Kind(
            "gpt-oss",
            rotary=("default", "yarn"),
            window=2,
            keys=_expert_keys("num_local_experts", "intermediate_size"),
            biased=(*_QKV, "attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
            factorized=False,
        ),
        "gemma": _GEMMA,
        "gemma2": _GEMMA2,
        "gemma3_text": _GEMMA3,
        "phi": Kind(
            "phi2",
            rms=False,
            activations=_TANH_GELU,
            partial=True,
            biased=(*_QKV, "attn_output", "ffn_up", "ffn_down", "output"),
            fixed={"qk_layernorm": (False, None)},
        ),
        # llama.cpp takes them apart or together; apart, it asks for no others when it is handed tensors one by one.
        "phi3": Kind(
            "phi3",
            partial=True,
            rotary=("default", "longrope"),
            fixed=_NO_BIAS,
            split={"attn_qkv": _QKV},
        ),
        "smollm3": Kind("smollm3", orders=_PAIRS, fixed=_NO_BIAS, further=_without_rope),
        "granite": _GRANITE,
        "olmo": Kind("olmo", rms=False, orders=_PAIRS, fixed={**_NO_BIAS, "clip_qkv": (None,)}),
        "olmo2": Kind("olmo2", fixed=_NO_BIAS),
        "olmo3": Kind("olmo2", fixed=_NO_BIAS, window=4),
        "starcoder2": Kind(
            "starcoder2",
            rms=False,
            activations=_TANH_GELU,
            biased=(*_QKV, "attn_output", "ffn_up", "ffn_down"),
            fixed={"use_bias": (True,)},
        ),
        "stablelm": Kind(
            "stablelm",
            rms=False,
            partial=True,
            biased=_QKV,
            keys={"use_parallel_residual": lambda s: bool(s.use_parallel_residual)},
            fixed={"qk_layernorm": (False, None)},
            factorized=False,  # llama.cpp would take norms of queries and keys, which there are none of
        ),
        "cohere": _COHERE,
        "cohere2": replace(_COHERE, ggml="cohere2", window=4),
        "exaone4": Kind(
            "exaone4", fixed=_NO_BIAS, rotary=("default", "linear", "llama3"), further=_exaone_windows
        ),
        "ernie4_5": Kind("ernie4_5", fixed={"use_bias": (False, None)}),
        "gpt2": Kind(
            "gpt2",
            rms=False,
            activations=_TANH_GELU,
            rotary=(),
            biased=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
            further=_gpt2_fixed,
        ),
        "bloom": Kind(
            "bloom",
            rms=False,
            activations=_TANH_GELU,
            rotary=(),
            orders={"attn_qkv": "by head"},
            biased=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
            fixed={"apply_residual_connection_post_layernorm": (False,)},
            renamed={
                "transformer.word_embeddings_layernorm": "token_embd_norm",
                "post_attention_layernorm": "ffn_norm",
            },
        ),
        "nemotron": Kind(
            "nemotron",
            rms=False,
            activations=("relu2",),
            partial=True,
            shift=1.0,
            fixed=_NO_BIAS,
        ),
        "hunyuan_v1_dense": Kind("hunyuan-dense", fixed=_NO_BIAS),
        "arcee": Kind(
            "arcee",
            orders=_PAIRS,
            activations=("relu2",),
            rotary=("default", "linear", "yarn"),
            fixed=_NO_BIAS,
        ),
        "seed_oss": Kind(
            "seed_oss", biased=_QKV, fixed={"mlp_bias": (False, None), "attention_out_bias": (False,)}
        ),
        "glm4": Kind("glm4", partial=True, biased=_QKV),
        "lfm2": Kind(
            "lfm2",
            fixed={"conv_bias": (False,)},
            further=lambda s: (
                "blocks of one kind alone, on which llama.cpp aborts" if len(set(s.layer_types)) < 2 else None
            ),
            keys={
                "shortconv.l_cache": lambda s: int(s.conv_L_cache),
                "feed_forward_length": _lfm2_width,
                "attention.head_count_kv": lambda s: [
                    s.num_key_value_heads if kind == "full_attention" else 0 for kind in s.layer_types
                ],
            },
        ),
        "gpt_neox": Kind(
            "gptneox",
            rms=False,
            activations=_TANH_GELU,
            partial=True,
            orders={"attn_qkv": "by head"},
            biased=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
            keys={"use_parallel_residual": lambda s: bool(s.use_parallel_residual)},
            fixed={"attention_bias": (True,)},
        ),
    }
)
"""By ``model_type``."""


def has_head(ggml: str) -> bool:
    """Whether llama.cpp's graph of an architecture has a tensor for a head beside the embedding."""
    return all(kind.head for kind in KINDS.values() if kind.ggml == ggml)


def may_be_handed_over(ggml: str) -> bool:
    """Whether models of an architecture are computed right when llama.cpp is handed their tensors one by one."""
    return any(kind.ggml == ggml and kind.factorized for kind in KINDS.values())
