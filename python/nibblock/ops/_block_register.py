"""Fakes, gradients, autocast, vmap and FLOPs of the block-sparse ops; imported once, by those ops.

Every op here is linear in each of its tensors, and the gradients of each are other ops of the
family, so derivatives of any order are exact:

    y  = x S^T      dx = g S          dS = blocks of g^T x
    dx = g S        dg = d S^T        dS = blocks of g^T d
    dS = g^T x      dg = x D^T        dx = g D              D: the upstream gradient's blocks
"""

from __future__ import annotations

import torch

from nibblock.ops import _block_checks, _checks
from nibblock.ops._autograd import register_autograd
from nibblock.ops._flops import register_flop_formula
from nibblock.ops._int4_register import _cast, _refuse_vmap, as_rows

_ops = torch.ops.nibblock


# --- fakes --------------------------------------------------------------------------------------


def _fake_linear(x, values, layout, bias, y0, out_features, block):
    _block_checks.check_linear(
        "block_sparse_linear", x, values, layout, bias, y0, out_features, block
    )
    return x.new_empty((*x.shape[:-1], out_features))


torch.library.register_fake("nibblock::block_sparse_linear")(_fake_linear)
torch.library.register_fake("nibblock::_block_sparse_linear_forward")(_fake_linear)


@torch.library.register_fake("nibblock::block_sparse_linear_dx")
def _(grad, values, layout, in_features, block):
    _block_checks.check_linear_dx(
        "block_sparse_linear_dx", grad, values, layout, in_features, block
    )
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.register_fake("nibblock::block_weight_grad")
def _(grad, x, layout, block, dtype):
    count = _block_checks.check_weight_grad("block_weight_grad", grad, x, layout, block, dtype)
    return grad.new_empty((count, block, block), dtype=dtype)


def check_fused(
    op, x, packed, bias, out_features, group_size, bits, affine, scale_dtype, compute,
    values, layout, block, lora_a, lora_c,
):  # fmt: skip
    """All that `int4_block_sparse_linear` asks."""
    _checks.check_linear(
        op, x, packed, bias, out_features, group_size, bits, affine, scale_dtype, compute
    )
    _block_checks.check_linear(op, x, values, layout, None, None, out_features, block)
    _block_checks.check_low_rank(op, x.device, lora_a, lora_c, out_features, x.shape[-1])


def check_fused_dx(
    op, grad, packed, in_features, group_size, bits, affine, scale_dtype, compute,
    values, layout, block, lora_a, lora_c,
):  # fmt: skip
    """All that `int4_block_sparse_linear_dx` asks."""
    _checks.check_linear_dx(
        op, grad, packed, in_features, group_size, bits, affine, scale_dtype, compute
    )
    _block_checks.check_linear_dx(op, grad, values, layout, in_features, block)
    _block_checks.check_low_rank(op, grad.device, lora_a, lora_c, grad.shape[-1], in_features)


def _fake_fused(x, packed, bias, out_features, *rest):
    check_fused("int4_block_sparse_linear", x, packed, bias, out_features, *rest)
    return x.new_empty((*x.shape[:-1], out_features))


torch.library.register_fake("nibblock::int4_block_sparse_linear")(_fake_fused)
torch.library.register_fake("nibblock::_int4_block_sparse_linear_forward")(_fake_fused)


@torch.library.register_fake("nibblock::int4_block_sparse_linear_dx")
def _(grad, packed, in_features, *rest):
    check_fused_dx("int4_block_sparse_linear_dx", grad, packed, in_features, *rest)
    return grad.new_empty((*grad.shape[:-1], in_features))


# --- gradients of the block-sparse product ------------------------------------------------------


def _linear_context(ctx, inputs, output):
    x, values, layout, bias, _, ctx.out_features, ctx.block = inputs
    ctx.in_features, ctx.values_dtype = x.shape[-1], values.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    need_x, need_values = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_values else None, values if need_x else None, layout)


def _linear_backward(ctx, grad):
    x, values, layout = ctx.saved_tensors
    dx = dvalues = dbias = dy0 = None
    if ctx.needs_input_grad[0]:
        dx = _ops.block_sparse_linear_dx(grad, values, layout, ctx.in_features, ctx.block)
    if ctx.needs_input_grad[1]:
        dvalues = _ops.block_weight_grad(grad, x, layout, ctx.block, ctx.values_dtype)
    if ctx.needs_input_grad[3]:
        dbias = _bias_gradient(grad, ctx.bias_dtype)
    if ctx.needs_input_grad[4]:
        dy0 = grad
    return dx, dvalues, None, dbias, dy0, None, None


def _bias_gradient(grad, dtype):
    return as_rows(grad).sum(0, dtype=torch.float32).to(dtype)


def _dx_context(ctx, inputs, output):
    grad, values, layout, _, ctx.block = inputs
    ctx.out_features, ctx.values_dtype = grad.shape[-1], values.dtype
    need_grad, need_values = ctx.needs_input_grad[:2]
    ctx.save_for_backward(grad if need_values else None, values if need_grad else None, layout)


def _dx_backward(ctx, upstream):
    grad, values, layout = ctx.saved_tensors
    dgrad = dvalues = None
    if ctx.needs_input_grad[0]:
        dgrad = _ops.block_sparse_linear(
            upstream, values, layout, None, None, ctx.out_features, ctx.block
        )
    if ctx.needs_input_grad[1]:
        dvalues = _ops.block_weight_grad(grad, upstream, layout, ctx.block, ctx.values_dtype)
    return dgrad, dvalues, None, None, None


def _weight_grad_context(ctx, inputs, output):
    grad, x, layout, ctx.block, _ = inputs
    ctx.out_features, ctx.in_features = grad.shape[-1], x.shape[-1]
    need_grad, need_x = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_grad else None, grad if need_x else None, layout)


def _weight_grad_backward(ctx, upstream):
    x, grad, layout = ctx.saved_tensors
    dgrad = dx = None
    if ctx.needs_input_grad[0]:
        dgrad = _ops.block_sparse_linear(
            x, upstream, layout, None, None, ctx.out_features, ctx.block
        )
    if ctx.needs_input_grad[1]:
        dx = _ops.block_sparse_linear_dx(grad, upstream, layout, ctx.in_features, ctx.block)
    return dgrad, dx, None, None, None


register_autograd("block_sparse_linear", _linear_backward, _linear_context)
register_autograd("block_sparse_linear_dx", _dx_backward, _dx_context)
register_autograd("block_weight_grad", _weight_grad_backward, _weight_grad_context)


# --- gradients of the int4 base with its adapter ------------------------------------------------
# The packed base is frozen. With the low-rank pair, W = dequant(Q) + S + C A.


def _low_rank_gradients(grad, x, a, c, need_a, need_c):
    """d/dA and d/dC of sum(grad * (x A^T C^T)), in the wider dtype of x and the pair."""
    dtype = torch.promote_types(x.dtype, torch.promote_types(a.dtype, c.dtype))
    rows_g, rows_x = as_rows(grad).to(dtype), as_rows(x).to(dtype)
    da = (rows_g @ c.to(dtype)).t() @ rows_x if need_a else None
    dc = rows_g.t() @ (rows_x @ a.to(dtype).t()) if need_c else None
    return None if da is None else da.to(a.dtype), None if dc is None else dc.to(c.dtype)


def _fused_context(ctx, inputs, output):
    x, packed, bias, _, *ctx.format = inputs[:9]
    values, layout, ctx.block, a, c = inputs[9:]
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    trained = any(ctx.needs_input_grad[i] for i in (9, 12, 13))
    ctx.save_for_backward(x if trained else None, packed, values, layout, a, c)


def _fused_backward(ctx, grad):
    x, packed, values, layout, a, c = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx = dbias = dvalues = da = dc = None
    if need[0]:
        dx = _ops.int4_block_sparse_linear_dx(
            grad, packed, ctx.in_features, *ctx.format, values, layout, ctx.block, a, c
        )
    if need[2]:
        dbias = _bias_gradient(grad, ctx.bias_dtype)
    if need[9]:
        dvalues = _ops.block_weight_grad(grad, x, layout, ctx.block, values.dtype)
    if need[12] or need[13]:
        da, dc = _low_rank_gradients(grad, x, a, c, need[12], need[13])
    return (dx, None, dbias, *[None] * 6, dvalues, None, None, da, dc)


def _fused_dx_context(ctx, inputs, output):
    grad, packed, _, *ctx.format = inputs[:8]
    values, layout, ctx.block, a, c = inputs[8:]
    ctx.out_features = grad.shape[-1]
    trained = any(ctx.needs_input_grad[i] for i in (8, 11, 12))
    ctx.save_for_backward(grad if trained else None, packed, values, layout, a, c)


def _fused_dx_backward(ctx, upstream):
    grad, packed, values, layout, a, c = ctx.saved_tensors
    need = ctx.needs_input_grad
    dgrad = dvalues = da = dc = None
    if need[0]:
        dgrad = _ops.int4_block_sparse_linear(
            upstream, packed, None, ctx.out_features, *ctx.format, values, layout, ctx.block, a, c
        )
    if need[8]:
        dvalues = _ops.block_weight_grad(grad, upstream, layout, ctx.block, values.dtype)
    if need[11] or need[12]:
        da, dc = _low_rank_gradients(grad, upstream, a, c, need[11], need[12])
    return (dgrad, *[None] * 7, dvalues, None, None, da, dc)


register_autograd("int4_block_sparse_linear", _fused_backward, _fused_context)
register_autograd("int4_block_sparse_linear_dx", _fused_dx_backward, _fused_dx_context)


# --- autocast: x, bias and y0 as F.linear's arguments; values and the low-rank pair stay as they
# are


_autocast_library = torch.library.Library("nibblock", "FRAGMENT")


def _make_autocast(op, device_type, key, cast_at):
    def autocast(keyset, *args):
        dtype = torch.get_autocast_dtype(device_type)
        args = [_cast(a, device_type, dtype) if i in cast_at else a for i, a in enumerate(args)]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*args)

    return autocast


for _name, _cast_at in (
    ("block_sparse_linear", (0, 3, 4)),
    ("_block_sparse_linear_forward", (0, 3, 4)),
    ("int4_block_sparse_linear", (0, 2)),
    ("_int4_block_sparse_linear_forward", (0, 2)),
):
    for _device, _key in (
        ("cpu", torch._C.DispatchKey.AutocastCPU),
        ("cuda", torch._C.DispatchKey.AutocastCUDA),
    ):
        _autocast_library.impl(
            _name,
            _make_autocast(getattr(_ops, _name).default, _device, _key, _cast_at),
            f"Autocast{_device.upper()}",
            with_keyset=True,
        )


# --- vmap ---------------------------------------------------------------------------------------


for _name, _argument in (
    ("block_sparse_linear", "x"),
    ("_block_sparse_linear_forward", "x"),
    ("block_sparse_linear_dx", "grad"),
    ("block_weight_grad", "grad"),
    ("int4_block_sparse_linear", "x"),
    ("_int4_block_sparse_linear_forward", "x"),
    ("int4_block_sparse_linear_dx", "grad"),
):
    _public = _name[1:].replace("_forward", "") if _name.startswith("_") else _name
    torch.library.register_vmap(f"nibblock::{_name}", _refuse_vmap(_public, _argument))


# --- FLOPs: of the stored blocks, and of the dense base -----------------------------------------


def _rows(shape):
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


def _stored(shape):
    return shape[0] * shape[1] * shape[2]


@register_flop_formula(
    [_ops.block_sparse_linear, _ops._block_sparse_linear_forward, _ops.block_sparse_linear_dx]
)
def _block_flops(x_shape, values_shape, *args, out_shape=None, **kwargs):
    return 2 * _rows(x_shape) * _stored(values_shape)


@register_flop_formula(_ops.block_weight_grad)
def _weight_grad_flops(grad_shape, x_shape, *args, out_shape=None, **kwargs):
    return 2 * _rows(grad_shape) * _stored(out_shape)


def _fused_flops(x_shape, out_shape, values_shape, lora_shape):
    rows, (inner, outer) = _rows(x_shape), (x_shape[-1], out_shape[-1])
    rank = 0 if lora_shape is None else lora_shape[0]
    return 2 * rows * (inner * outer + _stored(values_shape) + rank * (inner + outer))


@register_flop_formula([_ops.int4_block_sparse_linear, _ops._int4_block_sparse_linear_forward])
def _(x_shape, packed_shape, bias_shape, *args, out_shape=None, **kwargs):
    return _fused_flops(x_shape, out_shape, args[6], args[9])


@register_flop_formula(_ops.int4_block_sparse_linear_dx)
def _(grad_shape, packed_shape, *args, out_shape=None, **kwargs):
    return _fused_flops(grad_shape, out_shape, args[6], args[9])
