"""`MaskedLinear` as a module: bits, gradients, what it keeps, how values and weight stay one."""

from __future__ import annotations

import copy
import gc
import weakref

import nibblock as nb
import numpy as np
import pytest
import reference_blocks as rb
import torch
import torch.nn.functional as F
from harness import TORCH, X_DTYPES, as_numpy
from masked_samples import bits, drift, held, held_inside, inside, linear_of, masked, read_mask
from nibblock.nn._masked_product import gather_columns
from nibblock.sparse._choose import read_blocks
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

# --- forward and gradients ----------------------------------------------------------------------


SIZES = [(70, 100, 16, 0.3), (96, 128, 32, 0.2), (64, 320, 32, 0.15), (33, 200, 64, 0.25)]


@pytest.mark.parametrize("dtype", X_DTYPES)
@pytest.mark.parametrize("n, k, block, density", SIZES)
@pytest.mark.parametrize("lead", [(5,), (2, 3), ()])
def test_forward_and_gradients(dtype, n, k, block, density, lead):
    linear = linear_of(n, k, TORCH[dtype])
    before = bits(linear.weight).clone()
    layer = nb.MaskedLinear.from_linear(linear, density, block)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert torch.equal(bits(layer.weight), before)
    x = torch.randn(*lead, k, dtype=TORCH[dtype], requires_grad=True)
    y = layer(x)
    assert torch.equal(bits(y), bits(F.linear(x, linear.weight, linear.bias)))
    g = torch.randn_like(y)
    y.backward(g)
    assert layer.weight.grad is None
    # float64, from the definition
    rows_g, rows_x = as_numpy(g).reshape(-1, n).astype(float), as_numpy(x).reshape(-1, k)
    whole = rb.Blocks(layer.blocks.numpy(), np.ones((len(layer.values), block, block)), n, k)
    like = whole.gather(rows_g.T @ rows_x)
    tol = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(as_numpy(layer.values.grad), like, rtol=tol, atol=tol)
    dx = (rows_g @ as_numpy(linear.weight)).reshape(x.shape)
    np.testing.assert_allclose(as_numpy(x.grad), dx, rtol=tol, atol=2 * tol)
    np.testing.assert_allclose(as_numpy(layer.bias.grad), rows_g.sum(0), rtol=tol, atol=tol)
    assert layer.values.dtype == (torch.float32 if dtype == "float16" else TORCH[dtype])


@pytest.mark.parametrize("n, k, block, density", SIZES)
def test_what_backward_keeps(n, k, block, density):
    layer = masked(n, k, density, block)
    x = torch.randn(7, k)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    used = sorted({int(c) for _, c in layer.blocks})
    columns = [c for j in used for c in range(j * block, min(k, (j + 1) * block))]
    kept = saved[0]
    if 2 * len(columns) < k:
        assert kept.shape == (7, len(columns))
        assert torch.equal(kept, x[:, columns])
    else:
        assert kept.data_ptr() == x.data_ptr()
    gone = weakref.ref(x)
    y = layer(x)
    del x, kept
    saved.clear()
    gc.collect()
    assert (gone() is None) == (2 * len(columns) < k)
    assert y.requires_grad


def test_gathered_columns():
    x = torch.randn(2, 3, 50)
    assert torch.equal(
        gather_columns(x, ((3, 4), (40, 10))), x[..., [*range(3, 7), *range(40, 50)]]
    )
    assert gather_columns(x, ()).shape == (2, 3, 0)
    layer = masked(64, 64, [])
    layer(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert layer.values.grad.shape == (0, 16, 16)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operator makes (views of others do not count)."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in before:
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("density", [0.02, 0.5])
def test_no_dense_gradient_anywhere(density):
    linear = linear_of(1536, 576)
    x = torch.randn(8, 576, requires_grad=True)
    with Largest() as largest:
        layer = nb.MaskedLinear.from_linear(linear, density)
        optimizer = torch.optim.SGD([layer.values], lr=0.1)
        for _ in range(2):
            layer(x).square().sum().backward()
            optimizer.step()
    assert 0 < largest.most <= max(layer.values.numel(), 8 * 1536)
    dense = nn.Linear(576, 1536)
    with Largest() as largest:
        dense(x).square().sum().backward()
    assert largest.most >= 576 * 1536  # the instrument sees one


def test_gradients_that_nobody_asks_for():
    layer = masked()
    layer.bias.requires_grad_(False)
    x = torch.randn(4, 100)
    layer(x).sum().backward()
    assert layer.bias.grad is None
    layer.values.requires_grad_(False)
    assert not layer(x).requires_grad
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, 100))
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_no_second_derivatives():
    layer = masked()
    x = torch.randn(4, 100, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# --- values and weight are one ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", X_DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_any_change_of_values_is_seen(dtype, wide):
    kind = TORCH[dtype]
    layer = masked(kind=kind, **({"dtype": torch.float32} if wide else {}))
    rest = torch.ones(70, 100, dtype=torch.bool)
    rest[read_mask(layer)] = False
    before = bits(layer.weight).clone()
    x = torch.randn(3, 100, dtype=kind)
    for lr in (0.5, 0.25):
        layer(x).float().sum().backward()
        torch.optim.SGD([layer.values], lr=lr).step()
        assert torch.equal(held_inside(layer), inside(layer, layer.values.to(kind)))
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    drift(layer)
    y = layer(x)
    assert torch.equal(held_inside(layer), inside(layer, layer.values.to(kind)))
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
    assert torch.equal(bits(layer.weight)[rest], before[rest])
    layer.values = nn.Parameter(torch.zeros_like(layer.values))
    layer(x)
    assert not held(layer).any()


class ByData(torch.optim.Optimizer):
    """Writes through `.data`, which bumps no version."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad.sign(), alpha=-0.1)


def replace_data(layer):
    layer.values.data = layer.values.data + 1


def replace_from_a_vector(layer):
    vector = torch.nn.utils.parameters_to_vector([layer.values]) + 1
    torch.nn.utils.vector_to_parameters(vector, [layer.values])


def change_data_in_place(layer):
    layer.values.data.add_(1)
    layer.sync(always=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: ByData([layer.values]).step(),
        replace_data,
        replace_from_a_vector,
        change_data_in_place,
    ],
    ids=["optimizer", "replaced", "vector", "in place"],
)
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("cast", [False, True])
def test_values_written_through_data(change, ours, cast):
    layer, x = masked(), torch.randn(3, 100)
    optimizer = nb.optim.MaskedAdamW([layer.values], lr=0.1)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return layer(x)

    for _ in range(3):
        run().float().square().sum().backward()
        if ours:  # who counts steps must not take the change for one of them
            optimizer.step()
        before, was = run(), layer.values.detach().clone()
        change(layer)
        assert not torch.equal(layer.values, was)
        assert not torch.equal(run(), before)
        assert torch.equal(held_inside(layer), inside(layer, layer.values))


@pytest.mark.parametrize("how", [lambda layer: layer, copy.deepcopy])
def test_new_data_never_lie_where_the_old_did(how):
    layer = how(masked())
    old = StorageWeakRef(layer.values.untyped_storage())
    layer.values.data = torch.ones_like(layer.values)
    assert not old.expired()  # an allocation that follows cannot take the same address
    layer(torch.randn(3, 100))
    assert (held_inside(layer) == 1).all()
    assert old.expired()


def test_other_optimisers_leave_other_layers_alone():
    layer, other = masked(), masked()
    other.weight.fill_(3)  # a copy of the values would show
    layer.values.grad = torch.ones_like(layer.values)
    ByData([layer.values]).step()
    assert (other.weight == 3).all()


def test_untouched_numbers_keep_their_payload():
    linear = linear_of()
    nan = torch.tensor([0x7FA12345, -0x5EDCBB], dtype=torch.int32).view(torch.float32)
    with torch.no_grad():
        linear.weight[0, :2], linear.weight[69, 98:] = nan, nan
    before = bits(linear.weight).clone()
    layer = nb.MaskedLinear.from_linear(linear, [[0, 0], [2, 3]], 16)
    assert torch.equal(bits(layer.weight), before)
    drift(layer).sync()
    outside = ~read_mask(layer)
    assert torch.equal(bits(layer.weight)[outside], before[outside])
    layer.revert()
    assert torch.equal(bits(layer.weight), before)
    layer(torch.zeros(1, 100))
    assert torch.equal(bits(layer.weight), before)


@pytest.mark.parametrize("dtype", X_DTYPES)
def test_revert_after_many_updates(dtype):
    layer = masked(kind=TORCH[dtype])
    before = bits(layer.weight).clone()
    for step in range(5):
        drift(layer, 0.1 * step).sync()
        if step % 2:
            layer.set_blocks(0.1 * step, dropped="restore" if step == 1 else "keep")
    assert not torch.equal(bits(layer.weight), before)
    assert torch.equal(bits(layer.original_weight()), before)
    layer.revert()
    assert torch.equal(bits(layer.weight), before)
    assert torch.equal(layer.values, held(layer).to(layer.values.dtype))
    bare = masked(keep_original=False)
    assert bare.original is None
    with pytest.raises(ValueError, match="revert: the original blocks must have been kept"):
        bare.revert()


def test_set_blocks():
    layer = masked(96, 96, [[0, 0], [1, 2], [5, 5]])
    values, weight = layer.values, bits(layer.weight).clone()
    drift(layer)
    trained = values.detach().clone()
    came_from = layer.set_blocks([[0, 1], [1, 2], [5, 5]])
    assert came_from.tolist() == [-1, 1, 2]
    assert layer.values is values
    assert torch.equal(values[1:], trained[1:])
    assert torch.equal(bits(values[0]), weight[:16, 16:32])
    assert torch.equal(layer.weight[:16, :16], trained[0])  # kept
    came_from = layer.set_blocks([[1, 2]], dropped="restore")
    assert came_from.tolist() == [1]
    assert torch.equal(bits(layer.weight[80:, 80:]), weight[80:, 80:])
    assert torch.equal(layer.original, read_blocks(weight.view(torch.float32), layer.blocks, 16))
    x = torch.randn(3, 96)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert values.grad.shape == (1, 16, 16)
    for wrong, text in (([[9, 0]], "must lie in"), ([[1, 0], [0, 0]], "must be sorted")):
        with pytest.raises(ValueError, match=f"MaskedLinear.set_blocks: blocks {text}"):
            layer.set_blocks(wrong)
    with pytest.raises(ValueError, match='dropped must be "keep" or "restore", got \'forget\''):
        layer.set_blocks(0.5, dropped="forget")
    assert layer.blocks.tolist() == [[1, 2]]


# --- training in all its forms ------------------------------------------------------------------


def test_accumulation_is_the_sum():
    layer, x = masked(), torch.randn(8, 100)
    layer(x).square().sum().backward()
    whole = layer.values.grad.clone()
    layer.values.grad = None
    for part in x.split(2):
        layer(part).square().sum().backward()
    torch.testing.assert_close(layer.values.grad, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("n, k, block, density", SIZES[1:3])
def test_checkpoint(reentrant, n, k, block, density):
    model = nn.Sequential(masked(n, k, density, block), nn.Tanh(), masked(k, n, density, block))
    x = torch.randn(4, k, requires_grad=True)
    inputs = [x, *[p for p in model.parameters() if p.requires_grad]]

    def grads(run):
        for p in inputs:
            p.grad = None
        run(x).square().sum().backward()
        return [p.grad for p in inputs]

    plain = grads(model)
    again = grads(lambda t: checkpoint(model, t, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast(dtype):
    layer = masked(96, 320, 0.1, 32, kind=TORCH[dtype])
    dense = nn.Linear(320, 96, dtype=TORCH[dtype])
    dense.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(4, 320, requires_grad=True)
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, like = layer(x), dense(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, like)
        copy_of = layer._cast
        layer.values.grad = x.grad = dense.weight.grad = None
        y.float().square().sum().backward()
        ours, x.grad = x.grad, None
        like.float().square().sum().backward()
        assert torch.equal(ours, x.grad)
        assert layer.values.grad.dtype == layer.values.dtype
        whole = read_blocks(dense.weight.grad, layer.blocks, 32)
        torch.testing.assert_close(layer.values.grad, whole, rtol=2e-2, atol=0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
        assert layer._cast is copy_of  # not cast again
        drift(layer, 0.25 * (step + 1))
        layer.sync()
        if dtype == "float32":
            assert layer._cast[0] is copy_of[0]  # its blocks were replaced
        dense.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    with torch.no_grad():
        layer.weight.zero_()  # a change that is none of ours
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x * 0), layer.bias.bfloat16().expand(4, 96))


@pytest.mark.parametrize("n, k, block, density", SIZES[:3])
def test_compile(n, k, block, density):
    torch._dynamo.reset()
    layer = masked(n, k, density, block)
    x = torch.randn(5, k, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = (x, layer.values, layer.bias)
    optimizer = torch.optim.SGD([layer.values], lr=0.1)
    for _ in range(3):  # the optimiser knows nothing of the weight
        ours = torch.autograd.grad(compiled(x).square().sum(), inputs)
        theirs = torch.autograd.grad(layer(x).square().sum(), inputs)
        torch.testing.assert_close(ours, theirs)
        layer.values.grad = theirs[1]
        optimizer.step()
    drift(layer).sync()
    assert torch.equal(compiled(x), layer(x))
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    program = torch.export.export(layer.eval(), (torch.randn(3, k),))
    y = torch.randn(3, k)
    assert torch.equal(program.module()(y), layer(y))


def test_compiled_steps_of_other_optimisers():
    torch._dynamo.reset()
    layer = masked()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD([layer.values], lr=0.1)
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    for _ in range(2):
        compiled(torch.ones(2, 100)).sum().backward()
        step()
        assert torch.equal(inside(layer, layer.values), held_inside(layer))


def test_a_layer_without_blocks_steps_along():
    layer = nb.MaskedLinear.from_linear(nn.Linear(64, 64), torch.zeros(0, 2, dtype=torch.int32))
    other = nb.MaskedLinear.from_linear(nn.Linear(64, 64), [[0, 0]])
    optimizer = nb.optim.MaskedAdamW([layer.values, other.values], lr=0.1)
    for _ in range(3):
        other(layer(torch.ones(2, 64))).sum().backward()
        optimizer.step()
    assert other.values.abs().max() > 0.2


@pytest.mark.parametrize(
    "blocks, error, text",
    [
        ([[0.5, 0.7]], TypeError, "blocks must be"),
        ([[0, 0], [1]], ValueError, r"blocks must be a list of pairs .*, got \[\[0, 0\], \[1\]\]"),
        ([["a", "b"]], ValueError, "blocks must be a list of pairs"),
    ],
)
def test_lists_that_are_no_blocks_are_refused(blocks, error, text):
    """A float would be cut off to the block beside it."""
    with pytest.raises(error, match=text):
        nb.MaskedLinear.from_linear(nn.Linear(64, 64), blocks)
