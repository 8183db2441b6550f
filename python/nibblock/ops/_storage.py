"""How the canonical parts of a packed weight are stored, and when more closely than they come.

Scales and offsets: float32, float16, or int8 multiples of one float16 for 256 columns, which is
what GGUF's K-quants hold and a quarter to a third of the bytes of their products. The canonical
tensors of the last are float32, which holds every product exactly.

Codes: as they are, or 8-bit ones of at most 16 values as 4-bit places in a palette.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def to_int8(
    values: torch.Tensor, in_features: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., G] that `fits_int8` -> int8 [..., G] and float16 units [..., K / 256]."""
    rows = values.detach().to("cpu").reshape(-1, in_features // group_size).contiguous()
    multiples, units = _native.int8_scales(rows.numpy(), in_features, group_size)
    lead = values.shape[:-1]
    return (
        torch.from_numpy(multiples).reshape(*lead, multiples.shape[1]),
        torch.from_numpy(units).reshape(*lead, units.shape[1]),
    )


def from_int8(multiples: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_int8`."""
    each = multiples.shape[-1] // max(units.shape[-1], 1)
    return multiples.float() * units.float().repeat_interleave(each, -1)


def to_places(qweight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., K] that `fits_palette`, on the CPU -> places [..., ceil(K / 2)], two a byte, low
    nibble first, and the palette, ascending.
    """
    palette = torch.bincount(qweight.flatten(), minlength=256).nonzero().flatten().to(torch.uint8)
    place = torch.zeros(256, dtype=torch.uint8)
    place[palette.long()] = torch.arange(len(palette), dtype=torch.uint8)
    out = torch.empty(*qweight.shape[:-1], -(-qweight.shape[-1] // 2), dtype=torch.uint8)
    for some, codes in _pieces(out, qweight):
        low, high = place[codes[:, 0::2].int()], place[codes[:, 1::2].int()]
        some.copy_(low)
        some[:, : high.shape[1]] |= high << 4
    return out, palette


def from_places(
    places: torch.Tensor, palette: torch.Tensor, columns: int
) -> Optional[torch.Tensor]:
    """The inverse of `to_places`; None where a place is behind the palette's end."""
    out = torch.empty(*places.shape[:-1], columns, dtype=torch.uint8)
    for some, pairs in _pieces(out, places):
        both = torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)[:, :columns].int()
        if both.numel() and int(both.max()) >= len(palette):
            return None
        some.copy_(palette[both])
    return out


def _pieces(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of both, a bounded number of numbers at a time."""
    rows = max(1, (1 << 22) // max(1, one.shape[-1], other.shape[-1]))
    yield from zip(one.flatten(0, -2).split(rows), other.flatten(0, -2).split(rows))


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
