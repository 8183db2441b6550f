"""`register_flop_formula` without its cost: torch.utils.flop_counter imports Triton where that is
installed, which nobody who only multiplies should pay for.

Formulas are kept here until somebody imports the counter, and handed over at that moment.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from typing import Any, Callable

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable]] = []


def register_flop_formula(ops: Any) -> Callable[[Callable], Callable]:
    """As torch.utils.flop_counter's decorator of that name.

    Args:
        ops: one op (a packet of torch.ops) or a list of them.
    """

    def register(formula: Callable) -> Callable:
        if _COUNTER in sys.modules:
            _hand_over(sys.modules[_COUNTER], ops, formula)
        else:
            _waiting.append((ops, formula))
        return formula

    return register


def _hand_over(counter: Any, ops: Any, formula: Callable) -> None:
    counter.register_flop_formula(ops)(formula)


class _Loader(importlib.abc.Loader):
    """Runs the module as its own loader would, then hands the formulas over."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        for ops, formula in _waiting:
            _hand_over(module, ops, formula)
        _waiting.clear()


class _Finder(importlib.abc.MetaPathFinder):
    """Answers for one name, once."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Finder())
