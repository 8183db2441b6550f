"""Tiny GGUF files of many architectures, and where transformers keeps each of their tensors.

The places are written down here a second time, as patterns, so that a mistake in `load_gguf`'s own
table cannot hide.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf_samples import Model, gguf

_MIXED = {"": "Q4_0", "attn_v": "Q8_0", "ffn_down": "Q4_1", "token_embd": "Q8_0", "output.": "Q8_0"}

# transformers' model_type, where it is not the name in the file
MODEL_TYPES = {
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3_text",
    "gpt-oss": "gpt_oss",
}

# what a block of each architecture holds: name -> shape in letters (see `Sample.size`)
_NORMS = {"attn_norm.weight": "h", "ffn_norm.weight": "h"}
_QKV = {"attn_q.weight": "qh", "attn_k.weight": "kh", "attn_v.weight": "kh"}
_ATTENTION = {**_QKV, "attn_output.weight": "hq"}
_BIASES = {"attn_q.bias": "q", "attn_k.bias": "k", "attn_v.bias": "k"}
_MLP = {"ffn_gate.weight": "ih", "ffn_up.weight": "ih", "ffn_down.weight": "hi"}
_EXPERTS = {
    "ffn_gate_inp.weight": "eh",
    "ffn_gate_exps.weight": "exh",
    "ffn_up_exps.weight": "exh",
    "ffn_down_exps.weight": "ehx",
}
_HEAD_NORMS = {"attn_q_norm.weight": "d", "attn_k_norm.weight": "d"}
_BEHIND = {"post_attention_norm.weight": "h", "post_ffw_norm.weight": "h"}
_LLAMA = {**_NORMS, **_ATTENTION, **_MLP}
_MOE = {**_NORMS, **_ATTENTION, **_EXPERTS}
_LAYER_NORMS = {**_NORMS, "attn_norm.bias": "h", "ffn_norm.bias": "h"}

BLOCKS = {
    "llama": _LLAMA,
    "mixtral": _MOE,
    "qwen2moe": {
        **_MOE,
        **_BIASES,
        "ffn_gate_inp_shexp.weight": "h",
        "ffn_gate_shexp.weight": "sh",
        "ffn_up_shexp.weight": "sh",
        "ffn_down_shexp.weight": "hs",
    },
    "qwen3moe": {**_MOE, **_HEAD_NORMS},
    "gemma": _LLAMA,
    "gemma2": {**_LLAMA, **_BEHIND},
    "gemma3": {**_LLAMA, **_BEHIND, **_HEAD_NORMS},
    "phi3": {
        **_NORMS,
        "attn_qkv.weight": "fh",
        "attn_output.weight": "hq",
        "ffn_up.weight": "gh",
        "ffn_down.weight": "hi",
    },
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "olmo2": {
        **_BEHIND,
        **_ATTENTION,
        **_MLP,
        "attn_q_norm.weight": "q",
        "attn_k_norm.weight": "k",
    },
    "stablelm": {
        **_LAYER_NORMS,
        **_ATTENTION,
        **_MLP,
        **_BIASES,
        "attn_q_norm.weight": "ad",
        "attn_k_norm.weight": "bd",
    },
    "starcoder2": {
        **_LAYER_NORMS,
        **_ATTENTION,
        **_BIASES,
        "attn_output.bias": "h",
        "ffn_up.weight": "ih",
        "ffn_up.bias": "i",
        "ffn_down.weight": "hi",
        "ffn_down.bias": "h",
    },
    "gpt-oss": {
        "attn_norm.weight": "h",
        "post_attention_norm.weight": "h",
        **_ATTENTION,
        **_BIASES,
        "attn_output.bias": "h",
        "attn_sinks.weight": "a",
        **_EXPERTS,
        "ffn_gate_inp.bias": "e",
        "ffn_gate_exps.bias": "ex",
        "ffn_up_exps.bias": "ex",
        "ffn_down_exps.bias": "eh",
    },
}


class Sample(Model):
    """A tiny model of one architecture; `arch` "mixtral" is written as llama with experts."""

    def __init__(self, arch: str, types: dict[str, str] | str = _MIXED, **options: Any):
        self.name = arch
        options = {**_options(arch), **options}
        super().__init__("llama" if arch == "mixtral" else arch, types, **options)
        self.experts = options.get("experts", 4)
        self.used = options.get("used", 2)
        self.expert_inner = options.get("expert_inner", 96)
        self.shared = options.get("shared", 160)

    def size(self, letter: str) -> int:
        q, k = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "h": self.hidden,
            "q": q,
            "k": k,
            "f": q + 2 * k,
            "i": self.inner,
            "g": 2 * self.inner,
            "d": self.head_dim,
            "a": self.heads,
            "b": self.kv_heads,
            "e": self.experts,
            "x": self.inner if self.name == "mixtral" else self.expert_inner,
            "s": self.shared,
        }[letter]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        out: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab, self.hidden)}
        for i in range(self.layers):
            for name, letters in BLOCKS[self.name].items():
                if name not in self.options.get("without", ()):
                    out[f"blk.{i}.{name}"] = tuple(self.size(letter) for letter in letters)
        out["output_norm.weight"] = (self.hidden,)
        if self.name in ("stablelm", "starcoder2"):
            out["output_norm.bias"] = (self.hidden,)
        if not self.tied:
            out["output.weight"] = (self.vocab, self.hidden)
        return out

    def metadata(self) -> dict[str, Any]:
        out = super().metadata()
        a = self.arch
        if self.name in ("stablelm", "starcoder2"):
            epsilon = out.pop(f"{a}.attention.layer_norm_rms_epsilon")
            out[f"{a}.attention.layer_norm_epsilon"] = epsilon
        if "ffn_gate_exps.weight" in BLOCKS[self.name]:
            out[f"{a}.expert_count"], out[f"{a}.expert_used_count"] = self.experts, self.used
        if self.name in ("qwen2moe", "qwen3moe", "gpt-oss"):
            out[f"{a}.expert_feed_forward_length"] = self.expert_inner
        if self.name == "qwen2moe":
            out[f"{a}.expert_shared_feed_forward_length"] = self.shared
        extra = {f"{a}.{key}": value for key, value in self.options.get("keys", {}).items()}
        return {k: v for k, v in {**out, **extra}.items() if v is not None}


def _options(arch: str) -> dict[str, Any]:
    """Small sizes; what llama.cpp's converter writes for the architecture besides."""
    out: dict[str, Any] = {"hidden": 64, "inner": 96, "heads": 4, "kv_heads": 2, "seed": 5}
    own = {
        "gemma": {"head_dim": 32, "tied": True},
        "gemma2": {
            "head_dim": 32,
            "tied": True,
            "keys": {
                "attn_logit_softcapping": 20.0,
                "final_logit_softcapping": 10.0,
                "attention.sliding_window": 4,
                "rope.freq_base": None,
            },
        },
        "gemma3": {
            "head_dim": 32,
            "tied": True,
            "layers": 7,  # the sixth sees everything
            "keys": {"attention.sliding_window": 4, "rope.freq_base": 1e6},
        },
        "phi3": {"keys": {"attention.sliding_window": 6}},
        "granite": {
            "tied": True,
            "keys": {
                "attention.scale": 0.05,
                "embedding_scale": 12.0,
                "residual_scale": 0.22,
                "logit_scale": 8.0,
            },
        },
        "smollm3": {"tied": True, "layers": 5, "keys": {"rope.freq_base": 5e6}},
        "stablelm": {"keys": {"rope.dimension_count": 4}},
        "starcoder2": {"tied": True},
        "gpt-oss": {
            "head_dim": 32,
            "layers": 3,
            "inner": 96,
            "keys": {
                "attention.sliding_window": 4,
                "rope.freq_base": 1.5e5,
                "rope.dimension_count": None,
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 32.0,
                "rope.scaling.original_context_length": 16,
            },
        },
    }
    return {**out, **own.get(arch, {})}


# --- where transformers keeps them ----------------------------------------------------------------

_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "attn_sinks": "self_attn.sinks",
}
_OTHERWISE = {
    ("gemma2", "ffn_norm"): "pre_feedforward_layernorm",
    ("gemma3", "ffn_norm"): "pre_feedforward_layernorm",
    ("phi3", "ffn_up"): "mlp.gate_up_proj",
    ("starcoder2", "ffn_up"): "mlp.c_fc",
    ("starcoder2", "ffn_down"): "mlp.c_proj",
    ("gpt-oss", "ffn_gate_inp"): "mlp.router",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _halves(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head: even ones first, odd ones behind."""
    per_head = value.reshape(heads, -1, *value.shape[1:])
    return np.concatenate((per_head[:, 0::2], per_head[:, 1::2]), axis=1).reshape(value.shape)


def expected_state(path: Path, sample: Sample) -> dict[str, torch.Tensor]:
    """transformers' state dict, of float32 values that the gguf package dequantised."""
    out: dict[str, np.ndarray] = {}
    experts: dict[str, np.ndarray] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stem, leaf = tensor.name.rsplit(".", 1)
        if sample.name in ("gemma", "gemma2", "gemma3") and stem.endswith("norm"):
            value = value - np.float32(1)
        found = re.fullmatch(r"blk\.(\d+)\.(\w+?)(?:\.(\d+))?", stem)
        if not found:
            if stem in _TOP:
                out[f"{_TOP[stem]}.{leaf}"] = value
            continue
        layer, part, expert = found.groups()
        prefix = f"model.layers.{layer}."
        if part.endswith("_exps") or expert is not None:
            key = f"{prefix}mlp.experts.{part.removesuffix('_exps')}"
            if leaf == "bias":
                key += "_bias"
            if expert is not None:
                value = (
                    np.concatenate((experts[key], value[None])) if key in experts else value[None]
                )
            experts[key] = value
            continue
        if sample.name == "stablelm" and part in ("attn_q_norm", "attn_k_norm"):
            for head, row in enumerate(value):
                out[f"{prefix}self_attn.{part[5]}_layernorm.norms.{head}.{leaf}"] = row
            continue
        if sample.name in ("llama", "mixtral", "granite", "smollm3"):
            if part == "attn_q":
                value = _halves(value, sample.heads)
            elif part == "attn_k":
                value = _halves(value, sample.kv_heads)
        if part == "ffn_gate_inp_shexp":
            value = value.reshape(1, -1)
        place = prefix + _OTHERWISE.get((sample.name, part), _LAYER[part])
        out[place if part == "attn_sinks" else f"{place}.{leaf}"] = value
    for key in [key for key in experts if key.endswith("ffn_gate")]:
        stem = key.removesuffix("ffn_gate")
        if sample.name == "gpt-oss":
            out |= _gpt_oss_experts(stem, experts)
            continue
        both = (experts[key], experts[f"{stem}ffn_up"])
        out[f"{stem}gate_up_proj"] = np.concatenate(both, axis=1)
        out[f"{stem}down_proj"] = experts[f"{stem}ffn_down"]
    if sample.tied:
        out["lm_head.weight"] = out["model.embed_tokens.weight"]
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in out.items()}


def _gpt_oss_experts(stem: str, experts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """gate is in the even columns of gate_up_proj [E, K, N] and up in the odd ones."""
    out = {f"{stem}down_proj": experts[f"{stem}ffn_down"].swapaxes(1, 2)}
    out[f"{stem}down_proj_bias"] = experts[f"{stem}ffn_down_bias"]
    gate, up = (experts[f"{stem}ffn_{name}"] for name in ("gate", "up"))
    both = np.empty((gate.shape[0], gate.shape[2], 2 * gate.shape[1]), np.float32)
    for row in range(gate.shape[1]):
        both[:, :, 2 * row], both[:, :, 2 * row + 1] = gate[:, row], up[:, row]
    out[f"{stem}gate_up_proj"] = both
    biases = np.empty((gate.shape[0], 2 * gate.shape[1]), np.float32)
    biases[:, 0::2] = experts[f"{stem}ffn_gate_bias"]
    biases[:, 1::2] = experts[f"{stem}ffn_up_bias"]
    out[f"{stem}gate_up_proj_bias"] = biases
    return out


def configuration(sample: Sample) -> dict[str, Any]:
    """transformers' configuration of a sample, written out by hand."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    out: dict[str, Any] = {
        "vocab_size": sample.vocab,
        "hidden_size": sample.hidden,
        "intermediate_size": sample.inner,
        "num_hidden_layers": sample.layers,
        "num_attention_heads": sample.heads,
        "num_key_value_heads": sample.kv_heads,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": sample.tied,
        "rope_parameters": rope,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": sample.expert_inner}
    own = {
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen2moe": {**moe, "shared_expert_intermediate_size": 160, "norm_topk_prob": False},
        "qwen3moe": {**moe, "norm_topk_prob": True, "head_dim": sample.head_dim},
        "gemma": {"head_dim": 32},
        "gemma2": {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
            "sliding_window": 4,
        },
        "gemma3": {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 4,
            "rope_parameters": {
                "full_attention": {**rope, "rope_theta": 1e6},
                "sliding_attention": rope,
            },
        },
        "phi3": {"sliding_window": 6},
        "granite": {
            "attention_multiplier": 0.05,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        "smollm3": {"rope_parameters": {**rope, "rope_theta": 5e6}, "no_rope_layer_interval": 4},
        "stablelm": {
            "layer_norm_eps": 1e-5,
            "use_qkv_bias": True,
            "qk_layernorm": True,
            "rope_parameters": {**rope, "partial_rotary_factor": 0.25},
        },
        "starcoder2": {"norm_epsilon": 1e-5, "use_bias": True},
        "gpt-oss": {
            "intermediate_size": sample.expert_inner,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1.5e5,
                "factor": 32.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
    }
    return {**out, **own.get(sample.name, {})}
