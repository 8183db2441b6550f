"""`_native.quantize`: the formulas to the bit, a search that is never worse, any thread count."""

from __future__ import annotations

import numpy as np
import pytest
from harness import GROUPS
from hypothesis import given
from hypothesis import strategies as st
from nibblock import _native

GROUPED = [
    (bits, symmetric, group)
    for bits in (4, 8)
    for symmetric in (False, True)
    for group in GROUPS[bits]
]
FORMS = [(bits, symmetric) for bits in (4, 8) for symmetric in (False, True)]


def codes_of(qweight, bits, k):
    """Codes [N, K] from their canonical bytes."""
    if bits == 8:
        return qweight
    pairs = np.stack([qweight & 15, qweight >> 4], axis=-1)
    return pairs.reshape(qweight.shape[0], -1)[:, :k]


def dequantized(result, bits, k, group):
    """float64 [N, K] of what quantize returned."""
    qweight, scales, offsets = result
    group = max(k, 1) if group == -1 else group
    scale = np.repeat(scales.astype(np.float64), group, axis=1)[:, :k]
    code = codes_of(qweight, bits, k).astype(np.float64)
    if offsets is None:
        return scale * (code - (8 if bits == 4 else 128))
    return scale * code + np.repeat(offsets.astype(np.float64), group, axis=1)[:, :k]


def group_errors(weight, result, bits, group, importance=None):
    """Weighted squared error of every group, [N, groups]."""
    n, k = weight.shape
    group = k if group == -1 else group
    error = (weight.astype(np.float64) - dequantized(result, bits, k, group)) ** 2
    if importance is not None:
        error = error * importance.astype(np.float64)
    return np.stack([error[:, at : at + group].sum(1) for at in range(0, k, group)], axis=1)


def round_to_nearest(weight, group, bits, symmetric):
    """The formulas of csrc/native/quantize.h in float32 NumPy."""
    n, k = weight.shape
    group = k if group == -1 else group
    top, zero = (15, 8) if bits == 4 else (255, 128)
    codes = np.zeros((n, k), np.uint8)
    scales, offsets = [], []
    for at in range(0, k, group):
        w = weight[:, at : at + group]
        low, high = w.min(1), w.max(1)
        if symmetric:
            scale = np.where(-low >= high, low, high) / np.float32(-zero)
            offset, shift = np.zeros_like(scale), zero
        else:
            scale, offset, shift = (high - low) / np.float32(top), low, 0
        divisor = np.where(scale == 0, np.float32(1), scale)
        code = np.rint((w - offset[:, None]) / divisor[:, None]) + shift
        codes[:, at : at + group] = np.clip(code, 0, top)
        scales.append(scale)
        offsets.append(offset)
    return codes, np.stack(scales, 1), None if symmetric else np.stack(offsets, 1)


def assert_same(a, b):
    for left, right in zip(a, b):
        assert (left is None) == (right is None)
        if left is not None:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("bits, symmetric, group", GROUPED)
def test_round_to_nearest_is_the_formula(bits, symmetric, group):
    rng = np.random.default_rng(3)
    for n, k in ((1, 1), (3, 17), (5, 118), (16, 300), (2, 576)):
        weight = rng.standard_normal((n, k), dtype=np.float32) * 0.05
        qweight, scales, offsets = _native.quantize(weight, group, bits, symmetric)
        codes, want_scales, want_offsets = round_to_nearest(weight, group, bits, symmetric)
        assert_same(
            (codes_of(qweight, bits, k), scales, offsets), (codes, want_scales, want_offsets)
        )
        if bits == 4 and k % 2:
            assert (qweight[:, -1] >> 4 == 0).all()  # the unused nibble has one value


@given(
    st.integers(1, 9), st.integers(1, 300), st.sampled_from(GROUPED),
    st.integers(0, 2**32 - 1), st.sampled_from(["normal", "outlier", "shifted", "heavy", "few"]),
    st.booleans(),
)  # fmt: skip
def test_search_is_never_worse(n, k, form, seed, kind, weighted):
    bits, symmetric, group = form
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((n, k), dtype=np.float32)
    if kind == "outlier":
        weight[rng.integers(n), rng.integers(k)] = 1e4
    elif kind == "shifted":
        weight = weight * np.float32(1e-3) + np.float32(7)
    elif kind == "heavy":
        weight = (weight**5).astype(np.float32)
    elif kind == "few":
        weight = np.sign(weight) * np.float32(0.3)
    importance = None
    if weighted:
        importance = rng.exponential(size=k).astype(np.float32) ** 4
        importance[rng.random(k) < 0.2] = 0
    rtn = _native.quantize(weight, group, bits, symmetric, "rtn", importance)
    mse = _native.quantize(weight, group, bits, symmetric, "mse", importance)
    before = group_errors(weight, rtn, bits, group, importance)
    after = group_errors(weight, mse, bits, group, importance)
    assert (after <= before * (1 + 1e-9)).all()


@pytest.mark.parametrize("bits, symmetric, group, gain", [
    (4, False, 32, 0.92), (4, False, 128, 0.94), (4, False, -1, 0.90),
    (4, True, 32, 0.97), (4, True, 128, 0.96), (8, False, 32, 0.92), (8, True, 32, 0.95),
])  # fmt: skip
def test_search_gains(bits, symmetric, group, gain):
    weight = np.random.default_rng(0).standard_normal((64, 1024), dtype=np.float32)
    results = [_native.quantize(weight, group, bits, symmetric, m) for m in ("rtn", "mse")]
    rtn, mse = (np.sqrt(group_errors(weight, r, bits, group).mean()) for r in results)
    assert mse < gain * rtn


def test_importance_moves_the_error():
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((64, 256), dtype=np.float32)
    importance = np.where(np.arange(256) % 32 < 4, np.float32(1000), np.float32(1))
    plain = dequantized(_native.quantize(weight, 32, 4, False, "mse"), 4, 256, 32)
    aware = dequantized(_native.quantize(weight, 32, 4, False, "mse", importance), 4, 256, 32)
    heavy = importance > 1
    assert ((weight - aware) ** 2)[:, heavy].mean() < 0.5 * ((weight - plain) ** 2)[:, heavy].mean()
    # Weights that are all zero ask for nothing: the plain search then.
    none = _native.quantize(weight, 32, 4, False, "mse", np.zeros(256, np.float32))
    assert_same(none, _native.quantize(weight, 32, 4, False, "mse"))


@pytest.mark.parametrize("bits, symmetric", FORMS)
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_constant_groups_are_exact(bits, symmetric, method):
    k = 100
    for value in (0.0, -0.0, 0.1, -0.1, 3e38, -3e38, 1e-35, -1e-35):
        weight = np.full((3, k), value, np.float32)
        result = _native.quantize(weight, 32, bits, symmetric, method)
        np.testing.assert_array_equal(dequantized(result, bits, k, 32), weight.astype(np.float64))
    weight = np.zeros((2, k), np.float32)
    qweight, scales, _ = _native.quantize(weight, 32, bits, symmetric, method)
    zero = 0 if not symmetric else 8 if bits == 4 else 128
    assert (codes_of(qweight, bits, k) == zero).all()
    assert (scales == 0).all()


@pytest.mark.parametrize("bits, symmetric", FORMS)
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_extreme_magnitudes(bits, symmetric, method):
    rng = np.random.default_rng(5)
    base = rng.uniform(-1, 1, (4, 64)).astype(np.float32)
    base[:, ::32], base[:, 1::32] = 1, -1
    plain = _native.quantize(base, 32, bits, symmetric, method)
    for factor in (2.0**127, 2.0**-100):  # powers of two change no bit of the codes
        scaled = _native.quantize(base * np.float32(factor), 32, bits, symmetric, method)
        np.testing.assert_array_equal(scaled[0], plain[0])
        np.testing.assert_array_equal(scaled[1], plain[1] * np.float32(factor))
    denormal = _native.quantize(base * np.float32(1e-42), 32, bits, symmetric, method)
    assert np.isfinite(denormal[1]).all()
    assert np.abs(dequantized(denormal, bits, 64, 32)).max() < 2e-42


@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("bits, symmetric", FORMS)
def test_same_bits_at_any_thread_count_and_level(method, bits, symmetric):
    weight = np.random.default_rng(2).standard_normal((37, 333), dtype=np.float32)
    importance = np.random.default_rng(3).random(333, dtype=np.float32)
    first = _native.quantize(weight, 64, bits, symmetric, method, importance, threads=1)
    for level in ("scalar", _native.cpu_isa_max()):
        _native.set_cpu_isa(level)
        for threads in (1, 2, 3, 64):
            again = _native.quantize(weight, 64, bits, symmetric, method, importance, threads)
            assert_same(first, again)


def test_views_and_empty():
    weight = np.random.default_rng(4).standard_normal((6, 80), dtype=np.float32)
    for view in (weight.T, weight[::2, 1::3], weight[:, ::-1]):
        for bits, symmetric in FORMS:
            seen = _native.quantize(view, 32, bits, symmetric)
            assert_same(seen, _native.quantize(view.copy(), 32, bits, symmetric))
    qweight, scales, offsets = _native.quantize(np.zeros((0, 64), np.float32), 32, 4, False)
    assert (qweight.shape, scales.shape, offsets.shape) == ((0, 32), (0, 2), (0, 2))
    qweight, scales, offsets = _native.quantize(np.zeros((5, 0), np.float32), 32, 4, True)
    assert (qweight.shape, scales.shape, offsets) == ((5, 0), (5, 0), None)


def test_progress_counts_rows_and_may_stop():
    weight = np.zeros((3000, 1024), np.float32)
    seen = []
    _native.quantize(weight, 64, 4, False, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1] == (3000, 3000)

    def stop(done, total):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        _native.quantize(weight, 64, 4, False, progress=stop)


def test_packed_round_trip():
    rng = np.random.default_rng(6)
    for bits, symmetric in FORMS:
        for n, k, group in ((1, 1, 32), (17, 118, 32), (33, 300, 128), (16, 65, -1)):
            for scale_dtype in ("float32", "float16"):
                weight = rng.standard_normal((n, k), dtype=np.float32)
                q, s, o = _native.quantize(weight, group, bits, symmetric)
                s, o = s.astype(scale_dtype), None if o is None else o.astype(scale_dtype)
                packed = _native.pack(q, s, o, k, group, bits)
                layer = (n, k, group, bits, not symmetric, scale_dtype)
                assert packed.ctypes.data % 64 == 0
                assert packed.nbytes == _native.packed_bytes(*layer)
                assert_same(_native.unpack(packed, *layer), (q, s, o))
                assert_same(_native.unpack(packed, *layer, threads=3), (q, s, o))
                dense = _native.dequantize(packed, *layer)
                np.testing.assert_allclose(
                    dense, dequantized((q, s, o), bits, k, group), rtol=1e-6, atol=1e-6
                )
                rows = np.array([n - 1, 0, n - 1])
                some = _native.dequantize(packed, *layer, rows=rows)
                np.testing.assert_array_equal(some, dense[rows])


W = np.zeros((4, 64), np.float32)
Q = np.zeros((4, 32), np.uint8)
F16, F32 = np.zeros((4, 2), np.float16), np.zeros((4, 2), np.float32)
ONE_NEGATIVE = np.where(np.arange(64) == 5, np.float32(-1), np.float32(1))
PACKED = np.zeros(_native.packed_bytes(4, 64, 32, 4, True, "float32"), np.uint8)


@pytest.mark.parametrize("error, text, call", [
    (TypeError, "quantize: weight must be float32, got float64",
     lambda: _native.quantize(W.astype(np.float64), 32, 4, False)),
    (TypeError, "quantize: weight must be a NumPy array of float32, got list",
     lambda: _native.quantize([[1.0]], 32, 4, False)),
    (ValueError, "quantize: weight must be [N, K], got [64]",
     lambda: _native.quantize(W[0], 32, 4, False)),
    (ValueError, "quantize: group_size must be 32, 64, 128, 256 or -1 (whole row), got 48",
     lambda: _native.quantize(W, 48, 4, False)),
    (ValueError, "quantize: group_size must be 32, 64, 128, 256 or -1 (whole row), got 16",
     lambda: _native.quantize(W, 16, 4, False)),
    (ValueError, "quantize: group_size must be 16, 32, 64, 128, 256 or -1 (whole row), got 48",
     lambda: _native.quantize(W, 48, 8, False)),
    (ValueError, "quantize: bits must be 4 or 8, got 3", lambda: _native.quantize(W, 32, 3, False)),
    (ValueError, 'quantize: method must be "rtn" or "mse", got "best"',
     lambda: _native.quantize(W, 32, 4, False, "best")),
    (ValueError, "quantize: importance must be [64], got [63]",
     lambda: _native.quantize(W, 32, 4, False, "mse", np.ones(63, np.float32))),
    (ValueError, "quantize: importance must be finite and not negative, got -1.000000 at index 5",
     lambda: _native.quantize(W, 32, 4, False, "mse", ONE_NEGATIVE)),
    (ValueError, "quantize: threads must be 1 to 1024, got 0",
     lambda: _native.quantize(W, 32, 4, False, threads=0)),
    (TypeError, "quantize: progress must be None or a callable(done, total), got int",
     lambda: _native.quantize(W, 32, 4, False, progress=3)),
    (ValueError, "pack: scales must be [4, 2], got [4, 3]",
     lambda: _native.pack(Q, np.zeros((4, 3), np.float32), None, 64, 32, 4)),
    (TypeError, "pack: offsets must be float16, got float32",
     lambda: _native.pack(Q, F16, F32, 64, 32, 4)),
    (TypeError, "unpack: scale_dtype must be float16, float32 or int8, got bfloat16",
     lambda: _native.unpack(PACKED, 4, 64, 32, 4, True, "bfloat16")),
    (ValueError, "dequantize: rows must be 0 to out_features - 1 = 3, got 4 at index 1",
     lambda: _native.dequantize(PACKED, 4, 64, 32, 4, True, "float32", np.array([0, 4]))),
])  # fmt: skip
def test_errors(error, text, call):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
    assert "\n" not in text


@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_names_the_row(method, value):
    weight = np.zeros((50, 70), np.float32)
    weight[41, 3] = weight[17, 69] = weight[17, 66] = value
    for threads in (1, 4):
        with pytest.raises(ValueError, match=r"weight must be finite, got .* in row 17, column 66"):
            _native.quantize(weight, 32, 4, False, method, threads=threads)
