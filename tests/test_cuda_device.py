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
