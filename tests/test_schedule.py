"""Schedules, re-selection with the optimiser's memory, penalties, and blocks that really leave."""

from __future__ import annotations

import copy

import nibblock as nb
import pytest
import torch
from nibblock.sparse import (
    CubicSchedule,
    GroupLasso,
    ReselectSchedule,
    drop_idle_blocks,
    even_blocks,
    idle_blocks,
    reselect,
    resize,
    select_blocks,
)
from test_select_blocks import data, loss_of, mlp
from torch import nn

KINDS = ("masked", "adapter", "int4 adapter")
OPTIMISERS = {
    "MaskedAdamW": lambda p: nb.optim.MaskedAdamW(p, lr=0.01, weight_decay=0.0),
    "MaskedSGD": lambda p: nb.optim.MaskedSGD(p, lr=0.01, momentum=0.9),
    "MaskedMuon": lambda p: nb.optim.MaskedMuon(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
}


def sparse_model(kind, density=0.3, seed=0):
    """A model without dropout whose linears have trainable blocks of 16."""
    model, batches = mlp(seed).eval(), data()
    if kind == "int4 adapter":
        nb.accelerate(model, nb.Int4Config(group_size=32), progress=False)
    chosen = select_blocks(model, batches, loss_of, density=density, block=16, progress=False)
    if kind == "masked":
        nb.sparse_update(model, chosen)
    else:
        nb.add_adapters(model, nb.AdapterConfig(block=16), blocks=chosen)
    return model, batches


def train(model, optimizer, batches, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = loss_of(model, batches[step % len(batches)])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    return torch.stack(losses)


def layers_of(model):
    kinds = (nb.MaskedLinear, nb.AdapterLinear)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds)}


def by_place(layer, tensor):
    """{(row, column): tensor[z]}."""
    return {tuple(p): t.clone() for p, t in zip(layer.blocks.tolist(), tensor)}


def states_of(optimizer, layer):
    """Each state of a layer's values, one entry a block."""
    values = layer.values
    out = {}
    for name, state in optimizer.state[values].items():
        if name == "step":
            continue
        if state.numel() == values.numel():
            state = state.view(values.shape)
        assert len(state) == len(values)
        out[name] = by_place(layer, state)
    return out


# --- schedules ------------------------------------------------------------------------------------


def test_cubic_schedule():
    s = CubicSchedule(100, start=0.01, peak=0.05, end=0.02, grow=0.3, shrink=0.3, heal=0.2)
    stages = [s.stage(t) for t in range(100)]
    assert [stages.count(n) for n in ("grow", "hold", "shrink", "heal")] == [30, 20, 30, 20]
    found = [s.density(t) for t in range(100)]
    assert found[0] == pytest.approx(0.01)
    assert found[15] == pytest.approx(0.05 - 0.04 * 0.5**3)
    assert found[30:50] == [0.05] * 20
    assert found[65] == pytest.approx(0.02 + 0.03 * 0.5**3)
    assert found[80:] == [0.02] * 20
    assert all(a <= b for a, b in zip(found[:30], found[1:31]))
    assert all(a >= b for a, b in zip(found[50:], found[51:]))
    plain = CubicSchedule(10, start=0.1, peak=0.1, end=0.1, grow=0, shrink=0, heal=0)
    assert {(plain.stage(t), plain.density(t)) for t in range(10)} == {("hold", 0.1)}
    for bad, text in (
        (dict(total=0), "total must be at least 1, got 0"),
        (dict(total=5, peak=0.001), "peak must be at least start and end"),
        (dict(total=5, grow=0.9), "grow [+] shrink [+] heal must be at most 1"),
        (dict(total=5, start=2.0), r"start must be in \[0, 1\], got 2.0"),
    ):
        with pytest.raises(ValueError, match=text):
            CubicSchedule(**bad)


def test_reselect_schedule():
    s = ReselectSchedule(total=300, every=50, rate=0.2)
    rates = [s.at(t) for t in range(301)]
    assert [t for t, r in enumerate(rates) if r > 0] == [50, 100, 150, 200]
    assert rates[150] == pytest.approx(0.1)
    assert rates[50] > rates[100] > rates[150] > rates[200]
    assert not any(ReselectSchedule(300, rate=0.0).at(t) for t in range(301))
    with pytest.raises(ValueError, match="rate must be in"):
        ReselectSchedule(10, rate=1.5)


# --- re-selection ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(OPTIMISERS))
def test_rate_0_is_no_reselection_bit_for_bit(kind, name):
    found = []
    for selects in (False, True):
        model, batches = sparse_model(kind)
        optimizer = OPTIMISERS[name](nb.trainable_parameters(model))
        losses = train(model, optimizer, batches, 3)
        if selects:
            done = reselect(model, optimizer, batches, loss_of, rate=0.0)
            assert not done.dropped
            assert not done.grown
        losses = torch.cat([losses, train(model, optimizer, batches, 3, 3)])
        found.append((losses, [p.detach().clone() for p in nb.trainable_parameters(model)]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(OPTIMISERS))
def test_survivors_keep_everything(kind, name):
    model, batches = sparse_model(kind)
    optimizer = OPTIMISERS[name](nb.trainable_parameters(model))
    train(model, optimizer, batches, 5)
    layers = layers_of(model)
    parameters = {n: layer.values for n, layer in layers.items()}
    values = {n: by_place(layer, layer.values.detach()) for n, layer in layers.items()}
    states = {n: states_of(optimizer, layer) for n, layer in layers.items()}
    blocks = {n: {tuple(p) for p in layer.blocks.tolist()} for n, layer in layers.items()}
    count = sum(len(v) for v in blocks.values())
    changes = {
        (n, *place): float((v if kind != "masked" else v - first).norm())
        for n, layer in layers.items()
        for (place, v), first in zip(
            values[n].items(), layer.original if kind == "masked" else values[n].values()
        )
    }
    done = reselect(model, optimizer, batches, loss_of, rate=0.25, seed=3)
    lost = {(n, *map(int, p)) for n, index in done.dropped.items() for p in index}
    got = {(n, *map(int, p)) for n, index in done.grown.items() for p in index}
    assert len(lost) == len(got) == round(0.25 * count)
    assert done.count == count
    assert f"{len(lost)} blocks dropped, {len(got)} grown" in str(done)
    kept_changes = [c for place, c in changes.items() if place not in lost]
    assert max(changes[place] for place in lost) <= min(kept_changes)
    for n, layer in layers.items():
        assert layer.values is parameters[n]
        after = {tuple(p) for p in layer.blocks.tolist()}
        assert after == (blocks[n] - {p[1:] for p in lost if p[0] == n}) | {
            p[1:] for p in got if p[0] == n
        }
        assert len(layer.values) == len(after)
        now = by_place(layer, layer.values.detach())
        later = states_of(optimizer, layer)
        for place in after & blocks[n]:
            assert torch.equal(now[place], values[n][place])
            assert states[n].keys() == later.keys()
            for key, state in states[n].items():
                assert torch.equal(later[key][place], state[place]), key
        for place in after - blocks[n]:
            assert kind == "masked" or not now[place].any()
            for key, state in later.items():
                assert not state[place].any(), key
    losses = train(model, optimizer, batches, 3)
    assert torch.isfinite(losses).all()
    for layer in layers.values():
        assert layer.values.grad is None or layer.values.grad.shape == layer.values.shape


def test_the_model_does_not_jump():
    """New blocks change nothing yet, and a masked layer keeps what the dropped ones learned."""
    for kind in KINDS:
        model, batches = sparse_model(kind)
        optimizer = OPTIMISERS["MaskedAdamW"](nb.trainable_parameters(model))
        train(model, optimizer, batches, 10)
        with torch.no_grad():
            before = model(batches[0][0])
            if kind == "masked":
                assert reselect(model, optimizer, batches, loss_of, rate=0.5).dropped
            else:
                assert resize(model, optimizer, 0.6, batches, loss_of).grown
            after = model(batches[0][0])
        torch.testing.assert_close(after, before, rtol=0, atol=0 if kind == "masked" else 1e-5)


def test_dropped_blocks_may_be_restored():
    model, batches = sparse_model("masked")
    first = {n: m.original_weight() for n, m in layers_of(model).items()}
    optimizer = OPTIMISERS["MaskedAdamW"](nb.trainable_parameters(model))
    train(model, optimizer, batches, 5)
    done = reselect(model, optimizer, batches, loss_of, rate=0.5, dropped="restore")
    for name, index in done.dropped.items():
        weight = layers_of(model)[name].weight
        for row, column in index.tolist():
            area = (slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
            if [row, column] not in done.grown.get(name, torch.empty(0, 2)).tolist():
                assert torch.equal(weight[area], first[name][area])


def test_warm_blocks_begin_with_the_mean_gradient():
    model, batches = sparse_model("masked")
    optimizer = OPTIMISERS["MaskedAdamW"](nb.trainable_parameters(model))
    train(model, optimizer, batches, 5)
    dense = copy.deepcopy(model)
    nb.unmask(dense)
    dense.requires_grad_()
    dense.zero_grad()
    (sum(loss_of(dense, b) for b in batches) / len(batches)).backward()
    done = reselect(model, optimizer, batches, loss_of, rate=0.3, warm=True)
    assert done.grown
    for name, index in done.grown.items():
        layer = layers_of(model)[name]
        state = {k: by_place(layer, v) for k, v in optimizer.state[layer.values].items()}
        grad = dense.get_submodule(name).weight.grad
        for row, column in index.tolist():
            want = grad[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            height, width = want.shape
            assert int(state["age"][row, column]) == 4
            m = state["exp_avg"][row, column][:height, :width] / (1 - 0.9**4)
            v = state["exp_avg_sq"][row, column][:height, :width] / (1 - 0.999**4)
            torch.testing.assert_close(m, want, rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(v, want.square(), rtol=1e-3, atol=1e-10)
    assert torch.isfinite(train(model, optimizer, batches, 2)).all()


def test_resize_follows_a_schedule():
    for kind in ("masked", "adapter"):
        model, batches = sparse_model(kind, density=0.1)
        optimizer = OPTIMISERS["MaskedAdamW"](nb.trainable_parameters(model))
        total = sum(-(-m.out_features // 16) * -(-m.in_features // 16)
                    for m in layers_of(model).values())  # fmt: skip
        schedule = CubicSchedule(12, start=0.1, peak=0.5, end=0.2, grow=0.4, shrink=0.4, heal=0.1)
        for step in range(12):
            train(model, optimizer, batches, 1, step)
            density = schedule.density(step + 1)
            done = resize(model, optimizer, density, batches, loss_of)
            assert done.count == sum(len(m.values) for m in layers_of(model).values())
            assert done.count == max(1, int(density * total + 0.5))
            assert not (done.dropped and done.grown)
        assert done.count < 0.25 * total


@pytest.mark.parametrize("density", [0.9, 1.0])
def test_no_more_blocks_are_exchanged_than_are_free(density):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 48))
    batches = [(torch.randn(16, 64), torch.randn(16, 48)) for _ in range(4)]
    shapes = {"0": (96, 64), "2": (48, 96)}
    blocks = {name: even_blocks(*shape, 16, density) for name, shape in shapes.items()}
    nb.sparse_update(model, blocks, block=16)
    before = sum(len(layer.values) for layer in (model[0], model[2]))
    done = reselect(model, None, batches, lambda m, b: (m(b[0]) - b[1]).square().mean(), rate=0.5)
    assert done.count == before
    assert sum(len(layer.values) for layer in (model[0], model[2])) == before
    assert (before == 42) == (density == 1.0)


def test_muon_has_no_moments_to_start_warm():
    model, batches = sparse_model("masked")
    optimizer = nb.optim.MaskedMuon(nb.trainable_parameters(model))
    train(model, optimizer, batches, 2)
    before = {n: m.blocks.clone() for n, m in layers_of(model).items()}
    text = "reselect: optimizer must be a MaskedAdamW to start warm, got MaskedMuon"
    with pytest.raises(ValueError, match=text):
        reselect(model, optimizer, batches, loss_of, rate=0.3, warm=True)
    assert all(torch.equal(m.blocks, before[n]) for n, m in layers_of(model).items())


def test_reselection_refuses():
    model, batches = sparse_model("adapter")
    optimizer = OPTIMISERS["AdamW"](nb.trainable_parameters(model))
    before = {n: m.blocks.clone() for n, m in layers_of(model).items()}
    for change, text in (
        (dict(rate=1.5), r"reselect: rate must be in \[0, 1\], got 1.5"),
        (dict(dropped="fold"), 'reselect: dropped must be "keep" or "restore", got \'fold\''),
        (dict(warm=True), "reselect: optimizer must be a MaskedAdamW to start warm, got AdamW"),
    ):
        with pytest.raises(ValueError, match=text):
            reselect(model, optimizer, batches, loss_of, **{"rate": 0.3, **change})
    with pytest.raises(ValueError, match="model must hold layers with trainable blocks, got none"):
        reselect(mlp(), optimizer, batches, loss_of)
    with pytest.raises(ValueError, match="select_blocks: batches must hold at least one"):
        reselect(model, optimizer, [], loss_of)
    assert all(torch.equal(m.blocks, before[n]) for n, m in layers_of(model).items())


# --- penalties and removal ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["masked", "adapter"])
def test_group_lasso_is_the_proximal_step(kind):
    model, batches = sparse_model(kind)
    optimizer = OPTIMISERS["MaskedAdamW"](nb.trainable_parameters(model))
    train(model, optimizer, batches, 5)
    layers = layers_of(model)
    before = {n: m.values.detach().double().clone() for n, m in layers.items()}
    weights = {"0": torch.linspace(0.5, 2, len(before["0"]))} if "0" in before else {}
    lasso = GroupLasso(model, strength=0.2, weights=weights)
    norms = lasso.step(lr=0.01)
    seen = 0
    for name, layer in layers.items():
        start = layer.original.double() if kind == "masked" else torch.zeros_like(before[name])
        change = before[name] - start
        size = change.flatten(1).norm(dim=1)
        limit = 0.01 * 0.2 * 16 * weights.get(name, torch.ones(len(size))).double()
        shrink = (1 - limit / size.clamp_min(1e-300)).clamp_min(0)
        want = start + change * shrink[:, None, None]
        torch.testing.assert_close(layer.values.detach().double(), want, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(norms[name].double(), size * shrink, rtol=1e-4, atol=1e-6)
        gone = shrink == 0
        seen += int(gone.sum())
        assert torch.equal(norms[name] == 0, gone)
        assert torch.equal(layer.values.detach().double()[gone], start[gone])
        if kind == "masked":  # the dense weight follows
            at = layer.blocks[0].tolist()
            area = layer.weight[16 * at[0] : 16 * at[0] + 16, 16 * at[1] : 16 * at[1] + 16]
            part = layer.values.detach()[0][: area.shape[0], : area.shape[1]]
            assert torch.equal(area, part)
    idle = idle_blocks(model)
    assert sum(int(i.sum()) for i in idle.values()) == seen


@pytest.mark.parametrize("kind", ["masked", "adapter"])
def test_idle_blocks_leave_storage(kind):
    model, batches = sparse_model(kind)
    optimizer = OPTIMISERS["MaskedAdamW"](nb.trainable_parameters(model))
    train(model, optimizer, batches, 5)
    layers = layers_of(model)
    changes = [m.values.detach() - (m.original if kind == "masked" else 0) for m in layers.values()]
    median = float(torch.cat([c.flatten(1).norm(dim=1) for c in changes]).median())
    lasso = GroupLasso(model, strength=median / 16)
    lasso.step(lr=1.0)
    idle = idle_blocks(model)
    expected = {n: int(i.sum()) for n, i in idle.items() if i.any()}
    assert expected
    assert sum(expected.values()) < sum(len(m.values) for m in layers.values())
    bytes_before = sum(m.values.untyped_storage().nbytes() for m in layers.values())
    x = batches[0][0]
    with torch.no_grad():
        y = model(x)
        assert drop_idle_blocks(model, optimizer) == expected
        torch.testing.assert_close(model(x), y, rtol=0, atol=0 if kind == "masked" else 1e-6)
    bytes_after = sum(m.values.untyped_storage().nbytes() for m in layers.values())
    assert bytes_after == bytes_before - sum(expected.values()) * 16 * 16 * 4
    for layer in layers.values():
        for state in optimizer.state[layer.values].values():
            if state.numel() > 1:
                assert state.numel() in (len(layer.values), layer.values.numel())
    assert drop_idle_blocks(model, optimizer) == {}
    assert torch.isfinite(train(model, optimizer, batches, 2)).all()
    assert len(lasso.step(lr=0.0)) == len(layers)


def test_pruned_layers_lose_zero_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nb.BlockSparseLinear(64, 48, block=16, blocks=0.5))
    layer, x = model[0], torch.randn(3, 64)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    model(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        layer.values[2] = 0
        y = model(x)
        kept = optimizer.state[layer.values]["exp_avg"][[0, 1, 3, 4, 5]].clone()
        assert drop_idle_blocks(model, optimizer) == {"0": 1}
        assert layer.values.shape == (5, 16, 16)
        assert torch.equal(optimizer.state[layer.values]["exp_avg"], kept)
        torch.testing.assert_close(model(x), y)
    layer.values.grad = None
    model(x).square().sum().backward()
    optimizer.step()
    assert model.state_dict()["0.values"].shape == (5, 16, 16)


def test_penalties_refuse():
    model, _ = sparse_model("masked")
    with pytest.raises(ValueError, match="strength must be at least 0, got -1"):
        GroupLasso(model, -1.0)
    with pytest.raises(ValueError, match="weights must name layers with blocks, got 'x'"):
        GroupLasso(model, 1.0, {"x": torch.ones(1)})
    name = next(iter(layers_of(model)))
    with pytest.raises(ValueError, match=r"weights of . must be \[\d+\], got \[999\]"):
        GroupLasso(model, 1.0, {name: torch.ones(999)})
    with pytest.raises(ValueError, match="drop_idle_blocks: model must hold layers"):
        drop_idle_blocks(mlp())
