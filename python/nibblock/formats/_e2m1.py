"""4-bit floats in blocks with a scale of their own: what MXFP4's bits mean, as 8-bit codes.

    element = (-1)^s * (m / 2 if e == 0 else 2^(e - 1) * (1 + m / 2)),   bits s e e m

so one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 or its negative. Doubled, it is an integer from -12 to 12, the
symmetric 8-bit code 128 + 2 * element; the scale of its block is halved for that:

    w = element * 2^(x - 127) = (code - 128) * 2^(x - 128)        x: MXFP4's scale byte, E8M0

Half of a power of two is a power of two: in float32 all of them are exact, the subnormal 2^-128
and 2^-127 of x = 0 and 1 too. x = 255 is NaN. The element -0 becomes 0.

NVFP4 has the same elements in blocks of 16, whose scale is a float of 8 bits, E4M3:

    scale = (-1)^s * (m / 8 * 2^-6 if e == 0 else 2^(e - 7) * (1 + m / 8))     s e e e e m m m

e = m = all ones is NaN.

Source: the OCP Microscaling Formats specification 1.0 (E2M1, E8M0, MXFP4, E4M3).
"""

from __future__ import annotations

import numpy as np

_MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)  # doubled, by the bits e e m
_CODES = [128 + sign * magnitude for sign in (1, -1) for magnitude in _MAGNITUDES]
# By a byte of two elements: the code of its low and of its high nibble.
_LOW = bytes(_CODES[byte & 15] for byte in range(256))
_HIGH = bytes(_CODES[byte >> 4] for byte in range(256))
_HALF_SCALES = np.ldexp(1.0, np.arange(256) - 128).astype(np.float32)
_HALF_SCALES[255] = np.nan
_E4M3 = [
    2.0**-6 * m / 8 if e == 0 else 2.0 ** (e - 7) * (1 + m / 8) for e in range(16) for m in range(8)
]
_E4M3[127] = np.nan
_HALF_E4M3 = np.array([sign * value / 2 for sign in (1, -1) for value in _E4M3], np.float16)


def unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes of two elements a byte.

    Args:
        packed: uint8 of any shape.
    Returns:
        (codes of the low nibbles, codes of the high ones), each uint8 of that shape.
    """
    raw = bytearray(np.ascontiguousarray(packed))  # (an index of 8 bytes an element costs more)
    return tuple(
        np.frombuffer(raw.translate(table), np.uint8).reshape(packed.shape)
        for table in (_LOW, _HIGH)
    )


def unpack_pairs(packed: np.ndarray) -> np.ndarray:
    """[..., B] uint8, low nibble = even column -> [..., 2 B] uint8 codes."""
    return np.stack(unpack(packed), axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def half_scales(exponents: np.ndarray) -> np.ndarray:
    """E8M0 bytes -> float32 scales of the doubled elements; NaN for the byte that says so."""
    return _HALF_SCALES[exponents]


def half_e4m3(scales: np.ndarray) -> np.ndarray:
    """E4M3 bytes -> float16 scales of the doubled elements, exact; NaN where they say so."""
    return _HALF_E4M3[scales]
