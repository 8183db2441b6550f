"""Fused siblings and short forwards where the model or its owner does something of its own."""

from __future__ import annotations

import copy
import pickle
import threading

import nibblock as nb
import pytest
import torch
from nibblock.nn import fuse_linears
from test_fuse import (
    CONFIG,
    Attention,
    GatedMLP,
    accelerated,
    calls,
    count_ops,
    equal,
    family,
    near,
    pair,
)
from torch import nn

# --- biases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", ["data", "numpy", "inference"])
@pytest.mark.parametrize("kv", [24, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_edits_without_a_version_are_seen(edit, kv, dtype):
    plain, fused = pair(kv=kv)
    x = torch.randn(1, 64, dtype=dtype)
    for module in (plain, fused):
        if edit == "inference":
            with torch.inference_mode():
                module.v_proj.bias = nn.Parameter(torch.zeros(kv), requires_grad=False)
        elif edit == "data":
            module.to(dtype)
    with torch.no_grad():
        for value in (1, 2):
            assert calls(fused, x)[0] == 1
            for module in (plain, fused):
                bias = module.v_proj.bias
                if edit == "data":
                    bias.data.add_(value)
                elif edit == "numpy":
                    bias.detach().numpy()[...] = value
                else:
                    with torch.inference_mode():
                        bias.fill_(value)
            assert equal(fused(x), plain(x))


# --- forwards and hooks of siblings ---------------------------------------------------------------


def wrap(module):
    """As transformers' helpers wrap modules: the instance gets a forward."""
    seen = []
    forward = module.forward

    def wrapped(*args, **kwargs):
        seen.append(True)
        return forward(*args, **kwargs) + 1

    module.forward = wrapped
    return seen


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_forward_of_a_siblings_own(name):
    plain, fused = pair()
    x = torch.randn(1, 64)
    seen = [wrap(getattr(module, name)) for module in (plain, fused)]
    count, got = calls(fused, x)
    assert count == 3  # nothing is computed ahead of a forward that may change anything
    assert equal(got, plain(x))
    assert len(seen[1]) == 1


@pytest.mark.parametrize("how", ["forward", "hook"])
def test_a_sibling_changed_just_before_it_runs(how):
    plain, fused = pair()
    for module in (plain, fused):
        last = module.v_proj

        def change(*args, last=last):
            last.bias.data.add_(1)

        if how == "hook":
            last.register_forward_pre_hook(change)
        else:
            forward = last.forward
            last.forward = lambda x, f=forward, change=change: (change(), f(x))[1]
    x = torch.randn(1, 64)
    with torch.no_grad():
        for _ in range(2):
            assert equal(fused(x), plain(x))


INSIDE = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "mlp.act_fn",
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
]


@pytest.mark.parametrize("name", INSIDE)
def test_short_forwards_run_a_forward_of_an_instance(name):
    plain = family("Llama")
    accelerated(plain)
    fused = copy.deepcopy(plain)
    fuse_linears(fused)
    tokens = torch.tensor([[3, 50, 9]])
    with torch.no_grad():
        expected = plain(tokens).logits
        near(fused(tokens).logits, expected)
        seen = [wrap(m.model.layers[1].get_submodule(name)) for m in (plain, fused)]
        changed = plain(tokens).logits
        assert not torch.equal(changed, expected)
        near(fused(tokens).logits, changed)
        assert len(seen[1]) == len(seen[0]) == 1


def test_short_forwards_stay_short():
    model = family("Llama")
    nb.accelerate(model, CONFIG, fuse=True, progress=False)
    for at in ("mlp", "input_layernorm"):
        module = model.model.layers[0].get_submodule(at)
        (_, ops), _ = count_ops(lambda module=module: module(torch.ones(1, 1, 64)))
        assert ops == 2  # with torch.ones


# --- gradients ------------------------------------------------------------------------------------


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        for name in "qkv":
            setattr(self, f"{name}_proj", nn.Linear(64, 64, bias=False))
        self.gain = nn.Parameter(torch.ones(64))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        scaled = q * self.gain
        k.mul_(2)
        v += 1
        return scaled + k + v


@pytest.mark.parametrize("rows", [1, 2])
def test_outputs_may_be_changed_in_place(rows):
    plain, fused = pair(InPlace)
    x = torch.randn(rows, 64)
    for module in (plain, fused):
        module(x).sum().backward()
    assert torch.equal(fused.gain.grad, plain.gain.grad)
    assert calls(fused, x)[0] == 1


# --- classes that decide for themselves -----------------------------------------------------------


class Locked(Attention):
    """A module that cannot be copied as it is, and knows how to be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self):
        state = self.__dict__.copy()
        del state["lock"]
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


class Few(Attention):
    """Copies only what it knows of."""

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_int4")}


class Remade(Attention):
    """Copied by a call of its class."""

    def __reduce__(self):
        return type(self), (), self.__dict__


@pytest.mark.parametrize("make", [Locked, Few, Remade])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_made_as_the_class_wants(make, how):
    plain, fused = pair(make)
    other = how(fused)
    assert isinstance(other, make)
    x = torch.randn(1, 64)
    count, got = calls(other, x)
    assert equal(got, plain(x))
    assert count == (1 if make is Locked else 3)


def refusing(how):
    """A class without subclasses."""

    class Final(Attention):
        def __init_subclass__(cls, **kwargs):
            raise TypeError("Final must stay as it is")

    class Meta(type):
        def __new__(mcs, name, bases, body):
            if any(type(base) is mcs for base in bases):
                raise RuntimeError("sealed")
            return super().__new__(mcs, name, bases, body)

    class Sealed(Attention, metaclass=Meta):
        pass

    return Final if how == "init_subclass" else Sealed


@pytest.mark.parametrize("how", ["init_subclass", "metaclass"])
def test_a_class_that_refuses_subclasses_is_not_fused(how):
    model = nn.ModuleDict({"a": refusing(how)(), "mlp": GatedMLP()})
    report = nb.accelerate(model, CONFIG, fuse=True, progress=False)
    assert report.fused == ["mlp.(gate_proj|up_proj)"]
    assert list(report.not_fused) == ["a.(q_proj|k_proj|v_proj)"]
    assert "not fused: a.(q_proj|k_proj|v_proj): " in str(report)
    assert "cannot be subclassed: " in str(report)
    assert report.to_dict()["not_fused"] == report.not_fused
    assert model["a"].q_proj._fused is None
    assert calls(model["a"], torch.randn(1, 64))[0] == 3
