"""`MaskedMuon`: blocks against a float64 twin, all else against `MaskedAdamW`, and an optimiser's
duties: state, schedulers, closures, GradScaler, copies, changes of blocks.
"""

from __future__ import annotations

import copy
import io
import pickle

import nibblock as nb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import TORCH, as_numpy, level_params, native
from masked_samples import bits, held_inside, inside, linear_of, masked, read_mask
from nibblock.optim import MaskedAdamW, MaskedMuon
from reference_muon import HALF_ULP16, HALF_ULP32, allowed, direction, momentum_step
from test_masked_optim import curve, loss_of, sparse
from torch import nn

SIZE = 0.2  # of an update, times sqrt(B)
KINDS = ("bfloat16", "float16")  # of weights that are no float32


class Twin:
    """A layer's values in float64, how far float32 may have gone from them, and their momentum."""

    def __init__(self, layer, rule):
        self.layer, self.rule = layer, {"momentum": 0.8, "nesterov": True, **rule}
        index = layer.blocks.numpy() * layer.block
        room = np.array([layer.out_features, layer.in_features]) - index
        edge = np.arange(layer.block)
        self.inside = (edge[:, None] < room[:, :1, None]) & (edge < room[:, 1:, None])
        self.buffer = np.zeros(self.inside.shape)
        self.take()

    def take(self):
        """Starts anew where the layer is."""
        self.values = as_numpy(self.layer.values).astype(np.float64)
        self.error = 0.0

    def step(self, multiplier=1.0):
        rule, block = self.rule, self.layer.block
        g = as_numpy(self.layer.values.grad).astype(np.float64)
        g = -g if rule.get("maximize") else g
        u, self.buffer = momentum_step(
            g, self.buffer, rule["momentum"], rule["nesterov"], multiplier
        )
        steps, size = rule.get("ns_steps", 5), rule["lr"] * SIZE * block**0.5
        old, coarse = np.abs(self.values).max(), self.layer.values.dtype == torch.bfloat16
        decay = 1 - rule["lr"] * rule.get("weight_decay", 0.0)
        new = self.values * decay - size * direction(u, steps)
        self.values = np.where(self.inside, new, self.values)
        # The direction's own error; in bfloat16 it is rounded, and so are the values.
        half = HALF_ULP16 if coarse else 4 * HALF_ULP32
        error = 1.5 * half * (old + 1.3 * size)
        self.error += size * allowed(u, steps).max(initial=0) + error

    def check(self, optimizer, age):
        layer, state = self.layer, optimizer.state[self.layer.values]
        assert np.abs(as_numpy(layer.values) - self.values)[self.inside].max() <= self.error
        assert state["age"].dtype == torch.int32
        assert state["age"].tolist() == [age] * len(layer.blocks)
        if self.rule["momentum"]:
            assert set(state) == {"age", "momentum_buffer"}
            found = state["momentum_buffer"]
            assert (found.dtype, found.shape) == (torch.float32, layer.values.shape)
            assert np.abs(found.numpy() - self.buffer).max() <= 1e-5 * np.abs(self.buffer).max()
        assert torch.equal(inside(layer, layer.values.to(layer.weight.dtype)), held_inside(layer))


def give_gradients(layers, seed, scale=1.0):
    """Gradients as a backward leaves them: 0 outside the weight."""
    gen = torch.Generator().manual_seed(seed)
    for layer in layers:
        g = torch.randn(layer.values.shape, generator=gen) * scale
        g *= torch.from_numpy(Twin(layer, {}).inside)
        layer.values.grad = g.to(layer.values.dtype)


# --- the rule -----------------------------------------------------------------------------------

RULES = (
    {"lr": 0.02},
    {"lr": 0.02, "momentum": 0.95, "nesterov": False, "weight_decay": 0.1},
    {"lr": 0.05, "momentum": 0.0, "nesterov": False, "maximize": True},
    {"lr": 0.01, "ns_steps": 3, "weight_decay": 0.5},
)


def layers_of(kind=torch.float32, **more):
    """Two of one block edge, where blocks stick out on both sides, and one of another."""
    return [masked(70, 100, 0.5, 16, kind, **more), masked(37, 50, 0.9, 16, kind, **more),
            masked(70, 100, 0.7, 32, kind, **more)]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("max_norm", [None, 5.0])
def test_blocks_follow_the_formula(rule, max_norm):
    layers = layers_of()
    twins = [Twin(layer, rule) for layer in layers]
    with torch.no_grad():
        for layer, twin in zip(layers, twins):
            layer.values[torch.from_numpy(~twin.inside)] = 7.0
            twin.take()
    before = [bits(layer.weight).clone() for layer in layers]
    optimizer = MaskedMuon([layer.values for layer in layers], max_norm=max_norm, **rule)
    for age in range(1, 8):
        give_gradients(layers, age, 2.0**age)
        kept = [layer.values.grad.clone() for layer in layers]
        norm = np.sqrt(sum(float(g.double().square().sum()) for g in kept))
        optimizer.step()
        assert all(torch.equal(layer.values.grad, g) for layer, g in zip(layers, kept))
        clip = 1.0
        if max_norm is not None:
            assert abs(optimizer.last_norm.item() / norm - 1) < 1e-5
            clip = min(1.0, max_norm / (norm + 1e-6))
            assert clip < 0.5
        for twin in twins:
            twin.step(clip)
            twin.check(optimizer, age)
    for layer, old, twin in zip(layers, before, twins):
        # What is no part of the weight stays as it is, and of the weight what is in no block.
        assert (layer.values[torch.from_numpy(~twin.inside)] == 7).all()
        mask = read_mask(layer)
        assert torch.equal(bits(layer.weight)[~mask], old[~mask])
        assert (bits(layer.weight)[mask] != old[mask]).float().mean() > 0.99


def test_gradients_of_a_backward():
    model = sparse()
    rule = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = MaskedMuon(nb.trainable_parameters(model), **rule)
    twins = [Twin(model[at], rule) for at in (0, 2)]
    for age in range(1, 7):
        optimizer.zero_grad()
        loss_of(model, age).backward()
        optimizer.step()
        for twin in twins:
            twin.step()
            twin.check(optimizer, age)
            twin.take()  # rounding would be part of the next gradient


@pytest.mark.parametrize("dtype, kind", [("bfloat16",) * 2, *(("float32", k) for k in KINDS)])
def test_other_dtypes(dtype, kind):
    """Values of 16 bits, and float32 ones of a 16-bit weight, which is their rounding."""
    kind, dtype = TORCH[kind], TORCH[dtype]
    layers = layers_of(kind, dtype=dtype)
    rule = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = MaskedMuon([layer.values for layer in layers], **rule)
    twins = [Twin(layer, rule) for layer in layers]
    for age in range(1, 6):
        give_gradients(layers, age)
        optimizer.step()
        for twin in twins:
            assert twin.layer.values.dtype == dtype
            twin.step()
            twin.check(optimizer, age)
            twin.take()


def test_weights_of_any_strides():
    linear = linear_of()
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    layer = nb.MaskedLinear.from_linear(linear, 0.3, 16)
    optimizer, twin = MaskedMuon([layer.values], lr=0.1), Twin(layer, {"lr": 0.1})
    for age in range(1, 4):
        give_gradients([layer], age)
        optimizer.step()
        twin.step()
        twin.check(optimizer, age)
    assert layer.weight.stride() == (1, 70)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("maximize", [False, True])
def test_all_else_is_masked_adamws(dtype, max_norm, maximize):
    """Bit for bit, beside values in the same group, whose gradients count in the norm."""
    models, extras, optimizers = [], [], []
    for make in (MaskedMuon, MaskedAdamW):
        model = sparse(kind=dtype)
        torch.manual_seed(1)
        extra = [nn.Parameter(torch.randn(s).to(dtype)) for s in ((37, 60), (37, 60), (9,), ())]
        mask = torch.rand(37, 60) < 0.2
        masks = {extra[0]: mask, extra[1]: mask.flatten().nonzero().flatten()}
        params = [*nb.trainable_parameters(model), *extra[:-1]]
        optimizer = make(params, lr=0.02, betas=(0.7, 0.95), eps=1e-6, weight_decay=0.1,
                         max_norm=max_norm, maximize=maximize, masks=masks)  # fmt: skip
        optimizer.add_param_group({"params": extra[-1:], "lr": 0.5, "betas": (0.0, 0.5)})
        models.append(model)
        extras.append(extra)
        optimizers.append(optimizer)
    for seed in range(5):
        for model, extra, optimizer in zip(models, extras, optimizers):
            give_gradients((model[0], model[2]), seed)
            gen = torch.Generator().manual_seed(seed)
            for p in extra:
                p.grad = torch.randn(p.shape, generator=gen).to(dtype)
            optimizer.grad_scale = torch.tensor(4.0)  # as a GradScaler would
            optimizer.step()
        for ours, theirs in zip(*extras):
            assert torch.equal(bits(ours), bits(theirs))
            state, like = (o.state[p] for o, p in zip(optimizers, (ours, theirs)))
            assert state.keys() == like.keys()
            assert all(torch.equal(state[name], like[name]) for name in like)
        assert max_norm is None or torch.equal(*(o.last_norm for o in optimizers))


def test_a_regression_is_learned():
    """To weights that differ from the first ones in the blocks, by inputs of unlike sizes."""
    layer = masked(64, 96, 0.5, 32)
    target = layer.weight.detach().clone()
    target[read_mask(layer)] += 0.05 * torch.randn(int(read_mask(layer).sum()))
    sizes = torch.logspace(-1, 0.5, 96)
    optimizer = MaskedMuon([layer.values], lr=0.02)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 60)
    losses = []
    for _ in range(60):
        x = torch.randn(256, 96) * sizes
        loss = (layer(x) - F.linear(x, target, layer.bias)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.1 * sum(losses[:5])


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("level", level_params())
def test_threads_and_levels_do_not_matter(level):
    results = []
    for here, threads in (("scalar", 2), (level, 1), (level, 2)):
        native.set_cpu_isa(here)
        torch.set_num_threads(threads)
        layers = layers_of()
        optimizer = MaskedMuon([layer.values for layer in layers], lr=0.1)
        for seed in range(3):
            give_gradients(layers, seed)
            optimizer.step()
        results.append([bits(layer.weight).clone() for layer in layers])
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_resumes_bit_for_bit(dtype):
    def make(model, **more):  # the bias goes by AdamW's rule, in the same file
        return MaskedMuon(
            [model[0].values, model[2].values, model[0].bias.requires_grad_()], **more
        )

    model = sparse(kind=dtype)
    optimizer = make(model, lr=0.02)
    curve(model, optimizer, 3, dtype)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    whole = curve(model, optimizer, 5, dtype)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = sparse(kind=dtype)
    again.load_state_dict(saved["model"])
    other = make(again, lr=0.5, momentum=0.1, ns_steps=2)
    other.load_state_dict(saved["optimizer"])
    states = [list(o.state.values()) for o in (optimizer, other)]
    assert len(states[0]) == len(states[1]) == 3
    assert set(states[1][0]) == {"momentum_buffer", "age"}
    for state in states[1]:
        assert all(s.dtype in (torch.float32, torch.int32) for s in state.values())
    assert curve(again, other, 5, dtype) == whole
    assert torch.equal(bits(again[0].weight), bits(model[0].weight))
    assert torch.equal(bits(again[0].bias), bits(model[0].bias))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*states) for k in a)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies(how):
    model = sparse()
    optimizer = MaskedMuon(nb.trainable_parameters(model), max_norm=1.0)
    curve(model, optimizer, 3)  # from the second step on states are packed
    twin, other = how((model, optimizer))
    assert curve(model, optimizer, 3) == curve(twin, other, 3)
    assert torch.equal(model[0].weight, twin[0].weight)
    with torch.no_grad():
        optimizer.state[model[0].values]["momentum_buffer"].fill_(9)
    assert not (other.state[twin[0].values]["momentum_buffer"] == 9).any()


# --- changes between steps ----------------------------------------------------------------------


def test_state_of_other_blocks_is_refused():
    model, smaller = sparse(), sparse()
    optimizer = MaskedMuon(nb.trainable_parameters(model))
    curve(model, optimizer, 1)
    smaller[0].set_blocks([[0, 0]])
    blank = MaskedMuon(nb.trainable_parameters(smaller), lr=0.5)
    with pytest.raises(ValueError, match="MaskedMuon: the state must be of the same blocks or ma"):
        blank.load_state_dict(optimizer.state_dict())
    assert not blank.state
    assert blank.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("steps", [1, 3])
def test_blocks_may_change_between_steps(steps):
    model = sparse()
    optimizer = MaskedMuon(nb.trainable_parameters(model), lr=0.02)
    curve(model, optimizer, steps)
    layer = model[0]
    came_from = layer.set_blocks([[0, 1], [1, 2]])
    loss_of(model, 0).backward()
    hint = r"MaskedMuon: state \w+ must be \[2.*\], got \[3.*\]; after set_blocks call move_blocks"
    with pytest.raises(ValueError, match=hint):
        optimizer.step()
    kept = optimizer.state[layer.values]["momentum_buffer"][1].clone()
    optimizer.move_blocks(layer.values, came_from)
    state = optimizer.state[layer.values]
    assert state["age"].tolist() == [0, steps]
    assert torch.equal(state["momentum_buffer"][1], kept)
    assert not state["momentum_buffer"][0].any()
    twin = Twin(layer, {"lr": 0.02})
    twin.buffer[1] = kept.numpy()
    optimizer.step()
    twin.step()
    assert state["age"].tolist() == [1, steps + 1]
    assert np.abs(as_numpy(layer.values) - twin.values).max() <= twin.error
    assert torch.equal(inside(layer, layer.values), held_inside(layer))


def test_gradients_come_and_go():
    model = sparse()
    optimizer = MaskedMuon(nb.trainable_parameters(model), lr=0.02)
    twins = {at: Twin(model[at], {"lr": 0.02}) for at in (0, 2)}
    ages = {0: 0, 2: 0}
    for wanted in ([0, 2], [0], [0, 2], [0, 2], [2], [0, 2]):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        for at in {0, 2} - set(wanted):
            model[at].values.grad = None
        optimizer.step()
        for at in wanted:
            ages[at] += 1
            twins[at].step()
        for at, twin in twins.items():
            twin.check(optimizer, ages[at])


CHANGES = {
    "clear": lambda optimizer, p: optimizer.state.clear(),
    "delete": lambda optimizer, p: optimizer.state.pop(p),
    "replace": lambda optimizer, p: optimizer.state[p].update(momentum_buffer=torch.zeros_like(p)),
    "write": lambda optimizer, p: optimizer.state[p]["momentum_buffer"].zero_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_state_count(change):
    layers = layers_of()[:2]
    optimizer = MaskedMuon([layer.values for layer in layers], lr=0.02)
    twin = Twin(layers[0], {"lr": 0.02})
    for turn in range(2):
        for seed in range(3):
            give_gradients(layers, 10 * turn + seed)
            optimizer.step()
            twin.step()
        CHANGES[change](optimizer, layers[0].values)  # by now states are packed
        twin.buffer[:] = 0
    optimizer.step()  # the last gradients once more
    twin.step()
    twin.check(optimizer, 7 if change in ("replace", "write") else 1)


def test_momentum_comes_and_goes():
    layer = masked(64, 96, 0.5, 16)
    optimizer = MaskedMuon([layer.values], lr=0.02, nesterov=False)
    twin = Twin(layer, {"lr": 0.02, "nesterov": False})
    for momentum in (0.0, 0.8, 0.5):
        optimizer.param_groups[0]["momentum"] = twin.rule["momentum"] = momentum
        if momentum == 0.8:
            twin.buffer[:] = 0  # it starts with nothing
        for seed in range(3):
            give_gradients([layer], seed)
            optimizer.step()
            twin.step()
        assert np.abs(as_numpy(layer.values) - twin.values).max() <= twin.error, momentum


# --- an optimiser like any other ----------------------------------------------------------------


def test_groups_and_schedulers():
    layers = layers_of()
    extra = nn.Parameter(torch.ones(8))
    optimizer = MaskedMuon([("first", layers[0].values)], lr=0.02)
    more = {"lr": 0.01, "momentum": 0.5, "ns_steps": 3, "nesterov": False, "weight_decay": 0.1}
    optimizer.add_param_group(
        {"params": [("second", layers[1].values), ("third", layers[2].values)], **more}
    )
    optimizer.add_param_group(
        {"params": [("fourth", extra)], "masks": {extra: torch.tensor([1, 6])}}
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    twins = [Twin(layers[0], {"lr": 0.02}), *(Twin(layer, more) for layer in layers[1:])]
    for age in range(1, 5):
        give_gradients(layers, age)
        extra.grad = torch.ones(8)
        optimizer.step()
        scheduler.step()
        for twin in twins:
            twin.step()
            twin.check(optimizer, age)
            twin.rule = {**twin.rule, "lr": twin.rule["lr"] / 2}
    assert (extra != 1).nonzero().flatten().tolist() == [1, 6]
    optimizer.zero_grad()
    assert optimizer.step(lambda: 7.0) == 7.0


def test_closure():
    model = sparse()
    optimizer = MaskedMuon(nb.trainable_parameters(model), lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        return loss_of(model, 0).item()

    assert optimizer.step(closure) > optimizer.step(closure)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_grad_scaler(unscale, max_norm):
    model, plain = sparse(), sparse()
    rule = {"lr": 0.02, "weight_decay": 0.1, "max_norm": max_norm}
    ours, like = (MaskedMuon(nb.trainable_parameters(m), **rule) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(4):
        ours.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 2:  # this one must not count
            model[0].values.grad[0, 0, 0] = float("inf")
        if unscale:
            scaler.unscale_(ours)
        state = ours.state.get(model[0].values) or {}
        kept = [bits(model[0].weight).clone(), *(s.clone() for s in state.values())]
        scaler.step(ours)
        scaler.update()
        if step == 2:
            now = [bits(model[0].weight), *ours.state[model[0].values].values()]
            assert all(map(torch.equal, now, kept))
            continue
        like.zero_grad()
        loss_of(plain, step).backward()
        like.step()
        torch.testing.assert_close(model[0].values, plain[0].values, rtol=1e-5, atol=2e-6)
    assert scaler.get_scale() == 512.0
    assert ours.state[model[0].values]["age"].tolist() == [3, 3, 3]


AT_LEAST_0 = ("lr", "weight_decay", "eps")
REFUSED = (
    *((ValueError, f"{n} must be at least 0, got -1", {n: -1.0}) for n in AT_LEAST_0),
    (ValueError, "lr must be finite, got inf", {"lr": float("inf")}),
    *((TypeError, f"{n} must be a number, got str", {n: "a"}) for n in ("momentum", *AT_LEAST_0)),
    *((ValueError, rf"momentum must be in \[0, 1\), got {n}", {"momentum": float(n)})
      for n in ("-0.1", "1.0", "nan")),
    (ValueError, "nesterov must be False without momentum", {"momentum": 0.0}),
    (ValueError, r"beta1 must be in \[0, 1\), got 1.0", {"betas": (1.0, 0.9)}),
    (TypeError, "betas must be a pair of numbers, got 0.9", {"betas": 0.9}),
    (ValueError, "max_norm must be above 0 or None, got 0", {"max_norm": 0}),
    *((ValueError, f"ns_steps .*{n}", {"ns_steps": n}) for n in (0, 21, -1)),
    *(((TypeError, ValueError), "ns_steps ", {"ns_steps": n}) for n in (2.5, "5", None)),
    (TypeError, "masks must map Parameters to masks, got list", {"masks": [1]}),
)  # fmt: skip


@pytest.mark.parametrize("error, text, given", REFUSED)
def test_refusals(error, text, given):
    layer, p = masked(), nn.Parameter(torch.ones(3))
    with pytest.raises(error, match=f"^MaskedMuon: {text}") as caught:
        MaskedMuon([layer.values], **given)
    assert "\n" not in str(caught.value)
    if "masks" in given or "max_norm" in given:
        return  # of a whole optimiser
    optimizer = MaskedMuon([p])
    with pytest.raises(error, match=f"^MaskedMuon: {text}"):
        optimizer.add_param_group({"params": [layer.values], **given})
    assert len(optimizer.param_groups) == 1


def test_defaults():
    group = MaskedMuon([masked().values]).param_groups[0]
    names = ("lr", "momentum", "weight_decay", "nesterov", "ns_steps", "betas", "eps", "maximize")
    want = [1e-2, 0.8, 0.0, True, 5, (0.9, 0.999), 1e-8, False]
    assert [group[name] for name in names] == want
