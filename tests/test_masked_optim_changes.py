"""`.state` and `param_groups` changed by hand between steps, against torch's optimisers."""

from __future__ import annotations

import copy
import io
import pickle
from collections import defaultdict

import nibblock as nb
import pytest
import torch
from masked_samples import held
from nibblock.optim import MaskedAdamW, MaskedSGD
from torch import nn


class Pair:
    """One of our optimisers on a masked and on a plain layer, torch's on two copies of them."""

    def __init__(self, ours, theirs, **rule):
        torch.manual_seed(0)
        blocks = torch.ones(2, 2, dtype=torch.bool)  # everything, so that the two are comparable
        self.layer = nb.MaskedLinear.from_linear(nn.Linear(32, 32, bias=False), blocks, 16)
        self.plain = nn.Parameter(torch.randn(5))
        mine = [self.layer.values, self.plain]
        other = [nn.Parameter(p.detach().clone()) for p in mine]
        self.params = [mine, other]
        # Each in a group of its own: a step packs one while the other's plan is kept.
        self.optimizers = [
            kind([{"params": [p]} for p in params], **rule)
            for kind, params in zip((ours, theirs), self.params)
        ]

    def step(self, times=1):
        for _ in range(times):
            for pair in zip(*self.params):
                grad = torch.randn(pair[0].shape)
                for p in pair:
                    p.grad = grad.clone()
            for optimizer in self.optimizers:
                optimizer.step()
        for a, b in zip(*self.params):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        self.layer(torch.randn(3, 32))
        assert torch.equal(held(self.layer), self.layer.values)


def clear(optimizer):
    optimizer.state.clear()


def another(optimizer):
    optimizer.state = defaultdict(dict)


def empty_each(optimizer):
    for group in optimizer.param_groups:
        optimizer.state[group["params"][0]] = {}


def delete_one(optimizer):
    del optimizer.state[optimizer.param_groups[0]["params"][0]]


def replace_tensors(optimizer):
    for state in optimizer.state.values():
        state["exp_avg"] = torch.ones_like(state["exp_avg"])


def write_tensors(optimizer):
    for state in optimizer.state.values():
        state["exp_avg_sq"].fill_(2.0)


@pytest.mark.parametrize(
    "change", [clear, another, empty_each, delete_one, replace_tensors, write_tensors]
)
def test_changes_of_the_state_count(change):
    pair = Pair(MaskedAdamW, torch.optim.AdamW, lr=0.02)
    for _ in range(2):
        pair.step(4)  # from the second step on states are packed
        for optimizer in pair.optimizers:
            change(optimizer)
    pair.step(3)
    ours, theirs = (optimizer.state_dict()["state"] for optimizer in pair.optimizers)
    assert ours.keys() == theirs.keys() == {0, 1}
    for at in ours:
        assert torch.equal(ours[at]["exp_avg"] != 0, theirs[at]["exp_avg"] != 0)


def test_steps_alone_change_no_plan():
    pair = Pair(MaskedAdamW, torch.optim.AdamW, lr=0.02)
    pair.step(3)
    optimizer = pair.optimizers[0]
    plans = dict(optimizer._plans)
    pair.step(3)
    assert all(optimizer._plans[at] is plan for at, plan in plans.items())


@pytest.mark.parametrize("first, then", [(0.0, 0.9), (0.9, 0.0)])
@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_momentum_comes_and_goes(first, then, dampening):
    pair = Pair(MaskedSGD, torch.optim.SGD, lr=0.05, momentum=first, dampening=dampening)
    for momentum in (first, then, first, then):
        for optimizer in pair.optimizers:
            for group in optimizer.param_groups:
                group["momentum"] = momentum
        pair.step(3)


def test_copies_of_the_state_are_plain():
    pair = Pair(MaskedAdamW, torch.optim.AdamW)
    pair.step(3)
    optimizer = pair.optimizers[0]
    for made in (copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
        twin = made(optimizer.state)
        assert type(twin) is defaultdict
        assert {type(state) for state in twin.values()} == {dict}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    state = optimizer.state.setdefault(pair.plain)
    assert state is optimizer.state[pair.plain]
    optimizer.state.update({pair.plain: {}})
    optimizer.state |= {pair.layer.values: {}}
    assert [len(state) for state in optimizer.state.values()] == [0, 0]
    assert optimizer.state[nn.Parameter(torch.ones(1))] == {}


@pytest.mark.parametrize("kind", ("MaskedAdamW", "MaskedMuon", "MaskedSGD"))
def test_values_whose_layer_went_before_the_first_step(kind):
    linear = nn.Linear(64, 64)
    layer = nb.MaskedLinear.from_linear(linear, blocks=torch.tensor([[0, 1]]), block=32)
    values = layer.values
    optimizer = getattr(nb.optim, kind)([values], lr=0.1)
    values.grad = torch.ones_like(values)
    before = values.detach().clone()
    del layer, linear
    with pytest.raises(ValueError, match="values must belong to a MaskedLinear that lives"):
        optimizer.step()
    assert torch.equal(values, before)
