"""The wgmma tile kernel of int4_linear without a GPU: its very body over a software model.

The model (csrc/common/cuda_emulation_sm90a.h) runs every thread of every block, decodes matrix
descriptors and tensor maps as the PTX manual has them, lands copies and finishes products as late
as the hardware may, and stops at races, deadlocks and wrong addresses. Results are compared with
the float64 oracle.
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
from reference import HALF_ULP, Weight, int4_linear, pack, random_weight
from test_cuda_decode import (
    FLAGS,
    GROUPS,
    TYPES,
    aligned,
    check_extreme_scales_and_offsets,
    check_nan_and_infinity,
    decode,
    encode,
)

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    out = tmp_path_factory.mktemp("cuda") / "libcuda_tile.so"
    source = ROOT / "tests/cpp/cuda_tile.cpp"
    built = subprocess.run(
        ["g++", *FLAGS, str(source), "-o", str(out)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-4000:]
    lib = ctypes.CDLL(str(out))
    lib.cuda_tile_run.restype = ctypes.c_int64
    lib.cuda_tile_descriptor.restype = ctypes.c_uint64
    return lib


class Result:
    def __init__(self, y, units, loads, extra, products):
        self.y, self.units, self.loads = y, units, loads
        self.extra, self.products = extra, products


def launch(
    lib, weight: Weight, x, dtype, bias=None, bias_dtype="float32", tokens=64, blocks=3, order=None,
    x_pad=0, x_shift=0, y_pad=0,
) -> Result:  # fmt: skip
    m, k = x.shape
    n = weight.out_features
    packed = aligned((pack(weight).size,), np.uint8)
    packed[:] = pack(weight)
    stride = -(-(k + x_pad) // 8) * 8
    rows = aligned((m, stride), np.uint16, x_shift)
    rows[:, k:] = 0x7FFF  # NaN between the rows
    rows[:, :k] = encode(x, dtype)
    y = aligned((m, n + y_pad), np.uint16)
    y[:] = 0x1234
    kept = None if bias is None else encode(bias, bias_dtype)
    order = np.arange(blocks) if order is None else np.asarray(order)
    order = np.ascontiguousarray(order, np.int32)
    found = np.zeros(3, np.int64)
    units = lib.cuda_tile_run(
        *map(ctypes.c_int64, (n, k, weight.group_size)),
        weight.bits,
        int(weight.affine),
        TYPES[weight.scale_dtype],
        ctypes.c_void_p(packed.ctypes.data),
        ctypes.c_int64(m),
        ctypes.c_void_p(rows.ctypes.data),
        ctypes.c_int64(stride),
        ctypes.c_void_p(y.ctypes.data),
        ctypes.c_int64(n + y_pad),
        TYPES[dtype],
        None if kept is None else ctypes.c_void_p(kept.ctypes.data),
        TYPES[bias_dtype],
        tokens,
        blocks,
        ctypes.c_void_p(order.ctypes.data),
        ctypes.c_void_p(found.ctypes.data),
    )
    assert units > 0, units
    assert (y[:, n:] == 0x1234).all(), "wrote behind the end of a row"
    return Result(y[:, :n].copy(), units, *map(int, found))


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


@pytest.mark.parametrize("bits", [4, 8])
def test_fragments_hold_every_code_once(library, bits):
    """Lane 4g + t finds, by code_place of the packed layout, the pairs that m64n..k16 wants of it:
    slots g and g + 8; columns 2t, 2t + 1 of one line of 8 k, 2t + 8, 2t + 9 of the next."""
    assert sorted(library.cuda_tile_slot_row(s) for s in range(16)) == list(range(16))
    seen = set()
    for line, g, t, slot in itertools.product(range(16), range(8), range(4), range(2)):
        row = library.cuda_tile_slot_row(g + 8 * slot)
        bit = library.cuda_tile_code_bit(bits, line, g, t, slot)
        assert bit == library.cuda_code_bit(bits, 8 * line + 2 * t, row)
        assert bit + 16 == library.cuda_code_bit(bits, 8 * line + 2 * t + 1, row)
        seen |= {bit, bit + 16}
    assert len(seen) == 16 * 128


def test_matrix_descriptor(library):
    """Bit fields one by one, and the elements it names: k of a product contiguous in two units of
    16 bytes that stand where the 128-byte swizzle of a tensor map puts them."""
    for address in (0, 1024, 2048 + 32, 229376 + 96):
        d = library.cuda_tile_descriptor(address)
        assert d & 0x3FFF == address >> 4
        assert d >> 16 & 0x3FFF == 1
        assert d >> 32 & 0x3FFF == 1024 >> 4
        assert d >> 49 & 7 == 0
        assert d >> 62 == 1
        assert d & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 3 << 62) == 0
    base = 3 << 10  # where the model's shared memory begins
    for tokens in (64, 128):
        seen = set()
        for product in range(8):
            begin = library.cuda_tile_product_byte(tokens, product)
            d = ctypes.c_uint64(library.cuda_tile_descriptor(base + begin))
            for token, k in itertools.product(range(tokens), range(16)):
                at = 16 * product + k
                box, inside = divmod(at, 64)
                unit = (inside // 8) ^ (token % 8)
                want = box * tokens * 128 + token * 128 + unit * 16 + inside % 8 * 2
                assert library.cuda_operand_place(d, token, k) == want
                seen.add(want)
        assert len(seen) == tokens * 128


def test_tensor_map(library):
    out = np.zeros(7, np.int64)

    def ask(m, k, stride, tokens, is_bf16):
        library.cuda_tile_map(
            ctypes.c_uint64(4096), *map(ctypes.c_int64, (m, k, stride)), tokens, is_bf16,
            ctypes.c_void_p(out.ctypes.data),
        )  # fmt: skip
        return tuple(out)

    # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 is 9, _FLOAT16 6; CU_TENSOR_MAP_SWIZZLE_128B is 3.
    assert ask(300, 577, 584, 64, 1) == (577, 300, 1168, 64, 64, 9, 3)
    assert ask(300, 577, 584, 128, 0) == (577, 300, 1168, 64, 128, 6, 3)
    assert ask(1, 577, 3, 64, 1)[2] == 1168


def test_shapes_fit_a_multiprocessor(library):
    """227 KiB of shared memory, at least 4 stages; sums and part leave room in 240 registers."""
    out = np.zeros(4, np.int32)
    for tokens, bits, affine in itertools.product((64, 128), (4, 8), (0, 1)):
        library.cuda_tile_shape(tokens, bits, affine, ctypes.c_void_p(out.ctypes.data))
        stage, stages, shared, registers = map(int, out)
        assert stage % 1024 == 0
        assert stages >= 4
        assert stages * stage < shared <= 227 * 1024
        assert registers <= 128


# --- the model -----------------------------------------------------------------------------------

MISUSES = [
    "a swizzle the model does not know",
    "a tensor map the driver would refuse",
    "barrier that was not fenced",
    "more arrivals than the barrier counts",
    # One arrival too many ends the phase early: its waiters meet the copy.
    "more arrivals than the barrier counts|copy into it is unfinished",
    "wait for one another",
    "more bytes came than",
    "copy into it is unfinished|read before it was written",
    "a product without its fence",
    "does not begin at 1024",
    "a swizzle the model does not know",
    "ask for different products",
    "outside shared memory|read before it was written",
    "fragments changed",
    "sums touched",
    "products that nobody waited for",
    "written without a barrier behind a read",
    "written without a barrier behind a read",
    "written without a barrier behind a read",
]


@pytest.mark.parametrize("which", range(len(MISUSES)))
def test_model_stops_at_misuse(library, which):
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).cuda_tile_misuse(int(sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-c", code, library._name, str(which)], capture_output=True, text=True
    )
    assert done.returncode < 0, MISUSES[which]
    assert re.search(MISUSES[which], done.stderr), done.stderr


def test_model_passes_what_is_right(library):
    library.cuda_tile_misuse(len(MISUSES))


# --- the whole kernel ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("affine", [False, True])
def test_every_format_against_float64(library, dtype, bits, affine):
    """Every group size, scale and bias type, both tiles; N, K and M run through odd values."""
    rng = np.random.default_rng(bits + affine)
    sizes = itertools.cycle(
        [(65, 17, 200), (100, 130, 65), (64, 1, 300), (3, 40, 129), (70, 150, 257), (130, 33, 72)]
    )
    biases = itertools.cycle([None, "float32", "bfloat16", "float16"])
    for i, (group, scale_dtype) in enumerate(itertools.product(GROUPS, ["float16", "float32"])):
        m, n, k = next(sizes)
        check(
            library, rng, m, n, k, group, bits, affine, scale_dtype, dtype, next(biases),
            tokens=64 << (i // 2 % 2), blocks=1 + i % 4, x_pad=8 * (i % 3), y_pad=i % 3,
        )  # fmt: skip


def test_every_tail_of_k(library):
    rng = np.random.default_rng(3)
    groups = itertools.cycle(GROUPS)
    for k in [*range(1, 18), *range(60, 70), *range(124, 133), 191, 192, 193, 255, 256, 257]:
        check(library, rng, 9, 18, k, next(groups), 4, True, "float16", "bfloat16")


def test_every_tail_of_n(library):
    rng = np.random.default_rng(4)
    for n in [*range(1, 19), 31, 32, 33, 63, 64, 65, 126, 127, 128, 129, 130, 255, 257]:
        check(library, rng, 5, n, 72, 32, 4, False, "float16", "float16", "float32", y_pad=n % 4)


@pytest.mark.parametrize("tokens", [64, 128])
def test_every_tail_of_m(library, tokens):
    rng = np.random.default_rng(tokens)
    for m in [1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 200, 300]:
        check(library, rng, m, 20, 136, 64, 4, True, "float32", "bfloat16", tokens=tokens, blocks=3)


@pytest.mark.parametrize("bits, affine, tokens", [(4, False, 64), (8, True, 128), (4, True, 128)])
def test_stages_go_round(library, bits, affine, tokens):
    """More chunks than stages, several times over, in one block and across tiles."""
    rng = np.random.default_rng(5)
    check(library, rng, 10, 30, 2700, 128, bits, affine, "float16", "bfloat16", tokens=tokens,
          blocks=1)  # fmt: skip
    check(library, rng, 2 * tokens, 140, 700, 32, bits, affine, "float16", "float16",
          tokens=tokens, blocks=2)  # fmt: skip


def test_same_bits_in_any_order_of_blocks(library):
    """Whoever arrives last sums in the order of k: the order of arrival changes nothing."""
    rng = np.random.default_rng(7)
    weight = random_weight(rng, 150, 1100, 128, 4, True, "float16")
    x = decode(encode(rng.normal(size=(70, 1100)).astype(np.float32), "bfloat16"), "bfloat16")
    for blocks in (2, 5, 7, 36):
        first = launch(library, weight, x, "bfloat16", blocks=blocks)
        assert first.units == 36
        again = launch(library, weight, x, "bfloat16", blocks=blocks, order=rng.permutation(blocks))
        assert np.array_equal(first.y, again.y)


def test_products_are_the_fewest(library):
    """One unit: 8 products of 16 k for each of the two warpgroups, offsets or not."""
    rng = np.random.default_rng(8)
    for tokens, affine in itertools.product((64, 128), (False, True)):
        done = check(library, rng, tokens, 128, 128, 128, 4, affine, "float16", "float16",
                     tokens=tokens)  # fmt: skip
        assert done.products == 16


def test_error_is_that_of_a_dense_bfloat16_product(library):
    """At most 1.1 times the error of the dense product of weights rounded to bfloat16."""
    rng = np.random.default_rng(9)
    weight = random_weight(rng, 128, 1024, 128, 4, True, "float16")
    x = decode(encode(rng.normal(size=(64, 1024)).astype(np.float32), "bfloat16"), "bfloat16")
    want = int4_linear(x, weight)
    dense = decode(encode(weight.dense().astype(np.float32), "bfloat16"), "bfloat16")
    sums = (x.astype(np.float64) @ dense.astype(np.float64).T).astype(np.float32)
    rounded = decode(encode(sums, "bfloat16"), "bfloat16")
    got = decode(launch(library, weight, x, "bfloat16", blocks=2).y, "bfloat16")
    ours, theirs = (np.linalg.norm(v - want) for v in (got, rounded))
    assert ours <= 1.1 * theirs


def test_extreme_scales_and_offsets(library):
    check_extreme_scales_and_offsets(launch, library)


def test_nan_and_infinity_stay_in_their_row(library):
    check_nan_and_infinity(launch, library)


def test_misaligned_x_has_no_tensor_map(library):
    rng = np.random.default_rng(11)
    weight = random_weight(rng, 16, 64, 64, 4, False, "float16")
    x = np.zeros((4, 64), np.float32)
    with pytest.raises(AssertionError, match="-2"):
        launch(library, weight, x, "bfloat16", x_shift=2)
