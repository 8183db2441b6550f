"""Clocks for GPU benchmarks and the tuner: replayed graphs over rotating weights, and do_bench."""

from __future__ import annotations

import math
import statistics
from typing import Any, Callable

import torch

ROTATE = 160 << 20  # bytes of weights a graph walks over: three times an H200's L2 cache
ROUNDS = 5
SPAN = 0.02  # seconds of replays in a round, where one replay is not longer
MOST_REPLAYS = 20

Call = Callable[[int], Any]
Calls = dict[str, tuple[Call, int]]


def graph_seconds(calls: Calls, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds a call of each contender, one value a round, from replayed graphs.

    Args:
        calls: name -> (call of a copy's number, number of copies). rounds: values of each.
    """
    graphs = {}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(graph: torch.cuda.CUDAGraph, replays: int) -> float:
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / replays

    for name, (call, copies) in calls.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(copies):
                call(i)  # compiles, and fills whatever is cached
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(copies):
                call(i)
        graph.replay()
        once = timed(graph, 1)
        graphs[name] = (graph, copies, replays_for(once))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        order = list(graphs.items())
        for name, (graph, copies, replays) in order if turn % 2 == 0 else reversed(order):
            graph.replay()
            seconds[name].append(timed(graph, replays) / copies)
    return seconds


def replays_for(seconds: float) -> int:
    """How many replays of so many seconds fill a round."""
    return max(1, min(MOST_REPLAYS, math.ceil(SPAN / seconds))) if seconds > 0 else MOST_REPLAYS


def measure(calls: Calls) -> dict[str, dict[str, float]]:
    """Both clocks of every contender: {name: {graph, graph_min, do_bench}} in seconds."""
    from triton.testing import do_bench

    out = {}
    for name, rounds in graph_seconds(calls).items():
        call = calls[name][0]
        out[name] = {
            "graph": statistics.median(rounds),
            "graph_min": min(rounds),
            "do_bench": do_bench(lambda call=call: call(0), warmup=5, rep=25) / 1e3,
        }
    return out


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy (read and written) and FLOP a second of cuBLAS bfloat16."""
    a = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    n = 8192
    x, w = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    y = torch.empty_like(x)
    calls = {"copy": (lambda i: b.copy_(a), 1), "matmul": (lambda i: torch.mm(x, w, out=y), 1)}
    times = {k: min(v) for k, v in graph_seconds(calls).items()}
    return {
        "copy_bytes_per_s": 2 * a.numel() * 4 / times["copy"],
        "matmul_flops": 2 * n**3 / times["matmul"],
    }


def copies(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor and as many clones as make a rotation cold."""
    count = max(1, -(-ROTATE // (tensor.numel() * tensor.element_size())))
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over largest value; NaN where either holds one."""
    got, want = got.float(), want.float()
    return float((got - want).abs().max() / want.abs().max()) if want.numel() else 0.0


def checked(name: str, got: torch.Tensor, want: torch.Tensor) -> float:
    """`off`; raises if bfloat16 does not explain it."""
    error = off(got, want)
    if not error < 2e-2:
        raise AssertionError(f"bench gpu: {name} is off by {error:.3g} of the largest value")
    return error


class Int4:
    """One layer's packed weight, group 128, symmetric, copied until a rotation is cold; its dense
    twin in float32 and copies of that in bfloat16."""

    form = dict(group_size=128, affine=False, scale_dtype=torch.float16)

    def __init__(self, n: int, k: int) -> None:
        from nibblock import ops

        torch.manual_seed(0)
        self.n, self.k = n, k
        self.codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
        self.scales = (torch.rand(n, k // 128) / 64 + 0.01).half()
        packed = ops.int4_pack(self.codes, self.scales, in_features=k, group_size=128).cuda()
        self.dense32 = ops.int4_dequantize(packed, out_features=n, in_features=k, **self.form)
        self.packed = copies(packed)
        self.dense = copies(self.dense32.bfloat16())
