"""A known decoder layer at one token a sequence: two calls, and the cache's own between them.

    q, k, v = rotated products of norm(hidden)                        _int4_siblings
    k, v = cache.update(k, v)
    h = hidden + o(attention(q, k, v)),  h + mlp(norm(h))             _int4_layer_end

What the calls pass over are a dozen modules. A plan holds what they consist of and is made once a
layer; before each token it is checked, in a few calls of C, that all of that is as it was: the
modules and their classes, no hooks, no forward on an instance, the same Parameters and formats.
Where anything is not, the layer's modules are called (_lean.py).
"""

from __future__ import annotations

import weakref
from operator import is_
from typing import Any, Callable, Optional

import torch
from torch import nn

from nibblock.nn._lean_calls import (
    ATTENDED,
    attends,
    bare,
    is_silu,
    mlp_of,
    product_of,
    rotates,
    siblings_of,
    weights_of,
)

_siblings = torch.ops.nibblock._int4_siblings.default
_layer_end = torch.ops.nibblock._int4_layer_end.default

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_OF_ATTENTION = ("position_embeddings", "attention_mask", "past_key_values")  # its own arguments

_plans: weakref.WeakKeyDictionary[nn.Module, _Plan] = weakref.WeakKeyDictionary()


class _Plan:
    """What a layer's two calls consist of, and what has to be as it was for them to hold."""

    def __init__(
        self, layer: nn.Module, is_norm: Callable[[nn.Module], bool], mlp_forward: Callable
    ) -> None:
        """Raises LookupError where the layer has no such calls."""
        own = layer._modules
        first, second = own["input_layernorm"], own["post_attention_layernorm"]
        attention, mlp = own["self_attn"], own["mlp"]
        act = mlp._modules["act_fn"]
        short = type(attention).forward
        if not (
            is_norm(first)
            and is_norm(second)
            and hasattr(short, "attends_by_op")
            and type(mlp).forward is mlp_forward
            and is_silu(type(act))
            and all(map(bare, (attention, mlp, act)))
        ):
            raise LookupError
        width, heads, rows = first.weight.numel(), attention._modules, mlp._modules
        states, behind = siblings_of(attention, _ATTENTION[:3], width), mlp_of(mlp, width)
        if states is None or behind is None:
            raise LookupError
        o_proj = product_of(heads["o_proj"], states[0].out_features)
        if o_proj is None or o_proj.out_features != width or behind[2].out_features != width:
            raise LookupError
        layers = [*states, o_proj, *behind]
        self.start, self.end = weights_of(states), weights_of([o_proj, *behind])
        dim = attention.head_dim
        if self.start is None or self.end is None or any(n % dim for n in self.start[3]):
            raise LookupError
        self.heads = [n // dim for n in self.start[3]]
        self.attention, self.mlp, self.norms, self.forward = attention, mlp, (first, second), short
        self.weights = (first._parameters["weight"], second._parameters["weight"])
        # What is checked.
        self.modules = [first, second, attention, mlp, act, *layers]
        self.places = [(own, "input_layernorm"), (own, "post_attention_layernorm")]
        self.places += [(own, "self_attn"), (own, "mlp"), (rows, "act_fn")]
        self.places += [(heads, name) for name in _ATTENTION] + [(rows, name) for name in _MLP]
        self.classes = list(map(type, self.modules))
        dicts = [module.__dict__ for module in self.modules]
        self.hooks = [d[kind] for d in dicts for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self.dicts, self.layers = dicts, dicts[5:]
        self.formats = [*self.start[2], *self.end[2]]
        self.tensors = list(self.weights)
        self.parameters = [(n._parameters, "weight") for n in self.norms]
        for layer in layers:
            for name in ("packed", "bias"):
                self.parameters.append((layer._parameters, name))
                self.tensors.append(layer._parameters[name])
        if not self.holds():
            raise LookupError

    def holds(self) -> bool:
        return (
            not any(self.hooks)
            and not any("forward" in d or "_compiled_call_impl" in d for d in self.dicts)
            and all(map(is_, [d.get(key) for d, key in self.places], self.modules))
            and list(map(type, self.modules)) == self.classes
            and all(map(is_, [d.get(key) for d, key in self.parameters], self.tensors))
            and [d.get("_code") for d in self.layers] == self.formats
        )

    def asks_gradient(self) -> bool:
        return any(t is not None and t.requires_grad for t in self.tensors)


def one_token(
    layer: nn.Module,
    x: torch.Tensor,
    kwargs: dict[str, Any],
    is_norm: Callable[[nn.Module], bool],
    mlp_forward: Callable,
) -> Optional[torch.Tensor]:
    """The layer's result, or None: nothing has happened, call its modules.

    Args:
        layer: a known decoder layer. x: few rows, as of `few_rows`, [batch, length, width].
        kwargs: everything else that its forward got.
        is_norm: whether a module is a norm whose forward is the short one. mlp_forward: that of a
            known MLP.
    """
    tables = kwargs.get("position_embeddings")
    if x.dim() != 3 or x.shape[1] != 1 or x.dtype not in ATTENDED or tables is None:
        return None
    plan = _plans.get(layer)
    if plan is None or not plan.holds():
        try:
            plan = _plans[layer] = _Plan(layer, is_norm, mlp_forward)
        except (LookupError, AttributeError):
            _plans.pop(layer, None)
            return None
    attention, (first, second) = plan.attention, plan.norms
    mask, past = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    others = {key: value for key, value in kwargs.items() if key not in _OF_ATTENTION}
    (cos, sin), dtype = tables, x.dtype
    if (
        not plan.forward.attends_by_op(attention, mask, others)
        or any(weight.dtype != dtype for weight in plan.weights)
        or not rotates(x, cos, sin)
        or (torch.is_grad_enabled() and plan.asks_gradient())
    ):
        return None
    try:
        y = _siblings(
            x, plan.weights[0], first.variance_epsilon, *plan.start[:3],
            cos.contiguous(), sin.contiguous(), plan.heads[0] + plan.heads[1],
        )  # fmt: skip
    except RuntimeError:
        return None  # a layer's own call says what is wrong, or mends it
    heads = y.view(x.shape[0], 1, -1, attention.head_dim).transpose(1, 2)
    query, key, value = heads.split_with_sizes(plan.heads, 1)
    if past is not None:
        key, value = past.update(key, value, attention.layer_idx)
    if attends(query, key, value):
        try:
            return _layer_end(
                query, key, value, attention.scaling,
                x, plan.weights[1], second.variance_epsilon, *plan.end[:3],
            )  # fmt: skip
        except RuntimeError:
            pass
    # The cache has its token: from here the modules are called one by one. (What it returned may
    # be of another kind, or ask for a gradient.)
    x = x + plan.forward.attended(attention, query, key, value, mask, others)[0]
    return x + plan.mlp(second(x))
