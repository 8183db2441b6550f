"""How the canonical parts of a packed weight are stored, and when more closely than they come.

Scales and offsets: float32, float16, or int8 multiples of one float16 for 256 columns, which is
what GGUF's K-quants hold and a quarter to a third of the bytes of their products. The canonical
tensors of the last are float32, which holds every product exactly.

Codes: as they are, or 8-bit ones of at most 16 values as 4-bit places in a palette.
"""

from __future__ import annotations

from typing import Optional

import torch

from nibblock import _native
from nibblock.ops import _checks

LARGEST = 127


def canonical_dtype(scale_dtype: torch.dtype) -> torch.dtype:
    """The dtype of canonical scales and offsets that are stored so."""
    return torch.float32 if scale_dtype == torch.int8 else scale_dtype


def fits_int8(values: torch.Tensor, in_features: int, group_size: int) -> bool:
    """Whether float32 [..., G] are int8 multiples of one float16 in every 256 columns."""
    if not _checks.has_int8_scales(group_size, in_features) or values.dtype != torch.float32:
        return False
    rows = values.detach().to("cpu").reshape(-1, in_features // group_size).contiguous()
    return _native.int8_scales_fit(
        rows.numpy(), in_features, group_size, threads=torch.get_num_threads()
    )


def exact_dtype(
    scales: torch.Tensor, offsets: Optional[torch.Tensor], in_features: int, group_size: int
) -> torch.dtype:
    """The smaller of scales' own dtype and int8 that holds every scale and offset as it is; on the
    meta device their own.
    """
    parts = [scales] if offsets is None else [scales, offsets]
    if all(not p.is_meta and fits_int8(p, in_features, group_size) for p in parts):
        return torch.int8
    return scales.dtype


def fits_palette(qweight: torch.Tensor, bits: int) -> bool:
    """Whether canonical codes have 8 bits and at most 16 values."""
    if bits != 8 or qweight.dtype != torch.uint8 or qweight.is_meta or not qweight.numel():
        return False
    return _native.palette_fits(qweight.detach().to("cpu").contiguous().numpy())


def round_to_int8(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """float32 [N, G] -> the nearest int8 multiples of a float16 for 256 columns.

    The largest of a run becomes 127 times its float16, rounded up to reach it.
    """
    runs = values.unflatten(1, (-1, _checks.RUN_K // group_size))
    top = runs.abs().amax(-1, keepdim=True)
    unit = (top / LARGEST).half()
    short = unit.float() * (LARGEST + 0.5) < top
    # (The next float16 above a positive one is that of the next bit pattern.)
    unit = torch.where(short, (unit.view(torch.int16) + 1).view(torch.half), unit).float()
    multiples = torch.where(unit > 0, runs / unit, 0.0).round().clamp(-LARGEST, LARGEST)
    return (multiples * unit).flatten(1)


def nearest_codes(
    weight: torch.Tensor,
    scales: torch.Tensor,
    offsets: Optional[torch.Tensor],
    group_size: int,
    bits: int,
) -> torch.Tensor:
    """The canonical codes of weight [N, K] float32 for given scales: those nearest to it."""
    top, zero = 2**bits - 1, 2 ** (bits - 1)
    groups = weight.unflatten(1, (-1, group_size))
    scale = scales[..., None]
    steps = groups if offsets is None else groups - offsets[..., None]
    codes = torch.where(scale != 0, steps / scale, 0.0).round()
    codes = codes + zero if offsets is None else codes
    codes = codes.clamp(0, top).to(torch.uint8).flatten(1)
    return codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
