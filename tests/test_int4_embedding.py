"""`Int4Embedding`, and heads that are tied to one."""

from __future__ import annotations

import copy
import pickle

import nibblock as nb
import pytest
import torch
from test_int4_linear_module import close
from torch import nn


@pytest.mark.parametrize("bits, group_size, symmetric", [(8, 32, True), (4, 64, False)])
def test_embedding(bits, group_size, symmetric):
    dense = nn.Embedding(50, 70, padding_idx=-1)
    q = nb.Int4Embedding.from_embedding(
        dense, group_size=group_size, symmetric=symmetric, bits=bits
    )
    assert isinstance(q, nn.Embedding)
    assert q.padding_idx == dense.padding_idx == 49
    for indices in (torch.tensor(3), torch.tensor([[0, 49], [7, 7]]), torch.empty(0, 2).long()):
        assert torch.equal(q(indices), q.weight[indices])
        assert torch.equal(q(indices.int()), q.weight[indices])
    assert (q.weight - dense.weight).abs().max() < (0.03 if bits == 8 else 0.5)


def test_embedding_follows_dtype_and_state_dict():
    q = nb.Int4Embedding.from_embedding(nn.Embedding(50, 64))
    index = torch.tensor([1, 2])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q.to(dtype)
        assert q(index).dtype == q.weight.dtype == dtype
    fresh = nb.Int4Embedding(50, 64)
    fresh.load_state_dict(q.state_dict())
    assert torch.equal(fresh(index), q(index))
    assert torch.equal(pickle.loads(pickle.dumps(q))(index), q(index))
    assert nb.Int4Embedding(50, 64, device="meta")(index.to("meta")).shape == (2, 64)


def test_multiplier_is_rounded_to_the_dtype_and_no_part_of_the_table():
    plain = nb.Int4Embedding.from_embedding(nn.Embedding(50, 64))
    scaled = nb.Int4Embedding.from_packed(
        plain.packed,
        num_embeddings=50,
        embedding_dim=64,
        group_size=32,
        affine=False,
        scale_dtype=plain.scale_dtype,
        multiplier=33.7,
    )
    index = torch.tensor([1, 2])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        plain.to(dtype)
        scaled.to(dtype)
        expected = plain(index) * torch.tensor(33.7).to(dtype)
        for module in (scaled, copy.deepcopy(scaled), pickle.loads(pickle.dumps(scaled))):
            assert module.multiplier == 33.7
            assert torch.equal(module(index), expected)
            assert module(index).dtype == dtype
    assert torch.equal(scaled.weight, plain.weight)
    assert torch.equal(scaled.linear().weight, plain.weight)
    assert "multiplier=33.7" in repr(scaled)
    assert "multiplier" not in repr(plain)


def test_embedding_errors():
    q = nb.Int4Embedding.from_embedding(nn.Embedding(50, 64))
    with pytest.raises(ValueError, match=r"int4_embedding: indices must be in \[0, 50\), got 50"):
        q(torch.tensor([1, 50]))
    with pytest.raises(ValueError, match=r"got -1"):
        q(torch.tensor([-1]))
    with pytest.raises(TypeError, match="indices must be int64 or int32, got float32"):
        q(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="max_norm must be None, got 1.0"):
        nb.Int4Embedding.from_embedding(nn.Embedding(5, 5, max_norm=1.0))


def test_tied_head_shares_storage():
    q = nb.Int4Embedding.from_embedding(nn.Embedding(50, 64))
    head = q.linear()
    assert head.packed is q.packed
    x = torch.randn(2, 64)
    assert close(head(x), x @ q.weight.T)
    pair = copy.deepcopy(nn.ModuleDict({"embed": q, "head": head}))
    assert pair["embed"].packed is pair["head"].packed
    assert len(list(pair.parameters())) == 1
