"""block_sparse_linear under pytest-benchmark: `pytest bench`. Each body checks its result.

`python -m nibblock bench block_sparse_linear` is the full comparison (interleaved, with ceilings);
these are for regression runs, as in bench_int4_linear.py.
"""

from __future__ import annotations

import pytest

from . import block_suite as S
from .shapes import MINILM, SMOLLM2, Shape

SHAPES = (SMOLLM2[2], MINILM[1])
DENSITIES = (0.02, 0.25)


@pytest.mark.parametrize("m", (1, 256))
@pytest.mark.parametrize("kind", ("forward", "dx", "weight_grad"))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.key)
def bench_lines(benchmark, shape: Shape, kind: str, m: int):
    """One call of our bf16 line at 2 %, beside float64."""
    weights = S.Weights(shape)
    if kind == "weight_grad":
        lines = S.weight_grad_lines(weights, m, 32, DENSITIES[:1])
    else:
        lines = S.product_lines(weights, m, 32, DENSITIES[:1], kind == "dx", 0)
    errors = {line.key: S.check(line, kind) for line in lines}
    ours = next(line for line in lines if line.name == "nibblock bf16")
    benchmark.group = f"block_sparse {kind} {shape.key} M={m}"
    benchmark(ours.run, 0)
    benchmark.extra_info.update(errors)


def bench_adapter(benchmark):
    """One interleaved comparison of an int4 base with and without its adapter."""
    from .machine import Ceilings

    weights = S.Weights(SMOLLM2[0])
    arguments = (weights, 64, 0.02, Ceilings(1), 0.2)
    case = benchmark.pedantic(S.run_adapter, arguments, rounds=1)
    benchmark.extra_info.update({n: e["median_s"] for n, e in case["lines"].items()})
