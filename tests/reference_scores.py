"""float64 oracles of block_scores, in NumPy alone, with bounds on what float32 sums may differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from reference import EPS32


@dataclass
class Scores:
    """Two statistics [rows, columns] and how far float32 arithmetic may stray from each."""

    scores: np.ndarray
    score_bound: np.ndarray
    movement: np.ndarray | None = None
    movement_bound: np.ndarray | None = None


def block_sums(dense: np.ndarray, high: int, wide: int) -> np.ndarray:
    """Sums of the high x wide blocks of a matrix, ragged ones included."""
    by_rows = np.add.reduceat(dense, np.arange(0, dense.shape[0], high), axis=0)
    return np.add.reduceat(by_rows, np.arange(0, dense.shape[1], wide), axis=1)


def _squares(p: np.ndarray, size: np.ndarray, m: int, terms: int, high: int, wide: int):
    """Sums of squares by blocks. Each p is off by at most e = (m + 2) eps size, so its square by
    2 |p| e + e^2, and a sum of `terms` of them by as many roundings more."""
    e = (m + 2) * EPS32 * size
    bound = block_sums(2 * np.abs(p) * e + e * e, high, wide)
    total = block_sums(p * p, high, wide)
    return total, bound + (terms + 2) * EPS32 * total


def exact_scores(g: np.ndarray, x: np.ndarray, w: np.ndarray, block: int) -> Scores:
    g, x, w = (a.astype(np.float64) for a in (g, x, w))
    p, size = g.T @ x, np.abs(g).T @ np.abs(x)
    scores, bound = _squares(p, size, len(g), block * block, block, block)
    moves = block_sums(np.abs(w) * size, block, block) * (len(g) + 2 + block * block) * EPS32
    return Scores(scores, bound, block_sums(w * p, block, block), moves)


def signs(seed: int, columns: int) -> np.ndarray:
    """[columns, 32] of -1 and 1: the generator of csrc/block_scores/block_scores.h."""

    def mix(v):
        v = (v ^ (v >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        v = (v ^ (v >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return v ^ (v >> np.uint64(31))

    step = 0x9E3779B97F4A7C15
    with np.errstate(over="ignore"):
        start = mix(np.array([(seed + step) % 2**64], np.uint64))
        counter = np.arange(1, columns + 1, dtype=np.uint64) * np.uint64(step)
        bits = mix(start + counter)
    minus = bits[:, None] >> np.arange(32, dtype=np.uint64) & np.uint64(1)
    return 1.0 - 2.0 * minus.astype(np.float64)


def sketched_scores(g: np.ndarray, x: np.ndarray, block: int, samples: int, seed: int) -> Scores:
    g, x = g.astype(np.float64), x.astype(np.float64)
    omega = signs(seed, x.shape[1])[:, :samples]
    starts = np.arange(0, x.shape[1], block)
    z = np.add.reduceat(x[:, :, None] * omega, starts, axis=1).reshape(
        len(x), len(starts) * samples
    )
    z_size = np.add.reduceat(np.abs(x), starts, axis=1).repeat(samples, axis=1)
    p, size = g.T @ z, np.abs(g).T @ z_size
    total, bound = _squares(p, size, len(g) + block, block * samples, block, samples)
    return Scores(total / samples, bound / samples)


@dataclass
class Gain:
    """Both sums [rows, columns] of block_gain, and how far float32 may stray from each."""

    gain: np.ndarray
    gain_bound: np.ndarray
    squares: np.ndarray
    squares_bound: np.ndarray


def gain_sums(g: np.ndarray, x: np.ndarray, block: int) -> Gain:
    """Token by token, by the formula. Where float32 cannot tell a gradient's sign, the bounds
    allow either."""
    g, x = g.astype(np.float64), x.astype(np.float64)
    middle = (len(g) + 1) // 2
    halves = slice(middle), slice(middle, None)
    rows, columns = -(-g.shape[1] // block), -(-x.shape[1] // block)
    out = Gain(*(np.zeros((rows, columns)) for _ in range(4)))
    for i, j in np.ndindex(rows, columns):
        gi, xj = g[:, i * block : (i + 1) * block], x[:, j * block : (j + 1) * block]
        for here, there in (halves, halves[::-1]):
            grad, size = gi[there].T @ xj[there], np.abs(gi[there]).T @ np.abs(xj[there])
            unsure = (np.abs(grad) <= (len(g) + 2) * EPS32 * size) & (size > 0)
            z = ((gi[here] @ np.sign(grad)) * xj[here]).sum(1)
            ag, ax = np.abs(gi[here]), np.abs(xj[here])
            e = (2 * block + 8) * EPS32 * ag.sum(1) * ax.sum(1) + 2 * ((ag @ unsure) * ax).sum(1)
            out.gain[i, j] += z.sum()
            out.gain_bound[i, j] += (e + 24 * EPS32 * np.abs(z)).sum()
            out.squares[i, j] += (z * z).sum()
            out.squares_bound[i, j] += (2 * np.abs(z) * e + e * e + 24 * EPS32 * z * z).sum()
    return out


def check_scores(got, want, before, bound, what="") -> None:
    """Raises AssertionError unless got is close to want; the addition itself rounds too."""
    limit = bound * 1.01 + 2 * EPS32 * (np.abs(want) + np.abs(before)) + 1e-37
    good = np.abs(got - want) <= limit
    if not good.all():
        at = tuple(int(i) for i in np.argwhere(~good)[0])
        raise AssertionError(
            f"{what}: {int((~good).sum())} of {got.size} scores are off; at {list(at)} got "
            f"{got[at]:.9g}, expected {want[at]:.9g} +- {limit[at]:.3g}"
        )
