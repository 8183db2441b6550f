"""The small ops of a decode step (csrc/decoder_ops) against float64 and against torch's own."""

import nibblock  # noqa: F401  (registers the ops)
import pytest
import torch
import torch.nn.functional as F
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
    close(ops._rms_norm(x, weight, 1e-5), norm64(x, weight, 1e-5))
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
    expected = y.clone()
    expected[:, : heads * dim] = (q * cos[:, None] + turned * sin[:, None]).flatten(1)
    ops._rotate_(y, cos, sin, heads)
    assert torch.equal(y, expected)  # the columns behind the heads too


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype):
    width, start = 37, 48
    y = torch.cat([torch.linspace(-110, 110, 85 * 12), torch.randn(85 * 8)]).view(-1, 85).to(dtype)
    gate, up = y[:, :width], y[:, start : start + width]
    actual = ops._silu_mul(y, width, start)
    exact = F.silu(gate.double()) * up.double()
    # Twice rounded, as torch's two calls.
    bound = 2 * ULP[dtype] * exact.abs() + (6e-8 if dtype == torch.float16 else 1e-33) * 110
    assert ((actual.double() - exact).abs() <= bound).all()


def test_nan_stays():
    y = torch.ones(1, 8)
    y[0, 1] = y[0, 6] = float("nan")
    assert ops._silu_mul(y, 4, 4).isnan().tolist() == [[False, True, True, False]]
    assert ops._rms_norm(y, torch.ones(8), 1e-5).isnan().all()


CALLS = [
    ("_rms_norm", (torch.randn(2, 3, 20), torch.randn(20), 1e-6)),
    ("_add_rms_norm", (torch.randn(3, 20), torch.randn(3, 20), torch.randn(20), 1e-6)),
    ("_rotate_", (torch.randn(3, 40), torch.randn(1, 8), torch.randn(1, 8), 5)),
    ("_silu_mul", (torch.randn(3, 40), 20, 20)),
]


@pytest.mark.parametrize("op,arguments", CALLS, ids=[c[0] for c in CALLS])
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
        ("_rotate_", (torch.randn(2, 8), torch.randn(3, 4), torch.randn(3, 4), 2), "cos and sin"),
        ("_rotate_", (torch.randn(2, 8), torch.randn(1, 4), torch.randn(1, 4), 3), "3 heads of 4"),
        ("_silu_mul", (torch.randn(2, 8), 5, 4), "y must have 9 columns, got [2, 8]"),
    ],
)
def test_refusals(op, arguments, text):
    before = arguments[0].clone()
    with pytest.raises(RuntimeError) as error:
        getattr(ops, op)(*arguments)
    assert text in str(error.value)
    assert torch.equal(arguments[0], before)
