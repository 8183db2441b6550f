"""`python -m nibblock bench finetune`: full, LoRA, SHiRA and ours on real models, cell by cell."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any, Optional

import torch

from . import finetune_report as report
from .finetune_beds import BEDS
from .finetune_cells import VARIANTS, Cell, Cells, due, run
from .finetune_together import due_together, run_together, show
from .machine import OtherLoad, environment

RESULTS = Path(__file__).resolve().parent / "results"
ALL_BEDS = ("planted", *BEDS)
More = list[tuple[float, int]]  # learning rates and seeds beside the protocol's


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="nibblock bench finetune",
        description="Fine-tuning: time to full's quality, memory, files, and which blocks.",
    )
    p.add_argument("--minutes", type=float, default=0, help="start no cell after these (no limit)")
    p.add_argument("--beds", nargs="+", choices=ALL_BEDS, default=list(ALL_BEDS))
    names = "; ".join(VARIANTS).replace("%", "%%")  # argparse formats its help
    p.add_argument("--variants", nargs="+", metavar="V", help=f"of: {names}")
    p.add_argument("--rates", nargs="+", type=float, default=(), help="run these too, with --seeds")
    p.add_argument(
        "--seeds", nargs="+", type=int, default=(0, 1, 2, 3, 4), help="of --rates and --together"
    )
    p.add_argument(
        "--together", metavar="FILE", help="the cells of a seed a step each in turn, at the best "
        "rates of the cells in FILE: ratios to the first of --variants from the same minutes",
    )  # fmt: skip
    p.add_argument("--steps", action="store_true", help="time single steps, and no cells")
    p.add_argument("--rounds", type=int, default=5, help="of --steps")
    p.add_argument("--table", action="store_true", help="run nothing: tables, JSON and chart")
    p.add_argument("--list", action="store_true", help="run nothing: the cells that are due")
    p.add_argument("--retry", action="store_true", help="run failed cells again")
    p.add_argument("--threads", type=int, default=0, help="threads (default: torch's)")
    p.add_argument(
        "--cells", metavar="FILE", help="the finished cells (bench/results/finetune-cells.jsonl)"
    )
    p.add_argument("--json", metavar="FILE", help="where the summary goes (beside the cells)")
    return p


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    variants = options.variants or list(VARIANTS)
    for name in variants:
        if name not in VARIANTS:
            raise SystemExit(f"bench: variants must be of {'; '.join(VARIANTS)}, got {name!r}")
    for name in ("minutes", "threads"):
        if getattr(options, name) < 0:
            raise SystemExit(f"bench: {name} must be positive, got {getattr(options, name)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    cells = Cells(Path(options.cells) if options.cells else RESULTS / "finetune-cells.jsonl")
    if options.retry:
        cells.done = {k: r for k, r in cells.done.items() if "error" not in r["result"]}
    summary = Path(options.json) if options.json else cells.path.with_name("finetune.json")
    if options.together:
        return _together(cells, options, variants)
    steps = _steps_of(summary)
    more = list(itertools.product(options.rates, options.seeds))
    if options.list:
        return _list(cells, options.beds, variants, more)
    if options.steps:
        from . import finetune_steps

        load = OtherLoad()
        steps = finetune_steps.run(options.rounds)
        steps["other_load"] = round(load.share(), 3)
        steps["environment"] = environment()
    elif not options.table:
        _run(cells, options, variants, more)
    _write(cells, steps, summary)
    return 0


def _run(cells: Cells, options: argparse.Namespace, variants: list[str], more: More) -> None:
    began = time.monotonic()
    facts = {k: environment()[k] for k in ("cpu", "isa", "torch", "date")}
    for cell in due(cells, options.beds, variants, more):
        spent = (time.monotonic() - began) / 60
        if options.minutes and spent >= options.minutes:
            print(f"stopped after {spent:.0f} minutes; the same command goes on")
            return
        print(f"[{spent:5.1f} min] {cell.key}", flush=True)
        load = OtherLoad()
        row = run(cell, options.threads)
        row.update(environment=facts, other_load=round(load.share(), 3))
        cells.add(row)
        print(f"            {_short(row)}", flush=True)


def _together(cells: Cells, options: argparse.Namespace, variants: list[str]) -> int:
    beds = [bed for bed in BEDS.values() if bed.name in options.beds]
    if len(beds) != 1 or not options.variants or len(variants) < 2:
        raise SystemExit(
            f"bench: together must go with one of --beds and two --variants at least, got "
            f"{len(beds)} and {len(options.variants or ())}"
        )
    like = Cells(Path(options.together))
    facts = {k: environment()[k] for k in ("cpu", "isa", "torch", "date")}
    began = time.monotonic()
    for those in due_together(cells, like, beds[0], variants, options.seeds):
        spent = (time.monotonic() - began) / 60
        if options.minutes and spent >= options.minutes:
            print(f"stopped after {spent:.0f} minutes; the same command goes on")
            break
        load = OtherLoad()
        rows = run_together(those, options.threads)
        for row in rows:
            row.update(environment=facts, other_load=round(load.share(), 3))
            cells.add(row)
            print(f"[{spent:5.1f} min] {Cell(**row['cell']).key}: {_short(row)}", flush=True)
    print(show(cells, beds[0], variants))
    return 0


def _short(row: dict[str, Any]) -> str:
    result = row["result"]
    if "error" in result:
        return f"failed: {result['error']}"
    if "recall" in result:
        return f"found {result['recall']:.2f} of the planted blocks"
    seconds = result["seconds"]
    return (
        f"loss {result['before']['loss']:.4f} > {result['best']['loss']:.4f} in "
        f"{seconds['total']:.0f} s, peak {result['peak_bytes'] / 1e6:.0f} MB"
    )


def _list(cells: Cells, beds: list[str], variants: list[str], more: More) -> int:
    from .finetune_cells import _missing

    missing = [cell.key for cell in _missing(cells, beds, variants, more)]
    print("\n".join(missing))
    print(
        f"{len(cells.done)} cells done, {len(missing)} due now; seeds after the first once a "
        f"sweep is whole"
    )
    return 0


def _steps_of(summary: Path) -> Optional[dict[str, Any]]:
    """The single steps of an earlier run stay in the summary until they are timed again."""
    if not summary.is_file():
        return None
    return json.loads(summary.read_text(encoding="utf-8")).get("steps")


def _write(cells: Cells, steps: Optional[dict[str, Any]], summary: Path) -> None:
    print(report.show(cells, steps))
    summary.parent.mkdir(parents=True, exist_ok=True)
    summary.write_text(json.dumps(report.figures(cells, steps), indent=1) + "\n", encoding="utf-8")
    written = [str(summary)]
    if any(cells.best_rate(bed, variant) is not None for bed in BEDS for variant in VARIANTS):
        report.chart(cells, summary.with_suffix(".png"))
        written.append(str(summary.with_suffix(".png")))
    print(f"\n{', '.join(written)}; cells: {cells.path}")
