"""The small ops of a decode step (csrc/decoder_ops) against float64 and against torch's own."""

import nibblock  # noqa: F401  (registers the ops)
import pytest
import torch
import torch.nn.functional as F
from harness import isa, native
from hypothesis import given, settings
from hypothesis import strategies as st

ops = torch.ops.nibblock
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A unit in the last place of each, and float32's own arithmetic around it.
ULP = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def close(actual, exact):
    assert actual.shape == exact.shape
    bound = ULP[actual.dtype] * exact.abs() + 1e-30
    assert ((actual.double() - exact).abs() <= bound).all()


def norm64(x, weight, eps):
    x = x.double()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(0, 4), max_size=2), width=st.integers(1, 131), seed=st.integers(0, 9)
)
def test_norms(dtype, shape, width, seed):
    torch.manual_seed(seed)
    x, delta = (torch.randn(*shape, width).to(dtype) for _ in range(2))
    weight = torch.randn(width).to(dtype)
    y = ops._rms_norm_forward(x, weight, 1e-5)
    close(y, norm64(x, weight, 1e-5))
    assert torch.equal(ops._rms_norm(x, weight, 1e-5), y)
    total, y = ops._add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    close(y, norm64(x + delta, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables", ["one", "each"])
def test_rotation_is_bitwise_torchs(dtype, tables):
    rows, heads, dim, columns = 5, 3, 16, 80
    y = torch.randn(rows, columns).to(dtype)
    cos, sin = torch.randn(2, rows if tables == "each" else 1, dim).to(dtype)
    q = y[:, : heads * dim].view(rows, heads, dim)
    turned = torch.cat((-q[..., dim // 2 :], q[..., : dim // 2]), -1)
    expected = (q * cos[:, None] + turned * sin[:, None]).flatten(1)
    x = y[:, : heads * dim].contiguous()
    assert torch.equal(ops._rotated_forward(x, cos, sin, False), expected)
    assert torch.equal(ops._rotated(x, cos, sin, False), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_product(dtype):
    y = torch.cat([torch.linspace(-110, 110, 85 * 12), torch.randn(85 * 8)]).view(-1, 85).to(dtype)
    gate, up = y[:, :37].contiguous(), y[:, 48:].contiguous()
    actual = ops._silu_product_forward(gate, up)
    assert torch.equal(ops._silu_product(gate, up), actual)
    exact = F.silu(gate.double()) * up.double()
    # Twice rounded, as torch's two calls.
    bound = 2 * ULP[dtype] * exact.abs() + (6e-8 if dtype == torch.float16 else 1e-33) * 110
    assert ((actual.double() - exact).abs() <= bound).all()


def attention64(q, k, v, scale):
    """By the formula, in float64."""
    k, v = (t.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return torch.softmax(scale * q.double() @ k.transpose(-1, -2), -1) @ v


@pytest.mark.parametrize("dtype", DTYPES[:2])
@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(0, 3),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 5),
    keys=st.one_of(st.integers(1, 40), st.integers(500, 700)),
    dim=st.sampled_from((8, 16, 40, 64, 80, 128)),
    size=st.sampled_from((0.1, 1.0, 30.0)),
    seed=st.integers(0, 99),
)
def test_attention(dtype, batch, kv_heads, group, keys, dim, size, seed):
    torch.manual_seed(seed)
    # Heads side by side in one row, as a decode step has them; a cache with room behind the keys.
    heads = kv_heads * group
    q = (torch.randn(batch, 1, heads * dim) * size).to(dtype).view(batch, 1, heads, dim)
    q = q.transpose(1, 2)
    k, v = torch.randn(2, batch, kv_heads, keys + 3, dim).to(dtype)[..., :keys, :]
    scale = dim**-0.5
    actual = ops._attend(q, k, v, scale)
    assert actual.is_contiguous()
    assert (actual.shape, actual.dtype) == (q.shape, dtype)
    exact = attention64(q, k, v, scale)
    # A score is a sum of dim products; its error moves its weight by as much again.
    scores = scale * q.double().abs() @ k.double().abs().repeat_interleave(group, 1).mT
    error = 2.0**-22 * (8 + scores.amax(-1, keepdim=True)) * 2
    bound = error * attention64(q, k, v.abs(), scale) + ULP[dtype] * exact.abs() + 1e-30
    assert ((actual.double() - exact).abs() <= bound).all()


def test_attention_has_one_result_at_any_level_and_thread_count():
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 12, 1, 64), torch.randn(2, 4, 999, 64), torch.randn(2, 4, 999, 64)
    results = []
    for level in ("scalar", native.cpu_isa()):
        for threads in (1, 2, 5):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            with isa(level):
                results.append(ops._attend(q, k, v, 0.125))
            torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_attention_keeps_what_is_not_finite():
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    k[0, 1, 3, 5] = float("nan")
    v[1, 0, 2, 7] = float("inf")
    y = ops._attend(q, k, v, 0.25)
    assert y[0, 2:].isnan().all()
    assert y[0, :2].isfinite().all()
    assert (y[1, :2, 0, 7] == float("inf")).all()
    assert y[1].isfinite().sum() == y[1].numel() - 2
    k[0, 1, 3, 5] = float("-inf")  # where q is negative the score is +inf: NaN, as torch has it
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(ops._attend(q, k, v, 0.25), expected, equal_nan=True)
    k[..., 0], q = float("-inf"), q.abs()  # no key has a finite score
    assert ops._attend(q, k, v, 0.25).isnan().all()


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 5),
    width=st.one_of(st.integers(1, 80), st.integers(20_000, 20_020)),
    size=st.sampled_from((0.1, 5.0, 60.0)),
    seed=st.integers(0, 99),
)
def test_softmax_gradient(rows, width, size, seed):
    torch.manual_seed(seed)
    scores = torch.randn(rows, width) * size
    labels = torch.randint(width, (rows,))
    exact = scores.double().requires_grad_()
    losses64 = F.cross_entropy(exact, labels, reduction="none")
    losses64.sum().backward()
    got = scores.clone()
    losses = ops._softmax_grad_(got, labels)
    # A score's own last place is what its exponential can be wrong by.
    bound = 2.0**-22 * (4 + 2 * scores.abs().amax(-1, keepdim=True)) if rows else torch.ones(0, 1)
    assert ((losses.double() - losses64.detach()).abs() <= bound[:, 0] * (1 + losses64)).all()
    chance = exact.grad + F.one_hot(labels, width)
    assert ((got.double() - exact.grad).abs() <= bound * chance + 2.0**-23).all()


def test_softmax_gradient_has_one_result_at_any_level_and_thread_count():
    torch.manual_seed(0)
    scores, labels = torch.randn(70, 999) * 9, torch.randint(999, (70,))
    results, before = [], torch.get_num_threads()
    for level in ("scalar", native.cpu_isa()):
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with isa(level):
                got = scores.clone()
                results.append((ops._softmax_grad_(got, labels), got))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0]))


def test_softmax_gradient_of_what_is_not_finite():
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[0.0, nan, 1.0], [inf, 0.0, 1.0], [-inf] * 3, [-inf, 0.0, -inf]])
    labels = torch.tensor([0, 1, 2, 1])
    got = rows.clone()
    losses = ops._softmax_grad_(got, labels)
    assert losses[:3].isnan().all()
    assert losses[3] == 0
    assert got[:3].isnan().any(-1).all()
    torch.testing.assert_close(got[3], torch.zeros(3))


def test_nan_stays():
    y = torch.ones(1, 8)
    y[0, 1] = y[0, 6] = float("nan")
    product = ops._silu_product_forward(y[:, :4].contiguous(), y[:, 4:].contiguous())
    assert product.isnan().tolist() == [[False, True, True, False]]
    assert ops._rms_norm(y, torch.ones(8), 1e-5).isnan().all()


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


CALLS = [
    ("_rms_norm", (torch.randn(2, 3, 20), torch.randn(20), 1e-6)),
    ("_add_rms_norm", (torch.randn(3, 20), torch.randn(3, 20), torch.randn(20), 1e-6)),
    ("_rms_norm_forward", (torch.randn(2, 3, 20), torch.randn(20), 1e-6)),
    ("_rotated_forward", (torch.randn(3, 40), torch.randn(1, 8), torch.randn(1, 8), False)),
    ("_silu_product_forward", tuple(torch.randn(2, 3, 20))),
    ("_rms_norm", (leaf(2, 3, 20), leaf(20), 1e-6)),
    ("_rms_norm_grad", (torch.randn(3, 20), torch.randn(3, 20), torch.randn(20), 1e-6, True)),
    ("_rms_norm_grad", (torch.randn(3, 20), torch.randn(3, 20), torch.randn(20), 1e-6, False)),
    ("_rotated", (leaf(3, 40), torch.randn(1, 8), torch.randn(1, 8), False)),
    ("_silu_product", (leaf(3, 20), leaf(3, 20))),
    ("_silu_product_grad", tuple(torch.randn(3, 3, 20))),
    ("_softmax_grad_", (torch.randn(3, 20), torch.tensor([0, 19, 4]))),
    ("_attend", (torch.randn(2, 6, 1, 16), *torch.randn(2, 2, 3, 7, 16), 0.25)),
]


@pytest.mark.parametrize("op,arguments", CALLS, ids=[f"{i}-{c[0]}" for i, c in enumerate(CALLS)])
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(ops, op).default, arguments)


@pytest.mark.parametrize(
    "op,arguments,text",
    [
        ("_rms_norm", (torch.randn(2, 5), torch.randn(4), 0.0), "weight must be [5], got [4]"),
        ("_rms_norm", (torch.randn(5, 2).t(), torch.randn(5), 0.0), "x must be contiguous"),
        ("_rms_norm", (torch.randn(2, 5), torch.randn(5).double(), 0.0), "weight must be float32"),
        (
            "_add_rms_norm",
            (torch.randn(2, 5), torch.randn(1, 5), torch.randn(5), 0.0),
            "delta must be [2, 5], got [1, 5]",
        ),
        ("_softmax_grad_", (torch.randn(2, 5).half(), torch.zeros(2).long()), "must be float32"),
        ("_softmax_grad_", (torch.randn(5, 2).t(), torch.zeros(2).long()), "contiguous"),
        ("_softmax_grad_", (torch.randn(2, 5), torch.zeros(3).long()), "int64 [2], got int64 [3]"),
        ("_softmax_grad_", (torch.randn(2, 5), torch.zeros(2)), "int64 [2], got float32 [2]"),
        ("_softmax_grad_", (torch.randn(2, 5), torch.tensor([0, 5])), "in [0, 5), got 5"),
        ("_softmax_grad_", (torch.randn(2, 5), torch.tensor([-1, 0])), "in [0, 5), got -1"),
        ("_rotated", (torch.randn(2, 10), *torch.randn(2, 1, 4), False), "whole heads of 4"),
        ("_rotated", (torch.randn(4, 8), *torch.randn(2, 3, 4), False), "[a divisor of 4, even]"),
        ("_silu_product", (torch.randn(2, 8), torch.randn(8, 2)), "up must be [2, 8], got [8, 2]"),
        ("_silu_product", (torch.randn(2, 8).t(), torch.randn(8, 2)), "gate must be contiguous"),
        (
            "_silu_product_grad",
            (torch.randn(2, 8).half(), torch.randn(2, 8), torch.randn(2, 8)),
            "grad must be float32 as x, got float16",
        ),
        (
            "_rms_norm_grad",
            (torch.randn(1, 5), torch.randn(2, 5), torch.randn(5), 0.0, True),
            "grad must be [2, 5], got [1, 5]",
        ),
        ("_attend", (*(torch.randn(1, 2, 2, 8),) * 3, 1.0), "[batch, heads, 1, a multiple of 8]"),
        ("_attend", (*(torch.randn(1, 2, 1, 9),) * 3, 1.0), "[batch, heads, 1, a multiple of 8]"),
        (
            "_attend",
            (torch.randn(1, 4, 1, 8), *torch.randn(2, 1, 3, 5, 8), 1.0),
            "key must be [1, a divisor of 4, 1 or more, 8], got [1, 3, 5, 8]",
        ),
        (
            "_attend",
            (torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 4, 8), 1.0),
            "value must be [1, 2, 5, 8] as key, got [1, 2, 4, 8]",
        ),
        ("_attend", (*(torch.randn(1, 2, 1, 8).half(),) * 3, 1.0), "float32 or bfloat16"),
    ],
)
def test_refusals(op, arguments, text):
    before = arguments[0].clone()
    with pytest.raises(RuntimeError) as error:
        getattr(ops, op)(*arguments)
    assert text in str(error.value)
    assert torch.equal(arguments[0], before)
