"""Small helpers of `MaskedLinear`: links that survive pickling, versions, places in block lists."""

from __future__ import annotations

import weakref

import torch


class Link(weakref.ref):
    """A weak reference from `values` to its module that may be pickled (and is dead then)."""

    def __reduce__(self):
        return dead_link, ()


class _Nobody:
    """What dead links point at."""


def dead_link() -> Link:
    """A link to nothing; the module that is unpickled with the Parameter makes a new one."""
    return Link(_Nobody())


def version(tensor: torch.Tensor) -> int:
    """The version counter; inference tensors have none and cannot change."""
    return 0 if tensor.is_inference() else tensor._version


def places_in(blocks: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """int64 [len(blocks)]: the position of each block in another list, -1 where it is not."""
    where = {(row, column): z for z, (row, column) in enumerate(among.tolist())}
    found = [where.get((row, column), -1) for row, column in blocks.tolist()]
    return torch.tensor(found, dtype=torch.int64)
