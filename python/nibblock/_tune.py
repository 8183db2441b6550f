"""`python -m nibblock tune`: measures launch configurations of the Triton kernels on this GPU.

For every op and shape class each candidate of the grid runs once, its result is compared with that
of the configuration chosen by hand, and it is timed by replaying a CUDA graph over copies of the
weights larger than the L2 cache. The winners go to one JSON file for the GPU, which the launchers
read (see nibblock.triton_kernels._tuned); nothing is ever tuned in a user's call.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Optional

import torch

from nibblock._errors import BackendUnavailable
from nibblock.triton_kernels import _configs, _tuned
from nibblock.triton_kernels._configs import Config, ShapeClass

PARTS = ("int4", "dx", "blocks", "wgrad", "scores", "updates")
LAYERS = (
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),
    (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672),
)  # fmt: skip
ROWS = (16, 32, 64, 128, 256, 512, 1024)
GAIN = 0.98  # a candidate must take less than this share of the time of the one chosen by hand
# Sums of another order, then rounded to bfloat16: 2^-8 of each value, and of the largest where
# terms cancel.
BOUND = 2.0**-7

Clock = Callable[[dict[str, tuple[Callable[[int], Any], int]]], dict[str, list[float]]]


@dataclass
class Work:
    """One class made ready: `call(i)` runs the op on the i-th copy of the weights and returns what
    it computed; `want`, if given, is what a float32 product says."""

    call: Callable[[int], torch.Tensor]
    copies: int = 1
    want: Optional[torch.Tensor] = None


@dataclass
class Job:
    """A class to tune; `label` is the layer that stands for it, `make` builds it on the GPU."""

    shape: ShapeClass
    label: str
    make: Callable[[], Work]


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over largest value. Equal NaN and infinities differ by nothing, others by
    infinitely much."""
    got, want = got.float(), want.float()
    same = (got == want) | (got.isnan() & want.isnan())
    gap = torch.where(same, torch.zeros_like(want), (got - want).abs())
    largest = want.nan_to_num(0.0, 0.0, 0.0).abs().amax().clamp_min(1e-30)
    return float((gap.nan_to_num(torch.inf, torch.inf) / largest).amax()) if want.numel() else 0.0


def tune_class(job: Job, capability: int, clock: Clock) -> Optional[dict[str, Any]]:
    """The entry of one class, None where there is nothing to choose from.

    Raises:
        AssertionError: the configuration chosen by hand is wrong itself.
    """
    shape = job.shape
    grid = _configs.candidates(shape, capability)
    if len(grid) < 2:
        return None
    work = job.make()

    def running(config: Config) -> Callable[[int], torch.Tensor]:
        def call(i: int) -> torch.Tensor:
            with _tuned.forcing(shape.op, config):
                return work.call(i)

        return call

    want = running(grid[0])(0).clone()
    if work.want is not None and not off(want, work.want) < 2e-2:
        raise AssertionError("the configuration chosen by hand is off by over 2 %")
    rows: list[dict[str, Any]] = []
    calls = {}
    for number, config in enumerate(grid):
        row: dict[str, Any] = {"config": config}
        rows.append(row)
        try:
            error = off(running(config)(0), want)
        except (RuntimeError, ValueError) as refused:
            # Triton's OutOfResources and a failed launch: this candidate is out, the others stay.
            row["rejected"] = f"{type(refused).__name__}: {refused}".splitlines()[0]
            continue
        if error > BOUND:
            row["rejected"] = f"differs by {error:.3g} of the largest value"
            continue
        row["error"] = error
        calls[str(number)] = (running(config), work.copies)
    for name, seconds in clock(calls).items():
        rows[int(name)]["seconds"] = statistics.median(seconds)
    if "seconds" not in rows[0]:
        raise AssertionError("the configuration chosen by hand does not run twice alike")
    best = min((row for row in rows if "seconds" in row), key=lambda row: row["seconds"])
    if best["seconds"] > GAIN * rows[0]["seconds"]:
        best = rows[0]
    facts = {k: v for k, v in shape._asdict().items() if v}
    return {
        **facts, "layer": job.label, "config": best["config"], "seconds": best["seconds"],
        "by_hand_seconds": rows[0]["seconds"], "candidates": rows,
    }  # fmt: skip


def tune(
    jobs: Iterable[Job],
    capability: int,
    clock: Clock,
    seconds: float,
    now: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> tuple[list[dict[str, Any]], list[str]]:
    """(entries, classes left out with the reason) within about so many seconds.

    Args:
        jobs: in order of importance; a class that comes again is passed over. clock: see
            nibblock.bench.gpu_timing.graph_seconds.
    """
    entries, left, seen = [], [], set()
    end = now() + seconds
    for job in jobs:
        if job.shape in seen:
            continue
        seen.add(job.shape)
        if now() >= end:
            left.append(f"{job.shape}: the time was up")
            continue
        try:
            entry = tune_class(job, capability, clock)
        except (RuntimeError, AssertionError) as error:
            left.append(f"{job.shape}: {type(error).__name__}: {error}".splitlines()[0])
            say(left[-1])
            continue
        if entry is not None:
            entries.append(entry)
            ratio = entry["by_hand_seconds"] / entry["seconds"]
            out = sum("rejected" in row for row in entry["candidates"])
            note = f", {out} candidates rejected" if out else ""
            say(f"{job.shape}: {ratio:.2f}x over the one chosen by hand{note}")
    return entries, left


def merged(old: Optional[dict[str, Any]], new: dict[str, Any]) -> dict[str, Any]:
    """new with those entries of an older file whose class it does not name."""
    if old is None:
        return new

    def name(entry: dict[str, Any]) -> tuple:
        return tuple(entry.get(field) for field in ShapeClass._fields)

    own = {name(entry) for entry in new["entries"]}
    kept = [entry for entry in old["entries"] if name(entry) not in own]
    return {**new, "entries": new["entries"] + kept}


def write(folder: Path, facts: dict[str, Any], entries: Sequence[dict[str, Any]]) -> Path:
    """Writes (or adds to) the file of a GPU and reads it back as a launcher would.

    Args:
        facts: gpu (its name), capability [major, minor], versions, date.
    Raises:
        ValueError: the folder holds a file of this GPU that is not in order.
    """
    path = folder / f"{_tuned.slug(facts['gpu'])}.json"
    old = None
    if path.exists():
        _tuned.read(path)
        old = json.loads(path.read_text(encoding="utf-8"))
    content = merged(old, {"format": _tuned.FORMAT, **facts, "entries": list(entries)})
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    _tuned.read(path)
    _tuned.forget()
    return path


# --- what is tuned --------------------------------------------------------------------------------


def jobs(parts: Sequence[str], layers: Sequence[tuple[int, int]]) -> Iterator[Job]:
    """The classes of some parts, for layers (N, K)."""
    making = {
        "int4": lambda: _int4_jobs(layers, False), "dx": lambda: _int4_jobs(layers, True),
        "blocks": lambda: _block_jobs(layers), "wgrad": lambda: _wgrad_jobs(),
        "scores": lambda: _score_jobs(), "updates": lambda: _update_jobs(),
    }  # fmt: skip
    for part in parts:
        yield from making[part]()


def _int4_jobs(layers: Sequence[tuple[int, int]], dx: bool) -> Iterator[Job]:
    from nibblock import ops
    from nibblock.bench.gpu_timing import Int4

    op = "int4_linear_dx" if dx else "int4_linear"
    kept: dict[tuple[int, int], Any] = {}  # one layer at a time: the largest take gigabytes

    def make(n: int, k: int, rows: int) -> Work:
        if (n, k) not in kept:
            kept.clear()
            kept[n, k] = Int4(n, k)
        layer = kept[n, k]
        x = torch.randn(rows, n if dx else k, device="cuda").bfloat16()

        def call(i: int) -> torch.Tensor:
            if dx:
                return ops.int4_linear_dx(x, layer.packed[i], in_features=k, **layer.form)
            return ops.int4_linear(x, layer.packed[i], out_features=n, **layer.form)

        want = x.float() @ (layer.dense32 if dx else layer.dense32.t())
        return Work(call, len(layer.packed), want)

    for n, k in layers:
        for rows in ROWS:
            if rows >= 1024:  # served by another row: one dequantisation and cuBLAS
                continue
            shape = _configs.int4_class(op, rows, n, k, torch.bfloat16, 128, 4)
            yield Job(shape, f"{n}x{k}", lambda n=n, k=k, rows=rows: make(n, k, rows))


def _blocks(n: int, k: int, block: int, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(index of the stored blocks, layout on the GPU)."""
    from nibblock import ops

    torch.manual_seed(0)
    index = (torch.rand(n // block, k // block) < density).nonzero()
    return index, ops.block_layout(index, n, k, block).cuda()


def _block_jobs(layers: Sequence[tuple[int, int]]) -> Iterator[Job]:
    from nibblock import ops
    from nibblock.bench.gpu_timing import copies

    def make(n: int, k: int, block: int, rows: int, dx: bool) -> Work:
        index, layout = _blocks(n, k, block, 0.1 if rows <= 64 else 0.25)
        v = copies(torch.randn(len(index), block, block, device="cuda").bfloat16() / 64)
        x = torch.randn(rows, n if dx else k, device="cuda").bfloat16()

        def call(i: int) -> torch.Tensor:
            if dx:
                return ops.block_sparse_linear_dx(x, v[i], layout, in_features=k, block=block)
            return ops.block_sparse_linear(x, v[i], layout, out_features=n, block=block)

        return Work(call, len(v))

    for n, k in layers:
        for block in (32, 64, 128):
            for rows in (16, 64, 512, 4096):
                for dx in (False, True):
                    op = "block_sparse_linear_dx" if dx else "block_sparse_linear"
                    bf16 = torch.bfloat16
                    shape = _configs.blocks_class(op, rows, n, k, bf16, bf16, block)
                    facts = (n, k, block, rows, dx)
                    yield Job(shape, f"{n}x{k}", lambda facts=facts: make(*facts))


def _wgrad_jobs() -> Iterator[Job]:
    from nibblock import ops

    n = k = 4096

    def make(block: int, density: float, rows: int) -> Work:
        _, layout = _blocks(n, k, block, density)
        g, x = (torch.randn(rows, n, device="cuda").bfloat16() for _ in range(2))
        return Work(
            lambda i: ops.block_weight_grad(g, x, layout, block=block, dtype=torch.bfloat16)
        )

    for block in (32, 64, 128):
        for density in (0.01, 0.02, 0.05, 0.25):
            count = len(_index_only(n, k, block, density))
            for rows in (512, 4096):
                shape = _configs.weight_grad_class(rows, count, torch.bfloat16, block)
                facts = (block, density, rows)
                yield Job(shape, f"{n}x{k} {density:.0%}", lambda facts=facts: make(*facts))


def _index_only(n: int, k: int, block: int, density: float) -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.rand(n // block, k // block) < density).nonzero()


def _score_jobs() -> Iterator[Job]:
    from nibblock import ops

    n = k = 4096

    def make(block: int, rows: int) -> Work:
        g, x = (torch.randn(rows, n, device="cuda").bfloat16() for _ in range(2))
        sums = torch.zeros(n // block, k // block, device="cuda")

        def call(i: int) -> torch.Tensor:
            ops.block_scores_(sums.zero_(), None, g, x, None, block=block)
            return sums.clone()

        return Work(call)

    for block in (32, 64, 128):
        shape = _configs.scores_class(4096, n, k, torch.bfloat16, block)
        yield Job(shape, f"{n}x{k}", lambda block=block: make(block, 4096))


def _update_jobs() -> Iterator[Job]:
    from nibblock import ops

    def make(block: int) -> Work:
        count = (1 << 24) // block**2  # 16 M parameters
        kind = dict(device="cuda", dtype=torch.float32)
        value, grad = (torch.randn(count, block, block, **kind) for _ in range(2))
        states = [torch.zeros_like(value) for _ in range(2)]
        age = torch.zeros(count, device="cuda", dtype=torch.int32)
        start = value.clone()
        pair = torch.stack([torch.arange(count), torch.arange(count)], 1).int().cuda()

        def call(i: int) -> torch.Tensor:
            for t in (*states, age):
                t.zero_()
            value.copy_(start)
            ops.masked_adamw_block_(
                [value], [grad], [states[0]], [states[1]], [age], [], [pair], block=block, lr=1e-3
            )
            return value

        return Work(call)

    for block in (32, 64, 128):
        shape = _configs.updates_class("adamw", "block", torch.float32, block)
        yield Job(shape, "16 M parameters", lambda block=block: make(block))


# --- the command ----------------------------------------------------------------------------------


def _layer(text: str) -> tuple[int, int]:
    n, _, k = text.lower().partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) > 0 and int(k) > 0 and int(k) % 128 == 0):
        raise argparse.ArgumentTypeError(f"must be NxK with K a multiple of 128, got {text}")
    return int(n), int(k)


def main(argv: list[str]) -> int:
    """`python -m nibblock tune`; exit code 1 if a class could not be tuned."""
    parser = argparse.ArgumentParser(prog="python -m nibblock tune", description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all of them")
    parser.add_argument("--layer", action="append", type=_layer, metavar="NxK",
                        help="layers to tune for; default: those of 8B and 70B models")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=10, help="stop after about so long")
    parser.add_argument("--out", type=Path, help=f"folder of the file; default: {_tuned.VARIABLE}, "
                        "else ./tuned")  # fmt: skip
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise BackendUnavailable("needs an NVIDIA GPU and a CUDA build of torch, got none")
    from nibblock.ops import _triton

    reason = _triton.refusal(torch.cuda.current_device())
    if reason:
        raise BackendUnavailable(reason)
    from nibblock.bench.gpu_timing import graph_seconds

    named = os.environ.get(_tuned.VARIABLE)
    folder = options.out or (Path(named) if named else Path("tuned"))
    capability = torch.cuda.get_device_capability()
    facts = {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(capability),
        "versions": {
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton"),
            "nibblock": importlib.metadata.version("nibblock"),
            "cuda": torch.version.cuda,
        },
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "clock": "CUDA graph replay over rotating weights, median of rounds",
    }
    entries, left = tune(
        jobs(options.part or PARTS, options.layer or LAYERS),
        10 * capability[0] + capability[1],
        lambda calls: graph_seconds(calls, rounds=3),
        60 * options.minutes,
    )
    for line in left:
        print(f"left out: {line}")
    if entries:
        path = write(folder, facts, entries)
        print(f"wrote {len(entries)} classes to {path}")
        if folder.resolve() != _tuned.SHIPPED:
            print(f"set {_tuned.VARIABLE}={folder.resolve()} to use it")
    return 1 if left or not entries else 0
