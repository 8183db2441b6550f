"""Every Triton kernel as machine code for compute capability 80 and 90, on a machine without a GPU.

What the interpreter cannot show: that nothing spills, that shared memory fits the chip, and that
the tile kernels use Hopper's warp-group products. `python tests/triton_shipped.py write` does it
for all combinations of types and keeps the figures in bench/results/triton_compiled.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

HERE = Path(__file__).resolve().parent
REPORT = HERE.parent / "bench/results/triton_compiled.json"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may use
# Tile kernels, by the start of their label: 64 rows of an operand and more.
TILES = (
    "int4 128 ",
    "int4 with blocks of 32, 128 ",
    "blocks of 64, 128 torch.bfloat16",
    "blocks of 128, 128 torch.bfloat16",
    "weight gradient, blocks of 64, torch.bfloat16",
    "scores, blocks of 32 torch.bfloat16",
)


def child(*arguments: str, cache: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)  # a result from a cache would prove nothing
    command = [sys.executable, str(HERE / "triton_shipped.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    text = child("core", "80", "90", cache=tmp_path_factory.mktemp("triton"))
    return [json.loads(line) for line in text.splitlines()]


def check(rows: list[dict]) -> None:
    assert {row["capability"] for row in rows} == {80, 90}
    for row in rows:
        where = f"{row['label']} on {row['capability']}: {row['name']}"
        assert row["stack"] == 0, f"spills: {where}"
        assert row["registers"] <= 255, where
        assert row["shared"] <= SHARED_LIMIT[row["capability"]], where
        main = row["name"].split("(")[0] not in ("int4_finish_kernel", "low_rank_down_kernel")
        if row["capability"] == 90 and main and row["label"].startswith(TILES):
            assert row["tensor_cores"] == "wgmma", where
            assert row["wide_copies"] > 0, f"no 16-byte copies: {where}"


def test_nothing_spills_and_everything_fits(kernels):
    assert len(kernels) > 100  # of both chips
    check(kernels)


def test_the_report_covers_every_configuration(tmp_path):
    """The committed figures are of the configurations that ship today."""
    rows = json.loads(REPORT.read_text())["kernels"]
    check(rows)
    names = set(child("list", cache=tmp_path).splitlines())
    assert names == {f"{row['capability']} {row['name']}" for row in rows}
