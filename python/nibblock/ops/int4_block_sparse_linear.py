"""A frozen int4 weight plus a trainable block-sparse (and low-rank) adapter, in one op."""

from __future__ import annotations

from typing import Optional

import torch

from nibblock import _library
from nibblock.ops import _block_register

_library.load()

__all__ = ["int4_block_sparse_linear", "int4_block_sparse_linear_dx"]

_linear = torch.ops.nibblock.int4_block_sparse_linear.default
_linear_dx = torch.ops.nibblock.int4_block_sparse_linear_dx.default


def int4_block_sparse_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    values: torch.Tensor,
    layout: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    lora_a: Optional[torch.Tensor] = None,
    lora_c: Optional[torch.Tensor] = None,
    *,
    out_features: int,
    group_size: int,
    bits: int = 4,
    affine: bool,
    scale_dtype: torch.dtype,
    compute: str = "bf16",
    block: int,
) -> torch.Tensor:
    """An int4 linear layer with an adapter, in one pass over x.

        y = x dequant(Q)^T + x S^T + (x A^T) C^T + bias

    No dense copy of a weight exists at any time; y is rounded once.

    Args:
        x: [..., K] float32 | bfloat16 | float16, any strides and leading dimensions.
        packed: [packed_bytes(N, K, ...)] uint8, the frozen base, from `int4_pack`.
        values: [Z, B, B] float32 | bfloat16, the adapter's blocks S.
        layout: [...] int32, from `block_layout`.
        bias: [N] float32 | bfloat16 | float16, or None.
        lora_a: A [r, K] float32 | bfloat16 | float16, or None.
        lora_c: C [N, r] float32 | bfloat16 | float16; given exactly when lora_a is.
        out_features: N.
        group_size, bits, affine, scale_dtype, compute: of the base, as in `int4_linear`. The
            adapter's products do not depend on compute.
        block: B, one of 16, 32, 64, 128.
    Returns:
        [..., N], dtype and device of x, contiguous.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape, format or device that does not
        fit.
    Gradients: x, bias, values, lora_a and lora_c, of any order. packed is frozen.
    Determinism: bitwise repeatable at one ISA level, at any number of threads.
    Numerics: the base as in `int4_linear`; the adapter is added in float32 before y is rounded.
        Where its sum is zero, y is that of `int4_linear` bit for bit.
    Autocast: x and bias are cast as `torch.nn.functional.linear` casts its arguments.
    Source: kernels in csrc/int4_linear/ and csrc/block_sparse_linear/.
    """
    arguments = (
        x, packed, bias, out_features, group_size, bits, affine, scale_dtype, compute,
        values, layout, block, lora_a, lora_c,
    )  # fmt: skip
    try:
        return _linear(*arguments)
    except RuntimeError:
        _block_register.check_fused("int4_block_sparse_linear", *arguments)
        raise


def int4_block_sparse_linear_dx(
    grad: torch.Tensor,
    packed: torch.Tensor,
    values: torch.Tensor,
    layout: torch.Tensor,
    lora_a: Optional[torch.Tensor] = None,
    lora_c: Optional[torch.Tensor] = None,
    *,
    in_features: int,
    group_size: int,
    bits: int = 4,
    affine: bool,
    scale_dtype: torch.dtype,
    compute: str = "bf16",
    block: int,
) -> torch.Tensor:
    """The input gradient of `int4_block_sparse_linear`, through base and adapter at once.

        dx = grad dequant(Q) + grad S + (grad C) A

    Args:
        grad: [..., N] float32 | bfloat16 | float16, any strides and leading dimensions.
        packed, values, layout, lora_a, lora_c: as in `int4_block_sparse_linear`.
        in_features: K.
        group_size, bits, affine, scale_dtype, compute, block: as in `int4_block_sparse_linear`;
            compute of the base's part, as in `int4_linear_dx`.
    Returns:
        [..., K], dtype and device of grad, contiguous.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape, format or device that does not
        fit.
    Gradients: grad, values, lora_a and lora_c. packed is frozen.
    Determinism: bitwise repeatable at one ISA level, at any number of threads.
    Numerics: sums in float32; the base's part as in `int4_linear_dx`.
    Source: kernels in csrc/int4_linear/ and csrc/block_sparse_linear/.
    """
    arguments = (
        grad, packed, in_features, group_size, bits, affine, scale_dtype, compute,
        values, layout, block, lora_a, lora_c,
    )  # fmt: skip
    try:
        return _linear_dx(*arguments)
    except RuntimeError:
        _block_register.check_fused_dx("int4_block_sparse_linear_dx", *arguments)
        raise
