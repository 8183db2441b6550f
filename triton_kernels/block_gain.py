"""What a sign step wins per block on NVIDIA GPUs: signs of gradients stay in registers.

    block_gain.cuda.triton.tile

A program owns one block. For each half of the tokens it sums the other half's gradient, takes its
signs, and sends every token of its own half through them; both sums end in one number a program, so
nothing is split and nothing atomic. Formulas and shapes: python/nibblock/ops/block_gain.py.
"""

from __future__ import annotations

import torch
import triton.language as tl
from nibblock.triton_kernels import _common, _configs
from nibblock.triton_kernels._common import OnDevice, cdiv, jit, launch, product, rows_of


@jit
def block_gain_kernel(
    grad, x, gain, squares, M, N, K, sg, sx, g_row, g_col, s_row, s_col,
    B: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gain += the sum over tokens of z, squares += that of z^2, of block [B, B] of the weight."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    j = tl.program_id(1) * B + tl.arange(0, B)
    middle = (M + 1) // 2
    won = tl.zeros((BM,), tl.float32)
    squared = tl.zeros((BM,), tl.float32)
    for half in tl.static_range(2):
        # Signs come from tokens `first` to `last`; those from `begin` to `end` meet them.
        first, last, begin, end = middle, M, 0, middle
        if half == 1:
            first, last, begin, end = 0, middle, middle, M
        acc = tl.zeros((B, B), tl.float32)
        for m0 in range(first, last, BM):
            m = m0 + tl.arange(0, BM)
            rows = m.to(tl.int64)[:, None]
            here = (m < last)[:, None]
            g = tl.load(grad + rows * sg + i[None, :], mask=here & (i < N)[None, :], other=0.0)
            xt = tl.load(x + rows * sx + j[None, :], mask=here & (j < K)[None, :], other=0.0)
            acc = product(tl.trans(xt.to(DOT)), g.to(DOT), acc, PRECISION)
        signs = tl.where(acc > 0.0, 1.0, tl.where(acc < 0.0, -1.0, 0.0)).to(DOT)  # [k, n]
        for m0 in range(begin, end, BM):
            m = m0 + tl.arange(0, BM)
            rows = m.to(tl.int64)[:, None]
            here = (m < end)[:, None]
            g = tl.load(grad + rows * sg + i[None, :], mask=here & (i < N)[None, :], other=0.0)
            xt = tl.load(x + rows * sx + j[None, :], mask=here & (j < K)[None, :], other=0.0)
            p = product(xt.to(DOT), signs, tl.zeros((BM, B), tl.float32), PRECISION)
            z = tl.sum(p * g.to(tl.float32), 1)
            won += z
            squared += z * z
    at = gain + tl.program_id(0) * g_row + tl.program_id(1) * g_col
    tl.store(at, tl.load(at) + tl.sum(won, 0))
    at = squares + tl.program_id(0) * s_row + tl.program_id(1) * s_col
    tl.store(at, tl.load(at) + tl.sum(squared, 0))


def block_gain(
    gain: torch.Tensor, squares: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, block: int
) -> None:
    """`nibblock.ops.block_gain_`, whose arguments these are; gain and squares are added to."""
    g, rows = rows_of(grad), rows_of(x)
    m, (n, k) = g.shape[0], (g.shape[1], rows.shape[1])
    if not m or not gain.numel():
        return
    dot, precision = tl.float32, "tf32x3"
    if g.dtype == rows.dtype:
        dot, precision = _common.operands(rows.dtype, rows.dtype)
    with OnDevice(x):
        launch(
            block_gain_kernel, (cdiv(n, block), cdiv(k, block)),
            g, rows, gain, squares, m, n, k, g.stride(0), rows.stride(0), *gain.stride(),
            *squares.stride(), B=block, DOT=dot, PRECISION=precision,
            **_configs.gain(block, dot == tl.float32),
        )  # fmt: skip
