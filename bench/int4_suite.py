"""What is measured for int4_linear: forward at many shapes and M, dx, overhead, forced ISA levels.

Every function returns plain dicts and lists that go into the JSON as they are. One comparison, a
"case", keeps the seconds of every round of every provider, so any ratio can be formed later.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import torch
import torch.nn.functional as F

from . import providers as P
from .machine import Ceilings, native
from .shapes import LLAMA_8B, Shape
from .timing import Contender, Timing, cold_bytes, copies_for, interleave, median

OURS = ("nibblock bf16", "nibblock int8")
DENSE = (
    "dense fp32 eager",
    "dense fp32 oneDNN",
    "dense fp32 MKL",
    "dense bf16 eager",
    "dense bf16 oneDNN",
)
PEERS = ("torch int4",)
# These keep one copy of their weights: only compared where the weights are cache-resident.
PEERS_WARM = ("nibblock int8 x32", "ORT level 0", "ORT level 4", "bitsandbytes NF4")
COLD_MIN_BYTES = 8_000_000  # GOALS: "layers of 8 MB packed and more"
COLD_ROWS = 16  # from here on arithmetic, not memory, is what counts

Log = Callable[[str], None]


def group_of(shape: Shape) -> int:
    """SmolLM2 as its GGUF file has it (Q4_1, groups of 32); 128 elsewhere."""
    return 32 if shape.model.startswith("smollm2") else 128


def run_case(
    shape: Shape,
    m: int,
    names: Sequence[str],
    ceilings: Ceilings | None,
    *,
    group: int,
    cold: bool = False,
    rounds: int = 15,
    budget: float = 10.0,
    problems: dict[Any, P.Problem] | None = None,
) -> dict[str, Any]:
    """Times the named providers on one layer at one M, interleaved, each result checked first.

    Args:
        cold: rotate over more copies of the weights than any cache holds.
        problems: a cache of weights between calls (their making takes longer than the timing).
    """
    cache = problems if problems is not None else {}
    target = cold_bytes(len(names)) if cold else 0
    case: dict[str, Any] = {
        "shape": shape.key,
        "model": shape.model,
        "layer": shape.layer,
        "n": shape.out_features,
        "k": shape.in_features,
        "m": m,
        "group": group,
        "weights": "cold" if cold else "warm",
        "providers": {},
        "unavailable": {},
    }
    contenders: list[Contender] = []
    candidates: dict[str, P.Candidate] = {}
    for name in names:
        symmetric = name.startswith("ORT")
        key = (shape.key, group, symmetric)
        if key not in cache:
            cache[key] = P.Problem(shape, group, symmetric)
        problem = cache[key]
        copies = copies_for(P.weight_bytes(name, problem), target) if cold else 1
        try:
            candidate = P.make(name, problem, m, copies)
        except P.Unavailable as reason:
            case["unavailable"][name] = str(reason)
            continue
        error = P.check(candidate)
        candidates[name] = candidate
        contenders.append(candidate.contender())
        io = candidate.x.element_size() * m * (shape.in_features + shape.out_features)
        case["providers"][name] = {
            "error": error,
            "bytes": candidate.weight_bytes + io,
            "weight_bytes": candidate.weight_bytes,
            "copies": candidate.copies,
        }
    if ceilings is not None:
        contenders.append(ceilings.read_contender())
        units = {c.name: c for c in map(ceilings.peak_contender, ("bf16", "int8")) if c}
        contenders.extend(units.values())
    timings = interleave(contenders, rounds=rounds, budget=budget)
    flops = 2.0 * m * shape.out_features * shape.in_features
    case["flops"] = flops
    for name, entry in case["providers"].items():
        t = timings[name]
        entry.update(_seconds(t))
        entry["gbs"] = entry["bytes"] / t.median / 1e9
        entry["gflops"] = flops / t.median / 1e9
    case["ceilings"] = {
        n[len("ceiling ") :]: _figures(t) for n, t in timings.items() if n.startswith("ceiling ")
    }
    return case


def run_dx(shape: Shape, m: int, ceilings: Ceilings | None, budget: float) -> dict[str, Any]:
    """dx = dy W beside dense bf16: torch.mm, and oneDNN on a prepacked transpose of the weight."""
    from nibblock.ops import int4_pack

    problem = P.Problem(shape, 128)
    n, k, group = shape.out_features, shape.in_features, problem.group
    packed = int4_pack(
        problem.qweight(),
        problem.scale.to(P.SCALES),
        problem.offset.to(P.SCALES),
        in_features=k,
        group_size=group,
    )
    gen = torch.Generator().manual_seed(7)
    dy = torch.randn(m, n, generator=gen).bfloat16()
    w = problem.dense.bfloat16()
    onednn = torch.ops.mkldnn._linear_pointwise.default
    op = torch.ops.nibblock.int4_linear_dx.default
    calls = {
        "nibblock bf16": lambda _: op(dy, packed, k, group, 4, True, P.SCALES, "bf16"),
        "dense bf16 eager": lambda _: torch.mm(dy, w),
    }
    unavailable = {}
    try:
        w_t = P.onednn_weight(w.t().contiguous(), m)
        calls["dense bf16 oneDNN"] = lambda _: onednn(dy, w_t, None, "none", [], "")
    except P.Unavailable as reason:
        unavailable["dense bf16 oneDNN"] = str(reason)
        dy32, w32 = dy.float(), problem.dense
        calls["dense fp32 eager"] = lambda _: torch.mm(dy32, w32)
    exact = dy[:4].double() @ problem.dense.double()
    errors = {}
    for name, call in calls.items():
        errors[name] = float((call(0)[:4].double() - exact).norm() / exact.norm())
        if not errors[name] <= P.tolerance(name):
            raise AssertionError(f"{name}: dx has relative error {errors[name]:.2e}")
    contenders = [Contender(name, call) for name, call in calls.items()]
    peak = ceilings.peak_contender("bf16") if ceilings else None
    timings = interleave(contenders + ([peak] if peak else []), budget=budget)
    return {
        "shape": shape.key,
        "m": m,
        "flops": 2.0 * m * n * k,
        "providers": {n_: {"error": errors[n_], **_seconds(timings[n_])} for n_ in calls},
        "unavailable": unavailable,
        "ceilings": {peak.name[len("ceiling ") :]: _figures(timings[peak.name])} if peak else {},
    }


def run_overhead(rounds: int = 41) -> dict[str, Any]:
    """Microseconds of a call on a 64 x 64 layer and one row, no gradients: ours beside torch."""
    baseline_of = {
        "op": "F.linear",
        "nb.ops.int4_linear": "F.linear",
        "nb.Int4Linear": "nn.Linear",
    }
    out: dict[str, Any] = {"shape": "64x64", "m": 1, "unit": "us"}
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        calls = _tiny_calls(dtype)
        with torch.no_grad():
            contenders = [Contender(n, c) for n, c in calls.items()]
            timings = interleave(contenders, rounds=rounds, block=0.01)
        over = {}
        for ours, theirs in baseline_of.items():
            pairs = zip(timings[ours].rounds, timings[theirs].rounds)
            over[ours] = median(1e6 * (a - b) for a, b in pairs)
        out[label] = {"us": {n: t.median * 1e6 for n, t in timings.items()}, "over": over}
    return out


def _tiny_calls(dtype: torch.dtype) -> dict[str, Callable[[int], object]]:
    import nibblock as nb
    from nibblock.ops import int4_linear, int4_pack
    from nibblock.ops._checks import format_code

    n = k = 64
    problem = P.Problem(Shape("tiny", "64x64", n, k), k)
    packed = int4_pack(
        problem.qweight(), problem.scale, problem.offset, in_features=k, group_size=k
    )
    x, w = torch.randn(1, k).to(dtype), problem.dense.to(dtype)
    dense = torch.nn.Linear(k, n, bias=False, dtype=dtype)
    module = nb.Int4Linear.from_linear(torch.nn.Linear(k, n, bias=False), group_size=k)
    op, f32 = torch.ops.nibblock._int4_linear_forward.default, torch.float32
    code = format_code(n, k, 4, True, f32, "bf16")
    return {
        "F.linear": lambda _: F.linear(x, w),
        "op": lambda _: op(x, packed, None, code),
        "nb.ops.int4_linear": lambda _: int4_linear(
            x, packed, out_features=n, group_size=k, affine=True, scale_dtype=f32
        ),
        "nn.Linear": lambda _: dense(x),
        "nb.Int4Linear": lambda _: module(x),
    }


# --- forced ISA levels, in processes of their own -------------------------------------------------

# torch, oneDNN and MKL read their limits once at start-up.
LEVELS = {
    "avx2": {
        "NIBBLOCK_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512_vnni": {
        "NIBBLOCK_ISA": "avx512_vnni",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}
_ORDER = ("scalar", "avx2", "avx512", "avx512_vnni", "amx")


def run_levels(threads: int, budget: float, log: Log) -> dict[str, Any]:
    """Our op and torch's int4 op, both held to one ISA level, interleaved in a child process
    each."""
    out: dict[str, Any] = {}
    for level, env in LEVELS.items():
        if _ORDER.index(native().cpu_isa_max()) < _ORDER.index(level):
            out[level] = {"skipped": f"this CPU's highest level is {native().cpu_isa_max()}"}
            continue
        log(f"forced {level} (child process)")
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "cases.json"
            root = str(Path(__file__).resolve().parent.parent)
            paths = [root, os.environ.get("PYTHONPATH", "")]
            command = [
                *(sys.executable, "-m", f"{__package__}.int4_level_child"),
                *(str(target), str(threads), str(budget)),
            ]
            done = subprocess.run(
                command,
                env={**os.environ, **env, "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                # What was measured before it is worth more than a tidy end.
                print(done.stderr.strip(), file=sys.stderr)
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                out[level] = {"skipped": f"its process failed: {last}"}
            else:
                out[level] = json.loads(target.read_text())
    return out


def level_cases(budget: float) -> dict[str, Any]:
    """What a child of run_levels measures."""
    shape = LLAMA_8B[0]
    names = ("nibblock bf16", "torch int4", "dense fp32 oneDNN")
    problems: dict[Any, P.Problem] = {}
    ceilings = Ceilings(torch.get_num_threads())
    cases = [
        run_case(shape, m, names, ceilings, group=128, cold=cold, budget=budget, problems=problems)
        for m, cold in ((1, False), (1, True), (256, False))
    ]
    return {
        "isa": native().cpu_isa(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cases": cases,
    }


# --- helpers --------------------------------------------------------------------------------------


def _seconds(t: Timing) -> dict[str, Any]:
    return {
        "median_s": _digits(t.median),
        "min_s": _digits(t.min),
        "rounds_s": [_digits(v) for v in t.rounds],
    }


def _figures(t: Timing) -> dict[str, Any]:
    return {
        "median": _digits(t.median),
        "max": _digits(t.max),
        "rounds": [_digits(v) for v in t.rounds],
    }


def _digits(value: float) -> float:
    return float(f"{value:.5g}")
