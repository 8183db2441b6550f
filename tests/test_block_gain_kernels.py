"""Every row of the block_gain table, on NumPy storage, against float64."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from harness import X_DTYPES, load, native, row_param, store
from reference_scores import check_scores, gain_sums
from test_block_scores_kernels import BLOCKS, SIZES, grid, rows_of
from test_guard_pages import Guarded, guarded_rows, walk_in_child

ROWS = (1, 2, 3, 17, 33, 256, 257, 300)


KERNEL = pytest.mark.parametrize("kernel_id", list(map(row_param, native.block_gain_kernels())))


@KERNEL
def test_sums(kernel_id):
    rng = np.random.default_rng(1)
    for i, ((n, k), block, m) in enumerate(itertools.product(SIZES, BLOCKS, ROWS)):
        if m * n * k > 4_000_000 and (i % 4 or ".scalar." in kernel_id):
            continue
        g_type, x_type = X_DTYPES[i % 3], X_DTYPES[i // 2 % 3]
        g, x = rows_of(rng, m, n, g_type), rows_of(rng, m, k, x_type)
        before = rng.random((2, *grid(n, k, block))).astype(np.float32)
        gain, squares = before.copy()
        native.block_gain_run(kernel_id, gain, squares, g, x, block=block, threads=1 + i % 3)
        want = gain_sums(load(g, g_type), load(x, x_type), block)
        what = f"{kernel_id} m={m} n={n} k={k} block={block} {g_type} {x_type}"
        check_scores(gain, before[0] + want.gain, before[0], want.gain_bound, what)
        check_scores(squares, before[1] + want.squares, before[1], want.squares_bound, what)
        if m == 1:
            assert np.array_equal(np.stack([gain, squares]), before), what


@KERNEL
def test_small_integers_are_exact(kernel_id):
    """Gradients that are exactly 0 among them, whose sign is 0."""
    rng = np.random.default_rng(2)
    for (n, k), block, m in itertools.product(((70, 110), (130, 64)), BLOCKS, (2, 5, 21)):
        g, x = (rng.integers(-1, 2, (m, size)).astype(np.float32) for size in (n, k))
        sums = np.zeros((2, *grid(n, k, block)), np.float32)
        native.block_gain_run(kernel_id, *sums, g, x, block=block, threads=2)
        want = gain_sums(g, x, block)
        assert np.array_equal(sums[0], want.gain)
        assert np.array_equal(sums[1], want.squares)
        assert (want.gain != 0).any()


@KERNEL
def test_same_bits_at_any_thread_count_and_stride(kernel_id):
    rng = np.random.default_rng(3)
    n, k, m = 200, 700, 150
    if ".scalar." in kernel_id:
        n, k = 70, 200
    g, x = rng.normal(0, 1, (m, n)).astype(np.float32), rng.normal(0, 1, (m, k)).astype(np.float32)
    for block in (16, 64):
        found = []
        for threads in (1, 2, 5):
            room = np.zeros((3, *grid(n, k, block)[::-1]), np.float32)
            native.block_gain_run(
                kernel_id, room[0].T, room[1].T, g, x, block=block, threads=threads
            )
            found.append(room)
        assert all(np.array_equal(found[0], other) for other in found[1:]), block
        plain = np.zeros((2, *grid(n, k, block)), np.float32)
        native.block_gain_run(kernel_id, *plain, g, x, block=block)
        assert np.array_equal(plain, found[0][:2].transpose(0, 2, 1))


@KERNEL
def test_nan_and_inf_stay_in_their_blocks(kernel_id):
    rng = np.random.default_rng(4)
    n, k, m = 70, 110, 9
    for block in (16, 32, 64):
        g, x = rng.normal(0, 1, (m, n)).astype(np.float32), rng.normal(0, 1, (m, k))
        x = x.astype(np.float32)
        x[2, 109], g[3, 69] = np.inf, np.nan
        sums = np.zeros((2, *grid(n, k, block)), np.float32)
        native.block_gain_run(kernel_id, *sums, g, x, block=block)
        assert np.isfinite(sums[:, :-1, :-1]).all()
        assert not np.isfinite(sums[:, -1]).any()
        assert not np.isfinite(sums[:, :, -1]).any()


@KERNEL
def test_no_rows_change_nothing(kernel_id):
    sums = np.full((2, 2, 3), 5, np.float32)
    empty = np.zeros((0, 64), np.float32), np.zeros((0, 96), np.float32)
    native.block_gain_run(kernel_id, *sums, *empty)
    assert (sums == 5).all()


def walk(kernel_id: str) -> int:
    """Runs one row behind guard pages; returns how many calls it served."""
    rng = np.random.default_rng(60)
    guards = {name: Guarded(1 << 19) for name in ("g", "x", "gain", "squares")}
    served = 0
    shapes = itertools.product((1, 2, 17, 130), ((1, 1), (16, 33), (33, 127), (65, 300)), BLOCKS)
    for m, (n, k), block in shapes:
        x_type, g_type = X_DTYPES[served % 3], X_DTYPES[served // 3 % 3]
        g = store(rng.normal(0, 1, (m, n)).astype(np.float32), g_type)
        x = store(rng.normal(0, 1, (m, k)).astype(np.float32), x_type)
        expected = None
        for at_end, gap in ((True, 0), (False, 0), (True, 5)):
            print(kernel_id, m, n, k, block, at_end, file=sys.stderr, flush=True)
            zeros = np.zeros(grid(n, k, block), np.float32)
            gain, squares = (guards[name].place(zeros, at_end) for name in ("gain", "squares"))
            native.block_gain_run(
                kernel_id, gain, squares, guarded_rows(guards["g"], g, gap, at_end),
                guarded_rows(guards["x"], x, gap, at_end), block=block,
            )  # fmt: skip
            bits = gain.tobytes() + squares.tobytes()
            expected = expected or bits
            if bits != expected:
                raise AssertionError(f"{kernel_id}: other bits than at other addresses")
        served += 1
    return served


@KERNEL
def test_row_stays_inside_its_buffers(kernel_id):
    assert walk_in_child(__file__, kernel_id, timeout=240) >= 64


def test_rows_are_ordered_and_forced():
    table = native.block_gain_kernels()
    levels = ("scalar", "avx2", "avx512", "avx512_vnni", "amx")
    order = [levels.index(row["isa"]) for row in table]
    assert order == sorted(order, reverse=True)
    assert order[-1] == 0
    native.set_cpu_isa("scalar")
    zeros, one = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    from nibblock._errors import BackendUnavailable

    with pytest.raises(BackendUnavailable, match="needs avx2"):
        native.block_gain_run("block_gain.cpu.avx2.tile", zeros, zeros, one, one)
    with pytest.raises(ValueError, match="kernel_id must be one of"):
        native.block_gain_run("none", zeros, zeros, one, one)


if __name__ == "__main__":
    print(walk(sys.argv[1]))
