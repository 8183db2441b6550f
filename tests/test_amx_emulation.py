"""The AMX kernels on machines without AMX: compiled over a software model of the tiles.

The model (csrc/common/amx_emulation.h) follows the instruction reference bit for bit, aborts on
misuse, and needs only AVX-512 with AVX512_BF16, which the kernels use besides the tiles. Weights
are packed here by the drawing in int4_linear.h, independently of the C++ packer.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16")
FLAGS = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-pthread",
    "-DNIBBLOCK_EMULATE_AMX",
    "-fvisibility=hidden",
    # cpu.cpp names every kernel in its table; only its helper for non-finite rows is wanted here.
    *("-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections,-z,defs"),
    f"-Wl,--version-script={ROOT / 'tests/cpp/amx_emulation.map'}",
    "-ffp-contract=off",
    *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *("-mavx512vnni", "-mavx512bf16", "-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"),
]
F32, BF16, F16 = 0, 1, 2
FORWARD, INT8, DX = 0, 1, 2


def missing_features() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return list(NEEDED)
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return [name for name in NEEDED if name not in flags]


pytestmark = [
    pytest.mark.skipif(
        bool(missing_features()), reason=f"this CPU lacks {', '.join(missing_features())}"
    ),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    out = tmp_path_factory.mktemp("amx") / "libamx_emulation.so"
    sources = [
        ROOT / "tests/cpp/amx_emulation.cpp",
        ROOT / "csrc/int4_linear/cpu.cpp",
        *sorted((ROOT / "csrc/int4_linear").glob("cpu_amx*.cpp")),
    ]
    built = subprocess.run(
        ["g++", *FLAGS, *map(str, sources), "-o", str(out)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-4000:]
    lib = ctypes.CDLL(str(out))
    lib.packed_bytes.restype = ctypes.c_int64
    lib.path = str(out)
    return lib


# --- values ------------------------------------------------------------


def to_bf16(a: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, nearest even, denormals to zero, NaN kept."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded = np.where((rounded & 0x7F80) == 0, rounded & 0x8000, rounded)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, ((bits >> 16) | 0x40), rounded).astype(np.uint16)


def from_bf16(a: np.ndarray) -> np.ndarray:
    return (a.astype(np.uint32) << 16).view(np.float32)


def encode(a: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == F32:
        return a.astype(np.float32)
    return to_bf16(a) if dtype == BF16 else a.astype(np.float16)


def decode(a: np.ndarray, dtype: int) -> np.ndarray:
    return from_bf16(a) if dtype == BF16 else a.astype(np.float32)


class Weight:
    """A random quantised weight, its dequantised values and its packed bytes."""

    def __init__(self, rng, n, k, group, bits, affine, scale_type):
        self.n, self.k, self.group = n, k, group
        self.bits, self.affine, self.scale_type = bits, affine, scale_type
        k_pad = -(-k // 64) * 64
        size = k_pad if group < 0 else group
        groups = -(-k // size) if size else 0
        zero = 8 if bits == 4 else 128
        codes = rng.integers(0, 2 * zero, (n, k)).astype(np.uint8)
        kind = np.float16 if scale_type == F16 else np.float32
        scales = (
            rng.uniform(0.5, 1.5, (n, groups)) * rng.choice([-1, 1], (n, groups)) / zero
        ).astype(kind)
        offsets = rng.normal(size=(n, groups)).astype(kind)
        each = np.arange(k) // size if size else np.zeros(0, int)
        s = scales.astype(np.float32)[:, each]
        self.o = offsets.astype(np.float32)[:, each] if affine else None
        # offset + zero * scale by one fused multiply-add, as the kernels have it
        centre = np.float32(np.float64(self.o) + zero * np.float64(s)) if affine else np.float32(0)
        exact = np.float64(s) * (np.float64(codes) - zero) + np.float64(centre)
        self.w32 = exact.astype(np.float32)
        self.w = from_bf16(to_bf16(self.w32)).astype(np.float64)
        self.packed = self.pack(codes, scales, offsets, k_pad, groups)

    def pack(self, codes, scales, offsets, k_pad, groups):
        n, k, bits = self.n, self.k, self.bits
        panels = -(-n // 16)
        if panels == 0:
            return np.zeros(0, np.uint8)
        full = np.full((panels * 16, k_pad), 8 if bits == 4 else 128, np.uint32)
        full[:n, :k] = codes
        # [panel, line group of 8 k, row, 8]
        blocks = full.reshape(panels, 16, k_pad // 8, 8).transpose(0, 2, 1, 3)
        if bits == 4:
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            lanes = sum(blocks[..., c] << (4 * i) for i, c in enumerate(order))
            code_bytes = np.ascontiguousarray(lanes, "<u4").view(np.uint8).reshape(panels, -1)
        else:
            quads = np.stack([blocks[..., [0, 4, 1, 5]], blocks[..., [2, 6, 3, 7]]], axis=2)
            code_bytes = np.ascontiguousarray(quads, np.uint8).reshape(panels, -1)

        def section(values):
            padded = np.zeros((panels * 16, groups), values.dtype)
            padded[:n] = values
            raw = np.ascontiguousarray(padded.reshape(panels, 16, groups).transpose(0, 2, 1))
            raw = raw.view(np.uint8).reshape(panels, -1)
            return np.pad(raw, ((0, 0), (0, -raw.shape[1] % 64)))

        parts = [code_bytes, section(scales)] + ([section(offsets)] if self.affine else [])
        out = np.concatenate(parts, axis=1)
        if out.shape[1] // 64 % 2 == 0:
            out = np.pad(out, ((0, 0), (0, 64)))
        return np.ascontiguousarray(out).ravel()


def own_type(which):
    """Of x: bfloat16 tiles take no other, int8 tiles take all."""
    return F32 if which == INT8 else BF16


def call(lib, which, weight, x, bias=None, bias_type=F32, threads=1, pad=3, xtype=None):
    """x: encoded [m, k] (or dy [m, n]). Strided in and out, each row `pad` elements longer."""
    xtype = own_type(which) if xtype is None else xtype
    m, wide = x.shape
    out = weight.k if which == DX else weight.n
    xs = np.full((m, wide + pad), np.nan, np.float32)
    xs = encode(xs, xtype)
    xs[:, :wide] = x
    canary = encode(np.full((m, out + pad), 7.0, np.float32), xtype)
    y = canary.copy()
    lib.amx_run(
        which,
        *map(ctypes.c_int64, (weight.n, weight.k, weight.group)),
        weight.bits,
        int(weight.affine),
        weight.scale_type,
        ctypes.c_void_p(weight.packed.ctypes.data),
        ctypes.c_int64(m),
        ctypes.c_void_p(xs.ctypes.data),
        ctypes.c_int64(xs.shape[1]),
        ctypes.c_void_p(y.ctypes.data),
        ctypes.c_int64(y.shape[1]),
        xtype,
        None if bias is None else ctypes.c_void_p(bias.ctypes.data),
        bias_type,
        threads,
    )
    assert np.array_equal(y[:, out:], canary[:, out:]), "wrote behind the end of a row"
    return y[:, :out]


OUTPUT_EPS = {F32: 0.0, BF16: 2.0**-8, F16: 2.0**-11}


def check_bf16(lib, rng, which, m, n, k, group, bits, affine, scale_type, bias_type):
    weight = Weight(rng, n, k, group, bits, affine, scale_type)
    assert weight.packed.size == lib.packed_bytes(
        *map(ctypes.c_int64, (n, k, group)), bits, int(affine), scale_type
    )
    x = to_bf16(rng.normal(size=(m, n if which == DX else k)).astype(np.float32))
    bias = None
    if bias_type is not None and which != DX:
        bias = encode(rng.normal(size=n).astype(np.float32), bias_type)
    got = from_bf16(call(lib, which, weight, x, bias, bias_type or F32))
    # The operands exactly as the tiles see them: what is left is the rounding of float32 sums.
    xb = from_bf16(x).astype(np.float64)
    w = weight.w.T if which == FORWARD else weight.w
    want = xb @ w
    size = np.abs(xb) @ np.abs(w)
    if bias is not None:
        want = want + decode(bias, bias_type)
        size = size + np.abs(decode(bias, bias_type))
    terms = w.shape[0]
    bound = size * 2.0**-24 * (4 + terms**0.5) + np.abs(want) * OUTPUT_EPS[BF16] + 1e-30
    worst = np.max(np.abs(got - want) / bound, initial=0.0)
    assert worst <= 1.0, (which, m, n, k, group, bits, affine, scale_type, bias_type, worst)


SHAPES = [
    (5, 1, 1), (5, 16, 32), (6, 17, 33), (7, 3, 64), (15, 33, 65), (16, 48, 100), (17, 64, 127),
    (31, 65, 128), (32, 100, 129), (33, 118, 256), (48, 31, 300), (49, 96, 31), (64, 130, 192),
    (70, 118, 576), (97, 20, 17),
]  # fmt: skip


@pytest.mark.parametrize("which", [FORWARD, DX], ids=["forward", "dx"])
@pytest.mark.parametrize("bits", [4, 8])
def test_bf16_against_float64(library, which, bits):
    rng = np.random.default_rng(bits + which)
    groups = itertools.cycle([32, 64, 128, 256, -1, *([16, 16] if bits == 8 else [])])
    rest = itertools.cycle(itertools.product([False, True], [F16, F32], [None, F32, BF16, F16]))
    for m, n, k in SHAPES:
        for _ in range(5):
            check_bf16(library, rng, which, m, n, k, next(groups), bits, *next(rest))
        next(groups)


@pytest.mark.parametrize("which", [FORWARD, DX], ids=["forward", "dx"])
def test_bf16_many_passes_chunks_and_groups(library, which):
    """Every branch of the plan: several passes, chunks of rows, groups of columns."""
    rng = np.random.default_rng(5)
    for m, n, k in [(16, 70, 1100), (40, 33, 1100), (545, 70, 40), (1100, 20, 33), (515, 600, 330)]:
        n, k = (k, n) if which == DX else (n, k)
        check_bf16(library, rng, which, m, n, k, 128, 4, True, F16, F32)


def test_empty(library):
    rng = np.random.default_rng(0)
    weight = Weight(rng, 20, 0, 32, 4, False, F32)
    bias = rng.normal(size=20).astype(np.float32)
    got = call(library, FORWARD, weight, np.zeros((6, 0), np.uint16), bias)
    assert np.array_equal(got, np.tile(to_bf16(bias), (6, 1)))
    weight = Weight(rng, 0, 40, 32, 4, False, F32)
    got = call(library, DX, weight, np.zeros((6, 0), np.uint16))
    assert np.array_equal(got, np.zeros((6, 40)))


@pytest.mark.parametrize("which", [FORWARD, INT8, DX], ids=["forward", "int8", "dx"])
def test_same_bits_at_any_thread_count(library, which):
    rng = np.random.default_rng(1)
    for m, n, k in [(6, 200, 300), (70, 70, 200), (600, 260, 70)]:
        weight = Weight(rng, n, k, 64, 4, True, F32)
        x = rng.normal(size=(m, n if which == DX else k)).astype(np.float32)
        x = encode(x, own_type(which))
        first = call(library, which, weight, x, threads=1)
        for threads in (2, 3, 7):
            again = call(library, which, weight, x, threads=threads)
            assert np.array_equal(first, again), (m, n, k, threads)


@pytest.mark.parametrize("which", [FORWARD, INT8, DX], ids=["forward", "int8", "dx"])
@pytest.mark.parametrize("affine", [False, True])
def test_nan_and_infinity_stay_in_their_row(library, which, affine):
    rng = np.random.default_rng(2)
    m, n, k = 20, 40, 100
    weight = Weight(rng, n, k, 32, 4, affine, F32)
    xtype = own_type(which)
    clean = rng.normal(size=(m, n if which == DX else k)).astype(np.float32)
    x = clean.copy()
    x[3, 7], x[9, 11], x[11, 0], x[11, 1] = np.nan, np.inf, np.inf, -np.inf
    got, base = (decode(call(library, which, weight, encode(v, xtype)), xtype) for v in (x, clean))
    touched = [3, 9, 11]
    rest = [i for i in range(m) if i not in touched]
    assert np.array_equal(got[rest], base[rest])
    assert np.isnan(got[3]).all()
    with np.errstate(invalid="ignore"):
        want = (x.astype(np.float64)[:, None, :] * (weight.w if which != DX else weight.w.T)).sum(
            -1
        )
    for row in (9, 11):
        assert np.array_equal(np.isnan(got[row]), np.isnan(want[row]))
        fine = ~np.isnan(want[row])
        assert np.array_equal(got[row][fine], want[row][fine].astype(np.float32))


def quantised(x: np.ndarray, block: int) -> np.ndarray:
    """x as int8 per row and block, times its scale, by the float32 arithmetic of activations.h."""
    out = np.zeros(x.shape, np.float64)
    for at in range(0, x.shape[1], block):
        part = x[:, at : at + block]
        top = np.abs(part).max(axis=1, keepdims=True)
        inverse = np.where(top == 0, np.float32(0), np.float32(127) / np.where(top == 0, 1, top))
        codes = np.rint(part * inverse.astype(np.float32))
        out[:, at : at + block] = codes.astype(np.float64) * (top / np.float32(127))
    return out


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_against_float64(library, bits):
    rng = np.random.default_rng(bits)
    groups = itertools.cycle([32, 64, 128, 256, -1])
    rest = itertools.cycle(
        itertools.product([False, True], [F16, F32], [F32, BF16, F16], [None, F32, BF16, F16])
    )
    for m, n, k in [*SHAPES, (545, 40, 70), (20, 600, 1100)]:
        for _ in range(5):
            affine, scale_type, xtype, bias_type = next(rest)
            group = next(groups)
            weight = Weight(rng, n, k, group, bits, affine, scale_type)
            x = encode(rng.normal(size=(m, k)).astype(np.float32), xtype)
            bias = None
            if bias_type is not None:
                bias = encode(rng.normal(size=n).astype(np.float32), bias_type)
            y = call(library, INT8, weight, x, bias, bias_type or F32, xtype=xtype)
            got = decode(y, xtype)
            values = decode(x, xtype)
            block = min(group if group > 0 else 128, 128)
            w = weight.w32.astype(np.float64).T
            want = quantised(values, block) @ w
            size = np.abs(values.astype(np.float64)) @ np.abs(w)
            if bias is not None:
                want = want + decode(bias, bias_type)
                size = size + np.abs(decode(bias, bias_type))
            bound = size * 2.0**-21 + np.abs(want) * OUTPUT_EPS[xtype] + 1e-30
            worst = np.max(np.abs(got - want) / bound, initial=0.0)
            assert worst <= 1.0, (m, n, k, group, affine, scale_type, xtype, worst)
        next(groups)


@pytest.mark.parametrize("which", [FORWARD, INT8, DX], ids=["forward", "int8", "dx"])
def test_extreme_values(library, which):
    rng = np.random.default_rng(3)
    n, k = 40, 96
    weight = Weight(rng, n, k, 32, 4, True, F32)
    w = weight.w32.astype(np.float64).T if which != DX else weight.w32.astype(np.float64)
    xtype = own_type(which)
    for scale in (1e-36, 1e-30, 1e30):
        x = (rng.normal(size=(8, n if which == DX else k)) * scale).astype(np.float32)
        got = decode(call(library, which, weight, encode(x, xtype)), xtype)
        size = np.abs(x.astype(np.float64)) @ np.abs(w)
        assert (np.abs(got - x.astype(np.float64) @ w) <= size * 2e-2).all(), scale
    x = encode(np.zeros((8, n if which == DX else k), np.float32), xtype)
    zeros = call(library, which, weight, x)
    assert np.array_equal(zeros, np.zeros_like(zeros))


@pytest.mark.parametrize("misuse", range(6))
def test_emulation_rejects_misuse(library, misuse):
    code = f"import ctypes; ctypes.CDLL({library.path!r}).amx_misuse({misuse})"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == -6, child
    assert "AMX emulation:" in child.stderr, child


def test_emulation_without_misuse_ends_normally(library):
    code = f"import ctypes, os; ctypes.CDLL({library.path!r}).amx_misuse(6); os._exit(0)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
