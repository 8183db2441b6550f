"""Turns ggml's quantised blocks into codes, scales and offsets, without loss.

    w[n, k] = scale[n, g(k)] * code[n, k] + offset[n, g(k)]

| type            | bits | group | scales  | form                                       |
| Q4_0            | 4    | 32    | float16 | d * (q - 8)                                |
| Q4_1            | 4    | 32    | float16 | d * q + m                                  |
| Q4_K            | 4    | 32    | float32 | (d * sc) * q - dmin * mn                   |
| Q1_0            | 4    | 128   | float16 | d or -d              as code 9 or 7        |
| Q5_0            | 8    | 32    | float16 | d * (q - 16)         as code q + 112       |
| Q5_1            | 8    | 32    | float16 | d * q + m                                  |
| Q5_K            | 8    | 32    | float32 | (d * sc) * q - dmin * mn                   |
| Q8_0            | 8    | 32    | float16 | d * q                as code q + 128       |
| IQ4_NL          | 8    | 32    | float16 | d * table[q]         as code table + 128   |
| IQ4_XS          | 8    | 32    | float32 | (d * sc) * table[q]  as code table + 128   |
| Q6_K            | 8    | 16    | float32 | (d * sc) * (q - 32)  as code q + 96        |
| MXFP4           | 8    | 32    | float32 | formats/_e2m1.py                           |
| NVFP4           | 8    | 16    | float16 | the same elements, scales of 8 bits (E4M3) |
| Q3_K            | 4    | 16    | float32 | (d * sc) * (q - 4)   as code q + 4         |
| Q2_K            | 4    | 16    | float32 | (d * sc) * q - dmin * mn                   |
| IQ1, IQ2, IQ3   | 8    | 16/32 | float32 | _ggml_grids.py                             |
| TQ1_0, TQ2_0    | 4    | 256   | float32 | the same                                   |

The products d * sc have at most 19 significant bits, so they are exact in float32, and a packed
weight holds them as d and an int8 (`nibblock.ops.int4_pack`).

Source: the block layouts of ggml (ggml-common.h); the arithmetic is tested against gguf's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nibblock.formats import _e2m1
from nibblock.formats._ggml_grids import GRIDS, grid_codes, nibble_pairs


@dataclass(frozen=True)
class Codes:
    """A weight in the canonical form.

    qweight: [N, K/2] uint8, low nibble = even k (bits 4), or [N, K] uint8 (bits 8).
    scales: [N, K/group] float16 or float32. offsets: the same, or None for a symmetric weight.
    runs: whether both are known to be int8 multiples of one float16 each for 256 columns. (Of the
        types in _ggml_grids.py they are odd eighths of one, which may be too small for a float16.)
    levels: the name of the at most 16 values that codes of 8 bits take, or "".
    """

    qweight: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None
    bits: int
    group: int
    runs: bool = False
    levels: str = ""

    @property
    def form(self) -> Form:
        dtype = "int8" if self.runs else self.scales.dtype.name
        return self.bits, self.group, self.offsets is not None, dtype, self.levels

    @property
    def columns(self) -> int:
        return self.qweight.shape[1] * (8 // self.bits)

    def rows(self, index: np.ndarray) -> Codes:
        """The same weight with its rows taken in another order."""
        offsets = None if self.offsets is None else self.offsets[index]
        return replace(
            self, qweight=self.qweight[index], scales=self.scales[index], offsets=offsets
        )

    def widened(self, bits: int, group: int, affine: bool, dtype: str, levels: str) -> Codes:
        """The same values in a form that holds this one: more bits, smaller groups that divide
        these, offsets, wider scales.

        Exact: a symmetric weight's offset -8 * scale (8 bits: -128 * scale) only shifts the
        exponent. (But scale * code may then have more than 24 bits: `dequantize` of Q6_K or IQ
        codes with offsets can differ in the last bit.)
        """
        runs, dtype = dtype == "int8", "float32" if dtype == "int8" else dtype
        code, scales, offsets = self.qweight, self.scales.astype(dtype), self.offsets
        if offsets is not None:
            offsets = offsets.astype(dtype)
        elif affine:
            with np.errstate(over="ignore"):  # of MXFP4 alone; found by what is not finite
                offsets = scales * scales.dtype.type(-8 if self.bits == 4 else -128)
        if bits > self.bits:
            code = np.stack((code & 15, code >> 4), axis=-1).reshape(len(code), -1)
            if offsets is None:
                code = code + np.uint8(120)  # 4 bits are centred at 8, 8 bits at 128
        if group < self.group:
            times = self.group // group
            scales = scales.repeat(times, axis=1)
            offsets = None if offsets is None else offsets.repeat(times, axis=1)
        return Codes(code, scales, offsets, bits, group, runs, levels)

    def dequantize(self) -> np.ndarray:
        """[N, K] float32: scale * code + offset, each operation rounded to float32."""
        if self.bits == 4:
            code = np.stack((self.qweight & 15, self.qweight >> 4), axis=-1)
        else:
            code = self.qweight
        rows = code.shape[0]
        code = code.reshape(rows, self.scales.shape[1], self.group).astype(np.float32)
        scales = self.scales.astype(np.float32)[..., None]
        if self.offsets is None:
            value = (code - (8 if self.bits == 4 else 128)) * scales
        else:
            value = code * scales + self.offsets.astype(np.float32)[..., None]
        return value.reshape(rows, -1)


# Bits, group, whether it has offsets, how scales are stored (as float32, float16 or int8), levels.
Form = tuple[int, int, bool, str, str]


def common_form(forms: list[Form]) -> Form:
    """The smallest form that holds weights in each of these without rounding."""
    bits, groups, affine, dtypes, levels = zip(*forms)
    # (128 times a float16 may be none: where an offset is made, it is a float32.)
    one = len(set(affine)) == len(set(dtypes)) == 1
    dtype = dtypes[0] if one else "float32"
    # Of 4-bit codes only int8 scales have groups of 16.
    most = max(bits) if min(groups) > 16 or dtype == "int8" else 8
    same = levels[0] if len(set(levels)) == 1 else ""
    return most, min(groups), any(affine), dtype, same


def alike(parts: list[Codes]) -> list[Codes]:
    """Weights of one width in one form; values stay."""
    shared = common_form([p.form for p in parts])
    return [p if p.form == shared else p.widened(*shared) for p in parts]


def _halves(raw: np.ndarray) -> np.ndarray:
    """[..., 2c] bytes -> [..., c] float16."""
    return np.ascontiguousarray(raw).view("<f2")


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """[..., b] bytes -> [..., 2b]: all low nibbles of a run of b bytes, then all high ones."""
    return np.concatenate((raw & 15, raw >> 4), axis=-1)


def _pack_nibbles(code: np.ndarray) -> np.ndarray:
    """[N, K] codes 0..15 -> [N, K/2], low nibble = even k."""
    return code[:, 0::2] | (code[:, 1::2] << 4)


def _fifth_bits(raw: np.ndarray) -> np.ndarray:
    """[..., 4] bytes -> [..., 32] values 0 or 16, bit i of the little-endian word = value i."""
    return np.unpackbits(np.ascontiguousarray(raw), axis=-1, bitorder="little") << 4


def _six_bit_pairs(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., 12] bytes of a K-block -> its 8 scales and 8 minima, each 0..63, as float32."""
    low, mid, high = raw[..., 0:4], raw[..., 4:8], raw[..., 8:12]
    scale = np.concatenate((low & 63, (high & 15) | ((low >> 6) << 4)), axis=-1)
    minimum = np.concatenate((mid & 63, (high >> 4) | ((mid >> 6) << 4)), axis=-1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _q4_0(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    return _nibbles(b[..., 2:]), _halves(b[..., :2]), None


def _q4_1(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    return _nibbles(b[..., 4:]), _halves(b[..., :2]), _halves(b[..., 2:4])


def _q5_0(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    return (_nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6])) + 112, _halves(b[..., :2]), None


def _q5_1(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    code = _nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8])
    return code, _halves(b[..., :2]), _halves(b[..., 2:4])


def _q8_0(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    return b[..., 2:] ^ 128, _halves(b[..., :2]), None  # int8 + 128 flips the top bit


def _k_scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets [..., 8] of a Q4_K or Q5_K block, float32, exact products."""
    d = _halves(b[..., :2]).astype(np.float32)
    dmin = _halves(b[..., 2:4]).astype(np.float32)
    scale, minimum = _six_bit_pairs(b[..., 4:16])
    return d * scale, -(dmin * minimum)


def _q4_k(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    scales, offsets = _k_scales(b)
    return _nibbles(b[..., 16:].reshape(*b.shape[:-1], 4, 32)), scales, offsets


def _q5_k(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    scales, offsets = _k_scales(b)
    low = _nibbles(b[..., 48:].reshape(*b.shape[:-1], 4, 32)).reshape(*b.shape[:-1], 8, 32)
    shift = np.arange(8, dtype=np.uint8)[:, None]
    high = (b[..., 16:48][..., None, :] >> shift) & 1  # bit j of byte i: value i of sub-block j
    return low | (high << 4), scales, offsets


def _q3_k(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    lead = b.shape[:-1]
    # The missing high bit means minus four. 32 mask bytes: bit j belongs to run j of 32 values.
    run = np.arange(8, dtype=np.uint8)[:, None]
    high = (b[..., 0:32][..., None, :] >> run) & 1
    pair = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    low = (b[..., 32:96].reshape(*lead, 2, 1, 32) >> pair) & 3
    code = low.reshape(*lead, 8, 32) + 4 + 4 * high  # 8 stands for 0
    scale = _nibbles(b[..., 96:104])
    top = (b[..., 104:108][..., None, :] >> pair) & 3
    scale = (scale | (top.reshape(*lead, 16) << 4)).astype(np.float32) - 32
    d = _halves(b[..., 108:110]).astype(np.float32)
    return code.reshape(*lead, 256), d * scale, None


def _q6_k(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    lead = b.shape[:-1]
    # A half of a block has 128 values: 64 bytes of low nibbles, 32 bytes of high bit pairs. Run j
    # of its 32 values has pair j of each byte.
    low = _nibbles(b[..., :128].reshape(*lead, 2, 64)).reshape(*lead, 2, 4, 32)
    pair = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (b[..., 128:192].reshape(*lead, 2, 1, 32) >> pair) & 3
    scale = np.ascontiguousarray(b[..., 192:208]).view(np.int8).astype(np.float32)
    d = _halves(b[..., 208:210]).astype(np.float32)
    return (low | (high << 4)) + 96, d * scale, None


def _q2_k(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    lead = b.shape[:-1]
    pair = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    code = (b[..., 16:80].reshape(*lead, 2, 1, 32) >> pair) & 3
    d = _halves(b[..., 80:82]).astype(np.float32)
    dmin = _halves(b[..., 82:84]).astype(np.float32)
    scale, minimum = b[..., :16] & 15, b[..., :16] >> 4
    code = code.reshape(*lead, 256)
    return code, d * scale.astype(np.float32), -(dmin * minimum.astype(np.float32))


def _q1_0(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    sign = np.unpackbits(np.ascontiguousarray(b[..., 2:]), axis=-1, bitorder="little")
    return 7 + 2 * sign, _halves(b[..., :2]), None


# The sixteen levels shared by IQ4_NL and IQ4_XS.
_IQ4_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16
)
_IQ4_CODES = (_IQ4_LEVELS + 128).astype(np.uint8)


def _iq4_nl(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    return _IQ4_CODES[_nibbles(b[..., 2:])], _halves(b[..., :2]), None


def _iq4_xs(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    lead = b.shape[:-1]
    d = _halves(b[..., :2]).astype(np.float32)
    high = np.ascontiguousarray(b[..., 2:4]).view("<u2") >> (2 * np.arange(8, dtype=np.uint16))
    scale = (nibble_pairs(b[..., 4:8]) | ((high & 3) << 4).astype(np.uint8)).astype(np.float32) - 32
    return _IQ4_CODES[_nibbles(b[..., 8:].reshape(*lead, 8, 16))], d * scale, None


def _mxfp4(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    # 16 low nibbles, then 16 high ones. (ggml takes the exponent 255 for 2^128, here it is NaN.)
    return np.concatenate(_e2m1.unpack(b[..., 1:]), axis=-1), _e2m1.half_scales(b[..., :1]), None


def _nvfp4(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    low, high = _e2m1.unpack(b[..., 4:].reshape(*b.shape[:-1], 4, 8))
    # ggml takes the scales without their sign, and the byte of a NaN as 0.
    scale = _e2m1.half_e4m3(b[..., :4] & 127)
    return np.concatenate((low, high), axis=-1), np.nan_to_num(scale), None


# type: (decoder, values per block, bytes per block, bits, group)
_DECODERS = {
    "Q4_0": (_q4_0, 32, 18, 4, 32),
    "Q4_1": (_q4_1, 32, 20, 4, 32),
    "Q4_K": (_q4_k, 256, 144, 4, 32),
    "Q1_0": (_q1_0, 128, 18, 4, 128),
    "Q5_0": (_q5_0, 32, 22, 8, 32),
    "Q5_1": (_q5_1, 32, 24, 8, 32),
    "Q5_K": (_q5_k, 256, 176, 8, 32),
    "Q8_0": (_q8_0, 32, 34, 8, 32),
    "IQ4_NL": (_iq4_nl, 32, 18, 8, 32),
    "IQ4_XS": (_iq4_xs, 256, 136, 8, 32),
    "Q6_K": (_q6_k, 256, 210, 8, 16),
    "Q3_K": (_q3_k, 256, 110, 4, 16),
    "Q2_K": (_q2_k, 256, 84, 4, 16),
    "MXFP4": (_mxfp4, 32, 17, 8, 32),
    "NVFP4": (_nvfp4, 64, 36, 8, 16),
}

EXACT_TYPES = frozenset(_DECODERS) | frozenset(GRIDS)


def _levels(kind: str) -> str:
    """Types of one name take their codes, of 8 bits, from the same 16 values or fewer."""
    if kind in ("MXFP4", "NVFP4"):
        return "E2M1"
    return kind[:3] if kind.startswith("IQ") else ""


def decode(kind: str, raw: np.ndarray) -> Codes:
    """Codes, scales and offsets of one tensor.

    Args:
        kind: a name in EXACT_TYPES.
        raw: [N, bytes per row] uint8, whole blocks.
    Returns:
        Codes whose dequantised values equal ggml's in float32.
    Raises:
        ImportError: as `dequantize`, of the types in _ggml_grids.py.
    """
    with np.errstate(all="ignore"):  # a corrupt scale is found by its result, which is not finite
        if kind in GRIDS:
            code, scales = grid_codes(kind, raw, _gguf_values)
            bits, group = GRIDS[kind][2:]
            code = _pack_nibbles(code) if bits == 4 else code
            return Codes(code, scales, None, bits, group, levels=_levels(kind))
        decoder, block, block_bytes, bits, group = _DECODERS[kind]
        rows = raw.shape[0]
        code, scales, offsets = decoder(raw.reshape(rows, raw.shape[1] // block_bytes, block_bytes))
    code = code.reshape(rows, -1)
    return Codes(
        qweight=_pack_nibbles(code) if bits == 4 else np.ascontiguousarray(code),
        scales=np.ascontiguousarray(scales.reshape(rows, -1)),
        offsets=None if offsets is None else np.ascontiguousarray(offsets.reshape(rows, -1)),
        bits=bits,
        group=group,
        runs=block == 256,
        levels=_levels(kind),
    )


def dequantize(kind: str, raw: np.ndarray) -> np.ndarray:
    """[N, K] float32 values of any type.

    Raises:
        ImportError: a type that only the gguf package can read, and it is not installed.
        NotImplementedError: a type that the gguf package cannot read either.
    """
    if kind in _DECODERS:
        with np.errstate(all="ignore"):  # as in decode
            return decode(kind, raw).dequantize()
    if kind == "F32":
        return raw.view("<f4")
    if kind == "F16":
        return raw.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if kind == "F64":
        return raw.view("<f8").astype(np.float32)
    return _gguf_values(kind, raw)


def _gguf_values(kind: str, raw: np.ndarray) -> np.ndarray:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"load_gguf: {kind} tensors need the gguf package; pip install nibblock[transformers]"
        ) from error
    member = getattr(gguf.GGMLQuantizationType, kind, None)
    if member is None:
        raise NotImplementedError(kind)
    with np.errstate(all="ignore"):  # as in decode
        return gguf.quants.dequantize(raw, member)


def form(kind: str) -> Form:
    """The form of a name in EXACT_TYPES."""
    if kind in GRIDS:
        return *GRIDS[kind][2:], False, "float32", _levels(kind)
    # Of a block of zeros, so that the decoders stay the only place that knows.
    return decode(kind, np.zeros((1, _DECODERS[kind][2]), np.uint8)).form
