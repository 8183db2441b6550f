"""Compiles every shipped Triton configuration for compute capability 80 and 90, without a GPU.

    python tests/triton_shipped.py 80 90      one JSON line a kernel: registers, stack, shared, units

The launches are recorded from the wrappers themselves, so what is compiled here is what runs: each
shape class, dtype, group length, block edge and kind of adapter once.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
N = K = 1024  # divisible by all tiles, as the layers of real models are


def _calls():
    """(label, call) of every configuration."""
    from nibblock.triton_kernels import block_sparse_linear as blocks
    from nibblock.triton_kernels import int4_linear as int4

    def int4_call(m, dtype, dx, group=128, bits=4, affine=True, scale=F16, adapter=None, bias=True):
        f = int4.Format(N, K, group, bits, affine, scale)
        packed = torch.empty(f.places()[0] * 4 * (N // 16), dtype=torch.uint8)
        given = None if dx or not bias else torch.empty(N, dtype=dtype)
        return partial(int4.linear, torch.empty(m, K, dtype=dtype), packed, given, f, adapter, dx)

    def layout(block, count):
        return torch.zeros(2 * (N // block) + 2 + 3 * count, dtype=torch.int32)

    for dtype in (BF16, F16, F32):
        for m in (1, 32, 64, 128):
            for dx in (False, True):
                yield f"int4 {m} {dtype} dx={dx}", int4_call(m, dtype, dx)
    for m in (1, 128):  # the other formats, in the dtype that most use
        for group, bits, affine, scale in (
            (32, 4, True, F32), (64, 4, False, F16), (-1, 4, True, F32), (32, 8, False, F16),
        ):  # fmt: skip
            for dx in (False, True):
                call = int4_call(m, BF16, dx, group, bits, affine, scale, bias=False)
                yield f"int4 {m} group={group} bits={bits} affine={affine} dx={dx}", call
    f = int4.Format(N, K, 128, 4, True, F16)
    packed = torch.empty(f.places()[0] * 4 * (N // 16), dtype=torch.uint8)
    for dtype in (BF16, F16, F32):
        yield f"dequantize {dtype}", partial(int4.dequantize, packed, f, dtype)
    rows = torch.zeros(8, dtype=torch.int64)
    yield "embedding", partial(int4.dequantize, packed, f, BF16, rows)
    for block in (16, 32, 64, 128):
        for dtype, values in ((BF16, BF16), (BF16, F32), (F16, F32), (F32, F32)):
            v = torch.empty(4, block, block, dtype=values)
            one = layout(block, 4)
            for m in (1, 64, 128):
                x = torch.empty(m, K, dtype=dtype)
                if values != F32 or dtype != BF16:
                    for dx in (False, True):
                        call = partial(blocks.linear, x, v, one, None, x, N, K, block, dx)
                        if dx:
                            call = partial(blocks.linear, x, v, one, None, None, N, K, block, dx)
                        yield f"blocks of {block}, {m} {dtype} {values} dx={dx}", call
                if m != 64:
                    pair = torch.empty(8, K, dtype=values), torch.empty(N, 8, dtype=values)
                    adapter = int4.Adapter(v, one, block, *pair)
                    for dx in (False, True):
                        label = f"int4 with blocks of {block}, {m} {dtype} {values} dx={dx}"
                        yield label, int4_call(m, dtype, dx, adapter=adapter)
            if values == dtype:
                x = torch.empty(1024, K, dtype=dtype)
                call = partial(blocks.block_weight_grad, x, x, one, block, values)
                yield f"weight gradient, blocks of {block}, {dtype}", call


def _compile(at: int, capability: int) -> dict:
    from nibblock.triton_kernels import _ahead

    label, launch = _launches()[at]
    start = time.perf_counter()
    done = _ahead.compile_launch(launch, capability)
    return {
        "label": label,
        **{k: done[k] for k in ("name", "capability", "registers", "stack", "shared")},
        "tensor_cores": done["tensor_cores"],
        "seconds": round(time.perf_counter() - start, 2),
    }


_found: list = []


def _launches() -> list[tuple[str, tuple]]:
    """Every distinct launch of all configurations."""
    from nibblock.triton_kernels import _ahead

    if not _found:
        seen = set()
        for label, call in _calls():
            for launch in _ahead.record(call):
                source, options, name = _ahead.source(launch)
                key = (source.hash(), json.dumps(options, sort_keys=True))
                if key not in seen:
                    seen.add(key)
                    _found.append((label, launch))
    return _found


def main() -> None:
    torch.set_num_threads(1)
    jobs = [(at, int(c)) for c in sys.argv[1:] for at in range(len(_launches()))]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        for row in pool.map(_compile, *zip(*jobs)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
