"""Fakes and gradients of the private ops in csrc/decoder_ops, which nn/_lean.py calls.

    _rms_norm(x, weight)      y = x s weight,  s = rsqrt(mean(x^2) + eps)
    _rotated(x, cos, sin)     (a, b) -> (a cos - b sin, b cos + a sin), a head's two halves
    _silu_product(gate, up)   y = silu(gate) up
    _causal_attention(query, key, value)   y = softmax(scale q k^T, k up to q) v; log of its sums

Each has its gradient as one pass too; the first three have a twin without one, `_..._forward`: at
one token asking whether a gradient is wanted takes longer than the op. Where a gradient is to be
differentiated again it is written in torch's own calls, which know how.

    _softmax_grad_(scores, labels)   cross-entropy of rows; the scores become its gradient

    _int4_siblings(x, weights)   products side by side, of x or its norm; the first heads rotated
    _int4_mlp(x, weights)        down(silu(gate(x)) up(x))
    _int4_layer_end(heads, hidden, weights)   h = hidden + o(attention), then h + mlp(norm(h))
"""

from __future__ import annotations

import torch

from nibblock.ops._autograd import register_autograd
from nibblock.ops._checks import decode_format

_ops = torch.ops.nibblock


@torch.library.register_fake("nibblock::_rms_norm")
@torch.library.register_fake("nibblock::_rms_norm_forward")
def _(x, weight, eps):
    return torch.empty_like(x)


@torch.library.register_fake("nibblock::_rms_norm_grad")
def _(grad, x, weight, eps, wants_weight):
    return torch.empty_like(x), weight.new_empty(weight.shape if wants_weight else (0,))


@torch.library.register_fake("nibblock::_add_rms_norm")
def _(x, delta, weight, eps):
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.register_fake("nibblock::_rotated")
@torch.library.register_fake("nibblock::_rotated_forward")
def _(x, cos, sin, inverse):
    return torch.empty_like(x)


@torch.library.register_fake("nibblock::_silu_product")
@torch.library.register_fake("nibblock::_silu_product_forward")
def _(gate, up):
    return torch.empty_like(gate)


@torch.library.register_fake("nibblock::_silu_product_grad")
def _(grad, gate, up):
    return torch.empty_like(gate), torch.empty_like(gate)


@torch.library.register_fake("nibblock::_softmax_grad_")
def _(scores, labels):
    return scores.new_empty(len(labels))


@torch.library.register_fake("nibblock::_int4_siblings")
def _(x, norm_weight, eps, packed, biases, formats, cos, sin, heads):
    return x.new_empty((*x.shape[:-1], sum(decode_format(code)[0] for code in formats)))


@torch.library.register_fake("nibblock::_int4_mlp")
def _(x, packed, biases, formats):
    return x.new_empty((*x.shape[:-1], decode_format(formats[-1])[0]))


@torch.library.register_fake("nibblock::_int4_layer_end")
def _(query, key, value, scale, hidden, norm_weight, eps, packed, biases, formats):
    return torch.empty_like(hidden)


@torch.library.register_fake("nibblock::_attend")
def _(query, key, value, scale):
    return query.new_empty(query.shape)


@torch.library.register_fake("nibblock::_causal_attention")
def _(query, key, value, scale):
    batch, length, heads, _ = query.shape
    lse = query.new_empty((batch, heads, length), dtype=torch.float32)
    return query.new_empty(query.shape), lse


@torch.library.register_fake("nibblock::_causal_attention_grad")
def _(grad, query, key, value, out, lse, scale):
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


# --- gradients ------------------------------------------------------------------------------------


def _norm_context(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _norm_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled():
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + ctx.eps)
        normed, outer = x * scale, grad * weight
        dx = scale * (outer - normed * (outer * normed).mean(-1, keepdim=True))
        dweight = (grad * normed).reshape(-1, len(weight)).sum(0)
        dx, dweight = dx.to(x.dtype), dweight.to(weight.dtype)
    else:
        dx, dweight = _ops._rms_norm_grad(grad.contiguous(), x, weight, ctx.eps, wants_weight)
    return dx if wants_x else None, dweight if wants_weight else None, None


def _rotated_context(ctx, inputs, output):
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotated_backward(ctx, grad):
    cos, sin = ctx.saved_tensors
    # (linear in x, and an op with a gradient itself)
    return _ops._rotated(grad.contiguous(), cos, sin, not ctx.inverse), None, None, None


def _product_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _product_backward(ctx, grad):
    gate, up = ctx.saved_tensors
    if torch.is_grad_enabled():
        s = torch.sigmoid(gate)
        return grad * up * (s * (1 + gate * (1 - s))), grad * gate * s
    dgate, dup = _ops._silu_product_grad(grad.contiguous(), gate, up)
    return tuple(g if wanted else None for g, wanted in zip((dgate, dup), ctx.needs_input_grad))


def _attention_context(ctx, inputs, output):
    *heads, ctx.scale = inputs
    ctx.save_for_backward(*heads, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx, grad, _):
    query, key, value, out, lse = ctx.saved_tensors
    if torch.is_grad_enabled():
        q, k, v, g = (t.transpose(1, 2).float() for t in (query, key, value, grad))
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        behind = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        p = torch.softmax((ctx.scale * q @ k.mT).masked_fill(behind, -torch.inf), -1)
        dp = g @ v.mT
        ds = ctx.scale * p * (dp - (dp * p).sum(-1, keepdim=True))
        grads = [ds @ k, *(t.unflatten(1, (-1, group)).sum(2) for t in (ds.mT @ q, p.mT @ g))]
        grads = [t.transpose(1, 2).to(query.dtype) for t in grads]
    else:
        grad = grad.contiguous()
        grads = _ops._causal_attention_grad(grad, query, key, value, out, lse, ctx.scale)
    return (*(g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad)), None)


register_autograd("_rms_norm", _norm_backward, _norm_context)
register_autograd("_rotated", _rotated_backward, _rotated_context)
register_autograd("_silu_product", _product_backward, _product_context)
register_autograd("_causal_attention", _attention_backward, _attention_context)
