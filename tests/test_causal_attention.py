"""Attention of whole sequences and its gradient (csrc/decoder_ops/cpu_attention.h) against float64,
and which calls of a model reach it."""

from __future__ import annotations

import pytest
import torch
from harness import isa, level_params
from hypothesis import given, settings
from hypothesis import strategies as st
from nibblock.nn import _lean_calls
from test_fuse import near
from test_fuse_attention import (
    CountAttention,
    eager,
    pair_of_models,
    transformers_cache,
    with_dropout,
)

ops = torch.ops.nibblock
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def formula(q, k, v, scale):
    """(y, weights) by the formula, [batch, length, heads, dim] -> the same; differentiable."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(group, 1) for t in (k, v))
    behind = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    p = torch.softmax((scale * q @ k.mT).masked_fill(behind, -torch.inf), -1)
    return (p @ v).transpose(1, 2), p


def heads_of(batch, length, heads, kv_heads, dim, dtype, gap=0):
    """q, k and v side by side in one tensor with a gap behind each row, as one product has them."""
    count = heads + 2 * kv_heads
    rows = torch.randn(batch, length, count * dim + gap).to(dtype)[..., : count * dim]
    parts = rows.split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
    return [t.unflatten(-1, (-1, dim)) for t in parts]


def exact(qkv, grad, scale):
    """[(result, what its rounding is measured by)] of y, dq, dk and dv, in float64.

    A score is a sum of `dim` products, and its error moves the weight by as much again; the
    gradients are sums of products of such weights, so each is bounded by the same sums of absolute
    values.
    """
    q, k, v = (t.double() for t in qkv)
    group = q.shape[2] // k.shape[2]
    leaves = [t.requires_grad_() for t in (q, k, v)]
    y, p = formula(*leaves, scale)
    results = [y, *torch.autograd.grad(y, leaves, grad.double())]
    p = p.detach()
    a, b, c, g = (t.detach().abs().transpose(1, 2) for t in (q, k, v, grad.double()))
    b, c = (t.repeat_interleave(group, 1) for t in (b, c))
    scores = (scale * a @ b.mT).amax(-1, keepdim=True) + 8
    dp = g @ c.mT
    ds = scale * scores * p * (dp + (p * dp).sum(-1, keepdim=True))
    shared = [t.unflatten(1, (-1, group)).sum(2) for t in (ds.mT @ a, (scores * p).mT @ g)]
    sizes = [t.transpose(1, 2) for t in (scores * (p @ c), ds @ b, *shared)]
    return [(r.detach(), s) for r, s in zip(results, sizes)]


def gradients(qkv, grad, scale):
    y, lse = ops._causal_attention(*qkv, scale)
    return [y, *ops._causal_attention_grad(grad, *qkv, y, lse, scale)]


def check(got, expected):
    for ours, (right, size) in zip(got, expected, strict=True):
        assert ours.shape == right.shape
        assert ours.is_contiguous()
        # (y enters the gradient rounded to its type)
        bound = ULP[ours.dtype] * right.abs() + (2.0**-20 + ULP[ours.dtype] / 4) * size
        bound += 1e-6 if ours.dtype == torch.float16 else 1e-30
        assert ((ours.double() - right).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(0, 2),
    length=st.one_of(st.integers(1, 60), st.integers(90, 200)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    dim=st.sampled_from((16, 32, 64, 80)),
    size=st.sampled_from((0.1, 1.0, 8.0)),
    gap=st.sampled_from((0, 7)),
    seed=st.integers(0, 99),
)
def test_against_float64(dtype, batch, length, kv_heads, group, dim, size, gap, seed):
    torch.manual_seed(seed)
    qkv = heads_of(batch, length, kv_heads * group, kv_heads, dim, dtype, gap)
    qkv[0] = (qkv[0] * size).to(dtype)
    grad = torch.randn(qkv[0].shape).to(dtype)
    scale = dim**-0.5
    check(gradients(qkv, grad, scale), exact(qkv, grad, scale))


@pytest.mark.parametrize("level", level_params())
@pytest.mark.parametrize("batch,heads,kv_heads,length,dim", [(1, 3, 1, 400, 64), (5, 4, 4, 97, 48)])
def test_every_level(level, batch, heads, kv_heads, length, dim):
    torch.manual_seed(0)
    qkv = heads_of(batch, length, heads, kv_heads, dim, torch.float32)
    grad = torch.randn(qkv[0].shape)
    with isa(level):
        got = gradients(qkv, grad, 0.1)
    check(got, exact(qkv, grad, 0.1))


@pytest.mark.parametrize("batch,heads,kv_heads", [(1, 3, 1), (2, 10, 5)])
def test_one_result_at_any_number_of_threads(batch, heads, kv_heads):
    torch.manual_seed(1)
    qkv = heads_of(batch, 333, heads, kv_heads, 64, torch.float32)
    grad = torch.randn(qkv[0].shape)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(gradients(qkv, grad, 0.125))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_a_query_that_is_not_a_number_spoils_its_own_row():
    qkv = [t.contiguous() for t in heads_of(1, 100, 4, 2, 16, torch.float32)]
    clean = ops._causal_attention(*qkv, 0.25)[0]
    qkv[0][0, 37, 2, 5] = float("nan")
    y = ops._causal_attention(*qkv, 0.25)[0]
    assert y[0, 37, 2].isnan().all()
    y[0, 37, 2] = clean[0, 37, 2]
    assert torch.equal(y, clean)


def test_keys_behind_a_query_do_not_reach_it():
    qkv = [t.contiguous() for t in heads_of(1, 150, 2, 1, 32, torch.float32)]
    y = ops._causal_attention(*qkv, 0.2)[0]
    for at in (1, 47, 48, 95, 96, 149):
        other = [t.clone() for t in qkv]
        for t in other[1:]:
            t[:, at:] = 1e4
        changed = ops._causal_attention(*other, 0.2)[0]
        assert torch.equal(changed[:, :at], y[:, :at])
        assert not torch.equal(changed[:, at:], y[:, at:])


def test_autograd_twice():
    torch.manual_seed(2)
    leaves = [t.double() for t in heads_of(2, 20, 4, 2, 16, torch.float32)]
    grad = torch.randn(leaves[0].shape)

    def second(function, dtype):
        own = [t.to(dtype).requires_grad_() for t in leaves]
        first = torch.autograd.grad(function(*own), own, grad.to(dtype), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), own)

    got = second(lambda q, k, v: ops._causal_attention(q, k, v, 0.25)[0], torch.float32)
    for a, b in zip(got, second(lambda q, k, v: formula(q, k, v, 0.25)[0], torch.float64)):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_only_what_is_asked_for_gets_a_gradient():
    q, k, v = heads_of(1, 30, 2, 1, 16, torch.float32)
    k = k.detach().clone().requires_grad_()
    y, lse = ops._causal_attention(q, k, v, 0.25)
    assert y.requires_grad
    assert not lse.requires_grad
    y.sum().backward()
    expected = k.detach().clone().requires_grad_()
    formula(q, expected, v, 0.25)[0].sum().backward()
    torch.testing.assert_close(k.grad, expected.grad)


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def float32_on_any_cpu(monkeypatch):
    monkeypatch.setattr(_lean_calls, "_causal_types", lambda: DTYPES[:1])


def run(model, change=lambda model, arguments: None, length=24):
    """((our attention, torch's), logits, gradients) of two sequences."""
    arguments = dict(input_ids=torch.arange(2 * length).view(2, length) % 60)
    change(model, arguments)
    embedding = model.get_input_embeddings()
    embedding.weight.requires_grad_(True)
    embedding.weight.grad = None
    with CountAttention() as counter:
        logits = model(**arguments).logits
    logits.float().square().mean().backward()
    return (counter.ours, counter.torchs), logits.detach(), embedding.weight.grad


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_trains_through_it(name, training):
    plain, fused = (model.train(training) for model in pair_of_models(name))
    count, logits, grad = run(fused)
    assert count == (2, 0)
    expected = run(plain)
    assert expected[0] == (0, 2)
    near(logits, expected[1])
    near(grad, expected[2])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_16_bits_where_the_cpu_has_no_products_of_them(dtype, monkeypatch):
    plain, fused = pair_of_models(dtype=dtype)
    expected = run(plain)
    for types, count in ((DTYPES, (2, 0)), (DTYPES[:1], (0, 2))):
        monkeypatch.setattr(_lean_calls, "_causal_types", lambda types=types: types)
        found = run(fused)
        assert found[0] == count
        near(found[1], expected[1])


def padded(model, arguments):
    arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    arguments["attention_mask"][1, :5] = 0


def all_ways(model, arguments):
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


def behind_a_cache(model, arguments):
    cache = transformers_cache()
    with torch.no_grad():
        model(arguments["input_ids"][:, :8], past_key_values=cache)
    arguments.update(input_ids=arguments["input_ids"][:, 8:], past_key_values=cache)


@pytest.mark.parametrize("change", [padded, with_dropout, eager, all_ways, behind_a_cache])
def test_what_it_does_not_cover(change):
    plain, fused = pair_of_models()
    (ours, _), logits, grad = run(fused, change)
    assert ours == 0
    expected = run(plain, change)
    near(logits, expected[1])
    near(grad, expected[2])


def test_short_sequences_are_left_to_torch():
    _, fused = pair_of_models()
    assert run(fused, length=15)[0] == (0, 2)
    assert run(fused, length=16)[0] == (2, 0)


# --- refusals -------------------------------------------------------------------------------------


def test_opcheck():
    qkv = [t.contiguous().requires_grad_() for t in heads_of(2, 20, 4, 2, 16, torch.float32)]
    torch.library.opcheck(ops._causal_attention.default, (*qkv, 0.25))
    y, lse = ops._causal_attention(*(t.detach() for t in qkv), 0.25)
    arguments = (torch.randn_like(y), *(t.detach() for t in qkv), y, lse, 0.25)
    torch.library.opcheck(ops._causal_attention_grad.default, arguments)


def like(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    "q,k,v,text",
    [
        (like(1, 9, 2, 24), like(1, 9, 2, 24), like(1, 9, 2, 24), "a multiple of 16"),
        (like(9, 2, 16), like(9, 2, 16), like(9, 2, 16), "[batch, length, heads, dim], got"),
        (like(1, 9, 3, 16), like(1, 9, 2, 16), like(1, 9, 2, 16), "a divisor of 3"),
        (like(1, 9, 2, 16), like(1, 8, 2, 16), like(1, 8, 2, 16), "key must be [1, 9,"),
        (like(1, 9, 2, 16), like(1, 9, 2, 16), like(1, 9, 1, 16), "value must be [1, 9, 2, 16]"),
        (like(1, 9, 2, 16), like(1, 9, 2, 16).half(), like(1, 9, 2, 16), "must be float32"),
        (like(1, 9, 0, 16), like(1, 9, 2, 16), like(1, 9, 2, 16), "a divisor of 0"),
        (like(1, 9, 2, 32)[..., ::2], like(1, 9, 2, 16), like(1, 9, 2, 16), "contiguous along"),
        (*(like(1, 9, 2, 16, dtype=torch.float64),) * 3, "float32, bfloat16 or float16"),
    ],
)
def test_refusals(q, k, v, text):
    with pytest.raises(RuntimeError) as error:
        ops._causal_attention(q, k, v, 0.25)
    assert text in str(error.value)


def test_refusals_of_the_gradient():
    x, lse = like(1, 9, 2, 16), like(1, 2, 9)
    for grad, out, sums, text in (
        (like(1, 9, 2, 8), x, lse, "grad must be [1, 9, 2, 16]"),
        (x, like(1, 9, 16, 2).mT, lse, "out must be contiguous"),
        (x, x, like(1, 9, 2), "lse must be a contiguous float32 [1, 2, 9]"),
        (x, x, lse.double(), "got float64"),
    ):
        with pytest.raises(RuntimeError) as error:
            ops._causal_attention_grad(grad, x, x, x, out, sums, 0.25)
        assert text in str(error.value)
