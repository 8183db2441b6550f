"""The int4 CPU goals of this project as rows: floor, goal, what one run measured, and the verdict.

A row that covers several shapes or M is judged by its worst case; the detail names that case and
the best one. Ratios are medians over rounds of (baseline seconds / our seconds) inside one round.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Callable

from .goals import Measured, goal_row
from .timing import median

DENSE_BF16 = ("dense bf16 eager", "dense bf16 oneDNN")
DENSE_FP32 = ("dense fp32 eager", "dense fp32 oneDNN", "dense fp32 MKL")
OURS, INT8, INT8_X32 = "nibblock bf16", "nibblock int8", "nibblock int8 x32"

Case = dict[str, Any]


def ratio(case: Case, ours: str, baseline: str) -> float | None:
    """Speed-up of `ours` over `baseline` in one case; None where one of them did not run."""
    found = case["providers"]
    if ours not in found or baseline not in found:
        return None
    pairs = zip(found[ours]["rounds_s"], found[baseline]["rounds_s"])
    return median([b / a for a, b in pairs])


def lacks_bf16(case: Case) -> bool:
    """Whether oneDNN multiplies no bfloat16 on this CPU. torch then emulates it, and whoever wants
    speed computes in float32."""
    return "dense bf16 oneDNN" in case.get("unavailable", {})


def better_dense(case: Case) -> str | None:
    """The faster of eager and prepacked dense bfloat16 in this case; where the CPU has none, the
    fastest dense of either type."""
    known = DENSE_BF16 + DENSE_FP32 if lacks_bf16(case) else DENSE_BF16
    names = [n for n in known if n in case["providers"]]
    return min(names, key=lambda n: case["providers"][n]["median_s"]) if names else None


def vs_dense(case: Case, ours: str = OURS) -> float | None:
    name = better_dense(case)
    return ratio(case, ours, name) if name else None


def share_of_read(case: Case, ours: str = OURS) -> float | None:
    """Bytes a second (weights, x, y) as a share of the read bandwidth of the same rounds."""
    return _share(case, ours, "read", case["providers"].get(ours, {}).get("bytes"))


def share_of_peak(case: Case, ours: str, unit: str) -> float | None:
    return _share(case, ours, unit, case.get("flops"))


def _share(case: Case, ours: str, ceiling: str, work: float | None) -> float | None:
    entry, top = case["providers"].get(ours), case.get("ceilings", {}).get(ceiling)
    if not entry or not top or work is None:
        return None
    return median([work / t / (c * 1e9) for t, c in zip(entry["rounds_s"], top["rounds"])])


def roofline(case: Case, ours: str, unit: str | None) -> float | None:
    """The larger of the two shares: how much of the time the binding resource alone would need.

    Memory counts only where the weights are cold; cached weights are not bound by it."""
    shares = [share_of_peak(case, ours, unit)] if unit else []
    if case["weights"] == "cold":
        shares.append(share_of_read(case, ours))
    known = [s for s in shares if s is not None]
    return max(known) if known else None


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every int4_linear CPU row, from the dict that a run of the benchmark makes."""
    amx = result["environment"]["isa"] == "amx"
    no_amx = "this CPU has no AMX" if not amx else "not part of this run"
    everything: list[Case] = result["cases"]
    emulated = any(lacks_bf16(c) for c in everything)
    dense = "dense, fp32 or bf16 (best one)" if emulated else "dense bf16 (better one)"
    models = ("llama-8b", "custom")
    large = [c for c in everything if c["model"] in models and c["n"] * c["k"] >= 1 << 22]

    def over(
        cases: Iterable[Case],
        figure: Callable[[Case], float | None],
        m: Callable[[int], bool],
        weights: str = "warm",
        group: int = 128,
    ) -> list[Measured]:
        out = []
        for c in cases:
            if m(c["m"]) and c["weights"] == weights and c["group"] == group:
                value = figure(c)
                if value is not None:
                    out.append((value, f"{c['shape']} M={c['m']} {weights}"))
        return out

    def torch_int4(c: Case) -> float | None:
        return ratio(c, OURS, "torch int4")

    def peak_of(unit: str, ours: str) -> Callable[[Case], float | None]:
        return lambda c: share_of_peak(c, ours, unit) if min(c["n"], c["k"]) >= 2048 else None

    wide = [c for c in everything if c["providers"].get(OURS, {}).get("weight_bytes", 0) >= 8e6]
    rows = [
        goal_row("M = 1, cold, packed >= 8 MB: share of read bandwidth", 0.85, 0.92,
             [(v, w) for g in (32, 128)
              for v, w in over(wide, share_of_read, lambda m: m == 1, "cold", g)], "%"),
        goal_row(f"M = 1 vs {dense}, cold", 2.5, 3.4,
             over(large, vs_dense, lambda m: m == 1, "cold")),
        goal_row("M = 1 vs torch int4, cold", 1.5, 2.2,
             over(large, torch_int4, lambda m: m == 1, "cold")),
        goal_row("M = 1 vs torch int4, cache-resident", 2.5, 4.0,
             over(large, torch_int4, lambda m: m == 1)),
        goal_row("M = 8 vs torch int4", 2.5, 5.0, over(large, torch_int4, lambda m: m == 8)),
        goal_row(f"M = 4..64 vs {dense}", 1.0, 1.5,
             over(large, vs_dense, lambda m: 4 <= m <= 64)),
        goal_row("M = 16 vs torch int4", 4.0, 8.0, over(large, torch_int4, lambda m: m == 16)),
        goal_row(f"M = 256..4096 vs {dense}", 0.9, 1.2,
             over(large, vs_dense, lambda m: 256 <= m <= 4096)),
        goal_row("M = 256..4096 vs torch int4", 10.0, 16.0,
             over(large, torch_int4, lambda m: 256 <= m <= 4096)),
        goal_row("share of AMX bf16 peak, M = 256", 0.30, 0.50,
             over(large, peak_of("amx_bf16", OURS), lambda m: m == 256), "%", missing=no_amx),
        goal_row("share of AMX bf16 peak, M >= 512", 0.35, 0.60,
             over(large, peak_of("amx_bf16", OURS), lambda m: m >= 512), "%", missing=no_amx),
        goal_row("int8: share of AMX int8 peak, M >= 256, g = 128", 0.22, 0.40,
             over(large, peak_of("amx_int8", INT8), lambda m: m >= 256), "%", missing=no_amx),
        goal_row("int8: share of AMX int8 peak, M >= 256, g = 32", 0.10, 0.15,
             over(large, peak_of("amx_int8", INT8), lambda m: m >= 256, group=32), "%",
             missing=no_amx),
        goal_row("int8 vs ONNX Runtime level 4 (both float32 x), M >= 256", 6.0, 12.0,
             over(large, lambda c: ratio(c, INT8_X32, "ORT level 4"), lambda m: m >= 256)),
        goal_row(f"dx, M = 512, vs {dense}", 0.9, 1.1,
             [(v, f"{c['shape']} M={c['m']}") for c in result.get("dx", [])
              for v in [vs_dense(c)] if v is not None]),
    ]  # fmt: skip
    rows += _level_rows(result.get("levels", {}))
    over_linear = [
        (entry["over"]["op"], f"op, {label} x")
        for label, entry in result.get("overhead", {}).items()
        if isinstance(entry, dict)
    ]
    rows.append(
        goal_row(
            "op overhead over F.linear, 64 x 64, no grad", 3.0, 1.0, over_linear, "us", lower=True
        )
    )
    errors = [
        (c["providers"][OURS]["error"] / c["providers"][DENSE_BF16[0]]["error"], _where(c))
        for c in everything
        if DENSE_BF16[0] in c["providers"] and OURS in c["providers"]
    ]
    rows.append(goal_row("error vs float64, over dense bf16's", 1.1, 1.1, errors, "x", lower=True))
    return rows


def _level_rows(levels: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    plan = {
        "avx2": ("forced AVX2 vs torch int4 held to AVX2", {1: (1.2, 1.5), 256: (3.0, 5.0)}),
        "avx512_vnni": (
            "forced AVX-512-VNNI vs torch int4 held to AVX-512",
            {1: (1.3, 1.8), 256: (2.0, 4.0)},
        ),
    }
    for level, (text, limits) in plan.items():
        found = levels.get(level, {})
        for m, (floor, goal) in limits.items():
            values = [
                (value, _where(c))
                for c in found.get("cases", [])
                if c["m"] == m
                for value in [ratio(c, OURS, "torch int4")]
                if value is not None
            ]
            missing = found.get("skipped", "not part of this run")
            rows.append(goal_row(f"{text}, M = {m}", floor, goal, values, missing=missing))
    return rows


def losses(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """Every case in which a baseline is faster than our compute="bf16", slowest first."""
    out = []
    for c in cases:
        for name in c["providers"]:
            if name.startswith("nibblock"):
                continue
            value = ratio(c, OURS, name)
            if value is not None and value < 1:
                out.append(
                    {"case": _where(c), "model": c["model"], "baseline": name, "speedup": value}
                )
    return sorted(out, key=lambda r: r["speedup"])


def _where(c: Case) -> str:
    return f"{c['shape']} g={c['group']} M={c['m']} {c['weights']}"
