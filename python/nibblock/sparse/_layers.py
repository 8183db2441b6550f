"""The layers of a model that hold trainable blocks, and how their block lists change.

`values` stays the same Parameter, so that optimisers, hooks and DistributedDataParallel keep their
hold of it; its storage is replaced by one of the new size.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import nn

from nibblock.nn import AdapterLinear, BlockSparseLinear, MaskedLinear
from nibblock.nn._links import places_in
from nibblock.optim._masked import MaskedOptimizer

Sparse = Union[AdapterLinear, BlockSparseLinear, MaskedLinear]
Optimizer = Optional[torch.optim.Optimizer]


def sparse_layers(op: str, model: nn.Module, pruned: bool = False) -> dict[str, Sparse]:
    """The `MaskedLinear`s and active `AdapterLinear`s of a model by name (with `pruned`, the
    `BlockSparseLinear`s too); ValueError if there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    kinds = (AdapterLinear, MaskedLinear, *((BlockSparseLinear,) if pruned else ()))
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            if isinstance(module, AdapterLinear) and module.active is None:
                continue
            if isinstance(module, AdapterLinear) and module.merged is not None:
                raise ValueError(f"{op}: {name} must be unmerged, got {module.merged!r} merged")
            found[name] = module
    if not found:
        raise ValueError(f"{op}: model must hold layers with trainable blocks, got none")
    return found


def origin(layer: Sparse) -> Optional[torch.Tensor]:
    """What `values` are when nothing has been learned: [Z, B, B], or None for zeros.

    A `MaskedLinear` without the original blocks starts from zeros too: its blocks are weights then.
    """
    held = layer.original if isinstance(layer, MaskedLinear) else None
    return None if held is None else held.to(layer.values.dtype)


def change_norms(layer: Sparse) -> torch.Tensor:
    """||values_z - origin_z||_F, float32 [Z]."""
    start = origin(layer)
    values = layer.values.detach().float()
    return torch.linalg.vector_norm(values if start is None else values - start.float(), dim=(1, 2))


def put_blocks(
    layer: Sparse, blocks: torch.Tensor, optimizer: Optimizer, dropped: str = "keep"
) -> torch.Tensor:
    """Gives a layer another block list; survivors keep values and optimiser state.

    Args:
        layer, optimizer: the optimiser may be None or any of torch.
        blocks: int [Z, 2], sorted and distinct.
        dropped: of a `MaskedLinear`, see its `set_blocks`.
    Returns:
        int64 [new Z]: where each block stood before, -1 for new ones.
    """
    values = layer.values
    before = tuple(values.shape)
    if isinstance(layer, MaskedLinear):
        came_from = layer.set_blocks(blocks, dropped)
    else:
        came_from = _set_blocks(layer, blocks)
    if optimizer is not None:
        _carry(optimizer, layer, before, came_from)
    return came_from


@torch.no_grad()
def _set_blocks(layer: Union[AdapterLinear, BlockSparseLinear], blocks: torch.Tensor):
    holder = layer.adapter() if isinstance(layer, AdapterLinear) else layer
    values = holder.values
    came_from = places_in(blocks, holder.blocks.cpu())
    following = rows_of(values.detach(), came_from)
    values.grad = None
    values.data = following
    holder._set_blocks(blocks, values.device)
    return came_from


def rows_of(old: torch.Tensor, came_from: torch.Tensor) -> torch.Tensor:
    """old[came_from], zeros where that is -1."""
    new = old.new_zeros((len(came_from), *old.shape[1:]))
    stay = came_from >= 0
    new[stay.to(old.device)] = old[came_from[stay].to(old.device)]
    return new


def _carry(optimizer, layer: Sparse, before: tuple, came_from: torch.Tensor) -> None:
    """Lets an optimiser's state follow the blocks, whichever form it keeps it in."""
    values = layer.values
    if isinstance(optimizer, MaskedOptimizer):
        optimizer.move_blocks(values, came_from)
        return
    state = optimizer.state.get(values, {})
    for name, old in state.items():
        if isinstance(old, torch.Tensor) and tuple(old.shape) == before:
            state[name] = rows_of(old, came_from)
