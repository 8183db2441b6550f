"""Per-block impact on NVIDIA GPUs: tiles of the gradient are summed in registers and dropped.

    block_scores.cuda.triton.tile       sketch = 0, and the second half of a sketch

A program owns a tile of whole blocks and sums it over all tokens: a square of a sum cannot be split
over programs. A sketch first multiplies each column block of x by its signs, which are the CPU's
(csrc/block_scores/block_scores.h), and then is the same kernel with narrower column blocks.
Formulas and shapes: python/nibblock/ops/block_scores.py.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton.language as tl
from nibblock.triton_kernels import _common, _configs, _tuned
from nibblock.triton_kernels._common import (
    OnDevice,
    cdiv,
    jit,
    launch,
    next_power_of_2,
    product,
    rows_of,
)


@jit
def block_scores_kernel(
    grad, x, weight, scores, movement, M, N, K, sg, sx, sw, s_row, s_col, m_row, m_col, factor,
    BI: tl.constexpr, BJ: tl.constexpr, BM: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores += factor * the sums of squares of the RB x CB blocks of tile [BI, BJ] of grad^T x;
    movement += those of its products with the weight.
    """
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    acc = tl.zeros((BI, BJ), tl.float32)
    for m0 in range(0, M, BM):
        m = m0 + tl.arange(0, BM)
        rows = m.to(tl.int64)[:, None]
        here = (m < M)[:, None]
        g = tl.load(grad + rows * sg + i[None, :], mask=here & (i < N)[None, :], other=0.0)
        xt = tl.load(x + rows * sx + j[None, :], mask=here & (j < K)[None, :], other=0.0)
        acc = product(tl.trans(g.to(DOT)), xt.to(DOT), acc, PRECISION)
    inside = (i < N)[:, None] & (j < K)[None, :]
    acc = tl.where(inside, acc, 0.0)  # outside, NaN tokens would count
    row = tl.program_id(0) * (BI // RB) + tl.arange(0, BI // RB)
    col = tl.program_id(1) * (BJ // CB) + tl.arange(0, BJ // CB)
    there = (row * RB < N)[:, None] & (col * CB < K)[None, :]
    squares = tl.reshape(acc * acc, (BI // RB, RB, BJ // CB, CB))
    at = scores + row[:, None] * s_row + col[None, :] * s_col
    old = tl.load(at, mask=there, other=0.0)
    tl.store(at, old + tl.sum(tl.sum(squares, 3), 1) * factor, mask=there)
    if movement is not None:
        w = tl.load(weight + i.to(tl.int64)[:, None] * sw + j[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        moves = tl.reshape(acc * w, (BI // RB, RB, BJ // CB, CB))
        at = movement + row[:, None] * m_row + col[None, :] * m_col
        old = tl.load(at, mask=there, other=0.0)
        tl.store(at, old + tl.sum(tl.sum(moves, 3), 1), mask=there)


@jit
def sketch_kernel(
    x, signs, out, M, K, sx, COLUMNS, B: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[m, J SP + q] = sum over k in J of x[m, k] * sign(k, q), float32; q counts to SP."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * B + tl.arange(0, B)
    q = tl.arange(0, SP)
    rows = m.to(tl.int64)[:, None]
    xt = tl.load(x + rows * sx + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
    sign = tl.load(signs + k[:, None] * SP + q[None, :], mask=(k < K)[:, None], other=0.0)
    acc = product(xt.to(DOT), sign.to(DOT), tl.zeros((BM, SP), tl.float32), PRECISION)
    at = rows * COLUMNS + tl.program_id(1) * SP + q[None, :]
    tl.store(out + at, acc, mask=(m < M)[:, None])


def _mix(v: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64 tensors, whose products wrap as unsigned ones do."""

    def shifted(v: torch.Tensor, by: int) -> torch.Tensor:
        return (v >> by) & ((1 << (64 - by)) - 1)

    v = (v ^ shifted(v, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    v = (v ^ shifted(v, 27)) * (0x94D049BB133111EB - (1 << 64))
    return v ^ shifted(v, 31)


def signs(seed: int, k: int, samples: int, padded: int, device: torch.device) -> torch.Tensor:
    """[K, padded] float32 of +-1 for the first `samples` columns, 0 beyond: the CPU's signs."""
    step = 0x9E3779B97F4A7C15 - (1 << 64)
    start = (seed + step + (1 << 63)) % (1 << 64) - (1 << 63)
    base = _mix(torch.full((1,), start, dtype=torch.int64, device=device))
    bits = _mix(base + step * (torch.arange(k, dtype=torch.int64, device=device) + 1))
    q = torch.arange(padded, device=device)
    sign = 1.0 - 2.0 * ((bits[:, None] >> q) & 1).float()
    return sign * (q < samples)


def block_scores(
    scores: torch.Tensor,
    movement: Optional[torch.Tensor],
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: Optional[torch.Tensor],
    block: int,
    sketch: int,
    seed: int,
) -> None:
    """`nibblock.ops.block_scores_`, whose arguments these are; scores and movement are added to."""
    g, rows = rows_of(grad), rows_of(x)
    m, (n, k) = g.shape[0], (g.shape[1], rows.shape[1])
    if not m or not scores.numel():
        return
    factor, column, precision = 1.0, block, "tf32x3"
    dot = tl.float32
    if g.dtype == rows.dtype and not sketch:
        dot, precision = _common.operands(rows.dtype, rows.dtype)
    with OnDevice(x):
        if sketch:
            column = max(16, next_power_of_2(sketch))
            blocks = cdiv(k, block)
            table = signs(seed, k, sketch, column, x.device)
            narrow = x.new_empty((m, blocks * column), dtype=torch.float32)
            exact = tl.float32 if rows.dtype == torch.float32 else _common.TRITON_DTYPE[rows.dtype]
            launch(
                sketch_kernel, (cdiv(m, 64), blocks),
                rows, table, narrow, m, k, rows.stride(0), blocks * column, B=block, SP=column,
                BM=64, DOT=exact, PRECISION="tf32x3", num_warps=4, num_stages=1,
            )  # fmt: skip
            rows, k, factor = narrow, blocks * column, 1.0 / sketch
        if weight is not None:
            weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        settings = _configs.scores(block, column, dot == tl.float32)
        if not sketch:
            shape = _configs.scores_class(m, n, k, rows.dtype, block)
            if g.dtype == rows.dtype:
                settings = _tuned.choose(_common.gpu(x), shape, settings)
        launch(
            block_scores_kernel, (cdiv(n, settings["BI"]), cdiv(k, settings["BJ"])),
            g, rows, weight, scores, movement, m, n, k, g.stride(0), rows.stride(0),
            0 if weight is None else weight.stride(0), *scores.stride(),
            *((0, 0) if movement is None else movement.stride()), factor, RB=block, CB=column,
            DOT=dot, PRECISION=precision, **settings,
        )  # fmt: skip
