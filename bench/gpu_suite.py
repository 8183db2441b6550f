"""`python -m nibblock bench gpu`: every kernel for an NVIDIA GPU beside cuBLAS, in one run.

Two clocks for each figure, because they answer different questions. `graph`: the calls captured in
a CUDA graph that walks over copies of the weights larger than the L2 cache, replayed; what a decode
loop sees. `do_bench`: one call after another, each after a cleared cache, launch included; what
published tables mostly show. Ours and cuBLAS alternate within a round; other libraries follow at
once, each with a time of its own after which it leaves the run. Every result is checked against
float32 products before it is timed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable

import torch
from nibblock import _cuda
from nibblock.triton_kernels._tuned import slug, user_folder

from . import goals, gpu_cuda, gpu_goals, gpu_plot, table
from .gpu_peers import INT4, Int4Peers, Peers, torch_bsr
from .gpu_timing import Call, Int4, ceilings, checked, copies, measure

PARTS = ("int4", "dx", "blocks", "wgrad", "adapter", "adamw")
LAYERS = {
    "8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
DX_ROWS = (1, 512, 1024, 2048, 4096)
CUDA_ROWS = 128  # of x, that the CUDA C++ kernels serve
PEERS = ("humming-kernels", "gemlite", "bitsandbytes")


def cuda_call(layer: Int4, x: torch.Tensor, **adapter: Any) -> Call:
    """The CUDA C++ kernel of int4_linear, by name: no row of it is chosen before it is measured."""
    form = (layer.n, 128, 4, False, torch.float16)
    return lambda i: _cuda.int4_linear(x, layer.packed[i], None, *form, **adapter)


def run_int4(dx: bool, peers: Peers) -> Iterator[dict[str, Any]]:
    from nibblock import ops

    for model, shapes in LAYERS.items():
        for n, k in shapes:
            layer = Int4(n, k)
            others = None if dx else Int4Peers(peers, layer)
            for m in DX_ROWS if dx else ROWS:
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
                times = measure(calls)
                if others is not None:
                    times.update(others.measure(x, want))
                moved = layer.packed[0].numel() + 2 * m * (n + k)
                yield dict(
                    model=model, shape=f"{n}x{k}", m=m, error=error, bytes=moved, times=times
                )
            del layer, others


def run_blocks(peers: Peers) -> Iterator[dict[str, Any]]:
    from nibblock import ops

    n = k = 4096
    for block in (32, 64, 128):
        for density, rows in ((0.1, (1,)), (0.25, (4096,)), (0.5, (4096,))):
            torch.manual_seed(0)
            index = (torch.rand(n // block, k // block) < density).nonzero()
            layout = ops.block_layout(index, n, k, block).cuda()
            values = [torch.randn(len(index), block, block, device="cuda").bfloat16() / 64]
            values = copies(values[0])
            dense = torch.zeros(n // block, k // block, block, block, device="cuda")
            dense[index[:, 0], index[:, 1]] = values[0].float()
            dense = dense.transpose(1, 2).reshape(n, k)
            several = copies(dense.bfloat16())
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
                where, want = f"block {block}, {density:.0%}", x.float() @ dense.t()
                make = functools.partial(torch_bsr, dense, block, x)
                bsr = peers.attempt("torch BSR", where, make)
                if bsr is not None:
                    times.update(peers.times("torch BSR", where, {"torch BSR": bsr}, want))
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
            stored = tiles[index[:, 0], index[:, 1]]
            error = checked("block_weight_grad", ours(0), stored)
            calls = {"nibblock": (ours, 1), "cuBLAS bf16": (lambda i: g.t() @ x, 1)}
            calls |= gpu_cuda.weight_grad(g, x, layout, block, stored)
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
    calls |= gpu_cuda.adamw(lists, ages, weights, blocks, block, packed)
    times = measure(calls)
    moved = layers * active * block * block
    yield dict(
        parameters=moved, times=times, bytes_per_s=moved * 30 / times["nibblock"]["graph"],
        of_parameters=layers * n * k, dense_parameters=4 * n * k,
    )  # fmt: skip


RUN: dict[str, Callable[[Peers], Iterator[dict[str, Any]]]] = {
    "int4": lambda peers: run_int4(False, peers),
    "dx": lambda peers: run_int4(True, peers),
    "blocks": run_blocks,
    "wgrad": lambda peers: run_wgrad(),
    "adapter": lambda peers: run_adapter(),
    "adamw": lambda peers: run_adamw(),
}


def show(part: str, rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    facts = [key for key in rows[0] if key not in ("times", "error", "bytes")]
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


def report(facts: dict[str, Any]) -> str:
    """What the command prints at its end: the goals, and who was left out."""
    lines = ["goals", goals.render(facts["goals"])]
    lines += [f"{name} left out from {reason}" for name, reason in facts["left_out"].items()]
    return "\n".join(lines)


def save(facts: dict[str, Any], folder: Path, parts: list[str] | None) -> Path:
    """Writes the JSON of a run, gpu-<name of the GPU>[-<part> ...].json, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("-".join(["gpu", slug(facts["gpu"]), *(parts or [])]) + ".json")
    path.write_text(json.dumps(facts, indent=1) + "\n")
    return path


def draw(facts: dict[str, Any], path: Path) -> str:
    """The chart beside a run's JSON, or why there is none."""
    try:
        gpu_plot.chart(facts, path)
    except (ImportError, ValueError) as error:
        return f"no chart: {error}"
    return f"wrote {path}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m nibblock bench gpu", description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all of them")
    parser.add_argument("--out", type=Path, help="folder of the JSON and the chart")
    parser.add_argument("--no-peers", action="store_true", help="only cuBLAS beside our kernels")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench gpu: needs an NVIDIA GPU and a CUDA build of torch, got none", file=sys.stderr)
        return 2
    peers = Peers()
    if options.no_peers:
        peers.left_out = {name: "the start: --no-peers" for name in (*INT4, "torch BSR")}
    facts = {
        "benchmark": "gpu",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "versions": {
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton"),
            **{name: _version(name) for name in PEERS},
        },
        "cuda_kernels": _cuda.refusal() or "measured where at most 128 rows are served",
        "tuned": user_folder() is not None,
        "ceilings": ceilings(),
        "left_out": peers.left_out,
        "seconds": {},
        "parts": {},
    }
    for part in options.part or PARTS:
        start = time.monotonic()
        rows = facts["parts"][part] = []
        for row in RUN[part](peers):
            rows.append(row)
        facts["seconds"][part] = round(time.monotonic() - start, 1)
        facts["goals"] = gpu_goals.goals(facts)
        print(show(part, rows), flush=True)
        if options.out:  # after every part: a run that is cut short keeps what it measured
            path = save(facts, options.out, options.part)
    print(report(facts))
    if options.out:
        print(draw(facts, path.with_suffix(".png")))
    return 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
