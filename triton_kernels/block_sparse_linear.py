"""Block-sparse products and the gradient of stored blocks on NVIDIA GPUs.

    block_sparse_linear.cuda.triton.tile     y = x S^T (+ y0, + bias); dx = g S by columns
    block_weight_grad.cuda.triton.blocks     g^T x at the stored blocks, the sum over tokens split
                                             when there are fewer blocks than multiprocessors

The layout array is the CPU's (csrc/block_sparse_linear/block_sparse_linear.h): the transposed order
serves dx without a second copy of the values, and gives block_weight_grad each block's row, with
programs that read the same columns of x side by side. Blocks of 16 and 32 are taken several at a
time, so that a step of the sum is 64 long whatever the block. Formulas, shapes and errors:
python/nibblock/ops/block_sparse_linear.py, block_weight_grad.py.
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
    product,
    rounded,
    rows_of,
)


@jit
def block_sparse_kernel(
    x, values, ptr, other, order, bias, y0, out, M, O, INNER, sx, s0, VO, VR,
    B: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BY_COLUMN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_Y0: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BO] of outputs, BO <= B: tokens are the operand of 64 rows, because B may be 16.

    The sum runs along q, which counts through the blocks of one block row (or column) end to end.
    """
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    RUN: tl.constexpr = B if B < STEP else STEP
    row = tl.program_id(0) * BO // B
    local = o - row * B
    rows = m.to(tl.int64)[:, None]
    first = tl.load(ptr + row)
    last = tl.load(ptr + row + 1)
    acc = tl.zeros((BM, BO), tl.float32)
    for q0 in range(first * B, last * B, STEP):
        q = q0 + tl.arange(0, STEP)
        z = q // B
        inner = q % B
        r = tl.load(other + z, mask=z < last, other=0) * B + inner
        # A step may begin inside a block: what runs on is the shorter of the two.
        r = tl.max_contiguous(tl.multiple_of(r, RUN), RUN)
        there = (z < last) & (r < INNER)
        if BY_COLUMN:
            z = tl.load(order + z, mask=z < last, other=0)
        at = z.to(tl.int64) * (B * B) + inner * VR
        v = tl.load(
            values + at[:, None] + local[None, :] * VO,
            mask=there[:, None] & (o < O)[None, :],
            other=0.0,
        )
        xt = tl.load(x + rows * sx + r[None, :], mask=(m < M)[:, None] & there[None, :], other=0.0)
        if v.dtype == tl.float32:
            v = rounded(v, DOT)
        acc = product(xt.to(DOT), v.to(DOT), acc, PRECISION)
    here = (m < M)[:, None] & (o < O)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    if HAS_Y0:
        old = tl.load(y0 + rows * s0 + o[None, :], mask=here, other=0.0)
        new = rounded(old.to(tl.float32) + acc, out.dtype.element_ty)
        new = tl.where(acc == 0, old, new)  # y0 bit for bit where nothing is added
    else:
        new = rounded(acc, out.dtype.element_ty)
    tl.store(out + rows * O + o[None, :], new, mask=here)


@jit
def block_weight_grad_kernel(
    grad, x, col, col_row, col_block, out, M, N, K, sg, sx, part_m, COUNT,
    B: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BI: tl.constexpr,
    BJ: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Tile [BI, BJ] of one block's gradient, of part `program_id(1)` of the tokens."""
    ACROSS: tl.constexpr = B // BJ
    TILES: tl.constexpr = (B // BI) * ACROSS
    entry = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    z = tl.load(col_block + entry)
    i_local = (tile // ACROSS) * BI + tl.arange(0, BI)
    j_local = (tile % ACROSS) * BJ + tl.arange(0, BJ)
    i = tl.load(col_row + entry) * B + i_local
    j = tl.load(col + z) * B + j_local
    begin = tl.program_id(1) * part_m
    acc = tl.zeros((BI, BJ), tl.float32)
    for m0 in range(begin, tl.minimum(begin + part_m, M), BM):
        m = m0 + tl.arange(0, BM)
        rows = m.to(tl.int64)[:, None]
        here = (m < M)[:, None]
        g = tl.load(grad + rows * sg + i[None, :], mask=here & (i < N)[None, :], other=0.0)
        xt = tl.load(x + rows * sx + j[None, :], mask=here & (j < K)[None, :], other=0.0)
        acc = product(tl.trans(g.to(DOT)), xt.to(DOT), acc, PRECISION)
    # Outside [N, K] the gradient is 0, whatever NaN the tokens hold.
    acc = tl.where((i < N)[:, None] & (j < K)[None, :], acc, 0.0)
    at = (tl.program_id(1).to(tl.int64) * COUNT + z) * (B * B)
    at += i_local[:, None] * B + j_local[None, :]
    tl.store(out + at, rounded(acc, out.dtype.element_ty))


@jit
def sum_parts_kernel(partial, out, SIZE, PARTS, BLOCK: tl.constexpr):
    """out[i] = the sum of partial[p, i], in the order of p."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, PARTS):
        acc += tl.load(partial + tl.cast(part, tl.int64) * SIZE + i, mask=i < SIZE, other=0.0)
    tl.store(out + i, rounded(acc, out.dtype.element_ty), mask=i < SIZE)


def parts_of(layout: torch.Tensor, n: int, k: int, block: int, count: int) -> tuple:
    """(row_ptr, col, col_ptr, col_row, col_block) of a layout array, as views."""
    return layout.split((cdiv(n, block) + 1, count, cdiv(k, block) + 1, count, count))


def linear(
    x: torch.Tensor,
    values: torch.Tensor,
    layout: torch.Tensor,
    bias: Optional[torch.Tensor],
    y0: Optional[torch.Tensor],
    n: int,
    k: int,
    block: int,
    dx: bool = False,
) -> torch.Tensor:
    """y = x S^T + bias + y0 for x [..., K], or dx = x S for x [..., N]; of x's dtype.

    Args:
        x: float32 | bfloat16 | float16, any strides. values: [Z, B, B] float32 | bfloat16.
        layout: from `nibblock.ops.block_layout`. bias: [N], y0: [..., N] of x's dtype, or None.
        n, k, block: N, K, B. dx: which of the two.
    """
    outputs, inner = (k, n) if dx else (n, k)
    shape = (*x.shape[:-1], outputs)
    m = 1
    for size in x.shape[:-1]:
        m *= size
    out = x.new_empty((m, outputs))
    if not out.numel():
        return out.view(shape)
    rows = rows_of(x) if inner else x.new_empty((m, 0))
    row_ptr, col, col_ptr, col_row, col_block = parts_of(layout, n, k, block, values.shape[0])
    old = None if y0 is None else rows_of(y0)
    values = values.contiguous()
    dot, precision = _common.operands(x.dtype, values.dtype)
    op = "block_sparse_linear_dx" if dx else "block_sparse_linear"
    kind = _configs.blocks_class(op, m, n, k, x.dtype, values.dtype, block)
    own = _configs.blocks(m, block, dot == tl.float32)
    config = _tuned.choose(_common.gpu(x), kind, own)
    with OnDevice(x):
        launch(
            block_sparse_kernel, (cdiv(outputs, config["BO"]), cdiv(m, config["BM"])),
            rows, values, col_ptr if dx else row_ptr, col_row if dx else col, col_block, bias, old,
            out, m, outputs, inner, rows.stride(0), 0 if old is None else old.stride(0),
            *((1, block) if dx else (block, 1)), B=block, DOT=dot, PRECISION=precision,
            BY_COLUMN=dx, HAS_BIAS=bias is not None, HAS_Y0=old is not None, **config,
        )  # fmt: skip
    return out.view(shape)


def block_weight_grad(
    grad: torch.Tensor, x: torch.Tensor, layout: torch.Tensor, block: int, dtype: torch.dtype
) -> torch.Tensor:
    """[Z, B, B] dtype: grad[:, I]^T x[:, J] of every stored block (I, J).

    Args:
        grad: [..., N], x: [..., K] of one dtype, any strides. layout: of the blocks.
        block: B. dtype: float32 | bfloat16.
    """
    n, k = grad.shape[-1], x.shape[-1]
    count = (layout.numel() - cdiv(n, block) - cdiv(k, block) - 2) // 3
    out = x.new_empty((count, block, block), dtype=dtype)
    if not out.numel():
        return out
    g, rows = rows_of(grad), rows_of(x)
    m = g.shape[0]
    if not m:
        return out.zero_()
    _, col, _, col_row, col_block = parts_of(layout, n, k, block, count)
    dot, precision = _common.operands(x.dtype, x.dtype)
    own = _configs.weight_grad(block, dot == tl.float32)
    kind = _configs.weight_grad_class(m, count, x.dtype, block)
    config = dict(_tuned.choose(_common.gpu(x), kind, own))
    programs = config.pop("TARGET", _configs.TARGET)
    tiles = count * (block // config["BI"]) * (block // config["BJ"])
    steps = cdiv(m, config["BM"])
    part = cdiv(steps, _common.splits(tiles, steps, programs)) * config["BM"]
    parts = cdiv(m, part)
    with OnDevice(x):
        target = out
        if parts > 1:
            target = x.new_empty((parts, *out.shape), dtype=torch.float32)
        launch(
            block_weight_grad_kernel, (tiles, parts),
            g, rows, col, col_row, col_block, target, m, n, k, g.stride(0), rows.stride(0), part,
            count, B=block, DOT=dot, PRECISION=precision, **config,
        )  # fmt: skip
        if parts > 1:
            size = out.numel()
            launch(
                sum_parts_kernel, (cdiv(size, 1024),),
                target, out, size, parts, BLOCK=1024, num_warps=4, num_stages=2,
            )  # fmt: skip
    return out
