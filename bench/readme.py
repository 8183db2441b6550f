"""`python -m nibblock bench readme`: writes the figures of bench/results/*.json into the documents.

README.md holds marked blocks, `<!-- figures: NAME -->` to `<!-- end -->`; each is replaced by what
its JSON says. bench/results/README.md lists every goal and every loss of every file. A test holds
both to the files, so no figure stands anywhere without one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

from . import goals
from .finetune_beds import BEDS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.S)
_DENSE16 = ("dense bf16 eager", "dense bf16 oneDNN")
_DENSE32 = ("dense fp32 eager", "dense fp32 oneDNN", "dense fp32 MKL")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="nibblock bench readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if anything is old")
    options = parser.parse_args(argv)
    old = []
    for path, text in documents().items():
        if path.exists() and path.read_text() == text:
            continue
        old.append(path)
        if not options.check:
            path.write_text(text)
    for path in old:
        print(f"{'old' if options.check else 'wrote'} {path.relative_to(ROOT)}")
    return 1 if old and options.check else 0


def documents() -> dict[Path, str]:
    """Path -> the text that it should have."""
    found = load()
    readme = ROOT / "README.md"

    def block(match: re.Match) -> str:
        name = match.group(2)
        if name not in FIGURES:
            raise ValueError(f"README.md: figures must be one of {', '.join(FIGURES)}, got {name}")
        return match.group(1) + FIGURES[name](found) + "\n" + match.group(3)

    return {
        readme: _BLOCK.sub(block, readme.read_text()),
        RESULTS / "README.md": overview(found),
    }


def load() -> dict[str, dict[str, Any]]:
    """File name without .json -> content, for every result."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))}


# --- Markdown -------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:.3g} ms" if value < 0.1 else f"{value * 1e3:.0f} ms"


def _runs(found: dict[str, dict[str, Any]], benchmark: str) -> list[tuple[str, dict[str, Any]]]:
    """The committed runs (file stem, content), that of the widest instruction set first."""
    order = ("amx", "avx512_vnni", "avx512", "avx2", "scalar")
    runs = [(n, r) for n, r in found.items() if r.get("benchmark") == benchmark]
    if not runs:
        raise ValueError(f"bench/results: a run of {benchmark} must be there, got none")
    return sorted(runs, key=lambda run: order.index(_taken(run[1])["environment"]["isa"]))


def _newest(found: dict[str, dict[str, Any]], benchmark: str) -> tuple[str, dict[str, Any]]:
    return _runs(found, benchmark)[0]


def _taken(run: dict[str, Any]) -> dict[str, Any]:
    """The part of a run that says where and under what load it was taken."""
    return run if "environment" in run else run["steps"]


def source(stem: str, run: dict[str, Any]) -> str:
    """One sentence: where the figures are from."""
    if run.get("benchmark") == "gpu":
        versions = run["versions"]
        return (
            f"[{stem}.json](bench/results/{stem}.json): {run['gpu']}, torch {versions['torch']}, "
            f"triton {versions['triton']}; CUDA-graph replay with rotating weights."
        )
    taken = _taken(run)
    env, load = taken["environment"], taken["other_load"]
    busy = f"; other processes took {load * 100:.0f} % of it" if load >= 0.005 else ""
    return (
        f"[{stem}.json](bench/results/{stem}.json): {env['cpu']}, kernels of level `{env['isa']}`, "
        f"{env['threads']} threads, torch {env['torch'].split('+')[0]}{busy}."
    )


# --- the README's blocks --------------------------------------------------------------------------


def _best(case: dict[str, Any], names: Sequence[str]) -> float | None:
    times = [case["providers"][n]["median_s"] for n in names if n in case["providers"]]
    return min(times) if times else None


def int4_figures(found: dict[str, dict[str, Any]]) -> str:
    """A table for every instruction set that a run is committed of, the widest first."""
    return "\n\n".join(_int4_table(stem, run) for stem, run in _runs(found, "int4_linear"))


def _int4_table(stem: str, run: dict[str, Any]) -> str:
    rows = []
    for case in run["cases"]:
        cold = case["weights"] == "cold"
        if (case["shape"], case["group"]) != ("4096x4096", 128) or cold != (case["m"] <= 4):
            continue
        ours = _best(case, ("nibblock bf16",))
        dense16, dense32 = _best(case, _DENSE16), _best(case, _DENSE32)
        if ours is None or dense16 is None or dense32 is None:
            continue
        int4 = _best(case, ("torch int4",))
        rows.append(
            (
                case["m"],
                seconds(ours),
                seconds(_best(case, ("nibblock int8",))),
                seconds(dense16),
                seconds(dense32),
                seconds(int4),
                seconds(_best(case, ("ORT level 4",))),
                f"{dense16 / ours:.1f}x",
                f"{dense32 / ours:.1f}x",
                f"{int4 / ours:.1f}x" if int4 else "",
            )
        )
    header = (
        *("M", "nibblock", "nibblock int8", "dense bf16, better of two", "dense fp32, best of 3"),
        *("torch int4", "ONNX Runtime level 4", "over dense bf16", "over dense fp32"),
        "over torch int4",
    )
    return source(stem, run) + "\n\n" + markdown(header, rows)


def model_figures(found: dict[str, dict[str, Any]]) -> str:
    """A table for every instruction set that a run is committed of, the widest first."""
    return "\n\n".join(_model_table(stem, run) for stem, run in _runs(found, "model"))


def _model_table(stem: str, run: dict[str, Any]) -> str:
    def rate(kind: str, name: str, count: int) -> str:
        line = run.get(kind, {}).get(name)
        return f"{count / line['median_s']:.1f}" if line else ""

    rows = [
        (
            name,
            f"{run['bytes'][name] / 1e6:.1f} MB",
            rate("decode", name, 1),
            rate("decode_compiled", name, 1),
            rate("prefill", name, run["prefill_tokens"]),
            f"{run['perplexity'][name]:.3f}",
        )
        for name in run["bytes"]
    ]
    header = (
        *("", "memory", "decode tok/s, eager", "compiled"),
        *(f"prefill {run['prefill_tokens']}, tok/s", "perplexity"),
    )
    return source(stem, run) + "\n\n" + markdown(header, rows)


def block_figures(found: dict[str, dict[str, Any]]) -> str:
    stem, run = _newest(found, "block_sparse_linear")
    rows = []
    for case in run["cases"]:
        if case["shape"] != "4096x4096" or case["block"] != 32:
            continue
        for dtype in ("fp32", "bf16"):
            lines = case["lines"]
            dense = [v["median_s"] for n, v in lines.items() if n.startswith(f"dense {dtype}")]
            if not dense:
                continue
            cells = [
                f"{min(dense) / lines[name]['median_s']:.1f}x" if name in lines else ""
                for name in (f"nibblock {dtype} d={d}" for d in (0.005, 0.02, 0.1, 0.25, 0.5))
            ]
            rows.append((case["kind"], case["m"], dtype, seconds(min(dense)), *cells))
    header = (
        "4096 x 4096, block 32",
        "M",
        "dtype",
        "dense",
        "0.5 %",
        "2 %",
        "10 %",
        "25 %",
        "50 %",
    )
    return source(stem, run) + " Speed over the better dense product.\n\n" + markdown(header, rows)


def masked_figures(found: dict[str, dict[str, Any]]) -> str:
    stem, run = _newest(found, "masked_update")
    rows = []
    for case in run["cases"]:
        base = case["lines"]["torch AdamW fused"]
        for name, line in case["lines"].items():
            if not name.startswith(
                (
                    "torch AdamW fused",
                    "nibblock block",
                    "nibblock MaskedAdamW",
                    "nibblock flat",
                    "nibblock Muon",
                    "nibblock MaskedMuon",
                    "torch Muon",
                )
            ):
                if name != "nibblock dense":
                    continue
            cells = []
            for cache in ("cold", "resident"):
                ours, theirs = line[cache]["median_s"], base[cache]["median_s"]
                cells += [seconds(ours), f"{theirs / ours:.2f}x"]
            rows.append((case["list"], name, *cells))
    header = ("20 M parameters", "", "cold", "over fused", "resident", "over fused")
    return source(stem, run) + "\n\n" + markdown(header, rows)


def finetune_figures(found: dict[str, dict[str, Any]]) -> str:
    stem, run = _newest(found, "finetune")
    steps = run["steps"]
    base = steps["methods"]["full"]
    rows = []
    for name, line in steps["methods"].items():
        rows.append(
            (
                name,
                f"{line['trained'] / 1e6:.2f} M",
                f"{line['median_s']:.2f} s",
                f"{line['median_s'] / base['median_s']:.2f}x",
                *(f"{line['phases'][p]:.2f} s" for p in ("forward", "backward", "optimizer")),
                f"{line['state_bytes'] / 1e6:.0f} MB",
                f"{line['peak_bytes'] / 1e9:.2f} GB",
            )
        )
    header = (
        *("method", "trained", "step", "of full", "forward", "backward", "optimizer"),
        *("gradients and state", "peak, net of imports"),
    )
    parts = [source(stem, run), markdown(header, rows)]
    for bed, lines in run["beds"].items():
        if lines:
            parts += [f"{BEDS[bed].title}:", _bed_table(BEDS[bed].figure, lines)]
    return "\n\n".join(parts)


def _bed_table(figure: str, lines: list[dict[str, Any]]) -> str:
    """Runs to the end of a budget of epochs, at each variant's best learning rate."""
    rows = []
    for line in lines:
        if "error" in line:
            rows.append((line["variant"], f"failed: {line['error']}", *[""] * 7))
            continue
        spread = "" if line["spread"] is None else f" ± {line['spread']:.3f}"
        time = f"reached by {line['reached']} of {line['paired']}"
        if line["time"] is not None:
            time = f"{line['time']:.2f}x"
        rows.append(
            (
                line["variant"],
                f"{line['best']:.3f}{spread}",
                line["seeds"],
                "" if line["over_full"] is None else f"{line['over_full']:+.3f}",
                time,
                f"{line['step']:.2f}x",
                f"{line['state']:.3f}x",
                f"1/{1 / line['file']:.0f}",
                f"{line['trained']:.1%}",
            )
        )
    header = (
        *("", f"best held-out {figure}", "seeds", "over full, same seeds"),
        *("time to full's quality", "step", "state", "file over model", "trained"),
    )
    return markdown(header, rows)


def gpu_figures(found: dict[str, dict[str, Any]]) -> str:
    """Every kernel for a GPU and, where a run is committed, what it says of it."""
    from nibblock import _cuda
    from nibblock.triton_kernels import _table

    runs = sorted((stem, run) for stem, run in found.items() if run.get("benchmark") == "gpu")
    rows = []
    for op, table in _table.TABLE.items():
        for state in dict.fromkeys(row.state for row in table):
            kinds = [f"{r.kind} ({r.serves_text})" for r in table if r.state == state]
            rows.append((f"`{op}`", "Triton", ", ".join(kinds), state or "run on hardware"))
    # Their own table is compiled in; none of its rows is proven while this text stands there.
    rows.append(("`int4_linear`", "CUDA C++", "m <= 128, by name only", _cuda.UNPROVEN))
    kernels = markdown(("op", "", "kernels (what they serve)", "state"), rows)
    if not runs:
        return "No run on a GPU is committed, so there is no figure.\n\n" + kernels
    parts = [kernels]
    for stem, run in runs:
        lines = [
            (r["row"], "" if r["measured"] is None else goals.figure(r["measured"], r["unit"]),
             goals.figure(r["floor"], r["unit"]), r["verdict"], r["detail"])
            for r in run["goals"]
        ]  # fmt: skip
        header = ("over cuBLAS bf16 unless said", "measured", "floor", "verdict", "case")
        parts += [source(stem, run), markdown(header, lines)]
    return "\n\n".join(parts)


FIGURES: dict[str, Callable[[dict[str, dict[str, Any]]], str]] = {
    "int4_linear": int4_figures,
    "model": model_figures,
    "block_sparse_linear": block_figures,
    "masked_update": masked_figures,
    "finetune": finetune_figures,
    "gpu": gpu_figures,
}


# --- every goal and every loss --------------------------------------------------------------------


def overview(found: dict[str, dict[str, Any]]) -> str:
    parts = [
        "# Results\n\nWhat the committed runs say about every goal, and every case in which a "
        "baseline was faster. Written by `python -m nibblock bench readme` from the files here."
    ]
    for stem, run in found.items():
        if "goals" not in run:
            continue
        parts.append(f"## {run['benchmark']}\n\n{source(stem, run).replace('bench/results/', '')}")
        rows = [
            (
                row["row"],
                goals.figure(row["floor"], row["unit"]),
                goals.figure(row["goal"], row["unit"]),
                "" if row["measured"] is None else goals.figure(row["measured"], row["unit"]),
                row["verdict"],
                row["detail"],
            )
            for row in run["goals"]
        ]
        parts.append(markdown(("", "floor", "goal", "measured", "verdict", "case"), rows))
        losses = [
            (loss["case"], loss.get("ours", ""), loss["baseline"], f"{loss['speedup']:.2f}x")
            for loss in run.get("losses") or []
        ]
        if losses:
            parts.append("Where a baseline was faster:")
            parts.append(markdown(("case", "ours", "baseline", "our speed"), losses))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
