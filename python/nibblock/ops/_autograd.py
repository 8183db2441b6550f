"""`register_autograd`, without the cost: torch.library's own rebuilds the schema's argument list at
every call, which takes longer than a small product (0.1 ms for the 14 arguments of the fused op).

What it leaves out are default arguments and keyword-only ones; no schema of ours has any.
"""

from __future__ import annotations

from typing import Any, Callable

import torch

_library = torch.library.Library("nibblock", "FRAGMENT")


def register_autograd(
    name: str, backward: Callable[..., tuple], setup_context: Callable[[Any, tuple, Any], None]
) -> None:
    """Gives `torch.ops.nibblock.<name>` a gradient, as `torch.library.register_autograd` does.

    Args:
        name: of an op whose arguments are all positional and without defaults.
        backward: (ctx, a gradient of each output) -> a gradient or None for each argument.
        setup_context: (ctx, inputs, output), keeps what backward needs.
    Raises:
        ValueError: the schema has defaults or keyword-only arguments.
    """
    op = getattr(torch.ops.nibblock, name).default
    for argument in op._schema.arguments:
        if argument.kwarg_only or argument.has_default_value():
            raise ValueError(
                f"register_autograd: {name} must have positional arguments without defaults, "
                f"got {argument.name}"
            )

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            inputs = args[:-1]  # the last one is the dispatcher's key set
            with torch._C._AutoDispatchBelowAutograd():
                output = op.redispatch(args[-1] & torch._C._after_autograd_keyset, *inputs)
                setup_context(ctx, inputs, output)
                return output

        @staticmethod
        def backward(ctx, *grads):
            return (*backward(ctx, *grads), None)

    Function.__name__ = Function.__qualname__ = f"Backward_{name}"  # what grad_fn prints

    def call(keyset, *args):
        if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Function.apply(*args, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(name, call, "Autograd", with_keyset=True)
