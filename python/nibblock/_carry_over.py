"""What moves along when one module takes another's place: hooks, and attributes somebody set."""

from __future__ import annotations

import functools

from torch import nn

from nibblock.nn import BlockSparseLinear, Int4Embedding, Int4Linear, MaskedLinear
from nibblock.nn._conv1d import is_conv1d
from nibblock.nn._packed import PackedWeight

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_OURS = (Int4Embedding, Int4Linear, BlockSparseLinear, MaskedLinear)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Gives `new` the hooks of `old`, the attributes that somebody set on it, and what dtype and
    orientation its weight shows.
    """
    if isinstance(new, PackedWeight):
        packed = isinstance(old, PackedWeight)
        new._dtype = old._dtype if packed else old.weight.dtype
        new._transposed = old._transposed if packed else is_conv1d(old)
    own = _own_attributes(type(old))
    for name, value in old.__dict__.items():
        known = name in new.__dict__ or hasattr(type(new), name) or name in own
        if name in _HOOKS or not known:
            new.__dict__[name] = value


@functools.cache
def _own_attributes(cls: type) -> frozenset[str]:
    """What a layer of ours sets on itself, which means nothing on another."""
    for kind in _OURS:
        if issubclass(cls, kind):
            layer = kind(32, 32, device="meta")  # nothing is drawn from torch's generator
            return frozenset([*layer.__dict__, *dir(kind)])
    return frozenset()
