"""Runs the int4_linear suite, prints its tables, and writes JSON and chart."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch

from . import goals, table
from . import int4_goals as G
from . import int4_suite as S
from .machine import Ceilings, OtherLoad, environment, native, peak_unit
from .shapes import LLAMA_8B, ROWS, ROWS_QUICK, select

QUIET = 0.05  # share of the CPUs that other processes may take


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="nibblock bench int4_linear",
        description="int4_linear beside dense torch and other int4 libraries, with ceilings.",
    )
    p.add_argument("--quick", action="store_true", help="one shape, four M, about two minutes")
    p.add_argument(
        "--threads", type=int, default=0, help="threads of every provider (default: torch's)"
    )
    p.add_argument(
        "--shapes", nargs="+", metavar="S", help="NxK or llama-8b, smollm2-135m, minilm-l6"
    )
    p.add_argument("--m", nargs="+", type=int, metavar="M", help="rows of x")
    p.add_argument("--budget", type=float, default=0, help="seconds a comparison may take")
    p.add_argument("--no-levels", action="store_true", help="leave out the forced ISA levels")
    p.add_argument("--json", metavar="FILE", help="where the JSON goes (default: bench/results/)")
    p.add_argument("--plot", metavar="FILE", help="where the chart goes (default: beside the JSON)")
    return p


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    rows = options.m or (ROWS_QUICK if options.quick else ROWS)
    if min(rows) < 1:
        raise SystemExit(f"bench: m must be at least 1, got {min(rows)}")
    if options.threads < 0:
        raise SystemExit(f"bench: threads must be positive, got {options.threads}")
    try:
        shapes = select(options.shapes, options.quick)
    except ValueError as e:
        raise SystemExit(str(e)) from e
    if options.threads:
        torch.set_num_threads(options.threads)
    target = output(options.json, "int4_linear")
    if options.plot:
        output(options.plot, "")
    result = run(shapes, rows, options)
    show(result)
    write(result, target, options.plot)
    return 0


def run(shapes, rows, options: argparse.Namespace) -> dict[str, Any]:
    import nibblock  # noqa: F401  (loads the op library)

    began, load = time.monotonic(), OtherLoad()
    budget = options.budget or (3.0 if options.quick else 8.0)
    threads = torch.get_num_threads()
    ceilings = Ceilings(threads)
    print("ceilings, before", flush=True)
    result: dict[str, Any] = {
        "benchmark": "int4_linear",
        "quick": bool(options.quick),
        "environment": environment(),
        "units": {c: peak_unit(c) for c in ("bf16", "int8")},
        "ceilings": {"before": ceilings.all()},
        "cases": [],
    }
    warm = (*S.OURS, *S.DENSE, *S.PEERS, *S.PEERS_WARM)
    cold = (*S.OURS, *S.DENSE, *S.PEERS)
    if options.quick:
        warm = tuple(n for n in warm if n not in ("dense fp32 eager", "dense fp32 MKL"))
        cold = tuple(n for n in cold if n not in ("dense fp32 eager", "dense fp32 MKL"))
    with torch.no_grad():
        for shape in shapes:
            group, problems = S.group_of(shape), {}
            big = shape.out_features * shape.in_features / 2 >= S.COLD_MIN_BYTES
            for m in rows:
                for is_cold in (True, False) if big and m <= S.COLD_ROWS else (False,):
                    print(
                        f"{shape.model} {shape.key} M={m} {'cold' if is_cold else 'warm'}",
                        flush=True,
                    )
                    case = S.run_case(
                        shape,
                        m,
                        cold if is_cold else warm,
                        ceilings,
                        group=group,
                        cold=is_cold,
                        budget=budget,
                        problems=problems,
                    )
                    result["cases"].append(case)
            if shape == LLAMA_8B[0]:
                for m in (m for m in rows if m >= 256):
                    print(f"{shape.model} {shape.key} M={m} warm, groups of 32", flush=True)
                    names = (
                        *S.OURS,
                        "nibblock int8 x32",
                        *G.DENSE_BF16,
                        "torch int4",
                        "ORT level 4",
                    )
                    result["cases"].append(
                        S.run_case(shape, m, names, ceilings, group=32, budget=budget)
                    )
        print("dx, overhead", flush=True)
        result["dx"] = [S.run_dx(LLAMA_8B[0], 512, ceilings, budget)]
        result["overhead"] = S.run_overhead()
    if not options.no_levels:
        result["levels"] = S.run_levels(threads, budget, lambda t: print(t, flush=True))
    print("ceilings, after", flush=True)
    result["ceilings"]["after"] = ceilings.all()
    result["goals"] = G.goals(result)
    result["losses"] = G.losses(result["cases"])
    result["other_load"] = round(load.share(), 3)
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


# --- printing
# ---------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    env = result["environment"]
    print(f"\n{env['cpu']}, {env['isa']}, {env['threads']} threads, torch {env['torch']}")
    print("\nCeilings (median of 5, before -> after; GB/s, GFLOP/s or GOP/s)\n")
    print(_ceilings(result["ceilings"]))
    for key in dict.fromkeys(
        (c["model"], c["layer"], c["shape"], c["group"]) for c in result["cases"]
    ):
        cases = [
            c for c in result["cases"] if (c["model"], c["layer"], c["shape"], c["group"]) == key
        ]
        print(f"\n{key[0]} {key[1]}: {key[2]}, groups of {key[3]}; median time of a call\n")
        print(_cases(cases, result["units"]))
        reasons = {n: r for c in cases for n, r in c["unavailable"].items()}
        for name, reason in reasons.items():
            print(f"  without {name}: {reason}")
    dx = [
        f"{d['shape']} M={d['m']}: {G.vs_dense(d):.2f}x {G.better_dense(d)}" for d in result["dx"]
    ]
    print(f"\ndx: {'; '.join(dx)}")
    for label in ("fp32", "bf16"):
        over = result["overhead"][label]["over"]
        text = ", ".join(f"{n} {v:+.2f} us" for n, v in over.items())
        print(f"overhead over torch, 64x64, M = 1, {label} x: {text}")
    print("\nWhere we lose (a baseline faster than compute='bf16', same rounds)\n")
    print(_losses(result["losses"]))
    print("\nGoals\n")
    print(goals.render(result["goals"]))
    print(f"\n{closing(result)}")


def closing(result: dict[str, Any]) -> str:
    """The last line: how long it took, and whether the machine was quiet enough to believe it."""
    other = result["other_load"]
    text = f"{result['seconds']:.0f} s; other processes took {table.percent(other)} of the CPUs"
    return text + ("" if other < QUIET else ": too busy a machine, repeat this run on a quiet one")


def _ceilings(both: dict[str, Any]) -> str:
    rows = []
    for name, before in both["before"].items():
        for threads in sorted(k for k in before if k != "unit"):
            b, a = before[threads], both["after"][name][threads]
            text = f"{b['median']:.1f} -> {a['median']:.1f}" if b and a else "not on this CPU"
            rows.append((name, threads, text, before["unit"]))
    return table.render(("ceiling", "threads", "measured", "unit"), rows)


_COLUMNS = (
    ("bf16", G.OURS),
    ("int8", G.INT8),
    ("dense fp32", "dense fp32"),
    ("dense bf16", "dense bf16"),
    ("torch int4", "torch int4"),
    ("ORT 0", "ORT level 0"),
    ("ORT 4", "ORT level 4"),
    ("bnb NF4", "bitsandbytes NF4"),
)


def _cases(cases: list[dict[str, Any]], units: dict[str, Any]) -> str:
    header = [
        "M",
        "weights",
        *(c for c, _ in _COLUMNS),
        "vs dense",
        "vs torch int4",
        "of ceiling",
        "err",
    ]
    rows = []
    for c in cases:
        found = c["providers"]
        row: list[str] = [str(c["m"]), c["weights"]]
        for _, name in _COLUMNS:
            times = [
                e["median_s"] for n, e in found.items() if n == name or n.startswith(f"{name} ")
            ]
            row.append(table.seconds(min(times)) if times else "-")
        for value in (G.vs_dense(c), G.ratio(c, G.OURS, "torch int4")):
            row.append(table.times(value) if value is not None else "-")
        share = G.roofline(c, G.OURS, units["bf16"])
        row.append(table.percent(share) if share is not None else "-")
        row.append(f"{found[G.OURS]['error']:.1e}")
        rows.append(row)
    return table.render(header, rows, left=(0, 1))


def _losses(found: list[dict[str, Any]]) -> str:
    if not found:
        return "nowhere in this run"
    shown = [(r["model"], r["case"], r["baseline"], table.times(r["speedup"])) for r in found]
    text = table.render(("model", "case", "baseline", "our speed"), shown[:30], left=(0, 1, 2))
    return text + (f"\n... and {len(shown) - 30} more in the JSON" if len(shown) > 30 else "")


# --- files
# ------------------------------------------------------------------------------------------


def output(asked: str | None, stem: str) -> Path:
    """Where a result goes: the file asked for, else bench/results/ of the checkout one stands in,
    else the current folder. Stops before anything is measured if it cannot go there."""
    if asked:
        if not Path(asked).parent.is_dir():
            raise SystemExit(f"bench: output must be in a folder that exists, got {asked!r}")
        return Path(asked)
    folder = Path("bench/results")
    return (folder if folder.is_dir() else Path(".")) / f"{stem}-{native().cpu_isa()}.json"


def save(result: dict[str, Any], target: Path) -> None:
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {target}")


def write(result: dict[str, Any], target: Path, plot_to: str | None) -> None:
    save(result, target)
    picture = Path(plot_to) if plot_to else target.with_suffix(".png")
    if plot_to is None and importlib.util.find_spec("matplotlib") is None:
        print("no chart: matplotlib is not installed (pip install 'nibblock[bench]')")
        return
    from .plot import chart

    chart(result, picture)
    print(f"wrote {picture}")
