"""Small helpers of `MaskedLinear`: links, versions, other optimisers' steps, places in lists."""

from __future__ import annotations

import functools
import weakref

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import register_optimizer_step_post_hook


class Link(weakref.ref):
    """A weak reference from `values` to its module that may be pickled (and is dead then)."""

    def __reduce__(self):
        return dead_link, ()


class _Nobody:
    """What dead links point at."""


def dead_link() -> Link:
    """A link to nothing; the module that is unpickled with the Parameter makes a new one."""
    return Link(_Nobody())


# `torch.save` of a Parameter saves its attributes; `torch.load(weights_only=True)` asks for names.
torch.serialization.add_safe_globals([dead_link])


def version(tensor: torch.Tensor) -> int:
    """The version counter; inference tensors have none and cannot change."""
    return 0 if tensor.is_inference() else tensor._version


def address(tensor: torch.Tensor) -> int:
    """Where the data lie; 0 of subclasses (sharded, fake), which may hold none of their own."""
    return tensor.data_ptr() if type(tensor) in _PLAIN else 0


_PLAIN = (torch.nn.Parameter, torch.Tensor)


class Counter:
    """A number that several hold: how often something has happened."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


# How often any MaskedLinear got other Parameters or blocks: who knows this number need not ask each
# of a few hundred layers whether it is still what it was.
changes = Counter()

_followers: weakref.WeakSet = weakref.WeakSet()


@_disable_dynamo  # a compiled step runs it too, as it is
def after_any_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if getattr(optimizer, "_writes_through", False):
        return
    # Of what an optimiser holds nothing tells whether it has changed: `p.data` has no version.
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for module in list(_followers):
        module.sync(always=id(module._home) in held)


@functools.cache
def _register() -> None:
    register_optimizer_step_post_hook(after_any_step)


def follow(module: torch.nn.Module) -> None:
    """Lets `module.sync` run after every step of a foreign optimiser: compiled forwards cannot look
    at version counters.
    """
    _followers.add(module)
    _register()


def places_in(blocks: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """int64 [len(blocks)]: the position of each block in another list, -1 where it is not."""
    where = {(row, column): z for z, (row, column) in enumerate(among.tolist())}
    found = [where.get((row, column), -1) for row, column in blocks.tolist()]
    return torch.tensor(found, dtype=torch.int64)
