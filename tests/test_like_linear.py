"""What block-sparse, masked and adapted layers share with `nn.Linear`: empty sizes, names."""

from __future__ import annotations

import nibblock as nb
import pytest
import torch
from nibblock.ops import _block_register
from torch import nn

LAYERS = {
    "linear": nn.Linear,
    "int4": nb.Int4Linear,
    "sparse": nb.BlockSparseLinear,
    "masked": nb.MaskedLinear,
    "adapter": lambda k, n: nb.AdapterLinear(nn.Linear(k, n)),
    "low rank": lambda k, n: nb.AdapterLinear(nn.Linear(k, n), rank=2),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("k, n", [(32, 0), (0, 32), (0, 0)])
@pytest.mark.parametrize("lead", [(2,), (), (2, 3), (0,)])
def test_layers_of_no_size(kind, k, n, lead):
    layer = LAYERS[kind](k, n)
    layer.bias.requires_grad_()
    x = torch.randn(*lead, k, requires_grad=True)
    y = layer(x)
    assert y.shape == (*lead, n)
    y.sum().backward()
    assert x.grad.shape == x.shape
    rows = x.shape[:-1].numel()
    assert torch.equal(layer.bias.grad, torch.full((n,), float(rows)))


def test_low_rank_gradients_of_no_size():
    x, a, c = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(0, 2)
    da, dc = _block_register._low_rank_gradients(torch.randn(2, 3, 0), x, a, c, True, True)
    assert torch.equal(da, torch.zeros(2, 8))
    assert dc.shape == (0, 2)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_argument_is_called_input(kind):
    torch._dynamo.reset()
    layer, x = LAYERS[kind](64, 48), torch.randn(3, 64)
    assert torch.equal(layer(input=x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input=x), layer(x))
    program = torch.export.export(layer.eval(), (), {"input": x})
    torch.testing.assert_close(program.module()(input=x), layer(x))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)])
def test_the_output_may_be_changed_in_place(kind, lead):
    """As wav2vec2 does: it zeroes what a linear returned wherever a frame is masked."""
    layer, x = LAYERS[kind](64, 48), torch.randn(*lead, 64, requires_grad=True)
    expected = torch.autograd.grad(torch.relu(layer(x) * 2)[..., 1:].sum(), x)

    def change(x):
        y = layer(x)
        y.mul_(2)
        y[..., 0] = 0
        return y.relu_().sum()

    torch._dynamo.reset()
    for run in (change, torch.compile(change, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(torch.autograd.grad(run(x), x), expected)
