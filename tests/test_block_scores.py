"""block_scores through torch: values, unbiasedness, errors, versions, opcheck, memory."""

from __future__ import annotations

import nibblock as nb
import numpy as np
import pytest
import torch
from harness import X_DTYPES, as_numpy, level_params, native, random_x
from reference_scores import check_scores, exact_scores, sketched_scores
from torch.utils._python_dispatch import TorchDispatchMode

LEVEL = pytest.mark.parametrize("level", level_params())


@LEVEL
@pytest.mark.parametrize("dtype", X_DTYPES)
def test_values(level, dtype):
    native.set_cpu_isa(level)
    rng = np.random.default_rng(1)
    for n, k, block in ((64, 96, 32), (70, 100, 16), (130, 300, 64), (129, 257, 128)):
        for lead in ((), (1,), (2, 9), (0,), (140,)):
            g, x = random_x(rng, (*lead, n), dtype), random_x(rng, (*lead, k), "float32")
            w = random_x(rng, (n, k), dtype)
            rows = [as_numpy(t).reshape(-1, t.shape[-1]) for t in (g, x, w)]
            want = exact_scores(*rows, block)
            scores, movement = nb.ops.block_scores(g, x, w, block=block)
            zero = np.zeros_like(want.scores)
            check_scores(as_numpy(scores), want.scores, zero, want.score_bound)
            check_scores(as_numpy(movement), want.movement, zero, want.movement_bound)
            estimate, none = nb.ops.block_scores(
                g, x, block=block, mode="sketch", samples=3, seed=-7
            )
            assert none is None
            want = sketched_scores(*rows[:2], block, 3, -7)
            check_scores(as_numpy(estimate), want.scores, zero, want.score_bound)


def test_strided_arguments():
    g, x = torch.randn(6, 1, 140)[:, :, ::2], torch.randn(100, 6).t()[:, None]
    w = torch.randn(100, 70).t()
    plain = nb.ops.block_scores(g.contiguous(), x.contiguous(), w.contiguous(), block=16)
    room = torch.zeros(7, 5, 2)
    scores, movement = room[:, :, 0].t(), room[:, :, 1].t()
    nb.ops.block_scores_(scores, movement, g, x, w, block=16)
    assert torch.equal(scores, plain[0])
    assert torch.equal(movement, plain[1])


def test_sketch_is_unbiased():
    """The mean over seeds is within its own standard error of the exact score; a biased estimate
    (a sign that is always +1, say) is not."""
    torch.manual_seed(0)
    mixed = torch.randn(64, 20) @ torch.randn(20, 96) + 0.5  # columns that are correlated
    g, x = torch.randn(64, 64), mixed
    exact, _ = nb.ops.block_scores(g, x, block=32)
    for samples in (1, 4):
        runs = torch.stack(
            [
                nb.ops.block_scores(g, x, block=32, mode="sketch", samples=samples, seed=s)[0]
                for s in range(800)
            ]
        ).double()
        error = runs.std(0) / 800**0.5
        assert ((runs.mean(0) - exact).abs() < 4 * error).all()
        assert (runs.std(0) / exact).max() < (2 / samples) ** 0.5 * 1.3


def test_same_bits_at_any_number_of_threads():
    g, x, w = torch.randn(300, 200), torch.randn(300, 500), torch.randn(200, 500)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        exact = nb.ops.block_scores(g, x, w, block=32)
        found.append((*exact, nb.ops.block_scores(g, x, block=32, mode="sketch")[0]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_nothing_the_size_of_the_gradient_is_allocated():
    """torch's allocations by a dispatch mode; the kernel's own by the peak of the process."""
    import subprocess
    import sys

    code = """
import resource, torch, nibblock as nb
torch.set_num_threads(2)
g, x = torch.randn(64, 8192), torch.randn(64, 8192)
nb.ops.block_scores(g[:, :64], x[:, :64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for mode in ("exact", "sketch"):
    nb.ops.block_scores(g, x, mode=mode, block=64)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    dense = 8192 * 8192 * 4
    assert int(done.stdout) < dense / 20, f"{int(done.stdout) / 1e6:.1f} MB more"

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Watch.largest = max(Watch.largest, out.numel())
            return out

    g, x = torch.randn(8, 1024), torch.randn(8, 1024)
    with Watch():
        nb.ops.block_scores(g, x, block=32)
    assert Watch.largest <= 32 * 32


def test_errors():
    g, x, w = torch.randn(3, 70), torch.randn(3, 100), torch.randn(70, 100)
    scores, movement = torch.zeros(5, 7), torch.zeros(5, 7)
    good = dict(scores=scores, movement=movement, grad=g, x=x, weight=w, block=16, sketch=0)
    cases = [
        (dict(grad=g.double()), TypeError, "grad must be float32, bfloat16 or float16, got float6"),
        (dict(x=torch.tensor(1.0)), ValueError, "x must have at least 1 dimension, got a scalar"),
        (dict(grad=g[:2]), ValueError, r"grad must have the leading dimensions of x, \[3, 100\]"),
        (dict(block=24), ValueError, "block must be 16, 32, 64 or 128, got 24"),
        (dict(sketch=33), ValueError, "sketch must be in 0 .. 32, got 33"),
        (dict(sketch=-1), ValueError, "sketch must be in 0 .. 32, got -1"),
        (dict(scores=scores.double()), TypeError, "scores must be float32, got float64"),
        (dict(scores=scores[:4]), ValueError, r"scores must be \[5, 7\], got \[4, 7\]"),
        (dict(movement=movement.t()), ValueError, r"movement must be \[5, 7\], got \[7, 5\]"),
        (dict(weight=None), ValueError, "weight must be given exactly when movement is"),
        (dict(movement=None), ValueError, "weight must be given exactly when movement is"),
        (dict(sketch=4), ValueError, "movement must be None with a sketch"),
        (dict(weight=w.t()), ValueError, r"weight must be \[70, 100\], got \[100, 70\]"),
        (dict(weight=w.double()), TypeError, "weight must be float32, bfloat16 or float16"),
    ]
    for change, error, text in cases:
        given = {**good, **change}
        text = f"block_scores_: {text}"
        with pytest.raises(error, match=text):
            nb.ops.block_scores_(**given)
        with pytest.raises(RuntimeError, match=text):
            torch.ops.nibblock.block_scores_(**given, seed=0)
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        with pytest.raises(error, match=text):
            nb.ops.block_scores_(**meta)
    assert not scores.any()
    assert not movement.any()
    with pytest.raises(ValueError, match='block_scores: mode must be "exact" or "sketch"'):
        nb.ops.block_scores(g, x, mode="bound")
    with pytest.raises(ValueError, match=r"block_scores: samples must be in 1 .. 32, got 0"):
        nb.ops.block_scores(g, x, mode="sketch", samples=0)


def test_version_and_gradients():
    g, x = torch.randn(3, 70, requires_grad=True), torch.randn(3, 100, requires_grad=True)
    scores = torch.zeros(5, 7)
    before = scores._version
    nb.ops.block_scores_(scores, None, g, x, block=16)
    assert scores._version > before
    assert not scores.requires_grad


def calls():
    for dtype in (torch.float32, torch.bfloat16):
        g, x, w = torch.randn(2, 3, 40).to(dtype), torch.randn(2, 3, 50), torch.randn(40, 50)
        yield (torch.zeros(3, 4), torch.zeros(3, 4), g, x, w.to(dtype), 16, 0, 0)
        yield (torch.zeros(2, 2), None, g, x, None, 32, 4, 11)


@pytest.mark.parametrize("arguments", list(calls()))
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.nibblock.block_scores_.default, arguments)


def test_compiled_equals_eager():
    torch._dynamo.reset()

    def step(scores, g, x):
        nb.ops.block_scores_(scores, None, g * 2, x, block=16)
        return scores * 1

    g, x = torch.randn(5, 40), torch.randn(5, 50)
    a, b = torch.zeros(3, 4), torch.zeros(3, 4)
    ours = torch.compile(step, backend="aot_eager", fullgraph=True)(a, g, x)
    torch.testing.assert_close(ours, step(b, g, x))
    torch.testing.assert_close(a, b)


def test_vmap_is_refused():
    def score(g):
        zeros = torch.zeros(3, 4)
        torch.ops.nibblock.block_scores_(zeros, None, g, g[:, :50], None, 16, 0, 0)
        return zeros

    with pytest.raises(RuntimeError, match="block_scores_: grad must not be batched by vmap"):
        torch.func.vmap(score)(torch.randn(2, 5, 60))
