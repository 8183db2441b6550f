"""`MaskedAdamW` and `MaskedSGD` as optimisers, against torch's on dense and gathered Parameters."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import nibblock as nb
import pytest
import torch
import torch.nn.functional as F
from masked_samples import bits, held, held_inside, inside, linear_of, masked, read_mask
from nibblock.optim import MaskedAdamW, MaskedSGD
from nibblock.sparse._choose import read_blocks
from torch import nn

ADAMW = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6}
SGD = [
    {"lr": 0.05},
    {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    {"lr": 0.05, "momentum": 0.8, "dampening": 0.3},
]


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 70), nn.Tanh(), nn.Linear(70, 20)).to(dtype)


def sparse(seed=0, kind=torch.float32, **more):
    model = net(seed, kind)
    return nb.sparse_update(
        model, {"0": [[0, 0], [1, 2], [4, 1]], "2": [[0, 3], [1, 4]]}, block=16, **more
    )


def loss_of(model, seed, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 48, generator=gen), torch.randn(16, 20, generator=gen)
    return F.mse_loss(model(x.to(dtype)).float(), y)


def curve(model, optimizer, steps=8, dtype=torch.float32):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step, dtype)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- the same training as the dense one ---------------------------------------------------------


def test_the_loss_curve_is_that_of_masked_dense_training():
    """float64 training of every weight, gradients masked after the fact, beside ours."""
    model, dense = sparse(), net().double()
    keep = {"0": read_mask(model[0]), "2": read_mask(model[2])}
    before = {k: bits(model[int(k)].weight).clone() for k in keep}
    ours = curve(model, MaskedAdamW(nb.trainable_parameters(model), weight_decay=0, **ADAMW), 30)
    optimizer = torch.optim.AdamW([dense[0].weight, dense[2].weight], weight_decay=0, **ADAMW)
    theirs = []
    for step in range(30):
        optimizer.zero_grad()
        gen = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 48, generator=gen), torch.randn(16, 20, generator=gen)
        loss = F.mse_loss(dense(x.double()), y.double())
        loss.backward()
        for key, mask in keep.items():
            dense[int(key)].weight.grad[~mask] = 0
        optimizer.step()
        theirs.append(loss.item())
    assert theirs[-1] < 0.97 * theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)
    for key, mask in keep.items():
        layer = model[int(key)]
        assert torch.equal(bits(layer.weight)[~mask], before[key][~mask])
        assert torch.equal(inside(layer, layer.values), held_inside(layer))
        torch.testing.assert_close(
            layer.weight.double(), dense[int(key)].weight, rtol=1e-4, atol=1e-5
        )


RULES = [
    (MaskedAdamW, torch.optim.AdamW, {**ADAMW, "weight_decay": 0.1}),
    (MaskedAdamW, torch.optim.AdamW, {**ADAMW, "weight_decay": 0.0, "maximize": True}),
    *[(MaskedSGD, torch.optim.SGD, rule) for rule in SGD],
]


@pytest.mark.parametrize("ours, theirs, rule", RULES)
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_rules_are_torchs(ours, theirs, rule, max_norm):
    model = sparse()
    values = nb.trainable_parameters(model)
    twins = [nn.Parameter(v.detach().clone()) for v in values]
    extra = nn.Parameter(torch.randn(5, 7))  # neither masked nor in a layer
    twins.append(nn.Parameter(extra.detach().clone()))
    optimizer = ours([{"params": values}, {"params": [extra], "lr": 0.01}], max_norm=max_norm,
                     **rule)  # fmt: skip
    other = theirs([{"params": twins[:-1]}, {"params": twins[-1:], "lr": 0.01}], **rule)
    for step in range(12):
        optimizer.zero_grad()
        (loss_of(model, step) + extra.square().mean() * (step + 1)).backward()
        for twin, p in zip(twins, [*values, extra]):
            twin.grad = p.grad.clone()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(twins, max_norm)
        kept = [p.grad.clone() for p in values]
        optimizer.step()
        assert max_norm is None or optimizer.last_norm > max_norm
        assert all(torch.equal(p.grad, g) for p, g in zip(values, kept))
        other.step()
        for twin, p in zip(twins, [*values, extra]):
            torch.testing.assert_close(p, twin, rtol=2e-5, atol=2e-6)
    for layer in (model[0], model[2]):
        assert layer.values._version == layer._synced
        assert torch.equal(inside(layer, layer.values), held_inside(layer))


@pytest.mark.parametrize("ours, theirs, rule", RULES[:4:2])
@pytest.mark.parametrize("kind", ["bool", "int32", "int64", "everything"])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_masks_of_parameters(ours, theirs, rule, kind, max_norm):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(37, 60))
    mask = torch.rand(37, 60) < (2.0 if kind == "everything" else 0.2)
    masks = {p: mask}
    if kind.startswith("int"):
        masks = {p: mask.flatten().nonzero().flatten().to(getattr(torch, kind))}
    with torch.no_grad():
        p.view(-1)[~mask.flatten()] = float("nan")
    before = bits(p).clone()
    twin = nn.Parameter(p.detach()[mask].clone())
    optimizer, other = ours([p], masks=masks, max_norm=max_norm, **rule), theirs([twin], **rule)
    for _ in range(6):
        p.grad = torch.randn(37, 60)
        twin.grad = p.grad[mask].clone()
        p.grad[~mask] = float("inf")
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([twin], max_norm)
        optimizer.step()
        other.step()
    torch.testing.assert_close(p[mask], twin, rtol=2e-5, atol=2e-6)
    assert torch.equal(bits(p)[~mask], before[~mask])
    sizes = {n: s.numel() for n, s in optimizer.state[p].items()}
    assert set(sizes.values()) <= {1, int(mask.sum())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_copies(dtype):
    """float32 values of a 16-bit weight: the weight is their rounding after every step."""
    model = sparse(kind=dtype, dtype=torch.float32)
    optimizer = MaskedAdamW(nb.trainable_parameters(model), lr=1e-4, weight_decay=0)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, step, dtype).backward()
        optimizer.step()
        for layer in (model[0], model[2]):
            assert layer.values.dtype == torch.float32
            assert torch.equal(inside(layer, layer.values.to(dtype)), held_inside(layer))
    assert not torch.equal(model[0].values, held(model[0]).float())


def test_fused_step_touches_nothing_of_the_weights_size():
    from test_masked_linear import Largest

    layer = masked(1536, 576, 0.02, 32)
    optimizer = MaskedAdamW([layer.values], max_norm=1.0)
    x = torch.randn(8, 576, requires_grad=True)
    with Largest() as largest:
        for _ in range(2):
            layer(x).square().sum().backward()
            optimizer.step()
    assert 0 < largest.most <= max(layer.values.numel(), 8 * 1536)


def test_weights_of_any_strides():
    linear = linear_of()
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    layers = [nb.MaskedLinear.from_linear(linear, 0.3, 16), masked()]
    optimizer = MaskedAdamW([layer.values for layer in layers], lr=0.1)
    for layer in layers:
        layer(torch.ones(2, 100)).sum().backward()
    optimizer.step()
    assert layers[0].weight.stride() == (1, 70)
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(inside(layers[0], layers[0].values), held_inside(layers[0]))


PEAK = """
import nibblock as nb, torch

def step(layer, optimizer):
    x = torch.ones(8, layer.in_features, requires_grad=True)
    layer(x).square().sum().backward()
    optimizer.step()

def peak():
    # Not getrusage's: a child's starts at what its parent held.
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

small = nb.MaskedLinear(64, 64)
step(small, nb.optim.MaskedAdamW([small.values], max_norm=1.0))
linear = torch.nn.Linear(4096, 4096, device="meta").to_empty(device="cpu")
torch.nn.init.ones_(linear.weight)
with torch.no_grad():  # MKL keeps a workspace after its first product of a size: not a step's
    linear(torch.ones(8, 4096)) @ linear.weight
before = peak()
layer = nb.MaskedLinear.from_linear(linear, 0.01)
optimizer = nb.optim.MaskedAdamW([layer.values], max_norm=1.0)
for _ in range(3):
    step(layer, optimizer)
masked = peak() - before
(torch.nn.functional.linear(torch.ones(8, 4096), linear.weight.requires_grad_())).sum().backward()
print(masked, peak() - before)
"""


def test_peak_memory_of_training():
    """Of a whole process: the kernels' own workspaces count too."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=300, check=True
    )
    masked, dense = map(int, done.stdout.split())
    weight = 4096 * 4096 * 4
    assert dense > 0.9 * weight  # the instrument sees one dense gradient
    assert masked < 0.15 * weight


# --- an optimiser like any other ----------------------------------------------------------------


@pytest.mark.parametrize("make", [MaskedAdamW, lambda p, **k: MaskedSGD(p, momentum=0.9, **k)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_resumes_bit_for_bit(make, dtype):
    model = sparse(kind=dtype)
    optimizer = make(nb.trainable_parameters(model), lr=0.02)
    curve(model, optimizer, 3, dtype)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    whole = curve(model, optimizer, 5, dtype)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = sparse(kind=dtype)
    again.load_state_dict(saved["model"])
    other = make(nb.trainable_parameters(again), lr=0.5)
    other.load_state_dict(saved["optimizer"])
    for state in other.state.values():
        assert all(s.dtype in (torch.float32, torch.int32) for s in state.values())
    assert curve(again, other, 5, dtype) == whole
    assert torch.equal(bits(again[0].weight), bits(model[0].weight))
    states = zip(optimizer.state.values(), other.state.values())
    assert all(torch.equal(a[k], b[k]) for a, b in states for k in a)


def test_state_of_other_blocks_is_refused():
    model, other = sparse(), net()
    optimizer = MaskedAdamW(nb.trainable_parameters(model))
    curve(model, optimizer, 1)
    nb.sparse_update(other, {"0": [[0, 0], [1, 2], [4, 2]], "2": [[0, 3], [1, 4]]}, block=16)
    blank = MaskedAdamW(nb.trainable_parameters(other), lr=0.5)
    with pytest.raises(ValueError, match="the state must be of the same blocks or mask, got ano"):
        blank.load_state_dict(optimizer.state_dict())
    assert not blank.state
    assert blank.param_groups[0]["lr"] == 0.5
    curve(other, blank, 1)
    smaller = sparse()
    smaller[0].set_blocks([[0, 0]])
    with pytest.raises(ValueError, match="the state must be of the same blocks or mask"):
        MaskedAdamW(nb.trainable_parameters(smaller)).load_state_dict(optimizer.state_dict())


def test_groups_and_schedulers():
    model = sparse()
    optimizer = MaskedAdamW([("first", model[0].values)], lr=0.1)
    extra = nn.Parameter(torch.ones(8))
    optimizer.add_param_group(
        {"params": [("second", model[2].values)], "lr": 0.01, "weight_decay": 0.0}
    )
    optimizer.add_param_group(
        {"params": [("third", extra)], "masks": {extra: torch.tensor([1, 6])}}
    )
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.01, 0.1]
    assert "masks" not in optimizer.param_groups[2]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    (loss_of(model, 0) + extra.sum()).backward()
    first = model[0].values.detach().clone()
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.005, 0.05]
    step = (model[0].values - first * (1 - 0.1 * 0.01)).abs().max()
    torch.testing.assert_close(step, torch.tensor(0.1), rtol=1e-2, atol=0)
    assert (extra != 1).nonzero().flatten().tolist() == [1, 6]
    optimizer.zero_grad()
    assert model[0].values.grad is None
    assert optimizer.step(lambda: 7.0) == 7.0  # nothing has a gradient


def test_closure():
    model = sparse()
    optimizer = MaskedSGD(nb.trainable_parameters(model), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    assert optimizer.step(closure).item() < first


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_grad_scaler(unscale, max_norm):
    model, plain = sparse(), sparse()
    ours = MaskedAdamW(nb.trainable_parameters(model), lr=0.02, max_norm=max_norm)
    like = MaskedAdamW(nb.trainable_parameters(plain), lr=0.02, max_norm=max_norm)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(4):
        ours.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 2:  # this one must not count
            model[0].values.grad[0, 0, 0] = float("inf")
        if unscale:
            scaler.unscale_(ours)
        before = bits(model[0].weight).clone()
        scaler.step(ours)
        scaler.update()
        if step == 2:
            assert torch.equal(bits(model[0].weight), before)
            continue
        like.zero_grad()
        loss_of(plain, step).backward()
        like.step()
        torch.testing.assert_close(model[0].values, plain[0].values, rtol=1e-5, atol=1e-7)
    assert scaler.get_scale() == 512.0
    assert ours.state[model[0].values]["age"].tolist() == [3, 3, 3]


def test_gradients_come_and_go():
    model = sparse()
    optimizer = MaskedAdamW(nb.trainable_parameters(model), lr=0.1)
    for wanted in ([0, 2], [0], [2], [0, 2]):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        before = {at: model[at].values.detach().clone() for at in (0, 2)}
        for at in {0, 2} - set(wanted):
            model[at].values.grad = None
        optimizer.step()
        for at in (0, 2):
            assert torch.equal(model[at].values, before[at]) == (at not in wanted)
    ages = [optimizer.state[model[at].values]["age"].tolist() for at in (0, 2)]
    assert ages == [[3, 3, 3], [3, 3]]


def test_blocks_may_change_between_steps():
    model = sparse()
    optimizer = MaskedAdamW(nb.trainable_parameters(model), lr=0.1)
    curve(model, optimizer, 2)
    layer = model[0]
    came_from = layer.set_blocks([[0, 1], [1, 2]])
    assert came_from.tolist() == [-1, 1]
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match=r"state age must be \[2\], got \[3\]; after set_blocks"):
        optimizer.step()
    kept = optimizer.state[layer.values]["exp_avg"][1].clone()
    optimizer.move_blocks(layer.values, came_from)
    state = optimizer.state[layer.values]
    assert state["age"].tolist() == [0, 2]
    assert torch.equal(state["exp_avg"][1], kept)
    optimizer.step()
    assert state["age"].tolist() == [1, 3]
    assert torch.equal(inside(layer, layer.values), held_inside(layer))


def test_moving_no_block_changes_nothing():
    model, still = sparse(), sparse()
    pair = [MaskedAdamW(nb.trainable_parameters(m), lr=0.1) for m in (model, still)]
    for _ in range(3):
        assert curve(model, pair[0], 2) == curve(still, pair[1], 2)
        came_from = model[0].set_blocks(model[0].blocks)
        pair[0].move_blocks(model[0].values, came_from)


def test_autocast_follows_the_steps():
    model, dense = sparse(), net()
    optimizer = MaskedAdamW(nb.trainable_parameters(model), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_of(model, step).backward()
        cast = model[0]._cast[0]
        optimizer.step()
        model[0].sync()  # as the next forward does: a steady step only counts
        assert model[0]._cast[0] is cast
        assert torch.equal(cast, model[0].weight.bfloat16())
        for at in (0, 2):
            dense[at].load_state_dict(model[at].state_dict(), strict=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss_of(model, 9), loss_of(dense, 9))


def test_compiled_training():
    torch._dynamo.reset()
    model, eager = sparse(), sparse()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    pair = [MaskedAdamW(nb.trainable_parameters(m), lr=0.02) for m in (model, eager)]
    torch.testing.assert_close(curve(compiled, pair[0]), curve(eager, pair[1]))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies(how):
    model = sparse()
    extra = nn.Parameter(torch.ones(8))
    optimizer = MaskedAdamW(
        [*nb.trainable_parameters(model), extra], masks={extra: torch.tensor([0, 3])}, max_norm=1.0
    )
    curve(model, optimizer, 2)
    twin, other = how((model, optimizer))
    assert curve(model, optimizer, 3) == curve(twin, other, 3)
    assert torch.equal(model[0].weight, twin[0].weight)


def test_refusals():
    layer = masked()
    p = nn.Parameter(torch.randn(4, 5))
    for make in (MaskedAdamW, MaskedSGD):
        name = make.__name__

        def refuse(kind, text, *args, make=make, name=name, **more):
            with pytest.raises(kind, match=f"{name}: {text}"):
                make(*args, **more)

        refuse(ValueError, "lr must be at least 0, got -1", [p], lr=-1.0)
        refuse(ValueError, "lr must be finite, got inf", [p], lr=float("inf"))
        refuse(TypeError, "lr must be a number, got str", [p], lr="a")
        refuse(ValueError, "max_norm must be above 0 or None, got 0", [p], max_norm=0)
        refuse(TypeError, "max_norm must be a number, got str", [p], max_norm="a")
        refuse(TypeError, "params must be float32 or bfloat16, got float16",
               [nn.Parameter(torch.ones(3).half())])  # fmt: skip
        refuse(ValueError, "params must be contiguous", [nn.Parameter(torch.ones(3, 4).t())])
        refuse(TypeError, "masks must map Parameters to masks, got list", [p], masks=[1])
        refuse(TypeError, "a mask must be bool, int32 or int64, got float32",
               [p], masks={p: torch.ones(4, 5)})  # fmt: skip
        refuse(ValueError, r"a bool mask must have its Parameter's shape \[4, 5\], got \[5, 4\]",
               [p], masks={p: torch.ones(5, 4, dtype=torch.bool)})  # fmt: skip
        refuse(ValueError, "flat indices must be sorted and distinct", [p],
               masks={p: torch.tensor([3, 3])})  # fmt: skip
        refuse(ValueError, r"flat indices must lie in \[0, 20\), got 20", [p],
               masks={p: torch.tensor([3, 20])})  # fmt: skip
        refuse(ValueError, "masks must be of other Parameters than values of a MaskedLinear",
               [layer.values], masks={layer.values: torch.tensor([0])})  # fmt: skip
        refuse(ValueError, r"masks must belong to Parameters of params, got one of shape \[4, 5\]",
               [layer.values], masks={p: torch.tensor([0])})  # fmt: skip
    with pytest.raises(ValueError, match=r"beta1 must be in \[0, 1\), got 1.0"):
        MaskedAdamW([p], betas=(1.0, 0.9))
    with pytest.raises(TypeError, match=r"betas must be a pair of numbers, got 0.9"):
        MaskedAdamW([p], betas=0.9)
    with pytest.raises(ValueError, match="MaskedSGD: dampening must be finite, got nan"):
        MaskedSGD([p], momentum=0.9, dampening=float("nan"))
    with pytest.raises(ValueError, match="nesterov must be False without momentum"):
        MaskedSGD([p], nesterov=True)
    MaskedAdamW([p, nn.Parameter(torch.ones(3).half(), requires_grad=False)])
    optimizer = MaskedAdamW([p])
    with pytest.raises(ValueError, match="lr must be at least 0"):
        optimizer.add_param_group({"params": [layer.values], "lr": -1.0})
    other = nn.Parameter(torch.randn(4))
    with pytest.raises(ValueError, match=r"masks must belong to Parameters of params, .* \[4, 5\]"):
        optimizer.add_param_group(
            {"params": [other], "masks": {p: torch.ones(4, 5, dtype=torch.bool)}}
        )
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [other], "masks": {other: torch.tensor([1])}})
    p.grad = torch.ones(4, 5).to_sparse()
    with pytest.raises(TypeError, match="gradients must be dense tensors, got torch.sparse_coo"):
        optimizer.step()


def test_threads_do_not_matter():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        layer = nb.MaskedLinear.from_linear(linear_of(256, 320), 0.3, 32)
        optimizer = MaskedAdamW([layer.values], lr=0.1, max_norm=1.0)
        for step in range(3):
            gen = torch.Generator().manual_seed(step)
            layer.values.grad = torch.randn(layer.values.shape, generator=gen)
            optimizer.step()
        results.append(bits(layer.weight).clone())
    assert torch.equal(*results)
    assert read_blocks(layer.weight, layer.blocks, 32).equal(layer.values)
