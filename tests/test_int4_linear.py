"""int4_linear and its companions as torch operators, at every level of the CPU, against float64."""

from __future__ import annotations

import itertools

import nibblock as nb
import numpy as np
import pytest
import reference as ref
import torch
from harness import (
    FORMATS,
    FORMS,
    GROUPS,
    TORCH,
    X_DTYPES,
    as_numpy,
    check_op,
    dx_arguments,
    level_params,
    native,
    op_arguments,
    random_x,
    torch_packed,
)
from hypothesis import given
from hypothesis import strategies as st
from nibblock.ops._checks import format_code

LEVEL = pytest.mark.parametrize("level", level_params())


@LEVEL
@pytest.mark.parametrize("compute", ["bf16", "int8"])
def test_values_at_every_level(level, compute):
    """The torch op, its autograd-free twin and dx, for a dealt subset of all shapes and formats."""
    native.set_cpu_isa(level)
    rng = np.random.default_rng(20)
    shapes = itertools.product((1, 2, 4, 5, 9, 17, 70), (1, 17, 100), (3, 64, 118, 129, 576))
    for i, (m, n, k) in enumerate(shapes):
        w = ref.random_weight(rng, n, k, *FORMATS[(7 * i) % len(FORMATS)])
        packed, arguments = torch_packed(w), op_arguments(w, compute)
        x_dtype, bias_dtype = X_DTYPES[i % 3], (None, *X_DTYPES)[i % 4]
        x = random_x(rng, (m, k), x_dtype)
        bias = random_x(rng, (n,), bias_dtype) if bias_dtype else None
        what = f"{level} m={m} {w.format} x={x_dtype} bias={bias_dtype} {compute}"
        y = nb.ops.int4_linear(x, packed, bias, **arguments)
        check_op(y, x, w, bias, compute=compute, what=what)
        twin = torch.ops.nibblock._int4_linear_forward(
            x, packed, bias, format_code(*arguments.values())
        )
        assert torch.equal(twin, y), f"{what}: the autograd-free twin differs"
        grad = random_x(rng, (m, n), x_dtype)
        dx = nb.ops.int4_linear_dx(grad, packed, **dx_arguments(w, compute))
        check_op(dx, grad, w, compute=compute, transposed=True, what=f"dx {what}")


def test_bf16_is_the_default_compute():
    rng = np.random.default_rng(21)
    w = ref.random_weight(rng, 40, 200, 32)
    x, arguments = random_x(rng, (6, 200), "float32"), op_arguments(w)
    y = nb.ops.int4_linear(x, torch_packed(w), **arguments)
    del arguments["compute"]
    assert torch.equal(nb.ops.int4_linear(x, torch_packed(w), **arguments), y)


@LEVEL
@pytest.mark.parametrize(
    "lead",
    [
        (),
        (1,),
        (5,),
        (2, 3),
        (1, 1, 1),
        (2, 1, 3),
        (2, 2, 2, 2),
        (1, 2, 1, 1, 1, 1, 1, 1, 3),
        (0,),
        (2, 0, 3),
    ],
)
def test_leading_dimensions(level, lead):
    native.set_cpu_isa(level)
    rng = np.random.default_rng(22)
    w = ref.random_weight(rng, 33, 70, 32, 4, True)
    packed, bias = torch_packed(w), random_x(rng, (33,), "float32")
    for x_dtype in X_DTYPES:
        x = random_x(rng, (*lead, 70), x_dtype)
        y = nb.ops.int4_linear(x, packed, bias, **op_arguments(w))
        check_op(y, x, w, bias, what=f"{lead}")
        grad = random_x(rng, (*lead, 33), x_dtype)
        dx = nb.ops.int4_linear_dx(grad, packed, **dx_arguments(w))
        check_op(dx, grad, w, transposed=True, what=f"dx {lead}")


def views(rng, shape, dtype):
    """Name -> tensor of this shape that does not lie contiguously in memory."""
    *lead, k = shape
    lead = tuple(lead)
    x = random_x(rng, shape, dtype)
    wide = random_x(rng, (*lead, k + 11), dtype)
    flat = random_x(rng, (int(np.prod(shape)) + 3,), dtype)
    steps = random_x(rng, (*lead, 2 * k), dtype)
    return {
        "row stride": wide[..., 4 : 4 + k],
        "transposed": random_x(rng, (k, *lead[1:], lead[0]), dtype).transpose(0, -1),
        "expanded": random_x(rng, (1, *lead[1:], k), dtype).expand(shape),
        "expanded rows": random_x(rng, (*lead[:-1], 1, k), dtype).expand(shape),
        "every other column": steps[..., ::2],
        "every other row": random_x(rng, (2 * lead[0], *lead[1:], k), dtype)[::2],
        "storage offset 1": flat[1:-2].reshape(shape),
        "flipped": x.flip(-1),
        "negated lazily": torch._neg_view(x),
        "one column for all": random_x(rng, (*lead, 1), dtype).expand(shape),
        "permuted lead": random_x(rng, (*lead[::-1], k), dtype).permute(
            *range(len(lead) - 1, -1, -1), len(lead)
        ),
    }


@LEVEL
@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_strided_inputs(level, x_dtype):
    """Any strides give bitwise what the contiguous copy gives, and the input stays as it was."""
    native.set_cpu_isa(level)
    rng = np.random.default_rng(23)
    w = ref.random_weight(rng, 45, 97, 32, 4, True)
    packed = torch_packed(w)
    for shape in ((9, 97), (3, 2, 97), (1, 97)):
        for name, x in views(rng, shape, x_dtype).items():
            assert x.shape == shape
            before = x.clone()
            y = nb.ops.int4_linear(x, packed, **op_arguments(w))
            what = f"{name} {shape}"
            assert torch.equal(x, before), what
            assert torch.equal(y, nb.ops.int4_linear(before, packed, **op_arguments(w))), what
            check_op(y, x, w, what=what)
    for shape in ((9, 45), (3, 2, 45)):
        for name, grad in views(rng, shape, x_dtype).items():
            dx = nb.ops.int4_linear_dx(grad, packed, **dx_arguments(w))
            check_op(dx, grad, w, transposed=True, what=f"dx {name} {shape}")


def test_strided_bias_and_misplaced_packed():
    """A strided bias, and a blob that starts anywhere in memory or is strided itself."""
    rng = np.random.default_rng(24)
    w = ref.random_weight(rng, 45, 97, 32, 4, True)
    packed, x = torch_packed(w), random_x(rng, (3, 97), "float32")
    bias = random_x(rng, (90,), "float32")[::2]
    y = nb.ops.int4_linear(x, packed, bias, **op_arguments(w))
    assert torch.equal(y, nb.ops.int4_linear(x, packed, bias.clone(), **op_arguments(w)))
    for shift in (1, 2, 4, 16):
        room = torch.zeros(packed.numel() + shift, dtype=torch.uint8)
        room[shift:] = packed
        moved = nb.ops.int4_linear(x, room[shift:], bias, **op_arguments(w))
        assert torch.equal(moved, y), f"packed shifted by {shift} bytes"
    steps = torch.zeros(2 * packed.numel(), dtype=torch.uint8)
    steps[::2] = packed
    assert torch.equal(nb.ops.int4_linear(x, steps[::2], bias, **op_arguments(w)), y)


@LEVEL
def test_empty_inputs(level):
    """No rows, no out_features, no in_features: right shapes, and y = bias for an empty sum."""
    native.set_cpu_isa(level)
    rng = np.random.default_rng(25)
    for n, k, affine, bits in itertools.product((0, 5), (0, 40), (False, True), (4, 8)):
        w = ref.random_weight(rng, n, k, 32, bits, affine)
        packed = torch_packed(w)
        assert packed.numel() == ref.geometry(**w.format)["bytes"]
        bias = random_x(rng, (n,), "float32")
        for m in (0, 3):
            what = f"m={m} n={n} k={k}"
            x = random_x(rng, (m, k), "float32")
            y = nb.ops.int4_linear(x, packed, bias, **op_arguments(w))
            assert list(y.shape) == [m, n], what
            if k == 0:
                assert torch.equal(y, bias.expand(m, n)), what
                without = nb.ops.int4_linear(x, packed, **op_arguments(w))
                assert torch.equal(without, torch.zeros(m, n)), what
            grad = random_x(rng, (m, n), "float32")
            dx = nb.ops.int4_linear_dx(grad, packed, **dx_arguments(w))
            assert list(dx.shape) == [m, k], what
            if n == 0:
                assert torch.equal(dx, torch.zeros(m, k)), what
            assert list(
                nb.ops.int4_dequantize(packed, out_features=n, in_features=k, **format_of(w)).shape
            ) == [n, k], what


def format_of(w):
    return {
        "group_size": w.group_size,
        "bits": w.bits,
        "affine": w.affine,
        "scale_dtype": TORCH[w.scale_dtype],
    }


@LEVEL
@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_non_finite_rows(level, x_dtype):
    """What a dense linear gives, in that row alone."""
    native.set_cpu_isa(level)
    rng = np.random.default_rng(26)
    w = ref.random_weight(rng, 30, 130, 64, 4, True)
    packed, dense = torch_packed(w), w.dense()
    for m in (1, 5, 34):
        clean = random_x(rng, (m, 130), x_dtype)
        base = nb.ops.int4_linear(clean, packed, **op_arguments(w))
        for value in (float("nan"), float("inf"), float("-inf")):
            x = clean.clone()
            row = m // 2
            x[row, 77] = value
            y = nb.ops.int4_linear(x, packed, **op_arguments(w))
            others = torch.arange(m) != row
            assert torch.equal(y[others], base[others]), f"m={m} {value}: another row changed"
            with np.errstate(invalid="ignore"):
                want = (value * dense[:, 77]).astype(np.float32)
            got = as_numpy(y[row])
            assert np.array_equal(got, want, equal_nan=True), f"m={m} {value}: {got[:5]} {want[:5]}"


@LEVEL
def test_zeros_give_exactly_the_bias(level):
    native.set_cpu_isa(level)
    rng = np.random.default_rng(27)
    w = ref.random_weight(rng, 30, 130, 64, 4, True)
    for m, x_dtype, bias_dtype in itertools.product((1, 4, 40), X_DTYPES, X_DTYPES):
        bias = random_x(rng, (30,), bias_dtype)
        x = torch.zeros(m, 130, dtype=TORCH[x_dtype])
        y = nb.ops.int4_linear(x, torch_packed(w), bias, **op_arguments(w))
        assert torch.equal(y, bias.float().to(TORCH[x_dtype]).expand(m, 30))


def close_to_dense_bf16(x, weight, bias, compute_level):
    """Root mean square errors of our op and of torch's bfloat16 linear, both against float64."""
    y = nb.ops.int4_linear(x, torch_packed(weight), bias, **op_arguments(weight))
    w16 = torch.from_numpy(weight.dense()).to(torch.bfloat16)
    b16 = None if bias is None else bias.to(torch.bfloat16)
    dense = torch.nn.functional.linear(x.to(torch.bfloat16), w16, b16)
    exact = ref.int4_linear(as_numpy(x), weight, None if bias is None else as_numpy(bias))
    return ref.rms(as_numpy(y) - exact), ref.rms(as_numpy(dense) - exact)


@LEVEL
@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_error_is_within_that_of_torchs_bfloat16_linear(level, x_dtype):
    """The contract: at most 1.1 times the error of the dense bfloat16 linear on the same weight."""
    native.set_cpu_isa(level)
    rng = np.random.default_rng(28)
    for (m, n, k), group, affine in itertools.product(
        ((1, 700, 512), (8, 200, 1024), (64, 96, 576)), (32, 128, -1), (False, True)
    ):
        w = ref.random_weight(rng, n, k, group, 4, affine)
        x = random_x(rng, (m, k), x_dtype)
        ours, theirs = close_to_dense_bf16(x, w, random_x(rng, (n,), x_dtype), level)
        assert ours <= 1.1 * theirs, (
            f"m={m} k={k} group={group} affine={affine}: {ours} vs {theirs}"
        )


@LEVEL
def test_error_on_activations_with_outliers(level):
    """Activations of a language model: a few channels a thousand times the others."""
    native.set_cpu_isa(level)
    rng = np.random.default_rng(29)
    w = ref.random_weight(rng, 200, 576, 128, 4, True)
    for m in (1, 4, 40):
        x = rng.normal(0, 1, (m, 576)).astype(np.float32)
        x[:, rng.integers(0, 576, 4)] *= 1000
        ours, theirs = close_to_dense_bf16(torch.from_numpy(x), w, None, level)
        assert ours <= 1.1 * theirs, f"m={m}: {ours} vs {theirs}"


@given(
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(1, 80),
    st.integers(1, 300),
    st.sampled_from(FORMS),
    st.booleans(),
    st.sampled_from(X_DTYPES),
    st.booleans(),
    st.sampled_from(("bf16", "int8")),
    st.integers(0, 9),
    st.integers(0, 2**16),
)
def test_random_shapes(lead, n, k, form, affine, x_dtype, with_bias, compute, gap, seed):
    rng = np.random.default_rng(seed)
    w = ref.random_weight(rng, n, k, *form, affine)
    x = random_x(rng, (*lead, k + gap), x_dtype)[..., gap // 2 : gap // 2 + k]
    bias = random_x(rng, (n,), x_dtype) if with_bias else None
    y = nb.ops.int4_linear(x, torch_packed(w), bias, **op_arguments(w, compute))
    check_op(y, x, w, bias, compute=compute)


# --- companions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize(bits):
    rng = np.random.default_rng(36)
    for group, affine, scale_dtype in itertools.product(
        GROUPS[bits], (False, True), ("float16", "float32")
    ):
        w = ref.random_weight(rng, 19, 150, group, bits, affine, scale_dtype)
        for name, dtype in TORCH.items():
            out = nb.ops.int4_dequantize(
                torch_packed(w), out_features=19, in_features=150, dtype=dtype, **format_of(w)
            )
            assert out.dtype == dtype
            assert list(out.shape) == [19, 150]
            slack = ref.HALF_ULP[name] * np.abs(w.dense()) + 8 * ref.EPS32 * w.magnitude().max()
            assert (np.abs(as_numpy(out) - w.dense()) <= 1.01 * slack).all(), f"{group} {name}"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("indices_dtype", [torch.int64, torch.int32])
def test_embedding(bits, indices_dtype):
    """Rows of the dequantised weight, bitwise int4_dequantize's, for indices of any shape."""
    rng = np.random.default_rng(37)
    for group, affine in itertools.product((32, 128, -1), (False, True)):
        w = ref.random_weight(rng, 50, 97, group, bits, affine)
        packed = torch_packed(w)
        for dtype in TORCH.values():
            table = nb.ops.int4_dequantize(
                packed, out_features=50, in_features=97, dtype=dtype, **format_of(w)
            )
            for shape in ((), (1,), (7,), (3, 4), (2, 3, 2), (0,), (2, 0)):
                indices = torch.from_numpy(rng.integers(0, 50, shape)).to(indices_dtype)
                out = nb.ops.int4_embedding(
                    indices,
                    packed,
                    num_embeddings=50,
                    embedding_dim=97,
                    dtype=dtype,
                    **format_of(w),
                )
                assert torch.equal(out, table[indices.long()]), f"{group} {shape} {dtype}"
            every_other = torch.from_numpy(rng.integers(0, 50, (4, 6))).to(indices_dtype)[:, ::2]
            out = nb.ops.int4_embedding(
                every_other,
                packed,
                num_embeddings=50,
                embedding_dim=97,
                dtype=dtype,
                **format_of(w),
            )
            assert torch.equal(out, table[every_other.long()])


def test_pack_and_unpack_in_torch():
    rng = np.random.default_rng(38)
    for bits, affine, scale_dtype in itertools.product(
        (4, 8), (False, True), ("float16", "float32")
    ):
        w = ref.random_weight(rng, 21, 75, 32, bits, affine, scale_dtype)
        offsets = torch.from_numpy(w.offsets) if affine else None
        packed = nb.ops.int4_pack(
            torch.from_numpy(w.qweight),
            torch.from_numpy(w.scales),
            offsets,
            in_features=75,
            group_size=32,
            bits=bits,
        )
        assert packed.dtype == torch.uint8
        assert packed.ndim == 1
        assert packed.data_ptr() % 64 == 0
        assert packed.numpy().tobytes() == ref.pack(w).tobytes()
        q, s, o = nb.ops.int4_unpack(packed, out_features=21, in_features=75, **format_of(w))
        assert q.numpy().tobytes() == w.qweight.tobytes()
        assert s.dtype == TORCH[scale_dtype]
        assert s.numpy().tobytes() == w.scales.tobytes()
        assert (o is None) == (not affine)
        assert o is None or o.numpy().tobytes() == w.offsets.tobytes()
