"""Small models, updates and adapters in files, for the tests of `report`."""

from __future__ import annotations

import json

import nibblock as nb
import torch
from torch import nn


class Small(nn.Module):
    """Two linears of ragged sizes, a norm, and an integer buffer."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(100, 70, dtype=dtype)  # 5 x 7 blocks of 16, the last ones ragged
        self.down = nn.Linear(70, 100, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(70)
        self.register_buffer("step", torch.tensor([3, 4]))

    def forward(self, x):
        return self.down(self.norm(self.up(x)))


def strict(text):
    """JSON without NaN and Infinity, which the standard does not know."""

    def refuse(word):
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def update(path, blocks, seed=0, by=0.0, train_norm=False, dtype=torch.float32):
    """A sparse update of `Small`'s layers: name -> blocks of 16, each moved by `by`."""
    model = Small(dtype, seed)
    nb.sparse_update(model, blocks, block=16)
    model.norm.weight.requires_grad_(train_norm)
    with torch.no_grad():
        for parameter in nb.trainable_parameters(model):
            parameter.add_(by)
    nb.save(model, path)
    return model


def adapter(path, rank=0, seed=0, values=1, density=0.2):
    """An adapter with random numbers everywhere."""
    model = Small()
    nb.add_adapters(model, nb.AdapterConfig(density=density, block=16, rank=rank))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in nb.trainable_parameters(model):
            parameter.copy_(torch.randn_like(parameter) * values)
    nb.save(model, path)
    return {n: m for n, m in model.named_modules() if isinstance(m, nb.AdapterLinear)}


def dense64(layer):
    return layer.adapter(layer.active).dense().double()
