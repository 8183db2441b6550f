"""Tables, goals and chart of the fine-tuning cells. Losing cells are shown like the others."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Callable, Optional

from . import goals, table
from .finetune_beds import BEDS, Bed
from .finetune_cells import (
    INT4_MUON,
    OURS_EVEN,
    OURS_FEW,
    OURS_MANY,
    OURS_MUON,
    PLANTED,
    RANDOM_MANY,
    RANDOM_MUON,
    RIVALS,
    VARIANTS,
    Cells,
)
from .goals import goal_row

EVEN_PLAIN = OURS_EVEN.removesuffix(", cache")
LOSS_TARGET = 1.01  # development loss at most 1 % above full fine-tuning's best
ACCURACY_TARGET = 0.99  # or 99 % of its accuracy


def best_value(bed: Bed, result: dict[str, Any]) -> float:
    """The best held-out loss, or accuracy, of a run."""
    pick = min if bed.figure == "loss" else max
    return pick(e[bed.figure] for e in result["evaluations"])


def seconds_to(bed: Bed, result: dict[str, Any], target: float) -> Optional[float]:
    """Selection and training until an evaluation reached the target; None where none did."""
    for e in result["evaluations"]:
        if e["loss"] <= target if bed.figure == "loss" else e["accuracy"] >= target:
            return result["seconds"]["select"] + e["seconds"]
    return None


def target_of(bed: Bed, full: dict[str, Any]) -> float:
    factor = LOSS_TARGET if bed.figure == "loss" else ACCURACY_TARGET
    return factor * best_value(bed, full)


def bed_rows(cells: Cells, bed: Bed) -> list[dict[str, Any]]:
    """One row for each variant that has run: figures of its best learning rate, over seeds.

    Ratios are to full fine-tuning of the same seed, medians over the seeds that both have, and so
    is the mean of what the best figure is over full's. A time ratio is None where any seed did not
    reach the target, and `reached` counts those that did.
    """
    full = _by_seed(cells, bed, "full")
    rows = []
    for name, variant in VARIANTS.items():
        mine = _by_seed(cells, bed, name)
        failed = [r for r in cells.of(bed.name, name) if "error" in r["result"]]
        if not mine:
            if failed:
                rows.append({"variant": name, "error": failed[0]["result"]["error"]})
            continue
        pairs = [(mine[s], full[s]) for s in mine if s in full]
        times = [(seconds_to(bed, a, target_of(bed, f)), own_time(bed, f)) for a, f in pairs]
        reached = [(a, b) for a, b in times if a is not None]
        values = [best_value(bed, r) for r in mine.values()]
        first = next(iter(mine.values()))
        rows.append(
            {
                "variant": name,
                "experiments": variant.experiments,
                "lr": first["settings"]["lr"],
                "swept": len({row["cell"]["lr"] for row in cells.of(bed.name, name)}),
                "seeds": len(values),
                "best": statistics.mean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else None,
                "best_seeds": values,
                "paired": len(pairs),
                "over_full": _mean(best_value(bed, a) - best_value(bed, f) for a, f in pairs),
                "reached": len(reached),
                "time": _median(a / b for a, b in reached) if len(reached) == len(times) else None,
                "cost": _cost(reached, pairs) if len(reached) == len(times) else None,
                "step": _median(step_seconds(a) / step_seconds(f) for a, f in pairs),
                "state": _median(a["state_bytes"] / f["state_bytes"] for a, f in pairs),
                "peak": _median(a["peak_bytes"] / f["peak_bytes"] for a, f in pairs),
                "file": _median(a["file_bytes"] / (4 * a["weights"]) for a in mine.values()),
                "trained": first["trained"] / first["weights"],
                "select_share": _median(
                    r["seconds"]["select"] / max(1e-9, r["seconds"]["total"]) for r in mine.values()
                ),
                "failed": len(failed),
            }
        )
    return rows


def _by_seed(cells: Cells, bed: Bed, variant: str) -> dict[int, dict[str, Any]]:
    """seed -> result at the variant's best learning rate (the first seed's, once swept)."""
    best = cells.best_rate(bed.name, variant)
    found = {}
    for row in cells.of(bed.name, variant):
        if row["cell"]["lr"] == best and "error" not in row["result"]:
            found[row["cell"]["seed"]] = row["result"]
    return dict(sorted(found.items()))


def own_time(bed: Bed, full: dict[str, Any]) -> float:
    """What full fine-tuning itself needed to its target."""
    found = seconds_to(bed, full, target_of(bed, full))
    return max(1e-9, found if found is not None else full["seconds"]["total"])


def step_seconds(result: dict[str, Any]) -> float:
    """The mean of a run's steps."""
    return result["seconds"]["train"] / max(1, result["steps"])


def _cost(reached, pairs) -> Optional[float]:
    """CPU-seconds to the target times peak memory, as a share of full fine-tuning's."""
    return _median(
        a / b * mine["peak_bytes"] / full["peak_bytes"]
        for (a, b), (mine, full) in zip(reached, pairs)
    )


def _mean(values) -> Optional[float]:
    values = list(values)
    return statistics.mean(values) if values else None


def _median(values) -> Optional[float]:
    values = list(values)
    return statistics.median(values) if values else None


def planted_rows(cells: Cells) -> list[dict[str, Any]]:
    rows = []
    for name in PLANTED:
        found = [
            r["result"]["recall"] for r in cells.of("planted", name) if "recall" in r["result"]
        ]
        if found:
            rows.append({"variant": name, "recall": found, "median": statistics.median(found)})
    return rows


def wins(cells: Cells, bed: Bed, over: str) -> list[tuple[float, str]]:
    """Seeds in which blocks by impact were better than others at the same count, as a share."""
    ours, theirs = _by_seed(cells, bed, RIVALS[over]), _by_seed(cells, bed, over)
    both = [seed for seed in ours if seed in theirs]
    if not both:
        return []
    sign = 1 if bed.figure == "loss" else -1
    won = sum(sign * best_value(bed, ours[s]) < sign * best_value(bed, theirs[s]) for s in both)
    return [(won / len(both), f"{bed.name}, {won} of {len(both)} seeds")]


def equal_rates(cells: Cells, bed: Bed, over: str) -> list[dict[str, Any]]:
    """The same at every learning rate that both ran with: what does not hang on how it is tuned."""
    sign = 1 if bed.figure == "loss" else -1
    results = [
        {
            (row["cell"]["lr"], row["cell"]["seed"]): sign * best_value(bed, row["result"])
            for row in cells.of(bed.name, variant)
            if "error" not in row["result"]
        }
        for variant in (RIVALS[over], over)
    ]
    found: dict[float, list[bool]] = {}
    for lr, seed in sorted(results[0].keys() & results[1].keys()):
        found.setdefault(lr, []).append(results[0][lr, seed] < results[1][lr, seed])
    return [{"lr": lr, "won": sum(won), "seeds": len(won)} for lr, won in found.items()]


# --- goals ----------------------------------------------------------------------------------------


def goal_rows(cells: Cells, steps: Optional[dict[str, Any]]) -> list[dict[str, Any]]:
    """This project's fine-tuning goals against what has been measured."""
    rows = {bed.name: {r["variant"]: r for r in bed_rows(cells, bed)} for bed in BEDS.values()}

    def of(variant: str, key: str) -> list[tuple[float, str]]:
        found = []
        for bed, by_name in rows.items():
            value = by_name.get(variant, {}).get(key)
            if value is not None:
                found.append((value, bed))
        return found

    def few(key: str) -> list[tuple[float, str]]:
        return of(OURS_EVEN, key) + of(OURS_FEW, key)

    def time_row(text: str, floor: float, variant: str) -> dict[str, Any]:
        """A seed that did not get there is a miss, whatever the others took."""
        row = goal_row(text, floor, 0.30, of(variant, "time"), lower=True)
        short = [
            f"{bed}: reached in {r['reached']} of {r['paired']} seeds"
            for bed, by_name in rows.items()
            for r in [by_name.get(variant, {})]
            if r.get("seeds") and r["time"] is None
        ]
        if short:
            row.update(verdict="missed", detail="; ".join(short))
        return row

    out = [
        time_row("time to full's quality, 2 % even, no cache", 0.45, EVEN_PLAIN),
        time_row("time to full's quality, 2 % even, cache", 0.30, OURS_EVEN),
        time_row("time to full's quality, 8 % by impact, all layers", 0.45, OURS_MANY),
        time_row("time to full's quality, 8 % at random, all layers", 0.45, RANDOM_MANY),
        time_row("time to full's quality, 8 % by impact, Muon", 0.45, OURS_MUON),
        time_row("time to full's quality, 8 % at random, Muon", 0.45, RANDOM_MUON),
        time_row("time to full's quality, 8 % at random, Muon, int4 base in int8", 0.45, INT4_MUON),
        goal_row("training state vs full, 8 %, Muon", 0.10, 0.05, of(OURS_MUON, "state"),
                 lower=True),
        goal_row("training state vs full, 8 %", 0.10, 0.05, of(OURS_MANY, "state"), lower=True),
        goal_row("training state vs full, 2 %", 0.10, 0.05, few("state"), lower=True),
        goal_row("adapter file vs model, 2 %", 1 / 40, 1 / 40, few("file"), lower=True),
        goal_row("scoring: share of the run", 0.03, 0.03, of(OURS_MANY, "select_share"), "%",
                 lower=True),
    ]  # fmt: skip
    for over in RIVALS:
        for bed in BEDS.values():
            text = f"our blocks better than {over}, {bed.name}"
            out.append(goal_row(text, 0.8, 0.8, wins(cells, bed, over), "%"))
    recall = {r["variant"]: r["median"] for r in planted_rows(cells)}
    found = [(recall[n], n) for n in recall if n.startswith("impact")]
    out.append(goal_row("planted blocks found", 0.95, 0.95, found, "%"))
    if steps:
        ratios = steps["ratios"]
        for text, floor, goal, key in (
            ("step, T=512, vs full", 0.70, 0.65, "full"),
            ("step, T=512, vs LoRA r8", 1.0, 0.95, "lora"),
            ("step, T=512, vs SHiRA", 0.65, 0.55, "shira"),
            ("step, T=512, vs full in plain transformers", 0.70, 0.65, "full, plain"),
            ("step, T=512, vs LoRA r8 (peft) in plain transformers", 1.0, 0.95, "lora, plain"),
            ("step, T=512, vs SHiRA (peft) in plain transformers", 0.65, 0.55, "shira, plain"),
        ):
            measured = [(ratios[key], "masked")] if key in ratios else []
            out.append(goal_row(text, floor, goal, measured, lower=True))
        peak = steps["peak_ratio"]
        out.append(
            goal_row("peak memory, int4 base, vs full", 0.40, 0.30,
                     [(peak, "adapter int4")] if peak else [], lower=True)
        )  # fmt: skip
    return out


# --- printing -------------------------------------------------------------------------------------


def show(cells: Cells, steps: Optional[dict[str, Any]] = None) -> str:
    parts = []
    for bed in BEDS.values():
        rows = bed_rows(cells, bed)
        if rows:
            parts += [f"\n{bed.title}\n", _bed_table(bed, rows)]
        for over in RIVALS:
            lines = [(f"{r['lr']:g}", r["won"], r["seeds"]) for r in equal_rates(cells, bed, over)]
            if lines:
                parts += [f"\nOurs better than {over}, at equal rates\n"]
                parts += [table.render(("lr", "seeds won", "of"), lines)]
    planted = planted_rows(cells)
    if planted:
        lines = [(r["variant"], f"{r['median']:.2f}", len(r["recall"])) for r in planted]
        parts += ["\nPlanted blocks\n", table.render(("blocks", "found", "seeds"), lines)]
    if steps:
        parts += ["\nOne step, 512 tokens\n", steps_table(steps)]
    parts += ["\nGoals\n", goals.render(goal_rows(cells, steps))]
    return "\n".join(parts)


def _bed_table(bed: Bed, rows: list[dict[str, Any]]) -> str:
    def cell(value: Optional[float], form: Callable[[float], str]) -> str:
        return "-" if value is None else form(value)

    lines = []
    for r in rows:
        if "error" in r:
            lines.append((r["variant"], f"failed: {r['error'][:60]}", *[""] * 11))
            continue
        time = cell(r["time"], table.times)
        if r["time"] is None:
            time = f"reached {r['reached']}/{r['paired']}"
        spread = "" if r["spread"] is None else f" +-{r['spread']:.3f}"
        lines.append(
            (
                r["variant"],
                f"{r['best']:.4f}{spread}",
                cell(r["over_full"], lambda v: f"{v:+.4f}"),
                f"{r['lr']:g}",
                r["seeds"],
                time,
                cell(r["cost"], table.times),
                cell(r["step"], table.times),
                cell(r["state"], lambda v: f"{v:.3f}x"),
                cell(r["peak"], table.times),
                cell(r["file"], lambda v: f"1/{1 / v:.0f}"),
                f"{r['trained']:.1%}",
                f"{r['select_share']:.1%}",
            )
        )
    header = (
        "variant", f"best {bed.figure}", "over full", "lr", "seeds", "time to target", "cost",
        "step", "state", "peak", "file", "trained", "selecting",
    )  # fmt: skip
    return table.render(header, lines)


def steps_table(steps: dict[str, Any]) -> str:
    lines = []
    for name, row in steps["methods"].items():
        phases = row["phases"]
        lines.append(
            (
                name,
                f"{row['median_s']:.3f}",
                *(f"{phases[p]:.3f}" for p in ("forward", "backward", "optimizer")),
                f"{row['state_bytes'] / 1e6:.1f}",
                f"{row['peak_bytes'] / 1e6:.0f}" if row.get("peak_bytes") else "-",
            )
        )
    header = ("method", "step s", "forward", "backward", "optimizer", "state MB", "peak MB")
    return table.render(header, lines)


def figures(cells: Cells, steps: Optional[dict[str, Any]] = None) -> dict[str, Any]:
    """Everything the tables show, for JSON."""
    return {
        "benchmark": "finetune",
        "seeds": {bed.name: list(bed.seeds) for bed in BEDS.values()},
        "cells": len(cells.done),
        "beds": {bed.name: bed_rows(cells, bed) for bed in BEDS.values()},
        "equal_rates": {
            bed.name: {over: equal_rates(cells, bed, over) for over in RIVALS}
            for bed in BEDS.values()
        },
        "planted": planted_rows(cells),
        "steps": steps,
        "goals": goal_rows(cells, steps),
    }


def chart(cells: Cells, path: Path) -> None:
    """Held-out figure over seconds, first seed, best learning rate: a panel for each bed.

    Raises:
        ImportError: matplotlib is not installed. ValueError: no cell of a bed has run.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise ImportError("the chart needs matplotlib: pip install 'nibblock[bench]'") from e
    beds = [bed for bed in BEDS.values() if any(_by_seed(cells, bed, v) for v in VARIANTS)]
    if not beds:
        raise ValueError("plot: the cells must hold at least one whole sweep, got none")
    figure, axes = plt.subplots(
        1, len(beds), figsize=(7.5 * len(beds), 5.2), constrained_layout=True, squeeze=False
    )
    for axis, bed in zip(axes[0], beds):
        for name in VARIANTS:
            found = _by_seed(cells, bed, name)
            if not found:
                continue
            result = next(iter(found.values()))
            xs = [result["seconds"]["select"] + e["seconds"] for e in result["evaluations"]]
            ys = [e[bed.figure] for e in result["evaluations"]]
            ours = name.startswith("ours")
            axis.plot(xs, ys, "-" if ours else "--", linewidth=2.2 if ours else 1.2, label=name)
        full = _by_seed(cells, bed, "full")
        if full:
            axis.axhline(target_of(bed, next(iter(full.values()))), color="black", linewidth=0.8)
        axis.set_xlabel("seconds, selection included")
        axis.set_ylabel(f"held-out {bed.figure}")
        axis.set_title(bed.title, fontsize=10)
        axis.grid(True, alpha=0.25)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
