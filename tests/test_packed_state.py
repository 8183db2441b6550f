"""State dicts of int4 weights that modules share: tied tables and heads, fused siblings."""

from __future__ import annotations

import copy
import pickle

import nibblock as nb
import pytest
import torch
from harness import Tied
from nibblock.nn import fuse_linears
from torch import nn

INDEX = torch.arange(5)


def tied(small=False):
    """A tied int4 model; a small row makes its scales float32."""
    torch.manual_seed(int(small))
    model = Tied()
    with torch.no_grad():
        model.emb.weight[0] *= 1e-9 if small else 1
    nb.accelerate(model, nb.Int4Config(embeddings=True), progress=False)
    assert model.emb.scale_dtype == (torch.float32 if small else torch.float16)
    return model


def part(model, name):
    return {k: v for k, v in model.state_dict().items() if k.startswith(name)}


# --- tied weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("into, source", [(False, True), (True, False)])
@pytest.mark.parametrize("name", ["emb", "head"])
def test_one_of_two_tied_modules_is_loaded(into, source, name):
    model, other = tied(into), tied(source)
    model.load_state_dict(part(other, name), strict=False)
    assert model.head.packed is model.emb.packed
    assert torch.equal(model(INDEX), other(INDEX))
    for grad in (True, False):
        x = torch.randn(2, 64, requires_grad=grad)
        assert torch.equal(model.head(x), other.head(x))
    assert model.head.scale_dtype == model.emb.scale_dtype == other.emb.scale_dtype
    assert torch.equal(model.head.weight, other.head.weight)
    for how in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        assert torch.equal(how(model)(INDEX), other(INDEX))


@pytest.mark.parametrize("read", ["weight", "state_dict", "repr", "adapter"])
def test_the_other_module_follows_whatever_is_asked_first(read):
    model, other = tied(), tied(True)
    if read == "adapter":
        nb.add_adapters(model, nb.AdapterConfig(density=0.5, block=16, where="head"))
    model.emb.load_state_dict(other.emb.state_dict())
    if read == "weight":
        assert torch.equal(model.head.weight, other.head.weight)
    elif read == "state_dict":
        assert torch.equal(model.head.state_dict()["scales"], other.head.state_dict()["scales"])
    elif read == "repr":
        assert repr(model.head) == repr(other.head)
    else:
        x = torch.randn(2, 64)
        assert torch.allclose(model.head(x), other.head(x), atol=1e-3)


def test_a_refused_part_changes_nothing():
    model, other = tied(), tied(True)
    before = model(INDEX)
    state = other.state_dict()
    state["emb.qweight"] = state["emb.qweight"][:10]
    with pytest.raises(RuntimeError, match=r"size mismatch for emb.qweight"):
        model.load_state_dict({k: v for k, v in state.items() if "emb" in k}, strict=False)
    assert torch.equal(model(INDEX), before)
    # As in torch, what fits is copied before the error: here the same weight under another name.
    with pytest.raises(RuntimeError, match=r"size mismatch for emb.qweight"):
        model.load_state_dict(state)
    assert torch.equal(model(INDEX), other(INDEX))


def test_a_weight_that_cannot_be_packed_changes_nothing(monkeypatch):
    model, other = tied(), tied(True)
    before = model(INDEX)

    def refuse(*args, **kwargs):
        raise ValueError("int4_pack: scales must be something else")

    state = other.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(nb.ops, "int4_pack", refuse)
        with pytest.raises(RuntimeError, match="emb.qweight: int4_pack: scales must be"):
            model.load_state_dict(state)
    assert torch.equal(model(INDEX), before)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_assign_keeps_the_tie(meta, small):
    model, other = tied(), tied(small)
    if meta:
        model.emb.to("meta")
        model.head.packed = model.emb.packed
    model.load_state_dict(other.state_dict(), assign=True)
    assert model.head.packed is model.emb.packed
    assert torch.equal(model(INDEX), other(INDEX))
    pickle.loads(pickle.dumps(model))


def test_assign_of_different_weights_unties():
    model, one, two = tied(), tied(), tied(True)
    model.load_state_dict({**part(one, "emb"), **part(two, "head")}, assign=True)
    assert torch.equal(model.emb.packed, one.emb.packed)
    assert torch.equal(model.head.packed, two.head.packed)
    model = tied()
    before = model.head.weight
    model.load_state_dict(part(two, "emb"), assign=True, strict=False)
    assert torch.equal(model.emb.packed, two.emb.packed)
    assert torch.equal(model.head.weight, before)


# --- what the user registered ---------------------------------------------------------------------


def test_registered_tensors_are_saved_and_loaded():
    def make():
        q = nb.Int4Linear(64, 16)
        q.register_buffer("count", torch.zeros(2))
        q.register_buffer("scratch", torch.zeros(2), persistent=False)
        q.register_parameter("gain", nn.Parameter(torch.ones(3)))
        return q

    source, target = make(), make()
    with torch.no_grad():
        source.count.fill_(4)
        source.gain.fill_(5)
    state = source.state_dict()
    assert state.keys() == {"qweight", "scales", "offsets", "bias", "gain", "count"}
    assert str(target.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(target.count, source.count)
    assert torch.equal(target.gain, source.gain)


# --- fused siblings -------------------------------------------------------------------------------


class Siblings(nn.Module):
    def __init__(self, small=False):
        super().__init__()
        torch.manual_seed(int(small))
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = nn.Linear(64, 16)
            with torch.no_grad():
                linear.weight[0] *= 1e-9 if small else 1
            setattr(self, name, nb.Int4Linear.from_linear(linear, group_size=32))

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


@pytest.mark.parametrize("assign", [False, True])
def test_fused_siblings_load_what_unfused_ones_load(assign):
    fused, other, x = Siblings(), Siblings(small=True), torch.randn(1, 64)
    assert fuse_linears(fused)
    group = fused._int4_groups[0]
    with torch.no_grad():
        # One of them alone: the formats differ, and nobody shares until the others have followed.
        fused(x)
        fused.load_state_dict(part(other, "k_proj"), strict=False, assign=assign)
        assert torch.equal(fused.k_proj(x), other.k_proj(x))
        plain = torch.cat([m(x) for m in (fused.q_proj, fused.k_proj, fused.v_proj)], -1)
        assert torch.equal(fused(x), plain)
        assert group.shared(x) is None
        fused.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(fused(x), other(x))
        assert group.shared(x) is not None
        assert fused.q_proj.scale_dtype == torch.float32


def test_a_refused_load_leaves_a_fused_sibling_as_it_was():
    fused, other, x = Siblings(), Siblings(small=True), torch.randn(1, 64)
    fuse_linears(fused)
    state = other.state_dict()
    state.update({k: v[:3] for k, v in state.items() if k.endswith("qweight")})
    with torch.no_grad():
        before = fused(x)
        with pytest.raises(RuntimeError, match="size mismatch for q_proj.qweight"):
            fused.load_state_dict({k: v for k, v in state.items() if "bias" not in k}, strict=False)
        assert torch.equal(fused(x), before)
        assert fused._int4_groups[0].shared(x) is not None
