"""float64 oracles of the block-sparse operators, in NumPy alone; see `reference`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from reference import EPS32, HALF_ULP, LARGEST, SMALLEST


@dataclass
class Blocks:
    """A block list with its values: int [Z, 2] and float [Z, B, B] of an [N, K] weight."""

    index: np.ndarray
    values: np.ndarray
    out_features: int
    in_features: int

    @property
    def block(self) -> int:
        return self.values.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.out_features // self.block), -(-self.in_features // self.block)

    def dense(self) -> np.ndarray:
        """S in float64, written element by element from the definition."""
        rows, columns = self.grid
        out = np.zeros((rows * self.block, columns * self.block))
        for (row, column), block in zip(self.index, self.values.astype(np.float64)):
            r, c = row * self.block, column * self.block
            out[r : r + self.block, c : c + self.block] = block
        return out[: self.out_features, : self.in_features]

    def gather(self, dense: np.ndarray) -> np.ndarray:
        """The stored blocks of a dense [N, K]; zero outside it."""
        rows, columns = self.grid
        wide = np.zeros((rows * self.block, columns * self.block))
        wide[: self.out_features, : self.in_features] = dense
        parts = [
            wide[r * self.block : (r + 1) * self.block, c * self.block : (c + 1) * self.block]
            for r, c in self.index
        ]
        return np.stack(parts) if parts else np.zeros((0, self.block, self.block))


def random_blocks(rng, out_features, in_features, block, density=0.4, scale=1.0) -> Blocks:
    """A random choice of blocks; values everywhere, also where a ragged block leaves [N, K]."""
    rows, columns = -(-out_features // block), -(-in_features // block)
    chosen = rng.random((rows, columns)) < density
    index = np.argwhere(chosen)
    values = rng.normal(0, scale, (len(index), block, block)).astype(np.float32)
    return Blocks(index, values, out_features, in_features)


def layout(blocks: Blocks) -> np.ndarray:
    """The layout array, by counting."""
    rows, columns = blocks.grid
    pairs = [tuple(map(int, pair)) for pair in blocks.index]
    row_ptr = [sum(r < i for r, _ in pairs) for i in range(rows + 1)]
    col_ptr = [sum(c < j for _, c in pairs) for j in range(columns + 1)]
    order = sorted(range(len(pairs)), key=lambda z: (pairs[z][1], pairs[z][0]))
    parts = [row_ptr, [c for _, c in pairs], col_ptr, [pairs[z][0] for z in order], order]
    return np.array([v for part in parts for v in part], np.int32)


def check_product(y, x, w, extra=(), *, dtype, operand="float32", factor=1.0, what="") -> None:
    """Raises AssertionError unless y is close to x w^T plus the `extra` addends.

    The bound of an element: every product and every step of a float32 sum is rounded at its worst,
    in one direction. `operand` names the type that kernels may round the factors of a product to.
    """
    y, x, w = (np.asarray(a, np.float64) for a in (y, x, w))
    ref = x @ w.T
    size = np.abs(x) @ np.abs(w).T
    for addend in extra:
        ref = ref + addend
        size = size + np.abs(addend)
    assert y.shape == ref.shape, f"{what}: shape {y.shape}, expected {ref.shape}"
    terms = x.shape[-1] + 8
    step = terms * EPS32 + (0 if operand == "float32" else 2 * HALF_ULP[operand])
    bound = factor * (step * size + HALF_ULP[dtype] * np.abs(ref)) * 1.01
    bound = bound + SMALLEST[dtype] * terms
    good = np.abs(y - ref) <= bound
    good |= (np.abs(ref) + bound > LARGEST[dtype]) & (np.abs(y) == np.inf)
    if not good.all():
        at = tuple(int(i) for i in np.argwhere(~good)[0])
        raise AssertionError(
            f"{what}: {int((~good).sum())} of {y.size} elements are off; at {list(at)} got "
            f"{y[at]:.9g}, expected {ref[at]:.9g} +- {bound[at]:.3g}"
        )
