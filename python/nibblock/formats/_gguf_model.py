"""Maps a GGUF file's metadata and tensor names onto a transformers configuration and module names.

Nothing here needs torch or transformers: `plan(file)` checks every name and shape against the
metadata before any memory is spent, and says which module takes which tensor.

Source: the tensor names and metadata keys of the GGUF specification; the row order of Llama's q
and k after the specification's converter (rows of a head interleaved as pairs instead of two
halves).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nibblock.formats._gguf_file import GGUFFile, StringArray

# architecture: (transformers model_type, rows of q and k interleaved, q/k/v biases, q/k norms)
ARCHITECTURES = {
    "llama": ("llama", True, "optional", False),
    "qwen2": ("qwen2", False, "required", False),
    "qwen3": ("qwen3", False, "none", True),
}


@dataclass(frozen=True)
class Slot:
    """One tensor of the file and its place in the model."""

    tensor: str
    module: str  # dotted module path
    kind: str  # "linear", "bias", "norm", "embedding"
    heads: int = 0  # > 0: undo the interleaved row order of that many heads


@dataclass
class ModelPlan:
    """What `load_gguf` builds: the configuration's values and one slot for each tensor."""

    architecture: str
    model_type: str
    config: dict[str, Any]
    slots: list[Slot] = field(default_factory=list)
    tied: bool = False
    rope_factors: str | None = None  # name of the tensor that divides the rotary frequencies


class _Metadata:
    """Typed look-ups; each error names the file and the key."""

    def __init__(self, file: GGUFFile, prefix: str = "") -> None:
        self.file, self.prefix = file, prefix

    def get(self, key: str) -> Any:
        return self.file.metadata.get(self.prefix + key)

    def integer(self, key: str, default: int | None = None, low: int = 1) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # some converters repeat one number for each layer
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
            raise self._fail(key, f"an integer of at least {low}", value)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or value <= 0:
            raise self._fail(key, "a positive number", value)
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self._fail(key, "a string", value)
        return value

    def _fail(self, key: str, need: str, value: Any) -> ValueError:
        if isinstance(value, (np.ndarray, StringArray)):
            value = f"an array of {len(value)}"
        got = "nothing" if value is None else str(value)[:60]
        return self.file.fail(f"hold metadata {self.prefix}{key} as {need}", got)


def unpermute(rows: int, heads: int) -> np.ndarray:
    """Row order that turns a GGUF llama q or k projection into transformers' order.

    GGUF keeps row 2i + j of a head where transformers keeps row j * (head_dim / 2) + i:
    result[row] is the GGUF row to take. Rows carry whole groups, so codes, scales and offsets move
    without loss.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _rope(meta: _Metadata, context: int) -> dict[str, Any]:
    """transformers' rope_parameters."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": meta.real("rope.freq_base", 10000.0),
    }
    # As llama.cpp reads them: a file without a type means linear, and the factor's name in older
    # files stands in where the new one is absent.
    kind = meta.text("rope.scaling.type", "linear")
    old = "rope.scale_linear"
    key = old if meta.get("rope.scaling.factor") is None else "rope.scaling.factor"
    factor = meta.real(key, 1.0)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return rope
    if kind == "linear":
        return {**rope, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        # ggml multiplies the usual magnitude correction by attn_factor; transformers replaces it.
        correction = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
        return {
            **rope,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": meta.integer(
                "rope.scaling.original_context_length", context
            ),
            "attention_factor": correction * meta.real("rope.scaling.attn_factor", 1.0),
            "beta_fast": meta.real("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": meta.real("rope.scaling.yarn_beta_slow", 1.0),
        }
    raise meta._fail("rope.scaling.type", "one of none, linear, yarn", kind)


def _tokens(file: GGUFFile, vocabulary: int) -> dict[str, Any]:
    """bos, eos and pad ids, where the file has them and they are in the vocabulary."""
    meta = _Metadata(file, "tokenizer.ggml.")

    def token(key: str) -> int | None:
        if meta.get(key) is None:
            return None
        value = meta.integer(key, low=0)
        if value == 2**32 - 1:  # how some converters write "none"
            return None
        if value >= vocabulary:
            raise meta._fail(key, f"an id below {vocabulary}", value)
        return value

    eos = [i for i in (token("eos_token_id"), token("eot_token_id")) if i is not None]
    eos = list(dict.fromkeys(eos))
    return {
        "bos_token_id": token("bos_token_id"),
        "eos_token_id": eos if len(eos) > 1 else (eos[0] if eos else None),
        "pad_token_id": token("padding_token_id"),
    }


def _head_dim(meta: _Metadata, hidden: int, heads: int) -> int:
    key = "attention.key_length"
    if meta.get(key) is None and hidden % heads:
        raise meta._fail("attention.head_count", f"a divisor of embedding_length {hidden}", heads)
    head_dim = meta.integer(key, hidden // heads)
    for other in ("attention.value_length", "rope.dimension_count"):
        if meta.integer(other, head_dim) != head_dim:
            raise meta._fail(other, f"the head size {head_dim}", meta.get(other))
    if head_dim % 2:
        raise meta._fail(key, "an even head size", head_dim)
    return head_dim


def plan(file: GGUFFile) -> ModelPlan:
    """Checks the whole file against its own metadata and says how to build the model.

    Args:
        file: an opened GGUFFile.
    Returns:
        the ModelPlan; slots cover every tensor of the file.
    Raises:
        ValueError: unknown architecture; missing, unexpected or misshaped tensor; metadata that is
            missing or outside what the architecture can express. The message names file and tensor.
    """
    architecture = _Metadata(file).text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise file.fail(
            f"hold a model of architecture {', '.join(ARCHITECTURES)}", repr(architecture[:60])
        )
    if _Metadata(file).integer("split.count", 1) > 1:
        raise file.fail("be one whole file", "one part of a split model; merge the parts first")
    model_type, interleaved, biases, qk_norms = ARCHITECTURES[architecture]
    meta = _Metadata(file, f"{architecture}.")
    if meta.integer("expert_count", 0, low=0):
        raise meta._fail("expert_count", "0 (a dense model)", meta.get("expert_count"))

    hidden = meta.integer("embedding_length")
    inner = meta.integer("feed_forward_length")
    layers = meta.integer("block_count")
    heads = meta.integer("attention.head_count")
    kv_heads = meta.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise meta._fail("attention.head_count_kv", f"a divisor of head_count {heads}", kv_heads)
    head_dim = _head_dim(meta, hidden, heads)
    context = meta.integer("context_length", 2048)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    embedding = file.tensors.get("token_embd.weight")
    vocabulary = embedding.shape[0] if embedding is not None else 0
    if isinstance(tokens, StringArray):
        vocabulary = len(tokens)
    vocabulary = meta.integer("vocab_size", vocabulary, low=0)

    tied = "output.weight" not in file.tensors
    used: set[str] = set()
    result = ModelPlan(architecture, model_type, {}, tied=tied)

    def add(name: str, module: str, kind: str, shape: tuple[int, ...], order: int = 0) -> None:
        info = file.tensors.get(name)
        if info is None:
            raise file.fail(f"hold tensor {name}", "none of that name")
        if info.shape != shape:
            raise file.fail(f"hold tensor {name} with shape {list(shape)}", list(info.shape))
        used.add(name)
        result.slots.append(Slot(name, module, kind, order))

    def linear(name: str, module: str, n: int, k: int, bias: str, order: int = 0) -> None:
        add(f"{name}.weight", module, "linear", (n, k), order)
        if bias == "required" or (bias == "optional" and f"{name}.bias" in file.tensors):
            add(f"{name}.bias", module, "bias", (n,), order)

    add("token_embd.weight", "model.embed_tokens", "embedding", (vocabulary, hidden))
    free = "optional" if biases == "optional" else "none"
    q_rows, kv_rows = heads * head_dim, kv_heads * head_dim
    for i in range(layers):
        b, m = f"blk.{i}", f"model.layers.{i}"
        add(f"{b}.attn_norm.weight", f"{m}.input_layernorm", "norm", (hidden,))
        q_order, k_order = (heads, kv_heads) if interleaved else (0, 0)
        linear(f"{b}.attn_q", f"{m}.self_attn.q_proj", q_rows, hidden, biases, q_order)
        linear(f"{b}.attn_k", f"{m}.self_attn.k_proj", kv_rows, hidden, biases, k_order)
        linear(f"{b}.attn_v", f"{m}.self_attn.v_proj", kv_rows, hidden, biases)
        linear(f"{b}.attn_output", f"{m}.self_attn.o_proj", hidden, q_rows, free)
        if qk_norms:
            add(f"{b}.attn_q_norm.weight", f"{m}.self_attn.q_norm", "norm", (head_dim,))
            add(f"{b}.attn_k_norm.weight", f"{m}.self_attn.k_norm", "norm", (head_dim,))
        add(f"{b}.ffn_norm.weight", f"{m}.post_attention_layernorm", "norm", (hidden,))
        linear(f"{b}.ffn_gate", f"{m}.mlp.gate_proj", inner, hidden, free)
        linear(f"{b}.ffn_up", f"{m}.mlp.up_proj", inner, hidden, free)
        linear(f"{b}.ffn_down", f"{m}.mlp.down_proj", hidden, inner, free)
    add("output_norm.weight", "model.norm", "norm", (hidden,))
    if not tied:
        linear("output", "lm_head", vocabulary, hidden, "none")

    if "rope_freqs.weight" in file.tensors:
        info = file.tensors["rope_freqs.weight"]
        if info.shape != (head_dim // 2,):
            raise file.fail(
                f"hold tensor rope_freqs.weight with shape [{head_dim // 2}]", list(info.shape)
            )
        used.add("rope_freqs.weight")
        result.rope_factors = "rope_freqs.weight"
    for name in file.tensors:
        if name not in used:
            raise file.fail(f"hold only tensors that a {architecture} model has", repr(name))

    result.config = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": meta.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(meta, context),
        "tie_word_embeddings": tied,
        **_tokens(file, vocabulary),
    }
    if architecture == "llama":
        named = {slot.module.rsplit(".", 1)[-1] for slot in result.slots if slot.kind == "bias"}
        result.config["attention_bias"] = bool(named & {"q_proj", "k_proj", "v_proj", "o_proj"})
        result.config["mlp_bias"] = bool(named & {"gate_proj", "up_proj", "down_proj"})
    if architecture == "qwen2":
        if head_dim * heads != hidden:
            raise meta._fail("attention.key_length", f"{hidden // heads}", head_dim)
    else:
        result.config["head_dim"] = head_dim
    return result


def llama3_scaling(factors: np.ndarray, theta: float, context: int) -> dict[str, Any] | None:
    """The llama3 rope parameters that give these frequency divisors, or None when none of them do.

    The file stores only the result (one divisor per frequency pair). The published models all use
    low_freq_factor 1, high_freq_factor 4 and an original context of 8192.
    """
    half = len(factors)
    wavelength = 2 * math.pi * theta ** (np.arange(half, dtype=np.float64) / half)
    factor = float(np.max(factors))
    for original in dict.fromkeys((8192, context)):
        low, high = float(original), original / 4.0
        smooth = (original / wavelength - 1.0) / 3.0
        middle = 1.0 / ((1.0 - smooth) / factor + smooth)
        expected = np.where(wavelength < high, 1.0, np.where(wavelength > low, factor, middle))
        if np.allclose(factors, expected, rtol=1e-5, atol=0.0):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    return None


def longrope_scaling(factors: np.ndarray, theta: float, context: int) -> dict[str, Any]:
    """The rope parameters that give any frequency divisors: longrope with one list for all lengths.

    Both factors are 1, so that cosines and sines are not scaled.
    """
    listed = [float(value) for value in factors]
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
        "short_factor": listed,
        "long_factor": list(listed),
    }
