"""The CUDA C++ kernels on a GPU: forced rows against the float64 oracle, graphs, streams, repeats.

Skipped where there is no device or the library is not built; tests/test_cuda_decode.py covers the
same arithmetic without one. A run of this file on a machine is what a row's `proven` waits for,
beside its measured times.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from harness import TORCH
from nibblock import _cuda, ops
from reference import HALF_ULP, int4_linear, pack, random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_cuda.refusal() is not None, reason=f"CUDA C++ kernels: {_cuda.refusal()}"),
]
DTYPES = ("bfloat16", "float16")


def arguments(weight):
    return (
        weight.out_features,
        weight.group_size,
        weight.bits,
        weight.affine,
        TORCH[weight.scale_dtype],
    )


def check(rng, m, n, k, group, bits, affine, scale_dtype, dtype, kernel="", edge=0):
    weight = random_weight(rng, n, k, group, bits, affine, scale_dtype)
    packed = torch.from_numpy(pack(weight)).cuda()
    x = torch.from_numpy(rng.normal(size=(m, k)).astype(np.float32)).to(TORCH[dtype]).cuda()
    bias = torch.from_numpy(rng.normal(size=n).astype(np.float32)).cuda()
    more, extra = {}, np.zeros((n, k))
    if edge:
        mask = rng.random((-(-n // edge), -(-k // edge))) < 0.1
        mask[0, 0] = True
        blocks = np.argwhere(mask)
        values = torch.from_numpy(rng.normal(size=(len(blocks), edge, edge)).astype(np.float32) / 4)
        values = values.to(TORCH[dtype])
        layout = ops.block_layout(torch.from_numpy(blocks), n, k, edge)
        full = np.zeros((mask.shape[0] * edge, mask.shape[1] * edge))
        for (i, j), v in zip(blocks, values.float().numpy()):
            full[i * edge : (i + 1) * edge, j * edge : (j + 1) * edge] = v
        extra = full[:n, :k]
        more = dict(values=values.cuda(), layout=layout.cuda(), block=edge)
    got = _cuda.int4_linear(x, packed, bias, *arguments(weight), kernel=kernel, **more)
    again = _cuda.int4_linear(x, packed, bias, *arguments(weight), kernel=kernel, **more)
    assert torch.equal(got, again)
    xs = x.float().cpu().numpy().astype(np.float64)
    want = int4_linear(xs, weight, bias.cpu().numpy()) + xs @ extra.T
    size = np.abs(xs) @ (weight.magnitude() + np.abs(extra)).T + np.abs(bias.cpu().numpy())
    # The tensor cores' own sums may drop bits below those of the largest term of 16.
    bound = size * 2.0**-22 * (8 + k**0.5) + np.abs(want) * HALF_ULP[dtype] + 2.0**-24
    worst = np.max(np.abs(got.float().cpu().numpy() - want) / bound)
    assert worst <= 1.0, (m, n, k, group, bits, affine, scale_dtype, dtype, kernel, worst)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_forward_against_float64(dtype, bits):
    rng = np.random.default_rng(bits)
    formats = itertools.cycle(
        itertools.product([32, 64, 128, 256, -1], [False, True], ["float16", "float32"])
    )
    for m in (*range(1, 18), 31, 33, 64, 65, 100, 128):
        for n, k in [(118, 577), (4096, 1024), (1, 64), (257, 4095)]:
            group, affine, scale_dtype = next(formats)
            check(rng, m, n, k, group, bits, affine, scale_dtype, dtype)


@pytest.mark.parametrize("tiles, m", [(8, 8), (16, 16), (32, 32), (64, 64), (32, 128)])
def test_forced_rows(tiles, m):
    rng = np.random.default_rng(tiles)
    for affine, dtype in itertools.product([False, True], DTYPES):
        kernel = f"int4_linear.cuda.sm80.m{tiles}"
        check(rng, m, 520, 2048, 128, 4, affine, "float16", dtype, kernel)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="the tile kernels need a GPU of compute capability 9.0",
)
@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tile_kernels(tokens, dtype):
    rng = np.random.default_rng(tokens)
    kernel = f"int4_linear.cuda.sm90a.m{tokens}"
    formats = itertools.cycle(
        itertools.product([32, 64, 128, 256, -1], [False, True], ["float16", "float32"])
    )
    shapes = [(118, 576), (4096, 1024), (1, 64), (257, 4088)]
    for m in (1, 63, 64, 65, 128, 200, 1000):
        for bits, (n, k) in itertools.product([4, 8], shapes):
            group, affine, scale_dtype = next(formats)
            check(rng, m, n, k, group, bits, affine, scale_dtype, dtype, kernel)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0),
    reason="this GPU runs the tile kernels",
)
def test_tile_kernels_are_refused_elsewhere():
    weight, packed, x = layer(np.random.default_rng(5), n=64)
    with pytest.raises(RuntimeError, match=r"compute capability 9\.0, got"):
        _cuda.int4_linear(x, packed, None, *arguments(weight), kernel="int4_linear.cuda.sm90a.m64")


@pytest.mark.parametrize("edge", [32, 64, 128])
@pytest.mark.parametrize("m", [1, 7, 16, 29, 128])
def test_adapter(edge, m):
    rng = np.random.default_rng(edge + m)
    check(rng, m, 700, 1100, 128, 4, True, "float16", "bfloat16", edge=edge)


def layer(rng, n=1024, k=2048):
    weight = random_weight(rng, n, k, 128, 4, False, "float16")
    packed = torch.from_numpy(pack(weight)).cuda()
    x = torch.from_numpy(rng.normal(size=(4, k)).astype(np.float32)).bfloat16().cuda()
    return weight, packed, x


def test_graph_capture_and_replay():
    weight, packed, x = layer(np.random.default_rng(1))
    want = _cuda.int4_linear(x, packed, None, *arguments(weight))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = _cuda.int4_linear(x, packed, None, *arguments(weight))
        second = _cuda.int4_linear(first.repeat(1, 2), packed, None, *arguments(weight))
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(first, want)
    check_again = _cuda.int4_linear(want.repeat(1, 2), packed, None, *arguments(weight))
    assert torch.equal(second, check_again)


def test_streams_do_not_share_counters():
    weight, packed, x = layer(np.random.default_rng(2))
    want = _cuda.int4_linear(x, packed, None, *arguments(weight))
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(_cuda.int4_linear(x, packed, None, *arguments(weight)))
    torch.cuda.synchronize()
    assert all(torch.equal(r, want) for r in results)


def test_no_synchronisation():
    weight, packed, x = layer(np.random.default_rng(3))
    _cuda.int4_linear(x, packed, None, *arguments(weight))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _cuda.int4_linear(x, packed, None, *arguments(weight))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_refusals():
    weight, packed, x = layer(np.random.default_rng(4), n=64)
    for bad, text in [
        (x.float(), "1 to 128 rows of bfloat16 or float16"),
        (x.repeat(40, 1), "1 to 128 rows of bfloat16 or float16"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            _cuda.int4_linear(bad, packed, None, *arguments(weight))
    with pytest.raises(RuntimeError, match="kernel must be the id of a CUDA row"):
        _cuda.int4_linear(x, packed, None, *arguments(weight), kernel="nothing")


# --- block_weight_grad ----------------------------------------------------------------------------


def gradient(rng, m, n, k, edge, dtype, density=0.3):
    mask = rng.random((-(-n // edge), -(-k // edge))) < density
    mask[-1, -1] = True
    blocks = np.argwhere(mask)
    layout = ops.block_layout(torch.from_numpy(blocks), n, k, edge).cuda()
    g, x = (
        torch.from_numpy(rng.normal(size=(m, size)).astype(np.float32)).to(TORCH[dtype]).cuda()
        for size in (n, k)
    )
    return blocks, layout, g, x


def check_gradient(rng, m, n, k, edge, dtype, out=None, density=0.3):
    blocks, layout, g, x = gradient(rng, m, n, k, edge, dtype, density)
    out = out or torch.float32
    got = _cuda.block_weight_grad(g, x, layout, block=edge, dtype=out)
    assert torch.equal(got, _cuda.block_weight_grad(g, x, layout, block=edge, dtype=out))
    want = np.zeros((-(-n // edge) * edge, -(-k // edge) * edge))
    size = want.copy()
    gs, xs = (t.float().cpu().numpy().astype(np.float64) for t in (g, x))
    want[:n, :k], size[:n, :k] = gs.T @ xs, np.abs(gs).T @ np.abs(xs)
    bound = size * 2.0**-22 * (8 + m**0.5) + 2.0**-24
    bound += np.abs(want) * (2.0**-24 if out == torch.float32 else HALF_ULP[dtype])
    for value, (i, j) in zip(got.float().cpu().numpy(), blocks):
        part = np.s_[edge * i : edge * i + edge, edge * j : edge * j + edge]
        assert (np.abs(value - want[part]) <= bound[part]).all(), (m, n, k, edge, dtype, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edge", [32, 64, 128])
def test_weight_grad_against_float64(edge, dtype):
    rng = np.random.default_rng(edge)
    for m, n, k in [
        (1, 32, 40),
        (33, 70, 129),
        (257, 200, 300),
        (1025, 513, 384),
        (4096, 256, 512),
    ]:
        check_gradient(rng, m, n, k, edge, dtype)
        check_gradient(rng, m, n, k, edge, dtype, TORCH[dtype])
    check_gradient(rng, 2048, 1024, 1024, edge, dtype, density=0.9)


def test_weight_grad_in_graphs_and_on_streams():
    _, layout, g, x = gradient(np.random.default_rng(1), 2048, 256, 256, 32, "bfloat16")
    want = _cuda.block_weight_grad(g, x, layout, block=32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _cuda.block_weight_grad(g, x, layout, block=32)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(_cuda.block_weight_grad(g, x, layout, block=32))
    torch.cuda.synchronize()
    assert torch.equal(got, want)
    assert all(torch.equal(r, want) for r in results)


def test_weight_grad_refusals():
    _, layout, g, x = gradient(np.random.default_rng(2), 16, 64, 64, 16, "bfloat16")
    with pytest.raises(RuntimeError, match="blocks of 32, 64 or 128 of bfloat16 or float16"):
        _cuda.block_weight_grad(g, x, layout, block=16)
    with pytest.raises(RuntimeError, match="kernel must be the id of a CUDA row"):
        _cuda.block_weight_grad(g, x, layout, block=16, kernel="nothing")


# --- masked steps of blocks -----------------------------------------------------------------------


def blocks_of(generator, edge, n, k, count, dtype, weight):
    """values, grads, m, v, ages, weights, blocks of one tensor, on the CPU."""
    grid = -(-n // edge), -(-k // edge)
    chosen = torch.randperm(grid[0] * grid[1], generator=generator)[:count].sort().values
    shape = (count, edge, edge)
    made = [torch.randn(shape, generator=generator).to(t) for t in (dtype, dtype)]
    made += [torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)]
    made.append(torch.randint(0, 9, (count,), generator=generator).int())
    made.append(torch.randn(n, k, generator=generator).to(weight))
    made.append(torch.stack([chosen // grid[1], chosen % grid[1]], 1).int())
    return made


def steps(ours, rule, lists, edge, **more):
    values, grads, m, v, ages, weights, blocks = lists
    if rule == "adamw":
        ours.masked_adamw_block_(values, grads, m, v, ages, weights, blocks, block=edge, lr=0.01,
                                 weight_decay=0.1, **more)  # fmt: skip
    else:
        ours.masked_sgd_block_(values, grads, m, ages, weights, blocks, block=edge, lr=0.1,
                               momentum=0.9, dampening=0.2, weight_decay=0.01, **more)  # fmt: skip


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("edge", [16, 32, 64, 128])
def test_masked_steps_give_the_cpus_bits(rule, edge):
    """Of states and ages all; of values and weights too, but that AdamW's coefficients may be one
    unit of float32 off where the device's float64 power rounds otherwise."""
    generator = torch.Generator().manual_seed(edge)
    wide, narrow = torch.float32, torch.bfloat16
    kinds = [(wide, wide), (wide, narrow), (narrow, narrow), (narrow, wide)] * 13
    columns = zip(*(
        blocks_of(generator, edge, 2 * edge + i % 5, 3 * edge - i % 3, 1 + i % 5, *kind)
        for i, kind in enumerate(kinds)
    ))  # fmt: skip
    cpu = [list(column) for column in columns]
    gpu = [[t.cuda() for t in column] for column in cpu]
    multiplier, found = torch.tensor(0.5), torch.tensor(0.0)
    for _ in range(3):
        steps(ops, rule, cpu, edge, multiplier=multiplier)
        steps(_cuda, rule, gpu, edge, multiplier=multiplier.cuda(), found_inf=found.cuda())
    for place, (got, want) in enumerate(zip(gpu, cpu)):
        for a, b in zip(got, want):
            if rule == "adamw" and place in (0, 5):  # values and weights
                rtol = 2.0**-7 if b.dtype == narrow else 2.0**-22
                torch.testing.assert_close(a.cpu(), b, rtol=rtol, atol=1e-7)
            else:
                assert torch.equal(a.cpu(), b)
    before = [[t.clone() for t in column] for column in gpu]
    steps(_cuda, rule, gpu, edge, found_inf=torch.tensor(1.0).cuda())
    assert all(torch.equal(a, b) for x, y in zip(gpu, before) for a, b in zip(x, y))


def test_masked_steps_in_a_graph_without_synchronisation():
    generator = torch.Generator().manual_seed(1)
    cpu = [[t] for t in blocks_of(generator, 32, 100, 100, 7, torch.float32, torch.bfloat16)]
    gpu, twin = ([[t.cuda() for t in column] for column in cpu] for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            steps(_cuda, "adamw", twin, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps(_cuda, "adamw", gpu, 32)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for x, y in zip(gpu, twin) for a, b in zip(x, y))
