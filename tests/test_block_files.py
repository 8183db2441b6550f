"""`save` and `load` of adapters and of block-sparse layers."""

from __future__ import annotations

import copy
import hashlib
import json

import nibblock as nb
import pytest
import torch
from harness import Tied
from torch import nn

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


class Model(nn.Module):
    def __init__(self, seed=0, int4=False):
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(64, 100)
        self.down = nn.Linear(100, 48, bias=False)
        self.head = nn.Linear(48, 3)
        self.norm = nn.LayerNorm(48)
        if int4:
            nb.accelerate(self, nb.Int4Config(group_size=32), skip="head", progress=False)

    def forward(self, x):
        return self.head(self.norm(self.down(self.up(x).relu())))


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(9))


def adapted(int4=False, rank=0, name="default", seed=3):
    model = Model(int4=int4)
    config = nb.AdapterConfig(density=0.3, rank=rank, skip="head", name=name)
    nb.add_adapters(model, config)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=gen) * 0.1)
    return model


def digest(model):
    """A hash of every byte outside the adapters."""
    out = hashlib.sha256()
    for key, tensor in sorted(
        {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()
    ):
        if ".adapters." not in key:
            out.update(key.replace(".base.", ".").encode())
            out.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return out.hexdigest()


@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_round_trip(tmp_path, int4, rank):
    model = adapted(int4, rank)
    path = tmp_path / "adapter.safetensors"
    nb.save(model, path)
    values = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert path.stat().st_size < values + 2500
    fresh = Model(int4=int4)
    before = digest(fresh)
    assert nb.load(path, fresh) is fresh
    assert torch.equal(fresh(X), model(X))
    assert digest(fresh) == before
    assert isinstance(fresh.up, nb.AdapterLinear)
    assert isinstance(fresh.head, nn.Linear)
    assert not any(p.requires_grad for p in fresh.up.base.parameters())
    assert fresh.up.values.requires_grad
    nb.load(path, fresh)  # onto itself: the Parameters stay, an optimiser may hold them
    held = fresh.up.values
    with torch.no_grad():
        held.zero_()
    nb.load(path, fresh)
    assert fresh.up.values is held
    assert torch.equal(fresh(X), model(X))
    nb.save(fresh, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter.safetensors",
        "again.safetensors",
    ]


def test_header(tmp_path):
    nb.save(adapted(rank=2), tmp_path / "a.safetensors")
    with safe_open(str(tmp_path / "a.safetensors"), framework="pt") as file:
        header = json.loads(file.metadata()["nibblock"])
        keys = set(file.keys())
    assert (header["kind"], header["version"], header["name"]) == ("adapters", 1, "default")
    assert header["layers"].keys() == {"up", "down"}
    record = header["layers"]["up"]
    assert (record["out_features"], record["in_features"]) == (100, 64)
    assert (record["block"], record["rank"], len(record["base"])) == (32, 2, 64)
    parts = ("values", "blocks", "lora_a", "lora_c")
    assert keys == {f"{layer}.{part}" for layer in ("up", "down") for part in parts}


def test_what_else_was_trained_is_in_the_file(tmp_path):
    model = adapted()
    model.norm.requires_grad_()
    with torch.no_grad():
        model.norm.weight.mul_(2)
    nb.save(model, tmp_path / "a.safetensors")
    fresh = Model()
    nb.load(tmp_path / "a.safetensors", fresh)
    assert torch.equal(fresh(X), model(X))
    assert torch.equal(fresh.norm.weight, model.norm.weight)


@pytest.mark.parametrize("int4", [False, True])
def test_another_base_is_refused_by_name(tmp_path, int4):
    model = adapted(int4)
    nb.save(model, tmp_path / "a.safetensors")

    def changed(change):
        other = Model(int4=int4)
        with torch.no_grad():
            change(other)
        return other

    def one_bit(layer):
        weight = layer.packed if int4 else layer.weight.view(torch.int32)
        weight.view(-1)[7] ^= 1

    cases = [
        (Model(seed=1, int4=int4), "load: up must be the layer that the adapter of a.safetensors"),
        (changed(lambda m: one_bit(m.down)), "load: down must be the layer"),
        (changed(lambda m: m.up.bias.add_(1e-3)), "load: up must be the layer"),
        (Model(int4=not int4), "load: up must be the layer"),
        (nn.Sequential(nn.Linear(2, 2)), "load: up must be a linear of the model, got none"),
    ]
    other = Model(int4=int4)
    other.down = nn.Linear(99, 48)
    cases.append((other, r"load: down must have the file's shape \[48, 100\], got \[48, 99\]"))
    for target, text in cases:
        before, names = digest(target), [n for n, _ in target.named_modules()]
        asked = [p.requires_grad for p in target.parameters()]
        with pytest.raises(ValueError, match=text):
            nb.load(tmp_path / "a.safetensors", target)
        assert digest(target) == before
        assert [n for n, _ in target.named_modules()] == names
        assert [p.requires_grad for p in target.parameters()] == asked


def test_names_and_activation(tmp_path):
    one, two = adapted(name="one", seed=1), adapted(name="two", seed=2)
    nb.save(one, tmp_path / "one.safetensors")
    nb.save(two, tmp_path / "two.safetensors", adapter="two")
    model = Model()
    bare = model(X)
    nb.load(tmp_path / "one.safetensors", model)
    nb.load(tmp_path / "two.safetensors", model, adapter="other")
    assert model.up.names == ["one", "other"]
    assert torch.equal(model(X), two(X))
    nb.activate_adapter(model, "one")
    assert torch.equal(model(X), one(X))
    nb.save(model, tmp_path / "again.safetensors", adapter="other")
    assert model.up.active == "one"
    nb.activate_adapter(model, None)
    assert torch.equal(model(X), bare)
    with pytest.raises(
        ValueError, match="an adapter must be active, got none of one, other active"
    ):
        nb.save(model, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="save: adapter must be one of one, other, got 'three'"):
        nb.save(model, tmp_path / "x.safetensors", adapter="three")
    model.up.activate("one")
    model.down.activate("other")
    with pytest.raises(
        ValueError, match="one adapter must be active on all layers, got one, other"
    ):
        nb.save(model, tmp_path / "x.safetensors")
    model.down.activate("one")
    model.down.merge()
    with pytest.raises(ValueError, match="save: down must be unmerged, got 'one' merged"):
        nb.save(model, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="load: down must be unmerged, got 'one' merged"):
        nb.load(tmp_path / "one.safetensors", model)
    model.down.unmerge()
    nb.load(tmp_path / "again.safetensors", model)
    assert torch.equal(model(X), two(X))
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("make", [Model, adapted])
@pytest.mark.parametrize("name", ["z.y", ""])
def test_names_are_words(tmp_path, make, name):
    nb.save(adapted(), tmp_path / "a.safetensors")
    model = make()
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match=f"adapter must be a word without dots, got '{name}'"):
        nb.load(tmp_path / "a.safetensors", model, adapter=name)
    assert [n for n, _ in model.named_modules()] == names


def test_a_loaded_adapter_is_not_merged_into_a_tied_weight(tmp_path):
    model = Tied()
    bare = copy.deepcopy(model)
    nb.add_adapters(model, nb.AdapterConfig(density=1.0))
    nb.save(model, tmp_path / "a.safetensors")
    nb.load(tmp_path / "a.safetensors", bare)
    for layer in (model.head, copy.deepcopy(bare).head, bare.head):
        with pytest.raises(ValueError, match="base must own its weight, got one tied to emb.weigh"):
            layer.merge()


def test_masked_layers_take_no_adapter(tmp_path):
    nb.save(adapted(), tmp_path / "a.safetensors")
    model = nb.sparse_update(Model(), {"up": [[0, 0]]})
    with pytest.raises(ValueError, match="load: up must be a linear of the model, got MaskedLin"):
        nb.load(tmp_path / "a.safetensors", model)
    assert type(model.down) is nn.Linear


def test_layers_outside_the_file_run_bare(tmp_path):
    only_up = Model()
    nb.add_adapters(only_up, nb.AdapterConfig(where="up", density=0.5, name="small"))
    with torch.no_grad():
        only_up.up.values.normal_()
    nb.save(only_up, tmp_path / "small.safetensors")
    model = adapted()
    nb.load(tmp_path / "small.safetensors", model)
    assert (model.up.active, model.down.active) == ("small", None)
    assert torch.equal(model(X), only_up(X))


def test_many_rounds_leave_every_byte_of_the_base(tmp_path):
    model = adapted()
    fresh = Model()
    base, bare, tuned = digest(fresh), fresh(X), model(X)
    path = tmp_path / "a.safetensors"
    nb.save(model, path)
    content = path.read_bytes()
    for i in range(60):
        nb.load(path, fresh)
        assert torch.equal(fresh(X), tuned)
        if i % 3 == 0:
            for layer in (fresh.up, fresh.down):
                layer.merge()
            fresh(X)
            for layer in (fresh.up, fresh.down):
                layer.unmerge()
        nb.save(fresh, path)
        nb.activate_adapter(fresh, None)
        assert torch.equal(fresh(X), bare)
    for _ in range(1000):
        nb.activate_adapter(fresh, "default")
        nb.activate_adapter(fresh, None)
    assert digest(fresh) == base
    assert path.read_bytes() == content


def test_damaged_files(tmp_path):
    model = adapted()
    path = tmp_path / "a.safetensors"
    nb.save(model, path)
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["nibblock"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}

    def written(change):
        parts = [copy.deepcopy(header), dict(tensors)]
        change(*parts)
        save_file(parts[1], str(path), {"nibblock": json.dumps(parts[0])})

    cases = [
        (lambda h, t: t.pop("up.values"), "a.safetensors must hold up.values"),
        (lambda h, t: h.update(version=2), "must be an adapter file of version 1, got 2; update"),
        (lambda h, t: h["layers"]["up"].pop("base"), "must have whole metadata"),
        (lambda h, t: h.update(layers=[]), "must have whole metadata"),
        (lambda h, t: h.update(kind="lora"), "whole metadata, got: .*a file of kind 'lora'"),
        (lambda h, t: h.pop("name"), "must have whole metadata, got: KeyError\\('name'"),
        (lambda h, t: h["layers"]["up"].update(base=3), "base of up must be str, got int"),
        (lambda h, t: h["layers"]["up"].update(rank="2"), "rank of up must be int, got str"),
        (lambda h, t: h["trained"].update({"up.bias": [1]}), "a.safetensors must hold up.bias"),
        (
            lambda h, t: t.update({"up.blocks": t["up.blocks"] + 9}),
            "load: up: blocks: blocks must lie",
        ),
        (lambda h, t: t.update({"up.values": t["up.values"][1:]}), "load: up: values must be"),
        (lambda h, t: t.update({"up.values": t["up.values"].half()}), "values must be float32"),
        (lambda h, t: h["trained"].update({"none": "none"}), "load: model must hold none"),
    ]
    for change, text in cases:
        written(change)
        fresh = Model()
        with pytest.raises(ValueError, match=text):
            nb.load(path, fresh)
        assert type(fresh.up) is nn.Linear
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        nb.load(path, Model())


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = adapted()
    path = tmp_path / "a.safetensors"
    nb.save(model, path)
    content = path.read_bytes()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        nb.save(model, path)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# --- block-sparse layers ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_model_round_trip(tmp_path, dtype):
    model = Model()
    config = nb.BlockSparseConfig(density=0.5, dtype=dtype)
    nb.accelerate(model, config, skip="head", progress=False)
    path = tmp_path / "sparse.safetensors"
    nb.save(model, path)
    for target in (Model(seed=1), copy.deepcopy(model), Model(int4=True)):
        nb.load(path, target)
        assert isinstance(target.up, nb.BlockSparseLinear)
        assert target.up.values.dtype == dtype
        assert torch.equal(target(X), model(X))
    dense = Model()
    nb.save(dense, tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match="load: up must be dense as in the file"):
        nb.load(tmp_path / "dense.safetensors", copy.deepcopy(model))
    wide = Model()
    wide.down = nn.Linear(100, 49, bias=False)
    with pytest.raises(ValueError, match=r"load: down must have the file's shape \[48, 100\]"):
        nb.load(path, wide)
    with pytest.raises(ValueError, match="adapter must be None for a model's file, got 'a'"):
        nb.load(path, Model(), adapter="a")
    with pytest.raises(ValueError, match="save: adapter must be one of none, got 'a'"):
        nb.save(model, path, adapter="a")
