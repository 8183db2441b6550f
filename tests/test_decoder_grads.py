"""Gradients of the one-pass norm, rotation and silu * up (csrc/decoder_ops) against float64."""

import nibblock  # noqa: F401  (registers the ops)
import pytest
import torch
import torch.nn.functional as F
from harness import isa, native
from hypothesis import given, settings
from hypothesis import strategies as st

ops = torch.ops.nibblock
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def norm64(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def rotated64(x, cos, sin):
    dim = cos.shape[-1]
    heads = x.unflatten(-1, (-1, dim))
    times = x.shape[:-1].numel() // cos.shape[0]
    cos, sin = (t.repeat(times, 1).view(*x.shape[:-1], 1, dim) for t in (cos, sin))
    turned = torch.cat((-heads[..., dim // 2 :], heads[..., : dim // 2]), -1)
    return (heads * cos + turned * sin).flatten(-2)


def gradients(function, arguments, grad, order=1):
    """Of every argument that is a float tensor; of the second order, of the sum of squares of
    those."""
    leaves = [a.detach().requires_grad_() for a in arguments]
    y = function(*leaves)
    first = torch.autograd.grad(y, leaves, grad.to(y.dtype), create_graph=order == 2)
    if order == 1:
        return [y, *first]
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)


def compare(ours, formula, arguments, grad, size, order=1):
    """`size`: what a gradient's terms add up to, argument by argument: rounding is of that."""
    got = gradients(ours, arguments, grad, order)
    exact = gradients(formula, [a.double() for a in arguments], grad.double(), order)
    for g, e, terms in zip(got, exact, size):
        assert g.shape == e.shape
        bound = ULP[g.dtype] * (e.abs() + 4 * terms) + (1e-7 if g.dtype == torch.float16 else 1e-30)
        assert ((g.double() - e).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30)
@given(rows=st.integers(0, 70), width=st.integers(1, 131), seed=st.integers(0, 9))
def test_norm(dtype, rows, width, seed):
    torch.manual_seed(seed)
    x, grad = (torch.randn(rows, width).to(dtype) for _ in range(2))
    weight = torch.randn(width).to(dtype)
    scale = torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5)
    normed, outer = (x.double() * scale).abs(), (grad.double() * weight.double()).abs()
    dx = scale * (outer + normed * (normed * outer).mean(-1, keepdim=True))
    size = (norm64(x.double(), weight.double()).abs(), dx, (normed * grad.double().abs()).sum(0))
    compare(lambda x, w: ops._rms_norm(x, w, 1e-5), norm64, (x, weight), grad, size)


def test_norm_of_a_frozen_weight_makes_no_gradient_for_it():
    x, weight = torch.randn(100, 8, requires_grad=True), torch.randn(8)
    expected = torch.autograd.grad(norm64(x, weight).sum(), x)[0]
    torch.testing.assert_close(
        torch.autograd.grad(ops._rms_norm(x, weight, 1e-5).sum(), x)[0], expected
    )
    dx, dweight = ops._rms_norm_grad(torch.ones(100, 8), x.detach(), weight, 1e-5, False)
    torch.testing.assert_close(dx, expected)
    assert dweight.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30)
@given(
    batch=st.integers(0, 3),
    length=st.integers(1, 9),
    heads=st.integers(1, 4),
    half=st.integers(1, 20),
    shared=st.booleans(),
)
def test_rotation(dtype, batch, length, heads, half, shared):
    torch.manual_seed(batch + length)
    x, grad = torch.randn(2, batch, length, 2 * half * heads).to(dtype)
    tables = length if shared else max(1, batch) * length
    cos, sin = torch.randn(2, tables, 2 * half).to(dtype)
    # Of both halves' products with the largest sine and cosine, whichever it meets.
    largest = cos.abs().amax().double() + sin.abs().amax().double()
    size = [
        t.double().abs().unflatten(-1, (heads, 2, half)).sum(-2, keepdim=True) * largest
        for t in (x, grad)
    ]
    size = [t.expand(*t.shape[:-2], 2, half).reshape(x.shape) for t in size]
    compare(
        lambda x: ops._rotated(x, cos, sin, False),
        lambda x: rotated64(x, cos.double(), sin.double()),
        (x,),
        grad,
        size,
    )


def test_rotation_is_bitwise_torchs_backwards_too():
    x, grad = torch.randn(2, 3, 5, 96)
    cos, sin = torch.randn(2, 5, 32)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            gradients(lambda x: ops._rotated(x, cos, sin, False), (x,), grad),
            gradients(lambda x: rotated64(x, cos, sin), (x,), grad),
        )
    )


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30)
@given(rows=st.integers(0, 40), width=st.integers(1, 67), size=st.sampled_from((1.0, 30.0)))
def test_silu_product(dtype, rows, width, size):
    torch.manual_seed(rows)
    gate, up, grad = (torch.randn(rows, width).mul(size).to(dtype) for _ in range(3))
    g, u, d = (t.double().abs() for t in (gate, up, grad))
    terms = (g * u, d * u * (1 + g), d * g)
    compare(ops._silu_product, lambda g, u: F.silu(g) * u, (gate, up), grad, terms)


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_gradients_can_be_differentiated(dtype):
    torch.manual_seed(0)
    x, gate, up, grad = torch.randn(4, 6, 24).to(dtype)
    weight, (cos, sin) = torch.randn(24), torch.randn(2, 6, 8)
    many = [torch.full((), 100.0)] * 2
    compare(lambda x, w: ops._rms_norm(x, w, 1e-5), norm64, (x, weight), grad, many, order=2)
    compare(ops._silu_product, lambda g, u: F.silu(g) * u, (gate, up), grad, many, order=2)
    # (a rotation's gradient does not depend on x: what can be differentiated is that by grad)
    outer = grad.clone().requires_grad_()
    y = ops._rotated(x.requires_grad_(), cos, sin, False)
    (dx,) = torch.autograd.grad(y, x, outer, create_graph=True)
    (second,) = torch.autograd.grad(dx, outer, x.detach())
    assert torch.equal(second, ops._rotated(x.detach(), cos, sin, False))


def test_one_result_at_any_level_and_thread_count():
    """Large enough for several threads."""
    torch.manual_seed(1)
    x, grad = torch.randn(2, 300, 520)
    gate, up = torch.randn(2, 300, 520)
    weight, (cos, sin) = torch.randn(520), torch.randn(2, 300, 40)
    results = []
    for level in ("scalar", native.cpu_isa()):
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with isa(level):
                found = gradients(lambda x, w: ops._rms_norm(x, w, 1e-5), (x, weight), grad)
                found += gradients(ops._silu_product, (gate, up), grad)
                found += gradients(lambda x: ops._rotated(x, cos, sin, False), (x,), grad)
                results.append(found)
    assert all(torch.equal(a, b) for found in results for a, b in zip(found, results[0]))
