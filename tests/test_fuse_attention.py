"""fuse: a decode step's attention in one op, and every call that it leaves to transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from nibblock.nn import fuse_linears
from test_fuse import accelerated, family, near
from torch.utils._python_dispatch import TorchDispatchMode


class CountAttention(TorchDispatchMode):
    """Counts our attention and torch's."""

    def __init__(self):
        super().__init__()
        self.ours = self.torchs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # (the last is all of a layer from its attention on)
        own = ("nibblock._attend", "nibblock._causal_attention.", "nibblock._int4_layer_end")
        self.ours += str(func).startswith(own)
        self.torchs += "scaled_dot_product" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


def decode(model, change=lambda model, arguments: None):
    """One token behind a cache of five: ((our attention, torch's), logits)."""
    cache = transformers_cache()
    with torch.no_grad():
        model(torch.arange(10).view(2, 5), past_key_values=cache)
    arguments = dict(past_key_values=cache)
    change(model, arguments)
    with torch.no_grad(), CountAttention() as counter:
        logits = model(torch.tensor([[3], [4]]), **arguments).logits
    return (counter.ours, counter.torchs), logits


def transformers_cache():
    return pytest.importorskip("transformers").DynamicCache()


def pair_of_models(name="Llama", dtype=torch.float32):
    plain = family(name).to(dtype)
    accelerated(plain)
    fused = copy.deepcopy(plain)
    fuse_linears(fused)
    return plain, fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_one_token_attends_in_one_op(name, dtype):
    plain, fused = pair_of_models(name, dtype)
    (ours, torchs), got = decode(fused)
    assert (ours, torchs) == (2, 0)
    count, expected = decode(plain)
    assert count == (0, 2)
    near(got, expected)


def masked(model, arguments):  # left padding
    arguments["attention_mask"] = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


def with_dropout(model, arguments):
    model.train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 1e-12


def eager(model, arguments):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [masked, with_dropout, eager])
def test_attention_that_the_op_does_not_cover(change):
    plain, fused = pair_of_models()
    (ours, _), got = decode(fused, change)
    assert ours == 0
    near(got, decode(plain, change)[1])


def test_a_cache_that_wants_a_gradient_gets_it():
    grads = []
    for model in pair_of_models():
        cache = transformers_cache()
        with torch.no_grad():
            model(torch.arange(5).view(1, 5), past_key_values=cache)
        keys = [layer.keys.clone().requires_grad_(True) for layer in cache.layers]
        for layer, key in zip(cache.layers, keys):
            layer.keys = key
        model.requires_grad_(False)
        model(torch.tensor([[3]]), past_key_values=cache).logits.square().sum().backward()
        grads.append([key.grad for key in keys])
    for a, b in zip(*grads):
        assert a.abs().max() > 0
        near(b, a)
