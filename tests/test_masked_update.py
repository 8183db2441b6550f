"""The masked optimiser steps at every level, bit by bit against the float32 twin of
`reference_masked` (itself held against float64), and against torch.optim on gathered parameters.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from harness import as_torch, level_params, load, native, store
from nibblock import ops
from reference_masked import RULES, AdamW, Sgd, Tensor

LEVEL = pytest.mark.parametrize("level", level_params())
DTYPES = ("float32", "bfloat16")
BLOCKS = (16, 32, 64, 128)


def bits(t):
    t = t.detach().contiguous()
    return t.view({4: torch.int32, 2: torch.int16}[t.element_size()])


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def hyper(rule):
    if isinstance(rule, AdamW):
        names = ("lr", "beta1", "beta2", "eps", "weight_decay")
    else:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
    return {name: getattr(rule, name) for name in names}


def op_of(rule, kind):
    return getattr(ops, f"masked_{'adamw' if isinstance(rule, AdamW) else 'sgd'}_{kind}_")


def state_lists(rule, tensors):
    """Per list of the op: exp_avgs and exp_avg_sqs, or momenta (perhaps empty)."""
    lists = [[torch.from_numpy(t.states[i].copy()) for t in tensors] for i in range(rule.states)]
    return lists or [[]]


def stored(t: Tensor):
    return as_torch(store(t.param, t.dtype), t.dtype)


def grads_of(rng, t: Tensor, count):
    g = store(rng.normal(0, 1, count).astype(np.float32), t.dtype)
    return as_torch(g, t.dtype), load(g, t.dtype)


def check(param, t: Tensor, what=""):
    want = stored(t).view_as(param)
    assert same_bits(param, want), (what, int((bits(param) != bits(want)).sum()))


def check_states(rule, lists, tensors, what=""):
    for i in range(rule.states):
        for state, t in zip(lists[i], tensors):
            assert same_bits(state.reshape(-1), torch.from_numpy(t.states[i])), what


# --- flat and bool ------------------------------------------------------------------------------


def positions(rng, numel, density):
    return np.flatnonzero(rng.random(numel) < density)


@LEVEL
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_flat(level, rule):
    native.set_cpu_isa(level)
    rng = np.random.default_rng(1)
    sizes = ((5, 1.0), (1000, 0.0), (999, 0.3), (40000, 0.5), (33, 0.6), (7, 0.2))
    for dtype, index_dtype, packed in itertools.product(
        DTYPES, (torch.int32, torch.int64), (True, False)
    ):
        made = [Tensor.random(rng, n, positions(rng, n, d), dtype, rule.states) for n, d in sizes]
        params = [stored(t).view(1, -1) for t in made]
        lists = state_lists(rule, made)
        steps = [torch.zeros(1, dtype=torch.int32) for _ in made]
        index = [torch.from_numpy(t.active).to(index_dtype) for t in made]
        for _ in range(3):
            grads = []
            for t, param in zip(made, params):
                g, values = grads_of(rng, t, t.param.size)
                grads.append(g[t.active] if packed else g.view_as(param))
                t.step(rule, values[t.active])
            op_of(rule, "flat")(params, grads, index, *lists, steps, **hyper(rule))
        what = f"{level} {rule} {dtype} {index_dtype} packed={packed}"
        for param, t in zip(params, made):
            check(param, t, what)
        check_states(rule, lists, made, what)
        assert all(step.item() == 3 for step in steps)


def masks_of(rng):
    """Chunks that are full, empty, sparse and nearly full; ragged ends; everything."""
    for numel in (1, 100, 1024, 5000, 40000):
        mask = rng.random(numel) < 0.3
        mask[: numel // 3] = True
        mask[numel // 2 : numel // 2 + numel // 4] = False
        yield numel, mask
    yield 3000, np.ones(3000, bool)
    yield 3000, np.zeros(3000, bool)
    yield 3000, np.arange(3000) != 1500
    yield 2500, None
    yield 0, None


@LEVEL
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_bool(level, rule):
    native.set_cpu_isa(level)
    rng = np.random.default_rng(2)
    for dtype in DTYPES:
        made, masks, offsets = [], [], []
        for numel, mask in masks_of(rng):
            active = np.flatnonzero(np.ones(numel, bool) if mask is None else mask)
            made.append(Tensor.random(rng, numel, active, dtype, rule.states))
            masks.append(torch.from_numpy(np.zeros(0, bool) if mask is None else mask))
            offsets.append(ops.mask_offsets(masks[-1]))
        params = [stored(t) for t in made]
        lists = state_lists(rule, made)
        steps = [torch.zeros(1, dtype=torch.int32) for _ in made]
        for _ in range(3):
            grads = []
            for t in made:
                g, values = grads_of(rng, t, t.param.size)
                grads.append(g)
                t.step(rule, values[t.active])
            op_of(rule, "bool")(params, grads, masks, offsets, *lists, steps, **hyper(rule))
        for i, (param, t) in enumerate(zip(params, made)):
            check(param, t, f"{level} {rule} {dtype} mask {i}")
        check_states(rule, lists, made)


def test_mask_offsets():
    for numel in (0, 1, 1023, 1024, 1025, 5000):
        mask = torch.rand(numel) < 0.4
        offsets = ops.mask_offsets(mask)
        assert offsets.dtype == torch.int64
        want = [int(mask[: 1024 * c].sum()) for c in range(-(-numel // 1024) + 1)]
        assert offsets.tolist() == want
    with pytest.raises(TypeError, match="mask_offsets: mask must be bool, got int64"):
        ops.mask_offsets(torch.ones(3, dtype=torch.int64))


# --- blocks -------------------------------------------------------------------------------------


class Layer:
    """An [N, K] weight with trained blocks, and its flat twin."""

    def __init__(self, rng, rule, n, k, block, dtype, weight_dtype, density=0.5, gap=0):
        rows, columns = -(-n // block), -(-k // block)
        self.block, self.dtype, self.n, self.k = block, dtype, n, k
        self.index = np.argwhere(rng.random((rows, columns)) < density).astype(np.int32)
        z = len(self.index)
        inside = np.zeros((z, block, block), bool)
        for at, (r, c) in enumerate(self.index):
            inside[at, : min(block, n - r * block), : min(block, k - c * block)] = True
        self.inside = inside
        self.twin = Tensor.random(
            rng, z * block * block, np.flatnonzero(inside), dtype, rule.states
        )
        self.values = stored(self.twin).view(z, block, block)
        self.states = [torch.zeros(z, block, block) for _ in range(rule.states)]
        self.ages = torch.zeros(z, dtype=torch.int32)
        wide = as_torch(
            store(rng.normal(0, 1, (n, k + gap)).astype(np.float32), weight_dtype), weight_dtype
        )
        self.weight = wide[:, :k]
        self.blocks = torch.from_numpy(self.index)
        # What lies outside [N, K] must not be touched, whatever it is.
        outside = torch.from_numpy(~inside)
        self.values[outside] = float("nan")
        self.twin.param[~inside.reshape(-1)] = np.nan
        for state in self.states:
            state[outside] = float("inf")

    def expected_weight(self, before):
        want = before.clone()
        for at, (r, c) in enumerate(self.index):
            rows = slice(r * self.block, min(self.n, (r + 1) * self.block))
            cols = slice(c * self.block, min(self.k, (c + 1) * self.block))
            part = self.values[at, : rows.stop - rows.start, : cols.stop - cols.start]
            want[rows, cols] = part.to(want.dtype)
        return want


@LEVEL
@pytest.mark.parametrize("rule", (RULES[1], RULES[3], RULES[5], RULES[8]), ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_block(level, rule, block):
    native.set_cpu_isa(level)
    rng = np.random.default_rng(3)
    for dtype, weight_dtype, with_weights in itertools.product(DTYPES, DTYPES, (True, False)):
        if not with_weights and weight_dtype != dtype:
            continue
        even = 3 * block
        shapes = ((even, even, 0), (even, even + 5, 0), (block + 7, 2 * block + 17, 9), (3, 5, 1))
        if not with_weights:
            shapes = shapes[:1]
        layers = [
            Layer(rng, rule, n, k, block, dtype, weight_dtype, gap=gap) for n, k, gap in shapes
        ]
        layers.append(Layer(rng, rule, even, even, block, dtype, weight_dtype, density=0.0))
        before = [layer.weight.clone() for layer in layers]
        for turn in range(3):
            grads = []
            for layer in layers:
                t = layer.twin
                if turn == 2 and len(layer.ages):  # blocks of other ages from here on
                    layer.ages[::2] += 5
                    older = np.repeat(np.arange(len(layer.ages)) % 2 == 0, block * block)
                    t.ages += 5 * older[t.active]
                g, values = grads_of(rng, t, t.param.size)
                grads.append(g.view_as(layer.values))
                t.step(rule, values[t.active])
            lists = [[layer.states[i] for layer in layers] for i in range(rule.states)] or [[]]
            op_of(rule, "block")(
                [layer.values for layer in layers], grads, *lists,
                [layer.ages for layer in layers],
                [layer.weight for layer in layers] if with_weights else [],
                [layer.blocks for layer in layers], block=block, **hyper(rule),
            )  # fmt: skip
        for layer, old in zip(layers, before):
            what = f"{level} {rule} {dtype} weight {weight_dtype} block {block} {layer.n}"
            check(layer.values, layer.twin, what)
            for i, state in enumerate(layer.states):
                flat = state.reshape(-1)[torch.from_numpy(layer.twin.active)]
                assert same_bits(flat, torch.from_numpy(layer.twin.states[i])), what
                rest = state[torch.from_numpy(~layer.inside)]
                assert torch.isinf(rest).all(), what
            want = layer.expected_weight(old) if with_weights else old
            assert same_bits(layer.weight, want), what


@LEVEL
def test_large_weights_are_written_past_the_caches(level):
    """Above 32 MB of dense weights stores go around the caches: same bits."""
    native.set_cpu_isa(level)
    rng = np.random.default_rng(4)
    n, k = 1100, 8192
    for dtype, weight_dtype in itertools.product(DTYPES, DTYPES):
        layer = Layer(rng, AdamW(), n, k, 32, dtype, weight_dtype, density=0.01)
        z = len(layer.index)
        spare = torch.zeros(4096, 4096, dtype=torch.float32)
        nothing = torch.zeros(0, 32, 32, dtype=layer.values.dtype)
        before = layer.weight.clone()
        g, values = grads_of(rng, layer.twin, layer.twin.param.size)
        layer.twin.step(AdamW(), values[layer.twin.active])
        ops.masked_adamw_block_(
            [layer.values, nothing], [g.view_as(layer.values), nothing],
            [layer.states[0], torch.zeros(0, 32, 32)], [layer.states[1], torch.zeros(0, 32, 32)],
            [layer.ages, torch.zeros(0, dtype=torch.int32)], [layer.weight, spare],
            [layer.blocks, torch.zeros(0, 2, dtype=torch.int32)], block=32, **hyper(AdamW()),
        )  # fmt: skip
        assert z
        check(layer.values, layer.twin)
        assert same_bits(layer.weight, layer.expected_weight(before))


# --- beside torch -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_stays_with_torch_over_150_steps(rule, maximize):
    torch.manual_seed(0)
    numel, mask = 3000, torch.rand(3000) < 0.4
    param = torch.randn(numel)
    before = param.clone()
    twin = torch.nn.Parameter(param[mask].clone())
    h = hyper(rule)
    if isinstance(rule, AdamW):
        optimizer = torch.optim.AdamW(
            [twin], lr=h["lr"], betas=(h["beta1"], h["beta2"]), eps=h["eps"],
            weight_decay=h["weight_decay"], maximize=maximize,
        )  # fmt: skip
    else:
        optimizer = torch.optim.SGD([twin], maximize=maximize, **h)
    count = int(mask.sum())
    lists = [[torch.zeros(count)] for _ in range(rule.states)] or [[]]
    step, offsets = torch.zeros(1, dtype=torch.int32), ops.mask_offsets(mask)
    peak, path = twin.detach().abs(), torch.zeros(count)
    for _ in range(150):
        old = twin.detach().clone()
        grad = torch.randn(numel) * 10 ** torch.empty(numel).uniform_(-4, 1)
        twin.grad = grad[mask]
        optimizer.step()
        op_of(rule, "bool")(
            [param], [grad], [mask], [offsets], *lists, [step], maximize=maximize, **h
        )
        peak = torch.maximum(peak, twin.detach().abs())
        path += (twin.detach() - old).abs()
    error = (param[mask] - twin.detach()).abs()
    # Each of the 150 steps rounds p once here and once there, half a unit in the last place: as a
    # random walk about 10 units. Updates differ by a few units of their own.
    bound = 24 * 2.0**-24 * peak + 4e-6 * path
    assert (error <= bound).all(), (error / bound).max()
    assert same_bits(param[~mask], before[~mask])


# --- what all kinds promise ---------------------------------------------------------------------


def nan_payloads(numel):
    return torch.randint(0x7F800001, 0x7FBFFFFF, (numel,)).to(torch.int32).view(torch.float32)


@LEVEL
def test_inactive_entries_keep_their_bits(level):
    native.set_cpu_isa(level)
    numel, mask = 5000, torch.rand(5000) < 0.3
    mask[1024:2048] = False
    param = nan_payloads(numel)
    param[mask] = torch.randn(int(mask.sum()))
    before, index = bits(param).clone(), mask.nonzero().squeeze(1)
    count = len(index)
    state = [torch.zeros(count), torch.zeros(count)]
    step = torch.zeros(1, dtype=torch.int32)
    grad = torch.full((numel,), float("nan"))
    grad[mask] = 1.0
    offsets = ops.mask_offsets(mask)
    args = ([state[0]], [state[1]], [step])
    ops.masked_adamw_bool_([param], [grad], [mask], [offsets], *args, lr=1e-3)
    ops.masked_adamw_flat_([param], [grad], [index], *args, lr=1e-3)
    assert torch.equal(bits(param)[~mask], before[~mask])
    assert (bits(param)[mask] != before[mask]).all()
    assert torch.isfinite(param[mask]).all()


@LEVEL
def test_same_bits_at_any_number_of_threads_and_kind(level):
    native.set_cpu_isa(level)
    rng = np.random.default_rng(7)
    numel = 200_000
    mask = torch.from_numpy(rng.random(numel) < 0.5)
    index, offsets = mask.nonzero().squeeze(1), ops.mask_offsets(mask)
    start, grad = torch.randn(numel), torch.randn(numel)
    found = []
    for threads, kind in itertools.product((1, 2, 3), ("flat", "bool")):
        torch.set_num_threads(threads)
        p, m, v = start.clone(), torch.zeros(len(index)), torch.zeros(len(index))
        step = torch.zeros(1, dtype=torch.int32)
        for _ in range(3):
            how = ([index],) if kind == "flat" else ([mask], [offsets])
            op_of(AdamW(), kind)([p], [grad], *how, [m], [v], [step], lr=1e-2)
        found.append((p, m, v))
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other))


@LEVEL
def test_denormals_count_as_zero_and_only_inside(level):
    native.set_cpu_isa(level)
    tiny = torch.full((40,), 1e-40)
    p, g = tiny.clone(), torch.zeros(40)
    m, v, step = tiny.clone(), tiny.clone(), torch.zeros(1, dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.bool)
    ops.masked_adamw_bool_([p], [g], [none], [none.long()], [m], [v], [step], lr=1e-2)
    assert not m.any()
    assert not v.any()
    assert not p.any()
    assert (tiny * 0.5).any(), "the caller's own arithmetic still has denormals"


def step_arguments(numel=2000):
    torch.manual_seed(3)
    mask = torch.rand(numel) < 0.5
    count = int(mask.sum())
    return dict(
        params=[torch.randn(numel)], grads=[torch.randn(numel)], masks=[mask],
        offsets=[ops.mask_offsets(mask)], exp_avgs=[torch.zeros(count)],
        exp_avg_sqs=[torch.zeros(count)], steps=[torch.zeros(1, dtype=torch.int32)], lr=1e-2,
    )  # fmt: skip


def snapshot(arguments):
    lists = [a for a in arguments.values() if isinstance(a, list)]
    return [t.clone() for tensors in lists for t in tensors if isinstance(t, torch.Tensor)]


@LEVEL
def test_found_inf_and_multiplier(level):
    native.set_cpu_isa(level)
    given = step_arguments()
    before = snapshot(given)
    for bad in (1.0, float("nan"), float("inf")):
        ops.masked_adamw_bool_(**given, found_inf=torch.tensor([bad]))
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot(given)))
    scaled = step_arguments()
    scaled["grads"] = [g * 1024 for g in scaled["grads"]]
    ops.masked_adamw_bool_(**scaled, multiplier=torch.tensor(1 / 1024), found_inf=torch.zeros(()))
    ops.masked_adamw_bool_(**given)
    assert same_bits(given["params"][0], scaled["params"][0])
    down, up = step_arguments(), step_arguments()
    up["grads"] = [-g for g in up["grads"]]
    ops.masked_adamw_bool_(**down)
    ops.masked_adamw_bool_(**up, maximize=True)
    assert same_bits(down["params"][0], up["params"][0])


def test_versions_are_bumped():
    given = step_arguments()
    changed = [given[n][0] for n in ("params", "exp_avgs", "exp_avg_sqs", "steps")]
    before = [t._version for t in changed]
    ops.masked_adamw_bool_(**given)
    assert [t._version for t in changed] == [v + 1 for v in before]
    leaf = torch.zeros(3, requires_grad=True)
    step = torch.zeros(1, dtype=torch.int32)
    y = (leaf * leaf).sum()
    ops.masked_sgd_flat_([leaf], [torch.ones(3)], [torch.arange(3)], [], [step], lr=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_empty_lists():
    for rule, kind in itertools.product((AdamW(), Sgd(momentum=0.9)), ("block", "flat", "bool")):
        more = {"block": 2, "flat": 1, "bool": 2}[kind]
        extra = {"block": 32} if kind == "block" else {}
        op_of(rule, kind)(*[[] for _ in range(3 + rule.states + more)], **extra, **hyper(rule))


def test_strided_gradients():
    given, plain = step_arguments(), step_arguments()
    given["grads"] = [torch.stack([g, g], 1)[:, 0] for g in given["grads"]]
    assert not given["grads"][0].is_contiguous()
    ops.masked_adamw_bool_(**given)
    ops.masked_adamw_bool_(**plain)
    assert same_bits(given["params"][0], plain["params"][0])
