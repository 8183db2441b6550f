"""Oracles of muon_direction, in NumPy alone: the formula, and what it does to singular values.

The two have nothing in common but the coefficients. The first can also run in float32: what that
loses against float64 is the measure of what a kernel may lose.
"""

from __future__ import annotations

import numpy as np

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
BLOCKS = (16, 32, 64, 128)
HALF_ULP32, HALF_ULP16 = 2.0**-24, 2.0**-8  # of float32 and bfloat16, relative


def momentum_step(grad, buffer, momentum, nesterov, multiplier=1.0):
    """(u, m) in the arrays' dtype; buffer None: u = g, and m is None."""
    kind = grad.dtype.type
    g = grad * kind(multiplier)
    if buffer is None:
        return g, None
    m = kind(momentum) * buffer + g
    return (g + kind(momentum) * m if nesterov else m), m


def direction(u, steps=5):
    """The formula for [Z, B, B] in u's dtype; blocks of zeros stay zeros."""
    a, b, c = (u.dtype.type(x) for x in COEFFICIENTS)
    norm = np.sqrt((u * u).sum((1, 2), keepdims=True))
    x = np.divide(u, norm, out=np.zeros_like(u), where=norm != 0)
    eye = np.eye(u.shape[-1], dtype=u.dtype)
    for _ in range(steps):
        gram = x.transpose(0, 2, 1) @ x
        x = x @ (a * eye + b * gram + c * (gram @ gram))
    return x


def stretched(s, steps=5):
    """What the iteration makes of singular values of a block whose norm is 1."""
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = s * (a + b * s**2 + c * s**4)
    return s


def errors(got, want):
    """The Frobenius error of each block."""
    return np.sqrt(((got.astype(np.float64) - want) ** 2).sum((1, 2)))


def allowed(u, steps=5):
    """[Z] Frobenius errors that float32 may make: four times what NumPy's float32 makes of the
    worst of these blocks, as the order of a sum is free. Small singular values grow by 3.4 a step,
    and with them the rounding beside them: so it is measured, on the blocks at hand."""
    if not len(u):
        return np.zeros(0)
    worst = errors(direction(u.astype(np.float32), steps), direction(u, steps)).max()
    return np.full(len(u), 4 * (worst + HALF_ULP32 * np.sqrt(u.shape[-1])))


def gaussian(rng, count, block):
    return rng.normal(0, 1, (count, block, block)).astype(np.float32)


def conditioned(rng, count, block, least=0.2):
    """Blocks with singular values from `least` to 1 and singular vectors of any direction. Gaussian
    blocks will not do where singular values are looked at: five steps do not lift the least of
    theirs (1e-5 of the norm, say) to 0.6."""
    u, v = (np.linalg.qr(rng.normal(0, 1, (count, block, block)))[0] for _ in range(2))
    return (u * rng.uniform(least, 1, (count, 1, block)) @ v).astype(np.float32)
