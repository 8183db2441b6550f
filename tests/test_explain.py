"""`nb.explain`: which kernel runs, and why each other row does not."""

from __future__ import annotations

import nibblock as nb
import pytest
import torch
from test_accelerate import TOKENS, Model, quiet
from torch import nn


def test_explain_names_the_kernel_and_the_refusals():
    layer = nb.Int4Linear(64, 32)
    explanation = nb.explain(layer, torch.ones(3, 64))
    rows = [row["id"] for row in nb._native.int4_linear_kernels("forward")]
    assert explanation.kernel in rows
    assert sorted([explanation.kernel, *[i for i, _ in explanation.refused]]) == sorted(rows)
    assert all(reason for _, reason in explanation.refused)
    assert explanation.kernel in str(explanation)
    nb._native.set_cpu_isa("scalar")
    assert ".scalar." in nb.explain(layer, torch.ones(3, 64)).kernel
    with pytest.raises(ValueError, match="x last dim must equal in_features 64"):
        nb.explain(layer, torch.ones(3, 65))


def test_explain_a_model():
    model = Model(tied=False)
    with pytest.raises(ValueError, match="must hold an Int4Linear"):
        nb.explain(model, TOKENS)
    quiet(model)
    for x in (TOKENS, (TOKENS,), {"tokens": TOKENS}):
        explanations = nb.explain(model, x)
        assert len(explanations) == 3
        assert "blocks.0.up x3" in str(explanations)
        assert "[10, 64] float32 -> 128" in str(explanations)
    assert model.training


def test_explain_sees_calls_by_keyword():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(64, 32)

        def forward(self, x):
            return self.up(input=x)

    for config in (nb.Int4Config(), nb.BlockSparseConfig(density=0.5, block=16)):
        model = ByKeyword()
        quiet(model, config)
        assert "[3, 64] float32 -> 32" in str(nb.explain(model, torch.ones(3, 64)))
