"""Cases of the masked updates' Triton kernels; see `triton_cases`."""

from __future__ import annotations

from typing import Callable

import numpy as np
import torch
from reference_scores import check_scores, gain_sums
from triton_cases import DTYPES, array

CASES: dict[str, Callable[[torch.device], None]] = {}
ADAMW = dict(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
SGD = dict(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01, nesterov=False)


def case(function: Callable, *arguments: object) -> Callable:
    label = "-".join(str(a) for a in arguments)
    CASES[function.__name__ + (f"[{label}]" if label else "")] = lambda device: function(
        device, *arguments
    )
    return function


def kernels():
    from nibblock.triton_kernels import masked_update

    return masked_update


def moved(rule, p, g, m, v, age):
    """The formulas in float64 on active entries; age: updates before this one."""
    if "beta1" in rule:
        t = age + 1
        m = rule["beta1"] * m + (1 - rule["beta1"]) * g
        v = rule["beta2"] * v + (1 - rule["beta2"]) * g * g
        p = p * (1 - rule["lr"] * rule["weight_decay"])
        root = np.sqrt(v) / np.sqrt(1 - rule["beta2"] ** t) + rule["eps"]
        return p - rule["lr"] / (1 - rule["beta1"] ** t) * m / root, m, v
    g = g + rule["weight_decay"] * p
    if rule["momentum"]:
        m = np.where(age == 0, g, rule["momentum"] * m + (1 - rule["dampening"]) * g)
        g = g + rule["momentum"] * m if rule["nesterov"] else m
    return p - rule["lr"] * g, m, v


def launch_rule(k, rule):
    return k.adamw_rule(**rule) if "beta1" in rule else k.sgd_rule(**rule)


class Tensors:
    """Parameters, gradients and states of one entry, on a device and in float64."""

    def __init__(self, rng, shape, active, dtype, device, rule, ages):
        def make(size, scale=1.0, like=torch.float32):
            return torch.from_numpy(rng.normal(0, scale, size)).to(like).to(device)

        self.p, self.g = make(shape, like=dtype), make(shape, like=dtype)
        self.m, self.v = make(active, 0.1), make(active, 0.1).square()
        fresh = np.asarray(ages) == 0
        if fresh.all():
            self.m, self.v = torch.zeros_like(self.m), torch.zeros_like(self.v)
        self.age = torch.tensor(ages, dtype=torch.int32, device=device)
        self.states = [[self.m] if "beta1" in rule or rule["momentum"] else []]
        self.states += [[self.v] if "beta1" in rule else []]
        self.before = [array(t).astype(np.float64) for t in (self.p, self.g, self.m, self.v)]


def check(got, want, dtype, what):
    half = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[dtype]
    bound = 40 * 2.0**-24 * (1 + np.abs(want)) + half * np.abs(want) * 1.01
    assert (np.abs(array(got) - want) <= bound).all(), what


def block_step(device, rule, dtype, weight_dtype, block):
    k = kernels()
    rng = np.random.default_rng(block)
    n, cols = 3 * block - 5, 2 * block - 3  # both edges ragged
    blocks = np.array([[0, 1], [1, 0], [2, 1]])
    ages = [0, 3, 0]
    t = Tensors(rng, (3, block, block), (3, block, block), DTYPES[dtype], device, rule, ages)
    for z in (0, 2):
        t.m[z], t.v[z] = 0, 0
        t.before[2][z], t.before[3][z] = 0, 0
    wide = torch.full((n, cols + 2), float("nan"), device=device).to(DTYPES[weight_dtype])
    weight = wide[:, :cols]  # rows with a stride of their own; elsewhere it holds NaN
    index = torch.tensor(blocks, dtype=torch.int32, device=device)
    inside = np.zeros((3, block, block), bool)
    for z, (i, j) in enumerate(blocks):
        inside[z, : min(block, n - i * block), : min(block, cols - j * block)] = True
    multiplier = torch.tensor([0.5], device=device)
    scale = torch.zeros(1, device=device)
    lists = [[t.p], [t.g], *t.states, [t.age]]
    more = dict(block=block, weights=[weight], blocks=[index])
    old = [x.clone() for x in (t.p, t.m, t.v, t.age, wide)]
    scale.fill_(float("inf"))
    k.step("block", launch_rule(k, rule), *lists, True, multiplier, scale, **more)
    for x, y in zip((t.p, t.m, t.v, t.age, wide.nan_to_num(7)), (*old[:4], old[4].nan_to_num(7))):
        assert torch.equal(x, y)  # found_inf: nothing moved
    scale.zero_()
    k.step("block", launch_rule(k, rule), *lists, True, multiplier, scale, **more)
    p, g, m, v = t.before
    age = np.array(ages)[:, None, None]
    want = moved(rule, p, -0.5 * g, m, v, age)
    for got, w, was, kind in ((t.p, want[0], p, DTYPES[dtype]), (t.m, want[1], m, torch.float32),
                              (t.v, want[2], v, torch.float32)):  # fmt: skip
        check(got, np.where(inside, w, was), kind, "blocks")
        assert np.array_equal(array(got)[~inside], was[~inside].astype(np.float32))
    assert t.age.tolist() == [1, 4, 1]
    dense = np.full((n, cols + 2), np.nan, np.float32)
    values = array(t.p.to(DTYPES[weight_dtype]))
    for z, (i, j) in enumerate(blocks):
        r, c = inside[z].any(1).sum(), inside[z].any(0).sum()
        rows = slice(i * block, i * block + r)
        dense[rows, j * block : j * block + c] = values[z, :r, :c]
    assert np.array_equal(array(wide), dense, equal_nan=True)


def flat_step(device, rule, dtype, index_dtype, packed):
    k = kernels()
    rng = np.random.default_rng(1)
    position = np.sort(rng.choice(3000, 1500, replace=False))
    t = Tensors(rng, (3, 1000), 1500, DTYPES[dtype], device, rule, [2])
    index = torch.from_numpy(position).to(index_dtype).to(device)
    t.p.view(-1)[[i for i in range(3000) if i not in set(position)][:5]] = float("nan")
    t.before[0] = array(t.p).astype(np.float64)
    grad = t.g.reshape(-1)[index.long()].clone() if packed else t.g
    lists = [[t.p], [grad], *t.states, [t.age]]
    old = array(t.p).reshape(-1)
    k.step("flat", launch_rule(k, rule), *lists, False, None, None, indices=[index])
    p, g, m, v = t.before
    want = moved(rule, p.reshape(-1)[position], g.reshape(-1)[position], m, v, 2)
    check(t.p.view(-1)[index.long()], want[0], DTYPES[dtype], "flat")
    if t.states[0]:
        check(t.m, want[1], torch.float32, "flat m")
    rest = np.ones(3000, bool)
    rest[position] = False
    assert np.array_equal(array(t.p).reshape(-1)[rest], old[rest], equal_nan=True)
    assert t.age.tolist() == [3]


def bool_step(device, rule, dtype):
    """A mixed mask with chunks all on and all off, and a tensor without one, in one list."""
    k = kernels()
    rng = np.random.default_rng(2)
    mask = rng.random(4 * 1024 + 17) < 0.3
    mask[1024:2048], mask[2048:3072] = True, False
    counts = np.array([mask[c : c + 1024].sum() for c in range(0, mask.size, 1024)])
    start = torch.from_numpy(np.concatenate([[0], counts.cumsum()])).to(device)
    kind = DTYPES[dtype]
    a = Tensors(rng, mask.size, int(mask.sum()), kind, device, rule, [0])
    b = Tensors(rng, (3, 7), (3, 7), kind, device, rule, [5])
    masks = [torch.from_numpy(mask).to(device), torch.empty(0, dtype=torch.bool, device=device)]
    offsets = [start, torch.zeros(1, dtype=torch.int64, device=device)]
    states = [x + y for x, y in zip(a.states, b.states)]
    lists = [[a.p, b.p], [a.g, b.g], *states, [a.age, b.age]]
    k.step("bool", launch_rule(k, rule), *lists, False, None, None, masks=masks, offsets=offsets)
    for t, on, age in ((a, mask, 0), (b, np.ones((3, 7), bool), 5)):
        p, g, m, v = t.before
        want = moved(rule, p[on], g[on], m.reshape(-1), v.reshape(-1), age)
        check(t.p[torch.from_numpy(on).to(device)], want[0], kind, "bool")
        assert np.array_equal(array(t.p)[~on], p[~on].astype(np.float32))
        assert t.age.tolist() == [age + 1]
        if t.states[1]:
            check(t.v.reshape(-1), want[2], torch.float32, "bool v")


for _rule in (ADAMW, {**ADAMW, "beta1": 0.0}, SGD, {**SGD, "nesterov": True, "dampening": 0.0},
              {**SGD, "momentum": 0.0, "weight_decay": 0.0}):  # fmt: skip
    _label = "-".join(
        f"{k}={v}" for k, v in _rule.items() if k in ("beta1", "momentum", "nesterov")
    )
    for _dtype in ("float32", "bfloat16"):
        CASES[f"bool_step[{_label}-{_dtype}]"] = lambda d, r=_rule, t=_dtype: bool_step(d, r, t)
        for _packed in (True, False):
            _index = torch.int64 if _packed else torch.int32
            CASES[f"flat_step[{_label}-{_dtype}-packed={_packed}]"] = (
                lambda d, r=_rule, t=_dtype, i=_index, p=_packed: flat_step(d, r, t, i, p)
            )
for _rule, _kind in ((ADAMW, "adamw"), (SGD, "sgd")):
    for _dtype, _weight, _block in (
        ("float32", "float32", 16), ("float32", "bfloat16", 32), ("bfloat16", "bfloat16", 64),
        ("bfloat16", "float32", 16),
    ):  # fmt: skip
        CASES[f"block_step[{_kind}-{_dtype}-{_weight}-{_block}]"] = (
            lambda d, r=_rule, t=_dtype, w=_weight, b=_block: block_step(d, r, t, w, b)
        )


def masked_grads(device, dtype, max_norm):
    k = kernels()
    rng = np.random.default_rng(3)
    kind = DTYPES[dtype]
    multiplier = torch.tensor([-0.5], device=device)
    grads = [torch.from_numpy(rng.normal(size=s)).to(kind).to(device) for s in ((50, 70), (2100,))]
    mask = torch.from_numpy(rng.random((50, 70)) < 0.3).to(device)
    grads[0][~mask] = float("nan")
    masks = [mask, torch.empty(0, dtype=torch.bool, device=device)]
    given = grads[0].t().contiguous().t(), grads[1]  # the first one is not contiguous
    old = [array(g).astype(np.float64) for g in given]
    on = mask.cpu().numpy()
    norm64 = 0.5 * np.sqrt((old[0][on] ** 2).sum() + (old[1] ** 2).sum())
    plain = k.masked_grad(given, masks, None, 0, multiplier, 0.0, write=False)
    assert np.array_equal(array(given[1]), old[1].astype(np.float32))
    norm = k.masked_grad(given, masks, None, 0, multiplier, max_norm)
    assert norm.shape == ()
    assert torch.equal(norm, plain)
    assert abs(float(norm) - norm64) <= 1e-6 * norm64
    factor = -0.5 * (min(1.0, max_norm / (norm64 + 1e-6)) if max_norm > 0 else 1.0)
    want = np.where(on, np.nan_to_num(old[0]) * factor, 0)
    for got, w in ((given[0], want), (given[1], old[1] * factor)):
        check(got, w, kind, "masked gradient")


def masked_grad_blocks(device):
    k = kernels()
    rng = np.random.default_rng(4)
    grad = torch.from_numpy(rng.normal(size=(50, 41))).float().to(device)
    old = array(grad).astype(np.float64)
    blocks = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32, device=device)
    on = np.zeros((50, 41), bool)
    on[0:16, 16:32] = on[48:50, 32:41] = True
    norm = k.masked_grad([grad], None, [blocks], 16, None, 1.0)
    norm64 = np.sqrt((old[on] ** 2).sum())
    assert abs(float(norm) - norm64) <= 1e-6 * norm64
    check(grad, np.where(on, old / (norm64 + 1e-6), 0), torch.float32, "block gradient")


def prox(device, dtype, with_origin):
    k = kernels()
    rng = np.random.default_rng(5)
    kind = DTYPES[dtype]
    values = [torch.from_numpy(rng.normal(size=(4, b, b))).to(kind).to(device) for b in (16, 64)]
    origins = [torch.from_numpy(rng.normal(size=v.shape)).to(kind).to(device) for v in values]
    origins = origins if with_origin else []
    limits = [torch.tensor([0.0, 3.0, 1e9, 1.0], device=device) for _ in values]
    values[1][3, 0, 0] = float("nan")
    old = [v.clone() for v in values]
    norms = array(k.prox_blocks(values, origins, limits)).reshape(2, 4)
    for i, v in enumerate(values):
        base = array(origins[i]).astype(np.float64) if origins else np.zeros(v.shape)
        d = array(old[i]).astype(np.float64) - base
        size = np.sqrt((d**2).sum((1, 2)))
        limit = limits[i].cpu().numpy().astype(np.float64)
        keep = np.maximum(0, 1 - limit / size)
        assert torch.equal(v[0].view(-1), old[i][0].view(-1))  # a threshold of 0
        end = array(origins[i])[2] if origins else np.zeros(v.shape[1:])
        assert np.array_equal(array(v)[2], end)
        assert norms[i, 2] == 0
        whole = [0, 1, 2, 3] if i == 0 else [0, 1, 2]
        check(v[whole], (base + d * keep[:, None, None])[whole], kind, "prox")
        assert np.allclose(norms[i][whole], (size * keep)[whole], rtol=1e-6)
    assert values[1][3].isnan().all()
    assert np.isnan(norms[1, 3])


for _dtype in ("float32", "bfloat16"):
    for _flag in (0.0, 1.0):
        case(masked_grads, _dtype, _flag)
        case(prox, _dtype, bool(_flag))
case(masked_grad_blocks)


# --- block scores ---------------------------------------------------------------------------------


def scores(device, m, n, k, block, grad_dtype, x_dtype, sketch):
    from nibblock.ops import _triton_masked

    run = _triton_masked.BODIES["block_scores_"]
    rng = np.random.default_rng(n + block)
    grad = torch.from_numpy(rng.normal(size=(m, n + 1))).to(DTYPES[grad_dtype]).to(device)[:, 1:]
    x = torch.from_numpy(rng.normal(size=(m, k))).to(DTYPES[x_dtype]).to(device)
    weight = torch.from_numpy(rng.normal(size=(n, k))).to(DTYPES[grad_dtype]).to(device)
    grid = -(-n // block), -(-k // block)
    sums = torch.ones(*grid[::-1], device=device).t()  # strided, and added to
    moves = None if sketch else torch.ones(grid, device=device)
    run(sums, moves, grad, x, weight if moves is not None else None, block, sketch, 77)
    dense = array(grad).astype(np.float64).T @ array(x)
    size = np.abs(array(grad)).astype(np.float64).T @ np.abs(array(x))

    def by_block(a):
        wide = np.zeros((grid[0] * block, grid[1] * block))
        wide[:n, :k] = a
        return wide.reshape(grid[0], block, grid[1], block).sum((1, 3))

    if sketch:
        want = torch.ones(grid)
        torch.ops.nibblock.block_scores_(
            want, None, grad.cpu(), x.cpu(), None, block, sketch, 77
        )  # the same signs: the same estimate
        assert np.allclose(array(sums), want.numpy(), rtol=2e-3)
        return
    slack = 2.0**-20 * by_block(size * size)
    assert (np.abs(array(sums) - 1 - by_block(dense**2)) <= slack + 1e-5).all()
    w = array(weight)
    slack = 2.0**-19 * by_block(size * np.abs(w))
    assert (np.abs(array(moves) - 1 - by_block(dense * w)) <= slack + 1e-5).all()


for _parameters in (
    (40, 70, 90, 32, "float32", "float32", 0),
    (70, 130, 40, 16, "bfloat16", "bfloat16", 0),
    (30, 70, 150, 64, "float16", "float32", 0),
    (9, 130, 140, 128, "bfloat16", "bfloat16", 0),
    (40, 70, 90, 32, "bfloat16", "bfloat16", 5),
    (20, 40, 50, 16, "float32", "float32", 17),
):
    case(scores, *_parameters)


# --- block gain -----------------------------------------------------------------------------------


def gain(device, m, n, k, block, grad_dtype, x_dtype, whole):
    """Small integers are exact in every product: signs of 0 and both sums are equal to the last
    bit. Others stay within the bounds of the oracle, whose float32 signs may differ near 0."""
    from nibblock.ops import _triton_masked

    rng = np.random.default_rng(n + block)

    def make(*size):
        values = rng.integers(-1, 2, size) if whole else rng.normal(size=size)
        return torch.from_numpy(values).float()

    grad = make(m, n + 1).to(DTYPES[grad_dtype]).to(device)[:, 1:]
    x = make(m, k).to(DTYPES[x_dtype]).to(device)
    grid = -(-n // block), -(-k // block)
    sums = torch.ones(*grid[::-1], device=device).t(), torch.ones(grid, device=device)
    _triton_masked.BODIES["block_gain_"](*sums, grad, x, block)
    want = gain_sums(array(grad), array(x), block)
    if whole:
        assert np.array_equal(array(sums[0]), 1 + want.gain)
        assert np.array_equal(array(sums[1]), 1 + want.squares)
        return
    check_scores(array(sums[0]), 1 + want.gain, 1.0, 8 * want.gain_bound, "gain")
    check_scores(array(sums[1]), 1 + want.squares, 1.0, 8 * want.squares_bound, "squares")


for _parameters in (
    (40, 70, 90, 32, "float32", "float32", True),
    (71, 130, 40, 16, "bfloat16", "bfloat16", True),
    (1, 40, 40, 32, "float32", "float32", False),
    (150, 70, 90, 32, "float32", "float32", False),
    (30, 70, 150, 64, "float16", "float32", False),
    (9, 130, 140, 128, "bfloat16", "bfloat16", False),
    (140, 33, 17, 16, "float16", "float16", False),
):
    case(gain, *_parameters)


# --- the operators' bodies, argument by argument, beside the CPU's --------------------------------


def operator_arguments(op: str, rng, device) -> tuple:
    """A call of an operator in its schema's order."""

    def make(*size):
        return torch.from_numpy(rng.normal(size=size)).float().to(device)

    ages = torch.tensor([0, 2], dtype=torch.int32, device=device)
    blocks = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32, device=device)
    multiplier, found = torch.tensor([0.5], device=device), torch.zeros(1, device=device)
    weight, mask = make(40, 30), make(50, 30) > 0.5
    if op == "block_scores_":
        return make(3, 2), make(3, 2), make(7, 40), make(7, 30), weight, 16, 0, 0
    if op == "block_gain_":
        return make(3, 2), make(3, 2), make(7, 40), make(7, 30), 16
    if op == "prox_blocks_":
        limit = torch.tensor([1.0, 99.0], device=device)
        return [make(2, 16, 16)], [make(2, 16, 16)], [limit]
    if op == "grad_norm":
        return [make(3, 4), make(5)], multiplier
    if op == "masked_grad_bool_":
        return [make(50, 30)], [mask], multiplier, 0.1
    if op == "masked_grad_block_":
        return [make(40, 30)], [blocks], 16, multiplier, 0.1
    rule, kind = op.split("_")[1:3]
    states, numbers = [], [1e-2, 0.9, 0.0, 0.1, True, True, multiplier, found]
    if rule == "adamw":
        numbers = [1e-2, 0.9, 0.999, 1e-8, 0.1, True, multiplier, found]
    count = 2 if rule == "adamw" else 1
    if kind == "block":
        states = [[make(2, 16, 16).abs()] for _ in range(count)]
        lists = [[make(2, 16, 16)], [make(2, 16, 16)], *states, [ages], [weight], [blocks], 16]
    elif kind == "flat":
        states = [[make(3).abs()] for _ in range(count)]
        index = torch.tensor([1, 5, 9], device=device)
        lists = [[make(4, 5)], [make(3)], [index], *states, [ages[:1]]]
    else:
        from nibblock.ops import mask_offsets

        states = [[make(int(mask.sum())).abs()] for _ in range(count)]
        starts = mask_offsets(mask)
        lists = [[make(50, 30)], [make(50, 30)], [mask], [starts], *states, [ages[1:]]]
    return (*lists, *numbers)


def copied(value, device):
    if isinstance(value, (list, tuple)):
        return type(value)(copied(v, device) for v in value)
    return value.clone().to(device) if isinstance(value, torch.Tensor) else value


def body(device, op):
    from nibblock.ops import _triton_masked

    arguments = operator_arguments(op, np.random.default_rng(11), device)
    cpu = copied(arguments, "cpu")
    got = _triton_masked.BODIES[op](*arguments)
    want = getattr(torch.ops.nibblock, op)(*cpu)
    pairs = [(got, want)] if want is not None else []
    for mine, theirs in zip(arguments, cpu):
        mine, theirs = (v if isinstance(v, list) else [v] for v in (mine, theirs))
        pairs += [p for p in zip(mine, theirs) if isinstance(p[0], torch.Tensor)]
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.cpu(), theirs, rtol=2e-6, atol=1e-6)


for _name in (
    *(f"masked_{r}_{k}_" for r in ("adamw", "sgd") for k in ("block", "flat", "bool")),
    "masked_grad_bool_", "masked_grad_block_", "grad_norm", "prox_blocks_", "block_scores_",
    "block_gain_",
):  # fmt: skip
    case(body, _name)
