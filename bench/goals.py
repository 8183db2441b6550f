"""Rows of a table of goals: floor, goal, what a run measured, verdict. For every benchmark."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import table

Measured = tuple[float, str]  # the figure, and which case it is from


def goal_row(
    text: str,
    floor: float,
    goal: float,
    values: Iterable[Measured],
    unit: str = "x",
    lower: bool = False,
    missing: str = "not part of this run",
) -> dict[str, Any]:
    """lower: smaller figures are better."""
    row: dict[str, Any] = {"row": text, "floor": floor, "goal": goal, "unit": unit}
    found = list(values)
    if not found:
        return {**row, "measured": None, "verdict": "not measured", "detail": missing}
    worst, best = (max, min) if lower else (min, max)
    value, where = worst(found)
    detail = f"worst: {where}"
    if len(found) > 1:
        top, there = best(found)
        detail += f"; best: {figure(top, unit)} at {there}"

    def reached(limit: float) -> bool:
        return value <= limit if lower else value >= limit

    verdict = "goal met" if reached(goal) else "floor met" if reached(floor) else "missed"
    return {**row, "measured": value, "verdict": verdict, "detail": detail}


def figure(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value * 100:.0f} %"
    if unit == "drift":
        return f"{value * 100:+.2f} %"
    return f"{value:+.1f} us" if unit == "us" else f"{value:.2f}x"


def render(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    cells = [
        (
            r["row"],
            figure(r["floor"], r["unit"]),
            figure(r["goal"], r["unit"]),
            figure(r["measured"], r["unit"]) if r["measured"] is not None else "-",
            r["verdict"],
            r["detail"],
        )
        for r in rows
    ]
    return table.render(
        ("goal", "floor", "goal", "measured", "verdict", "case"), cells, left=(0, -2, -1)
    )
