"""What the masked optimisers know of each Parameter: its kind, its mask, and the tensors of a call.

A Parameter is one of three kinds. `values` of a `MaskedLinear` are updated as blocks and written
through into the layer's weight. A Parameter with a mask of indices keeps its state for these
entries only; one with a boolean mask likewise, and one without a mask is a boolean one that is all
true.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn

from nibblock import ops
from nibblock.nn import MaskedLinear
from nibblock.nn._links import Counter, changes
from nibblock.ops import _block_checks, _checks
from nibblock.optim._states import States, fill

_grad = operator.attrgetter("grad")
_LINE = 64  # bytes that memory delivers at once
_OBJECT, _TENSOR, _STORAGE = 128, 256, 128  # bytes of a tensor's parts that a step may look at


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
    used: bool = False  # by a step
    steps: Optional[Counter] = None  # counts steps from `pack` on
    told: bool = False  # the layers look at `steps`
    lines: Optional[torch.Tensor] = None  # int64 addresses of what `pack` left to look up

    def pack(self, kept: Sequence[dict[str, torch.Tensor]], names: Sequence[str]) -> None:
        """Lays states, ages and blocks of all layers out as one tensor each.

        A step at one percent of the weights spends most of its time on finding out where a few
        hundred tensors lie, whose descriptions the backward has driven out of the caches. The
        states in `kept` become views, so that they are what they were.
        """
        self.states = [[_joined(kept, name)] for name in names]
        self.clocks = [_joined(kept, "age")]
        self.entries = [torch.cat(self.entries)]
        self.steps = Counter()
        tensors = self.parameters + self.weights + [p.grad for p in self.parameters]
        self.lines = torch.tensor([line for t in tensors for line in _lines_of(t)])

    @property
    def packs(self) -> bool:
        """Whether it is worth packing."""
        return bool(self.weights) and self.weights[0].device.type == "cpu"


def _joined(kept: Sequence[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    parts = [state[name] for state in kept]
    whole = torch.cat(parts)
    for state, part in zip(kept, whole.split([len(p) for p in parts])):
        fill(state, {name: part})
    return whole


def apart(state: dict[str, Any]) -> dict[str, Any]:
    """A state with tensors of its own: a file or pickle of a view would hold all of its storage."""
    return {
        name: value.clone()
        if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > value.nbytes
        else value
        for name, value in state.items()
    }


def _lines_of(tensor: torch.Tensor) -> list[int]:
    """Where torch keeps what it knows of a tensor: hints, which may be wrong later."""
    places = (
        (id(tensor), _OBJECT),
        (tensor._cdata, _TENSOR),
        (tensor.untyped_storage()._cdata, _STORAGE),
    )
    return [at + more for at, size in places for more in range(0, size, _LINE)]


@dataclass
class Plan:
    """The op calls of a group, for as long as the same Parameters have gradients."""

    group: list  # its Parameters
    names: tuple[str, ...]  # of the states that its rule uses
    states: States  # of the optimiser
    batches: list[Batch]
    idle: list  # Parameters without a gradient
    changes: int = field(default_factory=lambda: changes.count)
    written: int = field(init=False)  # how often others had written into `states`

    def __post_init__(self) -> None:
        self.written = self.states.changes.count

    def fits(self, group: list, names: tuple[str, ...], states: States) -> bool:
        """Whether nothing but gradients can have changed. Looks at no Parameter: they are not in
        the caches."""
        same = len(group) == len(self.group) and all(map(operator.is_, group, self.group))
        same = same and names == self.names and states is self.states
        return same and self.written == states.changes.count and self.changes == changes.count

    def gradients(self) -> Optional[list[list[torch.Tensor]]]:
        """The gradients of each batch; None if others have some now."""
        for batch in self.batches:
            if batch.lines is not None:
                torch.ops.nibblock._fetch_lines.default(batch.lines)
        found = [list(map(_grad, batch.parameters)) for batch in self.batches]
        new = any(p.grad is not None for p in self.idle)
        return None if new or any(type(None) in map(type, grads) for grads in found) else found


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
