"""What the masked optimisers know of each Parameter: its kind, its mask, and the tensors of a call.

A Parameter is one of three kinds. `values` of a `MaskedLinear` are updated as blocks and written
through into the layer's weight. A Parameter with a mask of indices keeps its state for these
entries only; one with a boolean mask likewise, and one without a mask is a boolean one that is all
true.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn

from nibblock import ops
from nibblock.nn import MaskedLinear
from nibblock.ops import _block_checks, _checks


@dataclass
class Mask:
    """A checked mask of one Parameter."""

    kind: str  # "flat" or "bool"
    entries: torch.Tensor  # indices [nnz], or the bool mask (numel 0: everything)
    offsets: Optional[torch.Tensor]  # of a bool mask
    count: int  # how many entries move

    def print(self) -> int:
        """A number that another mask would hardly have."""
        return print_of(self.entries, self.count)


def print_of(entries: torch.Tensor, seed: int) -> int:
    """CRC-32 of a mask's bytes; seeded, so that a mask of nothing is not one of everything."""
    data = entries.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return zlib.crc32(memoryview(data.numpy()), seed)


def make_mask(op: str, parameter: torch.Tensor, mask: Optional[torch.Tensor]) -> Mask:
    """Checks a mask (None: everything moves) against its Parameter."""
    total, device = parameter.numel(), parameter.device
    if mask is None:
        empty = torch.empty(0, dtype=torch.bool, device=device)
        return Mask("bool", empty, torch.empty(0, dtype=torch.int64, device=device), total)
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{op}: masks must map to Tensors, got {type(mask).__name__}")
    mask = mask.detach().to(device)
    if mask.dtype == torch.bool:
        if mask.shape != parameter.shape:
            raise ValueError(
                f"{op}: a bool mask must have its Parameter's shape {list(parameter.shape)}, got "
                f"{list(mask.shape)}"
            )
        mask = mask.contiguous()
        offsets = ops.mask_offsets(mask)
        return Mask("bool", mask, offsets, int(offsets[-1]))
    if mask.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{op}: a mask must be bool, int32 or int64, got {_checks.dtype_name(mask.dtype)}"
        )
    if mask.dim() != 1:
        raise ValueError(f"{op}: flat indices must be 1-D, got {list(mask.shape)}")
    if mask.numel():
        low, high = int(mask[0]), int(mask[-1])
        if bool((mask[1:] <= mask[:-1]).any()):
            raise ValueError(f"{op}: flat indices must be sorted and distinct, got others")
        if low < 0 or high >= total:
            bad = low if low < 0 else high
            raise ValueError(f"{op}: flat indices must lie in [0, {total}), got {bad}")
    return Mask("flat", mask.contiguous(), None, mask.numel())


def masked_layer(parameter: torch.Tensor) -> Optional[MaskedLinear]:
    """The layer whose `values` this is, or None."""
    link = getattr(parameter, "_masked_linear", None)
    layer = None if link is None else link()
    owns = layer is not None and layer._parameters.get("values") is parameter
    return layer if owns else None


@dataclass
class Batch:
    """The tensors of one op call: Parameters of one kind, dtype, block edge and device."""

    kind: str  # "block", "flat" or "bool"
    block: int
    parameters: list = field(default_factory=list)
    clocks: list = field(default_factory=list)  # ages [Z] of blocks; steps [1] else
    states: list = field(default_factory=list)  # for each state, a list of float32 tensors
    entries: list = field(default_factory=list)  # blocks, indices or bool masks
    offsets: list = field(default_factory=list)  # of bool masks
    layers: list = field(default_factory=list)  # of blocks
    weights: list = field(default_factory=list)  # of blocks; empty: forward copies the values


def check_parameter(op: str, parameter: torch.Tensor) -> None:
    """Refuses what the kernels cannot update."""
    if parameter.dtype not in _block_checks.VALUES:
        raise TypeError(
            f"{op}: params must be float32 or bfloat16, got {_checks.dtype_name(parameter.dtype)}"
        )
    if type(parameter).__name__ == "DTensor":
        raise TypeError(
            f"{op}: params must be whole tensors, got a DTensor; use torch.optim.AdamW with "
            f"fully_shard, or DistributedDataParallel"
        )
    if not parameter.is_contiguous():
        raise ValueError(f"{op}: params must be contiguous, got strides {parameter.stride()}")
    if parameter.is_meta:
        raise ValueError(f"{op}: params must hold data, got a Parameter on the meta device")


def check_masks(op: str, masks: object) -> Mapping[nn.Parameter, Any]:
    if masks is None:
        return {}
    if not isinstance(masks, Mapping):
        raise TypeError(f"{op}: masks must map Parameters to masks, got {type(masks).__name__}")
    return masks
