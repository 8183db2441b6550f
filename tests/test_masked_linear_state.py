"""`MaskedLinear`: copies, moves, state dicts, constructors, errors."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import nibblock as nb
import pytest
import torch
import torch.nn.functional as F
from masked_samples import bits, drift, held, held_inside, inside, linear_of, masked
from nibblock.sparse._choose import read_blocks
from torch import nn

# --- copies, moves, state dicts -----------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stand_alone(how):
    model = nn.Sequential(drift(masked()))  # values ahead of the weight
    twin = how(model)
    x = torch.randn(3, 100)
    assert torch.equal(twin(x), model(x))
    assert twin[0].values._masked_linear() is twin[0]
    assert model[0].values._masked_linear() is model[0]
    drift(twin[0])
    assert not torch.equal(twin(x), model(x))
    assert torch.equal(twin(x), F.linear(x, twin[0].weight, twin[0].bias))
    twin[0].revert()
    assert torch.equal(twin[0].weight, model[0].original_weight())


def test_moves():
    layer = drift(masked())
    x = torch.randn(3, 100)
    y = layer(x)
    layer.to(torch.bfloat16)
    assert (layer.values.dtype, layer.weight.dtype, layer.original.dtype) == (torch.bfloat16,) * 3
    torch.testing.assert_close(layer(x.bfloat16()).float(), y, rtol=5e-2, atol=5e-2)
    layer.half()
    assert (layer.values.dtype, layer.weight.dtype) == (torch.bfloat16, torch.float16)
    layer.float()
    layer(x)
    assert torch.equal(inside(layer, layer.values), held_inside(layer))
    drift(layer)
    layer(x)
    assert torch.equal(inside(layer, layer.values), held_inside(layer))
    empty = nb.MaskedLinear(100, 70, device="meta", block=16)
    assert empty.values.is_meta
    source = nb.MaskedLinear(100, 70, block=16)
    empty.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(empty(x), source(x))
    lazy = nb.MaskedLinear(100, 70, device="meta", block=16)
    lazy.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(lazy(x), source(x))
    assert lazy.values._masked_linear() is lazy
    drift(lazy)
    assert torch.equal(lazy(x), F.linear(x, lazy.weight, lazy.bias))
    assert torch.equal(held_inside(lazy), inside(lazy, lazy.values))


def test_state_dict():
    layer, x = drift(masked()), torch.randn(3, 100)
    state = copy.deepcopy(layer.state_dict())
    assert list(state) == ["weight", "bias", "values", "blocks"]
    other = nb.MaskedLinear.from_linear(linear_of(seed=5), 0.1, 16)
    first = bits(other.weight).clone()
    drift(other)
    other.load_state_dict(state)  # other blocks, other weight
    assert other.blocks.tolist() == layer.blocks.tolist()
    assert torch.equal(other(x), layer(x))
    # What was original stays the bytes of the model that was there.
    assert torch.equal(bits(other.original), read_blocks(first, other.blocks, 16))
    # Of a dense file the values are read.
    dense = linear_of(seed=9)
    missing = other.load_state_dict(dense.state_dict(), strict=False)
    assert missing.missing_keys == ["values", "blocks"]
    assert torch.equal(other(x), dense(x))
    assert torch.equal(other.values, held(other))
    # Values alone: they win over the weight.
    other.load_state_dict({"values": state["values"], "blocks": state["blocks"]}, strict=False)
    assert torch.equal(held_inside(other), inside(other, state["values"]))
    blocks = other.blocks.clone()
    with pytest.raises(RuntimeError, match="values must be"):
        other.load_state_dict({**state, "blocks": state["blocks"][:2]})
    assert torch.equal(other.blocks, blocks)


def test_functional_call_leaves_the_weight():
    layer, x = masked(), torch.randn(3, 100)
    weight = layer.weight.detach().clone()
    new = torch.ones_like(layer.values).requires_grad_()
    y = torch.func.functional_call(layer, {"values": new}, (x,))
    assert torch.equal(layer.weight, weight)
    y.sum().backward()
    assert new.grad is not None
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.values.fill_(1.0)
    assert torch.equal(twin(x), y)


def test_a_link_does_not_keep_the_layer():
    layer = masked()
    values, gone = layer.values, weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
    assert values._masked_linear() is None
    file = io.BytesIO()
    torch.save([masked().values], file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)[0], values)


# --- constructors and errors --------------------------------------------------------------------


def test_constructors():
    layer = nb.MaskedLinear(100, 70, bias=False, block=16, blocks=[[0, 1], [4, 6]])
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.values[0], layer.weight[:16, 16:32])
    assert layer.values.shape == (2, 16, 16)
    assert not layer.weight.requires_grad
    assert layer.density == pytest.approx(2 / 35)
    assert "blocks=2" in repr(layer)
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[2, 3] = True
    assert nb.MaskedLinear.from_linear(linear_of(), mask, 16).blocks.tolist() == [[2, 3]]
    wide = masked(kind=torch.bfloat16)
    assert wide.values.dtype == torch.bfloat16
    layer.reset_parameters()
    assert torch.equal(layer.values[0], layer.weight[:16, 16:32])
    back = drift(layer).to_linear()
    assert type(back) is nn.Linear
    assert back.weight is layer.weight
    assert torch.equal(back.weight[:16, 16:32], layer.values[0])


def test_refusals():
    make = nb.MaskedLinear.from_linear
    with pytest.raises(TypeError, match="be dense, got Int4Linear; use nibblock.AdapterLinear"):
        make(nb.Int4Linear.from_linear(linear_of(64, 64), group_size=32))
    with pytest.raises(TypeError, match="linear must be an nn.Linear, got LayerNorm"):
        make(nn.LayerNorm(3))
    with pytest.raises(TypeError, match="got MaskedLinear; use set_blocks"):
        make(masked())
    with pytest.raises(TypeError, match="weight must be float32, bfloat16 or float16, got float64"):
        make(linear_of(dtype=torch.float64))
    with pytest.raises(TypeError, match="dtype must be float32 for a float32 weight, got bfloat16"):
        make(linear_of(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="blocks must lie in"):
        make(linear_of(), [[9, 9]], 32)
    with pytest.raises(ValueError, match="block must be 16, 32, 64 or 128, got 8"):
        make(linear_of(), 0.1, 8)
    linear = linear_of()
    with pytest.raises(ValueError):
        make(linear, [[9, 9]])
    assert linear.weight.requires_grad
    layer = masked()
    with pytest.raises(ValueError, match=r"x last dim must equal in_features 100, got \[3, 5\]"):
        layer(torch.randn(3, 5))
    with pytest.raises(TypeError, match="x must be float32 as weight is, got bfloat16"):
        layer(torch.randn(3, 100).bfloat16())
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got int64"):
        layer(torch.ones(3, 100).long())
    with pytest.raises(ValueError, match="x must have at least 1 dimension"):
        layer(torch.tensor(1.0))
