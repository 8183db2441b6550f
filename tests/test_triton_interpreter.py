"""Every Triton kernel on the CPU: Triton's interpreter against the float64 oracles.

The interpreter executes a kernel's tensor operations in NumPy, so it proves indices, masks and
arithmetic; what it cannot show is in test_triton_compile (registers, memory) and test_triton_gpu.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import triton_cases
import triton_cases_masked
import triton_cases_tuned

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

HERE = Path(__file__).resolve().parent
NAMES = [
    f"{module.__name__}:{name}"
    for module in (triton_cases, triton_cases_masked, triton_cases_tuned)
    for name in module.CASES
]


@pytest.fixture(scope="module")
def results():
    """Of all cases, from one child: starting the interpreter costs seconds."""
    command = [sys.executable, str(HERE / "triton_child.py"), "interpret", *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", NAMES)
def test_kernel(name, results):
    assert results[name]["error"] is None, results[name]["error"]
