"""The architectures that `load_gguf` reads: what their files hold and what transformers calls it.

One row for each in `ARCHITECTURES`; what a row cannot say is a function that gives the rest of the
configuration. Nothing here needs torch or transformers.

Source: the GGUF specification's tensor names and keys; values that no key holds (window patterns,
layers without rotary positions, Gemma's scale of 27B models) after llama.cpp, and after its
converter how gpt-oss is stored; names of modules and configurations after transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nibblock.formats._gguf_file import GGUFFile
from nibblock.formats._gguf_metadata import Metadata, rope_parameters

# (tensor in a block, module in a layer); of an MLP also how many times `inner` the rows are, 0 for
# the one that leads back to `hidden`.
_NORMS = (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))
_SANDWICH = (
    ("attn_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)
_BEHIND = (
    ("post_attention_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)
_POST = (_NORMS[0], ("post_attention_norm", "post_attention_layernorm"))
_GATED = (("ffn_gate", "gate_proj", 1), ("ffn_up", "up_proj", 1), ("ffn_down", "down_proj", 0))
_PLAIN = (("ffn_up", "c_fc", 1), ("ffn_down", "c_proj", 0))
_GATE_UP = (("ffn_up", "gate_up_proj", 2), ("ffn_down", "down_proj", 0))


@dataclass
class Sizes:
    """What a file's metadata and tensor table say about the model."""

    file: GGUFFile
    meta: Metadata
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int  # how many of head_dim are rotated
    context: int
    experts: int = 0
    experts_used: int = 0
    expert_inner: int = 0
    shared_inner: int = 0
    biased: set[str] = field(default_factory=set)  # last names of the linears that have a bias

    def has_bias(self, *names: str) -> bool:
        return not self.biased.isdisjoint(names)


def _nothing(sizes: Sizes) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        model_type: transformers' name.
        interleaved: rows of q and k lie as pairs instead of two halves of a head.
        qkv_bias, bias: "none", "optional" or "required", of q, k and v and of the other linears.
        own_head_dim: the configuration says head_dim; else it is hidden / heads.
        partial_rotary: rope.dimension_count may be less than the head size.
        rope_tensors: which tensors may divide the rotary frequencies: "freqs" (rope_freqs.weight),
            "factors" (rope_factors_short.weight and rope_factors_long.weight), or "none".
        epsilon: the configuration's name for the one of norms; unless "rms_norm_eps", they are
            LayerNorm with a bias in place of RMSNorm.
        norm_shift: added to the weights of norms.
        norms: (tensor, module) of each block.
        optional_norm: one of their tensors that either every block has or none.
        qk_norm: "" | "head", one vector for all heads | "rows", one value for each row | "each",
            one vector for each head, in all layers or none.
        fused: q, k and v are one tensor, as are gate and up, in the file and in transformers.
        mlp: (tensor, module, rows / inner).
        experts: a block has a router and experts in place of an MLP.
        router: what transformers calls the router.
        expert_bias: the router has a bias, and so has each projection of each expert.
        sinks: a block's attention has a sink for each head.
        config: the rest of the configuration.
    """

    model_type: str
    interleaved: bool = False
    qkv_bias: str = "none"
    bias: str = "none"
    own_head_dim: bool = False
    partial_rotary: bool = False
    rope_tensors: str = "freqs"
    epsilon: str = "rms_norm_eps"
    norm_shift: float = 0.0
    norms: tuple[tuple[str, str], ...] = _NORMS
    optional_norm: str = ""
    qk_norm: str = ""
    fused: bool = False
    mlp: tuple[tuple[str, str, int], ...] = _GATED
    experts: bool = False
    router: str = "gate"
    expert_bias: bool = False
    sinks: bool = False
    config: Callable[[Sizes], dict[str, Any]] = _nothing

    @property
    def layer_norm(self) -> bool:
        return self.epsilon != "rms_norm_eps"


# --- what rows cannot say -------------------------------------------------------------------------


def _llama(sizes: Sizes) -> dict[str, Any]:
    return {
        "attention_bias": sizes.has_bias("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp_bias": sizes.has_bias("gate_proj", "up_proj", "down_proj"),
    }


def _mixtral(sizes: Sizes) -> dict[str, Any]:
    if not sizes.meta.flag("expert_weights_norm", True):
        raise sizes.meta.fail("expert_weights_norm", "true", False)
    return {"num_local_experts": sizes.experts, "num_experts_per_tok": sizes.experts_used}


def _qwen_moe(sizes: Sizes, norm: bool) -> dict[str, Any]:
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.experts_used,
        "moe_intermediate_size": sizes.expert_inner,
        "norm_topk_prob": sizes.meta.flag("expert_weights_norm", norm),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2_moe(sizes: Sizes) -> dict[str, Any]:
    return {
        **_qwen_moe(sizes, norm=False),
        "shared_expert_intermediate_size": sizes.shared_inner,
    }


def _qwen3_moe(sizes: Sizes) -> dict[str, Any]:
    return _qwen_moe(sizes, norm=True)


def _windows(sizes: Sizes, period: int) -> list[str]:
    """layer_types: which layers attend within a window. The last of each period does not."""
    meta, key = sizes.meta, "attention.sliding_window_pattern"
    value = meta.get(key)
    if isinstance(value, np.ndarray):
        if len(value) != sizes.layers or not set(value.tolist()) <= {0, 1}:
            raise meta.fail(key, f"{sizes.layers} times true or false", value)
        sliding = [bool(flag) for flag in value]
    else:
        period = meta.integer(key, period)
        sliding = [i % period < period - 1 for i in range(sizes.layers)]
    return ["sliding_attention" if flag else "full_attention" for flag in sliding]


def _query_scalar(sizes: Sizes, layers_27b: int) -> int:
    """The 27B models scale attention by hidden / heads; no key says so, their depth does."""
    return sizes.hidden // sizes.heads if sizes.layers == layers_27b else sizes.head_dim


def _gemma2(sizes: Sizes) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": _query_scalar(sizes, 46),
        "attn_logit_softcapping": sizes.meta.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": sizes.meta.real("final_logit_softcapping", 30.0),
        "sliding_window": sizes.meta.integer("attention.sliding_window", 4096),
        "layer_types": _windows(sizes, 2),
    }


def _gemma3(sizes: Sizes) -> dict[str, Any]:
    meta = sizes.meta
    window = meta.integer("attention.sliding_window", 0, low=0)
    capping = "final_logit_softcapping"
    return {
        "query_pre_attn_scalar": _query_scalar(sizes, 62),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None if meta.get(capping) is None else meta.real(capping),
        # (Without windows no layer reads it, but transformers makes the mask of one anyway.)
        "sliding_window": window or sizes.context,
        "layer_types": _windows(sizes, 6) if window else ["full_attention"] * sizes.layers,
        "rope_parameters": {
            "full_attention": rope_parameters(meta, sizes.context),
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": meta.real("rope.freq_base_swa", 10000.0),
            },
        },
    }


def _window(sizes: Sizes) -> dict[str, Any]:
    return {"sliding_window": sizes.meta.integer("attention.sliding_window", 0, low=0) or None}


def _phi3(sizes: Sizes) -> dict[str, Any]:
    original = sizes.meta.integer("rope.scaling.original_context_length", sizes.context)
    return {**_window(sizes), "original_max_position_embeddings": original}


def _granite(sizes: Sizes) -> dict[str, Any]:
    meta = sizes.meta
    if not meta.flag("rope.scaling.finetuned", True):  # there the switch for rotary positions
        raise meta.fail("rope.scaling.finetuned", "true (a model with rotary positions)", False)
    return {
        **_llama(sizes),
        "attention_multiplier": meta.real("attention.scale", sizes.head_dim**-0.5),
        "embedding_multiplier": meta.real("embedding_scale", 1.0),
        "residual_multiplier": meta.real("residual_scale", 1.0),
        "logits_scaling": meta.real("logit_scale"),
    }


def _smollm3(sizes: Sizes) -> dict[str, Any]:
    # No key says which layers have no rotary positions: every fourth.
    return {**_llama(sizes), "no_rope_layers": [int(i % 4 < 3) for i in range(sizes.layers)]}


def _olmo2(sizes: Sizes) -> dict[str, Any]:
    key = "attention.sliding_window"
    if sizes.meta.integer(key, 0, low=0):  # Olmo 3 goes by this name too
        raise sizes.meta.fail(key, "0 (Olmo 2 has no windows)", sizes.meta.get(key))
    return {}


def _stablelm(sizes: Sizes) -> dict[str, Any]:
    return {
        "use_qkv_bias": sizes.has_bias("q_proj", "k_proj", "v_proj"),
        "qk_layernorm": "blk.0.attn_q_norm.weight" in sizes.file.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in sizes.file.tensors,
    }


def _gpt_oss(sizes: Sizes) -> dict[str, Any]:
    rope = rope_parameters(sizes.meta, sizes.context)
    if rope["rope_type"] == "yarn":
        # No key says it: these models were made without rounding the range of frequencies.
        rope["truncate"] = False
    return {
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.experts_used,
        "intermediate_size": sizes.expert_inner,
        "sliding_window": sizes.meta.integer("attention.sliding_window"),
        "layer_types": _windows(sizes, 2),
        "rope_parameters": rope,
    }


def _starcoder2(sizes: Sizes) -> dict[str, Any]:
    return {**_window(sizes), "use_bias": bool(sizes.biased)}


# --- the table ------------------------------------------------------------------------------------

ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        interleaved=True,
        qkv_bias="optional",
        bias="optional",
        own_head_dim=True,
        config=_llama,
    ),
    "qwen2": Architecture("qwen2", qkv_bias="required"),
    "qwen3": Architecture("qwen3", own_head_dim=True, qk_norm="head"),
    "qwen2moe": Architecture("qwen2_moe", qkv_bias="required", experts=True, config=_qwen2_moe),
    "qwen3moe": Architecture(
        "qwen3_moe", own_head_dim=True, qk_norm="head", experts=True, config=_qwen3_moe
    ),
    "gemma": Architecture("gemma", own_head_dim=True, norm_shift=-1.0),
    "gemma2": Architecture(
        "gemma2", own_head_dim=True, norm_shift=-1.0, norms=_SANDWICH, config=_gemma2
    ),
    "gemma3": Architecture(
        "gemma3_text",
        own_head_dim=True,
        rope_tensors="none",
        norm_shift=-1.0,
        norms=_SANDWICH,
        qk_norm="head",
        config=_gemma3,
    ),
    "phi3": Architecture(
        "phi3",
        partial_rotary=True,
        rope_tensors="factors",
        fused=True,
        mlp=_GATE_UP,
        config=_phi3,
    ),
    "granite": Architecture(
        "granite", interleaved=True, qkv_bias="optional", bias="optional", config=_granite
    ),
    "smollm3": Architecture(
        "smollm3", interleaved=True, qkv_bias="optional", bias="optional", config=_smollm3
    ),
    "olmo2": Architecture("olmo2", norms=_BEHIND, qk_norm="rows", config=_olmo2),
    "stablelm": Architecture(
        "stablelm",
        qkv_bias="optional",
        partial_rotary=True,
        rope_tensors="none",
        epsilon="layer_norm_eps",
        optional_norm="ffn_norm",
        qk_norm="each",
        config=_stablelm,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        qkv_bias="optional",
        bias="optional",
        epsilon="norm_epsilon",
        mlp=_PLAIN,
        config=_starcoder2,
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        qkv_bias="required",
        bias="required",
        own_head_dim=True,
        rope_tensors="none",
        norms=_POST,
        experts=True,
        router="router",
        expert_bias=True,
        sinks=True,
        config=_gpt_oss,
    ),
}

# A llama file with experts is what transformers calls Mixtral.
LLAMA_WITH_EXPERTS = Architecture(
    "mixtral", interleaved=True, own_head_dim=True, experts=True, config=_mixtral
)
