"""Products of a few rows with int4 siblings, and what follows them, in one op: as call by call."""

from __future__ import annotations

import nibblock as nb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ops = torch.ops.nibblock
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(n, k, bias, **form):
    linear = torch.nn.Linear(k, n, bias=bias)
    return nb.Int4Linear.from_linear(linear, **{"group_size": 32, **form})


def lists(layers):
    """(packed, biases, formats) as the ops take them."""
    biases = [m.bias.detach() for m in layers if m.bias is not None]
    return [m.packed for m in layers], biases, [m._code for m in layers]


FORMS = st.sampled_from(
    (
        {},
        {"symmetric": True},
        {"group_size": 64},
        {"bits": 8},
        {"scale_dtype": torch.float16},
        {"compute": "int8"},
        {"group_size": -1, "symmetric": True},
    )
)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(st.integers(0, 3), max_size=2),
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    k=st.integers(1, 100),
    bias=st.booleans(),
    form=FORMS,
    seed=st.integers(0, 9),
)
def test_siblings_are_their_products_side_by_side(dtype, rows, widths, k, bias, form, seed):
    torch.manual_seed(seed)
    layers = [layer(n, k, bias, **form) for n in widths]
    x = torch.randn(*rows, k).to(dtype)
    with torch.no_grad():
        expected = torch.cat([m(x) for m in layers], -1)
    assert torch.equal(ops._int4_siblings(x, None, 0.0, *lists(layers), None, None, 0), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables", [1, 4])
def test_the_first_heads_are_rotated(dtype, tables):
    torch.manual_seed(0)
    # Formats may differ from sibling to sibling.
    layers = [layer(48, 64, True), layer(32, 64, True, bits=8), layer(32, 64, True)]
    x = torch.randn(4, 1, 64).to(dtype)
    cos, sin = torch.randn(2, tables, 16).to(dtype)
    with torch.no_grad():
        q, k, v = (m(x) for m in layers)
    q, k = (ops._rotated_forward(t, cos, sin, False) for t in (q, k))
    got = ops._int4_siblings(x, None, 0.0, *lists(layers), cos, sin, 5)
    assert torch.equal(got, torch.cat((q, k, v), -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (0,), ()])
def test_mlp(dtype, bias, rows):
    torch.manual_seed(0)
    gate, up, down = layer(80, 64, bias), layer(80, 64, bias, bits=8), layer(50, 80, bias)
    x = torch.randn(*rows, 64).to(dtype)
    with torch.no_grad():
        expected = down(ops._silu_product_forward(gate(x), up(x)))
    assert torch.equal(ops._int4_mlp(x, *lists([gate, up, down])), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_siblings_of_the_norm(dtype):
    torch.manual_seed(0)
    layers, x = [layer(48, 64, True), layer(20, 64, True)], torch.randn(3, 64).to(dtype)
    weight = torch.randn(64).to(dtype)
    expected = ops._int4_siblings(
        ops._rms_norm_forward(x, weight, 1e-5), None, 0.0, *lists(layers), None, None, 0
    )
    assert torch.equal(ops._int4_siblings(x, weight, 1e-5, *lists(layers), None, None, 0), expected)


def heads(dtype, batch=3):
    """query, key, value of 4 and 2 heads of 16, and 9 keys."""
    q = torch.randn(batch, 1, 4, 16).to(dtype).transpose(1, 2)
    return q, *torch.randn(2, batch, 2, 9, 16).to(dtype)


def end_layers(bias, width=48):
    sizes = ((width, 64), (80, width), (80, width), (width, 80))
    return [layer(n, k, bias, bits=8 if n == 80 else 4) for n, k in sizes]


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_layer_end(dtype, bias, batch):
    torch.manual_seed(0)
    layers = o, gate, up, down = end_layers(bias)
    hidden, weight = torch.randn(batch, 1, 48).to(dtype), torch.randn(48).to(dtype)
    qkv = heads(dtype, batch)
    with torch.no_grad():
        delta = o(ops._attend(*qkv, 0.25).reshape(batch, 1, 64))
        total, y = ops._add_rms_norm(hidden, delta, weight, 1e-5)
        expected = total + down(ops._silu_product_forward(gate(y), up(y)))
    before = hidden.clone()
    assert torch.equal(
        ops._int4_layer_end(*qkv, 0.25, hidden, weight, 1e-5, *lists(layers)), expected
    )
    assert torch.equal(hidden, before)


def test_one_result_at_any_thread_count():
    torch.manual_seed(0)
    layers = [layer(1536, 576, False), layer(1536, 576, False), layer(576, 1536, False)]
    x = torch.randn(1, 576)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops._int4_mlp(x, *lists(layers)))
    torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_siblings_that_several_threads_share(dtype, rows):
    torch.manual_seed(0)
    layers = [layer(200, 576, True), layer(576, 576, True, bits=8), layer(33, 576, True)]
    layers.append(layer(300, 576, True, group_size=64, symmetric=True, compute="int8"))
    x = torch.randn(rows, 576).to(dtype)
    with torch.no_grad():
        expected = torch.cat([m(x) for m in layers], -1)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(
            ops._int4_siblings(x, None, 0.0, *lists(layers), None, None, 0), expected
        )
    torch.set_num_threads(before)


def test_opcheck():
    layers = [layer(32, 64, True), layer(32, 64, True), layer(64, 32, True)]
    x = torch.randn(2, 64)
    tables = torch.randn(1, 16), torch.randn(1, 16)
    for norm in (None, torch.randn(64)):
        arguments = (x, norm, 1e-5, *lists(layers[:2]), *tables, 3)
        torch.library.opcheck(ops._int4_siblings.default, arguments)
    torch.library.opcheck(ops._int4_mlp.default, (x, *lists(layers)))
    arguments = (*heads(torch.float32), 0.25, torch.randn(3, 1, 48), torch.randn(48), 1e-5)
    torch.library.opcheck(ops._int4_layer_end.default, (*arguments, *lists(end_layers(True))))


A, B, C = layer(32, 64, False), layer(16, 32, True), layer(16, 96, False)
ONE = (None, 0.0, *lists([A]))
END = (*heads(torch.float32), 0.25)
X = torch.randn(2, 64)


@pytest.mark.parametrize(
    "op,arguments,text",
    [
        ("siblings", (torch.randn(2, 96), *ONE, None, None, 0), "packed must be"),
        ("siblings", (X.double(), *ONE, None, None, 0), "x must be float32"),
        ("siblings", (torch.randn(64, 2).t(), *ONE, None, None, 0), "x must be contiguous"),
        ("siblings", (torch.tensor(1.0), *ONE, None, None, 0), "at least 1 dimension"),
        ("siblings", (X, None, 0.0, [A.packed], [], [], None, None, 0), "must hold 1 as packed"),
        ("siblings", (X, None, 0.0, [], [], [], None, None, 0), "1 weight or more"),
        ("siblings", (X, torch.randn(32), 0.0, *ONE[2:], None, None, 0), "weight must be [64]"),
        (
            "siblings",
            (X, None, 0.0, [A.packed] * 2, [torch.ones(32)], [A._code] * 2, None, None, 0),
            "biases must hold 2 as packed, or none, got 1",
        ),
        (
            "siblings",
            (X, *ONE, torch.randn(1, 16), torch.randn(1, 16), 3),
            "y must hold 3 heads of 16, got [2, 32]",
        ),
        ("siblings", (X, *ONE, *torch.randn(2, 3, 16), 2), "[a divisor of 2, even]"),
        ("mlp", (X, *lists([A])), "packed must hold gate, up and down, got 1"),
        ("mlp", (X, *lists([A, C, C])), "packed must be"),
        ("mlp", (X, *lists([A, layer(16, 64, False), C])), "as many columns, got 32 and 16"),
        (
            "layer_end",
            (*END, torch.randn(3, 48), torch.randn(48), 0.0, *lists([A])),
            "packed must hold o, gate, up and down, got 1",
        ),
        (
            "layer_end",
            (*END, torch.randn(3, 32), torch.randn(32), 0.0, *lists(end_layers(False))),
            "hidden must be 3 rows of the 48 and 48 columns of o and down, got [3, 32]",
        ),
        (
            "layer_end",
            (*END, torch.randn(2, 48), torch.randn(48), 0.0, *lists(end_layers(False))),
            "hidden must be 3 rows",
        ),
        (
            "layer_end",
            (*END, torch.randn(3, 48).half(), torch.randn(48), 0.0, *lists(end_layers(False))),
            "hidden must be float32",
        ),
    ],
)
def test_refusals(op, arguments, text):
    with pytest.raises(RuntimeError) as error:
        getattr(ops, f"_int4_{op}")(*arguments)
    assert text in str(error.value)
