"""FLOP formulas for torch.utils.flop_counter, without importing it.

That module imports Triton wherever it is installed, and importing nibblock must not. Formulas wait
here until somebody imports the counter, and are handed over right after it has loaded.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from typing import Any, Callable

_NAME = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable]] = []


def flop_formula(targets: Any) -> Callable[[Callable], Callable]:
    """`torch.utils.flop_counter.register_flop_formula`, now or when that module is first used."""

    def keep(formula: Callable) -> Callable:
        module = sys.modules.get(_NAME)
        if hasattr(module, "register_flop_formula"):
            module.register_flop_formula(targets)(formula)
        else:
            _waiting.append((targets, formula))
        return formula

    return keep


class _AfterLoad(importlib.abc.MetaPathFinder):
    """Finds nothing itself; adds one step to the loading of the flop counter, once."""

    def find_spec(self, name, path=None, target=None):
        if name != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            while _waiting:
                targets, formula = _waiting.pop()
                module.register_flop_formula(targets)(formula)

        spec.loader.exec_module = exec_module
        return spec


if _NAME not in sys.modules:
    sys.meta_path.insert(0, _AfterLoad())
