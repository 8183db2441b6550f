"""The masked optimiser steps under pytest-benchmark: `pytest bench`. Each body checks its result.

`python -m nibblock bench masked_update` is the full comparison (interleaved, with ceilings); these
are for regression runs, as in bench_int4_linear.py.
"""

from __future__ import annotations

import pytest

from . import masked_suite as S

SHAPES = [(576, 576), (192, 576), (1536, 576)]


@pytest.mark.parametrize("name", ("dense", "all true", "block", "flat", "mask"))
def bench_lines(benchmark, name: str):
    """One AdamW step of a short list, beside torch's."""
    p = S.Parameters(SHAPES)
    line = {
        "dense": lambda: S.bool_line(p, name, 1.0, False),
        "all true": lambda: S.bool_line(p, name, 1.0, True),
        "block": lambda: S.block_line(p, 0.1),
        "flat": lambda: S.flat_line(p, 0.01, True),
        "mask": lambda: S.bool_line(p, name, 0.1, True),
    }[name]()
    error = line.check()
    benchmark.group = "masked_update"
    benchmark(line.run)
    benchmark.extra_info.update(entries=line.entries, error_in_lr=error)
