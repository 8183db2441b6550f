"""Every candidate configuration that changes a tile or a split, against the float64 oracles."""

from __future__ import annotations

from typing import Callable

import numpy as np
import reference as ref
import reference_blocks as rb
import torch
import triton_cases as plain

CASES: dict[str, Callable[[torch.device], None]] = {}
BF16 = torch.bfloat16


def case(function: Callable, *arguments: object) -> None:
    name = f"{function.__name__}[{'-'.join(map(str, arguments))}]"
    CASES[name] = lambda device: function(device, *arguments)


def tiles(shape) -> list[dict]:
    """The candidates of a class that differ in more than warps and stages."""
    from nibblock.triton_kernels._configs import candidates

    seen = {}
    for config in candidates(shape, 90):
        kept = {k: v for k, v in config.items() if k not in ("num_warps", "num_stages")}
        seen.setdefault(tuple(kept.items()), config)
    return list(seen.values())


def int4_candidates(device, m, dx):
    from nibblock.triton_kernels import _configs, _tuned

    long = 520 if m <= 64 else 130  # the first is split
    n, k = (long, 40) if dx else (40, long)
    rng = np.random.default_rng(m)
    layer = plain.Layer(rng, n, k, 128, 4, True, "float16", device)
    x = plain.tensor(rng.normal(size=(m, n if dx else k)), "bfloat16", device)
    op = "int4_linear_dx" if dx else "int4_linear"
    grid = tiles(_configs.int4_class(op, m, n, k, BF16, 128, 4))
    assert len(grid) > 1
    run, outputs = plain.bodies()[op], k if dx else n
    for config in grid:
        with _tuned.forcing(op, config):
            arguments = (layer.packed, outputs) if dx else (layer.packed, None, outputs)
            y = run(x, *arguments, *layer.form, "bf16")
        ref.check_linear(
            plain.array(y), plain.array(x), layer.weight, dtype="bfloat16", transposed=dx
        )


for _dx in (False, True):
    for _m in (3, 70):
        case(int4_candidates, _m, _dx)
case(int4_candidates, 257, False)


def block_candidates(device, m):
    from nibblock.triton_kernels import _configs, _tuned

    n, k, block = 70, 130, 32
    rng = np.random.default_rng(m)
    blocks, values, layout = plain.blocks_on(device, rng, n, k, block, "bfloat16")
    x = plain.tensor(rng.normal(size=(m, k)), "bfloat16", device)
    g = plain.tensor(rng.normal(size=(m, n)), "bfloat16", device)
    op = "block_sparse_linear"
    for config in tiles(_configs.blocks_class(op, m, n, k, BF16, BF16, block)):
        with _tuned.forcing(op, config):
            y = plain.bodies()[op](x, values, layout, None, None, n, block)
        rb.check_product(
            plain.array(y), plain.array(x), blocks.dense(), dtype="bfloat16", operand="bfloat16"
        )
    want = blocks.gather(plain.array(g).astype(np.float64).T @ plain.array(x))
    op = "block_weight_grad"
    grid = tiles(_configs.weight_grad_class(m, len(values), BF16, block))
    assert len(grid) > 1
    for config in grid:
        with _tuned.forcing(op, config):
            got = plain.bodies()[op](g, x, layout, block, torch.float32)
        assert np.abs(plain.array(got) - want).max() < 1e-3


case(block_candidates, 130)
