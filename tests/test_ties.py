"""Weights that are two Parameters in the same memory count as tied; neighbours do not."""

from __future__ import annotations

import nibblock as nb
import pytest
import torch
from nibblock._ties import parameter_owners
from test_accelerate import quiet, reasons
from torch import nn


def linears(one, other):
    """Two linears with these weights."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer, weight in zip(model, (one, other)):
        layer.weight = nn.Parameter(weight)
        layer.out_features, layer.in_features = weight.shape
    return model


def buffer(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


WHOLE = buffer(64, 128)
SHARED = {
    "transposed": (WHOLE, WHOLE.t()),
    "rows": (WHOLE[:40], WHOLE[32:]),
    "columns": (WHOLE[:, :80], WHOLE[:, 64:]),
    "strided": (WHOLE[:, ::2], WHOLE[:, ::3]),
    "bits": (WHOLE, WHOLE.view(torch.bfloat16)),
    "inside": (WHOLE, WHOLE[16:32, 16:32]),
}
APART = {
    "copies": (WHOLE, WHOLE.clone()),
    "rows": (WHOLE[:32], WHOLE[32:]),
    "columns": (WHOLE[:, :64], WHOLE[:, 64:]),
    "alternate": (WHOLE[:, ::2], WHOLE[:, 1::2]),
    "meta": (torch.empty(64, 64, device="meta"), torch.empty(64, 64, device="meta")),
    "empty": (WHOLE[:, :0], WHOLE),
}


@pytest.mark.parametrize("kind", SHARED)
def test_what_lies_in_one_memory_is_tied(kind):
    model = linears(*SHARED[kind])
    owners = parameter_owners(model)
    assert [name for name, _, _ in owners[id(model[0].weight)]] == ["0", "1"]
    assert [name for name, _, _ in owners[id(model[1].weight)]] == ["1", "0"]


@pytest.mark.parametrize("kind", APART)
def test_neighbours_are_not(kind):
    model = linears(*APART[kind])
    owners = parameter_owners(model)
    assert [len(owners[id(layer.weight)]) for layer in model] == [1, 1]


def test_an_autoencoder_of_one_matrix():
    model = linears(WHOLE.clone(), WHOLE)
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    model[1].out_features, model[1].in_features = 128, 64
    before = model[0].weight.detach().clone()

    def loss_fn(model, x):
        return (model(x) - x).square().mean()

    x = buffer(32, 128)
    with pytest.raises(ValueError, match="got '0': its weight is tied to 1, where it would change"):
        nb.sparse_update(model, {"0": [[0, 0]]})
    with pytest.raises(ValueError, match="got none: 2 left out, 0: its weight is tied to 1"):
        nb.select_blocks(model, [x], loss_fn, progress=False)
    report = quiet(model, nb.BlockSparseConfig())
    assert "pruned blocks cannot be shared" in reasons(report)["0"]
    report = quiet(model, skip="1")
    assert "tied to 1, which stays dense" in reasons(report)["0"]
    nb.add_adapters(model, nb.AdapterConfig(density=0.5))
    with pytest.raises(ValueError, match="must own its weight, got one tied to 1.weight"):
        model[0].merge()
    assert torch.equal(model[0].base.weight, before)
