"""NVFP4 bit by bit: 4-bit floats in groups of 16 with E4M3 scales and one float32 scale a matrix.

Nothing of the package is used here. Values are computed as the formats' own code computes them, in
NumPy's float32: first the scale of a group, then its product with an element, each rounded once.
"""

from __future__ import annotations

import mxfp4_samples
import numpy as np
import torch

pairs = mxfp4_samples.pairs


def _e4m3(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return -size if sign else size


E4M3 = np.array([_e4m3(byte) for byte in range(256)])


def scales(bytes_: np.ndarray, number: np.float32, divide: bool) -> np.ndarray:
    """[N, ceil(K/16)] float32 of E4M3 bytes and the matrix's number."""
    known = E4M3[bytes_].astype(np.float32)
    return known / np.float32(number) if divide else known * np.float32(number)


def dense(nibbles: np.ndarray, of_groups: np.ndarray) -> np.ndarray:
    """[N, K] float32 of elements [N, K] and float32 scales [N, ceil(K/16)]."""
    wide = np.repeat(of_groups, 16, axis=-1)[:, : nibbles.shape[-1]]
    return mxfp4_samples.ELEMENTS[nibbles].astype(np.float32) * wide


def e4m3_tensor(bytes_: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bytes_.astype(np.uint8)).view(torch.float8_e4m3fn)
