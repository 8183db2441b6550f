"""The product of `MaskedLinear`: dense forward, packed weight gradient.

    y  = x W^T + bias        dx = g W        dS = listed blocks of g^T x        dbias = sum of g

For dS only the input columns that some listed block uses are needed. Where they are fewer than half
of all, forward gathers them and lets go of x; the blocks are then numbered within the gathered
columns. Gathering costs about 3 % of the layer's forward and backward (measured on SmolLM2's
shapes, 512 tokens), so memory decides. Half: two layers that read one x and gather less than half
of it each never keep more than x between them, and 2 % of SmolLM2's blocks, spread evenly, keep
half of what all inputs would take. The choice is made from the block list alone, so that a
recomputed forward (checkpointing) keeps the same.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nibblock.ops import _block_checks, _block_register

_weight_grad = torch.ops.nibblock.block_weight_grad.default

Runs = tuple[tuple[int, int], ...]


def plan_columns(
    index: torch.Tensor, out_features: int, in_features: int, block: int
) -> tuple[Optional[Runs], Optional[torch.Tensor]]:
    """Which columns of x the gradient of these blocks needs.

    Args:
        index: [Z, 2] on the CPU, checked.
        out_features, in_features, block: N, K, B.
    Returns:
        (runs, layout): runs of neighbouring columns as (start, length) and the layout of the blocks
        within the gathered columns; (None, None) where x is kept as it is.
    """
    used = index[:, 1].unique().tolist()
    runs: list[list[int]] = []
    for column in used:
        start = column * block
        length = min(block, in_features - start)
        if runs and runs[-1][0] + runs[-1][1] == start:
            runs[-1][1] += length
        else:
            runs.append([start, length])
    kept = sum(length for _, length in runs)
    if 2 * kept >= in_features:
        return None, None
    # Only the last column of all can be short, and it stays the last.
    place = torch.searchsorted(torch.tensor(used, dtype=torch.int64), index[:, 1].long())
    compact = torch.stack([index[:, 0].long(), place], 1)
    layout = _block_checks.build_layout(compact, out_features, kept, block)
    return tuple((start, length) for start, length in runs), layout


def gather_columns(x: torch.Tensor, runs: Runs) -> torch.Tensor:
    """The listed columns of x side by side, [..., sum of lengths]: always a new tensor."""
    parts = [x.narrow(-1, start, length) for start, length in runs]
    return torch.cat(parts, -1) if parts else x.new_empty((*x.shape[:-1], 0))


class MaskedProduct(torch.autograd.Function):
    """apply(x, values, weight, bias, layout, block, runs) -> y.

    `values` is only where the gradient goes: forward reads `weight`, which holds them already.
    """

    @staticmethod
    def forward(ctx, x, values, weight, bias, layout, block, runs):
        ctx.block, ctx.values_dtype = block, values.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        kept = x if runs is None else gather_columns(x, runs)
        ctx.save_for_backward(kept, weight, layout)
        # Detached, it is no view that autograd knows of: of a custom Function's view it refuses
        # changes in place, which models make to what a linear returns.
        return F.linear(x, weight, bias).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kept, weight, layout = ctx.saved_tensors
        dx = dvalues = dbias = None
        if ctx.needs_input_grad[0]:
            dx = grad @ weight
        if ctx.needs_input_grad[1]:
            dvalues = _weight_grad(grad, kept, layout, ctx.block, ctx.values_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
            dbias = _block_register._bias_gradient(grad, ctx.bias_dtype)
        return dx, dvalues, None, dbias, None, None, None
