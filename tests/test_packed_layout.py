"""The packed layout, written by two authors, and the yardstick all values are measured with."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference as ref
from harness import GROUPS, native, packed_of

SHAPES = list(itertools.product((0, 1, 3, 16, 17, 40), (0, 1, 2, 31, 64, 65, 129, 300)))


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_layout_against_a_second_author(bits, affine, scale_dtype):
    rng = np.random.default_rng(12)
    for (n, k), group in itertools.product(SHAPES, GROUPS[bits]):
        w = ref.random_weight(rng, n, k, group, bits, affine, scale_dtype)
        what = f"n={n} k={k} group={group}"
        packed = native.pack(w.qweight, w.scales, w.offsets, k, group, bits)
        assert packed.dtype == np.uint8
        assert packed.ctypes.data % 64 == 0, what
        assert packed.size == native.packed_bytes(**w.format), what
        assert packed.tobytes() == ref.pack(w).tobytes(), what
        mine = ref.unpack(packed, **w.format)
        theirs = native.unpack(packed, **w.format, threads=2)
        assert mine.qweight.tobytes() == w.qweight.tobytes() == theirs[0].tobytes(), what
        assert mine.scales.tobytes() == w.scales.tobytes() == theirs[1].tobytes(), what
        assert theirs[1].dtype == w.scales.dtype, what
        if affine:
            assert mine.offsets.tobytes() == w.offsets.tobytes() == theirs[2].tobytes(), what
        else:
            assert mine.offsets is None
            assert theirs[2] is None


def test_packing_does_not_depend_on_threads():
    w = ref.random_weight(np.random.default_rng(13), 150, 300, 32, 4, True)
    one = native.pack(w.qweight, w.scales, w.offsets, 300, 32, 4, threads=1)
    for threads in (2, 3, 7):
        more = native.pack(w.qweight, w.scales, w.offsets, 300, 32, 4, threads=threads)
        assert one.tobytes() == more.tobytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize(bits):
    """Dequantised rows are the formula rounded to float32, in any order and with repeats."""
    rng = np.random.default_rng(14)
    for (n, k), group, affine in itertools.product(SHAPES, GROUPS[bits], (False, True)):
        w = ref.random_weight(rng, n, k, group, bits, affine, "float32")
        packed = packed_of(w)
        full = native.dequantize(packed, **w.format)
        slack = 4 * ref.EPS32 * (w.magnitude() + 16 * np.abs(w.dense()).max(initial=0))
        assert full.dtype == np.float32
        assert (np.abs(full - w.dense()) <= slack).all(), f"n={n} k={k} group={group}"
        some = rng.integers(0, n, 5 if n else 0)
        assert np.array_equal(native.dequantize(packed, **w.format, rows=some), full[some])


def test_the_yardstick_is_sharp():
    """What check_linear lets pass is what dense bfloat16 loses, and not much more."""
    rng = np.random.default_rng(18)
    w = ref.random_weight(rng, 128, 300, 32, 4, True)
    x = rng.normal(0, 1, (8, 300)).astype(np.float32)
    y = ref.int4_linear(x, w)
    ref.check_linear(y, x, w)
    ref.check_linear(y, x, w, operand="float32")
    in_bf16 = ref.dense_bf16(x, w.dense(), None, "float32")
    ref.check_linear(in_bf16, x, w)

    def caught(y, **more):
        with pytest.raises(AssertionError):
            ref.check_linear(y, x, w, **more)

    caught(in_bf16, operand="float32")
    caught(ref.int4_linear(ref.round_to(x, "bfloat16"), w), operand="float32")
    caught(y[:, ::-1])
    caught(ref.int4_linear(np.where(np.arange(300) == 299, 0, x), w))  # the last k forgotten
    caught(y * (1 + 2.0**-6))
    caught(y + np.float64(0.02))
    caught(ref.int4_linear(ref._quantise_int8(x, 32), w))  # int8 where bf16 was asked for
    ref.check_linear(ref.int4_linear(ref._quantise_int8(x, 32), w), x, w, compute="int8")
    lost = y.copy()
    lost[3, 5] = np.nan
    caught(lost)
    x[:, 7] *= 20
    ref.check_linear(ref.int4_linear(ref._quantise_int8(x, 32), w), x, w, compute="int8")
    caught(ref.int4_linear(ref._quantise_int8(x, 300), w), compute="int8")  # one scale for a row


def test_the_second_author_agrees_with_the_drawing():
    """One panel by hand: the lane of row 2, k = 8 .. 15."""
    codes = np.zeros((16, 64), np.int64)
    codes[2, 8:16] = np.arange(1, 9)
    w = ref.Weight(ref.canonical(codes, 4), np.ones((16, 2), np.float16), None, 64, 32, 4)
    lane = ref.pack(w)[64 + 8 : 64 + 12].view("<u4")[0]
    k = list(range(1, 9))
    assert lane == (
        k[0]
        | k[2] << 4
        | k[4] << 8
        | k[6] << 12
        | k[1] << 16
        | k[3] << 20
        | k[5] << 24
        | k[7] << 28
    )
