"""float64 oracles for every operator, in NumPy alone.

Nothing here calls nibblock: the packed layout, the dequantisation and the products are written a
second time from the formulas, so that a mistake has to be made twice to go unseen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PANEL_ROWS = 16
GRANULE_K = 64
RUN_K = 256  # columns that share the unit of int8 scales
DX_BLOCK = 128  # n that share a step of dy and of the scales
INT8_BLOCK = 128  # compute="int8" quantises activations per row and block of min(group, 128)
EPS32 = 2.0**-24
HALF_ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALLEST = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24}
MAX32 = 3.4028235e38
LARGEST = {"float32": 3.4028235e38, "bfloat16": 3.3895314e38, "float16": 65504.0}


@dataclass
class Weight:
    """A quantised weight in the canonical layout.

    qweight: uint8 [N, ceil(K / 2)], low nibble = even k (bits = 4), or [N, K] (bits = 8).
    scales, offsets: float16 or float32 [N, groups]; offsets is None for a symmetric weight.
    int8: stored as int8 multiples of one float16 for RUN_K columns, which the float32 ones are.
    palette: 8-bit codes of at most 16 values, stored as places in a table of them.
    """

    qweight: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None
    in_features: int
    group_size: int
    bits: int
    int8: bool = False
    palette: bool = False

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def affine(self) -> bool:
        return self.offsets is not None

    @property
    def scale_dtype(self) -> str:
        return "int8" if self.int8 else self.scales.dtype.name

    @property
    def zero(self) -> int:
        return 8 if self.bits == 4 else 128

    @property
    def format(self) -> dict:
        """Keyword arguments that the native functions call a weight's format."""
        return {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "group_size": self.group_size,
            "bits": self.bits,
            "affine": self.affine,
            "scale_dtype": self.scale_dtype,
        }

    def codes(self) -> np.ndarray:
        """int64 [N, K]."""
        if self.bits == 8:
            return self.qweight.astype(np.int64)
        both = np.stack([self.qweight & 15, self.qweight >> 4], axis=-1)
        return both.reshape(both.shape[0], 2 * both.shape[1])[:, : self.in_features].astype(
            np.int64
        )

    def spread(self, per_group: np.ndarray) -> np.ndarray:
        """float64 [N, K] from [N, groups]."""
        group = GRANULE_K * 10**9 if self.group_size < 0 else self.group_size
        return per_group.astype(np.float64)[:, np.arange(self.in_features) // group]

    def dense(self) -> np.ndarray:
        """The weight in float64 [N, K]: scale * code + offset."""
        scale = self.spread(self.scales)
        if self.offsets is None:
            return scale * (self.codes() - self.zero)
        return scale * self.codes() + self.spread(self.offsets)

    def parts(self) -> np.ndarray:
        """|scale * code| + |offset| [N, K]: what float32 has to hold while a kernel adds them."""
        scale = self.spread(self.scales)
        if self.offsets is None:
            return np.abs(scale * (self.codes() - self.zero))
        return np.abs(scale * self.codes()) + np.abs(self.spread(self.offsets))

    def magnitude(self) -> np.ndarray:
        """|scale * centred code| + |centred offset| [N, K].

        A kernel adds these two parts separately, so its rounding errors scale with this sum and not
        with |w|, in which the parts may cancel.
        """
        scale = self.spread(self.scales)
        part = np.abs(scale * (self.codes() - self.zero))
        if self.offsets is None:
            return part
        return part + np.abs(self.spread(self.offsets) + self.zero * scale)


def groups_of(in_features: int, group_size: int) -> int:
    """Groups a row has, the last of them perhaps short."""
    if group_size < 0:
        return min(in_features, 1)
    return -(-in_features // group_size)


def random_weight(
    rng: np.random.Generator,
    out_features: int,
    in_features: int,
    group_size: int = 128,
    bits: int = 4,
    affine: bool = False,
    scale_dtype: str = "float32",
) -> Weight:
    """Uniform codes, scales within a factor of three, offsets that centre the codes; of int8
    scales the largest of a run is 63 times its unit, as in K-quants.
    """
    top = 15 if bits == 4 else 255
    codes = rng.integers(0, top + 1, (out_features, in_features), dtype=np.int64)
    groups = groups_of(in_features, group_size)
    int8 = scale_dtype == "int8"
    scales = (rng.uniform(0.5, 1.5, (out_features, groups)) / top).astype(
        "float32" if int8 else scale_dtype
    )
    offsets = None
    if affine:
        centre = -scales.astype(np.float64) * top / 2
        offsets = (centre + rng.normal(0, 0.1, centre.shape)).astype(scales.dtype)
    if int8:
        scales = _multiples(scales, group_size)
        offsets = None if offsets is None else _multiples(offsets, group_size)
    return Weight(canonical(codes, bits), scales, offsets, in_features, group_size, bits, int8)


def _multiples(values: np.ndarray, group_size: int) -> np.ndarray:
    """values as 63rds, in float16, of the largest of each run."""
    unit, multiples = _factors(values, group_size)
    return (unit * multiples).reshape(values.shape)


def _factors(values: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 units [N, runs, 1], which float16 holds, and whole multiples [N, runs, each]."""
    each = RUN_K // group_size
    runs = values.reshape(len(values), values.shape[1] // each, each)
    top = np.take_along_axis(runs, np.abs(runs).argmax(-1)[..., None], -1)
    unit = (top / np.float32(63)).astype(np.float16).astype(np.float32)
    return unit, np.rint(np.divide(runs, unit, out=np.zeros_like(runs), where=unit != 0))


def canonical(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [N, ceil(K / 2)] or [N, K] from codes [N, K]."""
    codes = codes.astype(np.uint8)
    if bits == 8:
        return np.ascontiguousarray(codes)
    if codes.shape[1] % 2:
        codes = np.concatenate([codes, np.zeros((codes.shape[0], 1), np.uint8)], axis=1)
    return np.ascontiguousarray(codes[:, 0::2] | (codes[:, 1::2] << 4))


# --- the packed layout, by its drawing in csrc/int4_linear/int4_linear.h ------------------------


def geometry(
    out_features: int,
    in_features: int,
    group_size: int,
    bits: int,
    affine: bool,
    scale_dtype: str,
    palette: bool = False,
) -> dict[str, int]:
    k_pad = -(-in_features // GRANULE_K) * GRANULE_K
    groups = groups_of(in_features, group_size)
    panels = -(-out_features // PANEL_ROWS)
    codes = k_pad * PANEL_ROWS * (4 if palette else bits) // 8
    values = groups * PANEL_ROWS * np.dtype(scale_dtype).itemsize
    units = in_features // RUN_K * PANEL_ROWS * 2 if scale_dtype == "int8" else 0
    section = -(-(values + units) // 64) * 64
    lines = (codes + section * (2 if affine else 1)) // 64
    stride = (lines + (1 - lines % 2) + 2 * palette) * 64
    return {
        "k_pad": k_pad,
        "groups": groups,
        "panels": panels,
        "codes": codes,
        "section": section,
        "stride": stride,
        "bytes": panels * stride,
    }


# The place of each of eight consecutive k within a 32-bit lane, lowest nibble first.
_NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# The k of the two byte quadruples that eight consecutive k become.
_BYTE_ORDER = ((0, 4, 1, 5), (2, 6, 3, 7))


def _padded_codes(weight: Weight, geo: dict[str, int]) -> np.ndarray:
    """uint8 [panels, k_pad / 8, 16 rows, 8 k]; padding holds the code of zero, or the first."""
    codes, zero = weight.codes(), weight.zero
    if weight.palette:
        values = np.unique(codes)
        zero = int(np.searchsorted(values, 128)) if 128 in values else 0
        codes = np.searchsorted(values, codes)
    full = np.full((geo["panels"] * PANEL_ROWS, geo["k_pad"]), zero, np.uint8)
    full[: weight.out_features, : weight.in_features] = codes
    return full.reshape(geo["panels"], PANEL_ROWS, geo["k_pad"] // 8, 8).transpose(0, 2, 1, 3)


def _by_panel(per_group: np.ndarray, geo: dict[str, int]) -> np.ndarray:
    """uint8 [panels, bytes]: the values of 16 rows beside each other, group by group."""
    groups = per_group.shape[1]
    full = np.zeros((geo["panels"] * PANEL_ROWS, groups), per_group.dtype)
    full[: per_group.shape[0]] = per_group
    by_panel = full.reshape(geo["panels"], PANEL_ROWS, groups).transpose(0, 2, 1)
    return np.ascontiguousarray(by_panel).reshape(geo["panels"], -1).view(np.uint8)


def _section(per_group: np.ndarray, geo: dict[str, int], weight: Weight) -> np.ndarray:
    """uint8 [panels, section]."""
    if weight.int8:
        unit, multiples = _factors(per_group, weight.group_size)
        small = _by_panel(multiples.reshape(per_group.shape).astype(np.int8), geo)
        raw = np.concatenate([small, _by_panel(unit[..., 0].astype(np.float16), geo)], axis=1)
    else:
        raw = _by_panel(per_group, geo)
    return np.pad(raw, ((0, 0), (0, geo["section"] - raw.shape[1])))


def pack(weight: Weight) -> np.ndarray:
    """The packed blob, uint8 [bytes]."""
    geo = geometry(**weight.format, palette=weight.palette)
    if geo["panels"] == 0:
        return np.zeros(0, np.uint8)
    codes = _padded_codes(weight, geo)
    if weight.bits == 4 or weight.palette:
        lanes = np.zeros(codes.shape[:3], np.uint32)
        for place, k in enumerate(_NIBBLE_ORDER):
            lanes |= codes[..., k].astype(np.uint32) << np.uint32(4 * place)
        body = np.ascontiguousarray(lanes.astype("<u4")).reshape(geo["panels"], -1).view(np.uint8)
    else:
        lines = np.stack([codes[..., list(order)] for order in _BYTE_ORDER], axis=2)
        body = np.ascontiguousarray(lines).reshape(geo["panels"], -1)
    parts = [body, _section(weight.scales, geo, weight)]
    if weight.offsets is not None:
        parts.append(_section(weight.offsets, geo, weight))
    panel = np.concatenate(parts, axis=1)
    panel = np.pad(panel, ((0, 0), (0, geo["stride"] - panel.shape[1])))
    if weight.palette:  # the last line; a table that is not full ends in its last value
        values = np.unique(weight.codes())
        table = np.pad(values.astype(np.uint8), (0, 16 - len(values)), mode="edge")
        panel[:, -64:-48] = table
    return panel.reshape(-1)


def unpack(
    packed: np.ndarray,
    out_features: int,
    in_features: int,
    group_size: int,
    bits: int,
    affine: bool,
    scale_dtype: str,
) -> Weight:
    geo = geometry(out_features, in_features, group_size, bits, affine, scale_dtype)
    panel = packed.reshape(geo["panels"], geo["stride"])
    codes = np.zeros((geo["panels"], geo["k_pad"] // 8, PANEL_ROWS, 8), np.uint8)
    body = np.ascontiguousarray(panel[:, : geo["codes"]])
    if bits == 4:
        lanes = body.view("<u4").reshape(codes.shape[:3])
        for place, k in enumerate(_NIBBLE_ORDER):
            codes[..., k] = (lanes >> np.uint32(4 * place)) & np.uint32(15)
    else:
        lines = body.reshape(geo["panels"], geo["k_pad"] // 8, 2, PANEL_ROWS, 4)
        for half, order in enumerate(_BYTE_ORDER):
            codes[..., list(order)] = lines[:, :, half]
    padded = geo["panels"] * PANEL_ROWS
    rows = codes.transpose(0, 2, 1, 3).reshape(padded, geo["k_pad"])[:out_features, :in_features]

    def by_row(at: int, groups: int, dtype: str) -> np.ndarray:
        count = groups * PANEL_ROWS * np.dtype(dtype).itemsize
        values = np.ascontiguousarray(panel[:, at : at + count]).view(dtype)
        rows_last = values.reshape(geo["panels"], groups, PANEL_ROWS).transpose(0, 2, 1)
        return np.ascontiguousarray(rows_last.reshape(padded, groups)[:out_features])

    def section(at: int) -> np.ndarray:
        values = by_row(at, geo["groups"], scale_dtype)
        if not int8:
            return values
        units = by_row(at + geo["groups"] * PANEL_ROWS, in_features // RUN_K, "float16")
        each = RUN_K // group_size
        return values.astype(np.float32) * units.astype(np.float32).repeat(each, axis=1)

    int8 = scale_dtype == "int8"
    scales = section(geo["codes"])
    offsets = section(geo["codes"] + geo["section"]) if affine else None
    return Weight(canonical(rows, bits), scales, offsets, in_features, group_size, bits, int8)


# --- products -----------------------------------------------------------------------------------


def int4_linear(x: np.ndarray, weight: Weight, bias: np.ndarray | None = None) -> np.ndarray:
    """y = x w^T + bias in float64; x [M, K] holds the values the op was given."""
    with np.errstate(invalid="ignore", over="ignore"):
        y = x.astype(np.float64) @ weight.dense().T
    return y if bias is None else y + bias.astype(np.float64)


def int4_linear_dx(grad: np.ndarray, weight: Weight) -> np.ndarray:
    """dx = dy w in float64; grad [M, N]."""
    with np.errstate(invalid="ignore", over="ignore"):
        return grad.astype(np.float64) @ weight.dense()


# --- rounding -----------------------------------------------------------------------------------


def f32_to_bf16_bits(x: np.ndarray) -> np.ndarray:
    """uint16, round to nearest even, NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded)


def bf16_bits_to_f32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values rounded to float32, bfloat16 or float16, returned as float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        x32 = np.asarray(x, np.float64).astype(np.float32)
        if dtype == "bfloat16":
            return bf16_bits_to_f32(f32_to_bf16_bits(x32)).reshape(x32.shape)
        return x32 if dtype == "float32" else x32.astype(np.float16).astype(np.float32)


# --- how far a result may be from the oracle ----------------------------------------------------


def _quantise_int8(x: np.ndarray, block: int) -> np.ndarray:
    """Activations rounded to int8 per row and block, as float64."""
    out = np.array(x, np.float64)
    for start in range(0, x.shape[1], block):
        part = out[:, start : start + block]
        top = np.abs(part).max(axis=1, keepdims=True, initial=0.0)
        step = np.where(top > 0, top, 1.0) / 127
        out[:, start : start + block] = np.rint(part / step) * step
    return out


def _block_max(x: np.ndarray, block: int) -> np.ndarray:
    """|x|'s largest value of each row and block, at every position."""
    out = np.abs(x.astype(np.float64))
    for start in range(0, x.shape[1], block):
        part = out[:, start : start + block]
        part[:] = part.max(axis=1, keepdims=True, initial=0.0)
    return out


def stretch_rounding(weight: Weight) -> np.ndarray:
    """How far int8 kernels' integer scales may move a weight of short groups, [N, K]."""
    if (weight.bits, weight.group_size) != (4, 32):
        return np.zeros(weight.codes().shape)
    steps = 2.0**-14 * _block_max(weight.scales, INT8_BLOCK // 32)
    return weight.spread(steps) * np.abs(weight.codes() - weight.zero)


def dx_roundings(x: np.ndarray, weight: Weight, compute: str) -> tuple[np.ndarray, np.ndarray]:
    """What integer kernels of the input gradient lose beyond rounding dy to int16, element by
    element: at most, and the variance of uniform errors.

    A group's scales become integers of 16 (int8: 8) bits in blocks of n, and so does their product
    with dy; the centred offset has 16 (13) bits.
    """
    levels, fine = (127, 4095) if compute == "int8" else (32767, 32767)
    top = _block_max(x, DX_BLOCK) * (x != 0)  # zeros stay zeros
    scales = weight.spread(_block_max(weight.scales.T, DX_BLOCK).T)
    steps = scales * np.abs(weight.codes() - weight.zero) / levels
    most = (np.abs(x) + top) @ steps / 2
    variance = (x**2 + top**2) @ steps**2 / 12
    if weight.affine:
        offsets = weight.offsets.astype(np.float64) + weight.zero * weight.scales.astype(np.float64)
        rest = weight.spread(_block_max(offsets.T, DX_BLOCK).T) / fine
        most += np.abs(x) @ rest / 2
        variance += x**2 @ rest**2 / 12
    return most, variance


def dense_bf16(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, out_dtype: str) -> np.ndarray:
    """A dense bfloat16 linear at its best: operands rounded, an exact sum, one last rounding.

    The output is rounded to the activations' dtype (not to bfloat16), which makes the comparison
    harder for a float32 or float16 call than torch's own bfloat16 linear would.
    """
    y = round_to(x, "bfloat16").astype(np.float64) @ round_to(w, "bfloat16").astype(np.float64).T
    if bias is not None:
        y = y + round_to(bias, "bfloat16").astype(np.float64)
    return round_to(y, out_dtype).astype(np.float64)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def check_linear(
    y: np.ndarray,
    x: np.ndarray,
    weight: Weight,
    bias: np.ndarray | None = None,
    *,
    dtype: str = "float32",
    operand: str = "bfloat16",
    compute: str = "bf16",
    transposed: bool = False,
    what: str = "",
) -> None:
    """Raises AssertionError unless y is close enough to the float64 product.

    Two bounds. (1) Every element: the roundings that the arithmetic makes, each at its worst and
    all in the same direction. (2) All elements together, when there are enough of them for a mean
    to say anything: root mean square error at most 1.1 times the dense bfloat16 linear's on the
    same dequantised weight, plus what float32 sums cost. compute="int8" may in addition lose what
    rounding its activations to int8 loses. What float32 cannot hold on the way may be infinite.

    y, x are float arrays [M, *] (already float32 or wider); dtype names the dtype of the op's x,
    operand the type that kernels may round the factors of a product to ("float32": x may still
    become int16 block by block). transposed=True checks dx = dy w instead (bias is None), where the
    scales are rounded too, since they are summed over with dy.
    """
    y, x = np.asarray(y, np.float64), np.asarray(x, np.float64)
    w = weight.dense().T if transposed else weight.dense()
    ref = x @ w.T
    if bias is not None:
        ref = ref + np.asarray(bias, np.float64)
    assert y.shape == ref.shape, f"{what}: shape {y.shape}, expected {ref.shape}"
    if not y.size:
        return
    terms = x.shape[1]
    size = weight.magnitude().T if transposed else weight.magnitude()
    total = np.abs(x) @ size.T
    block_total = _block_max(x, INT8_BLOCK) @ size.T
    group = weight.group_size if 0 < weight.group_size < INT8_BLOCK else INT8_BLOCK
    if bias is not None:
        total = total + np.abs(np.asarray(bias, np.float64))
    # bfloat16 operands: half an ulp each; int16 activations: half a step of the block's largest.
    step = (terms + 8) * EPS32 + (0 if operand == "float32" else 2 * HALF_ULP[operand])
    bound = step * total + 2.0**-16 * block_total
    if transposed:
        most, variance = dx_roundings(x, weight, compute)
        bound = bound + most
    elif compute == "int8":
        bound += _block_max(x, group) @ size.T / 253
        bound += _block_max(x, INT8_BLOCK) @ stretch_rounding(weight).T
    # Tile units take subnormal operands and results for zero.
    flushed = SMALLEST[dtype] + 2.0**-126 * (terms + size.sum(1))
    bound = 1.01 * bound + 1.01 * HALF_ULP[dtype] * np.abs(ref) + flushed
    # What overflows the output's dtype must come out as infinity, and only what may overflow.
    over = np.abs(ref) - bound > LARGEST[dtype]
    may_overflow = np.abs(ref) + bound > LARGEST[dtype]
    may_overflow |= np.abs(x) @ (weight.parts().T if transposed else weight.parts()).T > MAX32
    infinite = np.isinf(y) & (np.sign(y) == np.sign(ref))
    good = np.where(infinite, may_overflow, (np.abs(y - ref) <= bound) & ~over)
    if not good.all():
        at = tuple(int(i) for i in np.argwhere(~good)[0])
        raise AssertionError(
            f"{what}: {int((~good).sum())} of {y.size} elements are off; at {list(at)} got "
            f"{y[at]:.9g}, expected {ref[at]:.9g} +- {bound[at]:.3g}"
        )
    finite = ~infinite & ~may_overflow
    if y.size < 512 or not finite.all():
        return
    error = rms(y - ref)
    allowed = 1.1 * rms(dense_bf16(x, w, bias, dtype) - ref)
    if compute == "int8" and transposed:
        allowed += 1.6 * np.sqrt(variance.mean())
    elif compute == "int8":
        allowed += 1.1 * rms(_quantise_int8(x, group) @ w.T - x @ w.T)
    allowed += terms**0.5 * 2 * EPS32 * rms(total) + flushed.max()
    assert error <= allowed, (
        f"{what}: root mean square error {error:.4g} exceeds {allowed:.4g} "
        f"(relative {error / max(rms(ref), 1e-300):.3g})"
    )
