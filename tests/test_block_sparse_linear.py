"""The block-sparse ops through torch: values, gradients, errors, compile, autocast, the module."""

from __future__ import annotations

import nibblock as nb
import numpy as np
import pytest
import reference_blocks as rb
import torch
import torch.nn.functional as F
from harness import TORCH, X_DTYPES, as_numpy, level_params, native, operand_of, random_x
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

LEVEL = pytest.mark.parametrize("level", level_params())
# out_features, in_features, block: whole blocks, ragged edges on either side, less than one block.
SHAPES = [(64, 96, 32), (70, 100, 16), (1, 3, 32), (118, 17, 16), (130, 200, 64), (129, 257, 128)]


def problem(n, k, block, density=0.4, seed=0, values=torch.float32):
    """(oracle with exactly representable values, values tensor, layout)."""
    blocks = rb.random_blocks(np.random.default_rng(seed + n + k), n, k, block, density)
    tensor = torch.from_numpy(blocks.values).to(values)
    blocks.values = tensor.float().numpy()
    layout = nb.ops.block_layout(torch.from_numpy(blocks.index).reshape(-1, 2), n, k, block)
    return blocks, tensor, layout


def rows_of(t):
    return as_numpy(t).reshape(-1, t.shape[-1])


def operand(level, x_dtype):
    return operand_of(x_dtype) if level == "amx" else "float32"


# --- layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k, block", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_layout_is_the_drawn_one(n, k, block, density):
    blocks, _, layout = problem(n, k, block, density)
    assert layout.dtype == torch.int32
    assert layout.tolist() == rb.layout(blocks).tolist()


@pytest.mark.parametrize(
    "blocks, error, text",
    [
        ([[0, 0], [0, 0]], ValueError, r"blocks must be distinct, got \[0, 0\] twice"),
        ([[1, 0], [0, 1]], ValueError, r"sorted .* got \[0, 1\] after \[1, 0\]; use .*sort_blocks"),
        ([[0, 1], [0, 0]], ValueError, r"sorted by row block, then column block, got \[0, 0\]"),
        (
            [[0, 3]],
            ValueError,
            r"must lie in the 2 x 3 blocks of a \[64, 96\] weight .* got \[0, 3\]",
        ),
        ([[-1, 0]], ValueError, r"got \[-1, 0\]"),
        ([[2, 0]], ValueError, r"got \[2, 0\]"),
        ([0, 1], ValueError, r"blocks must be \[Z, 2\] \(row block, column block\), got \[2\]"),
        ([[0.0, 1.0]], TypeError, "blocks must be int64 or int32, got float32"),
    ],
)
def test_layout_refuses(blocks, error, text):
    with pytest.raises(error, match=text):
        nb.ops.block_layout(torch.tensor(blocks), 64, 96, 32)
    with pytest.raises(error, match=text):
        nb.AdapterLinear(nn.Linear(96, 64), blocks=torch.tensor(blocks))


def test_layout_refuses_other_arguments():
    with pytest.raises(ValueError, match="block must be 16, 32, 64 or 128, got 24"):
        nb.ops.block_layout(torch.tensor([[0, 0]]), 64, 96, 24)
    with pytest.raises(TypeError, match="blocks must be a Tensor, got list"):
        nb.ops.block_layout([[0, 0]], 64, 96, 32)
    with pytest.raises(ValueError, match="out_features must be at least 0, got -1"):
        nb.ops.block_layout(torch.tensor([[0, 0]]), -1, 96, 32)


def test_sort_blocks():
    blocks = torch.tensor([[1, 0], [0, 2], [0, 1], [1, 2]], dtype=torch.int32)
    ordered, order = nb.ops.sort_blocks(blocks)
    assert ordered.tolist() == [[0, 1], [0, 2], [1, 0], [1, 2]]
    assert torch.equal(blocks[order], ordered)
    assert ordered.dtype == torch.int32
    nb.ops.block_layout(ordered, 64, 96, 32)


# --- values -------------------------------------------------------------------------------------


@LEVEL
@pytest.mark.parametrize("x_dtype", X_DTYPES)
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16])
def test_products(level, x_dtype, values):
    native.set_cpu_isa(level)
    rng = np.random.default_rng(1)
    for n, k, block in SHAPES:
        blocks, tensor, layout = problem(n, k, block, values=values)
        bias = random_x(rng, (n,), "float32")
        for lead in ((), (1,), (3,), (2, 9), (0,), (40,)):
            what = f"{level} {x_dtype} {n}x{k} block {block} {lead}"
            x = random_x(rng, (*lead, k), x_dtype)
            y0 = random_x(rng, (*lead, n), x_dtype)
            y = nb.ops.block_sparse_linear(x, tensor, layout, bias, y0, out_features=n, block=block)
            assert y.dtype == x.dtype
            assert y.shape == (*lead, n)
            extra = (as_numpy(bias)[None], rows_of(y0))
            more = {"dtype": x_dtype, "operand": operand(level, x_dtype), "what": what}
            rb.check_product(rows_of(y), rows_of(x), blocks.dense(), extra, **more)
            dx = nb.ops.block_sparse_linear_dx(y0, tensor, layout, in_features=k, block=block)
            assert dx.shape == x.shape
            rb.check_product(rows_of(dx), rows_of(y0), blocks.dense().T, **more)
            ds = nb.ops.block_weight_grad(y0, x, layout, block=block)
            assert ds.shape == tensor.shape
            assert ds.dtype == torch.float32
            check_weight_grad(blocks, ds, y0, x, what, operand(level, x_dtype))


def check_weight_grad(blocks, ds, g, x, what="", operand="float32", dtype="float32", factor=1.0):
    g, x = rows_of(g).astype(np.float64), rows_of(x).astype(np.float64)
    dense, size = blocks.gather(g.T @ x), blocks.gather(np.abs(g).T @ np.abs(x))
    step = (len(x) + 8) * rb.EPS32 + (0 if operand == "float32" else 2 * rb.HALF_ULP[operand])
    bound = factor * step * size + rb.HALF_ULP[dtype] * np.abs(dense) * 1.01 + 1e-37
    assert (np.abs(as_numpy(ds) - dense) <= bound).all(), what


def test_weight_grad_in_bfloat16():
    rng = np.random.default_rng(2)
    blocks, _, layout = problem(70, 100, 16)
    g, x = random_x(rng, (9, 70), "float32"), random_x(rng, (9, 100), "float32")
    ds = nb.ops.block_weight_grad(g, x, layout, block=16, dtype=torch.bfloat16)
    assert ds.dtype == torch.bfloat16
    check_weight_grad(blocks, ds, g, x, dtype="bfloat16")


@LEVEL
def test_zero_product_keeps_the_bits_of_y0(level):
    native.set_cpu_isa(level)
    for x_dtype in X_DTYPES:
        _, tensor, layout = problem(70, 100, 16)
        for m in (1, 5, 40):
            x = random_x(np.random.default_rng(3), (m, 100), x_dtype)
            y0 = random_x(np.random.default_rng(4), (m, 70), x_dtype)
            y0[0, :9] = -0.0
            call = {"out_features": 70, "block": 16}
            y = nb.ops.block_sparse_linear(x, tensor * 0, layout, None, y0, **call)
            assert torch.equal(bits(y), bits(y0)), (x_dtype, m)


def bits(t):
    return t.detach().contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def test_empty_block_list_and_strides():
    layout = nb.ops.block_layout(torch.empty(0, 2, dtype=torch.int32), 40, 50, 32)
    none = torch.empty(0, 32, 32)
    bias = torch.randn(40)
    y = nb.ops.block_sparse_linear(
        torch.randn(3, 50), none, layout, bias, out_features=40, block=32
    )
    assert torch.equal(y, bias.expand(3, 40))
    assert not nb.ops.block_sparse_linear_dx(y, none, layout, in_features=50, block=32).any()
    assert nb.ops.block_weight_grad(y, torch.randn(3, 50), layout, block=32).shape == (0, 32, 32)
    blocks, tensor, layout = problem(70, 100, 16)
    x, g = torch.randn(100, 6).t(), torch.randn(6, 1, 140)[:, :, ::2]
    call = {"out_features": 70, "block": 16}
    y = nb.ops.block_sparse_linear(x, tensor, layout, **call)
    same = nb.ops.block_sparse_linear(x.contiguous(), tensor.clone(), layout, **call)
    assert torch.equal(y, same)
    d = nb.ops.block_weight_grad(g, x.reshape(6, 1, 100), layout, block=16)
    assert torch.equal(d, nb.ops.block_weight_grad(g.contiguous(), x[:, None], layout, block=16))


@pytest.mark.parametrize("m", [1, 7, 300])
def test_same_bits_at_any_number_of_threads(m):
    blocks, tensor, layout = problem(200, 300, 32)
    x, g = torch.randn(m, 300), torch.randn(m, 200)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(
            (
                nb.ops.block_sparse_linear(x, tensor, layout, out_features=200, block=32),
                nb.ops.block_sparse_linear_dx(g, tensor, layout, in_features=300, block=32),
                nb.ops.block_weight_grad(g, x, layout, block=32),
            )
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_nan_and_inf_spread_only_through_stored_blocks():
    layout = nb.ops.block_layout(torch.tensor([[0, 1], [1, 0]]), 40, 40, 32)
    values = torch.randn(2, 32, 32)
    x = torch.randn(3, 40)
    x[0, 2], x[1, 35] = float("nan"), float("inf")
    y = nb.ops.block_sparse_linear(x, values, layout, out_features=40, block=32)
    bad = ~torch.isfinite(y)
    assert bad[0, 32:].all()
    assert bad[1, :32].all()
    assert bad.sum() == 8 + 32


# --- errors -------------------------------------------------------------------------------------


def test_errors_in_all_three_places():
    _, values, layout = problem(70, 100, 16)
    z = len(values)
    x, good = torch.randn(3, 100), dict(bias=None, y0=None)
    cases = [
        (dict(x=x.double()), TypeError, "x must be float32, bfloat16 or float16, got float64"),
        (dict(x=torch.tensor(1.0)), ValueError, "x must have at least 1 dimension, got a scalar"),
        (dict(values=values.half()), TypeError, "values must be float32 or bfloat16, got float16"),
        (dict(layout=layout.long()), TypeError, "layout must be int32, got int64"),
        (dict(layout=layout[:-3]), ValueError, "(layout|values) must"),
        (dict(x=torch.randn(3, 117)), ValueError, "(layout|values) must"),
        (dict(values=values[:-1]), ValueError, "(layout|values) must"),
        (dict(bias=torch.randn(69)), ValueError, r"bias must be \[70\], got \[69\]"),
        (dict(bias=torch.randn(70).int()), TypeError, "bias must be float32, bfloat16 or float16"),
        (dict(y0=torch.randn(3, 69)), ValueError, r"y0 must be \[3, 70\], got \[3, 69\]"),
        (dict(y0=torch.randn(3, 70).half()), TypeError, "y0 must be float32 as x"),
        (dict(block=24), ValueError, "block must be 16, 32, 64 or 128, got 24"),
        (dict(out_features=-1), ValueError, "out_features must be at least 0, got -1"),
    ]
    assert z > 2
    op = torch.ops.nibblock.block_sparse_linear
    for change, error, text in cases:
        given = {**dict(x=x, values=values, layout=layout, out_features=70, block=16), **good}
        given.update(change)
        text = f"block_sparse_linear: {text}"
        with pytest.raises(error, match=text):
            nb.ops.block_sparse_linear(**given)
        with pytest.raises(RuntimeError, match=text):
            op(**given)
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        with pytest.raises(error, match=text):
            op(**meta)
    # What torch itself refuses, in several lines.
    for name, wrong in (("out_features", 70.0), ("block", 16.0), ("block", "16")):
        kind = type(wrong).__name__
        with pytest.raises(
            TypeError, match=f"^block_sparse_linear: {name} must be int, got {kind}$"
        ):
            nb.ops.block_sparse_linear(**{**given, "out_features": 70, name: wrong})
    with pytest.raises(TypeError, match="block_layout: in_features must be int, got float"):
        nb.ops.block_layout(torch.tensor([[0, 0]]), 64, 64.0, 32)


def test_errors_of_the_gradients():
    _, values, layout = problem(70, 100, 16)
    g, x = torch.randn(3, 70), torch.randn(3, 100)
    with pytest.raises(TypeError, match="block_weight_grad: dtype must be float32 or bfloat16"):
        nb.ops.block_weight_grad(g, x, layout, block=16, dtype=torch.float16)
    with pytest.raises(TypeError, match="block_weight_grad: grad must be float32 as x"):
        nb.ops.block_weight_grad(g.half(), x, layout, block=16)
    with pytest.raises(ValueError, match=r"grad must have the leading dimensions of x"):
        nb.ops.block_weight_grad(g[:2], x, layout, block=16)
    with pytest.raises(ValueError, match="block_sparse_linear_dx: (layout|values) must"):
        nb.ops.block_sparse_linear_dx(g, values, layout, in_features=200, block=16)


def test_corrupt_layout_is_refused_not_followed():
    _, values, layout = problem(70, 100, 16)
    for at in (3, 6, len(layout) - 1):
        bad = layout.clone()
        bad[at] = 10**6
        with pytest.raises(RuntimeError, match="layout must hold indices inside"):
            nb.ops.block_sparse_linear(torch.randn(2, 100), values, bad, out_features=70, block=16)


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_autograd_equals_the_dense_gathered_blocks(x_dtype):
    rng = np.random.default_rng(5)
    blocks, tensor, layout = problem(70, 100, 16)
    x = random_x(rng, (2, 6, 100), x_dtype).requires_grad_()
    y0 = random_x(rng, (2, 6, 70), x_dtype).requires_grad_()
    bias = random_x(rng, (70,), "float32").requires_grad_()
    values = tensor.clone().requires_grad_()
    y = nb.ops.block_sparse_linear(x, values, layout, bias, y0, out_features=70, block=16)
    g = random_x(rng, (2, 6, 70), x_dtype)
    y.backward(g)
    more = {"dtype": x_dtype, "operand": operand_of(x_dtype)}
    rb.check_product(rows_of(x.grad), rows_of(g), blocks.dense().T, **more)
    assert values.grad.dtype == torch.float32
    check_weight_grad(blocks, values.grad, g, x, operand=operand_of(x_dtype))
    torch.testing.assert_close(bias.grad, g.float().sum((0, 1)))
    assert torch.equal(y0.grad, g)


def test_only_needed_gradients_are_kept():
    _, tensor, layout = problem(70, 100, 16)
    x = torch.randn(4, 100)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call = {"out_features": 70, "block": 16}
        nb.ops.block_sparse_linear(x.requires_grad_(), tensor, layout, **call)
    assert not any(t is x or t.data_ptr() == x.data_ptr() for t in kept)


def test_derivatives_agree_with_a_float64_twin():
    """Every op of the family, first and second order, beside the dense formula in float64."""
    native.set_cpu_isa("scalar")
    blocks, tensor, layout = problem(20, 24, 16, density=0.7)
    mask = torch.from_numpy(rb.Blocks(blocks.index, np.ones_like(blocks.values), 20, 24).dense())
    torch.manual_seed(0)
    x, v = torch.randn(3, 24), tensor.clone()

    def ours(x, v):
        y = nb.ops.block_sparse_linear(x, v, layout, out_features=20, block=16)
        return (y.pow(3)).sum()

    def dense(x, v):
        rows, columns = blocks.grid
        wide = torch.zeros(rows, columns, 16, 16, dtype=v.dtype)
        wide[blocks.index[:, 0], blocks.index[:, 1]] = v
        s = wide.transpose(1, 2).reshape(rows * 16, columns * 16)[:20, :24] * mask
        return (x @ s.t()).pow(3).sum()

    def orders(f, x, v):
        x, v = x.clone().requires_grad_(), v.clone().requires_grad_()
        first = torch.autograd.grad(f(x, v), (x, v), create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), (x, v))
        return (*first, *second)

    for mine, theirs in zip(orders(ours, x, v), orders(dense, x.double(), v.double())):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-3)


# --- torch's machinery --------------------------------------------------------------------------


def op_calls():
    _, values, layout = problem(40, 50, 16)
    q = nb.Int4Linear.from_linear(nn.Linear(50, 40), group_size=32)
    a, c = torch.randn(2, 50), torch.randn(40, 2)

    def leaf(t):
        return t.clone().requires_grad_()

    for x_dtype in TORCH.values():
        x, g = torch.randn(2, 3, 50).to(x_dtype), torch.randn(2, 3, 40).to(x_dtype)
        y0, bias = torch.randn(2, 3, 40).to(x_dtype), torch.randn(40)
        yield "_block_sparse_linear_forward", (x, values, layout, bias, y0, 40, 16)
        yield "block_sparse_linear", (leaf(x), leaf(values), layout, leaf(bias), leaf(y0), 40, 16)
        yield "block_sparse_linear", (leaf(x[:0]), values.bfloat16(), layout, None, None, 40, 16)
        yield "block_sparse_linear_dx", (leaf(g), leaf(values), layout, 50, 16)
        yield "block_weight_grad", (leaf(g), leaf(x), layout, 16, torch.float32)
        base = (q.packed, bias, *q._args)
        tail = (leaf(values), layout, 16, leaf(a), leaf(c))
        yield "int4_block_sparse_linear", (leaf(x), *base, *tail)
        yield "int4_block_sparse_linear", (leaf(x), *base, leaf(values), layout, 16, None, None)
        yield "_int4_block_sparse_linear_forward", (x, *base, values, layout, 16, a, c)
        form = (q.packed, 50, *q._args[1:])
        yield "int4_block_sparse_linear_dx", (leaf(g), *form, *tail)


@pytest.mark.parametrize("op, arguments", [pytest.param(o, a, id=o) for o, a in op_calls()])
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(torch.ops.nibblock, op).default, arguments)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nb.BlockSparseLinear.from_linear(nn.Linear(50, 70), density=0.5, block=16)
        self.b = nb.BlockSparseLinear.from_linear(nn.Linear(70, 20), density=0.5, block=16)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x * 2))).sin()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend):
    torch._dynamo.reset()
    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend=backend, dynamic=True)
    for m in (7, 2):
        x = torch.randn(m, 50, requires_grad=True)
        inputs = (x, *net.parameters())
        ours = torch.autograd.grad(compiled(x).square().sum(), inputs)
        theirs = torch.autograd.grad(net(x).square().sum(), inputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))


def test_export_with_any_number_of_rows():
    net, rows = Net().eval(), torch.export.Dim("rows")
    program = torch.export.export(net, (torch.randn(3, 50),), dynamic_shapes=({0: rows},))
    for m in (1, 9):
        x = torch.randn(m, 50)
        torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
def test_autocast_behaves_as_for_a_dense_linear(target):
    layer = Net().a
    x = torch.randn(4, 50, requires_grad=True)
    with torch.autocast("cpu", dtype=target):
        y, like = layer(x), F.linear(x, layer.weight, layer.bias)
    assert y.dtype == like.dtype == target
    torch.testing.assert_close(y.float(), like.float(), rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.values.grad.dtype == torch.float32


def test_flops_are_those_of_the_stored_blocks():
    _, values, layout = problem(70, 100, 16)
    with FlopCounterMode(display=False) as counter:
        x, v = torch.randn(6, 100, requires_grad=True), values.clone().requires_grad_()
        nb.ops.block_sparse_linear(x, v, layout, out_features=70, block=16).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * values.numel()


def test_vmap_is_refused():
    _, values, layout = problem(70, 100, 16)
    with pytest.raises(RuntimeError, match="block_sparse_linear: x must not be batched by vmap"):
        torch.func.vmap(
            lambda x: nb.ops.block_sparse_linear(x, values, layout, out_features=70, block=16)
        )(torch.randn(3, 100))
