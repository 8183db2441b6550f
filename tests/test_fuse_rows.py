"""Short forwards at many rows and in training: one pass for what lies between the products."""

from __future__ import annotations

import copy
from collections import Counter

import nibblock as nb
import pytest
import torch
from nibblock.nn import fuse_linears
from nibblock.nn.fused import shorten_forwards
from test_fuse import accelerated, family, near, near_in_norm
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = ("_rms_norm", "_rotated", "_silu_product")
GRADS = ("_rms_norm_grad", "_rotated", "_silu_product_grad")


class Names(TorchDispatchMode):
    """Counts our ops by name, and all."""

    def __init__(self):
        super().__init__()
        self.ours, self.all = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all += 1
        self.ours[str(func).split(".")[1]] += func.namespace == "nibblock"
        return func(*args, **(kwargs or {}))


def pair(name="Llama", dtype=torch.float32):
    plain = family(name).to(dtype)
    short = copy.deepcopy(plain)
    shorten_forwards(short)
    return plain, short


TOKENS = torch.arange(40).reshape(2, 20) % 30


def trained(model, **arguments):
    """(logits, gradients of every Parameter, ops)."""
    model.zero_grad()
    with Names() as counter:
        logits = model(TOKENS, use_cache=False, **arguments).logits
        logits.float().square().mean().backward()
    return logits, {n: p.grad for n, p in model.named_parameters()}, counter


def same(actual, expected):
    near(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        if grad is None:
            assert actual[1][name] is None
            continue
        near_in_norm(actual[1][name], grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_a_dense_model_trains_as_before_in_fewer_calls(name, dtype):
    plain, short = pair(name, dtype)
    expected, got = trained(plain), trained(short)
    same(got, expected)
    ours = got[2].ours
    assert (ours["_rms_norm"], ours["_silu_product"]) == (5, 2)  # two layers
    assert (ours["_rms_norm_grad"], ours["_silu_product_grad"]) == (5, 2)
    assert ours["_rotated"] == 8  # q and k, there and back
    assert got[2].all < 0.7 * expected[2].all
    assert list(short.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("name", ["Qwen3", "Gemma"])
def test_a_model_that_is_not_known_trains_as_before(name):
    same(*(trained(model) for model in reversed(pair(name))))


def test_what_is_frozen_gets_no_gradient():
    plain, short = pair()
    for model in (plain, short):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("down_proj" in name)
    same(trained(short), trained(plain))


def test_adapters_on_an_int4_base():
    plain = family("Llama")
    accelerated(plain)
    fused = copy.deepcopy(plain)
    fuse_linears(fused)
    for model in (plain, fused):
        nb.add_adapters(model, nb.AdapterConfig(density=0.5, block=16))
    expected, got = trained(plain), trained(fused)
    same(got, expected)
    assert min(got[2].ours[name] for name in NAMES) > 0
    assert min(got[2].ours[name] for name in GRADS) > 0


def test_positions_and_padding_of_each_row():
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    arguments = dict(attention_mask=mask, position_ids=positions)
    plain, short = pair()
    expected, got = trained(plain, **arguments), trained(short, **arguments)
    same(got, expected)
    assert got[2].ours["_rotated"] == 8
    with pytest.raises(AssertionError):  # the positions count
        near(trained(short, attention_mask=mask, position_ids=positions.flip(0))[0], expected[0])


def test_autocast():
    plain, short = pair()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected, got = (m(TOKENS).logits for m in (plain, short))
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_prompts_of_a_fused_model():
    plain = family("Llama")
    accelerated(plain)
    fused = copy.deepcopy(plain)
    fuse_linears(fused)
    with torch.no_grad(), Names() as counter:
        got = fused(TOKENS).logits
    assert counter.ours["_rotated_forward"] == 4
    assert counter.ours["_silu_product_forward"] == 2
    with torch.no_grad():
        near(got, plain(TOKENS).logits)


def test_second_derivatives():
    """A gradient penalty, through everything but the attention: torch's is once differentiable."""
    losses = []
    for model in pair():
        layer = model.model.layers[0]
        x = torch.linspace(-1, 1, 20 * 64).reshape(1, 20, 64).requires_grad_()
        y = layer.mlp(layer.input_layernorm(x))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        losses.append((x.grad, layer.mlp.up_proj.weight.grad, layer.input_layernorm.weight.grad))
    for expected, got in zip(*losses):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("what", ["hook", "forward", "class", "global", "compile"])
def test_what_is_passed_over_is_not_lost(what):
    """Whatever somebody put on the activation runs."""
    _, short = pair()
    act = short.model.layers[0].mlp.act_fn
    x = torch.randn(1, 20, 64)
    expected = short.model.layers[0].mlp(x).detach()
    seen = []
    handle = None
    if what == "hook":
        act.register_forward_hook(lambda *_: seen.append(1))
    elif what == "forward":
        own = act.forward
        act.forward = lambda t: (seen.append(1), own(t))[1]
    elif what == "class":
        short.model.layers[0].mlp.act_fn = nn.ReLU()
        seen.append(1)
    elif what == "global":
        handle = torch_module.register_module_forward_hook(lambda m, *_: seen.append(m is act))
    else:
        compiled = torch.compile(short.model.layers[0].mlp, backend="aot_eager", fullgraph=True)
        near(compiled(x), expected)
        return
    try:
        got = short.model.layers[0].mlp(x)
    finally:
        if handle is not None:
            handle.remove()
    assert any(seen)
    assert torch.allclose(got, expected, atol=1e-5) == (what != "class")
