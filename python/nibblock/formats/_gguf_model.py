"""Maps a GGUF file's metadata and tensor names onto a transformers configuration and module names.

Nothing here needs torch or transformers: `plan(file)` checks every name and shape against the
metadata before any memory is spent, and says which module takes which tensor.

Source: the tensor names and metadata keys of the GGUF specification; the row order of Llama's q
and k after the specification's converter (rows of a head interleaved as pairs instead of two
halves).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nibblock.formats._gguf_architectures import (
    ARCHITECTURES,
    LLAMA_WITH_EXPERTS,
    Architecture,
    Sizes,
)
from nibblock.formats._gguf_file import GGUFFile, StringArray
from nibblock.formats._gguf_metadata import Metadata, rope_parameters, token_ids


@dataclass(frozen=True)
class Slot:
    """One tensor of the file and its place in the model."""

    tensor: str
    module: str  # dotted module path
    kind: str  # "linear", "bias" (of a linear), "embedding", "parameter"
    heads: int = 0  # > 0: undo the interleaved row order of that many heads
    leaf: str = "weight"  # which of the module's Parameters a "parameter" is
    shift: float = 0.0  # added to every value
    row: int | None = None  # only this row of the tensor


@dataclass(frozen=True)
class ExpertSlot:
    """The experts of one layer: for each projection one tensor [E, N, K], or one [N, K] each."""

    module: str
    gate: tuple[str, ...]
    up: tuple[str, ...]
    down: tuple[str, ...]
    biases: tuple[str, ...] = ()  # of gate, up and down, [E, N] each; empty: there are none


@dataclass
class ModelPlan:
    """What `load_gguf` builds: the configuration's values and one slot for each tensor."""

    architecture: str
    model_type: str
    config: dict[str, Any]
    slots: list[Slot] = field(default_factory=list)
    experts: list[ExpertSlot] = field(default_factory=list)
    tied: bool = False
    # tensors that divide the rotary frequencies: one for all lengths, or for short and long texts
    rope_factors: tuple[str, ...] = ()
    fused: bool = False  # q/k/v and gate/up are one linear each in this architecture


def unpermute(rows: int, heads: int) -> np.ndarray:
    """Row order that turns a GGUF llama q or k projection into transformers' order.

    GGUF keeps row 2i + j of a head where transformers keeps row j * (head_dim / 2) + i:
    result[row] is the GGUF row to take. Rows carry whole groups, so codes, scales and offsets move
    without loss.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


class _Planner:
    """Collects the slots of one file; what is missing or misshaped is an error at once."""

    def __init__(self, spec: Architecture, sizes: Sizes, result: ModelPlan) -> None:
        self.spec, self.sizes, self.result = spec, sizes, result
        self.file = sizes.file
        self.used: set[str] = set()

    def take(self, name: str, *shapes: tuple[int, ...]) -> None:
        """Marks a tensor as used, after checking that it is there in one of these shapes."""
        info = self.file.tensors.get(name)
        if info is None:
            raise self.file.fail(f"hold tensor {name}", "none of that name")
        if info.shape not in shapes:
            raise self.file.fail(
                f"hold tensor {name} with shape {list(shapes[0])}", list(info.shape)
            )
        self.used.add(name)

    def add(self, name: str, module: str, kind: str, shape: tuple[int, ...], **more: Any) -> None:
        self.take(name, shape)
        self.result.slots.append(Slot(name, module, kind, **more))

    def linear(self, name: str, module: str, n: int, k: int, bias: str, heads: int = 0) -> None:
        self.add(f"{name}.weight", module, "linear", (n, k), heads=heads)
        if bias == "required" or (bias == "optional" and f"{name}.bias" in self.file.tensors):
            self.add(f"{name}.bias", module, "bias", (n,), heads=heads)
            self.sizes.biased.add(module.rsplit(".", 1)[-1])

    def norm(self, name: str, module: str, size: int) -> None:
        shift = self.spec.norm_shift
        self.add(f"{name}.weight", module, "parameter", (size,), shift=shift)
        if self.spec.layer_norm:
            self.add(f"{name}.bias", module, "parameter", (size,), leaf="bias")

    def block(self, i: int) -> None:
        spec, size = self.spec, self.sizes
        b, m = f"blk.{i}", f"model.layers.{i}"
        for name, module in spec.norms:
            # Whether a norm is optional was decided by the first block.
            if name != spec.optional_norm or f"blk.0.{name}.weight" in self.file.tensors:
                self.norm(f"{b}.{name}", f"{m}.{module}", size.hidden)
        q_rows, kv_rows = size.heads * size.head_dim, size.kv_heads * size.head_dim
        a = f"{m}.self_attn"
        if spec.fused:
            rows = q_rows + 2 * kv_rows
            self.linear(f"{b}.attn_qkv", f"{a}.qkv_proj", rows, size.hidden, spec.qkv_bias)
        else:
            bias = spec.qkv_bias
            q_order, k_order = (size.heads, size.kv_heads) if spec.interleaved else (0, 0)
            self.linear(f"{b}.attn_q", f"{a}.q_proj", q_rows, size.hidden, bias, q_order)
            self.linear(f"{b}.attn_k", f"{a}.k_proj", kv_rows, size.hidden, bias, k_order)
            self.linear(f"{b}.attn_v", f"{a}.v_proj", kv_rows, size.hidden, bias)
        self.linear(f"{b}.attn_output", f"{a}.o_proj", size.hidden, q_rows, spec.bias)
        self.qk_norms(b, a)
        if spec.sinks:
            shape = (size.heads,)
            self.add(f"{b}.attn_sinks.weight", a, "parameter", shape, leaf="sinks")
        if spec.experts:
            self.experts(b, f"{m}.mlp")
            return
        for name, module, times in spec.mlp:
            n, k = (times * size.inner, size.hidden) if times else (size.hidden, size.inner)
            self.linear(f"{b}.{name}", f"{m}.mlp.{module}", n, k, spec.bias)

    def qk_norms(self, b: str, a: str) -> None:
        kind, size = self.spec.qk_norm, self.sizes
        for letter, heads in (("q", size.heads), ("k", size.kv_heads)):
            name = f"{b}.attn_{letter}_norm.weight"
            if kind in ("head", "rows"):
                length = size.head_dim * (heads if kind == "rows" else 1)
                shift = self.spec.norm_shift
                self.add(name, f"{a}.{letter}_norm", "parameter", (length,), shift=shift)
            elif kind == "each" and "blk.0.attn_q_norm.weight" in self.file.tensors:
                for head in range(heads):
                    module = f"{a}.{letter}_layernorm.norms.{head}"
                    self.add(name, module, "parameter", (heads, size.head_dim), row=head)

    def experts(self, b: str, m: str) -> None:
        size, router = self.sizes, f"{m}.{self.spec.router}"
        names, biases = {}, []
        name = f"{b}.ffn_gate_inp"
        self.add(f"{name}.weight", router, "parameter", (size.experts, size.hidden))
        if self.spec.expert_bias:
            self.add(f"{name}.bias", router, "parameter", (size.experts,), leaf="bias")
        for kind in ("gate", "up", "down"):
            n, k = size.expert_inner, size.hidden
            matrix = (k, n) if kind == "down" else (n, k)
            joined, first = f"{b}.ffn_{kind}_exps.weight", f"{b}.ffn_{kind}.0.weight"
            if joined not in self.file.tensors and first in self.file.tensors:
                # How the first converters wrote Mixtral: a tensor for each expert.
                each = []
                for expert in range(size.experts):
                    each.append(f"{b}.ffn_{kind}.{expert}.weight")
                    self.take(each[-1], matrix)
                names[kind] = tuple(each)
            else:
                names[kind] = (joined,)
                self.take(joined, (size.experts, *matrix))
            if self.spec.expert_bias:
                biases.append(f"{b}.ffn_{kind}_exps.bias")
                self.take(biases[-1], (size.experts, matrix[0]))
        slot = ExpertSlot(f"{m}.experts", **names, biases=tuple(biases))
        self.result.experts.append(slot)
        if size.shared_inner:
            shared, n, k = f"{m}.shared_expert", size.shared_inner, size.hidden
            self.linear(f"{b}.ffn_gate_shexp", f"{shared}.gate_proj", n, k, "none")
            self.linear(f"{b}.ffn_up_shexp", f"{shared}.up_proj", n, k, "none")
            self.linear(f"{b}.ffn_down_shexp", f"{shared}.down_proj", k, n, "none")
            name = f"{b}.ffn_gate_inp_shexp.weight"
            self.take(name, (k,), (1, k))  # a vector in most files, a matrix of one row in others
            self.result.slots.append(Slot(name, f"{m}.shared_expert_gate", "parameter"))

    def rope(self) -> None:
        names = {
            "none": (),
            "freqs": ("rope_freqs.weight",),
            "factors": ("rope_factors_short.weight", "rope_factors_long.weight"),
        }[self.spec.rope_tensors]
        if any(name in self.file.tensors for name in names):
            self.result.rope_factors = names
            for name in names:
                self.take(name, (self.sizes.rotary // 2,))


def _head_dim(meta: Metadata, hidden: int, heads: int, partial: bool) -> tuple[int, int]:
    """The head size, and how much of it is rotated."""
    key = "attention.key_length"
    if meta.get(key) is None and hidden % heads:
        raise meta.fail("attention.head_count", f"a divisor of embedding_length {hidden}", heads)
    head_dim = meta.integer(key, hidden // heads)
    rotary = meta.integer("rope.dimension_count", head_dim)
    if partial and rotary < head_dim and rotary % 2 == 0:
        others: tuple[str, ...] = ("attention.value_length",)
    else:
        others = ("attention.value_length", "rope.dimension_count")
    for other in others:
        if meta.integer(other, head_dim) != head_dim:
            raise meta.fail(other, f"the head size {head_dim}", meta.get(other))
    if head_dim % 2:
        raise meta.fail(key, "an even head size", head_dim)
    return head_dim, rotary


def _read_experts(meta: Metadata, spec: Architecture, sizes: Sizes) -> None:
    """The sizes of experts; anything about routing that transformers would do otherwise is an
    error.
    """
    sizes.experts = meta.integer("expert_count")
    sizes.experts_used = meta.integer("expert_used_count")
    if sizes.experts_used > sizes.experts:
        raise meta.fail(
            "expert_used_count", f"at most expert_count {sizes.experts}", sizes.experts_used
        )
    if spec is LLAMA_WITH_EXPERTS:
        sizes.expert_inner = sizes.inner
    else:
        default = max(sizes.inner // sizes.experts_used, 1)
        sizes.expert_inner = meta.integer("expert_feed_forward_length", default)
    if spec.model_type == "qwen2_moe":
        sizes.shared_inner = meta.integer("expert_shared_feed_forward_length", sizes.inner)
    if meta.integer("expert_gating_func", 1, low=0) != 1:
        raise meta.fail("expert_gating_func", "1 (softmax)", meta.get("expert_gating_func"))
    if meta.real("expert_weights_scale", 1.0) != 1.0:
        raise meta.fail("expert_weights_scale", "1", meta.get("expert_weights_scale"))
    if meta.integer("expert_group_count", 1, low=0) > 1:
        raise meta.fail("expert_group_count", "1", meta.get("expert_group_count"))


def _sizes(file: GGUFFile, meta: Metadata, spec: Architecture) -> Sizes:
    hidden = meta.integer("embedding_length")
    inner = meta.integer("feed_forward_length")
    layers = meta.integer("block_count")
    heads = meta.integer("attention.head_count")
    kv_heads = meta.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise meta.fail("attention.head_count_kv", f"a divisor of head_count {heads}", kv_heads)
    head_dim, rotary = _head_dim(meta, hidden, heads, spec.partial_rotary)
    if not spec.own_head_dim and head_dim * heads != hidden:
        raise meta.fail("attention.key_length", f"{hidden // heads}", head_dim)
    context = meta.integer("context_length", 2048)
    sizes = Sizes(file, meta, hidden, inner, layers, heads, kv_heads, head_dim, rotary, context)
    if spec.experts:
        _read_experts(meta, spec, sizes)
    elif meta.integer("expert_count", 0, low=0):
        raise meta.fail("expert_count", "0 (a dense model)", meta.get("expert_count"))
    return sizes


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
    architecture = Metadata(file).text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise file.fail(
            f"hold a model of architecture {', '.join(ARCHITECTURES)}", repr(architecture[:60])
        )
    if Metadata(file).integer("split.count", 1) > 1:
        raise file.fail("be one whole file", "one part of a split model; merge the parts first")
    meta = Metadata(file, f"{architecture}.")
    spec = ARCHITECTURES[architecture]
    if architecture == "llama" and meta.integer("expert_count", 0, low=0):
        spec = LLAMA_WITH_EXPERTS
    sizes = _sizes(file, meta, spec)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    embedding = file.tensors.get("token_embd.weight")
    vocabulary = embedding.shape[0] if embedding is not None else 0
    if isinstance(tokens, StringArray):
        vocabulary = len(tokens)
    vocabulary = meta.integer("vocab_size", vocabulary, low=0)

    tied = "output.weight" not in file.tensors
    result = ModelPlan(architecture, spec.model_type, {}, tied=tied, fused=spec.fused)
    planner = _Planner(spec, sizes, result)
    table = (vocabulary, sizes.hidden)
    planner.add("token_embd.weight", "model.embed_tokens", "embedding", table)
    for i in range(sizes.layers):
        planner.block(i)
    planner.norm("output_norm", "model.norm", sizes.hidden)
    if not tied:
        planner.linear("output", "lm_head", vocabulary, sizes.hidden, "none")
    planner.rope()
    for name in file.tensors:
        if name not in planner.used:
            raise file.fail(f"hold only tensors that a {architecture} model has", repr(name))

    kind = "layer_norm_epsilon" if spec.layer_norm else "layer_norm_rms_epsilon"
    rope = rope_parameters(meta, sizes.context, listed=len(result.rope_factors) == 2)
    if spec.partial_rotary:
        rope["partial_rotary_factor"] = sizes.rotary / sizes.head_dim
    result.config = {
        "vocab_size": vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": sizes.context,
        spec.epsilon: meta.real(f"attention.{kind}"),
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        **token_ids(file, vocabulary),
    }
    if spec.own_head_dim:
        result.config["head_dim"] = sizes.head_dim
    result.config.update(spec.config(sizes))
    return result
