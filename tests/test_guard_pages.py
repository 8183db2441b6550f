"""No kernel reads or writes a byte outside its buffers.

Every buffer of a call is placed so that it ends, or starts, at a page that may not be touched. One
child process per kernel row walks through the shapes; when it dies of a segmentation fault, the
last line it wrote says at which.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import mmap
import subprocess
import sys

import numpy as np
import pytest
import reference as ref
from harness import FORMATS, X_DTYPES, native, refusal, row_params, store

PAGE = mmap.PAGESIZE
PROT_NONE = 0

FORWARD_SHAPES = [
    (m, n, k)
    for m, (n, k) in itertools.product(
        (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 50),
        ((1, 1), (1, 64), (16, 33), (17, 65), (33, 127), (15, 300), (64, 128), (50, 63)),
    )
]


class Guarded:
    """Memory between two forbidden pages."""

    def __init__(self, size: int):
        self.room = max(1, -(-size // PAGE)) * PAGE
        self.map = mmap.mmap(-1, self.room + 2 * PAGE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.first = self.base + PAGE
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for page in (self.base, self.first + self.room):
            if protect(page, PAGE, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")

    def place(self, like: np.ndarray, at_end: bool, shape=None, strides=None) -> np.ndarray:
        """A copy of `like` that ends right before, or starts right behind, a forbidden page."""
        address = self.first + (self.room - like.nbytes if at_end else 0)
        raw = np.frombuffer((ctypes.c_char * like.nbytes).from_address(address), like.dtype)
        raw = raw.reshape(like.shape)
        raw[...] = like
        return raw


def guarded_rows(guard: Guarded, rows: np.ndarray, gap: int, at_end: bool) -> np.ndarray:
    """A [M, width] view with row stride width + gap, whose last row ends where the buffer ends."""
    m, width = rows.shape
    flat = np.zeros((m - 1) * (width + gap) + width, rows.dtype)
    placed = guard.place(flat, at_end)
    item = rows.dtype.itemsize
    view = np.lib.stride_tricks.as_strided(
        placed, shape=(m, width), strides=((width + gap) * item, item)
    )
    view[...] = rows
    return view


def weights(rng: np.random.Generator):
    """(rows of x, weight): every format at every shape in turn, then int8 scales and palettes."""
    for i, (m, n, k) in enumerate(FORWARD_SHAPES):
        yield m, ref.random_weight(rng, n, k, *FORMATS[(13 * i) % len(FORMATS)])
    forms = itertools.product((1, 2, 3, 7, 20), (4, 8), (16, 32))
    for i, (m, bits, group) in enumerate(forms):
        yield m, ref.random_weight(rng, (1, 16, 33)[i % 3], 256, group, bits, i % 2 == 0, "int8")
        few = ref.random_weight(rng, (17, 32, 5)[i % 3], (100, 64)[i % 2], group, 8, i % 3 == 0)
        yield m, dataclasses.replace(few, qweight=few.qweight & 0x3C, palette=True)


def walk(which: str, kernel_id: str) -> int:
    """Runs one row over all shapes behind guard pages; returns how many calls it served."""
    rng = np.random.default_rng(60)
    served = 0
    size = 1 << 17
    guards = {name: Guarded(size) for name in ("x", "packed", "bias", "y")}
    for i, (m, weight) in enumerate(weights(rng)):
        n, k = weight.out_features, weight.in_features
        packed = ref.pack(weight)
        width, out = (k, n) if which == "forward" else (n, k)
        for x_dtype, compute in itertools.product(X_DTYPES, ("bf16", "int8")):
            if refusal(which, kernel_id, m, weight, x_dtype, compute):
                continue
            served += 1
            x = store(rng.normal(0, 1, (m, width)).astype(np.float32), x_dtype)
            bias = None
            if which == "forward" and i % 3:
                bias = store(np.ones(n, np.float32), X_DTYPES[i % 3])
            expected = None
            for at_end, gap in ((True, 0), (False, 0), (True, 5)):
                call = (
                    f"{kernel_id} m={m} {weight.format} x={x_dtype} {compute} "
                    f"{'ends' if at_end else 'starts'} at a guard page, row gap {gap}"
                )
                print(call, file=sys.stderr, flush=True)
                y = guarded_rows(guards["y"], np.zeros((m, out), x.dtype), gap, at_end)
                native.int4_linear_run(
                    which,
                    kernel_id,
                    guarded_rows(guards["x"], x, gap, at_end),
                    guards["packed"].place(packed, at_end),
                    None if bias is None else guards["bias"].place(bias, at_end),
                    compute=compute,
                    x_dtype=x_dtype,
                    threads=1,
                    y=y,
                    **weight.format,
                )
                if expected is None:
                    expected = y.copy()
                if y.tobytes() != expected.tobytes():
                    raise AssertionError(f"{call}: other bits than at other addresses")
    return served


def walk_in_child(file: str, *arguments: str, timeout: int = 120) -> int:
    """How many calls `python FILE ARGUMENTS` says it served; fails with the last call it named if a
    guard page killed it."""
    done = subprocess.run(
        [sys.executable, file, *arguments], capture_output=True, text=True, timeout=timeout
    )
    last = done.stderr.strip().splitlines()[-1:] or ["nothing"]
    if done.returncode < 0:
        pytest.fail(f"killed by signal {-done.returncode} in: {last[0]}")
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.parametrize("which, kernel_id", row_params())
def test_row_stays_inside_its_buffers(which, kernel_id):
    assert walk_in_child(__file__, which, kernel_id) >= 50


def test_the_guard_works():
    """The method itself: a read one byte past the buffer kills the child."""
    for offset in (0, -1):
        code = (
            "import numpy as np, ctypes; from test_guard_pages import Guarded; "
            "g = Guarded(100); a = g.place(np.ones(100, np.uint8), True); "
            f"print(ctypes.string_at(a.ctypes.data + 100 + {offset}, 1))"
        )
        path = __file__.rsplit("/", 1)[0]
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=path
        )
        assert (done.returncode == -11) == (offset == 0), done


if __name__ == "__main__":
    print(walk(*sys.argv[1:3]))
