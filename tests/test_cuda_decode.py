"""The CUDA decode kernel of int4_linear without a GPU: its very body over a software model.

The model (csrc/common/cuda_emulation.h) runs every thread of every block, with asynchronous copies
that land as late as they may, tensor core products by the fragment layout of the PTX manual, a
check of every address, and a race detector. Products are compared with the float64 oracle.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference import (
    HALF_ULP,
    Weight,
    bf16_bits_to_f32,
    f32_to_bf16_bits,
    int4_linear,
    pack,
    random_weight,
)

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
]
TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
GROUPS = (32, 64, 128, 256, -1)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    out = tmp_path_factory.mktemp("cuda") / "libcuda_decode.so"
    source = ROOT / "tests/cpp/cuda_decode.cpp"
    built = subprocess.run(
        ["g++", *FLAGS, str(source), "-o", str(out)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-4000:]
    lib = ctypes.CDLL(str(out))
    lib.cuda_decode_run.restype = ctypes.c_int64
    lib.cuda_weight_byte.restype = ctypes.c_int64
    return lib


def encode(a: np.ndarray, dtype: str) -> np.ndarray:
    """The stored form: float32, float16 bits or bfloat16 bits."""
    if dtype == "float32":
        return np.ascontiguousarray(a, np.float32)
    if dtype == "bfloat16":
        return f32_to_bf16_bits(a).reshape(a.shape)
    return np.ascontiguousarray(a.astype(np.float16)).view(np.uint16)


def decode(a: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return a
    if dtype == "bfloat16":
        return bf16_bits_to_f32(a).reshape(a.shape)
    return a.view(np.float16).astype(np.float32)


def aligned(shape: tuple[int, ...], dtype: type, shift: int = 0) -> np.ndarray:
    """An array that begins `shift` bytes behind a multiple of 64."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 128 + shift, np.uint8)
    at = -raw.ctypes.data % 64 + shift
    return raw[at : at + size].view(dtype).reshape(shape)


def token_tiles(m: int) -> int:
    """Token tiles of 8 in the kernel that the launcher takes for m rows."""
    return next(nt for nt in (1, 2, 4, 8) if m <= 8 * nt or nt == 8)


class Result:
    def __init__(self, y, units, loads, extra, products):
        self.y, self.units, self.loads = y, units, loads
        self.extra, self.products = extra, products


def launch(
    lib, weight: Weight, x, dtype, bias=None, bias_dtype="float32", nt=None, blocks=3, order=None,
    x_pad=0, x_shift=0, y_pad=0, adapter=None,
) -> Result:  # fmt: skip
    m, k = x.shape
    n = weight.out_features
    packed = aligned((pack(weight).size,), np.uint8)
    packed[:] = pack(weight)
    rows = aligned((m, k + x_pad), np.uint16, x_shift)
    rows[:, k:] = 0x7FFF  # NaN between the rows
    rows[:, :k] = encode(x, dtype)
    y = aligned((m, n + y_pad), np.uint16)
    y[:] = 0x1234
    kept = None if bias is None else encode(bias, bias_dtype)
    order = np.arange(blocks) if order is None else np.asarray(order)
    order = np.ascontiguousarray(order, np.int32)
    found = np.zeros(3, np.int64)
    blocks_of = (None, 0, None, None, ctypes.c_int64(32))
    if adapter is not None:
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (adapter.row_ptr, adapter.col)]
        stored = ctypes.c_void_p(adapter.stored.ctypes.data)
        blocks_of = (stored, TYPES[adapter.dtype], *pointers, ctypes.c_int64(adapter.edge))
    units = lib.cuda_decode_run(
        *map(ctypes.c_int64, (n, k, weight.group_size)),
        weight.bits,
        int(weight.affine),
        TYPES[weight.scale_dtype],
        ctypes.c_void_p(packed.ctypes.data),
        ctypes.c_int64(m),
        ctypes.c_void_p(rows.ctypes.data),
        ctypes.c_int64(k + x_pad),
        ctypes.c_void_p(y.ctypes.data),
        ctypes.c_int64(n + y_pad),
        TYPES[dtype],
        None if kept is None else ctypes.c_void_p(kept.ctypes.data),
        TYPES[bias_dtype],
        nt or token_tiles(m),
        blocks,
        ctypes.c_void_p(order.ctypes.data),
        ctypes.c_void_p(found.ctypes.data),
        *blocks_of,
    )
    assert units > 0, "arrival counters were not left at zero"
    assert (y[:, n:] == 0x1234).all(), "wrote behind the end of a row"
    return Result(y[:, :n].copy(), units, *map(int, found))


class Adapter:
    """Random blocks; what lies outside [N, K] in ragged ones is NaN, which nobody may see."""

    def __init__(self, rng, n, k, edge, density, dtype):
        rows, columns = -(-n // edge), -(-k // edge)
        mask = rng.random((rows, columns)) < density
        mask[rows // 2, :] = True  # a full row, and the last column of some
        blocks = np.argwhere(mask)
        self.edge, self.dtype = edge, dtype
        self.col = np.ascontiguousarray(blocks[:, 1], np.int32)
        self.row_ptr = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int32)
        values = rng.normal(size=(len(blocks), edge, edge)).astype(np.float32) / 4
        values = decode(encode(values, dtype), dtype)
        full = np.zeros((rows * edge, columns * edge), np.float32)
        for z, (i, j) in enumerate(blocks):
            full[i * edge : (i + 1) * edge, j * edge : (j + 1) * edge] = values[z]
            values[z, max(0, n - i * edge) :] = np.nan
            values[z, :, max(0, k - j * edge) :] = np.nan
        self.dense = full[:n, :k].astype(np.float64)
        self.stored = aligned(values.shape, np.float32 if dtype == "float32" else np.uint16)
        self.stored[:] = encode(values, dtype)


def check(lib, rng, m, n, k, group, bits, affine, scale_dtype, dtype, bias_dtype=None, **more):
    weight = random_weight(rng, n, k, group, bits, affine, scale_dtype)
    x = decode(encode(rng.normal(size=(m, k)).astype(np.float32), dtype), dtype)
    bias = None
    if bias_dtype:
        bias = decode(encode(rng.normal(size=n).astype(np.float32), bias_dtype), bias_dtype)
    result = launch(lib, weight, x, dtype, bias, bias_dtype or "float32", **more)
    want = int4_linear(x, weight, bias)
    size = np.abs(x.astype(np.float64)) @ weight.magnitude().T
    if bias is not None:
        size = size + np.abs(bias)
    # Float32 sums of exact products, then one rounding.
    bound = size * 2.0**-24 * (4 + k**0.5) + np.abs(want) * HALF_ULP[dtype] + 2.0**-24
    worst = np.max(np.abs(decode(result.y, dtype) - want) / bound, initial=0.0)
    assert worst <= 1.0, (m, n, k, group, bits, affine, scale_dtype, dtype, bias_dtype, worst)
    assert result.extra == 0, "bank conflicts"
    return result


# --- the maps ------------------------------------------------------------------------------------


def test_slots_and_columns_are_permutations(library):
    rows = [library.cuda_slot_row(u, slot) for u in (0, 1) for slot in range(16)]
    assert sorted(rows) == list(range(32))
    columns = [library.cuda_column_k(i, c) for i in (0, 1) for c in range(16)]
    assert sorted(columns) == list(range(32))


@pytest.mark.parametrize("bits", [4, 8])
def test_lanes_find_every_code_once(library, bits):
    """What lane 4g + t copies holds, by code_place of the packed layout, its four rows and 8 k."""
    halves = bits // 4
    seen = set()
    for g, t in itertools.product(range(8), range(4)):
        own = {
            library.cuda_weight_byte(halves, ctypes.c_int(8 * t), half, g) + byte
            for half in range(halves)
            for byte in range(16)
        }
        for row, j in itertools.product(range(4), range(8)):
            bit = library.cuda_code_byte(bits, ctypes.c_int64(8 * t + j), 4 * (g & 3) + row)
            assert bit // 8 in own
            seen.add((g >> 2, bit))
    assert len(seen) == 32 * 32


def test_schedule_gives_every_unit_to_one_block(library):
    for chunks, tiles in [(1, 1), (1, 7), (3, 1), (5, 4), (32, 9), (13, 17)]:
        units = chunks * tiles
        for blocks in sorted({1, 2, 3, 5, units // 2 or 1, max(1, units - 1), units}):
            blocks = min(blocks, units)
            first = np.zeros(blocks + 1, np.int64)
            owners = np.zeros(units, np.int32)
            who = np.zeros((tiles, 2), np.int32)
            slots = np.zeros((tiles, 2), np.int64)
            library.cuda_schedule(
                chunks, tiles, blocks, *(ctypes.c_void_p(a.ctypes.data)
                                         for a in (first, owners, who, slots))
            )  # fmt: skip
            assert first[0] == 0
            assert first[-1] == units
            shares = np.diff(first)
            assert shares.min() >= 1
            assert shares.max() - shares.min() <= 1
            assert np.array_equal(owners, np.repeat(np.arange(blocks), shares))
            for tile in range(tiles):
                span = owners[tile * chunks : (tile + 1) * chunks]
                assert tuple(who[tile]) == (span[0], span[-1])
            # No two partial tiles meet in one slot.
            used = [
                slot for (a, b), pair in zip(who, slots) if a != b for slot in pair
            ]  # fmt: skip
            assert len(set(used)) == len(used)


MISUSES = [
    "global address outside",
    "misaligned source",
    "copy into it is unfinished",
    "another thread wrote",
    "a thread ended while others wait|a barrier without a thread",
    "another thread read",
    "before it was written",
    "outside shared memory",
    "packed fma that rounds",
    "misaligned global load",
]


@pytest.mark.parametrize("which", range(len(MISUSES)), ids=[m.split("|")[0] for m in MISUSES])
def test_model_stops_at_misuse(library, which):
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).cuda_misuse(int(sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-c", code, library._name, str(which)], capture_output=True, text=True
    )
    assert done.returncode < 0
    assert re.search(MISUSES[which], done.stderr), done.stderr


def test_model_counts_bank_conflicts(library):
    """32 lanes 128 bytes apart: 31 wavefronts too many for each of two warps; the loads before,
    16 bytes apart, meet every fourth bank: 3 too many."""
    library.cuda_misuse.restype = ctypes.c_int64
    assert library.cuda_misuse(len(MISUSES)) == 2 * (31 + 3)


# --- the whole kernel ----------------------------------------------------------------------------

TOKENS = [*range(1, 18), 33, 64]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("affine", [False, True])
def test_every_number_of_tokens_against_float64(library, dtype, bits, affine):
    """Every group size and scale type meets every kernel; N and K run through odd values."""
    rng = np.random.default_rng(bits + affine)
    groups = itertools.cycle(GROUPS)
    rest = itertools.cycle(
        itertools.product(["float16", "float32"], [None, "float32", "bfloat16", "float16"])
    )
    sizes = itertools.cycle([(17, 65), (1, 1), (40, 200), (33, 129), (16, 256), (3, 31), (70, 300)])
    for m in TOKENS:
        n, k = next(sizes)
        scale_dtype, bias_dtype = next(rest)
        check(
            library, rng, m, n, k, next(groups), bits, affine, scale_dtype, dtype, bias_dtype,
            blocks=1 + m % 4, x_pad=int(rng.integers(0, 3)), y_pad=int(rng.integers(0, 3)),
        )  # fmt: skip


@pytest.mark.parametrize("nt", [1, 2, 4, 8])
def test_every_format_in_every_kernel(library, nt):
    rng = np.random.default_rng(nt)
    m = 8 * nt - 3
    for group, bits, affine, scale_dtype, dtype in itertools.product(
        GROUPS, [4, 8], [False, True], ["float16", "float32"], ["bfloat16", "float16"]
    ):
        if nt >= 4 and (group in (64, 256) or scale_dtype == "float16"):
            continue
        check(library, rng, m, 20, 330, group, bits, affine, scale_dtype, dtype, nt=nt, blocks=2)


def test_every_tail_of_k(library):
    rng = np.random.default_rng(3)
    groups = itertools.cycle(GROUPS)
    for k in [*range(0, 20), *range(56, 74), *range(120, 137), 191, 192, 193, 255, 256, 257]:
        # Rows of x that are whole 16-byte units where K allows it, and odd rows.
        for x_pad in {0, -k % 8}:
            check(library, rng, 2, 18, k, next(groups), 4, True, "float16", "bfloat16", x_pad=x_pad)


def test_every_tail_of_n(library):
    rng = np.random.default_rng(4)
    for n in [*range(1, 36), 63, 64, 65, 127, 128, 129, 130, 255, 257]:
        check(library, rng, 3, n, 72, 32, 4, False, "float16", "float16", "float32", y_pad=n % 4)


@pytest.mark.parametrize("edge", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapter_rides_along(library, edge, dtype):
    rng = np.random.default_rng(edge)
    for (m, n, k), value_dtype, density, affine in zip(
        [(1, 40, 200), (9, 150, 330), (17, 33, 129), (3, 130, 64), (40, 70, 257), (2, 5, 31)],
        itertools.cycle(["float32", "bfloat16", "float16"]),
        [0.3, 0.1, 1.0, 0.5, 0.05, 1.0],
        itertools.cycle([False, True]),
    ):
        weight = random_weight(rng, n, k, 32, 4, affine, "float16")
        adapter = Adapter(rng, n, k, edge, density, value_dtype)
        x = decode(encode(rng.normal(size=(m, k)).astype(np.float32), dtype), dtype)
        more = dict(adapter=adapter, nt=min(token_tiles(m), 4))
        first = launch(library, weight, x, dtype, blocks=3, **more)
        assert first.extra == 0
        got = decode(first.y, dtype)
        values = adapter.dense  # as the products see them: rounded to x's type
        values = decode(encode(values.astype(np.float32), dtype), dtype).astype(np.float64)
        want = int4_linear(x, weight) + x.astype(np.float64) @ values.T
        size = np.abs(x.astype(np.float64)) @ (weight.magnitude() + np.abs(values)).T
        bound = size * 2.0**-24 * (8 + k**0.5) + np.abs(want) * HALF_ULP[dtype] + 2.0**-24
        assert (np.abs(got - want) <= bound).all(), (m, n, k, edge, value_dtype)
        order = rng.permutation(3)
        again = launch(library, weight, x, dtype, blocks=3, order=order, **more)
        assert np.array_equal(first.y, again.y)


def test_misaligned_x_and_views(library):
    rng = np.random.default_rng(5)
    for x_shift, x_pad in [(2, 0), (6, 8), (0, 3), (16, 8), (8, 0)]:
        check(
            library, rng, 5, 21, 136, 64, 4, False, "float32", "bfloat16", x_shift=x_shift,
            x_pad=x_pad,
        )  # fmt: skip


def test_many_token_tiles(library):
    rng = np.random.default_rng(6)
    for m, nt in [(17, 1), (64, 2), (65, 8), (128, 8)]:
        check(library, rng, m, 33, 200, 128, 4, True, "float16", "bfloat16", nt=nt, blocks=5)


def test_same_bits_in_any_order_of_blocks(library):
    """Whoever arrives last sums in the order of k: the order of arrival changes nothing."""
    rng = np.random.default_rng(7)
    weight = random_weight(rng, 150, 1100, 128, 4, True, "float16")
    x = decode(encode(rng.normal(size=(4, 1100)).astype(np.float32), "bfloat16"), "bfloat16")
    for blocks in (2, 5, 7, 18):
        first = launch(library, weight, x, "bfloat16", blocks=blocks)
        assert first.units == 18
        for _ in range(3):
            order = rng.permutation(blocks)
            again = launch(library, weight, x, "bfloat16", blocks=blocks, order=order)
            assert np.array_equal(first.y, again.y)


def test_products_are_the_fewest(library):
    """One unit of one warp: 4 steps, 2 x 2 products for each 8 tokens, 2 more for offsets."""
    rng = np.random.default_rng(8)
    for nt, warps in [(1, 4), (2, 4), (4, 8), (8, 8)]:
        for affine in (False, True):
            done = check(library, rng, 8 * nt, 16, 128, 128, 4, affine, "float16", "float16")
            assert done.products == warps * 4 * nt * (6 if affine else 4)


def check_extreme_scales_and_offsets(launch, library):
    """The trap of folding a magic number into an offset: large offsets beside small scales."""
    rng = np.random.default_rng(9)
    for bits, scale, dtype in itertools.product((4, 8), (1e-4, 1.0, 1e2), ("bfloat16", "float16")):
        weight = random_weight(rng, 20, 160, 32, bits, True, "float32")
        weight.scales[:] *= np.float32(scale)
        weight.offsets[:] = (rng.normal(size=weight.offsets.shape) * 10 * scale).astype(np.float32)
        x = decode(encode(rng.normal(size=(3, 160)).astype(np.float32), dtype), dtype)
        got = decode(launch(library, weight, x, dtype).y, dtype)
        want = int4_linear(x, weight)
        size = np.abs(x.astype(np.float64)) @ weight.magnitude().T
        bound = size * 2.0**-24 * 20 + np.abs(want) * HALF_ULP[dtype] + 2.0**-24
        assert (np.abs(got - want) <= bound).all(), (bits, scale, dtype)


def check_nan_and_infinity(launch, library):
    """A row of x with either says nothing of the others."""
    rng = np.random.default_rng(10)
    weight = random_weight(rng, 40, 100, 32, 4, False, "float32")
    clean = decode(encode(rng.normal(size=(6, 100)).astype(np.float32), "bfloat16"), "bfloat16")
    x = clean.copy()
    x[1, 7], x[3, 11] = np.nan, np.inf
    got, base = (decode(launch(library, weight, v, "bfloat16").y, "bfloat16") for v in (x, clean))
    rest = [0, 2, 4, 5]
    assert np.array_equal(got[rest], base[rest])
    assert np.isnan(got[1]).all()
    want = int4_linear(x, weight)[3]
    assert np.array_equal(np.isnan(got[3]), np.isnan(want))
    assert np.array_equal(got[3][~np.isnan(want)], want[~np.isnan(want)])


def test_extreme_scales_and_offsets(library):
    check_extreme_scales_and_offsets(launch, library)


def test_nan_and_infinity_stay_in_their_row(library):
    check_nan_and_infinity(launch, library)


def test_shared_memory_fits_every_gpu_it_is_built_for(library):
    """Two blocks on the 227 KiB of compute capability 9.0 where decoding lives (m <= 16), one for
    more rows, and at least up to 32 rows on the 99 KiB of 8.6, 8.9 and 12.0."""
    for nt, bits, affine in itertools.product((1, 2, 4, 8), (4, 8), (0, 1)):
        need = library.cuda_shared_bytes(nt, bits, affine)
        assert 0 < need <= 163 * 1024
        if nt <= 2:
            assert need <= 113 * 1024
        if nt <= 4:
            assert need <= 99 * 1024, (nt, bits, affine, need)
