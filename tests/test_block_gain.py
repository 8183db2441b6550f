"""block_gain through torch: values, strides, threads, errors, versions, opcheck, memory."""

from __future__ import annotations

import nibblock as nb
import numpy as np
import pytest
import torch
from harness import X_DTYPES, as_numpy, level_params, native, random_x
from reference_scores import check_scores, gain_sums

LEVEL = pytest.mark.parametrize("level", level_params())


@LEVEL
@pytest.mark.parametrize("dtype", X_DTYPES)
def test_values(level, dtype):
    native.set_cpu_isa(level)
    rng = np.random.default_rng(1)
    for n, k, block in ((64, 96, 32), (70, 100, 16), (130, 150, 64), (129, 257, 128)):
        for lead in ((), (1,), (2, 9), (0,), (70,)):
            g, x = random_x(rng, (*lead, n), dtype), random_x(rng, (*lead, k), "float32")
            rows = [as_numpy(t).reshape(-1, t.shape[-1]) for t in (g, x)]
            want = gain_sums(*rows, block)
            gain, squares = nb.ops.block_gain(g, x, block=block)
            zero = np.zeros_like(want.gain)
            check_scores(as_numpy(gain), want.gain, zero, want.gain_bound)
            check_scores(as_numpy(squares), want.squares, zero, want.squares_bound)


def test_strided_arguments():
    g, x = torch.randn(6, 1, 140)[:, :, ::2], torch.randn(100, 6).t()[:, None]
    plain = nb.ops.block_gain(g.contiguous(), x.contiguous(), block=16)
    room = torch.zeros(7, 5, 2)
    gain, squares = room[:, :, 0].t(), room[:, :, 1].t()
    nb.ops.block_gain_(gain, squares, g, x, block=16)
    assert torch.equal(gain, plain[0])
    assert torch.equal(squares, plain[1])


def test_same_bits_at_any_number_of_threads():
    g, x = torch.randn(300, 200), torch.randn(300, 500)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(nb.ops.block_gain(g, x, block=32))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_nothing_the_size_of_the_gradient_is_allocated():
    import subprocess
    import sys

    code = """
import resource, torch, nibblock as nb
torch.set_num_threads(2)
g, x = torch.randn(32, 8192), torch.randn(32, 8192)
nb.ops.block_gain(g[:, :64], x[:, :64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nb.ops.block_gain(g, x, block=64)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8192 * 8192 * 4 / 20, f"{int(done.stdout) / 1e6:.1f} MB more"


def test_errors():
    g, x = torch.randn(3, 70), torch.randn(3, 100)
    gain, squares = torch.zeros(5, 7), torch.zeros(5, 7)
    good = dict(gain=gain, squares=squares, grad=g, x=x, block=16)
    cases = [
        (dict(grad=g.double()), TypeError, "grad must be float32, bfloat16 or float16, got float6"),
        (dict(x=torch.tensor(1.0)), ValueError, "x must have at least 1 dimension, got a scalar"),
        (dict(grad=g[:2]), ValueError, r"grad must have the leading dimensions of x, \[3, 100\]"),
        (dict(block=24), ValueError, "block must be 16, 32, 64 or 128, got 24"),
        (dict(gain=gain.double()), TypeError, "gain must be float32, got float64"),
        (dict(gain=gain[:4]), ValueError, r"gain must be \[5, 7\], got \[4, 7\]"),
        (dict(squares=squares.t()), ValueError, r"squares must be \[5, 7\], got \[7, 5\]"),
    ]
    for change, error, text in cases:
        given = {**good, **change}
        text = f"block_gain_: {text}"
        with pytest.raises(error, match=text):
            nb.ops.block_gain_(**given)
        with pytest.raises(RuntimeError, match=text):
            torch.ops.nibblock.block_gain_(**given)
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        with pytest.raises(error, match=text):
            nb.ops.block_gain_(**meta)
    assert not gain.any()
    assert not squares.any()


def test_versions_and_gradients():
    g, x = torch.randn(4, 32, requires_grad=True), torch.randn(4, 32)
    gain, squares = torch.zeros(1, 1), torch.zeros(1, 1)
    versions = gain._version, squares._version
    nb.ops.block_gain_(gain, squares, g, x)
    assert (gain._version, squares._version) > versions
    assert not gain.requires_grad
    twice = gain.clone()
    nb.ops.block_gain_(gain, squares, g, x)
    assert torch.equal(gain, 2 * twice)


def test_opcheck():
    sums = torch.zeros(2, 3), torch.zeros(2, 3)
    torch.library.opcheck(
        torch.ops.nibblock.block_gain_.default, (*sums, torch.randn(6, 64), torch.randn(6, 96), 32)
    )


def test_compiled_equals_eager():
    torch._dynamo.reset()

    def step(gain, squares, g, x):
        nb.ops.block_gain_(gain, squares, g * 2, x, block=16)
        return gain * 1

    g, x = torch.randn(5, 40), torch.randn(5, 50)
    a, b = ((torch.zeros(3, 4), torch.zeros(3, 4)) for _ in range(2))
    ours = torch.compile(step, backend="aot_eager", fullgraph=True)(*a, g, x)
    torch.testing.assert_close(ours, step(*b, g, x))
    torch.testing.assert_close(a, b)


def test_vmap_is_refused():
    def sums(g):
        zeros = torch.zeros(3, 4)
        torch.ops.nibblock.block_gain_(zeros, zeros.clone(), g, g[:, :50], 16)
        return zeros

    with pytest.raises(RuntimeError, match="block_gain_: grad must not be batched by vmap"):
        torch.func.vmap(sums)(torch.randn(2, 5, 60))
