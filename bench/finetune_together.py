"""Cells of one seed side by side: a step of each in turn.

A cell is minutes, and a shared machine may be half as fast in the next ones, for some methods more
than for others: what is a ratio of two cells should come from the same minutes. The children of a
seed wait for each other after every step; whatever one does between its steps is in its own turn,
so nothing else runs beside it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Optional

from . import finetune_report as report
from . import table
from .finetune_beds import Bed
from .finetune_cells import Cell, Cells, row_of, start
from .table import times


def run_together(cells: Sequence[Cell], threads: int = 0) -> list[dict[str, Any]]:
    """Runs cells to their ends, a step of each in turn.

    Returns:
        their rows, as of `finetune_cells.run`, each with "together": the keys of all of them.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        runs = []
        for cell in cells:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nibblock-cell-")))
            (go, begin), (ended, done) = os.pipe(), os.pipe()
            process = start(cell, threads, folder, (go, done))
            for end in (go, done):
                os.close(end)  # the child's: ours must not keep the pipes open
            for end in (begin, ended):
                stack.callback(os.close, end)
            stack.callback(_stop, process)
            runs.append((cell, process, folder, begin, ended))
        live = list(runs)
        while live:
            live = [run for run in live if _turn(*run[3:])]
        for _, process, *_ in runs:
            process.wait()
        rows = [row_of(cell, process, folder, began) for cell, process, folder, *_ in runs]
    for row in rows:
        row["together"] = [cell.key for cell in cells]
    return rows


def _turn(begin: int, ended: int) -> bool:
    """Gives a child its turn and waits for its end; False where the child has ended."""
    try:
        os.write(begin, b".")
    except BrokenPipeError:
        return False
    return bool(os.read(ended, 1))


def _stop(process) -> None:
    if process.poll() is None:  # the bench was interrupted
        process.terminate()
        process.wait()


def due_together(
    cells: Cells, like: Cells, bed: Bed, variants: Sequence[str], seeds: Sequence[int]
) -> list[list[Cell]]:
    """The sets of cells that have not run together yet, one for each seed, at the best rates of
    `like`.

    Raises:
        ValueError: a variant whose sweep is not whole in `like`.
    """
    rates = {variant: like.best_rate(bed.name, variant) for variant in variants}
    for variant, rate in rates.items():
        if rate is None:
            raise ValueError(
                f"bench: like must hold the whole sweep of {variant!r} on {bed.name}, got "
                f"{len(like.of(bed.name, variant))} of its cells"
            )
    found = []
    for seed in seeds:
        those = [Cell(bed.name, variant, rates[variant], seed) for variant in variants]
        keys = [cell.key for cell in those]
        if any(cells.done.get(key, {}).get("together") != keys for key in keys):
            found.append(those)
    return found


def pair_rows(cells: Cells, bed: Bed, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Each variant against the first of them, seed by seed, where they ran together.

    Returns:
        {"variant", "seed", "best", "of_first": the first one's best, "time": to the first one's
        quality, as a share of what that needed for it (None: not reached), "whole": as a share of
        all its time, "step", "state", "peak"}.
    """
    rows = []
    for variant in variants[1:]:
        for mine in cells.of(bed.name, variant):
            names = mine.get("together", ())
            first = next((cells.done[k] for k in names if f"/{variants[0]}/" in k), None)
            if first is None or "error" in first["result"] or "error" in mine["result"]:
                continue
            a, f = mine["result"], first["result"]
            needed = report.seconds_to(bed, a, report.target_of(bed, f))
            rows.append(
                {
                    "variant": variant,
                    "seed": mine["cell"]["seed"],
                    "best": report.best_value(bed, a),
                    "of_first": report.best_value(bed, f),
                    "time": None if needed is None else needed / report.own_time(bed, f),
                    "whole": None if needed is None else needed / f["seconds"]["total"],
                    "step": report.step_seconds(a) / report.step_seconds(f),
                    "state": a["state_bytes"] / f["state_bytes"],
                    "peak": a["peak_bytes"] / f["peak_bytes"],
                }
            )
    return sorted(rows, key=lambda row: (variants.index(row["variant"]), row["seed"]))


def show(cells: Cells, bed: Bed, variants: Sequence[str]) -> str:
    def of(value: Optional[float]) -> str:
        return "not reached" if value is None else times(value)

    lines = [
        (
            row["variant"],
            row["seed"],
            f"{row['of_first']:.4f}",
            f"{row['best']:.4f}",
            *(of(row[key]) for key in ("time", "whole", "step")),
            f"{row['state']:.3f}x",
            times(row["peak"]),
        )
        for row in pair_rows(cells, bed, variants)
    ]
    header = (
        "variant", "seed", f"{variants[0]}'s best {bed.figure}", "its own", "time to target",
        "of the whole", "step", "state", "peak",
    )  # fmt: skip
    return table.render(header, lines)
