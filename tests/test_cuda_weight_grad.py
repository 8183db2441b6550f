"""The CUDA block_weight_grad kernel without a GPU: its very body over a software model.

The model (csrc/common/cuda_emulation.h) runs every thread of every block, with asynchronous copies
that land as late as they may, transposed matrix loads and products by the fragment layouts of the
PTX manual, a check of every address, and a race detector. Results are compared with float64.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference import HALF_ULP, bf16_bits_to_f32, f32_to_bf16_bits

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
]
TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
BLOCKS = (32, 64, 128)
DTYPES = ("bfloat16", "float16")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    out = tmp_path_factory.mktemp("cuda") / "libcuda_weight_grad.so"
    source = ROOT / "tests/cpp/cuda_weight_grad.cpp"
    built = subprocess.run(
        ["g++", *FLAGS, str(source), "-o", str(out)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-4000:]
    return ctypes.CDLL(str(out))


def encode(a, dtype):
    if dtype == "float32":
        return np.ascontiguousarray(a, np.float32)
    if dtype == "bfloat16":
        return f32_to_bf16_bits(np.ascontiguousarray(a, np.float32)).reshape(a.shape)
    return np.ascontiguousarray(a, np.float32).astype(np.float16).view(np.uint16)


def decode(a, dtype):
    if dtype == "float32":
        return a
    if dtype == "bfloat16":
        return bf16_bits_to_f32(a).reshape(a.shape)
    return a.view(np.float16).astype(np.float32)


def aligned(shape, dtype, shift=0):
    """An array that begins `shift` bytes behind a multiple of 64."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 128 + shift, np.uint8)
    at = -raw.ctypes.data % 64 + shift
    return raw[at : at + size].view(dtype).reshape(shape)


def rows_of(a, dtype, pad, shift):
    """Stored rows with NaN between them."""
    out = aligned((a.shape[0], a.shape[1] + pad), np.uint16, shift)
    out[:] = 0x7FFF
    out[:, : a.shape[1]] = encode(a, dtype)
    return out


def pointer(a):
    return None if a is None else ctypes.c_void_p(a.ctypes.data)


class Problem:
    """g, x and a list of blocks; what a block of the product is, in float64."""

    def __init__(self, rng, m, n, k, block, dtype, density=0.4, mask=None):
        self.m, self.n, self.k, self.block, self.dtype = m, n, k, block, dtype
        self.g = decode(encode(rng.normal(size=(m, n)), dtype), dtype)
        self.x = decode(encode(rng.normal(size=(m, k)), dtype), dtype)
        if mask is None:
            mask = rng.random((-(-n // block), -(-k // block))) < density
            mask[-1, -1] = True
        self.blocks = np.argwhere(mask)
        self.col = np.ascontiguousarray(self.blocks[:, 1], np.int32)
        self.row_ptr = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int32)

    def want(self, magnitude=False):
        g, x = (a.astype(np.float64) for a in (self.g, self.x))
        if magnitude:
            g, x = np.abs(g), np.abs(x)
        b = self.block
        full = np.zeros((-(-self.n // b) * b, -(-self.k // b) * b))
        full[: self.n, : self.k] = g.T @ x
        return np.stack([full[b * i : b * i + b, b * j : b * j + b] for i, j in self.blocks])

    def launch(self, lib, out_type="float32", parts=0, order=None, pads=(0, 0), shift=0):
        count, b = len(self.blocks), self.block
        wide = out_type == "float32"
        out = aligned((count, b, b), np.uint32 if wide else np.uint16)
        out[:] = 0x7FFF  # every entry is written
        g = rows_of(self.g, self.dtype, pads[0], shift)
        x = rows_of(self.x, self.dtype, pads[1], shift)
        found = np.zeros(4, np.int64)
        order = None if order is None else np.ascontiguousarray(order, np.int32)
        lib.cuda_weight_grad_run(
            *map(ctypes.c_int64, (self.m, self.n, self.k, b, count)), pointer(g),
            ctypes.c_int64(g.shape[1]), pointer(x), ctypes.c_int64(x.shape[1]), TYPES[self.dtype],
            pointer(out), TYPES[out_type], pointer(self.row_ptr), pointer(self.col), parts,
            pointer(order), pointer(found),
        )  # fmt: skip
        return (out.view(np.float32) if wide else out), found

    def check(self, lib, out_type="float32", **more):
        stored, found = self.launch(lib, out_type, **more)
        got, want = decode(stored, out_type), self.want()
        bound = self.want(magnitude=True) * 2.0**-24 * (8 + self.m**0.5)
        bound += np.abs(want) * HALF_ULP.get(out_type, 2.0**-24) + 2.0**-24
        worst = np.max(np.abs(got - want) / bound)
        assert worst <= 1.0, (self.m, self.n, self.k, self.block, self.dtype, out_type, worst)
        assert found[1] == 0, "bank conflicts"
        return stored, found


# --- maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block, threads", [(32, 128), (64, 256), (128, 256)])
def test_tiles_cover_every_entry_once(library, block, threads):
    seen = np.zeros((128 // block, block, block), np.int32)
    assert library.cuda_grad_tiles(block, pointer(seen)) == threads
    assert (seen == 1).all()


def test_places_are_a_permutation(library):
    places = [library.cuda_grad_place(t, u) for t in range(32) for u in range(16)]
    assert sorted(places) == list(range(0, 32 * 16 * 16, 16))
    # Eight tokens of one unit, an 8 x 8 matrix, lie in different banks.
    for unit in range(16):
        assert len({library.cuda_grad_place(t, unit) % 128 for t in range(8)}) == 8


@pytest.mark.parametrize("side", [0, 1])
def test_transposed_loads_are_the_operands(library, side):
    """Against the fragments of m16n8k16 in the PTX manual; an entry is 256 token + column."""
    out = np.zeros((32, 4), np.uint32)
    library.cuda_load_transposed(side, pointer(out))
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        for register in range(4):
            for half in range(2):
                if side == 0:  # a: rows g, g + 8 of n; columns 2t .. and 2t + 8 .. are tokens
                    column, token = g + 8 * (register & 1), 2 * t + half + 8 * (register >> 1)
                else:  # b of two products: rows are tokens, column g of k
                    column, token = g + 8 * (register >> 1), 2 * t + half + 8 * (register & 1)
                got = int(out[lane, register]) >> (16 * half) & 0xFFFF
                assert got == 256 * token + column


def test_split_follows_the_shapes(library):
    """Parts are whole stages that cover all tokens, none of them empty; few blocks are cut."""
    split = np.zeros(2, np.int32)
    for runs in (1, 2, 5, 41, 82, 131, 132, 133, 264, 5000):
        for m in (0, 1, 31, 255, 256, 511, 512, 4096, 4097, 100_000):
            library.cuda_grad_split(ctypes.c_int64(runs), ctypes.c_int64(m), pointer(split))
            parts, tokens = map(int, split)
            assert parts >= 1
            assert tokens >= 32
            assert tokens % 32 == 0
            assert parts * tokens >= m
            assert m == 0 or (parts - 1) * tokens < m
            assert parts == 1 or tokens >= 256
            if runs >= 264 or m < 512:
                assert parts == 1
            if runs <= 132 and m >= 4096:
                assert parts > 1
    assert library.cuda_grad_shared_bytes() <= 99 * 1024


# --- the whole kernel ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_tail_against_float64(library, block, dtype):
    rng = np.random.default_rng(block)
    outs = ("float32", dtype)
    for i, (m, dn, dk) in enumerate(
        [(1, 0, 0), (31, 1, -3), (33, -5, 8), (64, 8, 1), (130, -9, 5)]
    ):
        n, k = 2 * block + dn, 3 * block + dk
        Problem(rng, m, n, k, block, dtype).check(library, outs[i % 2])
    # Smaller than a block in both directions, and rows that 16-byte copies may take.
    Problem(rng, 40, 3, 5, block, dtype, 1.0).check(library, "float32")
    Problem(rng, 40, 24, 40, block, dtype, 1.0).check(library, dtype)


@pytest.mark.parametrize("block", BLOCKS)
def test_empty_tokens_give_zeros(library, block):
    rng = np.random.default_rng(1)
    stored, _ = Problem(rng, 0, block + 3, block, block, "bfloat16").launch(library)
    assert (stored == 0).all()


def test_runs_of_every_mix_of_block_rows(library):
    """Four neighbours of the list in one block row, in four, and everything between."""
    rng = np.random.default_rng(2)
    for columns in ([4], [1, 1, 1, 1], [2, 2], [3, 1], [1, 3], [1, 2, 1], [0, 0, 2, 0, 1], [5, 2]):
        mask = np.zeros((len(columns), 5), bool)
        for row, count in enumerate(columns):
            mask[row, rng.permutation(5)[:count]] = True
        n, k = 32 * len(columns), 32 * 5
        Problem(rng, 48, n, k, 32, "float16", mask=mask).check(library)
        wide = mask[:, :3] if mask[:, :3].any() else mask[:, 2:]
        n, k = 64 * len(columns), 64 * 3
        Problem(rng, 33, n, k, 64, "bfloat16", mask=wide).check(library)


def test_misaligned_operands(library):
    rng = np.random.default_rng(3)
    for pads, shift in [((0, 3), 0), ((8, 0), 0), ((5, 8), 0), ((0, 0), 2), ((8, 8), 16)]:
        Problem(rng, 37, 64, 96, 32, "bfloat16").check(library, pads=pads, shift=shift)


@pytest.mark.parametrize("block", BLOCKS)
def test_parts_are_summed_in_order(library, block):
    """Whoever arrives last sums from the first tokens on: the order of arrival changes nothing."""
    rng = np.random.default_rng(4)
    problem = Problem(rng, 200, 2 * block, block, block, "bfloat16", 0.6)
    runs = -(-len(problem.blocks) // (128 // block))
    for parts in (2, 7):
        first, found = problem.check(library, parts=parts)
        assert found[3] == parts
        for _ in range(2 if block < 128 else 1):
            again, _ = problem.launch(library, parts=parts, order=rng.permutation(runs * parts))
            assert np.array_equal(first.view(np.uint32), again.view(np.uint32))


def test_launcher_splits_long_sums(library):
    rng = np.random.default_rng(5)
    _, found = Problem(rng, 600, 64, 64, 32, "float16", 1.0).check(library, "float16")
    assert found[3] == 2


def test_products_are_the_fewest(library):
    """A warp's tile of 32 x 32 takes 8 products for every 16 tokens, of 64 x 32 16."""
    rng = np.random.default_rng(6)
    for block in BLOCKS:
        _, found = Problem(rng, 64, 128, 128, block, "bfloat16", 1.0).check(library)
        assert found[2] == 64 // 16 * (128 // 16) * (128 // 8)


def test_nan_and_infinity_stay_in_their_rows(library):
    rng = np.random.default_rng(7)
    problem = Problem(rng, 40, 50, 70, 32, "bfloat16", 1.0)
    clean, _ = problem.launch(library)
    problem.g[3, 7], problem.x[5, 11] = np.nan, np.inf
    got, _ = problem.launch(library)
    touched = np.zeros((64, 96), bool)
    touched[7], touched[:, 11] = True, True
    tiles = np.stack(
        [touched[32 * i : 32 * i + 32, 32 * j : 32 * j + 32] for i, j in problem.blocks]
    )
    assert np.array_equal(got[~tiles], clean[~tiles])
    with np.errstate(invalid="ignore"):
        want = problem.want()
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert not np.isnan(want[tiles]).all()


def test_a_list_that_was_not_checked_reads_nothing_else(library):
    """Columns and rows outside the matrices: the model would stop at an address outside."""
    rng = np.random.default_rng(8)
    problem = Problem(rng, 40, 64, 64, 32, "bfloat16", 1.0)
    problem.col[:] = [-1, 2, 1 << 26, 1]
    stored, _ = problem.launch(library)
    assert (stored[:3] == 0).all()
    problem.row_ptr[:] = [0, 0, 1]  # three blocks without a row
    problem.launch(library)


MISUSES = ["before it was written", "another thread read", "misaligned place", "outside shared"]


@pytest.mark.parametrize("which", range(len(MISUSES)), ids=MISUSES)
def test_model_stops_at_misuse_of_transposed_loads(library, which):
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).cuda_grad_misuse(int(sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-c", code, library._name, str(which)], capture_output=True, text=True
    )
    assert done.returncode < 0
    assert re.search(MISUSES[which], done.stderr), done.stderr
