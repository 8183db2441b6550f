"""Which blocks of a weight to keep or to train."""

from __future__ import annotations

import importlib
from typing import Any

from nibblock.sparse._choose import even_blocks, magnitude_blocks, mask_blocks, resolve_blocks

# The layers import this package for `_choose`; what needs the layers in turn is loaded when asked
# for.
_LATER = {
    "CostModel": "_cost",
    "CubicSchedule": "_schedule",
    "Exchange": "_reselect",
    "GroupLasso": "_regularise",
    "MovementMask": "_movement",
    "PrefixCache": "prefix_cache",
    "ReselectSchedule": "_schedule",
    "Selection": "_selection",
    "drop_idle_blocks": "_regularise",
    "idle_blocks": "_regularise",
    "reselect": "_reselect",
    "resize": "_reselect",
    "select_blocks": "_impact",
}

__all__ = [
    "CostModel",
    "CubicSchedule",
    "Exchange",
    "GroupLasso",
    "MovementMask",
    "PrefixCache",
    "ReselectSchedule",
    "Selection",
    "drop_idle_blocks",
    "even_blocks",
    "idle_blocks",
    "magnitude_blocks",
    "mask_blocks",
    "reselect",
    "resize",
    "resolve_blocks",
    "select_blocks",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
