"""What torch has to know about the int4 ops beyond their CPU bodies: fakes, gradients, autocast,
vmap, FLOPs.

The stable ABI registers schemas and kernels only, so this file does the rest. It is imported once,
right after the library is loaded.
"""

from __future__ import annotations

import torch

from nibblock.ops import _checks
from nibblock.ops._flops import register_flop_formula

_ops = torch.ops.nibblock


# --- fakes: shapes and dtypes without data, and the same refusals as the real kernels -------------


@torch.library.register_fake("nibblock::int4_linear")
def _(x, packed, bias, out_features, group_size, bits, affine, scale_dtype, compute):
    _checks.check_linear(
        "int4_linear", x, packed, bias, out_features, group_size, bits, affine, scale_dtype, compute
    )
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("nibblock::_int4_linear_forward")
def _(x, packed, bias, format):
    out_features, *rest = _checks.decode_format(format)
    _checks.check_linear("int4_linear", x, packed, bias, out_features, *rest)
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("nibblock::int4_linear_dx")
def _(grad, packed, in_features, group_size, bits, affine, scale_dtype, compute):
    _checks.check_linear_dx(
        "int4_linear_dx", grad, packed, in_features, group_size, bits, affine, scale_dtype, compute
    )
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.register_fake("nibblock::int4_dequantize")
def _(packed, out_features, in_features, group_size, bits, affine, scale_dtype, dtype):
    _checks.check_dequantize(
        "int4_dequantize",
        packed,
        out_features,
        in_features,
        group_size,
        bits,
        affine,
        scale_dtype,
        dtype,
    )
    return packed.new_empty((out_features, in_features), dtype=dtype)


@torch.library.register_fake("nibblock::int4_embedding")
def _(indices, packed, num_embeddings, embedding_dim, group_size, bits, affine, scale_dtype, dtype):
    _checks.check_embedding(
        "int4_embedding",
        indices,
        packed,
        num_embeddings,
        embedding_dim,
        group_size,
        bits,
        affine,
        scale_dtype,
        dtype,
    )
    return packed.new_empty((*indices.shape, embedding_dim), dtype=dtype)


# --- gradients ------------------------------------------------------------------------------------
# Both ops are linear in their first argument and each is the other's gradient, so derivatives of
# any order are exact. The packed weight is frozen: it has no gradient.


def _linear_context(ctx, inputs, output):
    x, packed, bias, _, group_size, bits, affine, scale_dtype, compute = inputs
    ctx.save_for_backward(packed)
    ctx.format = (x.shape[-1], group_size, bits, affine, scale_dtype, compute)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, grad):
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        (packed,) = ctx.saved_tensors
        dx = _ops.int4_linear_dx(grad, packed, *ctx.format)
    if ctx.needs_input_grad[2]:
        dbias = as_rows(grad).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, None, dbias, None, None, None, None, None, None


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K]; `reshape(-1, K)` cannot tell M where K is 0."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


def _dx_context(ctx, inputs, output):
    grad, packed, _, group_size, bits, affine, scale_dtype, compute = inputs
    ctx.save_for_backward(packed)
    ctx.format = (grad.shape[-1], group_size, bits, affine, scale_dtype, compute)


def _dx_backward(ctx, grad):
    dgrad = None
    if ctx.needs_input_grad[0]:
        (packed,) = ctx.saved_tensors
        dgrad = _ops.int4_linear(grad, packed, None, *ctx.format)
    return dgrad, None, None, None, None, None, None, None


torch.library.register_autograd(
    "nibblock::int4_linear", _linear_backward, setup_context=_linear_context
)
torch.library.register_autograd("nibblock::int4_linear_dx", _dx_backward, setup_context=_dx_context)


# --- autocast: as F.linear, x and bias go to the dtype of the autocast region ---------------------
# torch.library.register_autocast fixes one dtype when it registers; this reads the region's.

_autocast_library = torch.library.Library("nibblock", "FRAGMENT")


def _cast(tensor, device_type, dtype):
    eligible = tensor is not None and tensor.device.type == device_type
    return tensor.to(dtype) if eligible and tensor.dtype in _checks.FLOATS else tensor


def _make_autocast(op, device_type, key):
    def autocast(keyset, x, packed, bias, *rest):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(_cast(x, device_type, dtype), packed, _cast(bias, device_type, dtype), *rest)

    return autocast


for _name in ("int4_linear", "_int4_linear_forward"):
    for _device, _key in (
        ("cpu", torch._C.DispatchKey.AutocastCPU),
        ("cuda", torch._C.DispatchKey.AutocastCUDA),
    ):
        _autocast_library.impl(
            _name,
            _make_autocast(getattr(_ops, _name).default, _device, _key),
            f"Autocast{_device.upper()}",
            with_keyset=True,
        )


# --- vmap -----------------------------------------------------------------------------------------
# Without a rule torch would loop over the batch and warn about it.


def _refuse_vmap(name, argument):
    def refuse(info, in_dims, *args):
        raise RuntimeError(
            f"{name}: {argument} must not be batched by vmap, got in_dims {tuple(in_dims)}; "
            f"pass {argument} with leading dimensions instead"
        )

    return refuse


for _name, _argument in (
    ("int4_linear", "x"),
    ("_int4_linear_forward", "x"),
    ("int4_linear_dx", "grad"),
    ("int4_dequantize", "packed"),
    ("int4_embedding", "indices"),
):
    torch.library.register_vmap(
        f"nibblock::{_name}",
        _refuse_vmap(_name.replace("_int4_linear_forward", "int4_linear"), _argument),
    )


# --- FLOPs, as torch.utils.flop_counter counts a dense matrix product -----------------------------


def _product_flops(x_shape, packed_shape, *args, out_shape=None, **kwargs):
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * x_shape[-1] * out_shape[-1]


register_flop_formula([_ops.int4_linear, _ops._int4_linear_forward, _ops.int4_linear_dx])(
    _product_flops
)
