"""Launch configurations: those chosen by hand, and the candidates that a tuner may put in their
place. Plain numbers by shape class; importing this imports no Triton.

Nothing here chooses a kernel: a configuration is constants inside one row of `_table`. Every
candidate is compiled ahead of time for compute capability 8.0 and 9.0 without a spill, and its
figures are committed (tests/test_triton_tune.py, bench/results/triton_grid.json).

Keys in capitals are the kernels' own constants; TARGET is the number of programs that a split sum
is cut for (`_common.splits`).
"""

from __future__ import annotations

from typing import NamedTuple, Union

import torch
from nibblock.triton_kernels._table import FEW_ROWS

Config = dict[str, Union[int, bool]]

TARGET = 264  # programs: two for each of an H100's 132 multiprocessors


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# --- chosen by hand -------------------------------------------------------------------------------


def int4_forward(capability: int, rows: int, x: torch.dtype, group: int, adapter: bool) -> Config:
    """Of the int4 product. None of them spills. mma.sync (8.0) keeps operands in registers that
    wgmma (9.0) reads from shared memory."""
    wide = x == torch.float32
    if rows <= FEW_ROWS:
        bm = max(16, next_power_of_2(rows))
        warps = 4 if bm < 64 else 8
        if wide:
            return dict(BN=64, BM=bm, BK=32, SCALE_SUMS=False, num_warps=warps, num_stages=3)
        bk = min(group, 128)
        return dict(BN=64, BM=bm, BK=bk, SCALE_SUMS=True, num_warps=warps, num_stages=4)
    tight = adapter and capability < 90
    if wide:
        bm = 32 if tight else 64
        return dict(BN=64, BM=bm, BK=32, SCALE_SUMS=False, num_warps=8, num_stages=2)
    if x == torch.float16:
        bm = 32 if tight else 64
        return dict(BN=128, BM=bm, BK=min(group, 64), SCALE_SUMS=True, num_warps=8, num_stages=3)
    if rows >= 512 and not adapter:  # twice the products for each weight that is scaled
        return dict(BN=128, BM=256, BK=64, SCALE_SUMS=False, num_warps=8, num_stages=3)
    bm = 64 if tight else 128
    return dict(BN=128, BM=bm, BK=64, SCALE_SUMS=False, num_warps=8, num_stages=4)


def int4_dx(capability: int, rows: int, grad: torch.dtype, group: int, adapter: bool) -> Config:
    """The same for dx: the outputs are k, the sum runs over n."""
    wide = grad != torch.bfloat16
    if rows <= FEW_ROWS:
        bm = max(16, next_power_of_2(rows))
        return dict(BN=32 if wide else 64, BM=bm, BK=64, num_warps=4, num_stages=3)
    tight = adapter and capability < 90
    if wide:
        warps = 8 if adapter else 4
        return dict(BN=32, BM=32 if tight else 64, BK=64, num_warps=warps, num_stages=2)
    bm = 64 if tight else 128
    return dict(BN=64, BM=bm, BK=128, num_warps=8, num_stages=4)


def blocks(rows: int, block: int, wide: bool) -> Config:
    """Of a block-sparse product and its dx; wide: float32 operands."""
    if rows <= 16:
        bo = min(block, 32)
        return dict(BM=16, BO=bo, STEP=64, num_warps=2 if bo < 32 else 4, num_stages=4)
    if wide:
        return dict(BM=64, BO=min(block, 64), STEP=32, num_warps=4, num_stages=2)
    if rows <= 64:
        return dict(BM=64, BO=min(block, 64), STEP=64, num_warps=4, num_stages=4)
    warps = 8 if block == 128 else 4
    return dict(BM=128, BO=block, STEP=64, num_warps=warps, num_stages=4 if block < 128 else 3)


def weight_grad(block: int, wide: bool) -> Config:
    """Of block_weight_grad."""
    warps = {16: 1, 32: 2, 64: 4, 128: 8}[block]
    if wide:
        edge = min(block, 64)
        return dict(BI=edge, BJ=edge, BM=32, num_warps=min(warps, 4), num_stages=2)
    return dict(BI=block, BJ=block, BM=64, num_warps=warps, num_stages=4)


def scores(row: int, col: int, wide: bool) -> Config:
    """Of block_scores, for blocks of row x col."""
    if wide:
        bi, bj = max(64, row), max(64, col)
        return dict(BI=bi, BJ=bj, BM=32, num_warps=8 if bi * bj > 4096 else 4, num_stages=2)
    return dict(BI=128, BJ=128, BM=64, num_warps=8, num_stages=4)


def gain(block: int, wide: bool) -> Config:
    """Of block_gain; wide: float32 operands."""
    if wide:
        if block == 128:  # its signs take 64 KiB, and three tf32 products all registers
            return dict(BM=16, num_warps=8, num_stages=1)
        return dict(BM=32, num_warps={16: 1, 32: 4, 64: 8}[block], num_stages=2)
    warps = {16: 1, 32: 2, 64: 4, 128: 8}[block]
    return dict(BM=64 if block < 128 else 32, num_warps=warps, num_stages=3)


def updates() -> Config:
    """Of a masked optimiser step."""
    return dict(num_warps=4)


# --- shape classes --------------------------------------------------------------------------------


class ShapeClass(NamedTuple):
    """What one configuration serves. Made by the functions below, which alone say what falls
    together; a field that does not matter to an op is 0 (or "").

    op: of `_table.TABLE`. rows: of x, rounded up to a power of two in 16 .. 4096. n, k: out- and
    in-features, the nearest power of two. dtype: of x. group, bits: of an int4 weight (-1: whole
    rows). block: edge.
    """

    op: str
    rows: int = 0
    n: int = 0
    k: int = 0
    dtype: str = ""
    group: int = 0
    bits: int = 0
    block: int = 0

    def __str__(self) -> str:
        facts = [f"{f}={v}" for f, v in zip(self._fields[1:], self[1:]) if v]
        return " ".join([self.op, *facts])


def rows_class(rows: int) -> int:
    return min(4096, max(16, next_power_of_2(rows)))


def nearest_class(size: int) -> int:
    """The power of two nearest to size in ratio; 6144 counts as 8192, 5120 as 4096."""
    low = 1 << max(0, size.bit_length() - 1)
    return low if size * size < 2 * low * low else 2 * low


def _name(dtype: torch.dtype) -> str:
    return str(dtype).replace("torch.", "")


def int4_class(
    op: str, rows: int, n: int, k: int, x: torch.dtype, group: int, bits: int
) -> ShapeClass:
    """Of int4_linear and int4_linear_dx."""
    sizes = rows_class(rows), nearest_class(n), nearest_class(k)
    return ShapeClass(op, *sizes, _name(x), group, bits)


def blocks_class(
    op: str, rows: int, n: int, k: int, x: torch.dtype, values: torch.dtype, block: int
) -> ShapeClass:
    """Of block_sparse_linear and its dx; only products in bfloat16 have candidates."""
    dtype = x if x == values else torch.float32
    sizes = rows_class(rows), nearest_class(n), nearest_class(k)
    return ShapeClass(op, *sizes, _name(dtype), block=block)


def weight_grad_class(rows: int, count: int, x: torch.dtype, block: int) -> ShapeClass:
    """Of block_weight_grad; n is the class of the number of blocks."""
    sizes = rows_class(rows), nearest_class(count)
    return ShapeClass("block_weight_grad", *sizes, dtype=_name(x), block=block)


def scores_class(rows: int, n: int, k: int, x: torch.dtype, block: int) -> ShapeClass:
    sizes = rows_class(rows), nearest_class(n), nearest_class(k)
    return ShapeClass("block_scores", *sizes, dtype=_name(x), block=block)


def updates_class(rule: str, kind: str, dtype: torch.dtype, block: int) -> ShapeClass:
    """Of masked_adamw_* and masked_sgd_*."""
    return ShapeClass(f"masked_{rule}_{kind}", dtype=_name(dtype), block=block)


# --- candidates -----------------------------------------------------------------------------------


def candidates(shape: ShapeClass, capability: int) -> list[Config]:
    """Every configuration that the tuner times for a class; the one chosen by hand comes first, and
    is alone where nothing else has been compiled ahead of time."""
    own = _own(shape, capability)
    return own + [c for c in _others(shape, own[0]) if c not in own]


def _own(shape: ShapeClass, capability: int) -> list[Config]:
    if shape.op in ("int4_linear", "int4_linear_dx"):
        pick = int4_dx if shape.op.endswith("dx") else int4_forward
        group = shape.group if shape.group > 0 else 1 << 30
        x = getattr(torch, shape.dtype)
        return [{**pick(capability, shape.rows, x, group, False), "TARGET": TARGET}]
    wide = shape.dtype != "bfloat16"
    if shape.op in ("block_sparse_linear", "block_sparse_linear_dx"):
        return [blocks(shape.rows, shape.block, wide)]
    if shape.op == "block_weight_grad":
        return [{**weight_grad(shape.block, wide), "TARGET": TARGET}]
    if shape.op == "block_scores":
        return [scores(shape.block, shape.block, wide)]
    return [updates()]


def _others(shape: ShapeClass, own: Config) -> list[Config]:
    if shape.dtype != "bfloat16" and not shape.op.startswith("masked_"):
        return []

    def like(**changes: int) -> Config:
        return {**own, **changes}

    if shape.op == "int4_linear":
        if (shape.group, shape.bits) != (128, 4):
            return [like(TARGET=132), like(TARGET=528)] if shape.rows <= FEW_ROWS else []
        if shape.rows == 32:
            return [like(TARGET=132), like(TARGET=528)]
        if shape.rows <= FEW_ROWS:
            # BN=32 takes no wgmma, and spills with 16 rows.
            narrow = [like(BN=32), like(BN=32, TARGET=528)] if shape.rows > 32 else []
            return [
                like(TARGET=132), like(TARGET=528), like(num_stages=3),
                like(BK=64, num_stages=6), *narrow,
            ]  # fmt: skip
        if shape.rows < 512:
            return [like(num_stages=3), like(BM=64)]
        return [like(BM=128, num_stages=4), like(BM=128, num_stages=3)]
    if shape.op == "int4_linear_dx":
        if (shape.group, shape.bits) != (128, 4):
            return [like(TARGET=132), like(TARGET=528)] if shape.rows <= FEW_ROWS else []
        if shape.rows <= FEW_ROWS:
            more = [] if shape.rows == 32 else [like(num_stages=4)]
            return [like(TARGET=132), like(TARGET=528), *more]
        return [like(num_stages=3), like(BM=64)]
    if shape.op in ("block_sparse_linear", "block_sparse_linear_dx") and shape.block > 16:
        if shape.rows <= 16:
            return [like(num_stages=6)]
        return [] if shape.rows <= 64 else [like(BM=64, num_warps=4)]
    if shape.op == "block_weight_grad" and shape.block > 16:
        return [
            like(TARGET=132), like(TARGET=528), like(num_stages=3), like(BM=128, num_stages=3)
        ]  # fmt: skip
    if shape.op == "block_scores":
        return [like(num_stages=3)]
    if shape.op.startswith("masked_"):
        return [like(num_warps=8), like(num_warps=2)]
    return []
