"""The sampled dense-dense product: the weight gradient of listed blocks, and of nothing else."""

from __future__ import annotations

import torch

from nibblock import _library
from nibblock.ops import _block_checks

_library.load()

from nibblock.ops import _block_register  # noqa: E402, F401  (registers fakes and gradients)

__all__ = ["block_weight_grad"]

_weight_grad = torch.ops.nibblock.block_weight_grad.default


def block_weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    layout: torch.Tensor,
    *,
    block: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The gradient of a linear layer's weight, for the listed blocks only.

        dS[z][n, k] = sum_m grad[m, I_z B + n] * x[m, J_z B + k]

    The dense gradient [N, K] never exists.

    Args:
        grad: [..., N] float32 | bfloat16 | float16, gradient of the layer's output; any strides.
        x: [..., K], the layer's input; dtype and leading dimensions of grad, any strides.
        layout: [...] int32, from `block_layout`.
        block: B, one of 16, 32, 64, 128.
        dtype: float32 | bfloat16 of the result; rounded once.
    Returns:
        [Z, B, B] dtype, device of grad, contiguous, in the order of the block list; 0 outside
        [N, K] in ragged blocks, and everywhere if there are no rows.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape, block edge or device that does
        not fit.
    Gradients: grad and x, of any order.
    Determinism: bitwise repeatable at one ISA level, at any number of threads: the split over
        tokens depends on shapes alone.
    Numerics: sums in float32 (bfloat16 grad and x on AMX units: products of bfloat16).
    Source: kernels in csrc/block_sparse_linear/.
    Example:
        >>> layout = nibblock.ops.block_layout(torch.tensor([[1, 0]]), 64, 64, 32)
        >>> g, x = torch.randn(8, 64), torch.randn(8, 64)
        >>> d = nibblock.ops.block_weight_grad(g, x, layout, block=32)
        >>> torch.testing.assert_close(d[0], (g.t() @ x)[32:64, 0:32])
    """
    try:
        return _weight_grad(grad, x, layout, block, dtype)
    except RuntimeError:
        _block_checks.check_weight_grad("block_weight_grad", grad, x, layout, block, dtype)
        raise
