"""Every row of int4_linear's tables, forced by its id without torch in between, against float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference as ref
from harness import (
    FORMATS,
    FORMS,
    X_DTYPES,
    load,
    loss_of_single_weights,
    operand_of,
    own_dtype,
    packed_of,
    refusal,
    row_params,
    rows,
    run,
    store,
)
from hypothesis import given
from hypothesis import strategies as st
from nibblock._errors import BackendUnavailable

# The kernels cut their work at 16 rows n, 64 and 128 k, and 6 or 16 rows of x.
MS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 64, 70, 118)
NS = (1, 3, 15, 16, 17, 33, 64, 100, 118)
KS = (1, 3, 17, 31, 32, 33, 63, 64, 65, 100, 118, 127, 128, 129, 256, 300, 576)
BIASES = (None, *X_DTYPES)


def one_call(which, kernel_id, rng, m, weight, x_dtype, bias_dtype=None, compute="bf16", what=""):
    """Runs a row on random rows and checks the result; False when it does not serve the call."""
    packed = packed_of(weight)
    if refusal(which, kernel_id, m, weight, x_dtype, compute):
        return False
    width = weight.in_features if which == "forward" else weight.out_features
    x = store(rng.normal(0, 1, (m, width)).astype(np.float32), x_dtype)
    bias = None
    if bias_dtype and which == "forward":
        bias = store(rng.normal(0, 1, weight.out_features).astype(np.float32), bias_dtype)
    y = run(which, kernel_id, x, weight, packed, bias, compute, x_dtype)
    what = (
        f"{kernel_id} m={m} n={weight.out_features} k={weight.in_features} g={weight.group_size} "
        f"bits={weight.bits} affine={weight.affine} scales={weight.scale_dtype} x={x_dtype} "
        f"bias={bias_dtype} compute={compute} {what}"
    )
    assert y.dtype == x.dtype, what
    ref.check_linear(
        load(y, x_dtype),
        load(x, x_dtype),
        weight,
        None if bias is None else load(bias, bias_dtype),
        dtype=x_dtype,
        operand=operand_of(x_dtype),
        compute=compute,
        transposed=which == "dx",
        what=what,
    )
    return True


@pytest.mark.parametrize("x_dtype", X_DTYPES)
@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_is_right_at_every_shape(which, kernel_id, x_dtype):
    """All M x all K; N, group, bits, symmetry, scales, bias and compute are dealt out in turn."""
    rng = np.random.default_rng(1)
    served = 0
    for i, (m, k) in enumerate(itertools.product(MS, KS)):
        group, bits, affine, scale_dtype = FORMATS[(7 * i) % len(FORMATS)]
        weight = ref.random_weight(rng, NS[i % len(NS)], k, group, bits, affine, scale_dtype)
        for compute in ("bf16", "int8"):
            bias_dtype = BIASES[i % len(BIASES)]
            served += one_call(which, kernel_id, rng, m, weight, x_dtype, bias_dtype, compute)
    if own_dtype(kernel_id, x_dtype) != x_dtype:
        assert not served, f"{kernel_id} served {x_dtype}, which its tiles round"
        return
    assert served >= 100, f"{kernel_id} served {served} calls: the test does not reach it"


@pytest.mark.parametrize("x_dtype", X_DTYPES)
@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_refuses_what_it_would_round(which, kernel_id, x_dtype):
    """bfloat16 tiles would cost another x its precision: forcing them on it is an error."""
    rng = np.random.default_rng(18)
    weight = ref.random_weight(rng, 33, 130, 32)
    width = 130 if which == "forward" else 33
    x = store(rng.normal(0, 1, (8, width)).astype(np.float32), x_dtype)
    compute = "int8" if "int8" in kernel_id else "bf16"
    call = (which, kernel_id, x, weight, packed_of(weight), None, compute, x_dtype)
    if own_dtype(kernel_id, x_dtype) == x_dtype:
        assert run(*call).shape == (8, 163 - width)
        return
    needs = "m >= 5, bfloat16 x" + (", compute bf16" if which == "forward" else "")
    with pytest.raises(BackendUnavailable, match=f"{kernel_id} serves only: {needs}$"):
        run(*call)


@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_is_right_in_every_format(which, kernel_id):
    """The full product of formats, at shapes that leave a remainder everywhere."""
    rng = np.random.default_rng(2)
    served, x_dtype = 0, own_dtype(kernel_id)
    for group, bits, affine, scale_dtype in FORMATS:
        for n, k, m in ((37, 300, 1), (50, 323, 4), (35, 289, 21)):
            weight = ref.random_weight(rng, n, k, group, bits, affine, scale_dtype)
            for compute in ("bf16", "int8"):
                served += one_call(which, kernel_id, rng, m, weight, x_dtype, "float32", compute)
    assert served >= 40, f"{kernel_id} served {served} calls: the test does not reach it"


def bounds_on_single_weights(weight, x_dtype):
    """How far one weight may be off when x is one-hot: its rounding to x's dtype, never a code."""
    in_float32 = 8 * ref.EPS32 * (weight.magnitude() + weight.parts())
    return ref.HALF_ULP[x_dtype] * weight.magnitude() + in_float32


@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_reads_every_code_at_its_place(which, kernel_id):
    """One-hot rows give back single weights, so a misplaced code or scale cannot hide in a sum."""
    rng = np.random.default_rng(15)
    served, x_dtype = 0, own_dtype(kernel_id)
    for i, ((group, bits), affine) in enumerate(itertools.product(FORMS, (False, True))):
        weight = ref.random_weight(rng, 53, 161, group, bits, affine, ("float16", "float32")[i % 2])
        packed = packed_of(weight)
        w, bound = weight.dense(), bounds_on_single_weights(weight, x_dtype)
        bound = bound + loss_of_single_weights(which, kernel_id, weight)
        if which == "forward":
            w, bound = w.T, bound.T  # one-hot in k: row k of the result is w[:, k]
        hot = store(np.eye(len(w)), x_dtype)
        for m, compute in itertools.product(
            (1, 2, 3, 4, 5, 6, 7, 11, 23, len(w)), ("bf16", "int8")
        ):
            if refusal(which, kernel_id, m, weight, x_dtype, compute):
                continue
            served += 1
            parts = [
                run(which, kernel_id, hot[at : at + m], weight, packed, None, compute, x_dtype)
                for at in range(0, len(w) - m + 1, m)
            ]
            y = load(np.concatenate(parts), x_dtype)
            off = np.argwhere(~(np.abs(y - w[: len(y)]) <= bound[: len(y)]))
            assert not off.size, (
                f"{kernel_id} m={m} {weight.format} {compute}: {len(off)} weights are off, "
                f"first {off[0]}: {y[tuple(off[0])]} instead of {w[tuple(off[0])]}"
            )
    assert served >= 60, f"{kernel_id} served {served} calls: the test does not reach it"


@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_at_the_ends_of_the_codes(which, kernel_id):
    """All codes 0 or at their largest, all activations at full scale: no integer sum overflows."""
    rng = np.random.default_rng(16)
    x_dtype = own_dtype(kernel_id)
    for (group, bits), m in itertools.product(FORMS, (1, 5, 20)):
        for fill in (0, (1 << bits) - 1):
            weight = ref.random_weight(rng, 20, 700, group, bits, group == 64)
            weight.qweight = ref.canonical(np.full((20, 700), fill), bits)
            packed = packed_of(weight)
            width = 700 if which == "forward" else 20
            for sign in (np.ones(width), -np.ones(width), np.where(np.arange(width) % 2, 1, -1)):
                x = store(np.tile(sign.astype(np.float32) * 3, (m, 1)), x_dtype)
                for compute in ("bf16", "int8"):
                    if refusal(which, kernel_id, m, weight, x_dtype, compute):
                        continue
                    y = run(which, kernel_id, x, weight, packed, None, compute, x_dtype)
                    ref.check_linear(
                        load(y, x_dtype),
                        load(x, x_dtype),
                        weight,
                        dtype=x_dtype,
                        operand=operand_of(x_dtype),
                        compute=compute,
                        transposed=which == "dx",
                        what=f"{kernel_id} m={m} bits={bits} group={group} fill={fill} {compute}",
                    )


@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_of_ones_and_of_equal_scales(which, kernel_id):
    """What `y.sum().backward()` sends, at the largest sum of every integer on the way."""
    rng = np.random.default_rng(19)
    x_dtype = own_dtype(kernel_id)
    for (group, bits), sign in itertools.product(FORMS, (1, -1)):
        weight = ref.random_weight(rng, 300, 300, group, bits, True, "float32")
        weight.scales[:] = 0.125
        weight.offsets[:] = sign * 7.0 - weight.zero * 0.125
        x = store(np.ones((9, 300), np.float32), x_dtype)
        for compute in ("bf16", "int8"):
            if refusal(which, kernel_id, 9, weight, x_dtype, compute):
                continue
            y = run(which, kernel_id, x, weight, packed_of(weight), None, compute, x_dtype)
            w = weight.dense().T if which == "dx" else weight.dense()
            expected = np.broadcast_to(w.sum(1), (9, 300))
            assert ref.rms(load(y, x_dtype) - expected) <= 0.004 * ref.rms(expected), kernel_id


@pytest.mark.parametrize("which, kernel_id", row_params("forward"))
def test_row_keeps_non_finite_weights_and_biases_apart(which, kernel_id):
    """A NaN or infinite scale, offset or bias reaches its own output column and no other."""
    rng = np.random.default_rng(17)
    x_dtype = own_dtype(kernel_id)
    for m, bits, affine in itertools.product((1, 6, 40), (4, 8), (False, True)):
        weight = ref.random_weight(rng, 36, 100, 64, bits, affine)
        if refusal(which, kernel_id, m, weight, x_dtype, "bf16"):
            continue
        x = store(rng.normal(0, 1, (m, 100)).astype(np.float32), x_dtype)
        bias = np.ones(36, np.float32)

        def product(weight, bias, x=x):
            y = run(which, kernel_id, x, weight, packed_of(weight), bias, "bf16", x_dtype)
            return load(y, x_dtype)

        clean = product(weight, bias)
        others = np.arange(36) != 19
        for value in (np.nan, np.inf):
            broken = ref.Weight(**vars(weight))
            broken.scales = weight.scales.copy()
            broken.scales[19, 1] = value
            y = product(broken, bias)
            what = f"{kernel_id} m={m} bits={bits} affine={affine} {value}"
            assert not np.isfinite(y[:, 19]).any(), f"scale: {what}"
            assert np.array_equal(y[:, others], clean[:, others]), f"scale: {what}"
            wrong = bias.copy()
            wrong[19] = value
            y = product(weight, wrong)
            assert np.array_equal(y[:, 19], np.full(m, value, np.float32), equal_nan=True), what
            assert np.array_equal(y[:, others], clean[:, others]), f"bias: {what}"


@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_at_larger_shapes(which, kernel_id):
    """Beyond the block sizes of the tile and panel kernels."""
    rng = np.random.default_rng(3)
    served = 0
    for m, n, k, group in (
        (1, 200, 4224, 128),
        (7, 136, 2112, 32),
        (130, 144, 1088, 64),
        (300, 80, 640, -1),
        (4, 24, 9000, -1),
        (1030, 40, 96, 32),
    ):
        weight = ref.random_weight(rng, n, k, group, 4, group != 64, "float32")
        for compute in ("bf16", "int8"):
            served += one_call(which, kernel_id, rng, m, weight, "bfloat16", None, compute)
    assert served


def dealt_shapes():
    return st.tuples(
        st.integers(1, 70),
        st.integers(1, 70),
        st.integers(1, 400),
        st.sampled_from(FORMS),
        st.booleans(),
        st.sampled_from(("float16", "float32")),
        st.sampled_from(X_DTYPES),
        st.sampled_from(BIASES),
        st.sampled_from(("bf16", "int8")),
        st.integers(0, 2**16),
    )


@given(dealt_shapes())
def test_rows_at_random_shapes(case):
    m, n, k, form, affine, scale_dtype, x_dtype, bias_dtype, compute, seed = case
    rng = np.random.default_rng(seed)
    weight = ref.random_weight(rng, n, k, *form, affine, scale_dtype)
    for which in ("forward", "dx"):
        for row in rows(which):
            if row["available"]:
                one_call(which, row["id"], rng, m, weight, x_dtype, bias_dtype, compute)


@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_reads_and_writes_strided_rows(which, kernel_id):
    """Rows further apart than they are long, from an odd element on; the gaps stay untouched."""
    rng = np.random.default_rng(4)
    for m, x_dtype in itertools.product((1, 6, 35), X_DTYPES):
        weight = ref.random_weight(rng, 37, 167, 64, 4, True, "float32")
        if refusal(which, kernel_id, m, weight, x_dtype, "bf16"):
            continue
        width, out = (167, 37) if which == "forward" else (37, 167)
        wide = store(rng.normal(0, 1, (m, width + 13)).astype(np.float32), x_dtype)
        x = wide[:, 5 : 5 + width]
        whole = np.full((m, out + 9), 77, wide.dtype)
        y = run(
            which,
            kernel_id,
            x,
            weight,
            packed_of(weight),
            None,
            "bf16",
            x_dtype,
            y=whole[:, 3 : 3 + out],
        )
        what = f"{kernel_id} m={m} {x_dtype} strided"
        assert np.shares_memory(y, whole), what
        ref.check_linear(
            load(np.ascontiguousarray(whole[:, 3 : 3 + out]), x_dtype),
            load(np.ascontiguousarray(x), x_dtype),
            weight,
            dtype=x_dtype,
            operand=operand_of(x_dtype),
            transposed=which == "dx",
            what=what,
        )
        assert (whole[:, :3] == 77).all(), f"{what}: wrote before the row"
        assert (whole[:, 3 + out :] == 77).all(), f"{what}: wrote behind the row"


@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_is_bitwise_equal_at_any_thread_count(which, kernel_id):
    rng = np.random.default_rng(5)
    served, x_dtype = 0, own_dtype(kernel_id)
    for m, n, k in ((1, 200, 600), (3, 330, 257), (40, 129, 320), (90, 70, 1100)):
        weight = ref.random_weight(rng, n, k, 64, 4, True, "float16")
        packed = packed_of(weight)
        for compute in ("bf16", "int8"):
            if refusal(which, kernel_id, m, weight, x_dtype, compute):
                continue
            x = rng.normal(0, 1, (m, k if which == "forward" else n)).astype(np.float32)
            call = (which, kernel_id, store(x, x_dtype), weight, packed, None, compute, x_dtype)
            first = run(*call, threads=1)
            for threads in (2, 3, 1, 5):
                again = run(*call, threads=threads)
                assert again.tobytes() == first.tobytes(), (
                    f"{kernel_id} m={m} n={n} k={k} {compute}: {threads} threads differ from one"
                )
            served += 1
    assert served


@pytest.mark.parametrize("compute", ["bf16", "int8"])
@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_keeps_non_finite_rows_apart(which, kernel_id, compute):
    """NaN and infinities behave as in a dense linear and never reach another row."""
    rng = np.random.default_rng(6)
    served = 0
    for (m, affine), bits, x_dtype in itertools.product(
        ((1, True), (4, False), (7, True), (20, False), (41, True)), (4, 8), X_DTYPES
    ):
        weight = ref.random_weight(rng, 21, 150, 64, bits, affine, "float32")
        if refusal(which, kernel_id, m, weight, x_dtype, compute):
            continue
        served += 1
        packed = packed_of(weight)
        width = 150 if which == "forward" else 21
        w = weight.dense() if which == "forward" else weight.dense().T
        clean = store(rng.normal(0, 1, (m, width)).astype(np.float32), x_dtype)
        expected = run(which, kernel_id, clean, weight, packed, None, compute, x_dtype)
        for value in (np.nan, np.inf, -np.inf):
            for k in (0, width // 2, width - 1):
                row = (3 * k) % m
                x = load(clean, x_dtype).copy()
                x[row, k] = value
                y = run(which, kernel_id, store(x, x_dtype), weight, packed, None, compute, x_dtype)
                what = f"{kernel_id} m={m} bits={bits} {x_dtype} {compute}: x[{row}, {k}] = {value}"
                others = np.arange(m) != row
                assert y[others].tobytes() == expected[others].tobytes(), (
                    f"{what}: another row changed"
                )
                got = load(y, x_dtype)[row]
                if np.isnan(value):
                    assert np.isnan(got).all(), f"{what}: {int((~np.isnan(got)).sum())} not NaN"
                    continue
                with np.errstate(invalid="ignore"):
                    want = value * w[:, k]
                assert np.array_equal(got, want.astype(np.float32), equal_nan=True), (
                    f"{what}: got {got[:6]}, dense gives {want[:6]}"
                )
        # Both infinities in one row: NaN wherever the two terms have opposite signs.
        x = load(clean, x_dtype).copy()
        x[m - 1, 0], x[m - 1, width - 1] = np.inf, -np.inf
        got = load(
            run(which, kernel_id, store(x, x_dtype), weight, packed, None, compute, x_dtype),
            x_dtype,
        )[m - 1]
        with np.errstate(invalid="ignore"):
            want = np.inf * w[:, 0] + -np.inf * w[:, width - 1]
        assert np.array_equal(got, want.astype(np.float32), equal_nan=True), (
            f"{kernel_id} m={m} {x_dtype} {compute}: both infinities: {got[:6]}, dense {want[:6]}"
        )
    if not served:
        reason = refusal(which, kernel_id, 20, weight, own_dtype(kernel_id), compute)
        assert reason, f"{kernel_id} serves compute {compute} but no case reached it"


@pytest.mark.parametrize("compute", ["bf16", "int8"])
@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_at_extreme_magnitudes(which, kernel_id, compute):
    """Huge, tiny, denormal, outliers and mixtures keep the bounds; zeros give exactly the bias."""
    rng = np.random.default_rng(7)
    for m, bits, x_dtype in itertools.product((1, 4, 7, 33), (4, 8), X_DTYPES):
        weight = ref.random_weight(rng, 35, 200, 32, bits, bits == 4, "float32")
        if refusal(which, kernel_id, m, weight, x_dtype, compute):
            continue
        packed = packed_of(weight)
        width = 200 if which == "forward" else 35
        base = rng.normal(0, 1, (m, width)).astype(np.float32)
        sparse = np.zeros_like(base)
        sparse[:, width // 3] = 3e38 if x_dtype != "float16" else 6e4
        outlier = base * np.float32(1e-3)
        outlier[:, width // 2] = 1e4
        rows_apart = base * (np.float32(10.0) ** rng.integers(-4, 5, (m, 1))).astype(np.float32)
        cases = {
            "one huge": sparse,
            "outlier": outlier,
            "rows apart": rows_apart,
            "large": base * np.float32(1e36 if x_dtype != "float16" else 1e3),
            "tiny": base * np.float32(1e-38 if x_dtype != "float16" else 1e-5),
            "denormal": base * np.float32(1e-41 if x_dtype != "float16" else 3e-7),
            "smallest": np.full_like(base, 1.4e-45 if x_dtype != "float16" else 6e-8),
        }
        for name, values in cases.items():
            x = store(values, x_dtype)
            y = run(which, kernel_id, x, weight, packed, None, compute, x_dtype)
            ref.check_linear(
                load(y, x_dtype),
                load(x, x_dtype),
                weight,
                dtype=x_dtype,
                operand=operand_of(x_dtype),
                compute=compute,
                transposed=which == "dx",
                what=f"{kernel_id} m={m} bits={bits} {x_dtype} {compute}: {name}",
            )
        zeros = store(np.zeros_like(base), x_dtype)
        bias = None
        if which == "forward":
            bias = rng.normal(0, 1, 35).astype(np.float32)
        y = load(run(which, kernel_id, zeros, weight, packed, bias, compute, x_dtype), x_dtype)
        want = ref.round_to(np.zeros(y.shape) if bias is None else np.tile(bias, (m, 1)), x_dtype)
        assert np.array_equal(y, want), f"{kernel_id} m={m} {x_dtype} {compute}: 0 w^T + b is not b"


@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_with_extreme_scales(which, kernel_id):
    """Weights far from one: float16's largest and subnormal scales, float32's at 1e-30 and 1e30."""
    rng = np.random.default_rng(8)
    x_dtype = own_dtype(kernel_id)
    for m, (scale_dtype, factor), affine in itertools.product(
        (1, 9),
        (("float16", 60000), ("float16", 6e-7), ("float32", 1e30), ("float32", 1e-30)),
        (0, 1),
    ):
        weight = ref.random_weight(rng, 19, 130, 64, 4, bool(affine), "float32")
        weight.scales = (weight.scales * (15 * factor / 1.5)).astype(scale_dtype)
        if affine:
            weight.offsets = (-weight.scales.astype(np.float32)).astype(scale_dtype)
        if refusal(which, kernel_id, m, weight, x_dtype, "bf16"):
            continue
        x = rng.normal(0, 1, (m, 130 if which == "forward" else 19)).astype(np.float32)
        x = store(x, x_dtype)
        y = run(which, kernel_id, x, weight, packed_of(weight), x_dtype=x_dtype)
        ref.check_linear(
            load(y, x_dtype),
            load(x, x_dtype),
            weight,
            dtype=x_dtype,
            operand=operand_of(x_dtype),
            transposed=which == "dx",
            what=f"{kernel_id} m={m} scales={scale_dtype} x {factor} affine={affine}",
        )


@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_on_zero_weights(which, kernel_id):
    """Scale zero and the code of zero: exact zeros, and an exact bias."""
    rng = np.random.default_rng(9)
    x_dtype = own_dtype(kernel_id)
    for m, bits in itertools.product((1, 3, 12), (4, 8)):
        weight = ref.random_weight(rng, 18, 96, 32, bits)
        flat = ref.canonical(np.full((18, 96), weight.zero), bits)
        no_scale = ref.Weight(weight.qweight, np.zeros_like(weight.scales), None, 96, 32, bits)
        zero_code = ref.Weight(flat, weight.scales, None, 96, 32, bits)
        for case in (no_scale, zero_code):
            if refusal(which, kernel_id, m, case, x_dtype, "bf16"):
                continue
            x = rng.normal(0, 1e3, (m, 96 if which == "forward" else 18)).astype(np.float32)
            x = store(x, x_dtype)
            bias = rng.normal(0, 1, 18).astype(np.float32) if which == "forward" else None
            y = run(which, kernel_id, x, case, packed_of(case), bias, "bf16", x_dtype)
            y = load(y, x_dtype)
            want = np.zeros(y.shape) if bias is None else np.tile(bias, (m, 1))
            want = ref.round_to(want, x_dtype)
            assert np.array_equal(y, want), f"{kernel_id} m={m} bits={bits}"
