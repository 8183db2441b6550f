"""Shorter forwards for modules of transformers whose forward is known to the letter.

At one token a step most of a small model's time is Python and dispatch, not arithmetic; at many
rows, and in training, what lies between the products is a dozen passes over memory. The forwards
below compute the same with fewer calls. For few rows of int4 layers without gradients an MLP is one
call, and so are q, k and v with their rotation; everywhere else a rotation is one; so is a norm,
with the addition before it where there is one and no gradient is asked; and so are silu(gate) * up,
and attention without a mask, of one token a sequence and of whole sequences (csrc/decoder_ops). The
gradients of norm, rotation and silu * up are one pass each, and attention's is an op too
(ops/_decoder_register.py). Rotated values are the same bit for bit; norms, silu and attention
differ from torch's by float32 rounding (torch adds in another order and has another exp; in
bfloat16 its attention rounds the weights too). A class is matched by a fingerprint of the source of
its forward (and of the functions it calls); any other forward, and any call that these do not cover
(tracing, other dtypes and devices, hooks on or replacements of what is passed over), runs the
original.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import textwrap
from typing import Any, Callable, Optional

import torch
from torch import nn
from torch.nn.modules import module as _torch_module

from nibblock.nn._lean_calls import (
    MAX_ROWS,
    attends,
    attends_causally,
    bare,
    few_rows,
    is_silu,
    mlp_of,
    rotates,
    siblings_of,
    weights_of,
)
from nibblock.nn._one_token import one_token

# Fingerprints of transformers 5.x sources: Llama, Mistral, Qwen2 and the many models that repeat
# theirs.
_MLP = {"b4e9c2637c7f1172"}
_RMS_NORM = {"d676bfe9af0e524d"}
_LAYER = {"461ed20abeb521a9"}
_ROTARY = ("ea234325c15de475", "f714a4b1160c694e")
_ATTENTION: dict[str, Callable[[Any], dict]] = {
    "c0fd8e0b732ba611": lambda self: {},
    "8c961e165cda523c": lambda self: {
        "sliding_window": getattr(self.config, "sliding_window", None)
    },
    "4015c9477db5adb7": lambda self: {"sliding_window": self.sliding_window},
}

# Of sdpa_attention_forward: for one query without a mask it is softmax(scale q k^T) v.
_SDPA = {"e3d016070b6ac957"}
_SDPA_MORE = ("softcap", "position_bias", "cache")  # what else it may be asked for

# Linears that write F.linear in other words (Falcon's).
_LINEAR = {"6b8b3b5430e88ef6"}

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ops = torch.ops.nibblock
_norm = _ops._rms_norm.default
_norm_forward = _ops._rms_norm_forward.default
_add_norm = _ops._add_rms_norm.default
_rotated = _ops._rotated.default
_rotated_forward = _ops._rotated_forward.default
_silu_product = _ops._silu_product.default
_silu_product_forward = _ops._silu_product_forward.default
_siblings = _ops._int4_siblings.default
_whole_mlp = _ops._int4_mlp.default
_attend = _ops._attend.default
_causal_attention = _ops._causal_attention.default


def _fingerprint(function: Any) -> str:
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""  # no source (a frozen application): nothing is known, nothing matches
    return hashlib.sha256(textwrap.dedent(source).encode()).hexdigest()[:16]


def _of_transformers(cls: type) -> bool:
    return cls.__module__.startswith("transformers.models.") and cls.__module__ in sys.modules


@functools.cache
def lean_parent(cls: type) -> Optional[Callable]:
    """A shorter forward for a class that owns sibling linears, or None."""
    if not _of_transformers(cls):
        return None
    fingerprint = _fingerprint(cls.forward)
    if fingerprint in _MLP:
        return _mlp
    if fingerprint in _ATTENTION:
        names = vars(sys.modules[cls.__module__])
        functions = (names.get("apply_rotary_pos_emb"), names.get("rotate_half"))
        if tuple(_fingerprint(f) for f in functions) == _ROTARY:
            return _make_attention(names, _ATTENTION[fingerprint])
    return None


@functools.cache
def lean_norm(cls: type) -> Optional[Callable]:
    """A shorter forward for a norm, or None."""
    return _rms_norm if _of_transformers(cls) and _fingerprint(cls.forward) in _RMS_NORM else None


@functools.cache
def lean_layer(cls: type) -> Optional[Callable]:
    """A shorter forward for a decoder layer, or None."""
    return _layer if _of_transformers(cls) and _fingerprint(cls.forward) in _LAYER else None


@functools.cache
def is_linear(cls: type) -> bool:
    """Whether a class's forward computes what `nn.Linear`'s does, up to rounding."""
    return _of_transformers(cls) and _fingerprint(cls.forward) in _LINEAR


def _plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x is CPU rows of weight's dtype that nobody traces."""
    return (
        x.dtype == weight.dtype
        and x.dtype in _FLOATS
        and x.device.type == "cpu"
        and x.is_contiguous()
        and not torch.compiler.is_compiling()
    )


def _by_itself(self: nn.Module, x: torch.Tensor) -> bool:
    """Whether one-pass ops go between products that are not shared. (Siblings that could share a
    call, at few rows, still do in the original forward.)"""
    return (
        not torch.compiler.is_compiling()
        and (
            not self.__dict__.get("_int4_groups")
            or x.numel() > MAX_ROWS * x.shape[-1]
            or _differentiated(x)
        )
        and not _torch_module._has_any_global_hook()
    )


def _differentiated(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _mlp(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return self._int4_original_forward(x)
    act = self._modules.get("act_fn")
    known = act is not None and is_silu(type(act)) and bare(act)
    if known and few_rows(x):
        y = _mlp_in_one_call(self, x)
        if y is not None:
            return y
    if not _by_itself(self, x):
        return self._int4_original_forward(x)
    gate, up = self.gate_proj(x), self.up_proj(x)
    if known and _plain(gate, up) and up.is_contiguous() and up.shape == gate.shape:
        product = _silu_product if _differentiated(gate, up) else _silu_product_forward
        return self.down_proj(product(gate, up))
    return self.down_proj(self.act_fn(gate) * up)


def _mlp_in_one_call(self: nn.Module, x: torch.Tensor) -> Optional[torch.Tensor]:
    layers = mlp_of(self, x.shape[-1])
    found = None if layers is None else weights_of(layers)
    if found is None:
        return None
    packed, biases, formats, _ = found
    try:
        return _whole_mlp(x, packed, biases, formats)
    except RuntimeError:
        return None  # a layer's own call says what is wrong, or mends it


def _make_attention(names: dict, extra: Callable[[Any], dict]) -> Callable:
    implementations = names["ALL_ATTENTION_FUNCTIONS"]
    eager = names["eager_attention_forward"]
    sdpa = _known_sdpa()
    rotate_both = names["apply_rotary_pos_emb"]

    def attention(
        self: nn.Module,
        hidden_states: torch.Tensor,
        position_embeddings: Optional[tuple[torch.Tensor, torch.Tensor]] = None,
        attention_mask: Optional[torch.Tensor] = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        states = None
        if few_rows(hidden_states):
            states = _heads_in_one_call(self, hidden_states, position_embeddings)
        if states is None and hidden_states.dim() == 3 and _by_itself(self, hidden_states):
            states = _separate_heads(self, hidden_states, position_embeddings, rotate_both)
        if states is None:
            return self._int4_original_forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        query, key, value = states
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return attended(self, query, key, value, attention_mask, kwargs)

    def attends_by_op(
        self: nn.Module, attention_mask: Optional[torch.Tensor], kwargs: dict
    ) -> bool:
        return (
            attention_mask is None
            and interface_of(self) is sdpa
            and (not self.training or self.attention_dropout == 0.0)
            and not kwargs.get("output_attentions")
            and all(kwargs.get(name) is None for name in _SDPA_MORE)
        )

    def is_causal(self: nn.Module, kwargs: dict) -> bool:
        asked = kwargs.get("is_causal")
        return getattr(self, "is_causal", True) is True if asked is None else asked is True

    def interface_of(self: nn.Module) -> Callable:
        return implementations.get_interface(_implementation(self.config), eager)

    def attended(
        self: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Optional[torch.Tensor],
        kwargs: dict,
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        shape = (query.shape[0], query.shape[2])
        o_proj = self._modules["o_proj"]
        if attends(query, key, value) and attends_by_op(self, attention_mask, kwargs):
            return o_proj(_attend(query, key, value, self.scaling).view(*shape, -1)), None
        if (
            attends_causally(query, key, value)
            and is_causal(self, kwargs)
            and attends_by_op(self, attention_mask, kwargs)
        ):
            heads = (t.transpose(1, 2) for t in (query, key, value))
            return o_proj(_causal_attention(*heads, self.scaling)[0].view(*shape, -1)), None
        out, weights = interface_of(self)(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **extra(self),
            **kwargs,
        )
        return o_proj(out.reshape(*shape, -1).contiguous()), weights

    attention.attends_by_op, attention.attended = attends_by_op, attended  # for _one_token.py
    return attention


def _heads_in_one_call(self: nn.Module, x: torch.Tensor, tables: Any) -> Optional[tuple]:
    """Rotated query and key, and value, [batch, heads, length, dim], or None."""
    layers = siblings_of(self, ("q_proj", "k_proj", "v_proj"), x.shape[-1])
    found = None if layers is None else weights_of(layers)
    cos, sin = tables
    if found is None or not rotates(x, cos, sin):
        return None
    *weights, widths = found
    dim = self.head_dim
    heads = [width // dim for width in widths]
    try:
        y = _siblings(x, None, 0.0, *weights, cos.contiguous(), sin.contiguous(), sum(heads[:2]))
    except RuntimeError:
        return None  # a layer's own call says what is wrong, or mends it
    return y.view(*x.shape[:-1], -1, dim).transpose(1, 2).split_with_sizes(heads, 1)


def _separate_heads(self: nn.Module, x: torch.Tensor, tables: Any, rotate_both: Callable) -> tuple:
    """The same of three products, for x [batch, length, width]; with gradients."""
    q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
    cos, sin = tables
    dim = self.head_dim
    turned = (
        _plain(q, k)
        and k.is_contiguous()
        and cos.shape == sin.shape == (cos.shape[0], x.shape[1], dim)
        and cos.shape[0] in (1, x.shape[0])
        and cos.dtype == sin.dtype == q.dtype
        and cos.is_contiguous()
        and sin.is_contiguous()
        and not _differentiated(cos, sin)
    )
    if turned:
        rotated = _rotated if _differentiated(q, k) else _rotated_forward
        q, k = rotated(q, cos, sin, False), rotated(k, cos, sin, False)
    q, k, v = (t.view(*x.shape[:-1], -1, dim).transpose(1, 2) for t in (q, k, v))
    return (q, k, v) if turned else (*rotate_both(q, k, cos, sin), v)


def _implementation(config: Any) -> Optional[str]:
    """`config._attn_implementation`, without the three detours that its configurations take."""
    held = object.__getattribute__(config, "__dict__").get("_attn_implementation_internal")
    return config._attn_implementation if held is None else held


def _known_sdpa() -> Optional[Callable]:
    module = sys.modules.get("transformers.integrations.sdpa_attention")
    sdpa = getattr(module, "sdpa_attention_forward", None)
    return sdpa if sdpa is not None and _fingerprint(sdpa) in _SDPA else None


def _rms_norm(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = self.weight
    if _plain(hidden_states, weight):
        norm = _norm if _differentiated(hidden_states, weight) else _norm_forward
        return norm(hidden_states, weight, self.variance_epsilon)
    # One op, the same steps inside; in other dtypes the original rounds at another place.
    if hidden_states.dtype == torch.float32 and weight.dtype == torch.float32:
        return torch.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)
    return self._int4_original_forward(hidden_states)


def _layer(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    # Everything is a keyword in the calls of transformers 5.
    if not args and few_rows(hidden_states):
        out = one_token(self, hidden_states, kwargs, _is_lean_norm, _mlp)
        if out is not None:
            return out
    modules = self._modules
    first, second = modules["input_layernorm"], modules["post_attention_layernorm"]
    if (
        args
        or not (_is_lean_norm(first) and _is_lean_norm(second))
        or not _plain(hidden_states, first.weight)
        or _differentiated(hidden_states, first.weight)
        or not _joins(second.weight, hidden_states)
        or _torch_module._has_any_global_hook()
    ):
        return self._int4_original_forward(hidden_states, *args, **kwargs)
    x = _norm_forward(hidden_states, first.weight, first.variance_epsilon)
    x, _ = modules["self_attn"](hidden_states=x, **kwargs)
    # An adapter inside may ask for gradients where the layer's input did not.
    if x.shape != hidden_states.shape or not x.is_contiguous() or not _joins(x, hidden_states):
        hidden_states = hidden_states + x
        return hidden_states + modules["mlp"](second(hidden_states))
    hidden_states, x = _add_norm(hidden_states, x, second.weight, second.variance_epsilon)
    return hidden_states + modules["mlp"](x)


def _joins(t: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether t can take part in a step whose x is known to be plain."""
    if t.requires_grad and torch.is_grad_enabled():
        return False
    return t.dtype == x.dtype and t.device == x.device


def _is_lean_norm(module: nn.Module) -> bool:
    return type(module).forward is _rms_norm and bare(module)
