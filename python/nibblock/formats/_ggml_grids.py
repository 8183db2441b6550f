"""Codes of ggml's types whose values are looked up: the IQ1, IQ2 and IQ3 families and TQ1, TQ2.

    w[n, k] = step[n, g(k)] * integer[n, k]          code = integer + 128, or + 8 of TQ1 and TQ2

| type              | step                | integers   | group | s                                 |
| IQ2_XXS           | d * (s + 1/2) / 4   | -43..43    | 32    | top 4 bits of each second word    |
| IQ2_XS, IQ2_S     | d * (s + 1/2) / 4   | -43..43    | 16    | 16 nibbles                        |
| IQ3_XXS           | d * (s + 1/2) / 2   | -62..62    | 32    | top 4 bits of each word           |
| IQ3_S             | d * (2 s + 1)       | -15..15    | 32    | 8 nibbles                         |
| IQ1_S             | d * (2 s + 1) / 8   | -9..9      | 32    | 3 bits of each word of qh         |
| IQ1_M             | d * (2 s + 1) / 8   | -9..9      | 16    | 3 bits; d in the words' tops      |
| TQ1_0, TQ2_0      | d                   | -1..2      | 256   |                                   |

A step has at most 16 significant bits and an integer 6, so the products are exact in float32, and
so is the quotient by which the integer comes back: the gguf package looks the values up (its tables
are not repeated here), this file knows the steps.

Source: the block layouts of ggml (ggml-common.h).
"""

from __future__ import annotations

from typing import Callable

import numpy as np

_PIECE = 1 << 22  # values dequantised at a time


def _half(raw: np.ndarray) -> np.ndarray:
    """[..., 2] bytes -> [..., 1] float32."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _words(raw: np.ndarray, kind: str) -> np.ndarray:
    return np.ascontiguousarray(raw).view(kind)


def nibble_pairs(raw: np.ndarray) -> np.ndarray:
    """[..., b] bytes -> [..., 2b], the low nibble of each byte first."""
    return np.stack((raw & 15, raw >> 4), axis=-1).reshape(*raw.shape[:-1], -1)


def _odd_halves(d: np.ndarray, s: np.ndarray, by: float) -> np.ndarray:
    return d * (np.float32(0.5) + s.astype(np.float32)) * np.float32(by)


def _odd(d: np.ndarray, s: np.ndarray, by: float) -> np.ndarray:
    return d * (2 * s.astype(np.float32) + 1) * np.float32(by)


def _iq1_m(b: np.ndarray) -> np.ndarray:
    words = _words(b[..., 48:56], "<u2")
    d = np.bitwise_or.reduce((words & 0xF000) >> np.array([12, 8, 4, 0], np.uint16), axis=-1)
    s = words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7
    d = _half(d[..., None].astype("<u2").view(np.uint8))
    return _odd(d, s.reshape(*b.shape[:-1], 16), 0.125)


# type: (steps of blocks [..., bytes] -> [..., 256 / group], bytes of a block, bits, group)
GRIDS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int, int, int]] = {
    "IQ1_S": (
        lambda b: _odd(_half(b[..., :2]), _words(b[..., 34:], "<u2") >> 12 & 7, 0.125),
        50,
        8,
        32,
    ),
    "IQ1_M": (_iq1_m, 56, 8, 16),
    "IQ2_XXS": (
        lambda b: _odd_halves(_half(b[..., :2]), _words(b[..., 2:], "<u4")[..., 1::2] >> 28, 0.25),
        66,
        8,
        32,
    ),
    "IQ2_XS": (
        lambda b: _odd_halves(_half(b[..., :2]), nibble_pairs(b[..., 66:]), 0.25),
        74,
        8,
        16,
    ),
    "IQ2_S": (lambda b: _odd_halves(_half(b[..., :2]), nibble_pairs(b[..., 74:]), 0.25), 82, 8, 16),
    "IQ3_XXS": (
        lambda b: _odd_halves(_half(b[..., :2]), _words(b[..., 66:], "<u4") >> 28, 0.5),
        98,
        8,
        32,
    ),
    "IQ3_S": (lambda b: _odd(_half(b[..., :2]), nibble_pairs(b[..., 106:]), 1.0), 110, 8, 32),
    "TQ1_0": (lambda b: _half(b[..., 52:]), 54, 4, 256),
    "TQ2_0": (lambda b: _half(b[..., 64:]), 66, 4, 256),
}


def grid_codes(kind: str, raw: np.ndarray, values: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, K] uint8, not packed, and scales [N, K/group] float32 of a name in GRIDS.

    raw: [N, bytes per row] uint8. values(kind, raw): ggml's own float32 values.
    """
    steps_of, size, bits, group = GRIDS[kind]
    rows, blocks = raw.shape[0], raw.shape[1] // size
    scales = steps_of(raw.reshape(rows, blocks, size)).reshape(rows, -1)
    code = np.empty((rows, blocks * 256), np.uint8)
    step = max(1, _PIECE // max(1, blocks * 256))
    for at in range(0, rows, step):
        some = values(kind, raw[at : at + step]).reshape(-1, scales.shape[1], group)
        scale = scales[at : at + step, :, None]
        whole = np.divide(some, scale, out=np.zeros_like(some), where=scale != 0) + (
            1 << (bits - 1)
        )
        code[at : at + step] = whole.astype(np.uint8).reshape(len(some), -1)
    return code, scales
