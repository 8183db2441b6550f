"""What every Triton kernel must do, as plain functions of a device.

`test_triton_interpreter` runs them on the CPU through Triton's interpreter, in a child process
(whether Triton interprets is decided when it is imported); `test_triton_gpu` runs the same
functions on a GPU. Each checks against the float64 oracles that the CPU kernels answer to.
"""

from __future__ import annotations

from typing import Callable

import numpy as np
import reference as ref
import reference_blocks as rb
import torch

CASES: dict[str, Callable[[torch.device], None]] = {}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def case(function: Callable, *arguments: object) -> Callable:
    label = "-".join(str(a) for a in arguments)
    CASES[function.__name__ + (f"[{label}]" if label else "")] = lambda device: function(
        device, *arguments
    )
    return function


def tensor(array, dtype: str, device) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32)).to(DTYPES[dtype]).to(device)


def array(t: torch.Tensor) -> np.ndarray:
    return t.detach().float().cpu().numpy()


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values with a row stride of their own and a start that is not aligned."""
    wide = torch.full((t.shape[0], t.shape[1] + 3), float("nan"), dtype=t.dtype, device=t.device)
    wide[:, 1:-2] = t
    return wide[:, 1:-2]


class Layer:
    """A packed weight on a device, its oracle, and the arguments that the ops take."""

    def __init__(self, rng, n, k, group, bits, affine, scale_dtype, device):
        self.weight = ref.random_weight(rng, n, k, group, bits, affine, scale_dtype)
        self.packed = torch.from_numpy(ref.pack(self.weight)).to(device)
        self.n, self.k = n, k
        self.form = (group, bits, affine, getattr(torch, scale_dtype))


def bodies():
    from nibblock.ops import _triton

    return _triton.BODIES


# --- int4 -----------------------------------------------------------------------------------------

# m, n, k, group, bits, affine, scale dtype, x dtype: both shape classes, every group, odd edges.
INT4 = [
    (1, 16, 64, 64, 4, True, "float32", "bfloat16"),
    (3, 17, 118, 32, 4, False, "float16", "bfloat16"),
    (5, 33, 70, 64, 4, True, "float16", "float16"),
    (2, 18, 130, -1, 4, True, "float32", "float32"),
    (4, 24, 1030, 128, 4, True, "float32", "bfloat16"),  # split along k
    (1, 40, 520, 256, 4, False, "float32", "float16"),  # split along k, sums repaired
    (17, 48, 257, 256, 4, True, "float32", "bfloat16"),
    (70, 19, 96, 32, 4, True, "float16", "bfloat16"),
    (66, 130, 66, 128, 4, False, "float32", "float16"),
    (515, 21, 70, 64, 4, True, "float32", "bfloat16"),
    (65, 33, 64, -1, 4, True, "float32", "float32"),
    (3, 20, 100, 32, 8, False, "float16", "bfloat16"),
    (67, 34, 70, 32, 8, True, "float32", "float16"),
    (2, 1, 1, 32, 8, True, "float32", "float32"),
    (3, 20, 100, 16, 8, False, "float32", "bfloat16"),
    (1, 33, 1040, 16, 8, True, "float32", "float16"),
    (67, 34, 70, 16, 8, True, "float16", "float16"),
    (66, 18, 40, 16, 8, False, "float32", "bfloat16"),
    (5, 17, 70, 16, 8, False, "float32", "float32"),
    (3, 20, 256, 32, 4, True, "int8", "bfloat16"),
    (70, 33, 512, 32, 4, True, "int8", "float16"),
    (2, 18, 1024, 16, 4, False, "int8", "float32"),
    (67, 17, 256, 16, 4, True, "int8", "bfloat16"),
    (66, 34, 512, 16, 8, True, "int8", "float16"),
    (1, 40, 2048, 16, 8, False, "int8", "bfloat16"),  # split along k
]


def int4_linear(device, m, n, k, group, bits, affine, scale_dtype, dtype):
    rng = np.random.default_rng(m * n + k)
    layer = Layer(rng, n, k, group, bits, affine, scale_dtype, device)
    x = strided(tensor(rng.normal(size=(m, k)), dtype, device))
    bias = tensor(rng.normal(size=n), "float32", device)
    run = bodies()["int4_linear"]
    y = run(x, layer.packed, bias, n, *layer.form, "bf16")
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    ref.check_linear(array(y), array(x), layer.weight, array(bias), dtype=dtype)
    again = run(x.contiguous(), layer.packed, bias, n, *layer.form, "bf16")
    assert torch.equal(y, again)
    none = run(x.reshape(1, m, k), layer.packed, None, n, *layer.form, "bf16")
    assert none.shape == (1, m, n)
    ref.check_linear(array(none)[0], array(x), layer.weight, dtype=dtype)


def int4_linear_dx(device, m, n, k, group, bits, affine, scale_dtype, dtype):
    rng = np.random.default_rng(m + n * k)
    layer = Layer(rng, n, k, group, bits, affine, scale_dtype, device)
    grad = strided(tensor(rng.normal(size=(m, n)), dtype, device))
    dx = bodies()["int4_linear_dx"](grad, layer.packed, k, *layer.form, "int8")
    ref.check_linear(array(dx), array(grad), layer.weight, dtype=dtype, transposed=True)


def int4_dequantize(device, m, n, k, group, bits, affine, scale_dtype, dtype):
    rng = np.random.default_rng(n + k)
    layer = Layer(rng, n, k, group, bits, affine, scale_dtype, device)
    for out in DTYPES.values():
        got = bodies()["int4_dequantize"](layer.packed, n, k, *layer.form, out)
        want = torch.ops.nibblock.int4_dequantize(layer.packed.cpu(), n, k, *layer.form, out)
        assert torch.equal(got.cpu(), want)
    index = torch.tensor([[n - 1, 0, n // 2]], device=device)
    for rows in (index, index.int()):
        got = bodies()["int4_embedding"](rows, layer.packed, n, k, *layer.form, torch.float32)
        want = torch.ops.nibblock.int4_embedding(
            rows.cpu(), layer.packed.cpu(), n, k, *layer.form, torch.float32
        )
        assert torch.equal(got.cpu(), want)
    for beyond in (n, 1 << 32):  # the second is 0 in its low half
        out = bodies()["int4_embedding"](
            index + beyond, layer.packed, n, k, *layer.form, torch.float32
        )
        assert out.isnan().all()


for _parameters in INT4:
    case(int4_linear, *_parameters)
    case(int4_linear_dx, *_parameters)
    case(int4_dequantize, *_parameters)


def int4_palette(device, m, n, k, group, affine, scale_dtype, dtype):
    """8-bit codes in 4: forward, dx and dequantise by the size of `packed` alone."""
    rng = np.random.default_rng(m + n + k)
    weight = ref.random_weight(rng, n, k, group, 8, affine, scale_dtype)
    levels = rng.permutation(256)[:16].astype(np.uint8)
    weight.qweight = levels[rng.integers(0, 16, (n, k))]
    weight.palette = True
    packed = torch.from_numpy(ref.pack(weight)).to(device)
    form = (group, 8, affine, getattr(torch, scale_dtype))
    x = strided(tensor(rng.normal(size=(m, k)), dtype, device))
    y = bodies()["int4_linear"](x, packed, None, n, *form, "bf16")
    ref.check_linear(array(y), array(x), weight, dtype=dtype)
    grad = tensor(rng.normal(size=(m, n)), dtype, device)
    dx = bodies()["int4_linear_dx"](grad, packed, k, *form, "bf16")
    ref.check_linear(array(dx), array(grad), weight, dtype=dtype, transposed=True)
    got = bodies()["int4_dequantize"](packed, n, k, *form, torch.float32)
    want = torch.ops.nibblock.int4_dequantize(packed.cpu(), n, k, *form, torch.float32)
    assert torch.equal(got.cpu(), want)


for _parameters in (
    (3, 20, 100, 32, False, "float16", "bfloat16"),
    (67, 34, 70, 16, True, "float32", "float16"),
    (2, 17, 256, 32, False, "int8", "float32"),
    (66, 18, 130, 64, True, "float16", "bfloat16"),
):
    case(int4_palette, *_parameters)


def int4_many_bfloat16_rows(device):
    """From 1024 rows on: dequantised, then multiplied by torch."""
    rng = np.random.default_rng(3)
    layer = Layer(rng, 20, 40, 32, 4, True, "float32", device)
    x = tensor(rng.normal(size=(1025, 40)), "bfloat16", device)
    bias = tensor(rng.normal(size=20), "float32", device)
    for given in (None, bias):
        y = bodies()["int4_linear"](x, layer.packed, given, 20, *layer.form, "bf16")
        ref.check_linear(
            array(y), array(x), layer.weight, None if given is None else array(bias),
            dtype="bfloat16",
        )  # fmt: skip
    grad = tensor(rng.normal(size=(1025, 20)), "bfloat16", device)
    dx = bodies()["int4_linear_dx"](grad, layer.packed, 40, *layer.form, "bf16")
    ref.check_linear(array(dx), array(grad), layer.weight, dtype="bfloat16", transposed=True)


case(int4_many_bfloat16_rows)


def int4_not_finite(device, m, k, dtype):
    """NaN stays in its row; an infinity meets the weight, not the centred code."""
    rng = np.random.default_rng(5)
    n = 24
    layer = Layer(rng, n, k, 64, 4, True, "float32", device)
    x = rng.normal(size=(m, k)).astype(np.float32)
    x[0, 5] = np.nan
    x[1, 7], x[1, k - 1] = np.inf, 0
    x[2, 9] = -np.inf
    given = tensor(x, dtype, device)
    y = array(bodies()["int4_linear"](given, layer.packed, None, n, *layer.form, "bf16"))
    with np.errstate(invalid="ignore"):
        want = array(given).astype(np.float64) @ layer.weight.dense().T
    assert np.isnan(y[0]).all()
    assert np.array_equal(y[1], want[1])  # infinities of the weights' signs
    assert np.array_equal(y[2], want[2])
    ref.check_linear(y[3:], array(given)[3:], layer.weight, dtype=dtype)


for _m in (4, 70):
    for _k in (64, 600):
        for _dtype in DTYPES:
            if _k == 64 or _m == 4:
                case(int4_not_finite, _m, _k, _dtype)


def int4_infinite_scales(device, m, dtype):
    """An infinite scale makes weights infinite where codes are not zero, an offset of NaN makes
    NaN; neither reaches another row or group, nor comes in from beyond K."""
    rng = np.random.default_rng(11)
    weight = ref.random_weight(rng, 20, 70, 32, 4, True, "float32")
    weight.qweight |= 0x11  # no code is 0
    weight.scales[2, 0], weight.scales[5, 2] = np.inf, np.inf  # the last group is 6 of 32 wide
    weight.offsets[9, 1] = np.nan
    packed = torch.from_numpy(ref.pack(weight)).to(device)
    form = (32, 4, True, torch.float32)
    x = tensor(np.abs(rng.normal(size=(m, 70))) / 64, dtype, device)
    y = array(bodies()["int4_linear"](x, packed, None, 20, *form, "bf16"))
    assert np.isposinf(y[:, [2, 5]]).all()
    assert np.isnan(y[:, 9]).all()
    plain = [n for n in range(20) if n not in (2, 5, 9)]
    want = array(x).astype(np.float64) @ weight.dense()[plain].T
    assert np.abs(y[:, plain] - want).max() <= 1e-2 * np.abs(want).max()
    grad = tensor(np.ones((m, 20)), dtype, device)
    dx = array(bodies()["int4_linear_dx"](grad, packed, 70, *form, "bf16"))
    assert np.isposinf(dx[:, :32]).all()
    assert np.isposinf(dx[:, 64:]).all()
    assert np.isnan(dx[:, 32:64]).all()
    got = bodies()["int4_dequantize"](packed, 20, 70, *form, torch.float32)
    want = torch.ops.nibblock.int4_dequantize(packed.cpu(), 20, 70, *form, torch.float32)
    assert np.array_equal(array(got), array(want), equal_nan=True)


for _m in (3, 66):
    for _dtype in DTYPES:
        case(int4_infinite_scales, _m, _dtype)


def int4_wide_scales(device, dtype):
    """Scales from 1e-4 to 1e2 and offsets far from the codes: where folded constants would fail."""
    rng = np.random.default_rng(6)
    weight = ref.random_weight(rng, 32, 128, 32, 4, True, "float32")
    weight.scales[:] = 10.0 ** rng.uniform(-4, 2, weight.scales.shape)
    zero = rng.choice([0, 15], weight.scales.shape)
    weight.offsets[:] = -weight.scales * zero + rng.normal(0, 50, zero.shape)
    packed = torch.from_numpy(ref.pack(weight)).to(device)
    x = tensor(rng.normal(size=(7, 128)), dtype, device)
    y = bodies()["int4_linear"](x, packed, None, 32, 32, 4, True, torch.float32, "bf16")
    ref.check_linear(array(y), array(x), weight, dtype=dtype)
    grad = tensor(rng.normal(size=(7, 32)), dtype, device)
    dx = bodies()["int4_linear_dx"](grad, packed, 128, 32, 4, True, torch.float32, "bf16")
    ref.check_linear(array(dx), array(grad), weight, dtype=dtype, transposed=True)


for _dtype in DTYPES:
    case(int4_wide_scales, _dtype)


def int4_empty(device):
    for m, n, k in ((0, 16, 64), (3, 0, 64), (3, 16, 0)):
        layer = Layer(np.random.default_rng(0), n, k, 64, 4, True, "float32", device)
        bias = torch.ones(n, device=device)
        x = torch.ones(m, k, device=device)
        y = bodies()["int4_linear"](x, layer.packed, bias, n, *layer.form, "bf16")
        assert torch.equal(y, bias.expand(m, n) + torch.zeros(m, n, device=device))
        if k:
            assert bodies()["int4_dequantize"](
                layer.packed, n, k, *layer.form, torch.float32
            ).shape == (n, k)


case(int4_empty)


# --- block-sparse ---------------------------------------------------------------------------------

# m, n, k, block, x dtype, values dtype
BLOCKS = [
    (1, 40, 70, 16, "bfloat16", "bfloat16"),
    (3, 50, 70, 16, "bfloat16", "float32"),
    (5, 130, 200, 64, "float32", "float32"),
    (18, 40, 33, 32, "float16", "bfloat16"),
    (70, 64, 96, 32, "bfloat16", "bfloat16"),
    (70, 70, 50, 16, "float16", "float32"),
    (66, 150, 130, 128, "bfloat16", "float32"),
    (65, 70, 130, 64, "float32", "bfloat16"),
]


def blocks_on(device, rng, n, k, block, dtype, density=0.4):
    blocks = rb.random_blocks(rng, n, k, block, density)
    values = tensor(blocks.values, dtype, device)
    blocks.values = array(values)
    return blocks, values, torch.from_numpy(rb.layout(blocks)).to(device)


def block_sparse_linear(device, m, n, k, block, dtype, values_dtype):
    rng = np.random.default_rng(n * k + block)
    blocks, values, layout = blocks_on(device, rng, n, k, block, values_dtype)
    x = strided(tensor(rng.normal(size=(m, k)), dtype, device))
    y0 = strided(tensor(rng.normal(size=(m, n)), dtype, device))
    bias = tensor(rng.normal(size=n), "float32", device)
    operand = "bfloat16" if dtype == "bfloat16" else "float32"
    run = bodies()["block_sparse_linear"]
    y = run(x, values, layout, bias, y0, n, block)
    rb.check_product(
        array(y), array(x), blocks.dense(), (array(bias), array(y0)), dtype=dtype, operand=operand
    )
    assert torch.equal(y, run(x.contiguous(), values, layout, bias, y0.contiguous(), n, block))
    grad = strided(tensor(rng.normal(size=(m, n)), dtype, device))
    dx = bodies()["block_sparse_linear_dx"](grad, values, layout, k, block)
    rb.check_product(array(dx), array(grad), blocks.dense().T, dtype=dtype, operand=operand)


def block_weight_grad(device, m, n, k, block, dtype, values_dtype):
    rng = np.random.default_rng(n + k + block)
    blocks, _, layout = blocks_on(device, rng, n, k, block, values_dtype)
    grad = strided(tensor(rng.normal(size=(m, n)), dtype, device))
    x = strided(tensor(rng.normal(size=(m, k)), dtype, device))
    out = DTYPES[values_dtype]
    got = bodies()["block_weight_grad"](grad, x, layout, block, out)
    assert got.dtype == out
    g64, x64 = array(grad).astype(np.float64), array(x).astype(np.float64)
    want = blocks.gather(g64.T @ x64)
    size = blocks.gather(np.abs(g64).T @ np.abs(x64))
    bound = (m + 8) * 2 * ref.EPS32 * size + ref.HALF_ULP[values_dtype] * np.abs(want) * 1.01
    assert (np.abs(array(got) - want) <= bound).all()


for _parameters in BLOCKS:
    case(block_sparse_linear, *_parameters)
    case(block_weight_grad, *_parameters)


def block_weight_grad_split(device):
    """Few blocks and many tokens: parts of the sum, added in order."""
    rng = np.random.default_rng(8)
    blocks, _, layout = blocks_on(device, rng, 32, 32, 16, "float32", 1.0)
    grad = tensor(rng.normal(size=(1030, 32)), "bfloat16", device)
    x = tensor(rng.normal(size=(1030, 32)), "bfloat16", device)
    run = bodies()["block_weight_grad"]
    got = run(grad, x, layout, 16, torch.float32)
    want = blocks.gather(array(grad).astype(np.float64).T @ array(x).astype(np.float64))
    assert np.abs(array(got) - want).max() < 1e-3
    assert torch.equal(got, run(grad, x, layout, 16, torch.float32))


case(block_weight_grad_split)


def block_sparse_edges(device):
    """No block, empty rows, no token; y0 bit for bit where nothing is added; NaN in its row."""
    rng = np.random.default_rng(9)
    run, run_dx = bodies()["block_sparse_linear"], bodies()["block_sparse_linear_dx"]
    index = np.array([[1, 0]])
    values = rng.normal(size=(1, 16, 16)).astype(np.float32)
    values[0, 14:], values[0, :, 10:] = np.nan, np.nan  # beyond [30, 10]
    blocks = rb.Blocks(index, values, 30, 10)
    layout = torch.from_numpy(rb.layout(blocks)).to(device)
    v = tensor(values, "float32", device)
    x = tensor(rng.normal(size=(3, 10)), "float32", device)
    x[2, 0] = float("nan")
    y0 = tensor(rng.normal(size=(3, 30)), "float32", device)
    y0[0, 0], y0[0, 1] = -0.0, float("inf")
    y = run(x, v, layout, None, y0, 30, 16)
    assert torch.equal(y[:, :16].view(torch.int32), y0[:, :16].view(torch.int32))
    rb.check_product(
        array(y)[:2, 16:], array(x)[:2], blocks.dense()[16:], (array(y0)[:2, 16:],),
        dtype="float32",
    )  # fmt: skip
    assert y[2, 16:].isnan().all()
    grad = tensor(rng.normal(size=(3, 30)), "float32", device)
    dx = run_dx(grad, v, layout, 10, 16)
    rb.check_product(array(dx), array(grad), blocks.dense().T, dtype="float32")
    empty = rb.Blocks(np.zeros((0, 2), int), np.zeros((0, 16, 16), np.float32), 30, 10)
    layout = torch.from_numpy(rb.layout(empty)).to(device)
    v = torch.zeros(0, 16, 16, device=device)
    bias = torch.ones(30, device=device)
    assert torch.equal(run(x, v, layout, bias, None, 30, 16), bias.expand(3, 30))
    assert not run_dx(grad, v, layout, 10, 16).any()
    assert run(x[:0], v, layout, bias, None, 30, 16).shape == (0, 30)
    assert bodies()["block_weight_grad"](grad, x, layout, 16, torch.float32).shape == (0, 16, 16)


case(block_sparse_edges)


# --- int4 base with adapter -----------------------------------------------------------------------

# m, n, k, group, block, rank, x dtype, values dtype
FUSED = [
    (1, 40, 520, 64, 16, 5, "bfloat16", "float32"),
    (3, 50, 70, 32, 32, 0, "bfloat16", "bfloat16"),
    (2, 70, 300, 128, 64, 17, "float16", "float32"),
    (4, 140, 130, 64, 128, 1, "float32", "float32"),
    (70, 70, 130, 64, 16, 3, "bfloat16", "bfloat16"),
    (66, 40, 70, 32, 32, 0, "float16", "bfloat16"),
    (65, 150, 140, -1, 128, 4, "bfloat16", "float32"),
]


def int4_block_sparse_linear(device, m, n, k, group, block, rank, dtype, values_dtype):
    rng = np.random.default_rng(n + k + block + rank)
    layer = Layer(rng, n, k, group, 4, True, "float32", device)
    blocks, values, layout = blocks_on(device, rng, n, k, block, values_dtype)
    a = c = None
    low = np.zeros((n, k))
    if rank:
        a = tensor(rng.normal(size=(rank, k)), values_dtype, device)
        c = tensor(rng.normal(size=(n, rank)) / 8, values_dtype, device)
        low = array(c).astype(np.float64) @ array(a)
    x = strided(tensor(rng.normal(size=(m, k)), dtype, device))
    bias = tensor(rng.normal(size=n), "float32", device)
    adapter = (values, layout, block, a, c)
    run, run_dx = bodies()["int4_block_sparse_linear"], bodies()["int4_block_sparse_linear_dx"]
    y = run(x, layer.packed, bias, n, *layer.form, "bf16", *adapter)
    # Magnitudes of all three parts: each rounds relative to its own size, not to the sum.
    size = layer.weight.magnitude() + np.abs(blocks.dense()) + np.abs(low)
    if rank:
        size += np.abs(array(c)).astype(np.float64) @ np.abs(array(a))
    whole = layer.weight.dense() + blocks.dense() + low
    step = 2.0**-8 if dtype == "bfloat16" else 2.0**-14
    for got, given, w, s, extra in (
        (y, x, whole, size, array(bias)),
        (run_dx(g := tensor(rng.normal(size=(m, n)), dtype, device), layer.packed, k, *layer.form,
                "bf16", *adapter), g, whole.T, size.T, 0),
    ):  # fmt: skip
        x64 = array(given).astype(np.float64)
        want = x64 @ w.T + extra
        bound = step * (np.abs(x64) @ s.T) + ref.HALF_ULP[dtype] * np.abs(want) * 1.01
        assert (np.abs(array(got) - want) <= bound).all()
    empty = torch.from_numpy(rb.layout(rb.Blocks(np.zeros((0, 2), int), blocks.values[:0], n, k)))
    bare = (values[:0], empty.to(device), block, None, None)
    plain = bodies()["int4_linear"](x, layer.packed, bias, n, *layer.form, "bf16")
    assert torch.equal(
        run(x, layer.packed, bias, n, *layer.form, "bf16", *bare), plain
    )  # nothing added: bit for bit


for _parameters in FUSED:
    case(int4_block_sparse_linear, *_parameters)


def refusals(device):
    """The same sentences as on the CPU, and nothing instead of what was asked for."""
    import pytest
    from nibblock import BackendUnavailable

    layer = Layer(np.random.default_rng(0), 16, 64, 64, 4, True, "float32", device)
    x = torch.ones(2, 64, device=device)
    run = bodies()["int4_linear"]
    with pytest.raises(BackendUnavailable, match='compute must be "bf16" on a GPU, got "int8"'):
        run(x, layer.packed, None, 16, *layer.form, "int8")
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got int64"):
        run(x.long(), layer.packed, None, 16, *layer.form, "bf16")
    with pytest.raises(ValueError, match="packed must be a contiguous"):
        run(x[:, 1:33], layer.packed[:-1], None, 16, *layer.form, "bf16")


case(refusals)
