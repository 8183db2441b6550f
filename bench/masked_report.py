"""Runs the suite of masked optimiser steps, prints its tables, and writes JSON and chart."""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import torch

from . import goals, table
from . import masked_suite as S
from .int4_report import closing, output, save
from .machine import OtherLoad, environment
from .timing import median

CACHES = ("cold", "resident")
# What the floors of the suite count.
BYTES = {
    "dense": "p, g, m, v read and p, m, v written: 28 bytes an entry",
    "block": "28, and the weight's line written: 32; 36 if the line is read for ownership first",
    "flat": "lines of p read and written, m, v read and written, g and the index read",
    "Muon directions": "g read, d written: 8 bytes an entry; 30 B operations decide, not bytes",
    "mask": "p and g read, p written, the mask read, for all; m, v read and written if active",
    "ceiling_ratio": "28 bytes times all entries over the line's floor_bytes",
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="nibblock bench masked_update",
        description="AdamW on about 20 million entries: dense, blocks, scattered, beside torch's.",
    )
    p.add_argument("--quick", action="store_true", help="one list, fewer lines, under a minute")
    p.add_argument(
        "--threads", type=int, default=0, help="threads of every provider (default: torch's)"
    )
    p.add_argument("--lists", nargs="+", metavar="L", choices=list(S.LISTS), help="which lists")
    p.add_argument("--budget", type=float, default=0, help="seconds a comparison may take")
    p.add_argument("--json", metavar="FILE", help="where the JSON goes (default: bench/results/)")
    p.add_argument("--plot", metavar="FILE", help="where the chart goes (default: beside the JSON)")
    return p


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    if options.threads < 0:
        raise SystemExit(f"bench: threads must be positive, got {options.threads}")
    if options.threads:
        torch.set_num_threads(options.threads)
    target = output(options.json, "masked_update")
    if options.plot:
        output(options.plot, "")
    result = run(options)
    show(result)
    save(result, target)
    picture = Path(options.plot) if options.plot else target.with_suffix(".png")
    if options.plot is None and importlib.util.find_spec("matplotlib") is None:
        print("no chart: matplotlib is not installed (pip install 'nibblock[bench]')")
        return 0
    chart(result, picture)
    print(f"wrote {picture}")
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    import nibblock  # noqa: F401  (loads the op library)

    began, load = time.monotonic(), OtherLoad()
    names = options.lists or (list(S.LISTS)[:1] if options.quick else list(S.LISTS))
    budget = options.budget or (6.0 if options.quick else 15.0)
    threads, evict = torch.get_num_threads(), S.Evict()
    cases = []
    with torch.no_grad():
        for name in names:
            print(f"{name} tensors", flush=True)
            cases.append(S.run_list(name, options.quick, threads, evict, budget))
    result: dict[str, Any] = {
        "benchmark": "masked_update",
        "quick": bool(options.quick),
        "environment": environment(),
        "bytes": BYTES,
        "cases": cases,
        "goals": rows_of(cases),
        "losses": losses(cases),
    }
    result["other_load"] = load.share()
    result["seconds"] = time.monotonic() - began
    return result


# --- figures ------------------------------------------------------------------------------------


def ratio(case: dict[str, Any], name: str, cache: str, baseline: str = S.BASELINE) -> float:
    """Seconds of the baseline over seconds of this line, in the same rounds."""
    slow, fast = (case["lines"][n][cache]["rounds_s"] for n in (baseline, name))
    return median([a / b for a, b in zip(slow, fast)])


def share(case: dict[str, Any], name: str) -> float:
    """Of the update bandwidth of the same rounds, cold: floor bytes over seconds."""
    line, tops = case["lines"][name], case["ceilings"]["update"]["rounds"]
    return median([
        line["floor_bytes"] / t / (c * 1e9) for t, c in zip(line["cold"]["rounds_s"], tops)
    ])  # fmt: skip


_ROWS = (
    ("dense, no mask, vs torch fused", 0.95, 1.05, "nibblock dense"),
    ("dense, mask all true, vs torch fused", 0.95, 1.05, "nibblock dense, mask all true"),
    ("blocks at 10 %, written through, vs torch dense fused", 7.0, 8.5, "nibblock block 10%"),
    ("blocks at 1 %, written through, vs torch dense fused", 60.0, 85.0, "nibblock block 1%"),
    ("MaskedAdamW.step, blocks at 10 %, vs torch dense fused", 7.0, 8.5,
     "nibblock MaskedAdamW block 10%"),
    ("MaskedAdamW.step, blocks at 1 %, vs torch dense fused", 60.0, 85.0,
     "nibblock MaskedAdamW block 1%"),
    ("flat at 1 %, packed gradients, vs torch dense fused", 10.0, 18.0,
     "nibblock flat 1%, packed gradients"),
    ("flat at 1 %, dense gradients, vs torch dense fused", 10.0, 18.0,
     "nibblock flat 1%, dense gradients"),
)  # fmt: skip


def rows_of(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every goal twice: with nothing cached, and with what the step itself left in the caches."""
    return [
        goals.goal_row(
            f"{text}, {cache}", floor, goal, [(ratio(c, name, cache), c["list"]) for c in cases]
        )
        for cache in CACHES
        for text, floor, goal, name in _ROWS
    ]


def losses(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every line that is slower than torch's fused optimiser of its rule, worst first."""
    out = []
    for case in cases:
        for name in case["lines"]:
            baseline = "torch SGD fused" if "SGD" in name else S.BASELINE
            if "Muon" in name:  # 30 B operations an entry: beside the same in torch's products
                baseline = name.replace("nibblock", "torch")
            if not name.startswith("nibblock") or baseline not in case["lines"]:
                continue
            for cache in CACHES:
                speed = ratio(case, name, cache, baseline)
                if speed < 1:
                    out.append({"case": f"{case['list']}, {cache}", "ours": name,
                                "baseline": baseline, "speedup": speed})  # fmt: skip
    return sorted(out, key=lambda r: r["speedup"])


# --- printing -----------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    env = result["environment"]
    print(f"\n{env['cpu']}, {env['isa']}, {env['threads']} threads, torch {env['torch']}")
    for case in result["cases"]:
        top = case["ceilings"]["update"]["median"]
        print(
            f"\n{case['list']}: {case['parameters'] / 1e6:.1f} M entries in {case['tensors']} ",
            end="",
        )
        print(f"tensors; update bandwidth {top:.1f} GB/s\n")
        print(_lines(case))
    print("\nWhere we lose (torch's fused optimiser of the same rule, same rounds)\n")
    found = [(r["case"], r["ours"], r["baseline"], table.times(r["speedup"]))
             for r in result["losses"]]  # fmt: skip
    header = ("case", "ours", "baseline", "our speed")
    print(table.render(header, found, left=(0, 1, 2)) if found else "nowhere in this run")
    print("\nGoals\n")
    print(goals.render(result["goals"]))
    print(f"\n{closing(result)}")


def _lines(case: dict[str, Any]) -> str:
    rows = [
        (name, table.seconds(line["cold"]["median_s"]), table.times(ratio(case, name, "cold")),
         table.times(line["ceiling_ratio"]), table.percent(share(case, name)),
         table.seconds(line["resident"]["median_s"]), table.times(ratio(case, name, "resident")),
         f"{line['error_in_lr']:.1e}")
        for name, line in case["lines"].items()
    ]  # fmt: skip
    header = ("line", "cold", "vs fused", "bytes allow", "of update", "resident", "vs fused",
              "error / lr")  # fmt: skip
    return table.render(header, rows)


def chart(result: dict[str, Any], path: Path) -> None:
    """Draws the speed over torch's fused AdamW to a PNG: a panel a list, cold and resident.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise ImportError("the chart needs matplotlib: pip install 'nibblock[bench]'") from e
    cases = result["cases"]
    size = (6.5 * len(cases), 4.2)
    figure, axes = plt.subplots(1, len(cases), figsize=size, squeeze=False, constrained_layout=True)
    env = result["environment"]
    figure.suptitle(
        f"steps over torch's fused AdamW, on {env['cpu']}, {env['isa']}, {env['threads']} threads, "
        f"torch {env['torch']}",
        fontsize=10,
    )
    for axis, case in zip(axes.flat, cases):
        names = [n for n in case["lines"] if n != S.BASELINE][::-1]
        for i, (cache, colour) in enumerate(zip(CACHES, ("#0072b2", "#d55e00"))):
            at = [y + 0.2 - 0.4 * i for y in range(len(names))]
            axis.barh(at, [ratio(case, n, cache) for n in names], 0.38, color=colour, label=cache)
        tops = [case["lines"][n]["ceiling_ratio"] for n in names]
        axis.plot(tops, range(len(names)), "k|", markersize=16, label="bytes allow")
        axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set_xscale("log")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xlabel("times the speed of torch AdamW fused on all entries")
        axis.set_title(f"{case['list']}, {case['parameters'] / 1e6:.0f} M entries", fontsize=10)
        axis.grid(True, axis="x", alpha=0.25)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
