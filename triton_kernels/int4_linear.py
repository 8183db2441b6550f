"""int4 linear layers on NVIDIA GPUs: wrappers, the rows that choose a kernel, their configurations.

    int4_linear.cuda.triton.few              few rows: the sum over k split, parts added in order
    int4_linear.cuda.triton.tile             a tile of dequantised weights for many rows
    int4_linear.cuda.triton.dequantize       many bfloat16 rows: dequantised once, then cuBLAS

and the same for dx. Configurations come from `_configs` and `_tuned`, by shape class: nothing is
tuned in a user's first step. Formulas, shapes and errors: python/nibblock/ops/int4_linear.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
import triton.language as tl
from nibblock.triton_kernels import _common, _configs, _int4_kernels, _table, _tuned
from nibblock.triton_kernels._common import OnDevice, cdiv, launch, next_power_of_2, rows_of
from nibblock.triton_kernels._table import FEW_ROWS

WHOLE_ROW = 1 << 30  # the group size that makes every k // group zero


@dataclass(frozen=True)
class Format:
    """A packed weight's format and where its parts lie; int4_geometry of the C header."""

    n: int
    k: int
    group_size: int
    bits: int
    affine: bool
    scale_dtype: torch.dtype
    palette: bool = False  # 8-bit codes stand in 4 as places in a table

    @classmethod
    def of(cls, packed: torch.Tensor, *form: Any) -> Format:
        """Of a packed weight, whose size says whether it has a palette."""
        plain = cls(*form)
        if plain.bits == 4 or packed.numel() == plain.n_pad // 16 * plain.places()[0] * 4:
            return plain
        return replace(plain, palette=True)

    @property
    def group(self) -> int:
        return self.group_size if self.group_size > 0 else WHOLE_ROW

    @property
    def n_pad(self) -> int:
        return cdiv(self.n, 16) * 16

    def places(self) -> tuple[int, int, int, int]:
        """(panel stride in words, stride, scales, offsets in elements of scale_dtype)."""
        size = self.scale_dtype.itemsize
        groups = cdiv(self.k, self.group_size) if self.group_size > 0 else min(self.k, 1)
        codes = cdiv(self.k, 64) * 64 * 16 * (4 if self.palette else self.bits) // 8
        units = self.k // 256 * 32 if self.scale_dtype == torch.int8 else 0
        section = cdiv(groups * 16 * size + units, 64) * 64
        lines = (codes + section * (2 if self.affine else 1)) // 64
        stride = ((lines | 1) + 2 * self.palette) * 64
        return stride // 4, stride // size, codes // size, (codes + section) // size

    def constants(self) -> dict[str, Any]:
        bits = _int4_kernels.PALETTE.value if self.palette else self.bits
        return {"GROUP": self.group, "BITS": bits, "AFFINE": self.affine}


@dataclass(frozen=True)
class Adapter:
    """Blocks and low-rank pair that ride on an int4 product; either may be absent."""

    values: Optional[torch.Tensor]
    layout: Optional[torch.Tensor]
    block: int
    a: Optional[torch.Tensor]
    c: Optional[torch.Tensor]


def arithmetic(x: torch.dtype, dx: bool) -> tuple[tl.dtype, str, bool]:
    """(operand type, precision, whether group sums are scaled instead of weights may be)."""
    if x == torch.bfloat16:
        return tl.bfloat16, "tf32", False
    if x == torch.float16:
        # A float32 scale may put a weight outside float16. Forward, codes stay exact and sums are
        # scaled; for dx scales change along the sum, and tf32 has float32's range.
        return (tl.float32, "tf32", False) if dx else (tl.float16, "tf32", True)
    return tl.float32, "tf32x3", False


def _parts(packed: torch.Tensor, f: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed bytes as words and as scales; kernels ask for 16 aligned bytes, no more."""
    if packed.data_ptr() % 16:
        packed = packed.clone()
    return packed.view(torch.int32), packed.view(f.scale_dtype)


def dequantize(
    packed: torch.Tensor, f: Format, dtype: torch.dtype, rows: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """w, or the rows of it that `rows` [count] int64 | int32 names; [count, K] dtype.

    Out-of-range rows come out as NaN: a GPU cannot raise in the middle of a stream.
    """
    count = f.n if rows is None else rows.numel()
    out = packed.new_empty((count, f.k), dtype=dtype)
    if not out.numel():
        return out
    words, scales = _parts(packed, f)
    bn, bk = (64, 64) if rows is None else (4, 128)
    grid = (cdiv(count, bn), cdiv(f.k, bk))
    with OnDevice(packed):
        launch(
            _int4_kernels.dequantize_kernel, grid,
            words, scales, rows, out, count, f.n, f.k, f.n_pad, *f.places(), **f.constants(),
            GATHER=rows is not None, EVEN=f.k % bk == 0 or bk == 64, BN=bn, BK=bk,
            num_warps=4, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return out


class _Ride:
    """An adapter's launch arguments in one direction, its first low-rank product made ready."""

    def __init__(self, x: torch.Tensor, adapter: Optional[Adapter], n: int, k: int, dx: bool):
        self.values = self.ptr = self.other = self.order = self.t = self.factor = None
        self.blocks = self.rank = self.parts = self.strides = 0
        self.constants: dict[str, Any] = dict(
            B=0, BR=0, VDOT=tl.float32, VPRECISION="tf32", RP=0, RPRECISION="tf32"
        )
        self.value_strides = (0, 0)
        self.factor_strides = (0, 0)
        if adapter is None:
            return
        if adapter.values is not None and adapter.values.shape[0]:
            self._take_blocks(x, adapter, n, k, dx)
        if adapter.a is not None and adapter.a.shape[0]:
            self._take_low_rank(x, adapter, n, k, dx)

    def _take_blocks(self, x, adapter, n, k, dx):
        b, count = adapter.block, adapter.values.shape[0]
        rows, columns = cdiv(n, b), cdiv(k, b)
        sizes = (rows + 1, count, columns + 1, count, count)
        row_ptr, col, col_ptr, col_row, col_block = adapter.layout.split(sizes)
        self.values = adapter.values.contiguous()
        self.ptr, self.other = (col_ptr, col_row) if dx else (row_ptr, col)
        self.order = col_block
        self.blocks = columns if dx else rows
        self.value_strides = (1, b) if dx else (b, 1)
        dot, precision = _common.operands(x.dtype, self.values.dtype)
        # Steps of 32: the walk shares its registers with the int4 tile's accumulator.
        self.constants.update(B=b, BR=min(b, 32), VDOT=dot, VPRECISION=precision)

    def _take_low_rank(self, x, adapter, n, k, dx):
        a, c = adapter.a.contiguous(), adapter.c.contiguous()
        self.rank = a.shape[0]
        padded = max(16, next_power_of_2(self.rank))
        first, self.factor = (c, a) if dx else (a, c)
        strides = (1, self.rank) if dx else (k, 1)
        self.factor_strides = (1, k) if dx else (self.rank, 1)
        inner, rows = x.shape[1], x.shape[0]
        dot, precision = _common.operands(x.dtype, first.dtype)
        bm, bi = 16 if rows <= 16 else 32, 32
        self.parts = _common.splits(cdiv(rows, bm), cdiv(inner, bi))
        part = cdiv(cdiv(inner, bi), self.parts) * bi
        self.t = x.new_empty((self.parts, rows, padded), dtype=torch.float32)
        launch(
            _int4_kernels.low_rank_down_kernel, (cdiv(rows, bm), self.parts),
            x, first, self.t, rows, inner, self.rank, x.stride(0), *strides, part,
            DOT=dot, PRECISION=precision, BM=bm, BI=bi, RP=padded, num_warps=4, num_stages=2,
        )  # fmt: skip
        self.constants.update(RP=padded, RPRECISION="tf32x3")


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: Optional[torch.Tensor],
    f: Format,
    adapter: Optional[Adapter] = None,
    dx: bool = False,
) -> torch.Tensor:
    """y = x w^T + bias, or dx = x w for the rows x of a gradient; an adapter rides along.

    Args:
        x: [..., K], or [..., N] for dx; float32 | bfloat16 | float16, any strides.
        packed: the packed weight. bias: [N] or None (None for dx).
        f: its format. adapter: blocks and low-rank pair, or None.
    Returns:
        [..., N], or [..., K] for dx, of x's dtype.
    """
    outputs = f.k if dx else f.n
    shape = (*x.shape[:-1], outputs)
    rows = rows_of(x)
    m = shape_rows(x.shape)
    out = x.new_empty((m, outputs))
    if not out.numel():
        return out.view(shape)
    if not x.shape[-1]:  # an empty sum: bias alone
        out.zero_()
        return (out if bias is None else out + bias.to(out.dtype)).view(shape)
    with OnDevice(x):
        op = f"int4{'' if adapter is None else '_block_sparse'}_linear{'_dx' if dx else ''}"
        kind = _table.select(op, m, x.dtype).kind
        if kind == "dequantize":
            w = dequantize(packed, f, x.dtype)
            if dx:
                torch.mm(rows, w, out=out)
            elif bias is None:
                torch.mm(rows, w.t(), out=out)
            else:
                torch.addmm(bias.to(x.dtype), rows, w.t(), out=out)
        else:
            _launch(rows, packed, bias, f, adapter, dx, out)
    return out.view(shape)


def shape_rows(shape: torch.Size) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


def _config(
    x: torch.Tensor, m: int, f: Format, adapter: bool, dx: bool
) -> tuple[dict[str, Any], int]:
    """(constants and options of the kernel, programs that a split sum is cut for)."""
    pick = _configs.int4_dx if dx else _configs.int4_forward
    own = pick(_common.capability(x), m, x.dtype, f.group, adapter)
    if adapter:  # whose kernels hold more registers: only compiled as chosen by hand
        return own, _configs.TARGET
    op = "int4_linear_dx" if dx else "int4_linear"
    shape = _configs.int4_class(op, m, f.n, f.k, x.dtype, f.group_size, f.bits)
    config = dict(_tuned.choose(_common.gpu(x), shape, own))
    return config, config.pop("TARGET", _configs.TARGET)


def _launch(x, packed, bias, f: Format, adapter, dx, out) -> None:
    words, scales = _parts(packed, f)
    m = x.shape[0]
    dot, precision, _ = arithmetic(x.dtype, dx)
    config, target = _config(x, m, f, adapter is not None, dx)
    bn, bm, bk = config["BN"], config["BM"], config["BK"]
    outputs, inner = (f.k, f.n) if dx else (f.n, f.k)
    step, tile = (bn, bk) if dx else (bk, bn)
    ride = _Ride(x, adapter, f.n, f.k, dx)
    steps = cdiv(inner, step)
    tiles = cdiv(outputs, tile) * cdiv(m, bm)
    parts = _common.splits(tiles, steps, target) if m <= FEW_ROWS else 1
    part = cdiv(steps, parts) * step
    parts = cdiv(inner, part)
    partial = parts > 1
    sums = x.new_empty((parts, m, outputs), dtype=torch.float32) if partial else out
    in_kernel = _Ride(x, None, f.n, f.k, dx) if partial else ride
    common = dict(
        config, **f.constants(), DOT=dot, PRECISION=precision, PARTIAL=partial,
        EVEN=f.k % bk == 0, **in_kernel.constants,
    )  # fmt: skip
    grid = (cdiv(outputs, tile), parts, cdiv(m, bm))
    sizes = (m, f.n, f.k, f.n_pad, x.stride(0), *f.places(), part)
    r = in_kernel
    if dx:
        launch(
            _int4_kernels.int4_dx_kernel, grid,
            x, words, scales, sums, r.values, r.ptr, r.other, r.order, r.t, r.factor,
            *sizes, r.blocks, r.rank, r.parts, **common,
        )  # fmt: skip
    else:
        launch(
            _int4_kernels.int4_forward_kernel, grid,
            x, words, scales, None if partial else bias, sums, r.values, r.ptr, r.other, r.t,
            r.factor, *sizes, r.blocks, r.rank, r.parts,
            HAS_BIAS=bias is not None and not partial, **common,
        )  # fmt: skip
    if partial:
        bo, bm = finish_tile(ride.constants["B"], m)
        launch(
            _int4_kernels.int4_finish_kernel, (cdiv(outputs, bo), cdiv(m, bm)),
            sums, x, words, scales, bias, out, ride.values, ride.ptr, ride.other, ride.order,
            ride.t, ride.factor, m, outputs, inner, f.n_pad, x.stride(0), *f.places(), parts,
            ride.blocks, *ride.value_strides, ride.rank, *ride.factor_strides, ride.parts,
            **f.constants(), REPAIR=config.get("SCALE_SUMS", False), HAS_BIAS=bias is not None,
            BY_COLUMN=dx, **ride.constants, BO=bo, BM=bm, num_warps=4, num_stages=2,
        )  # fmt: skip


def finish_tile(block: int, rows: int) -> tuple[int, int]:
    """Outputs and tokens of a program of the finishing kernel: small, there is one for each tile
    of the result and the parts have to be read at once."""
    return (32 if not block else max(16, min(block, 32))), 16
