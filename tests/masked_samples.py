"""`MaskedLinear`s for the tests, and how to look at what they hold."""

from __future__ import annotations

import nibblock as nb
import reference_blocks as rb
import torch
from harness import as_numpy
from nibblock.sparse._choose import read_blocks
from torch import nn


def linear_of(n=70, k=100, dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias, dtype=dtype)


def masked(n=70, k=100, blocks=0.3, block=16, kind=torch.float32, **more):
    return nb.MaskedLinear.from_linear(linear_of(n, k, kind), blocks, block, **more)


def bits(t):
    return t.detach().contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def drift(layer, by=0.5):
    """Other values, by an optimiser that knows nothing of the weight."""
    with torch.no_grad():
        layer.values.add_(by)
    return layer


def held(layer):
    return read_blocks(layer.weight, layer.blocks, layer.block)


def read_mask(layer):
    out = torch.zeros(layer.out_features, layer.in_features, dtype=torch.bool)
    for row, column in (layer.blocks.long() * layer.block).tolist():
        out[row : row + layer.block, column : column + layer.block] = True
    return out


def inside(layer, values):
    """The numbers of blocks that lie in the weight."""
    full = rb.Blocks(layer.blocks.numpy(), as_numpy(values), *layer.weight.shape).dense()
    return torch.from_numpy(full)[read_mask(layer)]


def held_inside(layer):
    return layer.weight.double()[read_mask(layer)]
