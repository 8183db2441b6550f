"""Products with a weight of which only some B x B blocks exist, as typed functions.

    S[n, k] = values[z][n - I_z B, k - J_z B]        (I_z, J_z) the z-th block, 0 elsewhere

Letters, as in csrc/block_sparse_linear/block_sparse_linear.h: M rows of x, N out_features,
K in_features, B block edge, Z stored blocks. Blocks are sorted by row block, then column block; the
last block row and column may be ragged, and what lies outside [N, K] is ignored.
"""

from __future__ import annotations

from typing import Optional

import torch

from nibblock import _library
from nibblock.ops import _block_checks

_library.load()

from nibblock.ops import _block_register  # noqa: E402, F401  (registers fakes and gradients)

__all__ = ["block_layout", "block_sparse_linear", "block_sparse_linear_dx", "sort_blocks"]

_linear = torch.ops.nibblock.block_sparse_linear.default
_linear_dx = torch.ops.nibblock.block_sparse_linear_dx.default


def block_layout(
    blocks: torch.Tensor, out_features: int, in_features: int, block: int
) -> torch.Tensor:
    """The index array that every block-sparse op reads, checked once here and never again.

        [row_ptr | column block | col_ptr | row block, by columns | position, by columns]

    Args:
        blocks: [Z, 2] int64 | int32, (row block, column block), sorted by row block, then column
            block, distinct. Z may be 0.
        out_features, in_features: N, K of the weight; blocks lie in its ceil(N/B) x ceil(K/B) grid.
        block: B, one of 16, 32, 64, 128.
    Returns:
        [ceil(N/B) + ceil(K/B) + 2 + 3 Z] int32, device of blocks.
    Raises:
        TypeError: blocks is no integer tensor. ValueError: a block that is out of range, twice in
        the list or out of order (the text names it), another shape, or a block edge that does not
        exist.
    Gradients: none. Determinism: bitwise.
    Numerics: integers only.
    Source: drawn in csrc/block_sparse_linear/block_sparse_linear.h.
    Example:
        >>> blocks = torch.tensor([[0, 1], [2, 0]])
        >>> layout = nibblock.ops.block_layout(blocks, out_features=96, in_features=64, block=32)
        >>> y = nibblock.ops.block_sparse_linear(torch.randn(3, 64), torch.randn(2, 32, 32), layout,
        ...                                      out_features=96, block=32)
    """
    index = _block_checks.check_blocks("block_layout", blocks, out_features, in_features, block)
    return _block_checks.build_layout(index, out_features, in_features, block).to(blocks.device)


def sort_blocks(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts a block list into the order that `block_layout` asks for.

        sorted = blocks[order], by row block, then column block

    Args:
        blocks: [Z, 2] int64 | int32, (row block, column block), in any order.
    Returns:
        (sorted [Z, 2], order [Z] int64), device and dtype of blocks: values that belonged to
        `blocks` belong to `sorted` as `values[order]`.
    Raises:
        TypeError: blocks is no integer tensor. ValueError: another shape.
    Gradients: none. Determinism: bitwise; equal blocks keep their order.
    Numerics: integers only.
    Source: this file.
    """
    index = _block_checks.check_index("sort_blocks", blocks)
    by_column = torch.sort(index[:, 1], stable=True).indices
    order = by_column[torch.sort(index[by_column, 0], stable=True).indices].to(blocks.device)
    return blocks[order], order


def block_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    layout: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    y0: Optional[torch.Tensor] = None,
    *,
    out_features: int,
    block: int,
) -> torch.Tensor:
    """A linear layer whose weight consists of the stored blocks only.

        y[m, n] = y0[m, n] + sum over stored blocks (I, J) with n in I of
                  sum over k in J of x[m, k] * S[n, k]  + bias[n]

    Args:
        x: [..., K] float32 | bfloat16 | float16, any strides; any leading dimensions, none and
            empty ones included.
        values: [Z, B, B] float32 | bfloat16, in the order of the block list; within a block n, then
            k. Elements outside [N, K] are ignored.
        layout: [...] int32, from `block_layout`.
        bias: [N] float32 | bfloat16 | float16, or None. Added in float32, to empty block rows too.
        y0: [..., N] of x's dtype, or None: what the product is added to, in float32. It is not
            changed.
        out_features: N.
        block: B, one of 16, 32, 64, 128.
    Returns:
        [..., N], dtype and device of x, contiguous.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape, block edge or device that does
        not fit.
    Gradients: x, values (stored blocks only), bias and y0, of any order.
    Determinism: bitwise repeatable at one ISA level, at any number of threads.
    Numerics: sums in float32 (bfloat16 x on AMX units: products of bfloat16). Where the product is
        zero, y is y0 bit for bit. NaN and Inf spread as in a dense product over the stored blocks.
    Autocast: x, bias and y0 are cast as `torch.nn.functional.linear` casts its arguments; values
        are used as they are.
    Source: kernels in csrc/block_sparse_linear/.
    """
    try:
        return _linear(x, values, layout, bias, y0, out_features, block)
    except RuntimeError:
        _block_checks.check_linear(
            "block_sparse_linear", x, values, layout, bias, y0, out_features, block
        )
        raise


def block_sparse_linear_dx(
    grad: torch.Tensor,
    values: torch.Tensor,
    layout: torch.Tensor,
    *,
    in_features: int,
    block: int,
) -> torch.Tensor:
    """The input gradient of `block_sparse_linear`: a product with S itself, not its transpose.

        dx[m, k] = sum over stored blocks (I, J) with k in J of
                   sum over n in I of grad[m, n] * S[n, k]

    Args:
        grad: [..., N] float32 | bfloat16 | float16, any strides and leading dimensions.
        values, layout, block: as in `block_sparse_linear`.
        in_features: K.
    Returns:
        [..., K], dtype and device of grad, contiguous; 0 where a column block is empty.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape, block edge or device that does
        not fit.
    Gradients: grad (it is `block_sparse_linear`) and values.
    Determinism: bitwise repeatable at one ISA level, at any number of threads.
    Numerics: sums in float32.
    Source: kernels in csrc/block_sparse_linear/.
    """
    try:
        return _linear_dx(grad, values, layout, in_features, block)
    except RuntimeError:
        _block_checks.check_linear_dx(
            "block_sparse_linear_dx", grad, values, layout, in_features, block
        )
        raise
