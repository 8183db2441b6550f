"""Bitwise the same results at any number of threads, and in forked and spawned workers."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import nibblock as nb
import numpy as np
import pytest
import reference as ref
import torch
from harness import TORCH, dx_arguments, level_params, native, op_arguments, packed_of, torch_packed

SHAPES = ((1, 260, 640), (3, 200, 333), (5, 1000, 64), (18, 96, 700), (70, 300, 256))


def digest(*results):
    whole = hashlib.sha256()
    for y in results:
        whole.update(y.detach().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def x_of(m, k, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(m * k).normal(0, 1, (m, k))).to(dtype)


def weight_of(n, k, group=64):
    return ref.random_weight(np.random.default_rng(n * k), n, k, group, 4, True)


def everything(weight, m, dtype, compute):
    """Every op on one weight."""
    packed = torch_packed(weight)
    n, k = weight.out_features, weight.in_features
    form = {
        "group_size": weight.group_size,
        "bits": 4,
        "affine": True,
        "scale_dtype": torch.float32,
        "dtype": dtype,
    }
    indices = torch.arange(m) * 7 % n
    return (
        nb.ops.int4_linear(
            x_of(m, k, dtype), packed, x_of(1, n)[0], **op_arguments(weight, compute)
        ),
        nb.ops.int4_linear_dx(x_of(m, n, dtype), packed, **dx_arguments(weight, compute)),
        nb.ops.int4_dequantize(packed, out_features=n, in_features=k, **form),
        nb.ops.int4_embedding(indices, packed, num_embeddings=n, embedding_dim=k, **form),
    )


@pytest.mark.parametrize("level", level_params())
def test_bitwise_equal_at_any_number_of_threads(level):
    native.set_cpu_isa(level)
    for (m, n, k), compute, dtype in itertools.product(
        SHAPES, ("bf16", "int8"), (torch.float32, torch.bfloat16)
    ):
        weight = weight_of(n, k)
        seen = {}
        for threads in (1, 2, 3, 1, 2):
            torch.set_num_threads(threads)
            seen[threads] = [digest(y) for y in everything(weight, m, dtype, compute)]
            assert seen[threads] == seen[1], (
                f"{level} m={m} n={n} k={k} {compute} {dtype}: {threads}"
            )


def test_torch_and_numpy_callers_get_the_same_bits():
    for m, n, k in SHAPES:
        weight = weight_of(n, k)
        y = nb.ops.int4_linear(x_of(m, k), torch_packed(weight), **op_arguments(weight))
        same = native.int4_linear_run(
            "forward",
            None,
            x_of(m, k).numpy(),
            packed_of(weight),
            None,
            compute="bf16",
            threads=3,
            **weight.format,
        )
        assert same.tobytes() == y.numpy().tobytes()


def module_of(n=200, k=320):
    torch.manual_seed(0)
    return nb.Int4Linear.from_linear(torch.nn.Linear(k, n), group_size=64)


@pytest.mark.parametrize("grad", [False, True])
def test_eight_python_threads_share_a_module(grad):
    module = module_of()
    inputs = [x_of(m, 320) for m in (1, 2, 4, 5, 9, 17, 33, 64)]

    def forward(x):
        if not grad:
            with torch.no_grad():
                return digest(module(x))
        x = x.clone().requires_grad_()
        y = module(x)
        return digest(y, *torch.autograd.grad(y.sum(), x))

    expected = [forward(x) for x in inputs]
    start = threading.Barrier(8)

    def work(i):
        start.wait()
        return [forward(inputs[(i + j) % 8]) == expected[(i + j) % 8] for j in range(40)]

    with ThreadPoolExecutor(8) as pool:
        right = list(pool.map(work, range(8)))
    assert all(map(all, right)), [r.count(False) for r in right]


# --- processes ----------------------------------------------------------------------------------
# Each story runs in a process of its own, so that a hang ends in a failed test, not a hung one.


def results():
    """What a worker computes: an eager op at several shapes, and a module with its gradient."""
    found = []
    for m, n, k in SHAPES:
        weight = weight_of(n, k)
        for dtype in TORCH.values():
            found.append(digest(*everything(weight, m, dtype, "bf16")))
    module = module_of()
    x = x_of(33, 320).requires_grad_()
    module(x).sum().backward()
    return [*found, digest(x.grad)]


def worker(queue):
    torch.set_num_threads(1)
    queue.put(results())


def shared_worker(module, x, queue):
    torch.set_num_threads(1)
    queue.put(digest(module(x)))


def parallel_work():
    """Makes torch's pool and ours start their threads in this process."""
    torch.set_num_threads(2)
    a = torch.randn(600, 600)
    for _ in range(3):
        a = (a @ a).tanh()
    return results()


def story_fork():
    expected = parallel_work()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        os._exit(0 if results() == expected else 7)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, f"forked worker ended with {status}"
            assert results() == expected, "the parent changed"
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the forked worker hangs")


def story_multiprocessing(method):
    expected = parallel_work()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=worker, args=(queue,), daemon=True) for _ in range(2)]
    for process in workers:
        process.start()
    for _ in workers:
        assert queue.get(timeout=90) == expected
    for process in workers:
        process.join(30)
        assert process.exitcode == 0


def story_shared_memory():
    """A module handed to a spawned worker through shared memory."""
    module, x = module_of().share_memory(), x_of(9, 320)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=shared_worker, args=(module, x, queue), daemon=True)
    process.start()
    assert queue.get(timeout=90) == digest(module(x))
    process.join(30)
    assert process.exitcode == 0


STORIES = {
    "fork": story_fork,
    "multiprocessing-fork": lambda: story_multiprocessing("fork"),
    "multiprocessing-spawn": lambda: story_multiprocessing("spawn"),
    "shared-memory": story_shared_memory,
}


@pytest.mark.parametrize("story", list(STORIES))
def test_worker_processes(story):
    done = subprocess.run(
        [sys.executable, __file__, story], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    STORIES[sys.argv[1]]()
