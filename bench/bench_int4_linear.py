"""int4_linear under pytest-benchmark: `pytest bench`. Each body checks its result against float64.

`python -m nibblock bench int4_linear` is the full comparison (interleaved, with ceilings); these
are for regression runs: `pytest bench --benchmark-json F`, `--benchmark-compare`,
`--benchmark-disable`.
"""

from __future__ import annotations

import pytest
import torch

from . import providers as P
from .int4_suite import group_of, run_dx
from .shapes import LLAMA_8B, MINILM, SMOLLM2, Shape

SHAPES = (LLAMA_8B[1], SMOLLM2[2], MINILM[1])
ROWS = (1, 16, 256)


def _problem(shape: Shape, name: str) -> P.Problem:
    return P.Problem(shape, group_of(shape), symmetric=name.startswith("ORT"))


@pytest.mark.parametrize("name", P.names())
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.key)
def bench_forward(benchmark, shape: Shape, m: int, name: str):
    benchmark.group = f"int4_linear {shape.key} M={m}"
    with torch.no_grad():
        try:
            candidate = P.make(name, _problem(shape, name), m)
        except P.Unavailable as reason:
            pytest.skip(f"{name}: {reason}")
        error = P.check(candidate)
        y = benchmark(candidate.run, 0)
    assert y.shape == (m, shape.out_features)
    benchmark.extra_info.update(
        provider=name, error=error, weight_bytes=candidate.weight_bytes, group=group_of(shape)
    )


def bench_dx(benchmark):
    """One interleaved comparison; checks every dx against float64."""
    shape = SMOLLM2[3]
    case = benchmark.pedantic(run_dx, (shape, 64, None, 0.2), rounds=1)
    found = {**case["providers"], **case["unavailable"]}
    assert set(found) == {"nibblock bf16", "dense bf16 eager", "dense bf16 oneDNN"}
    benchmark.extra_info.update({n: e["median_s"] for n, e in case["providers"].items()})
