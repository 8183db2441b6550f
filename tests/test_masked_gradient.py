"""Masked passes over gradients, norms and the group-lasso step, at every level against float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from harness import level_params, native
from nibblock import ops

LEVEL = pytest.mark.parametrize("level", level_params())
DTYPES = (torch.float32, torch.bfloat16)


def ulp(dtype):
    return 2.0**-24 if dtype == torch.float32 else 2.0**-9


def check_pass(got, norm, before, keep, multiplier, max_norm):
    """`got` is what the pass made of the list `before`, `keep` its masks."""
    active = [g.double() * k for g, k in zip(before, keep)]
    exact = multiplier * math.sqrt(sum(float((a * a).sum()) for a in active))
    assert abs(float(norm) - exact) <= 2e-7 * exact + 1e-45
    clip = min(1.0, max_norm / (exact + 1e-6)) if max_norm > 0 else 1.0
    for new, a, k in zip(got, active, keep):
        want = a * multiplier * clip
        assert ((new.double() - want).abs() <= 4 * ulp(new.dtype) * want.abs()).all()
        assert not new[~k].any()
        assert not torch.signbit(new[~k]).any()


def clean(grad, mask):
    """The gradient with the NaN that stand outside its mask left out."""
    return torch.where(mask, grad, torch.zeros_like(grad))


@LEVEL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 2.0, 1e9])
def test_bool(level, dtype, max_norm):
    native.set_cpu_isa(level)
    torch.manual_seed(0)
    grads, masks = [], []
    for shape in ((1,), (17,), (64, 33), (40000,), (0,), (5, 7)):
        grads.append(torch.randn(shape).to(dtype))
        masks.append(torch.rand(shape) < 0.4)
        grads[-1][~masks[-1]] = float("nan")
    grads.append(torch.randn(100).to(dtype))
    wide = torch.randn(30, 8).to(dtype)
    grads.append(wide[:, ::2])  # strided: worked on in a copy, and written back
    masks.append(torch.ones(30, 4, dtype=torch.bool))
    keep = [*masks[:6], torch.ones(100, dtype=torch.bool), masks[-1]]
    masks = [*masks[:6], torch.zeros(0, dtype=torch.bool), masks[-1]]
    before = [clean(g, k) for g, k in zip(grads, keep)]
    beside = wide[:, 1::2].clone()
    norm = ops.masked_grad_bool_(grads, masks, multiplier=torch.tensor([0.5]), max_norm=max_norm)
    check_pass(grads, norm, before, keep, 0.5, max_norm)
    assert torch.equal(beside, wide[:, 1::2])


@LEVEL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_block(level, dtype, block):
    native.set_cpu_isa(level)
    torch.manual_seed(1)
    for max_norm in (0.0, 1.0):
        grads, blocks, keep = [], [], []
        for n, k, density in ((1, 1, 1.0), (70, 130, 0.5), (257, 65, 0.3), (64, 64, 0.0)):
            rows, columns = -(-n // block), -(-k // block)
            chosen = torch.rand(rows, columns) < density
            mask = chosen.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :k]
            grad = torch.randn(n, k + 3).to(dtype)[:, :k]
            grad[~mask] = float("nan")
            grads.append(grad)
            keep.append(mask)
            blocks.append(chosen.nonzero().int())
        before = [clean(g, k) for g, k in zip(grads, keep)]
        norm = ops.masked_grad_block_(grads, blocks, block=block, max_norm=max_norm)
        check_pass(grads, norm, before, keep, 1.0, max_norm)


@LEVEL
def test_norm(level):
    native.set_cpu_isa(level)
    torch.manual_seed(2)
    for dtype in DTYPES:
        grads = [torch.randn(s).to(dtype) * 10**e for s, e in ((3, 0), (50000, -3), (64, 5))]
        grads.append(torch.randn(8, 6).to(dtype).t())
        exact = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        before = [g.clone() for g in grads]
        assert abs(float(ops.grad_norm(grads)) - exact) <= 2e-7 * exact
        half = ops.grad_norm(grads, multiplier=torch.tensor(-0.5))
        assert abs(float(half) - exact / 2) <= 2e-7 * exact
        assert all(torch.equal(a, b) for a, b in zip(before, grads))
    big = torch.full((1000,), 1e30)
    assert abs(float(ops.grad_norm([big])) - 1e30 * math.sqrt(1000)) < 1e26
    assert ops.grad_norm([]) == 0
    assert torch.isnan(ops.grad_norm([torch.tensor([1.0, float("nan")])]))


def test_clip_is_torchs():
    torch.manual_seed(3)
    grads = [torch.randn(50), torch.randn(7, 9)]
    params = [torch.zeros_like(g).requires_grad_() for g in grads]
    for p, g in zip(params, grads):
        p.grad = g.clone()
    theirs = torch.nn.utils.clip_grad_norm_(params, 0.7)
    none = torch.zeros(0, dtype=torch.bool)
    ours = ops.masked_grad_bool_(grads, [none, none], max_norm=0.7)
    torch.testing.assert_close(ours, theirs)
    for p, g in zip(params, grads):
        torch.testing.assert_close(g, p.grad, rtol=1e-6, atol=0)
    assert torch.isnan(ops.masked_grad_bool_([torch.tensor([float("nan")])], [none], max_norm=1.0))


@LEVEL
def test_same_bits_at_any_number_of_threads(level):
    native.set_cpu_isa(level)
    torch.manual_seed(4)
    start, mask = torch.randn(300_000), torch.rand(300_000) < 0.3
    dense, index = torch.randn(500, 700), (torch.rand(16, 22) < 0.3).nonzero().int()
    values, limits = torch.randn(40, 32, 32), torch.rand(40) * 40
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        a, b, v = start.clone(), dense.clone(), values.clone()
        found.append((
            ops.masked_grad_bool_([a], [mask], max_norm=1.0),
            ops.masked_grad_block_([b], [index], block=32, max_norm=1.0),
            ops.grad_norm([start, dense]), ops.prox_blocks_([v], [], [limits]), a, b, v,
        ))  # fmt: skip
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other))


@LEVEL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prox(level, dtype):
    native.set_cpu_isa(level)
    torch.manual_seed(5)
    for edge, with_origin in itertools.product((1, 3, 16, 32, 128), (False, True)):
        values = [torch.randn(z, edge, edge).to(dtype) for z in (3, 0, 5)]
        origins = [torch.randn_like(v) for v in values] if with_origin else []
        start = origins or [torch.zeros_like(v) for v in values]
        apart = [
            (v.double() - o.double()).square().sum((1, 2)).sqrt() for v, o in zip(values, start)
        ]
        share = [torch.tensor(s) for s in ([0.0, 0.4, 1.0], [], [0.9, 2.0, 0.1, 0.0, 1.5])]
        limits = [(a * s).float() for a, s in zip(apart, share)]
        limits[0][2] *= 1.001  # past the norm
        before = [v.clone() for v in values]
        norms = ops.prox_blocks_(values, origins, limits)
        assert norms.shape == (8,)
        at = 0
        for v, b, o, a, t in zip(values, before, start, apart, limits):
            for z in range(len(v)):
                scale = max(0.0, 1.0 - float(t[z]) / float(a[z]))
                want = o[z].double() + (b[z].double() - o[z].double()) * scale
                size = o[z].double().abs() + (b[z].double() - o[z].double()).abs()
                assert ((v[z].double() - want).abs() <= 8 * ulp(dtype) * size).all()
                assert abs(float(norms[at]) - scale * float(a[z])) <= 1e-6 * float(a[z])
                if scale == 0.0:
                    assert norms[at] == 0
                    assert torch.equal(v[z], o[z])
                    assert with_origin or not torch.signbit(v[z]).any()
                if t[z] == 0:
                    assert torch.equal(v[z], b[z])
                at += 1


@LEVEL
def test_prox_at_the_origin_and_with_nan(level):
    native.set_cpu_isa(level)
    values = torch.zeros(3, 16, 16)
    values[1] = float("nan")
    norms = ops.prox_blocks_([values], [], [torch.tensor([1.0, 1.0, 0.0])])
    assert norms[0] == 0
    assert torch.isnan(norms[1])
    assert torch.isnan(values[1]).all()
    assert not values[0].any()
    version = values._version
    ops.prox_blocks_([values], [], [torch.zeros(3)])
    assert values._version == version + 1
    assert ops.prox_blocks_([], [], []).shape == (0,)
