"""The hooks and the profiler's mark around a step, as `torch.optim.Optimizer` has them.

torch wraps every optimiser's `step` so that it runs its hooks inside a `record_function`. That
alone takes 13 us whether a profiler listens or not, as long as the arithmetic of forty blocks of
32; here it is entered only if one does.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, Callable

import torch
from torch.optim import optimizer as torch_optimizer

from nibblock.nn._links import after_any_step


def run(optimizer: torch.optim.Optimizer, step: Callable[..., Any], args: tuple) -> Any:
    """`step(*args)` between the hooks that were registered for every optimiser and for this one."""
    if not torch.autograd._profiler_enabled():
        return _run(optimizer, step, args)
    mark = f"Optimizer.step#{type(optimizer).__name__}.step"
    with torch.autograd.profiler.record_function(mark):
        return _run(optimizer, step, args)


def _run(optimizer: torch.optim.Optimizer, step: Callable[..., Any], args: tuple) -> Any:
    kwargs: dict[str, Any] = {}
    hooked = (optimizer, *args)
    for hook in chain(
        torch_optimizer._global_optimizer_pre_hooks.values(),
        optimizer._optimizer_step_pre_hooks.values(),
    ):
        changed = hook(optimizer, hooked, kwargs)
        if changed is not None:
            if not (isinstance(changed, tuple) and len(changed) == 2):
                raise RuntimeError(
                    f"{type(optimizer).__name__}: a step hook must return None or new (args, "
                    f"kwargs), got {changed}"
                )
            hooked, kwargs = changed
    out = step(*hooked[1:], **kwargs)
    for hook in chain(
        optimizer._optimizer_step_post_hooks.values(),
        torch_optimizer._global_optimizer_post_hooks.values(),
    ):
        if hook is not after_any_step:  # it is for optimisers that do not write through
            hook(optimizer, hooked, kwargs)
    return out
