"""`explain` for block-sparse layers and adapters."""

from __future__ import annotations

import nibblock as nb
import pytest
import torch
from harness import native
from torch import nn


def test_block_sparse_layer():
    layer = nb.BlockSparseLinear(100, 70, blocks=0.5)
    for rows in (1, 40):
        found = nb.explain(layer, torch.zeros(rows, 100))
        ids = [row["id"] for row in native.block_sparse_kernels("forward")]
        assert found.layer == "BlockSparseLinear"
        assert {found.kernel, *(i for i, _ in found.refused)} == set(ids)
        assert "6 float32 blocks of 32" in found.call
        assert str(found).startswith("BlockSparseLinear: [")
    native.set_cpu_isa("scalar")
    found = nb.explain(layer, torch.zeros(3, 100))
    assert found.kernel == "block_sparse_linear.cpu.scalar.reference"
    assert all("the level in force is scalar" in reason for _, reason in found.refused)
    with pytest.raises(ValueError, match="x last dim must equal in_features 100"):
        nb.explain(layer, torch.zeros(3, 99))


def test_adapters():
    dense = nb.AdapterLinear(nn.Linear(100, 70), blocks=0.5)
    x = torch.zeros(3, 100)
    assert nb.explain(dense, x).kernel.startswith("block_sparse_linear.cpu.")
    assert "float32 base by torch" in nb.explain(dense, x).call
    dense.activate(None)
    with pytest.raises(ValueError, match="an AdapterLinear that runs its nn.Linear alone"):
        nb.explain(dense, x)
    layer = nb.AdapterLinear(nb.Int4Linear(100, 70, group_size=32), blocks=0.5, rank=2)
    found = nb.explain(layer, x)
    assert found.kernel.startswith("int4_block_sparse_linear.cpu.")
    assert "int4 group 32, affine, compute bf16 base, rank 2" in found.call
    layer.base.register_forward_hook(lambda *a: None)
    found = nb.explain(layer, x)
    assert found.kernel.startswith("block_sparse_linear.cpu.")
    assert "compute bf16 base with hooks, by itself, rank 2" in found.call
    layer.activate(None)
    assert nb.explain(layer, x).kernel.startswith("int4_linear.cpu.")


def test_model():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))
    nb.accelerate(model, nb.Int4Config(group_size=32), skip="3", progress=False)
    nb.add_adapters(model, nb.AdapterConfig(skip="3", density=0.5))
    found = nb.explain(model, torch.zeros(5, 64))
    assert [item.layer for item in found] == ["0 x2"]
    assert found[0].kernel.startswith("int4_block_sparse_linear.cpu.")


def test_info_lists_every_table():
    tables = nb.info()["kernels"]
    for name in ("block_sparse_linear", "block_weight_grad", "int4_block_sparse_linear_dx"):
        assert tables[name]
        assert all(row["id"].startswith(f"{name}.cpu.") for row in tables[name])
