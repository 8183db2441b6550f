"""Steady steps of the masked optimisers, whose states lie together, beside steps from lists."""

from __future__ import annotations

import copy
import io
import pickle

import nibblock as nb
import pytest
import torch
from masked_samples import bits
from nibblock import ops
from nibblock.optim import MaskedAdamW, MaskedSGD, _plan
from nibblock.sparse._choose import read_blocks
from torch import nn

MAKES = [
    lambda p: MaskedAdamW(p, lr=0.02),
    lambda p: MaskedSGD(p, lr=0.05, momentum=0.9),
    lambda p: MaskedSGD(p, lr=0.05),
]


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 70), nn.Tanh(), nn.Linear(70, 20), nn.Linear(20, 33))
    chosen = {"0": [[0, 0], [1, 2], [4, 1]], "2": [[0, 3], [1, 4]], "3": [[2, 1]]}
    return nb.sparse_update(model, chosen, block=16)


def train(model, optimizer, steps, first=0, some=None):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        gen = torch.Generator().manual_seed(step)
        model(torch.randn(8, 48, generator=gen)).square().mean().backward()
        if some is not None:
            model[some(step)].values.grad = None
        optimizer.step()


def same(model, other):
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(bits(a), bits(b)), name


def written(model):
    for layer in (model[0], model[2], model[3]):
        version = layer.values._version
        kept = bits(layer.weight).clone()
        layer.sync()  # must find nothing to do
        assert torch.equal(kept, bits(layer.weight))
        assert layer._synced == version
        held = read_blocks(layer.weight, layer.blocks, layer.block)
        rows, columns = layer.weight.shape
        for block, value, (i, j) in zip(held, layer.values, layer.blocks.tolist()):
            part = slice(0, rows - 16 * i), slice(0, columns - 16 * j)
            assert torch.equal(block[part], value[part])


@pytest.mark.parametrize("make", MAKES)
def test_packed_steps_give_the_bits_of_steps_from_lists(make, monkeypatch):
    model, other = net(), net()
    optimizer = make(nb.trainable_parameters(model))
    train(model, optimizer, 6)
    (batch,) = (b for p in optimizer._plans.values() for b in p.batches if b.kind == "block")
    assert batch.steps.count == 5
    written(model)
    monkeypatch.setattr(_plan.Batch, "packs", False)
    train(other, make(nb.trainable_parameters(other)), 6)
    same(model, other)


def test_packed_states_are_views_that_files_and_copies_take_apart():
    model = net()
    values = [model[i].values for i in (0, 2, 3)]
    optimizer = MaskedAdamW(values, lr=0.02)
    train(model, optimizer, 4)
    states = [optimizer.state[v] for v in values]
    for name in ("exp_avg", "exp_avg_sq", "age"):
        assert len({s[name].untyped_storage().data_ptr() for s in states}) == 1
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        for tensor in (state["exp_avg"], state["exp_avg_sq"], state["age"]):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    twin, copied = copy.deepcopy((model, optimizer))
    stored = pickle.loads(pickle.dumps(optimizer))
    assert sum(s["exp_avg"].untyped_storage().nbytes() for s in stored.state.values()) == sum(
        4 * v.numel() for v in values
    )
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    loaded = net()
    loaded.load_state_dict(model.state_dict())
    fresh = MaskedAdamW([loaded[i].values for i in (0, 2, 3)], lr=0.02)
    train(loaded, fresh, 0)
    fresh.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    for m, o in ((model, optimizer), (twin, copied), (loaded, fresh)):
        train(m, o, 4, first=4)
        written(m)
    same(model, twin)
    same(model, loaded)


def test_steps_with_other_gradients_each_time_are_never_packed_and_right(monkeypatch):
    def some(step):
        return (0, 2, 3)[step % 3]

    model, other = net(), net()
    optimizer = MaskedAdamW(nb.trainable_parameters(model), lr=0.02)
    train(model, optimizer, 5)
    train(model, optimizer, 6, first=5, some=some)
    assert all(b.steps is None for p in optimizer._plans.values() for b in p.batches)
    written(model)
    train(model, optimizer, 3, first=11)
    monkeypatch.setattr(_plan.Batch, "packs", False)
    twin = MaskedAdamW(nb.trainable_parameters(other), lr=0.02)
    train(other, twin, 5)
    train(other, twin, 6, first=5, some=some)
    train(other, twin, 3, first=11)
    same(model, other)


def test_foreign_changes_between_packed_steps_reach_the_weight():
    model = net()
    layer, optimizer = model[0], MaskedAdamW(nb.trainable_parameters(model), lr=0.02)
    train(model, optimizer, 4)
    with torch.no_grad():
        layer.values.mul_(2)
    model(torch.zeros(1, 48))
    written(model)
    train(model, optimizer, 2, first=4)
    written(model)
    with torch.no_grad():
        layer.values.mul_(2)
    optimizer.found_inf = torch.ones(1)  # a void step writes nothing through
    optimizer.step()
    model(torch.zeros(1, 48))
    written(model)


def test_other_blocks_and_other_parameters_end_the_packing():
    model = net()
    layer, optimizer = model[0], MaskedAdamW(nb.trainable_parameters(model), lr=0.02)
    train(model, optimizer, 4)
    kept = optimizer.state[layer.values]["exp_avg"][1].clone()
    optimizer.move_blocks(layer.values, layer.set_blocks([[1, 2], [3, 0]]))
    assert torch.equal(optimizer.state[layer.values]["exp_avg"][0], kept)
    train(model, optimizer, 3, first=4)
    assert optimizer.state[layer.values]["age"].tolist() == [7, 3]
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    train(model, optimizer, 3, first=7)
    written(model)
    layer.set_blocks([[0, 0], [1, 2], [3, 0]])
    with pytest.raises(ValueError, match="after set_blocks call move_blocks"):
        train(model, optimizer, 1, first=10)


def test_autocast_copies_follow_packed_steps():
    model = net()
    optimizer = MaskedAdamW(nb.trainable_parameters(model), lr=0.02)
    x = torch.randn(4, 48)
    for step in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(x)
        for layer in (model[0], model[2], model[3]):
            assert torch.equal(layer._cast[0], layer.weight.to(torch.bfloat16)), step


# --- the op's lists of one tensor ---------------------------------------------------------------


def arguments():
    torch.manual_seed(1)
    weights = [torch.randn(40, 48), torch.randn(32, 16)]
    index = [torch.tensor([[0, 1], [2, 2]]).int(), torch.tensor([[1, 0]]).int()]
    values = [read_blocks(w, b, 16) for w, b in zip(weights, index)]
    return {
        "values": values,
        "grads": [torch.randn_like(v) for v in values],
        "exp_avgs": [torch.rand_like(v) for v in values],
        "exp_avg_sqs": [torch.rand_like(v) for v in values],
        "ages": [torch.tensor([3, 0]).int(), torch.tensor([1]).int()],
        "weights": weights,
        "blocks": index,
    }


@pytest.mark.parametrize("which", [("exp_avgs",), ("ages", "blocks"), (
    "exp_avgs", "exp_avg_sqs", "ages", "blocks")])  # fmt: skip
def test_one_tensor_for_all_values_gives_the_bits_of_lists(which):
    lists, joined = arguments(), arguments()
    for name in which:
        joined[name] = [torch.cat(joined[name])]
    for given in (lists, joined):
        ops.masked_adamw_block_(**given, block=16, lr=0.1)
    for name, tensors in lists.items():
        got = torch.cat([t.flatten() for t in joined[name]])
        assert torch.equal(bits(got), bits(torch.cat([t.flatten() for t in tensors]))), name


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("exp_avgs", lambda t: t[1:], r"exp_avgs\[0\] must hold 768 elements"),
        ("exp_avg_sqs", lambda t: t.mT, r"exp_avg_sqs\[0\] must be contiguous"),
        ("ages", lambda t: t[1:], r"ages\[0\] must hold 3 elements"),
        ("blocks", lambda t: t[1:], r"blocks\[0\] must be \[3, 2\]"),
        ("blocks", lambda t: t + 2, r"blocks\[0\] must be sorted, distinct and in the"),
    ],
)
def test_one_tensor_that_does_not_fit_is_refused(name, change, message):
    given = arguments()
    given[name] = [change(torch.cat(given[name]))]
    before = {k: [t.clone() for t in v] for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        ops.masked_adamw_block_(**given, block=16, lr=0.1)
    for k, tensors in before.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, given[k]))
