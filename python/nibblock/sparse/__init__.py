"""Which blocks of a weight to keep or to train."""

from __future__ import annotations

import importlib
from typing import Any

from nibblock.sparse._choose import even_blocks, magnitude_blocks, mask_blocks, resolve_blocks

# The layers import this package for `_choose`; what needs the layers in turn is loaded when asked
# for.
_LATER = {
    "CostModel": "_cost",
    "Selection": "_selection",
    "select_blocks": "_impact",
}

__all__ = [
    "CostModel",
    "Selection",
    "even_blocks",
    "magnitude_blocks",
    "mask_blocks",
    "resolve_blocks",
    "select_blocks",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
