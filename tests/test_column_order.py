"""`Int4Linear.column_order`: codes whose columns lie in another order than the inputs."""

from __future__ import annotations

import copy
import io
import pickle

import nibblock as nb
import numpy as np
import pytest
import torch
from torch import nn

N, K, GROUP = 48, 130, 32  # the last group has two columns
ONCE = f"must hold each of 0 to {K - 1} once, got"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(seed=0, n=N, k=K, bits=4, affine=True, bias=True, order=None, **options):
    """(layer, float64 weight [N, K] in the order of its inputs, computed in NumPy, g_idx)."""
    rng = np.random.default_rng(seed)
    g_idx = rng.permutation(np.arange(k) // GROUP)
    codes = rng.integers(0, 1 << bits, (n, k))  # of the weight's columns
    scales = rng.uniform(0.4, 1, (n, -(-k // GROUP))).astype(np.float16) / np.float16(16)
    offsets = (-8 * scales * rng.uniform(0.5, 1.5, scales.shape)).astype(np.float16)
    weight = scales.astype(np.float64)[:, g_idx] * (codes if affine else codes - (1 << (bits - 1)))
    if affine:
        weight += offsets.astype(np.float64)[:, g_idx]
    columns = np.argsort(g_idx, kind="stable") if order is None else order
    packed = codes[:, columns].astype(np.uint8)
    if bits == 4:
        packed = np.pad(packed, ((0, 0), (0, k % 2)))
        packed = packed[:, ::2] | packed[:, 1::2] << 4
    layer = nb.Int4Linear.from_codes(
        torch.from_numpy(packed),
        torch.from_numpy(scales),
        torch.from_numpy(offsets) if affine else None,
        torch.from_numpy(rng.normal(0, 1, n)).float() if bias else None,
        in_features=k,
        group_size=GROUP,
        bits=bits,
        column_order=torch.from_numpy(columns),
        **options,
    )
    return layer, torch.from_numpy(weight), g_idx


def x_of(*shape, dtype=torch.float32, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 1, shape)).to(dtype)


def wrong(got, expected):
    """Relative error; without numbers, of a gradient that must be empty too, 0."""
    assert got.shape == expected.shape
    norm = expected.double().norm()
    return float((got.detach().double() - expected).norm() / norm) if norm else 0.0


def gathered(layer):
    """The same codes as a plain layer, to be given x[..., column_order]."""
    plain = copy.deepcopy(layer)
    plain.column_order = None
    return plain


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("affine", [True, False])
def test_weight_is_the_drawn_one_bit_for_bit(bits, affine):
    layer, weight, g_idx = draw(bits=bits, affine=affine)
    assert (np.diff(g_idx) < 0).any()
    # A product and a sum of float16 scales in float32: the former is exact, the latter rounds once.
    assert torch.equal(layer.dequantize(), weight.float())
    assert torch.equal(layer.weight, layer.dequantize())
    for dtype in DTYPES:
        assert torch.equal(layer.dequantize(dtype), layer.dequantize().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute", ["bf16", "int8"])
@pytest.mark.parametrize("shape", [(0, K), (1, K), (3, K), (17, K), (2, 3, K), (K,)])
def test_forward_and_gradients(dtype, compute, shape):
    layer, weight, _ = draw(compute=compute)
    plain, order = gathered(layer), layer.column_order
    x = x_of(*shape, dtype=dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    grad = x_of(*y.shape, dtype=dtype, seed=2)
    tolerance = 2e-2 if compute == "int8" else 6e-3
    assert wrong(y, x.detach().double() @ weight.T + layer.bias.detach().double()) < tolerance
    dx, dbias = torch.autograd.grad(y, (x, layer.bias), grad)
    assert wrong(dx, grad.double() @ weight) < tolerance
    assert wrong(dbias, grad.double().reshape(-1, N).sum(0)) < tolerance
    # The product is that of the gathered columns to the last bit, with and without a gradient.
    ordered = x.detach()[..., order].requires_grad_()
    expected = plain(ordered)
    assert torch.equal(y, expected)
    assert torch.equal(dx[..., order], torch.autograd.grad(expected, ordered, grad)[0])
    with torch.no_grad():
        assert torch.equal(layer(x), plain(ordered))
    with torch.inference_mode():
        assert torch.equal(layer(x), plain(ordered))


def test_strides_and_autocast():
    layer, weight, _ = draw()
    for x in (x_of(K, 5).t(), x_of(5, 2 * K)[:, ::2], x_of(1, K).expand(5, K)):
        assert wrong(layer(x), x.double() @ weight.T + layer.bias.detach().double()) < 6e-3
    with torch.autocast("cpu", torch.bfloat16):
        x = x_of(5, K).requires_grad_()
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert wrong(torch.autograd.grad(y.sum(), x)[0], weight.sum(0).expand(5, K)) < 2e-2


def test_second_derivatives():
    layer, weight, _ = draw(bias=False)
    x, v = x_of(3, K).requires_grad_(), x_of(3, N, seed=3).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x), x, v, create_graph=True)
    u = x_of(3, K, seed=4)
    assert wrong(torch.autograd.grad(dx, v, u)[0], u.double() @ weight.T) < 6e-3


def test_identity_is_an_order_too():
    layer, weight, _ = draw()
    one, _, _ = draw(order=np.arange(K))
    plain = gathered(one)
    x = x_of(3, K)
    assert torch.equal(one(x), plain(x))
    assert torch.equal(one.dequantize(), plain.dequantize())
    assert not torch.equal(one.dequantize(), layer.dequantize())


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order, error, text",
    [
        (list(range(K)), TypeError, "must be a Tensor, got list"),
        (torch.arange(K).float(), TypeError, "must be int64 or int32, got float32"),
        (torch.arange(K - 1), ValueError, rf"must be \[{K}\], got \[{K - 1}\]"),
        (torch.arange(K)[None], ValueError, rf"must be \[{K}\], got \[1, {K}\]"),
        (torch.arange(K) - 1, ValueError, f"{ONCE} -1 in place of 0"),
        (torch.arange(1, K + 1), ValueError, f"{ONCE} 1 in place of 0"),
        (torch.arange(K).clamp(max=K - 2), ValueError, f"{ONCE} {K - 2} twice"),
        (torch.tensor([*range(K - 1), K]), ValueError, f"{ONCE} {K} in place of {K - 1}"),
    ],
)
def test_orders_that_are_none(order, error, text):
    layer, _, _ = draw()
    parts = layer.canonical()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(error, match=f"^Int4Linear: column_order {text}") as caught:
        nb.Int4Linear.from_packed(
            layer.packed, in_features=K, out_features=N, group_size=GROUP, affine=True,
            scale_dtype=layer.scale_dtype, column_order=order,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    if isinstance(order, torch.Tensor):
        for assign in (False, True):
            state = {**parts, "qweight": ~parts["qweight"], "column_order": order}
            with pytest.raises(RuntimeError, match=f"column_order {text}"):
                layer.load_state_dict(state, strict=False, assign=assign)
            assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_inputs_are_refused_as_ever():
    layer, _, _ = draw()
    for x, error, text in (
        (torch.ones(3, K).long(), TypeError, "x must be float32, bfloat16 or float16, got int64"),
        (torch.ones(3, K - 1), ValueError, f"x last dim must equal in_features {K}, got"),
        (torch.tensor(1.0), ValueError, "x must have at least 1 dimension, got a scalar"),
        (np.ones((3, K)), TypeError, "x must be a Tensor, got ndarray"),
        (torch.ones(3, K, device="meta"), ValueError, "packed must be on meta, where x is"),
    ):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(error, match=f"^int4_linear: {text}"):
                layer(x)


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_state_dict(assign, device):
    layer, weight, _ = draw()
    state = layer.state_dict()
    assert list(state) == ["qweight", "scales", "offsets", "column_order", "bias"]
    fresh = nb.Int4Linear(K, N, group_size=GROUP, device=device)
    assert "column_order" not in fresh.state_dict()
    fresh.load_state_dict(state, assign=assign)
    if device == "meta" and not assign:
        assert fresh.column_order.is_meta
        return
    assert torch.equal(fresh.dequantize(), weight.float())
    assert torch.equal(fresh(x_of(3, K)), layer(x_of(3, K)))
    other, wanted, _ = draw(seed=5)
    held, kept = fresh.column_order, layer.column_order.clone()
    fresh.load_state_dict(other.state_dict(), assign=assign)
    assert (fresh.column_order is held) != assign
    assert torch.equal(fresh.dequantize(), wanted.float())
    assert torch.equal(layer.column_order, kept)
    # Codes without an order, and dense weights, have their columns in order.
    for state in (gathered(layer).state_dict(), nn.Linear(K, N).state_dict()):
        fresh.load_state_dict(layer.state_dict(), assign=assign)
        expected = nb.Int4Linear(K, N, group_size=GROUP, scale_dtype=torch.float16)
        expected.load_state_dict(state)
        fresh.load_state_dict(state, assign=assign)
        assert fresh.column_order is None
        assert torch.equal(fresh.dequantize(), expected.dequantize())


def test_an_order_alone_is_refused():
    layer, _, _ = draw()
    before = layer.column_order.clone()
    for more in ({}, {"weight": torch.ones(N, K)}, {"scales": layer.state_dict()["scales"]}):
        state = {"column_order": torch.arange(K), **more}
        with pytest.raises(RuntimeError, match="column_order must come with qweight, whose col"):
            layer.load_state_dict(state, strict=False)
        assert torch.equal(layer.column_order, before)
    layer.load_state_dict({"bias": torch.ones(N)}, strict=False)
    assert torch.equal(layer.column_order, before)
    with pytest.raises(RuntimeError, match="size mismatch for qweight"):
        layer.load_state_dict({**draw(5)[0].state_dict(), "qweight": torch.ones(3, 3).byte()})
    assert torch.equal(layer.column_order, before)
    embedding = nb.Int4Embedding(N, K, group_size=GROUP, bits=4, symmetric=False)
    with pytest.raises(RuntimeError, match="Unexpected key.*column_order"):
        embedding.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "bias"})


def test_the_order_is_a_copy():
    order = torch.from_numpy(np.random.default_rng(0).permutation(K))
    layers = [draw(order=order.numpy())[0] for _ in range(2)]
    layers[0].load_state_dict(draw(seed=9)[0].state_dict())
    assert torch.equal(layers[1].column_order, order)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "meta", "half", "double"])
def test_copies_and_moves(how):
    layer, weight, _ = draw()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    elif how == "meta":
        other = copy.deepcopy(layer).to("meta")
        assert other.column_order.is_meta
        shapes = {k: v.shape for k, v in layer.state_dict().items()}
        assert {k: v.shape for k, v in other.state_dict().items()} == shapes
        assert other(torch.ones(3, K, device="meta")).shape == (3, N)
        other.to_empty(device="cpu").load_state_dict(layer.state_dict())
    else:
        other = copy.deepcopy(layer).to(torch.bfloat16 if how == "half" else torch.float64)
        assert other.column_order.dtype == torch.int64
        other.to(torch.float32)
    assert other.column_order is not layer.column_order
    assert torch.equal(other.dequantize(), weight.float())
    if how != "half":  # (whose bias was rounded)
        assert torch.equal(other(x_of(3, K)), layer(x_of(3, K)))


def test_pickles_of_before_there_were_orders():
    layer = gathered(draw()[0])
    del layer._buffers["column_order"]
    old = pickle.loads(pickle.dumps(layer))
    assert torch.equal(old(x_of(3, K)), layer(x_of(3, K)))
    assert "column_order" not in old.state_dict()
    assert old.dequantize().shape == (N, K)
    assert "column_order" not in repr(old)


def test_repr():
    layer, _, _ = draw()
    assert "column_order=True" in repr(layer)
    assert "column_order" not in repr(gathered(layer))


# --- compiled, exported, called with other tensors ------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend):
    torch._dynamo.reset()
    layer, _, _ = draw()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for rows in (7, 2):
        x = x_of(rows, K).requires_grad_()
        y, expected = compiled(x), layer(x)
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
        ours, theirs = (torch.autograd.grad(out.sum(), x)[0] for out in (y, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-3, atol=1e-3)


def test_export():
    layer, _, _ = draw()
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(layer.eval(), (x_of(3, K),), dynamic_shapes=({0: rows},))
    assert torch.equal(program.module()(x_of(5, K)), layer(x_of(5, K)))


def test_functional_call():
    (one, _, _), (two, _, _) = draw(), draw(seed=5)
    state = {**dict(two.named_parameters()), **dict(two.named_buffers())}
    y = torch.func.functional_call(one, state, (x_of(3, K),))
    assert torch.equal(y, two(x_of(3, K)))
