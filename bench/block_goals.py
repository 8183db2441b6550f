"""The block-sparse CPU goals of this project as rows, and the figures they are made of.

Ratios are medians over rounds of a ratio formed inside one round; a row over several cases is
judged by its worst one.
"""

from __future__ import annotations

import math
from typing import Any

from .goals import Measured, goal_row
from .timing import median

Case = dict[str, Any]


def line(case: Case, name: str, density: float) -> dict[str, Any] | None:
    return case["lines"].get(name if density == 1 else f"{name} d={density:g}")


def best_dense(case: Case, label: str = "bf16") -> str:
    """The faster of eager and prepacked dense of this dtype; where oneDNN multiplies no bfloat16,
    so that torch emulates it, the fastest of either."""
    kinds = f"dense {label}" if case.get("dense_bf16", True) else "dense "
    names = [n for n in case["lines"] if n.startswith(kinds)]
    return min(names, key=lambda n: case["lines"][n]["median_s"])


def ratio(case: Case, slow: str, fast: str) -> float:
    """Seconds of `slow` over seconds of `fast`, in the same rounds."""
    a, b = (case["lines"][key]["rounds_s"] for key in (slow, fast))
    return median([u / v for u, v in zip(a, b)])


def efficiency(case: Case, density: float, copies: float) -> float | None:
    """e such that our bf16 time is dense_bf16 * d / e + copies * copy; infinite when the copies
    alone take longer."""
    ours = line(case, "nibblock bf16", density)
    if ours is None:
        return None
    dense = case["lines"][best_dense(case)]["rounds_s"]
    rounds = zip(ours["rounds_s"], dense, case["copy"]["rounds_s"])
    return median([d * density / (t - copies * c) if t > copies * c else math.inf
                   for t, d, c in rounds])  # fmt: skip


def break_even(case: Case, label: str = "bf16") -> tuple[float, bool]:
    """The density at which our time reaches the better dense's, between the measured ones by
    straight lines; (the largest measured density, True) if it is never reached."""
    dense = best_dense(case, label)
    points = [
        (d, 1 / ratio(case, dense, entry["key"]))
        for d in sorted(case["densities"])
        for entry in [{"key": f"nibblock {label} d={d:g}"}]
        if entry["key"] in case["lines"]
    ]
    last = (0.0, 0.0)
    for density, share in points:
        if share >= 1:
            step = (1 - last[1]) / (share - last[1])
            return last[0] + step * (density - last[0]), False
        last = (density, share)
    return last[0], True


def share_of_read(case: Case, entry: dict[str, Any]) -> float:
    """Bytes a second as a share of the read bandwidth of the same rounds."""
    tops = case["ceilings"]["read"]["rounds"]
    return median([entry["bytes"] / t / (c * 1e9) for t, c in zip(entry["rounds_s"], tops)])


def share_of_peak(case: Case, entry: dict[str, Any]) -> tuple[float, str] | None:
    """Of the unit that the kernels live on: AMX where there is one, float32 FMA elsewhere."""
    names = [n for n in ("amx_bf16", "fma_avx512", "fma_avx2") if n in case["ceilings"]]
    if not names:
        return None
    tops = case["ceilings"][names[0]]["rounds"]
    return median([entry["flops"] / t / (c * 1e9) for t, c in zip(entry["rounds_s"], tops)]), names[
        0
    ]


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every block-sparse row, from the dict that a run of the benchmark makes."""
    cases = result["cases"]

    def of(kind, m=lambda m: m >= 256, block=32):
        return [c for c in cases if c["kind"] == kind and m(c["m"]) and c["block"] == block]

    def where(c, density=None):
        text = f"{c['shape']} block {c['block']} M={c['m']}"
        return text if density is None else f"{text} d={density:g}"

    def shares(kind, copies, highest):
        return [
            (value, where(c, d))
            for c in of(kind)
            for d in c["densities"]
            if d <= highest
            for value in [efficiency(c, d, copies)]
            if value is not None
        ]

    def against(kind, ours, peer) -> list[Measured]:
        return [
            (ratio(c, key, f"{ours} d={entry['density']:g}"), where(c, entry["density"]))
            for c in of(kind)
            for key, entry in c["lines"].items()
            if entry["name"] == peer
        ]

    rows = []
    for kind, text in (("forward", "forward"), ("dx", "dx")):
        row = goal_row(f"{text}, M >= 256, d <= 50 %: e after 1.5 copies", 0.65, 0.8,
                       shares(kind, 1.5, 0.5), "x")  # fmt: skip
        strict = [v for v, _ in shares(kind, 1.2, 0.5)]
        if row["verdict"] == "goal met" and min(strict) < 0.8:
            row["verdict"] = "floor met"  # the goal allows 1.2 copies
        rows.append(row)
    evens = [(break_even(c)[0], where(c)) for c in of("forward")]
    rows.append(goal_row("break-even density, M >= 256", 0.6, 0.8, evens, "%"))
    for label, floor, goal in (("fp32", 1.5, 2.5), ("bf16", 8.0, 12.0)):
        found = against("forward", f"nibblock {label}", "torch BSR fp32")
        rows.append(goal_row(f"forward {label} vs torch BSR fp32", floor, goal, found))
    single = [
        (share_of_read(c, entry), where(c, entry["density"]) + f" {entry['name'][9:]}")
        for c in of("forward", lambda m: m == 1)
        for entry in c["lines"].values()
        if entry["name"].startswith("nibblock") and entry["bytes"] >= 4e6
    ]
    rows.append(goal_row("M = 1, cold, 4 MB and more: share of read bandwidth", 0.60, 0.85,
                         single, "%"))  # fmt: skip
    rows.append(goal_row("block_weight_grad, M >= 256, d <= 50 %: e after 1.5 copies", 0.55, 0.7,
                         shares("weight_grad", 1.5, 0.5), "x"))  # fmt: skip
    found = against("weight_grad", "nibblock fp32", "torch sampled_addmm fp32")
    rows.append(goal_row("block_weight_grad fp32 vs torch sampled_addmm", 20.0, 40.0, found))
    return rows + _adapter_rows(result["adapter"])


def _adapter_rows(cases: list[Case]) -> list[dict[str, Any]]:
    """The seconds of one op over those of the base, or of two ops: smaller is better."""

    def over(labels, baseline, m):
        return [
            (
                ratio(c, f"one op {label}", baseline.format(label)),
                f"{c['shape']} M={c['m']} {label}",
            )
            for c in cases
            if m(c["m"])
            for label in labels
        ]

    one, many, both = (lambda m: m == 1), (lambda m: m >= 256), ("bf16", "fp32")
    text = "int4 base + 2 % adapter in one op, over the base"
    plan = [
        (f"{text}, M = 1, bf16 values", 1.12, 1.08, over(["bf16"], "base", one)),
        (f"{text}, M = 1, fp32 values", 1.20, 1.08, over(["fp32"], "base", one)),
        (f"{text}, M >= 256", 1.10, 1.05, over(both, "base", many)),
        ("the same over base and adapter as two ops", 1.0, 0.9, over(both, "two ops {}", bool)),
    ]
    return [goal_row(*row, lower=True) for row in plan]


def losses(cases: list[Case]) -> list[dict[str, Any]]:
    """Every density at which the better dense product of the same dtype is faster, worst first."""
    out = []
    for c in cases:
        for key, entry in c["lines"].items():
            if not entry["name"].startswith("nibblock"):
                continue
            dense = best_dense(c, entry["name"].split()[1])
            speed = ratio(c, dense, key)
            if speed < 1:
                out.append({
                    "case": f"{c['kind']} {c['shape']} block {c['block']} M={c['m']}",
                    "ours": key, "baseline": dense, "speedup": speed,
                })  # fmt: skip
    return sorted(out, key=lambda r: r["speedup"])
