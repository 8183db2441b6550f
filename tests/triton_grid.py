"""Compiles every candidate of the tuner's grid for compute capability 8.0 and 9.0, without a GPU.

    python tests/triton_grid.py list       their names; nothing is compiled
    python tests/triton_grid.py core       one JSON line each of a fixed few, the heaviest included
    python tests/triton_grid.py write      all of them, into bench/results/triton_grid.json
    python tests/triton_grid.py write OP   only those of one op, the rest is kept

A candidate's launches are recorded from the wrapper itself, with layers large enough that a sum
over few rows is not split and small enough that it is.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

BF16 = torch.bfloat16
CAPABILITIES = (80, 90)
REPORT = Path(__file__).resolve().parent.parent / "bench/results/triton_grid.json"
# Label starts of `core`: what compiles within seconds. triton_shipped's core has the int4 kernels.
CORE = (
    "block_weight_grad rows=1024 n=1 dtype=bfloat16 block=32 BI=32 BJ=32 BM=128",
    "masked_adamw_flat",
)


def classes():
    """(class, call) of every class whose grid has more than the configuration chosen by hand; one
    for each set of kernels, because n and k do not change the grid."""
    from nibblock.triton_kernels import _configs as c
    from nibblock.triton_kernels import block_sparse_linear as blocks
    from nibblock.triton_kernels import masked_update as updates
    from nibblock.triton_kernels.block_scores import block_scores
    from nibblock.triton_kernels.int4_linear import Format, linear

    for n, k in ((1024, 1024), (1 << 15, 1 << 15)):  # with and without a split
        f = Format(n, k, 128, 4, True, torch.float16)
        packed = torch.empty(f.places()[0] * 4 * (n // 16), dtype=torch.uint8)
        for rows in (16, 32, 64, 128, 512):
            if rows > 64 and n > 1024:
                continue  # sums over many rows are never split
            for dx in (False, True):
                if dx and rows > 128:
                    continue  # the grid of 128 rows
                x = torch.empty(rows, n if dx else k, dtype=BF16)
                op = "int4_linear_dx" if dx else "int4_linear"
                shape = c.int4_class(op, rows, n, k, BF16, 128, 4)
                yield shape, partial(linear, x, packed, None, f, None, dx)
    n = k = 1024
    for block in (32, 64, 128):
        layout = torch.zeros(2 * (n // block) + 2 + 3, dtype=torch.int32)
        v = torch.empty(1, block, block, dtype=BF16)
        for rows in (16, 64, 128):
            x = torch.empty(rows, k, dtype=BF16)
            for dx in (False, True):
                op = "block_sparse_linear_dx" if dx else "block_sparse_linear"
                shape = c.blocks_class(op, rows, n, k, BF16, BF16, block)
                yield shape, partial(blocks.linear, x, v, layout, None, None, n, k, block, dx)
        x = torch.empty(1024, k, dtype=BF16)
        shape = c.weight_grad_class(1024, 1, BF16, block)
        yield shape, partial(blocks.block_weight_grad, x, x, layout, block, BF16)
    x = torch.empty(1024, k, dtype=BF16)
    sums = torch.empty(n // 32, k // 32)
    shape = c.scores_class(1024, n, k, BF16, 32)
    yield shape, partial(block_scores, sums, None, x, x, None, 32, 0, 0)
    rule = updates.adamw_rule(1e-3, 0.9, 0.999, 1e-8, 0.01)
    p = torch.empty(4, 32, 32)
    age, index = torch.zeros(4, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32)
    lists = [[p], [p], [p.clone()], [p.clone()], [age], False, None, None]
    weights = [torch.empty(n, k, dtype=BF16)]
    shape = c.updates_class("adamw", "block", torch.float32, 32)
    yield (
        shape,
        partial(updates.step, "block", rule, *lists, block=32, weights=weights, blocks=[index]),
    )
    p, m = torch.empty(4096), torch.empty(2048)
    lists = [[p], [p], [m], [m.clone()], [age[:1]], False, None, None]
    where = torch.zeros(2048, dtype=torch.int64)
    shape = c.updates_class("adamw", "flat", torch.float32, 0)
    yield shape, partial(updates.step, "flat", rule, *lists, indices=[where])


@functools.cache
def launches(capability: int) -> list[tuple[str, tuple]]:
    """(label, launch) of every distinct main kernel that a candidate makes."""
    from nibblock.triton_kernels import _ahead, _tuned
    from nibblock.triton_kernels._configs import candidates

    seen = {}
    for shape, call in classes():
        by_hand, *others = candidates(shape, capability)
        # triton_shipped compiles what was chosen by hand, but only for layers whose sums it splits.
        for config in [by_hand, *others] if shape.n > 1024 else others:
            with _tuned.forcing(shape.op, config):
                found = _ahead.record(call, capability)
            for launch in found:
                source, options, name = _ahead.source(launch)
                if name.startswith(("int4_finish", "sum_parts", "advance")):
                    continue  # no candidate changes them; triton_shipped compiles them
                key = (source.hash(), json.dumps(options, sort_keys=True))
                facts = " ".join(f"{k}={v}" for k, v in config.items())
                seen.setdefault(key, (f"{shape} {facts}", launch))
    return list(seen.values())


def _compile(at: int, capability: int) -> dict:
    from nibblock.triton_kernels import _ahead

    label, launch = launches(capability)[at]
    start = time.perf_counter()
    done = _ahead.compile_launch(launch, capability)
    facts = ("name", "capability", "registers", "stack", "shared", "tensor_cores")
    seconds = round(time.perf_counter() - start, 2)
    return {"label": label, **{k: done[k] for k in facts}, "seconds": seconds}


def compiled(starts: tuple[str, ...]):
    torch.set_num_threads(1)
    jobs = [
        (at, capability)
        for capability in CAPABILITIES
        for at, (label, _) in enumerate(launches(capability))
        if label.startswith(starts)
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        yield from pool.map(_compile, *zip(*jobs))


def main() -> None:
    if sys.argv[1] == "list":
        from nibblock.triton_kernels import _ahead

        for capability in CAPABILITIES:
            for label, launch in launches(capability):
                print(json.dumps([capability, label, _ahead.source(launch)[2]]))
        return
    if sys.argv[1] == "core":
        for row in compiled(CORE):
            print(json.dumps(row), flush=True)
        return
    import triton

    only = tuple(f"{op} " for op in sys.argv[2:])
    kept = json.loads(REPORT.read_text())["kernels"] if only else []
    rows = [row for row in kept if not row["label"].startswith(only)]
    for row in compiled(only or ("",)):
        rows.append({k: v for k, v in row.items() if k != "seconds"})
        print(f"{len(rows)} {row['seconds']} s {row['label']}", flush=True)
    rows.sort(key=lambda row: (row["capability"], row["label"]))
    REPORT.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
