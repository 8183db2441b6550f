"""Layers with a `column_order` in models: fused siblings, adapters, selections, files, reports."""

from __future__ import annotations

import copy
import pickle

import nibblock as nb
import numpy as np
import pytest
import torch
from nibblock.nn import fuse_linears, unfuse_linears
from test_column_order import DTYPES, K, N, draw, gathered, wrong, x_of
from test_fuse import calls
from torch import nn

# --- siblings -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Three siblings; orders: one for each of them, by seed, None for columns in order."""

    def __init__(self, orders=(0, 0, 0), sizes=(64, 24, 24)):
        super().__init__()
        for i, (name, seed, n) in enumerate(zip("qkv", orders, sizes)):
            order = np.arange(K) if seed is None else np.random.default_rng(seed).permutation(K)
            layer, _, _ = draw(seed=i, n=n, order=order, bias=name != "k")
            if seed is None:
                layer = gathered(layer)
            self.add_module(f"{name}_proj", layer)

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize(
    "orders", [(0, 0, 0), (0, 0, 1), (0, 0, None), (None, 0, 0), (None, None, None)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_siblings_share_a_call_where_their_orders_are_equal(orders, dtype):
    plain = nn.ModuleDict({"block": Attention(orders)}).eval().requires_grad_(False)
    fused = copy.deepcopy(plain)
    names = [f"{letter}_proj" for letter in "qkv"]
    parts = [[n for n, o in zip(names, orders) if o == order] for order in dict.fromkeys(orders)]
    shared = [f"block.({'|'.join(part)})" for part in parts if len(part) > 1]
    assert fuse_linears(fused) == shared
    for rows in (0, 1, 3, 17):
        x = x_of(rows, K, dtype=dtype)
        count, ours = calls(fused["block"], x)
        assert equal(ours, plain["block"](x))
        assert count == (len(parts) if 0 < rows <= 8 else 3)
    x = x_of(3, K, dtype=dtype).requires_grad_()
    ours, theirs = (torch.autograd.grad(sum(y.sum() for y in m["block"](x)), x)[0]
                    for m in (fused, plain))  # fmt: skip
    assert torch.equal(ours, theirs)
    unfuse_linears(fused)
    with torch.no_grad():
        assert equal(fused["block"](x), plain["block"](x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("later", [(1, 1, 1), (0, 1, 0), (None, None, None), (None, 0, None)])
def test_fused_siblings_follow_what_is_loaded(later, assign):
    fused = nn.ModuleDict({"block": Attention((0, 0, 0))}).eval().requires_grad_(False)
    assert fuse_linears(fused)
    x = x_of(2, K)
    assert calls(fused["block"], x)[0] == 1
    plain = nn.ModuleDict({"block": Attention(later)}).eval().requires_grad_(False)
    fused.load_state_dict(plain.state_dict(), assign=assign)
    count, ours = calls(fused["block"], x)
    assert equal(ours, plain["block"](x))
    assert count == (1 if len(set(later)) == 1 else 3)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        again, ours = calls(other["block"], x)
        assert equal(ours, plain["block"](x))
        assert again == count


def test_fused_siblings_follow_an_assignment():
    fused = nn.ModuleDict({"block": Attention()}).eval().requires_grad_(False)
    fuse_linears(fused)
    x = x_of(1, K)
    with torch.no_grad():
        before = fused["block"](x)
        fused["block"].k_proj.column_order = torch.arange(K)
        after = fused["block"](x)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    with torch.no_grad():
        assert torch.equal(after[1], fused["block"].k_proj(x))


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("rows", [0, 1, 3, 17])
def test_adapters_lie_in_the_order_of_the_inputs(dtype, rank, rows):
    base, weight, _ = draw()
    layer = nb.AdapterLinear(base, block=16, blocks=0.3, rank=rank)
    x = x_of(rows, K, dtype=dtype).requires_grad_()
    assert torch.equal(layer(x), base(x))  # an adapter of zeros changes no bit
    with torch.no_grad():
        for parameter in layer.adapter().parameters():
            parameter.copy_(x_of(*parameter.shape, seed=7) * 0.1)
    adapter = layer.adapter()
    added = adapter.dense().double()
    assert torch.equal(layer.dense(), (weight.float() + added.float()))
    y = layer(x)
    exact = x.detach().double()
    tolerance = 6e-3 if dtype != torch.bfloat16 else 1.2e-2
    expected = exact @ (weight + added).T + base.bias.detach().double()
    assert wrong(y, expected) < tolerance
    grad = x_of(rows, N, dtype=dtype, seed=2)
    found = torch.autograd.grad(y, [x, *adapter.parameters()], grad)
    dense = grad.double().T @ exact
    blocks = [dense[16 * r : 16 * r + 16, 16 * c : 16 * c + 16] for r, c in layer.blocks.tolist()]
    values = torch.zeros(found[1].shape, dtype=torch.float64)
    for value, block in zip(values, blocks):
        value[: block.shape[0], : block.shape[1]] = block
    assert wrong(found[0], grad.double() @ (weight + added)) < tolerance
    assert wrong(found[1], values) < tolerance
    if rank:
        a, c = layer.lora_a.detach().double(), layer.lora_c.detach().double()
        assert wrong(found[2], (grad.double() @ c).T @ exact) < 2 * tolerance
        assert wrong(found[3], grad.double().T @ (exact @ a.T)) < 2 * tolerance


def test_blocks_are_chosen_in_the_order_of_the_inputs():
    """Magnitudes, and gradients by impact: of the dense twin's blocks."""
    layer, _, _ = draw(k=128, n=64, bias=False)
    dense = nn.Linear(128, 64, bias=False)
    dense.weight.data.copy_(layer.dequantize())
    models = [nn.Sequential(m, nn.ReLU()) for m in (layer, dense)]
    batches = [x_of(9, 128, seed=seed) for seed in range(4)]
    for method in ("magnitude", "impact"):
        found = [
            nb.select_blocks(
                model, batches, lambda m, x: m(x).square().mean(), method=method, density=0.2,
                block=16, progress=False,
            )
            for model in models
        ]  # fmt: skip
        assert torch.equal(found[0].blocks["0"], found[1].blocks["0"]), method


def test_adapter_files_know_the_order(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(draw()[0])
    nb.add_adapters(model, nb.AdapterConfig(density=0.3))
    with torch.no_grad():
        model[0].values.normal_()
    nb.save(model, tmp_path / "a.safetensors")
    other = nn.Sequential(draw()[0])
    nb.load(tmp_path / "a.safetensors", other)
    assert torch.equal(other(x_of(3, K)), model(x_of(3, K)))
    for order in (None, torch.arange(K).flip(0)):
        other = nn.Sequential(draw()[0])
        other[0].column_order = order
        with pytest.raises(ValueError, match="0 must be the layer that the adapter of a.safetens"):
            nb.load(tmp_path / "a.safetensors", other)


# --- explain, files -------------------------------------------------------------------------------


def test_explain():
    layer, _, _ = draw()
    x = x_of(3, K)
    assert "compute bf16, columns of x gathered" in nb.explain(layer, x).call
    assert "gathered" not in nb.explain(gathered(layer), x).call
    found = nb.explain(nn.Sequential(draw()[0], nn.Linear(N, K), gathered(layer)), x)
    assert [item.layer for item in found] == ["0", "2"]
    adapted = nb.AdapterLinear(layer, blocks=0.5)
    found = nb.explain(adapted, x)
    assert found.kernel.startswith("block_sparse_linear.cpu.")
    assert "base with columns in an order of their own, by itself" in found.call


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_save_and_load(tmp_path, device):
    model = nn.Sequential(draw()[0], nn.ReLU(), gathered(draw(k=N)[0]))
    nb.save(model, tmp_path / "m.safetensors")
    for other in (
        nn.Sequential(nn.Linear(K, N, device=device), nn.ReLU(), nn.Linear(N, N, device=device)),
        nn.Sequential(gathered(draw(3)[0]), nn.ReLU(), draw(4, k=N)[0]).to(device),
    ):
        nb.load(tmp_path / "m.safetensors", other)
        assert other.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(other(x_of(3, K)), model(x_of(3, K)))
        nb.save(other, tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (
            tmp_path / "m.safetensors"
        ).read_bytes()
    with nb_open(tmp_path / "m.safetensors") as file:
        assert '"version": 2' in file.metadata()["nibblock"]
    del model[0]
    nb.save(model, tmp_path / "plain.safetensors")
    with nb_open(tmp_path / "plain.safetensors") as file:  # as ever
        assert '"version": 1' in file.metadata()["nibblock"]
        assert "column_order" not in file.metadata()["nibblock"]


def nb_open(path):
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    return safetensors.safe_open(path, framework="pt")


def test_files_of_tied_layers(tmp_path):
    first, _, _ = draw(bias=False)
    order = torch.arange(K).flip(0)
    second = nb.Int4Linear.from_packed(
        first.packed, column_order=order, **first._layout(),
    )  # fmt: skip
    model = nn.Sequential(nn.ModuleDict({"a": first, "b": second}))
    nb.save(model, tmp_path / "m.safetensors")
    other = nn.Sequential(nn.ModuleDict({n: nn.Linear(K, N, bias=False) for n in "ab"}))
    nb.load(tmp_path / "m.safetensors", other)
    a, b = other[0]["a"], other[0]["b"]
    assert a.packed is b.packed
    assert torch.equal(a.dequantize(), first.dequantize())
    assert torch.equal(b.dequantize(), second.dequantize())
    one = nn.Linear(K, N, bias=False)  # one module in the model, two layers in the file
    with pytest.raises(ValueError, match="0.b must be as 0.a in the file, for they are one module"):
        nb.load(tmp_path / "m.safetensors", nn.Sequential(nn.ModuleDict({"a": one, "b": one})))


def test_damaged_files(tmp_path):
    from safetensors.torch import load_file, save_file

    model = nn.Sequential(draw()[0])
    path = tmp_path / "m.safetensors"
    nb.save(model, path)
    tensors = load_file(path)
    with nb_open(path) as file:
        metadata = file.metadata()
    for order, text in (
        (None, "load: 0: m.safetensors holds no 0.column_order"),
        (
            torch.zeros(K).long(),
            "load: 0: .*column_order must hold each of 0 to 129 once, got 0 tw",
        ),
        (torch.arange(3), r"load: 0: .*column_order must be \[130\], got \[3\]"),
    ):
        changed = {k: v for k, v in tensors.items() if k != "0.column_order"}
        changed |= {} if order is None else {"0.column_order": order}
        save_file(changed, path, metadata)
        with pytest.raises(ValueError, match=text):
            nb.load(path, nn.Sequential(nn.Linear(K, N)))


def test_report_of_a_file(tmp_path):
    from nibblock._report_cli import cli
    from nibblock._report_cli.describe import describe

    path = tmp_path / "m.safetensors"
    nb.save(nn.Sequential(draw()[0], gathered(draw(k=N)[0])), path)
    first, second = describe(path).rows
    assert first.column_order
    assert second.column_order is None
    assert (first.fixed_bytes, second.fixed_bytes) == (8 * K, 0)
    assert first.bytes == N * K // 2 + 2 * N * 5 * 2 + 8 * K + 4 * N
    assert cli.main([str(path)]) == 0


def test_finished_layers_are_left_alone():
    model = nn.Sequential(draw()[0], nn.Linear(N, 32))
    before = model[0].state_dict()
    report = nb.accelerate(model, nb.Int4Config(group_size=32), progress=False)
    assert [row.action for row in report] == ["kept", "int4"]
    assert all(torch.equal(v, before[k]) for k, v in model[0].state_dict().items())
