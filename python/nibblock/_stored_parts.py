"""How `save` writes codes and scales that a layer holds more closely than in canonical form.

| record           | tensor          | in the file                                               |
| palette          | qweight         | [..., ceil(K / 2)] uint8: places in the palette, two a    |
|                  |                 | byte, low nibble = even k                                 |
|                  | palette         | [at most 16] uint8: the codes, ascending                  |
| scale_dtype int8 | scales, offsets | [..., G] int8                                             |
|                  | scales_units,   | [..., K / 256] float16: a scale is its int8 times its     |
|                  | offsets_units   | unit                                                      |

`expand` gives the canonical tensors back, every number of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nibblock.ops import _checks, _storage


def units_of(part: str) -> str:
    """The name of the tensor of units beside `scales` or `offsets`."""
    return f"{part}_units"


def sections(record: dict[str, Any]) -> tuple[str, ...]:
    """The tensors of a layer that are stored as its scale_dtype says."""
    return ("scales", "offsets") if record["affine"] else ("scales",)


def is_close(record: dict[str, Any]) -> bool:
    """Whether a layer's record, of any kind, names one of the forms above."""
    return bool(record.get("palette")) or record.get("scale_dtype") == "int8"


def compact(tensors: dict[str, torch.Tensor], layers: dict[str, dict[str, Any]]) -> None:
    """Exchanges canonical tensors for those of the file, in place; of layers whose tensors another
    saves there are none.
    """
    for name, record in layers.items():
        if not is_close(record) or f"{name}.qweight" not in tensors:
            continue
        if record.get("palette"):
            key = f"{name}.qweight"
            tensors[key], tensors[f"{name}.palette"] = _storage.to_places(tensors[key])
        if record["scale_dtype"] == "int8":
            for part in sections(record):
                key = f"{name}.{part}"
                pair = _storage.to_int8(tensors[key], record["columns"], record["group_size"])
                tensors[key], tensors[f"{name}.{units_of(part)}"] = pair


def expand(
    path: Path, tensors: dict[str, torch.Tensor], layers: dict[str, Any], shared: dict[str, str]
) -> None:
    """The inverse of `compact`.

    Raises:
        ValueError: a tensor is missing, or of another shape or dtype than the record asks for.
    """
    for name, record in layers.items():
        if not is_close(record) or name in shared:
            continue
        columns, group = record["columns"], record["group_size"]
        lead = (record["experts"],) if "experts" in record else ()
        lead = (*lead, record["rows"])

        def take(part: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            key = f"{name}.{part}"  # noqa: B023  (called within the turn)
            tensor = tensors.get(key)
            if tensor is None:
                raise ValueError(f"load: {path.name} must hold {key}, got a file without it")
            if tensor.dtype != dtype or (shape and tuple(tensor.shape) != shape):
                raise ValueError(
                    f"load: {key} must be {list(shape)} {_checks.dtype_name(dtype)}, got "
                    f"{list(tensor.shape)} {_checks.dtype_name(tensor.dtype)}"
                )
            return tensor

        if record.get("palette"):
            places = take("qweight", (*lead, -(-columns // 2)), torch.uint8)
            palette = take("palette", (), torch.uint8)
            if palette.dim() != 1 or not 1 <= len(palette) <= 16:
                raise ValueError(
                    f"load: {name}.palette must hold 1 to 16 codes, got {list(palette.shape)}"
                )
            codes = _storage.from_places(places, palette, columns)
            if codes is None:
                raise ValueError(
                    f"load: {name}.qweight must hold places below {len(palette)}, the length of "
                    f"{name}.palette, got a larger one"
                )
            tensors[f"{name}.qweight"] = codes
            del tensors[f"{name}.palette"]
        if record["scale_dtype"] == "int8":
            if not _checks.has_int8_scales(group, columns):
                raise ValueError(
                    f"load: {name} must have group_size 16 or 32 and columns a multiple of "
                    f"{_checks.RUN_K} for int8 scales, got {group} and {columns}"
                )
            for part in sections(record):
                multiples = take(part, (*lead, columns // group), torch.int8)
                units = take(units_of(part), (*lead, columns // _checks.RUN_K), torch.float16)
                tensors[f"{name}.{part}"] = _storage.from_int8(multiples, units)
                del tensors[f"{name}.{units_of(part)}"]
