"""int4_linear's gradients, at every level of the CPU, and its behaviour under autocast."""

from __future__ import annotations

import nibblock as nb
import numpy as np
import pytest
import reference as ref
import torch
from harness import X_DTYPES, check_op, level_params, native, op_arguments, random_x, torch_packed

LEVEL = pytest.mark.parametrize("level", level_params())


@LEVEL
@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_gradients_of_x_and_bias(level, x_dtype):
    native.set_cpu_isa(level)
    rng = np.random.default_rng(30)
    w = ref.random_weight(rng, 34, 100, 32, 4, True)
    packed = torch_packed(w)
    for lead in ((), (1,), (6,), (2, 9)):
        x = random_x(rng, (*lead, 100), x_dtype).requires_grad_()
        bias = random_x(rng, (34,), x_dtype).requires_grad_()
        y = nb.ops.int4_linear(x, packed, bias, **op_arguments(w))
        grad = random_x(rng, (*lead, 34), x_dtype)
        y.backward(grad)
        check_op(x.grad, grad, w, transposed=True, what=f"{lead}")
        wanted = grad.double().reshape(-1, 34).sum(0)
        slack = 2.0**-7 if x_dtype == "bfloat16" else 2.0**-10
        scale = grad.double().abs().reshape(-1, 34).sum(0)
        assert bias.grad.dtype == bias.dtype
        assert ((bias.grad.double() - wanted).abs() <= slack * scale).all()


def test_gradients_agree_with_finite_differences():
    """The op is linear in x and bias: a central difference of any step is exact up to rounding."""
    rng = np.random.default_rng(31)
    native.set_cpu_isa("scalar")
    w = ref.random_weight(rng, 5, 40, 32, 4, True)
    packed = torch_packed(w)

    def loss(x, bias):
        y = nb.ops.int4_linear(x, packed, bias, **op_arguments(w))
        return (y.double() * direction).sum()

    x = random_x(rng, (3, 40), "float32").requires_grad_()
    bias = random_x(rng, (5,), "float32").requires_grad_()
    direction = random_x(rng, (3, 5), "float32").double()
    gx, gb = torch.autograd.grad(loss(x, bias), (x, bias))
    with torch.no_grad():
        for grad, which in ((gx, 0), (gb, 1)):
            for i in range(0, grad.numel(), 7):
                step = torch.zeros(grad.numel())
                step[i] = 1.0
                step = step.view_as(grad)
                up = [x, bias]
                down = [x, bias]
                up[which] = up[which] + step
                down[which] = down[which] - step
                slope = (loss(*up) - loss(*down)) / 2
                assert abs(slope - grad.flatten()[i]) < 1e-4


def test_only_needed_gradients():
    rng = np.random.default_rng(32)
    w = ref.random_weight(rng, 6, 40, 32)
    packed = torch_packed(w)
    x, bias = random_x(rng, (3, 40), "float32"), random_x(rng, (6,), "float32")
    assert not nb.ops.int4_linear(x, packed, bias, **op_arguments(w)).requires_grad
    y = nb.ops.int4_linear(x, packed, bias.requires_grad_(), **op_arguments(w))
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 3.0))
    assert x.grad is None
    assert packed.grad is None
    frozen = torch.nn.Parameter(packed, requires_grad=False)
    x.requires_grad_()
    nb.ops.int4_linear(x, frozen, None, **op_arguments(w)).sum().backward()
    assert x.grad is not None
    assert frozen.grad is None


def test_derivatives_of_second_order():
    """Both ops are linear in their first argument, so each is the other's gradient."""
    rng = np.random.default_rng(33)
    w = ref.random_weight(rng, 6, 40, 32, 4, True)
    dense = torch.from_numpy(w.dense()).float()
    x = random_x(rng, (3, 40), "float32").requires_grad_()

    def slope_of_slope(linear):
        (dx,) = torch.autograd.grad(linear(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    native.set_cpu_isa("scalar")
    ours = slope_of_slope(lambda x: nb.ops.int4_linear(x, torch_packed(w), **op_arguments(w)))
    theirs = slope_of_slope(lambda x: torch.nn.functional.linear(x, dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)


def test_gradient_through_a_strided_upstream_gradient():
    rng = np.random.default_rng(34)
    w = ref.random_weight(rng, 6, 40, 32)
    x = random_x(rng, (3, 40), "float32").requires_grad_()
    y = nb.ops.int4_linear(x, torch_packed(w), **op_arguments(w))
    y.sum().backward()  # an expanded gradient of strides 0
    check_op(x.grad, torch.ones(3, 6), w, transposed=True)
    x.grad = None
    nb.ops.int4_linear(x, torch_packed(w), **op_arguments(w)).t().contiguous().sum().backward()
    check_op(x.grad, torch.ones(3, 6), w, transposed=True)


# --- autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_autocast_behaves_as_for_a_dense_linear(x_dtype):
    rng = np.random.default_rng(35)
    w = ref.random_weight(rng, 20, 64, 32, 4, True)
    packed = torch_packed(w)
    dense, bias = torch.from_numpy(w.dense()).float(), random_x(rng, (20,), "float32")
    x = random_x(rng, (4, 64), x_dtype).requires_grad_()
    for target in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=target):
            y = nb.ops.int4_linear(x, packed, bias, **op_arguments(w))
            like = torch.nn.functional.linear(x, dense, bias)
        assert y.dtype == like.dtype == target
        check_op(y, x.detach().to(target), w, bias.to(target), what=f"{x_dtype} -> {target}")
        y.float().sum().backward()
        assert x.grad.dtype == x.dtype
        x.grad = None
    with torch.autocast("cpu", enabled=False):
        assert nb.ops.int4_linear(x, packed, bias, **op_arguments(w)).dtype == x.dtype
