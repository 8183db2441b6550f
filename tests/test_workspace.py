"""Memory that kernels keep from one call to the next: bounded, gone with its thread, not mixed
up."""

from __future__ import annotations

import subprocess
import sys

import pytest
import reference as ref
import torch
from harness import op_arguments, torch_packed
from nibblock import ops

KEPT = 32 << 20  # bytes a thread keeps at most: csrc/common/workspace.cpp
SLACK = 16 << 20  # of everything else in a process

GROWTH = """
import threading, torch
from nibblock import _measure, ops
torch.set_num_threads(1)

def layer(k):
    codes, scales = torch.zeros(16, k // 2, dtype=torch.uint8), torch.ones(16, k // 128)
    return ops.int4_pack(codes, scales, in_features=k, group_size=128)

SMALL, MIDDLE, LARGE = layer(1024), layer(16384), layer(65536)

def call(packed, k):  # 512 rows of int16 activations: 1, 16 and 64 MiB
    ops.int4_linear(torch.ones(512, k), packed, out_features=16, group_size=128, affine=False,
                    scale_dtype=torch.float32)

def in_thread(*arguments):
    thread = threading.Thread(target=call, args=arguments)
    thread.start()
    thread.join()

call(SMALL, 1024)
in_thread(SMALL, 1024)
before = _measure.memory("VmRSS")
{work}
print(_measure.memory("VmRSS") - before)
"""


def growth(work: str) -> int:
    """Resident bytes that are still there after `work`, in a process of its own."""
    command = [sys.executable, "-c", GROWTH.format(work=work)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, for resident memory")


@linux
def test_what_a_thread_keeps_is_bounded():
    assert growth("call(LARGE, 65536)") < KEPT + SLACK


@linux
def test_what_a_thread_kept_goes_with_it():
    assert growth("for _ in range(12): in_thread(MIDDLE, 16384)") < 5 * (16 << 20) + SLACK


def test_calls_of_any_order_of_sizes_are_alike():
    """Larger and smaller ones in turn: each works in memory that another one left."""
    generator = torch.Generator().manual_seed(3)
    calls = []
    for n, k in ((48, 64), (300, 960), (33, 4096), (96, 200)):
        weight = ref.random_weight(ref.np.random.default_rng(k), n, k, 32, 4, True)
        for m in (3, 70, 300):
            x = torch.randn(m, k, generator=generator)
            calls.append((x, torch_packed(weight), op_arguments(weight, "int8")))
    first = [ops.int4_linear(x, packed, **form) for x, packed, form in calls]
    for order in (reversed(range(len(calls))), range(0, len(calls), 2), range(len(calls))):
        for i in order:
            x, packed, form = calls[i]
            assert torch.equal(ops.int4_linear(x, packed, **form), first[i])
