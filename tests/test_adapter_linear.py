"""`BlockSparseLinear` and `AdapterLinear` as modules."""

from __future__ import annotations

import copy
import pickle

import nibblock as nb
import numpy as np
import pytest
import reference_blocks as rb
import torch
import torch.nn.functional as F
from harness import TORCH, X_DTYPES, as_numpy, level_params, native, random_x
from nibblock.sparse import even_blocks, magnitude_blocks
from torch import nn

LEVEL = pytest.mark.parametrize("level", level_params())
BASES = ("float32", "bfloat16", "float16", "int4", "int4 int8")


def base_of(kind, n=70, k=100, bias=True, seed=0):
    torch.manual_seed(seed)
    dtype = TORCH.get(kind, torch.float32)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    if not kind.startswith("int4"):
        return linear
    compute = "int8" if kind.endswith("int8") else "bf16"
    return nb.Int4Linear.from_linear(linear, group_size=32, compute=compute)


def x_of(kind, *shape, seed=1):
    dtype = kind if kind in X_DTYPES else "float32"
    return random_x(np.random.default_rng(seed), shape, dtype)


def bits(t):
    return t.detach().contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def fill(layer, seed=2):
    """Random values in every Parameter of the active adapter."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.adapter().parameters():
            p.copy_(torch.randn(p.shape, generator=gen) * 0.1)
    return layer


# --- choosing blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, 1e-9, 0.02, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("n, k", [(320, 480), (32, 3200), (3200, 32), (70, 100), (1, 1)])
def test_even_blocks_are_even(n, k, density):
    rows, columns = -(-n // 32), -(-k // 32)
    blocks = even_blocks(n, k, 32, density)
    assert torch.equal(blocks, even_blocks(n, k, 32, density))
    wanted = round(density * rows * columns)
    assert len(blocks) == (max(1, wanted) if density else 0)
    nb.ops.block_layout(blocks, n, k, 32)  # sorted, distinct, in range
    per_row = torch.bincount(blocks[:, 0].long(), minlength=rows)
    per_column = torch.bincount(blocks[:, 1].long(), minlength=columns)
    assert per_row.max() - per_row.min() <= 1
    if len(blocks):
        assert per_column.max() <= 2 * len(blocks) / columns + 2


def test_magnitude_blocks():
    weight = torch.zeros(70, 100)
    weight[33, 5], weight[69, 99], weight[0, 40] = 3.0, -2.0, 1.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert magnitude_blocks(weight.to(dtype), 32, 3 / 12).tolist() == [[0, 1], [1, 0], [2, 3]]
    assert magnitude_blocks(weight, 32, 2 / 12).tolist() == [[1, 0], [2, 3]]
    assert magnitude_blocks(weight * 0, 32, 0.25).tolist() == [[0, 0], [0, 1], [0, 2]]
    weight[40, 70] = float("nan")
    with pytest.raises(ValueError, match=r"must be finite, got NaN or Inf in block \[1, 2\]"):
        magnitude_blocks(weight, 32, 0.25)


# --- BlockSparseLinear --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pruned_layer(dtype):
    linear = nn.Linear(100, 70, dtype=dtype)
    layer = nb.BlockSparseLinear.from_linear(linear, density=0.5)
    assert isinstance(layer, nn.Linear)
    assert layer.bias is linear.bias
    assert layer.density == 0.5
    assert layer.values.shape == (6, 32, 32)
    kept = rb.Blocks(layer.blocks.numpy(), np.ones((6, 32, 32)), 70, 100).dense()
    assert torch.equal(layer.weight.float(), linear.weight.float() * torch.from_numpy(kept).float())
    x = torch.randn(2, 3, 100, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    like = F.linear(x.float(), layer.weight.float(), layer.bias.float())
    torch.testing.assert_close(y.float(), like, rtol=1e-2, atol=1e-2)
    full = nb.BlockSparseLinear.from_linear(linear, density=1.0)
    assert torch.equal(full.weight.float(), linear.weight.float())


def test_pruned_by_a_mask():
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2] = mask[2, 3] = True
    layer = nb.BlockSparseLinear.from_linear(nn.Linear(100, 70), mask=mask)
    assert layer.blocks.tolist() == [[1, 2], [2, 3]]
    assert not layer.values[1, 6:].any()  # 70 = 2 x 32 + 6
    assert not layer.values[1, :, 4:].any()
    with pytest.raises(ValueError, match=r"mask must be \[3, 4\], got \[4, 3\]"):
        nb.BlockSparseLinear.from_linear(nn.Linear(100, 70), mask=mask.t())
    with pytest.raises(TypeError, match="mask must be bool, got int64"):
        nb.BlockSparseLinear.from_linear(nn.Linear(100, 70), mask=mask.long())


def test_ragged_edges_stay_zero_through_training():
    layer = nb.BlockSparseLinear(100, 70, blocks=1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        layer(torch.randn(8, 100)).square().mean().backward()
        optimizer.step()
    outside = layer.values.detach().clone()
    nb_inside = rb.Blocks(layer.blocks.numpy(), outside.numpy(), 70, 100)
    outside -= torch.from_numpy(nb_inside.gather(nb_inside.dense())).float()
    assert not outside.any()
    assert layer.values.std() > 0.01


def test_pruned_layer_learns():
    torch.manual_seed(0)
    target = nb.BlockSparseLinear(64, 48, block=16, blocks=0.5)
    layer = nb.BlockSparseLinear(64, 48, block=16, blocks=0.5)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02)
    x = torch.randn(256, 64)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(layer(x), target(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 50


def test_state_dict_brings_its_own_blocks():
    linear = nn.Linear(100, 70)
    source = nb.BlockSparseLinear.from_linear(linear, density=0.5)
    assert source.state_dict().keys() == {"values", "blocks", "bias"}
    x = torch.randn(3, 100)
    for density in (0.5, 0.25):
        for assign in (False, True):
            fresh = nb.BlockSparseLinear(100, 70, blocks=density)
            fresh.load_state_dict(source.state_dict(), assign=assign)
            assert torch.equal(fresh(x), source(x))
            assert torch.equal(fresh.layout, source.layout)
    meta = nb.BlockSparseLinear(100, 70, blocks=0.25, device="meta")
    assert meta(x.to("meta")).shape == (3, 70)
    empty = copy.deepcopy(meta).to_empty(device="cpu")
    assert empty.layout.max() < 12
    meta.load_state_dict(source.state_dict(), assign=True)
    empty.load_state_dict(source.state_dict())
    assert torch.equal(meta(x), source(x))
    assert torch.equal(empty(x), source(x))


def test_state_dict_refuses_what_does_not_fit():
    layer = nb.BlockSparseLinear(100, 70, blocks=0.25)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    bad = {**before, "blocks": before["blocks"].flip(0)}
    with pytest.raises(RuntimeError, match="blocks must be sorted"):
        layer.load_state_dict(bad)
    bad = {**before, "blocks": before["blocks"][:-1]}
    with pytest.raises(RuntimeError, match=r"values must be \[2, 32, 32\] for these blocks"):
        layer.load_state_dict(bad)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_copies_and_moves():
    layer = nb.BlockSparseLinear(100, 70, blocks=0.25)
    x = torch.randn(3, 100)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.values.data_ptr() != layer.values.data_ptr()
    half = copy.deepcopy(layer).half()
    assert (half.values.dtype, half.bias.dtype) == (torch.float32, torch.float16)
    assert half(x.half()).dtype == torch.float16
    wide = copy.deepcopy(layer).bfloat16()
    assert wide.values.dtype == torch.bfloat16
    assert wide.blocks.dtype == wide.layout.dtype == torch.int32
    assert wide(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [lambda: nb.BlockSparseLinear(100, 70, blocks=0.25),
                                  lambda: nb.AdapterLinear(nn.Linear(100, 70))])  # fmt: skip
def test_weight_is_read_only(make):
    layer = make()
    assert layer.weight.shape == (70, 100)
    with pytest.raises(AttributeError, match="weight must not be assigned"):
        layer.weight = nn.Parameter(torch.zeros(70, 100))
    with pytest.raises(AttributeError, match="weight must not be assigned"):
        del layer.weight


@pytest.mark.parametrize("kind", ["sparse", "float32", "int4"])
def test_errors_of_layers(kind):
    layer = nb.BlockSparseLinear(100, 70, blocks=0.25)
    if kind != "sparse":
        layer = nb.AdapterLinear(base_of(kind))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with pytest.raises(
                ValueError, match=r"x last dim must equal in_features 100, got \[3, 99\]"
            ):
                layer(torch.randn(3, 99))
            with pytest.raises(TypeError, match="x must be float32"):
                layer(torch.ones(3, 100, dtype=torch.int64))
            with pytest.raises(TypeError, match="x must be a Tensor, got list"):
                layer([1.0])


def test_constructors_refuse():
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 1.5"):
        nb.BlockSparseLinear.from_linear(nn.Linear(8, 8), density=1.5)
    with pytest.raises(TypeError, match="linear must be an nn.Linear, got Conv1d"):
        nb.BlockSparseLinear.from_linear(nn.Conv1d(1, 1, 1))
    with pytest.raises(TypeError, match="dtype must be float32 or bfloat16, got float16"):
        nb.BlockSparseLinear(8, 8, dtype=torch.float16)
    with pytest.raises(TypeError, match="base must be an nn.Linear or Int4Linear, got Embedding"):
        nb.AdapterLinear(nn.Embedding(4, 4))
    with pytest.raises(TypeError, match="got BlockSparseLinear"):
        nb.AdapterLinear(nb.BlockSparseLinear(64, 64))
    with pytest.raises(TypeError, match="got MaskedLinear"):
        nb.AdapterLinear(nb.MaskedLinear(64, 64))
    with pytest.raises(ValueError, match="rank must be at least 0, got -1"):
        nb.AdapterLinear(nn.Linear(8, 8), rank=-1)
    with pytest.raises(ValueError, match="name must be a word without dots, got 'a.b'"):
        nb.AdapterLinear(nn.Linear(8, 8), name="a.b")
    with pytest.raises(TypeError, match="base.weight must be float32, bfloat16 or float16"):
        nb.AdapterLinear(nn.Linear(8, 8, dtype=torch.float64))


# --- AdapterLinear ------------------------------------------------------------------------------


@LEVEL
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("rank", [0, 3])
def test_zero_adapter_changes_no_bit(level, kind, rank):
    native.set_cpu_isa(level)
    base = base_of(kind)
    layer = nb.AdapterLinear(base, block=16, blocks=0.4, rank=rank)
    for m in (1, 3, 20, 65):
        x = x_of(kind, m, 100)
        x[0] = 0
        x[-1] *= 1e-4  # sums that underflow in float16
        plain = base(x)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.equal(bits(layer(x)), bits(plain)), (m, grad)
    # Zeros that training leaves, of either sign.
    with torch.no_grad():
        layer.values.fill_(-0.0)
        assert torch.equal(bits(layer(x)), bits(base(x)))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("rank", [0, 3])
def test_computes_base_plus_adapter(kind, rank):
    base = base_of(kind)
    layer = fill(nb.AdapterLinear(base, block=16, blocks=0.4, rank=rank))
    x = x_of(kind, 2, 9, 100)
    added = layer.adapter().dense()
    like = base(x).float() + F.linear(x.float(), added)
    torch.testing.assert_close(layer(x).float(), like, rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.clone().requires_grad_()))
    torch.testing.assert_close(
        layer.weight.float(), base.weight.float() + added, rtol=1e-2, atol=1e-2
    )
    layer.activate(None)
    assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.weight, base.weight)
    with pytest.raises(ValueError, match="an adapter must be active, got none"):
        layer.values


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize("rank", [0, 3])
def test_gradients(kind, rank):
    base = base_of(kind)
    layer = fill(nb.AdapterLinear(base, block=16, blocks=0.4, rank=rank))
    x = x_of(kind, 2, 9, 100).requires_grad_()
    g = x_of(kind, 2, 9, 70, seed=5)
    layer(x).backward(g)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        f"adapters.default.{part}" for part in ("values", "lora_a", "lora_c")[: 3 if rank else 1]
    ]
    w, rows = layer.weight.double(), x.detach().double().reshape(-1, 100)
    up = g.double().reshape(-1, 70)
    tight = dict(rtol=1e-4, atol=1e-4) if kind != "bfloat16" else dict(rtol=2e-2, atol=4e-2)
    torch.testing.assert_close(x.grad.double().reshape(-1, 100), up @ w, **tight)
    dense = up.t() @ rows
    kept = rb.Blocks(layer.blocks.numpy(), as_numpy(layer.values), 70, 100)
    torch.testing.assert_close(
        layer.values.grad.double(), torch.from_numpy(kept.gather(dense.numpy())), **tight
    )
    if rank:
        a, c = layer.lora_a.double(), layer.lora_c.double()
        torch.testing.assert_close(layer.lora_a.grad.double(), c.t() @ dense, **tight)
        torch.testing.assert_close(layer.lora_c.grad.double(), dense @ a.t(), **tight)


@pytest.mark.parametrize("kind", ["float32", "int4"])
def test_second_derivatives(kind):
    native.set_cpu_isa("scalar")
    layer = fill(nb.AdapterLinear(base_of(kind, 20, 24), block=16, blocks=1.0, rank=2))
    x = torch.randn(3, 24, requires_grad=True)
    inputs = [x, *layer.adapter().parameters()]

    def orders(f):
        first = torch.autograd.grad(f().pow(3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), inputs)

    w, b = layer.base.weight, layer.base.bias.detach()

    def dense():
        rows, columns = 2, 2
        wide = layer.values.view(rows, columns, 16, 16).transpose(1, 2).reshape(32, 32)
        return F.linear(x, w + wide[:20, :24] + layer.lora_c @ layer.lora_a, b)

    for ours, theirs in zip(orders(lambda: layer(x)), orders(dense)):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("kind", ["float32", "int4"])
def test_compile_export_autocast(kind):
    torch._dynamo.reset()
    layer = fill(nb.AdapterLinear(base_of(kind), block=16, blocks=0.4, rank=2))
    x = torch.randn(5, 100, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = (x, *layer.adapter().parameters())
    ours = torch.autograd.grad(compiled(x).square().sum(), inputs)
    theirs = torch.autograd.grad(layer(x).square().sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    program = torch.export.export(layer.eval(), (torch.randn(3, 100),))
    y = torch.randn(3, 100)
    torch.testing.assert_close(program.module()(y), layer(y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=3e-2, atol=5e-2)
    y.float().sum().backward()
    assert layer.values.grad.dtype == torch.float32


def test_several_adapters():
    layer = fill(nb.AdapterLinear(base_of("float32"), name="first", blocks=0.3))
    x = torch.randn(4, 100)
    first = layer(x)
    layer.add("second", block=16, blocks=0.1, rank=2)
    assert layer.active == "second"
    assert layer.names == ["first", "second"]
    assert torch.equal(layer(x), layer.base(x))
    fill(layer, 3)
    second = layer(x)
    pointers = {p.data_ptr() for p in layer.parameters()}
    for _ in range(3):
        layer.activate("first")
        assert torch.equal(layer(x), first)
        layer.activate("second")
        assert torch.equal(layer(x), second)
    assert {p.data_ptr() for p in layer.parameters()} == pointers
    other = copy.deepcopy(layer)
    other.activate("first")
    assert torch.equal(other(x), first)
    assert torch.equal(layer(x), second)
    with pytest.raises(ValueError, match="adapter must be one of first, second, got 'third'"):
        layer.activate("third")
    with pytest.raises(ValueError, match="name must be new, got 'first'"):
        layer.add("first")
    layer.remove("second")
    assert layer.active is None
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rank", [0, 2])
def test_merge_and_exact_unmerge(kind, rank):
    base = base_of(kind)
    with torch.no_grad():
        base.weight[0, 0], base.weight[69, 99] = -0.0, float("inf")
    before = bits(base.weight).clone()
    layer = fill(nb.AdapterLinear(base, blocks=0.4, rank=rank))
    x = x_of(kind, 6, 100)
    x[:, 99] = 0
    running, dense = layer(x), layer.weight
    pointer = base.weight.data_ptr()
    for _ in range(3):
        layer.merge()
        assert layer.merged == "default"
        assert torch.equal(bits(base.weight), bits(dense))
        torch.testing.assert_close(layer(x), running, rtol=2e-2, atol=2e-2, equal_nan=True)
        with pytest.raises(ValueError, match="must be unmerged before another is activated"):
            layer.activate(None)
        with pytest.raises(ValueError, match="must be unmerged before another is merged"):
            layer.merge()
        with torch.no_grad():
            layer.values.add_(0)  # an optimiser that goes on
        layer.unmerge()
        assert torch.equal(bits(base.weight), before)
    assert base.weight.data_ptr() == pointer
    with pytest.raises(ValueError, match="an adapter must be merged, got none"):
        layer.unmerge()
    with pytest.raises(TypeError, match="base must be a dense nn.Linear, got Int4Linear"):
        nb.AdapterLinear(base_of("int4")).merge()


@pytest.mark.parametrize("kind", ["float32", "int4"])
def test_state_dict_and_pickle(kind):
    layer = fill(nb.AdapterLinear(base_of(kind), blocks=0.4, rank=2))
    x = x_of(kind, 4, 100)
    state = layer.state_dict()
    parts = {f"adapters.default.{p}" for p in ("values", "blocks", "lora_a", "lora_c")}
    weight = ("weight",) if kind == "float32" else ("qweight", "scales", "offsets")
    assert state.keys() == parts | {f"base.{p}" for p in (*weight, "bias")}
    other = nb.AdapterLinear(base_of(kind, seed=7), blocks=0.1, rank=2)
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    if kind == "float32":
        layer.merge()
        with pytest.raises(ValueError, match="must be unmerged for a state dict, got 'default'"):
            nn.Sequential(layer).state_dict()
        before = bits(layer.base.weight).clone(), layer.values.detach().clone()
        new = {f"0.{key}": torch.zeros_like(tensor) for key, tensor in state.items()}
        for strict in (True, False):
            with pytest.raises(ValueError, match="0 must be unmerged to load a state dict, got 'd"):
                nn.Sequential(layer).load_state_dict(new, strict=strict)
        assert torch.equal(bits(layer.base.weight), before[0])
        assert torch.equal(layer.values, before[1])
        nn.Sequential(layer).load_state_dict({}, strict=False)  # nothing for this layer
        layer.unmerge()
        layer.load_state_dict(state)
        assert torch.equal(other(x), layer(x))


def test_functional_call():
    layer = fill(nb.AdapterLinear(base_of("int4"), blocks=0.4))
    x = torch.randn(3, 100)
    zero = torch.zeros_like(layer.values)
    y = torch.func.functional_call(layer, {"adapters.default.values": zero}, (x,))
    assert torch.equal(y, layer.base(x))


def test_base_is_quantised_under_its_adapter():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    nb.add_adapters(model, nb.AdapterConfig(density=0.5))
    for layer in (model[0], model[2]):
        fill(layer)
    report = nb.accelerate(model, nb.Int4Config(group_size=32), progress=False)
    assert [row.name for row in report.replaced] == ["0.base", "2.base"]
    x = torch.randn(3, 64)
    like = F.linear(
        F.linear(x, model[0].weight, model[0].bias).relu(), model[2].weight, model[2].bias
    )
    torch.testing.assert_close(model(x), like, rtol=1e-3, atol=1e-3)
