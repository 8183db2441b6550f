"""transformers' `Conv1D`, a linear layer that keeps its weight transposed: y = x W + b, W [K, N].

GPT-2 and its relatives are made of it. transformers is optional and slow to import, and a model
that holds such a layer has imported it already: the class is looked up, never imported.
"""

from __future__ import annotations

import sys
from typing import Optional

from torch import nn

# Why layers that train blocks of a dense weight do not take one.
KEPT_TRANSPOSED = (
    "Conv1D keeps its weight transposed, [in, out]; accelerate(model) makes it an Int4Linear, "
    "which takes an adapter"
)


def conv1d_class() -> Optional[type]:
    """transformers' `Conv1D`; None while nobody has imported it."""
    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return found if isinstance(found, type) else None


def is_conv1d(module: object) -> bool:
    """Whether a module is transformers' `Conv1D` or of a subclass."""
    kind = conv1d_class()
    return kind is not None and isinstance(module, kind)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear of any kind or a `Conv1D`."""
    if is_conv1d(module):
        inputs = module.__dict__.get("nx")  # older versions note nf only
        return module.nf, module.weight.shape[0] if inputs is None else inputs
    return module.out_features, module.in_features


def as_linear(conv: nn.Module) -> nn.Linear:
    """An `nn.Linear` that computes the same: its weight a view of the Conv1D's, its bias the
    Parameter itself.
    """
    out = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(out)
    out.out_features, out.in_features = linear_shape(conv)
    out.register_parameter("weight", nn.Parameter(conv.weight.detach().t(), requires_grad=False))
    out.register_parameter("bias", conv.bias)
    return out.train(conv.training)
