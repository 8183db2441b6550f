"""The `.state` of the masked optimisers: dictionaries that count how often others change them.

A step uses tensors that it has looked up once, and looks at no Parameter's state again for as long
as nothing has changed. So every change from outside must be told. What the optimiser itself writes
while it steps goes past the count (`own`, `fill`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Callable, Union

from nibblock.nn._links import Counter


def _counted(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.changes.count += 1
        return method(self, *args, **kwargs)

    return call


class Kept(dict):
    """The state of one Parameter, name -> tensor. Copies and pickles are plain dictionaries."""

    __slots__ = ("changes",)

    def __init__(self, content: Mapping[str, Any], changes: Counter) -> None:
        super().__init__(content)
        self.changes = changes

    __setitem__ = _counted(dict.__setitem__)
    __delitem__ = _counted(dict.__delitem__)
    __ior__ = _counted(dict.__ior__)
    clear = _counted(dict.clear)
    pop = _counted(dict.pop)
    popitem = _counted(dict.popitem)
    setdefault = _counted(dict.setdefault)
    update = _counted(dict.update)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return dict, (dict(self),)


def fill(state: dict[str, Any], content: Mapping[str, Any]) -> None:
    """Updates the state of one Parameter past the count."""
    dict.update(state, content)


class States(defaultdict):
    """Parameter -> its state, as `torch.optim.Optimizer.state`; each state is a `Kept`.

    Copies and pickles are plain dictionaries.
    """

    def __init__(self, content: Mapping[Any, Any]) -> None:
        super().__init__(dict)
        self.changes = Counter()
        self.update(content)

    def own(self, key: Any) -> dict[str, Any]:
        """The state of a Parameter, made empty where there is none, past the count."""
        if key not in self:
            super().__setitem__(key, Kept({}, self.changes))
        return self[key]

    def __missing__(self, key: Any) -> dict[str, Any]:
        self[key] = {}
        return self[key]

    def __setitem__(self, key: Any, state: Any) -> None:
        self.changes.count += 1
        # A file may hold more than states of Parameters, as torch's optimisers take it.
        known = isinstance(state, Mapping)
        super().__setitem__(key, Kept(state, self.changes) if known else state)

    def setdefault(self, key: Any, default: Any = None) -> dict[str, Any]:
        """As a dictionary's; None stands for an empty state."""
        if key not in self:
            self[key] = {} if default is None else default
        return self[key]

    def update(self, content: Union[Mapping[Any, Any], Iterable] = ()) -> None:
        """As a dictionary's."""
        for key, state in dict(content).items():
            self[key] = state

    def __ior__(self, content: Any) -> States:
        self.update(content)
        return self

    __delitem__ = _counted(dict.__delitem__)
    clear = _counted(dict.clear)
    pop = _counted(dict.pop)
    popitem = _counted(dict.popitem)

    def copy(self) -> defaultdict:
        """A plain one with plain states."""
        plain = {k: dict(s) if isinstance(s, Kept) else s for k, s in self.items()}
        return defaultdict(dict, plain)

    __copy__ = copy

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return defaultdict, (dict, dict(self.copy()))
