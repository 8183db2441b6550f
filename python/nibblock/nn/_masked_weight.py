"""How the dense weight of a `MaskedLinear` follows its `values`, and autocast's copy of it both.

`_home` is the Parameter that the weight belongs to; `_synced` and `_at` are its version and address
at the last copy, `_alias` is the same data. `_steps` counts the steps of an optimiser that writes
both.
"""

from __future__ import annotations

from typing import Any, Optional

import torch

from nibblock.nn._links import Counter, Link, address, changes, follow, version
from nibblock.ops import _checks


class WrittenThrough:
    """Mixin of a module with the Parameters `values` and `weight`, and `_write` between them."""

    _parameters: dict[str, Any]
    _at = 0
    _alias: Optional[torch.Tensor] = None

    def _write(self, weight: torch.Tensor, values: torch.Tensor) -> None:
        raise NotImplementedError  # the module knows where its blocks are

    def _mark(self, values: torch.Tensor) -> None:
        """Notes that the weight holds `values` as they are now."""
        at = address(values)
        if at != self._at:
            # Held, so that no new data can lie where these do.
            self._at, self._alias = at, values.detach() if at else None
        self._synced = version(values)

    def _moved(self, values: torch.Tensor) -> bool:
        """Whether `values` can have changed since. A new `.data` leaves the version as it is."""
        return version(values) != self._synced or address(values) != self._at

    def _adopt(self) -> None:
        """Takes the present `values` for the ones that the weight holds."""
        values = self._parameters["values"]
        # Not by nn.Module.__setattr__, which would register it a second time.
        self.__dict__["_home"] = values
        values._masked_linear = Link(self)
        self._mark(values)
        self._steps = None  # an optimiser's steps that wrote both, and the version before them
        changes.count += 1
        follow(self)

    def mark_synced(self, steps: Optional[Counter] = None) -> None:
        """Says that the weight holds `values`: for optimisers that wrote both. `steps` counts
        theirs, each of which bumps the version once: then counting is enough."""
        own = self.__dict__  # nn.Module.__setattr__ would take ten times as long
        values = own["_home"]
        own["_synced"] = values._version
        if address(values) != self._at:  # (the class's 0 for a layer without blocks)
            self._mark(values)
        if steps is not None:
            own["_steps"] = (steps, values._version - steps.count)
        if own["_cast"] is not None:
            self._recast(values, 1)

    def sync(self, always: bool = False) -> None:
        """Copies `values` into the weight if they have changed since the last time.

        Args:
            always: copy whether or not they seem to have: numbers that were changed in place
                through `values.data` cannot be told.
        """
        values = self._parameters["values"]
        if values is self._home and not values.is_meta and (always or self._moved(values)):
            self._copy(values, always)

    def _copy(self, values: torch.Tensor, always: bool = False) -> None:
        now = version(values)
        if self._steps is not None:
            steps, before = self._steps
            self._steps = (steps, now - steps.count)
            counted = now == before + steps.count and address(values) == self._at
            if counted and not always:  # nothing else has happened: the weight is written
                if self._cast is not None:
                    self._recast(values, now - self._synced)
                self._synced = now
                return
        with torch.no_grad():
            weight = self._parameters["weight"]
            before = version(weight)
            self._write(weight, values)
            self._mark(values)
            if self._cast is not None:
                self._recast(values, version(weight) - before)

    def _live(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The weight that holds `values`."""
        if values is self._home:
            self._copy(values)
            return weight
        # Somebody put another tensor in the Parameter's place for this call (functional_call,
        # fully sharded training): the module's own weight must not change.
        weight = weight.detach().clone()
        with torch.no_grad():
            self._write(weight, values)
        return weight

    # --- autocast -----------------------------------------------------------------------------

    def _casted(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight in autocast's dtype; torch keeps copies only of weights that are trained."""
        if weight.dtype == dtype or weight.dtype not in _checks.FLOATS:
            return weight
        if torch.compiler.is_compiling() or weight is not self._parameters["weight"]:
            return weight.to(dtype)
        kept = self._cast
        if kept is None or kept[0].dtype != dtype or kept[1:] != (id(weight), version(weight)):
            kept = (weight.detach().to(dtype), id(weight), version(weight))
            self._cast = kept
        return kept[0]

    def _recast(self, values: torch.Tensor, steps: int) -> None:
        """Follows a change of the weight's blocks; of any other change, forgets the copy."""
        weight = self._parameters["weight"]
        copy, owner, seen = self._cast
        if owner != id(weight) or seen + steps != version(weight):
            self._cast = None
            return
        with torch.no_grad():
            # Through the weight's dtype, as rounding twice is what the dense layer does.
            self._write(copy, values.detach().to(weight.dtype))
        self._cast = (copy, owner, version(weight))
