"""Every row of the block_scores table, on NumPy storage, against float64."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from harness import X_DTYPES, load, native, row_param, store
from reference_scores import check_scores, exact_scores, signs, sketched_scores
from test_guard_pages import Guarded, guarded_rows, walk_in_child

BLOCKS = (16, 32, 64, 128)
SIZES = ((1, 1), (17, 118), (118, 17), (32, 64), (130, 300), (257, 129), (300, 520))
ROWS = (1, 2, 5, 17, 127, 128, 129, 300)


KERNEL = pytest.mark.parametrize("kernel_id", list(map(row_param, native.block_scores_kernels())))


def rows_of(rng, m, width, dtype, gap=3):
    """[m, width] in storage, rows `gap` elements apart."""
    return store(rng.normal(0, 1, (m, width + gap)).astype(np.float32), dtype)[:, :width]


def grid(n, k, block):
    return -(-n // block), -(-k // block)


@KERNEL
def test_exact(kernel_id):
    rng = np.random.default_rng(1)
    for i, ((n, k), block, m) in enumerate(itertools.product(SIZES, BLOCKS, ROWS)):
        if m * n * k > 4_000_000 and (i % 4 or ".scalar." in kernel_id):
            continue
        g_type, x_type, w_type = X_DTYPES[i % 3], X_DTYPES[i // 2 % 3], X_DTYPES[i // 5 % 3]
        g, x = rows_of(rng, m, n, g_type), rows_of(rng, m, k, x_type)
        w = rows_of(rng, n, k, w_type)
        before = rng.random((2, *grid(n, k, block))).astype(np.float32)
        scores, movement = before.copy()
        what = f"{kernel_id} m={m} n={n} k={k} block={block} {g_type} {x_type} {w_type}"
        native.block_scores_run(
            kernel_id, scores, movement if i % 3 else None, g, x, w if i % 3 else None, block=block,
            threads=1 + i % 3,
        )  # fmt: skip
        g, x, w = (load(a, t) for a, t in ((g, g_type), (x, x_type), (w, w_type)))
        want, moved = exact_scores(g, x, w, block), None
        check_scores(scores, before[0] + want.scores, before[0], want.score_bound, what)
        if i % 3:
            moved = before[1] + want.movement
            check_scores(movement, moved, before[1], want.movement_bound, what)
        else:
            assert np.array_equal(movement, before[1]), what


@KERNEL
def test_sketch(kernel_id):
    rng = np.random.default_rng(2)
    cases = itertools.product(SIZES, BLOCKS, (1, 5, 128, 140), (1, 2, 3, 4, 7, 16, 17, 32))
    for i, ((n, k), block, m, samples) in enumerate(cases):
        if i % 3 and (n, k) != (130, 300):
            continue
        if m * n * k > 1_000_000 and ".scalar." in kernel_id:
            continue
        g_type, x_type = X_DTYPES[i % 3], X_DTYPES[i // 2 % 3]
        g, x = rows_of(rng, m, n, g_type), rows_of(rng, m, k, x_type)
        scores = np.zeros(grid(n, k, block), np.float32)
        native.block_scores_run(
            kernel_id, scores, None, g, x, block=block, sketch=samples, seed=i - 5,
            threads=1 + i % 3,
        )  # fmt: skip
        want = sketched_scores(load(g, g_type), load(x, x_type), block, samples, i - 5)
        what = f"{kernel_id} m={m} n={n} k={k} block={block} samples={samples}"
        check_scores(scores, want.scores, 0 * scores, want.score_bound, what)


def test_signs_are_fair_and_independent():
    s = signs(7, 4096)
    assert set(np.unique(s)) == {-1, 1}
    assert np.abs(s.mean(0)).max() < 5 / np.sqrt(4096)
    gram = s.T @ s / 4096 - np.eye(32)
    assert np.abs(gram).max() < 5 / np.sqrt(4096)
    assert (signs(8, 4096) != s).mean() == pytest.approx(0.5, abs=0.02)
    lag = (s[1:] * s[:-1]).mean(0)
    assert np.abs(lag).max() < 5 / np.sqrt(4096)


@KERNEL
def test_same_bits_at_any_thread_count_and_stride(kernel_id):
    rng = np.random.default_rng(3)
    n, k, m = 200, 700, 150
    g, x, w = (rng.normal(0, 1, s).astype(np.float32) for s in ((m, n), (m, k), (n, k)))
    for block, samples in itertools.product((16, 64), (0, 4)):
        found = []
        for threads in (1, 2, 5):
            room = np.zeros((3, *grid(n, k, block)[::-1]), np.float32)
            scores, movement = room[0].T, room[1].T
            movement = None if samples else movement
            native.block_scores_run(
                kernel_id, scores, movement, g, x, None if samples else w, block=block,
                sketch=samples, threads=threads,
            )  # fmt: skip
            found.append(room.copy())
        assert all(np.array_equal(found[0], other) for other in found[1:]), (block, samples)
        plain = np.zeros(grid(n, k, block), np.float32)
        native.block_scores_run(kernel_id, plain, None, g, x, block=block, sketch=samples)
        assert np.array_equal(plain, found[0][0].T)


@KERNEL
def test_nan_and_inf_stay_in_their_blocks(kernel_id):
    rng = np.random.default_rng(4)
    n, k, m = 70, 110, 9
    for samples, block in itertools.product((0, 4), (16, 32, 64)):
        g, x = rng.normal(0, 1, (m, n)).astype(np.float32), rng.normal(0, 1, (m, k))
        x = x.astype(np.float32)
        x[2, 109], g[3, 69] = np.inf, np.nan
        scores = np.zeros(grid(n, k, block), np.float32)
        native.block_scores_run(kernel_id, scores, None, g, x, block=block, sketch=samples)
        assert np.isfinite(scores[:-1, :-1]).all()
        assert np.isnan(scores[-1]).all()
        assert (scores[:-1, -1] == np.inf).all() or (
            samples and not np.isfinite(scores[:-1, -1]).any()
        )


@KERNEL
def test_no_rows_change_nothing(kernel_id):
    scores = np.full((2, 3), 5, np.float32)
    empty = np.zeros((0, 64), np.float32), np.zeros((0, 96), np.float32)
    native.block_scores_run(kernel_id, scores, None, *empty)
    assert (scores == 5).all()


def walk(kernel_id: str) -> int:
    """Runs one row behind guard pages; returns how many calls it served."""
    rng = np.random.default_rng(60)
    guards = {name: Guarded(1 << 19) for name in ("g", "x", "w", "scores", "movement")}
    served = 0
    shapes = itertools.product((1, 2, 17, 130), ((1, 1), (16, 33), (33, 127), (65, 300)), BLOCKS)
    for (m, (n, k), block), samples in itertools.product(shapes, (0, 1, 4, 17)):
        x_type, g_type = X_DTYPES[served % 3], X_DTYPES[served // 3 % 3]
        g = store(rng.normal(0, 1, (m, n)).astype(np.float32), g_type)
        x = store(rng.normal(0, 1, (m, k)).astype(np.float32), x_type)
        w = store(rng.normal(0, 1, (n, k)).astype(np.float32), x_type)
        expected = None
        for at_end, gap in ((True, 0), (False, 0), (True, 5)):
            print(kernel_id, m, n, k, block, samples, at_end, file=sys.stderr, flush=True)
            zeros = np.zeros(grid(n, k, block), np.float32)
            scores = guards["scores"].place(zeros, at_end)
            movement = None if samples else guards["movement"].place(zeros, at_end)
            native.block_scores_run(
                kernel_id, scores, movement, guarded_rows(guards["g"], g, gap, at_end),
                guarded_rows(guards["x"], x, gap, at_end),
                None if samples else guarded_rows(guards["w"], w, gap, at_end),
                block=block, sketch=samples,
            )  # fmt: skip
            bits = scores.tobytes() + (b"" if samples else movement.tobytes())
            expected = expected or bits
            if bits != expected:
                raise AssertionError(f"{kernel_id}: other bits than at other addresses")
        served += 1
    return served


@KERNEL
def test_row_stays_inside_its_buffers(kernel_id):
    assert walk_in_child(__file__, kernel_id, timeout=240) >= 100


def test_rows_are_ordered_and_forced():
    table = native.block_scores_kernels()
    levels = ("scalar", "avx2", "avx512", "avx512_vnni", "amx")
    order = [levels.index(row["isa"]) for row in table]
    assert order == sorted(order, reverse=True)
    assert order[-1] == 0
    native.set_cpu_isa("scalar")
    zeros = np.zeros((1, 1), np.float32)
    one = np.ones((1, 1), np.float32)
    from nibblock._errors import BackendUnavailable

    with pytest.raises(BackendUnavailable, match="needs avx2"):
        native.block_scores_run("block_scores.cpu.avx2.tile", zeros, None, one, one)
    with pytest.raises(ValueError, match="kernel_id must be one of"):
        native.block_scores_run("none", zeros, None, one, one)


if __name__ == "__main__":
    print(walk(sys.argv[1]))
