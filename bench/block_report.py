"""Runs the block-sparse suite, prints its tables, and writes JSON and chart."""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import torch

from . import block_goals as G
from . import block_suite as S
from . import goals, table
from .int4_report import closing, output, save
from .machine import Ceilings, OtherLoad, environment
from .shapes import LLAMA_8B, select

KINDS = ("forward", "dx", "weight_grad")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="nibblock bench block_sparse_linear",
        description="Block-sparse products over density, beside dense and torch's sparse ops.",
    )
    p.add_argument("--quick", action="store_true", help="block 32, two M, about two minutes")
    p.add_argument(
        "--threads", type=int, default=0, help="threads of every provider (default: torch's)"
    )
    p.add_argument("--shapes", nargs="+", metavar="S", help="NxK or a model (default: 4096x4096)")
    p.add_argument("--m", nargs="+", type=int, metavar="M", help="rows of x")
    p.add_argument("--blocks", nargs="+", type=int, metavar="B", choices=S.BLOCKS)
    p.add_argument("--density", nargs="+", type=float, metavar="D", help="in (0, 1)")
    p.add_argument("--budget", type=float, default=0, help="seconds a comparison may take")
    p.add_argument("--json", metavar="FILE", help="where the JSON goes (default: bench/results/)")
    p.add_argument("--plot", metavar="FILE", help="where the chart goes (default: beside the JSON)")
    return p


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    rows = options.m or ((1, 256) if options.quick else S.ROWS)
    densities = options.density or (S.DENSITIES_QUICK if options.quick else S.DENSITIES)
    if min(rows) < 1:
        raise SystemExit(f"bench: m must be at least 1, got {min(rows)}")
    if not 0 < min(densities) <= max(densities) < 1:
        raise SystemExit(f"bench: density must be in (0, 1), got {list(densities)}")
    if options.threads < 0:
        raise SystemExit(f"bench: threads must be positive, got {options.threads}")
    try:
        shapes = select(options.shapes, True) if options.shapes else LLAMA_8B[:1]
    except ValueError as e:
        raise SystemExit(str(e)) from e
    if options.threads:
        torch.set_num_threads(options.threads)
    target = output(options.json, "block_sparse_linear")
    if options.plot:
        output(options.plot, "")
    result = run(shapes, rows, densities, options)
    show(result)
    save(result, target)
    picture = Path(options.plot) if options.plot else target.with_suffix(".png")
    if options.plot is None and importlib.util.find_spec("matplotlib") is None:
        print("no chart: matplotlib is not installed (pip install 'nibblock[bench]')")
        return 0
    from .block_plot import chart

    chart(result, picture)
    print(f"wrote {picture}")
    return 0


def run(shapes, rows, densities, options: argparse.Namespace) -> dict[str, Any]:
    import nibblock  # noqa: F401  (loads the op library)

    began, load = time.monotonic(), OtherLoad()
    budget = options.budget or (4.0 if options.quick else 8.0)
    ceilings = Ceilings(torch.get_num_threads())
    result: dict[str, Any] = {
        "benchmark": "block_sparse_linear",
        "quick": bool(options.quick),
        "environment": environment(),
        "ceilings": {"before": ceilings.all(3)},
        "cases": [],
        "adapter": [],
    }
    blocks = options.blocks or ((32,) if options.quick else S.BLOCKS)
    with torch.no_grad():
        for shape in shapes:
            weights = S.Weights(shape)
            for block in blocks:
                # Other blocks than the usual one: two densities are enough to see their rate.
                some = tuple(densities) if block == 32 else tuple(densities)[-4:-1:2] or densities
                for m in rows:
                    for kind in KINDS:
                        if kind == "weight_grad" and m < 16:
                            continue
                        print(f"{kind} {shape.key} block {block} M={m}", flush=True)
                        result["cases"].append(
                            S.run_case(weights, kind, m, block, some, ceilings, budget)
                        )
            for m in (m for m in rows if m == 1 or m >= 256):
                print(f"int4 base + 2 % adapter {shape.key} M={m}", flush=True)
                result["adapter"].append(S.run_adapter(weights, m, 0.02, ceilings, budget))
    result["ceilings"]["after"] = ceilings.all(3)
    result["break_even"] = [
        {"kind": c["kind"], "shape": c["shape"], "block": c["block"], "m": c["m"], "dtype": label,
         "density": value, "beyond": beyond}
        for c in result["cases"] if len(c["densities"]) > 2
        for label in ("bf16", "fp32")
        for value, beyond in [G.break_even(c, label)]
    ]  # fmt: skip
    result["goals"] = G.goals(result)
    result["losses"] = G.losses(result["cases"])
    result["other_load"] = load.share()
    result["seconds"] = time.monotonic() - began
    return result


# --- printing -----------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    env = result["environment"]
    print(f"\n{env['cpu']}, {env['isa']}, {env['threads']} threads, torch {env['torch']}")
    for case in result["cases"]:
        copy = table.seconds(case["copy"]["median_s"])
        print(f"\n{case['kind']} {case['shape']}, block {case['block']}, M = {case['m']}, ", end="")
        print(f"{case['weights']} weights; copy {copy}\n")
        print(_case(case))
    print("\nint4 base + 2 % adapter: time over the base alone\n")
    print(_adapters(result["adapter"]))
    print(
        "\nBreak-even density: below it, ours is faster than the better dense of the same dtype\n"
    )
    print(_break_even(result["break_even"]))
    print("\nWhere we lose (the better dense product of the same dtype, same rounds)\n")
    found = [(r["case"], r["ours"], r["baseline"], table.times(r["speedup"]))
             for r in result["losses"]]  # fmt: skip
    header = ("case", "ours", "baseline", "our speed")
    print(table.render(header, found[:30], left=(0, 1, 2)) if found else "nowhere in this run")
    if len(found) > 30:
        print(f"... and {len(found) - 30} more in the JSON")
    print("\nGoals\n")
    print(goals.render(result["goals"]))
    print(f"\n{closing(result)}")


def _case(case: dict[str, Any]) -> str:
    rows = []
    for key, entry in case["lines"].items():
        dense = G.best_dense(case, "fp32" if "fp32" in entry["name"] else "bf16")
        peak = G.share_of_peak(case, entry)
        memory = case["weights"] == "cold" and case["m"] == 1
        share = G.share_of_read(case, entry) if memory else peak[0] if peak else None
        rows.append(
            (
                entry["name"],
                f"{entry['density'] * 100:g} %",
                table.seconds(entry["median_s"]),
                table.times(G.ratio(case, dense, key)),
                "-" if share is None else f"{table.percent(share)} {'read' if memory else peak[1]}",
                f"{entry['error']:.1e}",
            )
        )
    return table.render(
        ("provider", "density", "time", "vs dense", "of ceiling", "error"), rows, left=(0,)
    )


def _adapters(cases: list[dict[str, Any]]) -> str:
    rows = [
        (c["shape"], c["m"], c["weights"], table.seconds(c["lines"]["base"]["median_s"]),
         *(table.times(G.ratio(c, name, "base")) for name in c["lines"] if name != "base"))
        for c in cases
    ]  # fmt: skip
    names = [name for name in cases[0]["lines"] if name != "base"] if cases else []
    return table.render(("shape", "M", "weights", "base", *names), rows)


def _break_even(found: list[dict[str, Any]]) -> str:
    rows = [
        (r["kind"], r["shape"], r["block"], r["m"], r["dtype"],
         f"{'> ' if r['beyond'] else ''}{r['density']:.2f}")
        for r in found
    ]  # fmt: skip
    return table.render(("kind", "shape", "block", "M", "dtype", "break-even"), rows, left=(0, 1))
