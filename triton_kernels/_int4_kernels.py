"""The int4 kernels themselves; wrappers and configurations are in int4_linear.py.

The packed layout is the CPU's, drawn in csrc/int4_linear/int4_linear.h, so a weight moves between
devices as plain bytes and exists once. It suits a GPU as it is: a panel's codes are one run of
memory, 16 rows x 8 k a 64-byte line, so a tile of 16 rows x 64 k is 512 consecutive bytes, one
128-bit load for each lane of a warp. In a 32-bit word the even k stand in the low half and the odd
ones in the high half: one shift, one mask and one OR make a pair of bfloat16 (128 + code) or
float16 (1024 + code) in the order of k. The magic number is subtracted first, which is exact, and
only then comes the scale: folded into one constant, its rounding would cost up to half a step.

The trick of code bits in the mantissa: FasterTransformer's int4 kernels and the Marlin paper
(arXiv 2408.11743) describe it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from nibblock.triton_kernels._common import EMULATE, jit, product, rounded

PALETTE = tl.constexpr(84)  # BITS of 8-bit codes in 4, places in the palette of their panel


@triton.jit
def _pair(bits, DOT: tl.constexpr, BITS: tl.constexpr, CENTRED: tl.constexpr):
    """Codes [.., 2] of 32-bit words that hold one in each half: as stored, or CENTRED about 0."""
    HALF: tl.constexpr = 8 if BITS == 4 else 128
    ZERO: tl.constexpr = HALF if CENTRED else 0
    if DOT == tl.float16:
        magic = bits | 0x64006400
        low = (magic & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        high = (magic >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        codes = tl.join(low, high) - (1024 + ZERO)
    elif DOT == tl.bfloat16 and BITS == 4 and not EMULATE:
        magic = bits | 0x43004300
        low = (magic & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (magic >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        codes = tl.join(low, high) - tl.full((), 128 + ZERO, tl.bfloat16)
    else:
        low = ((bits & 0xFFFF) | 0x4B000000).to(tl.float32, bitcast=True)
        high = ((bits >> 16) | 0x4B000000).to(tl.float32, bitcast=True)
        codes = (tl.join(low, high) - (8388608 + ZERO)).to(DOT)
    return codes


@triton.jit
def _one_of_palette(place, t0, t1, t2, t3):
    """Bytes of a table of 16 that stand in four words; place 0..15."""
    high = place >= 8
    even, odd = tl.where(high, t2, t0), tl.where(high, t3, t1)
    word = tl.where((place & 4) != 0, odd, even)
    return ((word >> ((place & 3) * 8)) & 0xFF).to(tl.float32)


@triton.jit
def _pair_of_palette(bits, t0, t1, t2, t3, DOT: tl.constexpr, CENTRED: tl.constexpr):
    """As `_pair`, of places in a palette."""
    low = _one_of_palette(bits & 15, t0, t1, t2, t3)
    high = _one_of_palette((bits >> 16) & 15, t0, t1, t2, t3)
    return (tl.join(low, high) - (128 if CENTRED else 0)).to(DOT)


@triton.jit
def load_codes(
    words, n, line, lines, n_pad, stride, DOT: tl.constexpr, BITS: tl.constexpr,
    CENTRED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Codes [BN, 8 L] of rows n [BN] and lines [L] (8 k each), as DOT.

    words is the packed weight as int32, stride a panel's size in words.
    """
    at = (n // 16)[:, None] * stride + (n % 16)[:, None]
    here = (n < n_pad)[:, None]
    if not EVEN:  # the last tile may reach beyond the panel's codes
        here = here & (line < lines)[None, :]
    if BITS == 4:
        w = tl.load(words + at + line[None, :] * 16, mask=here, other=0)
        p0 = _pair(w & 0x000F000F, DOT, BITS, CENTRED)
        p1 = _pair((w >> 4) & 0x000F000F, DOT, BITS, CENTRED)
        p2 = _pair((w >> 8) & 0x000F000F, DOT, BITS, CENTRED)
        p3 = _pair((w >> 12) & 0x000F000F, DOT, BITS, CENTRED)
    elif BITS == PALETTE:
        w = tl.load(words + at + line[None, :] * 16, mask=here, other=0)
        table = words + (n // 16)[:, None] * stride + stride - 16  # the panel's last line
        some = (n < n_pad)[:, None]
        t0 = tl.load(table, mask=some, other=0)
        t1 = tl.load(table + 1, mask=some, other=0)
        t2 = tl.load(table + 2, mask=some, other=0)
        t3 = tl.load(table + 3, mask=some, other=0)
        p0 = _pair_of_palette(w, t0, t1, t2, t3, DOT, CENTRED)
        p1 = _pair_of_palette(w >> 4, t0, t1, t2, t3, DOT, CENTRED)
        p2 = _pair_of_palette(w >> 8, t0, t1, t2, t3, DOT, CENTRED)
        p3 = _pair_of_palette(w >> 12, t0, t1, t2, t3, DOT, CENTRED)
    else:
        a = tl.load(words + at + line[None, :] * 32, mask=here, other=0)
        b = tl.load(words + at + line[None, :] * 32 + 16, mask=here, other=0)
        p0 = _pair(a & 0x00FF00FF, DOT, BITS, CENTRED)
        p1 = _pair(b & 0x00FF00FF, DOT, BITS, CENTRED)
        p2 = _pair((a >> 8) & 0x00FF00FF, DOT, BITS, CENTRED)
        p3 = _pair((b >> 8) & 0x00FF00FF, DOT, BITS, CENTRED)
    eight = tl.join(tl.join(p0, p1), tl.join(p2, p3))  # [BN, L, odd, p & 1, p >> 1]
    eight = tl.permute(eight, (0, 1, 4, 3, 2))
    return tl.reshape(eight, (n.shape[0], line.shape[0] * 8))


@triton.jit
def load_section(scales, n, g, here, stride, section, groups, GROUP: tl.constexpr):
    """What stands in the panels' section `section`, scales or offsets, for rows n and groups g of
    `groups`, broadcast against each other: float32; zero where `here` says that there are none."""
    panel = n // 16
    if scales.dtype.element_ty == tl.int8:  # a stride of bytes: more than 31 bits hold
        panel = panel.to(tl.int64)
    first = scales + section + panel * stride
    value = tl.load(first + (n % 16) + g * 16, mask=here, other=0).to(tl.float32)
    if scales.dtype.element_ty == tl.int8:  # times the float16 of its 256 columns
        run = g // (256 // GROUP)
        unit = first + groups * 16 + run * 32 + (n % 16) * 2
        unit = unit.to(tl.pointer_type(tl.float16))
        value = value * tl.load(unit, mask=here, other=0.0).to(tl.float32)
    return value


@triton.jit
def load_scales(
    scales, n, g, here, stride, scales_at, offsets_at, groups, GROUP: tl.constexpr,
    AFFINE: tl.constexpr, BITS: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Scales and offsets (CENTRED: of centred codes), as `load_section`."""
    scale = load_section(scales, n, g, here, stride, scales_at, groups, GROUP)
    if AFFINE:
        offset = load_section(scales, n, g, here, stride, offsets_at, groups, GROUP)
        if CENTRED:
            offset = offset + scale * (8 if BITS == 4 else 128)
    else:
        offset = tl.zeros_like(scale)
    return scale, offset


@triton.jit
def load_weights(
    words, scales, n, k0, K, n_pad, stride, sstride, scales_at, offsets_at,
    GROUP: tl.constexpr, BITS: tl.constexpr, AFFINE: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The dequantised tile [BN, BK] of rows n [BN] from column k0 on, float32.

    An affine weight is scale * code + offset with the code as stored: centred, an infinite or
    enormous scale would make NaN of weights that are infinite or finite. Columns from K on, which
    may stand in a group with such a scale, are zero (EVEN: there are none in any tile).
    """
    PARTS: tl.constexpr = BK // GROUP if BK > GROUP else 1
    line = k0 // 8 + tl.arange(0, BK // 8)
    lines = (K + 63) // 64 * 8
    code = load_codes(words, n, line, lines, n_pad, stride, tl.float32, BITS, not AFFINE, EVEN)
    g = k0 // GROUP + tl.arange(0, PARTS)
    groups = (K + GROUP - 1) // GROUP
    scale, offset = load_scales(
        scales, n[:, None], g[None, :], (n < n_pad)[:, None] & (g < groups)[None, :], sstride,
        scales_at, offsets_at, groups, GROUP, AFFINE, BITS, False,
    )  # fmt: skip
    if PARTS == 1:
        w = code * scale
        if AFFINE:
            w = w + offset
    else:
        code = tl.reshape(code, (n.shape[0], PARTS, BK // PARTS))
        w = code * scale[:, :, None]
        if AFFINE:
            w = w + offset[:, :, None]
        w = tl.reshape(w, (n.shape[0], BK))
    if not EVEN:
        w = tl.where((k0 + tl.arange(0, BK) < K)[None, :], w, 0.0)
    return w


@triton.jit
def load_tokens(x, m, M, r, R, sx):
    """The transposed tile [r, m] of x [M, R], zero outside."""
    at = m.to(tl.int64)[None, :] * sx + r[:, None]
    return tl.load(x + at, mask=(m < M)[None, :] & (r < R)[:, None], other=0.0)


@triton.jit
def int4_tile(
    acc, x, words, scales, n, m, k_begin, k_end, M, K, n_pad, sx, stride, sstride, scales_at,
    offsets_at, GROUP: tl.constexpr, BITS: tl.constexpr, AFFINE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, SCALE_SUMS: tl.constexpr, EVEN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] + w[n, k] x[m, k] over k_begin <= k < k_end.

    SCALE_SUMS multiplies the exact codes and scales each group's sum in float32: the cheaper way
    for few tokens, and the one that keeps float16 activations clear of weights beyond float16.
    Otherwise every weight is scaled in float32 and rounded to DOT once.
    """
    lines = (K + 63) // 64 * 8
    for k0 in range(k_begin, k_end, BK):
        xt = load_tokens(x, m, M, k0 + tl.arange(0, BK), K, sx)
        if SCALE_SUMS:
            line = k0 // 8 + tl.arange(0, BK // 8)
            code = load_codes(words, n, line, lines, n_pad, stride, DOT, BITS, True, EVEN)
            scale, offset = load_scales(
                scales, n, k0 // GROUP, n < n_pad, sstride, scales_at, offsets_at,
                (K + GROUP - 1) // GROUP, GROUP, AFFINE, BITS, True,
            )  # fmt: skip
            part = product(code, xt.to(DOT), tl.zeros_like(acc), PRECISION)
            acc += scale[:, None] * part
            if AFFINE:
                acc += offset[:, None] * tl.sum(xt.to(tl.float32), 0)[None, :]
        else:
            w = load_weights(
                words, scales, n, k0, K, n_pad, stride, sstride, scales_at, offsets_at,
                GROUP, BITS, AFFINE, BK, EVEN,
            )  # fmt: skip
            acc = product(rounded(w, DOT), xt.to(DOT), acc, PRECISION)
    return acc


@triton.jit
def repaired(
    acc, x, words, scales, n, m, M, K, n_pad, sx, stride, sstride, scales_at, offsets_at,
    GROUP: tl.constexpr, BITS: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """acc, computed anew with scaled weights if it is not finite.

    Scaled sums meet an infinity with codes of zero, or with two terms of opposite sign, where a
    dense layer meets it with a weight: NaN instead of infinity. Rare, so correctness over speed.
    """
    bad = tl.where(tl.abs(acc) < float("inf"), 0, 1)
    if tl.max(tl.max(bad, 1), 0) > 0:
        exact = tl.zeros_like(acc)
        for k0 in range(0, K, 16):
            w = load_weights(
                words, scales, n, k0, K, n_pad, stride, sstride, scales_at, offsets_at,
                GROUP, BITS, AFFINE, 16, False,
            )  # fmt: skip
            # Not through tensor cores: their padding of k would be 0 * infinity too.
            xt = load_tokens(x, m, M, k0 + tl.arange(0, 16), K, sx).to(tl.float32)
            exact = tl.dot(w, xt, exact, input_precision="ieee")
        acc = exact
    return acc


@triton.jit
def low_rank_tile(
    acc, t, factor, o, m, O, M, R, so, sr, PARTS, RP: tl.constexpr, PRECISION: tl.constexpr
):
    """acc [BO, BM] + factor[o, r] t[m, r]; t [PARTS, M, RP] float32 is summed over its parts."""
    r = tl.arange(0, RP)
    at = m.to(tl.int64)[None, :] * RP + r[:, None]
    here = (m < M)[None, :] & (r < R)[:, None]
    total = tl.zeros((RP, m.shape[0]), tl.float32)
    for part in range(0, PARTS):
        total += tl.load(t + tl.cast(part, tl.int64) * M * RP + at, mask=here, other=0.0)
    f = tl.load(
        factor + o[:, None] * so + r[None, :] * sr,
        mask=(o < O)[:, None] & (r < R)[None, :],
        other=0.0,
    ).to(tl.float32)
    return product(f, total, acc, PRECISION)


@triton.jit
def _operand(v, DOT: tl.constexpr):
    """A stored value as a product's operand: only float32 values meeting bfloat16 are rounded."""
    if v.dtype == tl.float32:
        v = rounded(v, DOT)
    return v.to(DOT)


@triton.jit
def block_tile(
    acc, x, values, ptr, other, order, o0, o, m, O, R, M, sx, O_BLOCKS, VO, VR,
    B: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """acc [BO, BM] + sum over stored blocks of the tile's outputs o of values x.

    One walk serves both directions: forward, outputs are n, the sum runs over k and (VO, VR) =
    (B, 1); dx, outputs are k, the sum runs over n, (VO, VR) = (1, B) and `order` names the block.
    """
    SPAN: tl.constexpr = BO // B if BO > B else 1
    for i in range(0, SPAN):
        row = o0 // B + i
        first = tl.load(ptr + row, mask=row < O_BLOCKS, other=0)
        last = tl.load(ptr + row + 1, mask=row < O_BLOCKS, other=0)
        mine = (o // B == row) & (o < O)
        part = tl.zeros_like(acc)
        for step in range(first * (B // BR), last * (B // BR)):
            z = step // (B // BR)
            inner = (step % (B // BR)) * BR + tl.arange(0, BR)
            r = tl.load(other + z) * B + inner
            if BY_COLUMN:
                z = tl.load(order + z)
            at = (o - row * B)[:, None] * VO + inner[None, :] * VR
            block = values + tl.cast(z, tl.int64) * (B * B)
            v = tl.load(block + at, mask=mine[:, None] & (r < R)[None, :], other=0.0)
            xt = load_tokens(x, m, M, r, R, sx)
            part = product(_operand(v, DOT), xt.to(DOT), part, PRECISION)
        acc += tl.where(mine[:, None], part, 0.0)
    return acc


@triton.jit
def store_tile(out, acc, o, m, O, M):
    at = m.to(tl.int64)[None, :] * O + o[:, None]
    tl.store(out + at, rounded(acc, out.dtype.element_ty), mask=(o < O)[:, None] & (m < M)[None, :])


@jit
def int4_forward_kernel(
    x, words, scales, bias, out, values, ptr, other, t, factor,
    M, N, K, n_pad, sx, stride, sstride, scales_at, offsets_at, part_k, N_BLOCKS, R, PARTS,
    GROUP: tl.constexpr, BITS: tl.constexpr, AFFINE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, SCALE_SUMS: tl.constexpr, EVEN: tl.constexpr, PARTIAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, B: tl.constexpr, BR: tl.constexpr, VDOT: tl.constexpr,
    VPRECISION: tl.constexpr, RP: tl.constexpr, RPRECISION: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile [BN, BM] of y, or of part `program_id(1)` of its sum (PARTIAL: float32, for finish).

    Programs of one stripe of tokens run together: x stays in L2 while the weights stream past once.
    B and RP are 0 without blocks and without a low-rank pair.
    """
    n0 = tl.program_id(0) * BN
    n = n0 + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    begin = tl.program_id(1) * part_k
    acc = int4_tile(
        tl.zeros((BN, BM), tl.float32), x, words, scales, n, m, begin,
        tl.minimum(begin + part_k, K), M, K, n_pad, sx, stride, sstride, scales_at, offsets_at,
        GROUP, BITS, AFFINE, DOT, PRECISION, SCALE_SUMS, EVEN, BK,
    )  # fmt: skip
    if PARTIAL:
        out += tl.program_id(1).to(tl.int64) * M * N
    else:
        if SCALE_SUMS:
            acc = repaired(
                acc, x, words, scales, n, m, M, K, n_pad, sx, stride, sstride, scales_at,
                offsets_at, GROUP, BITS, AFFINE,
            )  # fmt: skip
        if B:
            acc = block_tile(
                acc, x, values, ptr, other, other, n0, n, m, N, K, M, sx, N_BLOCKS, B, 1,
                B, BN, BR, VDOT, VPRECISION, False,
            )  # fmt: skip
        if RP:
            acc = low_rank_tile(acc, t, factor, n, m, N, M, R, R, 1, PARTS, RP, RPRECISION)
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    store_tile(out, acc, n, m, N, M)


@jit
def int4_dx_kernel(
    grad, words, scales, out, values, ptr, other, order, t, factor,
    M, N, K, n_pad, sg, stride, sstride, scales_at, offsets_at, part_n, K_BLOCKS, R, PARTS,
    GROUP: tl.constexpr, BITS: tl.constexpr, AFFINE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, PARTIAL: tl.constexpr, B: tl.constexpr,
    BR: tl.constexpr, VDOT: tl.constexpr, VPRECISION: tl.constexpr, RP: tl.constexpr,
    RPRECISION: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile [BK, BM] of dx = grad w, from the same packed weight: the tile is dequantised as it
    lies and multiplied transposed. Scales change along the sum, so every weight is scaled.
    """
    k0 = tl.program_id(0) * BK
    k = k0 + tl.arange(0, BK)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    begin = tl.program_id(1) * part_n
    acc = tl.zeros((BK, BM), tl.float32)
    for n0 in range(begin, tl.minimum(begin + part_n, N), BN):
        n = n0 + tl.arange(0, BN)
        gt = load_tokens(grad, m, M, n, N, sg)
        w = load_weights(
            words, scales, n, k0, K, n_pad, stride, sstride, scales_at, offsets_at,
            GROUP, BITS, AFFINE, BK, EVEN,
        )  # fmt: skip
        acc = product(tl.trans(rounded(w, DOT)), gt.to(DOT), acc, PRECISION)
    if PARTIAL:
        out += tl.program_id(1).to(tl.int64) * M * K
    else:
        if B:
            acc = block_tile(
                acc, grad, values, ptr, other, order, k0, k, m, K, N, M, sg, K_BLOCKS, 1, B,
                B, BK, BR, VDOT, VPRECISION, True,
            )  # fmt: skip
        if RP:
            acc = low_rank_tile(acc, t, factor, k, m, K, M, R, 1, K, PARTS, RP, RPRECISION)
    store_tile(out, acc, k, m, K, M)


@jit
def int4_finish_kernel(
    partial, x, words, scales, bias, out, values, ptr, other, order, t, factor,
    M, O, I, n_pad, sx, stride, sstride, scales_at, offsets_at, SPLITS, O_BLOCKS, VO, VR,
    R, so, sr, PARTS, GROUP: tl.constexpr, BITS: tl.constexpr, AFFINE: tl.constexpr,
    REPAIR: tl.constexpr, HAS_BIAS: tl.constexpr, BY_COLUMN: tl.constexpr, B: tl.constexpr,
    BR: tl.constexpr, VDOT: tl.constexpr, VPRECISION: tl.constexpr, RP: tl.constexpr,
    RPRECISION: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Adds the parts of a split sum in order, then adapter and bias, and rounds once.

    O outputs and I inputs: N and K forward, K and N for dx.
    """
    o0 = tl.program_id(0) * BO
    o = o0 + tl.arange(0, BO)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    at = m.to(tl.int64)[None, :] * O + o[:, None]
    here = (o < O)[:, None] & (m < M)[None, :]
    acc = tl.zeros((BO, BM), tl.float32)
    for part in range(0, SPLITS):
        acc += tl.load(partial + tl.cast(part, tl.int64) * M * O + at, mask=here, other=0.0)
    if REPAIR:
        acc = repaired(
            acc, x, words, scales, o, m, M, I, n_pad, sx, stride, sstride, scales_at, offsets_at,
            GROUP, BITS, AFFINE,
        )  # fmt: skip
    if B:
        acc = block_tile(
            acc, x, values, ptr, other, order, o0, o, m, O, I, M, sx, O_BLOCKS, VO, VR,
            B, BO, BR, VDOT, VPRECISION, BY_COLUMN,
        )  # fmt: skip
    if RP:
        acc = low_rank_tile(acc, t, factor, o, m, O, M, R, so, sr, PARTS, RP, RPRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
    store_tile(out, acc, o, m, O, M)


@jit
def low_rank_down_kernel(
    x, factor, t, M, I, R, sx, sr, si, part_i, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BI: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Part `program_id(1)` of t[m, r] = sum_i x[m, i] factor[r, i], float32 [parts, M, RP]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.arange(0, RP)
    begin = tl.program_id(1) * part_i
    acc = tl.zeros((RP, BM), tl.float32)
    for i0 in range(begin, tl.minimum(begin + part_i, I), BI):
        i = i0 + tl.arange(0, BI)
        f = tl.load(
            factor + r[:, None] * sr + i.to(tl.int64)[None, :] * si,
            mask=(r < R)[:, None] & (i < I)[None, :],
            other=0.0,
        )
        acc = product(_operand(f, DOT), load_tokens(x, m, M, i, I, sx).to(DOT), acc, PRECISION)
    at = tl.program_id(1).to(tl.int64) * M * RP + m.to(tl.int64)[None, :] * RP + r[:, None]
    tl.store(t + at, acc, mask=(m < M)[None, :])


@jit
def dequantize_kernel(
    words, scales, rows, out, COUNT, N, K, n_pad, stride, sstride, scales_at, offsets_at,
    GROUP: tl.constexpr, BITS: tl.constexpr, AFFINE: tl.constexpr, GATHER: tl.constexpr,
    EVEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[i, k] = w[rows[i] or i, k], rounded to out's type; the same value as on the CPU.

    An affine weight is scale * code + offset with the code as stored, rounded twice, because that
    is where the CPU rounds; launched without contraction (enable_fp_fusion=False).
    """
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    k0 = tl.program_id(1) * BK
    if GATHER:
        n = tl.load(rows + i, mask=i < COUNT, other=0)
        # A device cannot raise: an index out of range gives NaN, and reads nothing.
        known = (n >= 0) & (n < N)
        n = tl.where(known, n, 0).to(tl.int32)
    else:
        n = i
    line = k0 // 8 + tl.arange(0, BK // 8)
    lines = (K + 63) // 64 * 8
    code = load_codes(words, n, line, lines, n_pad, stride, tl.float32, BITS, not AFFINE, EVEN)
    PARTS: tl.constexpr = BK // GROUP if BK > GROUP else 1
    g = k0 // GROUP + tl.arange(0, PARTS)
    groups = (K + GROUP - 1) // GROUP
    scale, offset = load_scales(
        scales, n[:, None], g[None, :], (n < n_pad)[:, None] & (g < groups)[None, :], sstride,
        scales_at, offsets_at, groups, GROUP, AFFINE, BITS, False,
    )  # fmt: skip
    code = tl.reshape(code, (BN, PARTS, BK // PARTS))
    w = code * scale[:, :, None]
    if AFFINE:
        w = w + offset[:, :, None]
    w = tl.reshape(w, (BN, BK))
    if GATHER:
        w = tl.where(known[:, None], w, float("nan"))
    k = k0 + tl.arange(0, BK)
    at = i.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(
        out + at, rounded(w, out.dtype.element_ty), mask=(i < COUNT)[:, None] & (k < K)[None, :]
    )
