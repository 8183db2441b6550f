"""Compiles every shipped Triton configuration for compute capability 80 and 90, without a GPU.

    python tests/triton_shipped.py core 80 90    one JSON line a kernel: registers, stack ...
    python tests/triton_shipped.py all 80 90     every combination of types as well; minutes
    python tests/triton_shipped.py list          their names; nothing is compiled
    python tests/triton_shipped.py write         the same, into bench/results/triton_compiled.json
    python tests/triton_shipped.py write KERNEL ...   only kernels of these names, the rest is kept

The launches are recorded from the wrappers themselves, so what is compiled here is what runs: each
shape class, dtype, group length, block edge and kind of adapter. `core` keeps every kernel, tile
and block edge in the types that most use.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
PALETTE = "8 in 4"
CAPABILITIES = (80, 90)
N = K = 1024  # divisible by all tiles, as the layers of real models are


def _int4_calls():
    from nibblock.triton_kernels import int4_linear as int4

    for dtype in (BF16, F16, F32):
        for m in (1, 32, 64, 128, 512):
            if m == 512 and dtype != BF16:
                continue  # no configuration of its own
            for dx in (False, True):
                core = (m in (1, 128) and not (dx and dtype != BF16)) or (dtype == BF16 and not dx)
                yield core, f"int4 {m} {dtype} dx={dx}", int4_call(m, dtype, dx)
    for m in (1, 128):  # the other formats, in the dtype that most use
        for group, bits, affine, scale in (
            (32, 4, True, F32), (64, 4, False, F16), (-1, 4, True, F32), (32, 8, False, F16),
            (16, 8, False, F32), (16, 8, True, F32), (32, 4, True, I8), (16, 4, True, I8),
            (16, 8, False, I8), (32, PALETTE, False, F16), (16, PALETTE, False, F32),
        ):  # fmt: skip
            for dx in (False, True):
                call = int4_call(m, BF16, dx, group, bits, affine, scale, bias=False)
                new = scale == I8 or bits == PALETTE
                core = not dx and (bits == 8 or group <= 32) and (m == 1 or not new)
                what = " int8 scales" if scale == I8 else ""
                form = f"group={group} bits={bits} affine={affine}{what}"
                yield core, f"int4 {m} {form} dx={dx}", call
    f, packed = weight(128, 4, True, F16)
    for dtype in (BF16, F16, F32):
        call = partial(int4.dequantize, packed, f, dtype)
        yield dtype == BF16, f"dequantize {dtype}", call
    rows = torch.zeros(8, dtype=torch.int64)
    yield True, "embedding", partial(int4.dequantize, packed, f, BF16, rows)


def weight(group, bits, affine, scale):
    from nibblock.triton_kernels.int4_linear import Format

    few = bits == PALETTE
    f = Format(N, K, group, 8 if few else bits, affine, scale, few)
    return f, torch.empty(f.places()[0] * 4 * (N // 16), dtype=torch.uint8)


def int4_call(m, dtype, dx, group=128, bits=4, affine=True, scale=F16, adapter=None, bias=True):
    from nibblock.triton_kernels.int4_linear import linear

    f, packed = weight(group, bits, affine, scale)
    given = None if dx or not bias else torch.empty(N, dtype=dtype)
    return partial(linear, torch.empty(m, K, dtype=dtype), packed, given, f, adapter, dx)


def _block_calls():
    from nibblock.triton_kernels import block_sparse_linear as blocks
    from nibblock.triton_kernels.int4_linear import Adapter

    for block in (16, 32, 64, 128):
        layout = torch.zeros(2 * (N // block) + 2 + 3 * 4, dtype=torch.int32)
        for dtype, values in ((BF16, BF16), (BF16, F32), (F16, F32), (F32, F32)):
            v = torch.empty(4, block, block, dtype=values)
            usual = dtype == values == BF16
            for m in (1, 64, 128):
                x = torch.empty(m, K, dtype=dtype)
                for dx in (False, True):
                    label = f"{block}, {m} {dtype} {values} dx={dx}"
                    y0 = None if dx else x
                    call = partial(blocks.linear, x, v, layout, None, y0, N, K, block, dx)
                    core = m == 128 and (usual or (dtype == F32 and block == 64))
                    yield core or (usual and not dx), f"blocks of {label}", call
                    if m == 64:
                        continue
                    pair = torch.empty(8, K, dtype=values), torch.empty(N, 8, dtype=values)
                    adapter = Adapter(v, layout, block, *pair)
                    core = dtype == BF16 and values == F32 and block == (128 if dx else 32)
                    call = int4_call(m, dtype, dx, adapter=adapter)
                    yield core, f"int4 with blocks of {label}", call
            if values == dtype:
                x = torch.empty(1024, K, dtype=dtype)
                call = partial(blocks.block_weight_grad, x, x, layout, block, values)
                core = usual or block == 64
                yield core, f"weight gradient, blocks of {block}, {dtype}", call


def _score_calls():
    from nibblock.triton_kernels.block_scores import block_scores

    for dtype in (BF16, F16, F32):
        x, w = torch.empty(256, K, dtype=dtype), torch.empty(N, K, dtype=dtype)
        for block in (16, 32, 64, 128):
            sums = torch.empty(N // block, K // block)
            core = block == 32 or (dtype == F32 and block == 128)
            call = partial(block_scores, sums, sums.clone(), x, x, w, block, 0, 0)
            yield core, f"scores, blocks of {block} {dtype}", call
            call = partial(block_scores, sums, None, x, x, None, block, 8, 0)
            yield core and dtype != F16, f"scores, sketch, blocks of {block} {dtype}", call


def _gain_calls():
    from nibblock.triton_kernels.block_gain import block_gain

    for dtype in (BF16, F16, F32):
        x = torch.empty(256, K, dtype=dtype)
        for block in (16, 32, 64, 128):
            sums = torch.empty(N // block, K // block)
            call = partial(block_gain, sums, sums.clone(), x, x, block)
            yield block in (32, 128), f"gain, blocks of {block} {dtype}", call


def _masked_calls():
    from nibblock.triton_kernels import masked_update as k

    adamw = k.adamw_rule(1e-3, 0.9, 0.999, 1e-8, 0.01)
    sgd = k.sgd_rule(1e-3, 0.9, 0.0, 0.01, False)
    one = torch.ones(1)
    age, index = torch.zeros(4, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32)
    for name, rule in (("adamw", adamw), ("sgd", sgd)):
        second = name == "adamw"
        for dtype in (F32, BF16):
            usual = name == "adamw"
            for block in (16, 32, 64, 128):
                p = torch.empty(4, block, block, dtype=dtype)
                m = p.float()
                lists = [[p], [p], [m], [m] if second else [], [age], False, one, one]
                weights = [torch.empty(N, K, dtype=BF16)]
                call = partial(
                    k.step, "block", rule, *lists, block=block, weights=weights, blocks=[index]
                )
                yield usual and block == 32, f"{name} blocks of {block} {dtype}", call
            p, m = torch.empty(4096, dtype=dtype), torch.empty(2048)
            lists = [[p], [p], [m], [m] if second else [], [age[:1]], False, one, one]
            where = torch.zeros(2048, dtype=torch.int64)
            call = partial(k.step, "flat", rule, *lists, indices=[where])
            yield usual and dtype == F32, f"{name} flat {dtype}", call
            for mask in (torch.ones(4096, dtype=torch.bool), torch.ones(0, dtype=torch.bool)):
                counts = torch.zeros(5, dtype=torch.int64)
                call = partial(k.step, "bool", rule, *lists, masks=[mask], offsets=[counts])
                yield usual and dtype == F32, f"{name} bool {mask.numel()} {dtype}", call
    for dtype in (F32, BF16):
        g = torch.empty(512, 512, dtype=dtype)
        every = torch.ones(512, 512, dtype=torch.bool)
        call = partial(k.masked_grad, [g], [every], None, 0, one, 1.0)
        yield dtype == F32, f"masked gradient, bool {dtype}", call
        call = partial(k.masked_grad, [g], None, [index], 32, one, 1.0)
        yield dtype == BF16, f"masked gradient, blocks {dtype}", call
        v = torch.empty(4, 32, 32, dtype=dtype)
        yield dtype == F32, f"prox {dtype}", partial(k.prox_blocks, [v], [v], [torch.ones(4)])


@functools.cache
def launches(capability: int) -> list[tuple[bool, str, tuple]]:
    """(core, label, launch) of every distinct launch of all configurations."""
    from nibblock.triton_kernels import _ahead

    seen = {}
    calls = (_int4_calls(), _block_calls(), _score_calls(), _gain_calls(), _masked_calls())
    for core, label, call in itertools.chain(*calls):
        for launch in _ahead.record(call, capability):
            source, options, _ = _ahead.source(launch)
            key = (source.hash(), json.dumps(options, sort_keys=True))
            if core or key not in seen:
                seen[key] = (core, label, launch)
    return list(seen.values())


def _compile(at: int, capability: int) -> dict:
    from nibblock.triton_kernels import _ahead

    _, label, launch = launches(capability)[at]
    start = time.perf_counter()
    done = _ahead.compile_launch(launch, capability)
    facts = ("name", "capability", "registers", "stack", "shared", "tensor_cores", "wide_copies")
    seconds = round(time.perf_counter() - start, 2)
    return {"label": label, **{k: done[k] for k in facts}, "seconds": seconds}


def kernel_of(row: dict) -> str:
    return row["name"].split("(")[0]


def compiled(every: bool, capabilities: list[int], only: tuple[str, ...] = ()):
    """One dict a kernel, in order, from two processes; `only` those of these names, if given."""
    torch.set_num_threads(1)
    jobs = []
    for capability in capabilities:
        found = enumerate(launches(capability))
        jobs += [
            (at, capability) for at, (core, _, launch) in found
            if (core or every) and (not only or launch[0].fn.__name__ in only)
        ]  # fmt: skip
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        yield from pool.map(_compile, *zip(*jobs))


def main() -> None:
    if sys.argv[1] == "list":
        from nibblock.triton_kernels import _ahead

        for capability in CAPABILITIES:
            for _, _, launch in launches(capability):
                print(capability, _ahead.source(launch)[2])
        return
    if sys.argv[1] == "write":
        import triton

        only = tuple(sys.argv[2:])
        out = Path(__file__).resolve().parent.parent / "bench/results/triton_compiled.json"
        kept = [r for r in json.loads(out.read_text())["kernels"] if kernel_of(r) not in only]
        rows = kept if only else []
        for row in compiled(True, list(CAPABILITIES), only):
            rows.append({k: v for k, v in row.items() if k != "seconds"})
        rows.sort(key=lambda row: (row["capability"], row["label"], row["name"]))
        out.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
        return
    for row in compiled(sys.argv[1] == "all", [int(c) for c in sys.argv[2:]]):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
