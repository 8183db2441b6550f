"""NVFP4 matrices, whatever a format calls their tensors: elements as in MXFP4, in groups of 16.

    w[n, k] = element[n, k] * s[n, k // 16],   s[n, g] = scale[n, g] * t  or  scale[n, g] / t

| tensor | shape and dtype         | holds                                                         |
| packed | [N, ceil(K/2)] uint8    | byte i of row n: elements 2 i (the low nibble) and 2 i + 1    |
| scale  | [N, ceil(K/16)] E4M3    | scales of groups                                              |
| t      | [] or [1] float32       | one number for the whole matrix                               |

Each element becomes an 8-bit code, as in `_e2m1`, and s / 2 is the code's scale. s is computed in
float32, as those do who wrote the formats: a product has up to 28 bits and a quotient any number,
so s is rounded, by 2^-24 of itself at most, unless t has few bits (a power of two has one); the
report says so. Halving it is exact, and its product with an element is rounded once: weights
dequantised to float32 are, bit for bit, those of float32 arithmetic on the formula.

Source: NVIDIA's NVFP4 (blocks of 16 E2M1 elements, an E4M3 scale each, one float32 scale a tensor);
the OCP Microscaling Formats specification 1.0 (E2M1, E4M3).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nibblock.formats._quantized_folder import Part
from nibblock.formats._quantized_layer import Layer, Reader, groups_of, layer_of_floats

GROUP = 16


def parts(rows: int, columns: int, names: tuple[str, str, str]) -> dict[str, Part]:
    """What the file must hold under these names of packed, scale and t."""
    packed, scale, tensor_scale = names
    return {
        packed: Part.of((rows, -(-columns // 2)), "U8"),
        scale: Part.of((rows, groups_of(columns, GROUP)), "F8_E4M3"),
        tensor_scale: Part((("F32", (1,)), ("F32", ()))),
    }


def layer(
    reader: Reader,
    name: str,
    columns: int,
    tensors: dict[str, torch.Tensor],
    names: tuple[str, str, str],
    divide: bool,
) -> Layer:
    """The canonical form of a matrix called `name`; divide: whether s = scale / t.

    Raises:
        ValueError: t is not finite and positive, or s is so small that half of it is not exact.
    """
    packed, scale, tensor_scale = (tensors[part] for part in names)
    t = tensor_scale.reshape(())
    if not (bool(torch.isfinite(t)) and float(t) > 0):
        raise reader.fail(name, names[2], "hold a finite positive number", float(t))
    scales = scale.float()
    s = scales / t if divide else scales * t
    half = s / 2
    if not bool(((half * 2 == s) | s.isnan()).all()):
        raise reader.fail(name, names[2], "hold a number that keeps scales above 2^-125", float(t))
    # In float64 these products are exact: 4 bits or 24, times 24.
    known, factor = scales.double(), t.double()
    exact = s.double() * factor == known if divide else s.double() == known * factor
    out = layer_of_floats(packed, half, columns, GROUP)
    return out if bool(exact.all()) else replace(out, rounded="scales")
