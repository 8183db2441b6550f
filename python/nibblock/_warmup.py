"""`warmup`: lets Triton compile what a model will need on its GPU, before the first real step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nibblock._select import layers_of, running, shape_key

__all__ = ["warmup"]


def warmup(
    model: nn.Module,
    tokens: Sequence[int] = (1, 64, 512),
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = False,
) -> int:
    """Runs every distinct layer of this package in `model` once on zeros, so that no later call
    compiles anything.

        one forward (and backward) for each layer shape on a GPU and each number of tokens

    Kernels are configured by shape class: tokens are rounded up to a power of two, 16 at least and
    4096 at most; name one number of each class you will use. Without a tuned file (see `python -m
    nibblock tune`) the classes from 128 on are three: below 512, from there, and for bfloat16 from
    1024 on. Nothing is tuned. Warm up before capturing a CUDA graph: a first call compiles and
    loads code, which a capture may forbid.

    Args:
        model: any module.
        tokens: rows of x to prepare for.
        dtype: float32 | bfloat16 | float16 of the activations.
        backward: also the input gradients, and those of adapters' and sparse layers' values.
    Returns:
        The number of layer shapes that were run; 0 for a model on the CPU, whose kernels are
        compiled already.
    Raises:
        BackendUnavailable: Triton is missing, or the GPU is too old. TypeError: another dtype.
    Gradients: none; `.grad` of no Parameter changes. Determinism: nothing is computed that lasts.
    """
    seen: dict[tuple, nn.Module] = {}
    for layer in layers_of(model):
        device = next(layer.parameters()).device
        if device.type == "cuda":
            seen.setdefault((device, *shape_key(layer)), layer)
    for layer in seen.values():
        own = running(layer)
        device = next(layer.parameters()).device
        trained = [p for p in layer.parameters() if p.requires_grad]
        for rows in tokens:
            x = torch.zeros(rows, own.in_features, dtype=dtype, device=device)
            with torch.set_grad_enabled(backward):
                y = layer(x.requires_grad_(backward))
                if backward:
                    torch.autograd.grad(y.sum(), [x, *trained], allow_unused=True)
    return len(seen)
