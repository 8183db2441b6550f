"""Which row of a table runs: by the level of the CPU, by NIBBLOCK_ISA, and by force."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import reference as ref
from harness import LEVELS, X_DTYPES, level_params, native, packed_of, rows, run, store
from nibblock._errors import BackendUnavailable
from nibblock._info import self_test


def test_tables_are_ordered():
    for which, stem in (("forward", "int4_linear.cpu."), ("dx", "int4_linear_dx.cpu.")):
        table = rows(which)
        assert len({row["id"] for row in table}) == len(table)
        order = [LEVELS.index(row["isa"]) for row in table]
        assert order == sorted(order, reverse=True), "a better level must stand above a lesser one"
        assert order[-1] == 0, "the last row serves every CPU"
        top = LEVELS.index(native.cpu_isa())
        for row in table:
            assert row["id"].startswith(stem)
            assert row["available"] == (LEVELS.index(row["isa"]) <= top)
            assert row["available"] or row["isa"] in row["reason"]


@pytest.mark.parametrize("x_dtype", X_DTYPES)
@pytest.mark.parametrize("level", level_params())
def test_level_selects_its_own_rows(level, x_dtype):
    """Lowering the level lowers the row that runs, and no row above it can be forced.

    AMX multiplies bfloat16 x alone: float32 and float16 x, which that would cost their precision,
    get the rows of the level below.
    """
    weight = ref.random_weight(np.random.default_rng(10), 33, 130, 32)
    packed = packed_of(weight)
    x = store(np.ones((8, 130)), x_dtype)
    native.set_cpu_isa(level)
    assert native.cpu_isa() == level
    isa = level if level != "amx" or x_dtype == "bfloat16" else "avx512_vnni"
    call = dict(m=8, x_dtype=x_dtype, compute="bf16", **weight.format)
    dx = native.int4_linear_select("dx", **call)["kernel"]
    assert dx.split(".")[2] == isa
    chosen = native.int4_linear_select("forward", **call)
    assert chosen["kernel"].split(".")[2] == isa
    by_id = {row["id"]: row for row in rows("forward")}
    refused = dict(chosen["refused"])
    for kernel_id, row in by_id.items():
        if LEVELS.index(row["isa"]) > LEVELS.index(level):
            assert row["isa"] in refused[kernel_id]
            with pytest.raises(BackendUnavailable, match=row["isa"]):
                run("forward", kernel_id, x, weight, packed, x_dtype=x_dtype)
    y = run("forward", None, x, weight, packed, x_dtype=x_dtype)
    same = run("forward", chosen["kernel"], x, weight, packed, x_dtype=x_dtype)
    assert y.tobytes() == same.tobytes()


@pytest.mark.parametrize("level", level_params())
def test_self_test_runs_every_row_of_the_level(level):
    native.set_cpu_isa(level)
    done = self_test()
    assert [row["id"] for row in done if not row["ok"]] == []
    served = [row["id"] for which in ("forward", "dx") for row in rows(which) if row["available"]]
    assert sorted(row["id"] for row in done) == sorted([*served, "torch.ops.nibblock.int4_linear"])


def test_unknown_level_and_kernel_are_refused():
    with pytest.raises(ValueError, match="sse9"):
        native.set_cpu_isa("sse9")
    top = LEVELS.index(native.cpu_isa_max())
    for level in LEVELS[top + 1 :]:
        with pytest.raises(ValueError, match=level):
            native.set_cpu_isa(level)
    weight = ref.random_weight(np.random.default_rng(11), 4, 32, 32)
    with pytest.raises(ValueError, match="no_such_kernel"):
        run("forward", "no_such_kernel", np.ones((1, 32), np.float32), weight, packed_of(weight))


CHILD = """
import json, numpy as np, torch, nibblock as nb
from nibblock import _native as native
from harness import op_arguments
import reference as ref
w = ref.random_weight(np.random.default_rng(1), 50, 200, 32, 4, True)
x = np.random.default_rng(2).normal(0, 1, (9, 200)).astype(np.float32)
y = nb.ops.int4_linear(torch.from_numpy(x), torch.from_numpy(ref.pack(w)), **op_arguments(w))
ref.check_linear(y.numpy(), x, w, operand="float32", what=native.cpu_isa())
row = native.int4_linear_select("forward", m=9, x_dtype="float32", compute="bf16", **w.format)
print(json.dumps([native.cpu_isa(), row["kernel"], y.numpy().tobytes().hex()]))
"""


def child(level):
    path = [os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "NIBBLOCK_ISA": level, "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.run(
        [sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("level", level_params())
def test_environment_lowers_the_level(level):
    done = child(level)
    assert done.returncode == 0, done.stderr
    got, kernel, bits = json.loads(done.stdout.splitlines()[-1])
    assert got == level
    isa_of = {row["id"]: row["isa"] for row in rows("forward")}
    assert LEVELS.index(isa_of[kernel]) <= LEVELS.index(level)
    weight = ref.random_weight(np.random.default_rng(1), 50, 200, 32, 4, True)
    x = np.random.default_rng(2).normal(0, 1, (9, 200)).astype(np.float32)
    native.set_cpu_isa(level)
    here = run("forward", None, x, weight, packed_of(weight))
    assert here.tobytes().hex() == bits, "the environment and set_cpu_isa must give the same bits"


@pytest.mark.parametrize("level", ["sse9", *LEVELS[LEVELS.index(native.cpu_isa_max()) + 1 :]])
def test_environment_cannot_raise_the_level(level):
    """An unknown level, or one above this CPU, is an error that names the variable."""
    done = child(level)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "BackendUnavailable" in last, done.stderr
    assert "NIBBLOCK_ISA" in last
    assert level in last
