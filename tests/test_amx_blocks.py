"""The block-sparse AMX kernels on machines without AMX, over the software model of the tiles."""

from __future__ import annotations

import ctypes
import itertools
import subprocess

import numpy as np
import pytest
import reference as ref
from harness import store
from reference_blocks import Blocks, layout, random_blocks
from test_amx_emulation import FLAGS, ROOT, from_bf16, pytestmark, to_bf16  # noqa: F401

BLOCKS = (16, 32, 64, 128)
SIZES = ((1, 1), (17, 118), (130, 300), (257, 129))
ROWS = (5, 16, 17, 31, 50)
TYPES = {"float32": 0, "bfloat16": 1}
I64 = ctypes.c_int64


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    out = tmp_path_factory.mktemp("amx") / "libamx_blocks.so"
    sources = [
        ROOT / "tests/cpp/amx_blocks.cpp",
        ROOT / "csrc/int4_linear/cpu.cpp",
        ROOT / "csrc/int4_linear/cpu_amx_bf16.cpp",
        *sorted((ROOT / "csrc/block_sparse_linear").glob("cpu_amx*.cpp")),
    ]
    flags = [f if "version-script" not in f else f.replace("amx_emulation.map", "amx_blocks.map")
             for f in FLAGS]  # fmt: skip
    built = subprocess.run(
        ["g++", *flags, *map(str, sources), "-o", str(out)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-4000:]
    lib = ctypes.CDLL(str(out))
    lib.blocks_packed_bytes.restype = I64
    return lib


def address(a):
    return None if a is None else ctypes.c_void_p(a.ctypes.data)


def rows(rng, m, width, gap=3):
    """bfloat16 bits [m, width + gap]; NaN behind the end of each row."""
    x = np.full((m, width + gap), np.nan, np.float32)
    x[:, :width] = rng.normal(0, 1, (m, width))
    return to_bf16(x)


def case(rng, i, n, k, block):
    """Blocks with rubbish outside of [N, K], in float32 or bfloat16."""
    blocks = random_blocks(rng, n, k, block, (0.3, 1.0, 0.0, 0.6)[i % 4])
    if len(blocks.index):
        if n % block:
            blocks.values[blocks.index[:, 0] == blocks.grid[0] - 1, n % block :] = np.nan
        if k % block:
            blocks.values[blocks.index[:, 1] == blocks.grid[1] - 1, :, k % block :] = np.inf
    v_type = ("float32", "bfloat16")[i // 4 % 2]
    rounded = Blocks(blocks.index, from_bf16(to_bf16(blocks.values)), n, k)
    return blocks, v_type, rounded.dense()


def product(lib, dx, blocks, v_type, x, width, bias=None, y0=None, threads=1):
    n, k = blocks.out_features, blocks.in_features
    out = k if dx else n
    y = to_bf16(np.full((len(x), out + 2), 7.0, np.float32))
    values, lay = store(blocks.values, v_type), layout(blocks)
    lib.blocks_product(
        dx, I64(n), I64(k), I64(blocks.block), I64(len(blocks.index)), address(lay),
        address(values), TYPES[v_type], I64(len(x)), address(x), I64(x.shape[1]), address(y),
        I64(y.shape[1]), address(bias), 0, address(y0), I64(0 if y0 is None else y0.shape[1]),
        threads,
    )  # fmt: skip
    assert (from_bf16(y[:, out:]) == 7).all(), "wrote behind the end of a row"
    return y[:, :out]


def close(got, x, w, extra=(), bits=8, what=""):
    want, size = x @ w.T, np.abs(x) @ np.abs(w).T
    for e in extra:
        want, size = want + e, size + np.abs(e)
    bound = size * 2.0**-24 * (4 + x.shape[1] ** 0.5) + np.abs(want) * 2.0**-bits + 1e-30
    worst = np.max(np.abs(got - want) / bound, initial=0.0)
    assert worst <= 1, (what, worst)


@pytest.mark.parametrize("dx", [0, 1], ids=["forward", "dx"])
def test_products(library, dx):
    rng = np.random.default_rng(1 + dx)
    for i, ((n, k), block, m) in enumerate(itertools.product(SIZES, BLOCKS, ROWS)):
        blocks, v_type, dense = case(rng, i, n, k, block)
        width = n if dx else k
        x = rows(rng, m, width)
        bias = y0 = None
        extra = []
        if not dx and i % 2:
            bias = rng.normal(0, 1, n).astype(np.float32)
            extra.append(bias)
        if not dx and i % 3 == 0:
            y0 = rows(rng, m, n)
            extra.append(from_bf16(y0[:, :n]).astype(np.float64))
        y = from_bf16(product(library, dx, blocks, v_type, x, width, bias, y0, 1 + i % 3))
        xf = from_bf16(x[:, :width]).astype(np.float64)
        close(y, xf, dense.T if dx else dense, extra, what=(dx, n, k, block, m, v_type))


def test_many_rows_passes_and_threads(library):
    """Several chunks, several passes; the same bits whatever the threads and the company."""
    rng = np.random.default_rng(3)
    for dx, (n, k, block, m) in itertools.product(
        (0, 1), ((40, 700, 16, 200), (70, 1000, 32, 530), (130, 2000, 64, 300))
    ):
        n, k = (k, n) if dx else (n, k)
        blocks = random_blocks(rng, n, k, block, 0.8)
        width = n if dx else k
        x = rows(rng, m, width)
        first = product(library, dx, blocks, "bfloat16", x, width)
        w = Blocks(blocks.index, from_bf16(to_bf16(blocks.values)), n, k).dense()
        xf = from_bf16(x[:, :width]).astype(np.float64)
        close(from_bf16(first), xf, w.T if dx else w, what=(dx, n, k))
        for threads in (2, 3, 7):
            again = product(library, dx, blocks, "bfloat16", x, width, threads=threads)
            assert np.array_equal(first, again)
        part = product(library, dx, blocks, "bfloat16", x[37:90].copy(), width, threads=2)
        assert np.array_equal(first[37:90], part)


def test_weight_grad(library):
    rng = np.random.default_rng(4)
    cases = itertools.product(SIZES, BLOCKS, (1, 17, 50, 600))
    for i, ((n, k), block, m) in enumerate(cases):
        if m == 600 and (block > 32 or n > 200):
            continue
        blocks, _, _ = case(rng, i, n, k, block)
        g, x = rows(rng, m, n), rows(rng, m, k)
        lay, count = layout(blocks), len(blocks.index)
        out_type = i // 2 % 2
        results = []
        for threads in (1, 3):
            out = np.full((count, block, block), 9, np.uint16 if out_type else np.float32)
            library.blocks_grad(
                I64(n), I64(k), I64(block), I64(count), address(lay), I64(m), address(g),
                I64(g.shape[1]), address(x), I64(x.shape[1]), address(out), out_type, threads,
            )  # fmt: skip
            results.append(out)
        assert np.array_equal(results[0], results[1])
        got = from_bf16(results[0]) if out_type else results[0]
        gf, xf = (from_bf16(a[:, :w]).astype(np.float64) for a, w in ((g, n), (x, k)))
        want, size = blocks.gather(gf.T @ xf), blocks.gather(np.abs(gf).T @ np.abs(xf))
        bound = size * 2.0**-24 * (4 + m**0.5) + np.abs(want) * 2.0 ** (-8 if out_type else -24)
        assert (np.abs(got - want) <= bound + 1e-30).all(), (n, k, block, m)
        assert (got[size == 0] == 0).all()


@pytest.mark.parametrize("dx", [0, 1], ids=["forward", "dx"])
def test_fused(library, dx):
    rng = np.random.default_rng(5)
    cases = itertools.product(((17, 118), (130, 300), (70, 64)), BLOCKS, (5, 17, 40, 530))
    for i, ((n, k), block, m) in enumerate(cases):
        if m == 530 and (n > 100 or block == 16):
            continue
        blocks, v_type, dense = case(rng, i, n, k, block)
        weight = ref.random_weight(rng, n, k, 32)
        packed = ref.pack(weight)
        assert packed.size == library.blocks_packed_bytes(I64(n), I64(k))
        rank = (0, 3, 20)[i % 3]
        a = rng.normal(0, 0.3, (rank, k)).astype(np.float32)
        c = rng.normal(0, 0.3, (n, rank)).astype(np.float32)
        width, out = (n, k) if dx else (k, n)
        x = rows(rng, m, width)
        bias = None if dx else rng.normal(0, 1, n).astype(np.float32)
        values, lay = store(blocks.values, v_type), layout(blocks)
        results = []
        for threads in (1, 2):
            y = to_bf16(np.full((m, out + 2), 7.0, np.float32))
            library.blocks_fused(
                dx, I64(n), I64(k), I64(block), I64(len(blocks.index)), address(lay),
                address(values), TYPES[v_type], address(packed), I64(m), address(x),
                I64(x.shape[1]), address(y), I64(y.shape[1]), address(bias), I64(rank),
                address(a) if rank else None, address(c) if rank else None, threads,
            )  # fmt: skip
            assert (from_bf16(y[:, out:]) == 7).all()
            results.append(y[:, :out])
        assert np.array_equal(results[0], results[1])
        q = from_bf16(to_bf16(weight.dense().astype(np.float32))).astype(np.float64)
        xf = from_bf16(x[:, :width]).astype(np.float64)
        parts = [q, dense, c.astype(np.float64) @ a.astype(np.float64)]
        parts = [p.T if dx else p for p in parts]
        want = sum(xf @ p.T for p in parts) + (0 if dx else bias)
        size = sum(np.abs(xf) @ np.abs(p).T for p in parts) + (0 if dx else np.abs(bias))
        inner, outer = (c.T, a.T) if dx else (a, c)
        size = size + np.abs(xf) @ np.abs(inner).T @ np.abs(outer).T
        bound = size * 2.0**-24 * (8 + width**0.5 + rank) + np.abs(want) * 2.0**-8
        worst = np.max(np.abs(from_bf16(results[0]) - want) / bound)
        assert worst <= 1, (dx, n, k, block, m, rank, worst)
