"""What the shorter forwards may pass over: when a module's call is its class's forward and nothing
else, and which rows, weights and heads a private op takes."""

from __future__ import annotations

import functools
from typing import Optional

import torch
from torch import nn
from torch.nn.modules import module as _torch_module

from nibblock import _native
from nibblock.nn.int4_linear import Int4Linear

# As FusedInt4Group's: above this many rows the saved calls no longer matter.
MAX_ROWS = 8

ATTENDED = (torch.float32, torch.bfloat16)
# The modules that compute silu(x) and nothing else.
SILU = {"torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation"}


def bare(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward."""
    own = module.__dict__
    # (a forward of its own: wrappers put one on the instance)
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or "forward" in own
        or "_compiled_call_impl" in own  # module.compile()
    )


def few_rows(x: torch.Tensor) -> bool:
    """Whether x is rows for which calls cost as much as products, and nobody looks inside."""
    return (
        x.numel() <= MAX_ROWS * x.shape[-1]
        and type(x) is torch.Tensor
        and x.device.type == "cpu"
        and x.is_contiguous()
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not _torch_module._has_any_global_hook()
    )


def product_of(layer: Optional[nn.Module], columns: int) -> Optional[Int4Linear]:
    """The layer, if calling it with so many columns is nothing but a product without a gradient."""
    if type(layer) is not Int4Linear or layer.in_features != columns:
        return None
    if not bare(layer):
        return None
    bias = layer._parameters["bias"]
    return None if bias is not None and bias.requires_grad and torch.is_grad_enabled() else layer


def siblings_of(
    parent: nn.Module, names: tuple[str, ...], columns: int
) -> Optional[list[Int4Linear]]:
    """The layers of a module called `names`, all of them products of as many columns, or None."""
    layers = [product_of(parent._modules.get(name), columns) for name in names]
    return None if None in layers else layers


def mlp_of(mlp: nn.Module, columns: int) -> Optional[list[Int4Linear]]:
    """Gate, up and down of a known MLP, if they are products that fit each other, or None."""
    both = siblings_of(mlp, ("gate_proj", "up_proj"), columns)
    if both is None or both[0].out_features != both[1].out_features:
        return None
    down = product_of(mlp._modules.get("down_proj"), both[0].out_features)
    return None if down is None else [*both, down]


def weights_of(layers: list[Int4Linear]) -> Optional[tuple]:
    """(packed, biases or none, formats, widths) of layers; None where some have a bias, and where
    columns stand in another order than x's."""
    parameters = [layer._parameters for layer in layers]
    biases = [p["bias"] for p in parameters if p["bias"] is not None]
    if biases and len(biases) < len(layers):
        return None
    if any(layer._buffers.get("column_order") is not None for layer in layers):
        return None
    packed, formats = [p["packed"] for p in parameters], [layer._code for layer in layers]
    return packed, biases, formats, [layer.out_features for layer in layers]


@functools.cache
def is_silu(cls: type) -> bool:
    return f"{cls.__module__}.{cls.__qualname__}" in SILU


def attends(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `_attend` computes what sdpa does of these: one query each, a cache of plain tensors
    that wants no gradient."""
    shape, dtype = query.shape, query.dtype
    if shape[2] != 1 or shape[3] % 8 or dtype not in ATTENDED:
        return False
    for t in (key, value):
        if (
            type(t) is not torch.Tensor
            or t.dtype != dtype
            or t.device.type != "cpu"
            or t.shape[-1] != shape[3]
            or t.stride(-1) != 1
            or (t.requires_grad and torch.is_grad_enabled())
        ):
            return False
    return True


# Below so many positions, which are padded to 48, torch's attention is as fast.
_LEAST_LENGTH = 16


@functools.cache
def _causal_types() -> tuple[torch.dtype, ...]:
    """What `_causal_attention` is faster at than torch: float32 from AVX2 on, and 16-bit types
    where the CPU has no products of them. (torch multiplies a bfloat16 gradient at a tenth of
    float32's rate there.)"""
    features = _native.cpu_features()
    if not features["avx2"]:
        return ()
    if any(features[name] for name in ("avx512_bf16", "avx512_fp16", "amx_bf16")):
        return (torch.float32,)
    return (torch.float32, torch.bfloat16, torch.float16)


def attends_causally(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `_causal_attention` computes what sdpa does of these, [batch, heads, length, dim],
    when it is asked for a causal one: plain tensors, and queries at the positions of the keys."""
    shape, dtype = query.shape, query.dtype
    if (
        shape[2] < _LEAST_LENGTH
        or shape[3] % 16
        or dtype not in _causal_types()
        or torch.compiler.is_compiling()
    ):
        return False
    for t in (query, key, value):
        if (
            type(t) is not torch.Tensor
            or t.dtype != dtype
            or t.device.type != "cpu"
            or t.shape[2:] != shape[2:]
            or t.stride(-1) != 1
        ):
            return False
    return value.shape == key.shape and shape[1] % key.shape[1] == 0


def rotates(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether row r of x, [batch, length, width], is rotated by row r % tables of the tables: they
    have one for all rows, one for each, or one for each of a sequence."""
    if not (cos.dtype == sin.dtype == x.dtype and cos.shape == sin.shape):
        return False
    tables = cos.numel() // max(1, cos.shape[-1])
    rows = x.numel() // max(1, x.shape[-1])
    return tables in (1, rows) or tables == cos.shape[-2] == x.shape[-2]
