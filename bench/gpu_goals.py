"""The GPU goals as rows: floor, goal, what one run measured, and the verdict.

A row that covers a model is the geometric mean over its four layers; one that covers several M,
densities or blocks is judged by its worst. Speeds are by the `graph` clock over cuBLAS bfloat16 of
the same run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Callable

from .goals import Measured, goal_row

OURS, DENSE = "nibblock", "cuBLAS bf16"
Row = dict[str, Any]


def seconds(row: Row, name: str) -> float | None:
    found = row["times"].get(name)
    return None if found is None else found["graph"]


def speed(row: Row, over: str = DENSE, ours: str = OURS) -> float | None:
    """How many times faster ours is than another contender of the same case."""
    base, own = seconds(row, over), seconds(row, ours)
    return None if base is None or own is None else base / own


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def by_model(rows: Iterable[Row], m: Callable[[int], bool], models: tuple[str, ...]):
    """[(geometric mean over the layers of a model at one M, which)]."""
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        value = speed(row)
        if value is not None and row["model"] in models and m(row["m"]):
            groups.setdefault((row["model"], row["m"]), []).append(value)
    return [(geomean(values), f"{name} M={m}") for (name, m), values in groups.items()]


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every GPU row, from the dict that a run of the benchmark makes."""
    parts = result["parts"]
    int4, dx = parts.get("int4", []), parts.get("dx", [])
    blocks, wgrad = parts.get("blocks", []), parts.get("wgrad", [])
    both = ("8b", "70b")

    def at(*ms: int) -> Callable[[int], bool]:
        return lambda m: m in ms

    rows = []
    for m, limits in ((1, ((2.0, 2.6), (2.6, 3.3))), (16, ((1.8, 2.4), (2.4, 3.2)))):
        for model, (floor, goal) in zip(both, limits):
            text = f"int4 forward, M = {m}, {model.upper()} layers"
            rows.append(goal_row(text, floor, goal, by_model(int4, at(m), (model,))))
    for m, floor, goal in ((64, 1.4, 2.0), (128, 0.9, 1.2)):
        text = f"int4 forward, M = {m}, 70B layers"
        rows.append(goal_row(text, floor, goal, by_model(int4, at(m), ("70b",))))
    for text, m, floor, goal in (
        ("M = 256-1023", lambda m: 256 <= m < 1024, 0.65, 0.90),
        ("M = 1024", at(1024), 0.80, 0.90),
        ("M >= 2048", lambda m: m >= 2048, 0.88, 0.95),
    ):
        rows.append(goal_row(f"int4 forward, {text}", floor, goal, by_model(int4, m, both)))
    humming = result.get("left_out", {}).get("humming", "not part of this run")
    over = [
        (value, f"{row['shape']} M={row['m']}")
        for row in int4
        for value in [speed(row, "humming")]
        if value is not None
    ]
    rows.append(goal_row("int4 forward over Humming", 0.85, 1.0, over, missing=humming))
    for text, m, floor, goal in (
        ("M = 512", at(512), 0.65, 0.90),
        ("M = 1024", at(1024), 0.80, 0.90),
        ("M >= 2048", lambda m: m >= 2048, 0.88, 0.90),
    ):
        rows.append(goal_row(f"int4 dx, {text}", floor, goal, by_model(dx, m, both)))
    for block, floor, goal in ((128, 0.70, 0.90), (64, 0.60, 0.75), (32, 0.35, 0.50)):
        found = [
            (row["per_flop"], f"{row['density']:.0%} M={row['m']}")
            for row in blocks
            if row["block"] == block and row["m"] > 64
        ]
        rows.append(goal_row(f"block-sparse per FLOP, block {block}", floor, goal, found))
    decode = _cases(blocks, lambda row: row["m"] == 1)
    rows.append(goal_row("block-sparse decode, 10 % dense", 2.0, 2.5, decode))
    for text, inside, floor, goal in (
        ("d <= 5 %", lambda d: d <= 0.05, 5.0, 8.0),
        ("25 %", lambda d: d > 0.05, 2.5, 3.3),
    ):
        found = _cases(wgrad, lambda row, inside=inside: inside(row["density"]))
        rows.append(goal_row(f"block_weight_grad, {text}, over dense dW", floor, goal, found))
    rows += _adapter_and_adamw(result)
    return rows


def _cases(rows: Iterable[Row], keep: Callable[[Row], bool]) -> list[Measured]:
    return [
        (value, f"block {row['block']}, {row['density']:.1%}, M={row['m']}")
        for row in rows
        if keep(row)
        for value in [speed(row)]
        if value is not None
    ]


def _adapter_and_adamw(result: dict[str, Any]) -> list[dict[str, Any]]:
    more = [
        (seconds(row, "blocks") / seconds(row, "base") - 1, f"M={row['m']}")
        for row in result["parts"].get("adapter", [])
        if row["m"] == 4096
    ]
    updates = result["parts"].get("adamw", [])
    copy = result["ceilings"]["copy_bytes_per_s"]
    share = [(row["bytes_per_s"] / copy, f"{row['parameters'] / 1e6:.0f} M") for row in updates]
    step = []
    for row in updates:
        base, own = seconds(row, "torch fused"), seconds(row, OURS)
        if base is not None and own is not None:
            # Fused AdamW is timed on fewer parameters than the packed blocks lie in; its time is
            # proportional to them.
            whole = base * row["of_parameters"] / row["dense_parameters"]
            step.append((whole / own, f"{row['parameters'] / row['of_parameters']:.1%} trained"))
    return [
        goal_row("adapter (2 %) on the base, M = 4096: more time", 0.15, 0.05, more, "%", True),
        goal_row("packed AdamW, share of copy bandwidth", 0.80, 0.90, share, "%"),
        goal_row("packed AdamW, 1 %, over fused dense", 20.0, 40.0, step),
    ]
