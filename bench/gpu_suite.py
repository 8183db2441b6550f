"""`python -m nibblock bench gpu`: every kernel for an NVIDIA GPU beside cuBLAS, in one run.

Two clocks for each figure, because they answer different questions. `graph`: the calls captured in
a CUDA graph that walks over copies of the weights larger than the L2 cache, replayed; what a decode
loop sees. `do_bench`: one call after another, each after a cleared cache, launch included; what
published tables mostly show. Ratios are taken between neighbours of one round. Every result is
checked against float32 products before it is timed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable

import torch
from nibblock import _cuda

from . import table

PARTS = ("int4", "dx", "blocks", "wgrad", "adapter", "adamw")
LAYERS = {
    "8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
ROWS = (1, 16, 64, 128, 512, 1024, 4096)
ROTATE = 160 << 20  # bytes of weights a graph walks over: three times an H200's L2 cache
REPLAYS, ROUNDS = 20, 5
CUDA_ROWS = 128  # of x, that the CUDA C++ kernels serve
PEERS = ("humming-kernels", "gemlite", "bitsandbytes")

Call = Callable[[int], Any]


def graph_seconds(calls: dict[str, tuple[Call, int]]) -> dict[str, list[float]]:
    """Seconds a call of each contender, one value a round, from replayed graphs.

    Args:
        calls: name -> (call of a copy's number, number of copies).
    """
    graphs = {}
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
        graphs[name] = (graph, copies)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(ROUNDS):
        order = list(graphs.items())
        for name, (graph, copies) in order if turn % 2 == 0 else reversed(order):
            graph.replay()
            start.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / REPLAYS / copies)
    return seconds


def measure(calls: dict[str, tuple[Call, int]]) -> dict[str, dict[str, float]]:
    """Both clocks of every contender: {name: {graph, graph_min, do_bench}} in seconds."""
    from triton.testing import do_bench

    out = {}
    for name, rounds in graph_seconds(calls).items():
        call = calls[name][0]
        out[name] = {
            "graph": statistics.median(rounds),
            "graph_min": min(rounds),
            "do_bench": do_bench(lambda call=call: call(0), warmup=10, rep=40) / 1e3,
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


def checked(name: str, got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over largest value; raises if bfloat16 does not explain it."""
    error = float((got.float() - want).abs().max() / want.abs().max())
    if not error < 2e-2:
        raise AssertionError(f"bench gpu: {name} is off by {error:.3g} of the largest value")
    return error


class Int4:
    """One layer's packed weight, copied until a rotation is cold, and its dense twin."""

    def __init__(self, n: int, k: int) -> None:
        from nibblock import ops

        torch.manual_seed(0)
        self.n, self.k = n, k
        q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
        scales = (torch.rand(n, k // 128) / 64 + 0.01).half()
        packed = ops.int4_pack(q, scales, in_features=k, group_size=128).cuda()
        self.form = dict(group_size=128, affine=False, scale_dtype=torch.float16)
        self.dense32 = ops.int4_dequantize(packed, out_features=n, in_features=k, **self.form)
        dense = self.dense32.bfloat16()
        self.packed = _copies(packed)
        self.dense = _copies(dense)


def cuda_call(layer: Int4, x: torch.Tensor, **adapter: Any) -> Call:
    """The CUDA C++ kernel of int4_linear, by name: no row of it is chosen before it is measured."""
    form = (layer.n, 128, 4, False, torch.float16)
    return lambda i: _cuda.int4_linear(x, layer.packed[i], None, *form, **adapter)


def _copies(tensor: torch.Tensor) -> list[torch.Tensor]:
    count = max(1, -(-ROTATE // (tensor.numel() * tensor.element_size())))
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def _torch_int4(layer: Int4) -> Call | None:
    """torch's own int4 product on random codes of the same size, where this torch has it."""
    try:
        codes = torch.randint(0, 256, (layer.n, layer.k // 2), dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        grid = torch.rand(layer.k // 128, layer.n, 2, device="cuda").bfloat16()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        # A peer that this torch or GPU lacks costs its own rows, not the run.
        print(f"torch int4 left out of {layer.n}x{layer.k}: {type(error).__name__}: {error}")
        return None
    several = _copies(packed)
    return lambda x, i: torch.ops.aten._weight_int4pack_mm(x, several[i % len(several)], 128, grid)


def run_int4(dx: bool) -> Iterator[dict[str, Any]]:
    from nibblock import ops

    for model, shapes in LAYERS.items():
        for n, k in shapes:
            layer = Int4(n, k)
            peer = None if dx else _torch_int4(layer)
            for m in ROWS:
                x = torch.randn(m, n if dx else k, device="cuda").bfloat16()

                def ours(i, x=x, layer=layer):
                    if dx:
                        return ops.int4_linear_dx(
                            x, layer.packed[i], in_features=layer.k, **layer.form
                        )
                    return ops.int4_linear(x, layer.packed[i], out_features=layer.n, **layer.form)

                def dense(i, x=x, layer=layer):
                    return x @ layer.dense[i] if dx else x @ layer.dense[i].t()

                want = x.float() @ (layer.dense32 if dx else layer.dense32.t())
                error = checked(f"int4 {n}x{k} m={m}", ours(0), want)
                calls = {
                    "nibblock": (ours, len(layer.packed)),
                    "cuBLAS bf16": (dense, len(layer.dense)),
                }
                if not dx and m <= CUDA_ROWS and _cuda.refusal() is None:
                    by_name = cuda_call(layer, x)
                    checked(f"CUDA C++ int4 {n}x{k} m={m}", by_name(0), want)
                    calls["CUDA C++"] = (by_name, len(layer.packed))
                if peer is not None:
                    calls["torch int4"] = (lambda i, x=x, p=peer: p(x, i), len(layer.packed))
                yield dict(model=model, shape=f"{n}x{k}", m=m, error=error, times=measure(calls))
            del layer


def run_blocks() -> Iterator[dict[str, Any]]:
    from nibblock import ops

    n = k = 4096
    for block in (32, 64, 128):
        for density, rows in ((0.1, (1,)), (0.25, (4096,)), (0.5, (4096,))):
            torch.manual_seed(0)
            index = (torch.rand(n // block, k // block) < density).nonzero()
            layout = ops.block_layout(index, n, k, block).cuda()
            values = [torch.randn(len(index), block, block, device="cuda").bfloat16() / 64]
            values = _copies(values[0])
            dense = torch.zeros(n // block, k // block, block, block, device="cuda")
            dense[index[:, 0], index[:, 1]] = values[0].float()
            dense = dense.transpose(1, 2).reshape(n, k)
            several = _copies(dense.bfloat16())
            for m in rows:
                x = torch.randn(m, k, device="cuda").bfloat16()

                def ours(i, x=x, v=values, layout=layout, block=block):
                    return ops.block_sparse_linear(x, v[i], layout, out_features=n, block=block)

                error = checked(f"blocks of {block}", ours(0), x.float() @ dense.t())
                calls = {
                    "nibblock": (ours, len(values)),
                    "cuBLAS bf16": (lambda i, x=x, w=several: x @ w[i].t(), len(several)),
                }
                times = measure(calls)
                share = len(index) * block * block / (n * k)
                ratio = times["cuBLAS bf16"]["graph"] / times["nibblock"]["graph"]
                yield dict(block=block, density=share, m=m, error=error, times=times,
                           per_flop=ratio * share)  # fmt: skip


def run_wgrad() -> Iterator[dict[str, Any]]:
    from nibblock import ops

    n = k = m = 4096
    g, x = (torch.randn(m, n, device="cuda").bfloat16() for _ in range(2))
    want = g.float().t() @ x.float()
    for block in (32, 64, 128):
        for density in (0.01, 0.02, 0.05, 0.25):
            index = (torch.rand(n // block, k // block) < density).nonzero()
            layout = ops.block_layout(index, n, k, block).cuda()

            def ours(i, layout=layout, block=block):
                return ops.block_weight_grad(g, x, layout, block=block, dtype=torch.bfloat16)

            tiles = want.view(n // block, block, k // block, block).transpose(1, 2)
            error = checked("block_weight_grad", ours(0), tiles[index[:, 0], index[:, 1]])
            calls = {"nibblock": (ours, 1), "cuBLAS bf16": (lambda i: g.t() @ x, 1)}
            yield dict(block=block, density=density, m=m, error=error, times=measure(calls))


def run_adapter() -> Iterator[dict[str, Any]]:
    """What blocks of 2 % and a rank of 8 add to the int4 product they ride on."""
    from nibblock import ops

    layer, block = Int4(4096, 4096), 64
    index = (torch.rand(64, 64) < 0.02).nonzero()
    layout = ops.block_layout(index, 4096, 4096, block).cuda()
    v = torch.randn(len(index), block, block, device="cuda") / 64
    a, c = torch.randn(8, 4096, device="cuda") / 64, torch.randn(4096, 8, device="cuda")
    for m in (1, 128, 4096):
        x = torch.randn(m, 4096, device="cuda").bfloat16()
        form = dict(out_features=4096, **layer.form)

        def base(i, x=x, form=form):
            return ops.int4_linear(x, layer.packed[i], **form)

        def with_blocks(i, x=x, form=form):
            packed = layer.packed[i]
            return ops.int4_block_sparse_linear(x, packed, v, layout, block=block, **form)

        def with_both(i, x=x, form=form):
            packed = layer.packed[i]
            return ops.int4_block_sparse_linear(
                x, packed, v, layout, None, a, c, block=block, **form
            )

        count = len(layer.packed)
        calls = {"base": (base, count), "blocks": (with_blocks, count), "both": (with_both, count)}
        if m <= CUDA_ROWS and _cuda.refusal() is None:
            more = dict(values=v, layout=layout, block=block)
            checked("CUDA C++ adapter", cuda_call(layer, x, **more)(0), with_blocks(0).float())
            calls["CUDA C++ base"] = (cuda_call(layer, x), count)
            calls["CUDA C++ blocks"] = (cuda_call(layer, x, **more), count)
        yield dict(block=block, density=0.02, m=m, times=measure(calls))


def run_adamw() -> Iterator[dict[str, Any]]:
    """Packed AdamW on 1 % of 2 G parameters, the weight written through, beside fused dense."""
    from nibblock import ops

    n = k = 8192
    block, layers, active = 32, 32, 655
    kind = dict(device="cuda", dtype=torch.float32)
    weights = [torch.zeros(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
    blocks, lists = [], [[torch.randn(active, block, block, **kind) for _ in weights]]
    lists += [[torch.zeros_like(p) for p in lists[0]] for _ in range(3)]
    for _ in weights:
        chosen = torch.randperm((n // block) * (k // block))[:active].sort().values
        pair = torch.stack([chosen // (k // block), chosen % (k // block)], 1)
        blocks.append(pair.int().cuda())
    ages = [torch.zeros(active, device="cuda", dtype=torch.int32) for _ in weights]

    def packed(i):
        ops.masked_adamw_block_(
            lists[0], lists[1], lists[2], lists[3], ages, weights, blocks, block=block, lr=1e-3
        )

    big = [torch.nn.Parameter(torch.zeros(n, k, device="cuda")) for _ in range(4)]
    for p in big:
        p.grad = torch.zeros_like(p)
    fused = torch.optim.AdamW(big, lr=1e-3, fused=True, capturable=True)
    calls = {"nibblock": (packed, 1), "torch fused": (lambda i: fused.step(), 1)}
    times = measure(calls)
    moved = layers * active * block * block
    yield dict(
        parameters=moved, times=times, bytes_per_s=moved * 30 / times["nibblock"]["graph"],
        dense_parameters=4 * n * k,
    )  # fmt: skip


RUN: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "int4": lambda: run_int4(False),
    "dx": lambda: run_int4(True),
    "blocks": run_blocks,
    "wgrad": run_wgrad,
    "adapter": run_adapter,
    "adamw": run_adamw,
}


def show(part: str, rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    facts = [key for key in rows[0] if key not in ("times", "error")]
    lines = []
    for row in rows:
        own = next(iter(row["times"].values()))["graph"]
        cells = [f"{row[key]:.3g}" if isinstance(row[key], float) else row[key] for key in facts]
        for name in names:
            time = row["times"].get(name)
            cells += ["", ""] if time is None else [
                table.seconds(time["graph"]), table.times(time["graph"] / own)
            ]  # fmt: skip
        lines.append(cells)
    header = [*facts, *(h for name in names for h in (name, "over first"))]
    return f"{part}\n" + table.render(header, lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m nibblock bench gpu", description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all of them")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench gpu: needs an NVIDIA GPU and a CUDA build of torch, got none", file=sys.stderr)
        return 2
    facts = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "versions": {
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton"),
            **{name: _version(name) for name in PEERS},
        },
        "cuda_kernels": _cuda.refusal() or "measured where at most 128 rows are served",
        "ceilings": ceilings(),
        "parts": {},
    }
    for part in options.part or PARTS:
        rows = list(RUN[part]())
        facts["parts"][part] = rows
        print(show(part, rows), flush=True)
        if options.json:  # after every part: a run that is cut short keeps what it measured
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
