"""The chart of one run: speed-up and share of the machine's ceiling over M."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .int4_goals import INT8, OURS, better_dense, ratio, roofline

# Colours that stay apart in print and for colour-blind readers.
_COLOURS = {
    OURS: "#0072b2",
    INT8: "#56b4e9",
    "torch int4": "#d55e00",
    "ORT level 4": "#009e73",
    "ORT level 0": "#8fbf9f",
    "bitsandbytes NF4": "#cc79a7",
    "dense fp32": "#999999",
}


def chart(result: dict[str, Any], path: Path) -> None:
    """Draws the run to a PNG.

    Left: each provider's speed over the better dense bfloat16, on the largest comparison of the
    run. Middle: ours on every shape. Right: how much of the binding ceiling (memory for cold
    weights, the arithmetic unit otherwise) ours and dense bfloat16 reach.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the run holds no cases.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise ImportError("the chart needs matplotlib: pip install 'nibblock[bench]'") from e
    cases = [c for c in result["cases"] if better_dense(c)]
    if not cases:
        raise ValueError("plot: the result must hold at least one case with a dense bf16 baseline")
    main = _main_shape(cases)
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.2), constrained_layout=True)
    env = result["environment"]
    machine = f"{env['cpu']}, {env['isa']}, {env['threads']} threads, torch {env['torch']}"
    figure.suptitle(f"int4_linear on {machine}", fontsize=11)
    _providers(axes[0], main)
    _shapes(axes[1], cases)
    _ceilings(axes[2], main, result["units"])
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({c["m"] for c in cases}))
        axis.set_xticklabels(sorted({c["m"] for c in cases}))
        axis.set_xlabel("M (rows of x)")
        axis.grid(True, alpha=0.25)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _main_shape(cases: list[dict]) -> list[dict]:
    shapes = [c["shape"] for c in cases]
    name = "4096x4096" if "4096x4096" in shapes else max(shapes, key=shapes.count)
    group = 128 if any(c["shape"] == name and c["group"] == 128 for c in cases) else 32
    return [c for c in cases if c["shape"] == name and c["group"] == group]


def _preferred(cases: list[dict]) -> list[dict]:
    """One case for each M: with cold weights where that was measured."""
    best: dict[int, dict] = {}
    for c in cases:
        if c["m"] not in best or c["weights"] == "cold":
            best[c["m"]] = c
    return [best[m] for m in sorted(best)]


def _curve(cases: list[dict], figure) -> tuple[list[int], list[float]]:
    points = [(c["m"], figure(c)) for c in cases]
    kept = [(m, v) for m, v in points if v is not None]
    return [m for m, _ in kept], [v for _, v in kept]


def _over_dense(c: dict, name: str) -> float | None:
    if name == "dense fp32":
        names = [n for n in c["providers"] if n.startswith("dense fp32")]
        if not names:
            return None
        name = min(names, key=lambda n: c["providers"][n]["median_s"])
    return ratio(c, name, better_dense(c) or "")


def _log_speed(axis) -> None:
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")


def _providers(axis, cases: list[dict]) -> None:
    warm = [c for c in cases if c["weights"] == "warm"]
    for name, colour in _COLOURS.items():
        xs, ys = _curve(warm, lambda c: _over_dense(c, name))  # noqa: B023
        if xs:
            width = 2.6 if name.startswith("nibblock") else 1.4
            axis.plot(xs, ys, "o-", color=colour, label=name, linewidth=width, markersize=4)
    axis.axhline(1, color="black", linewidth=1)
    _log_speed(axis)
    axis.set_ylabel("speed-up over the better dense bf16")
    axis.set_title(f"{cases[0]['shape']}, cache-resident weights", fontsize=10)


def _shapes(axis, cases: list[dict]) -> None:
    for key in dict.fromkeys((c["model"], c["shape"]) for c in cases):
        own = _preferred([c for c in cases if (c["model"], c["shape"]) == key])
        xs, ys = _curve(own, lambda c: _over_dense(c, OURS))
        axis.plot(xs, ys, "o-", label=" ".join(key), linewidth=1.4, markersize=3)
    axis.axhline(1, color="black", linewidth=1)
    _log_speed(axis)
    axis.set_ylabel("speed-up over the better dense bf16")
    axis.set_title("nibblock bf16, every shape (cold weights where measured)", fontsize=10)


def _ceilings(axis, cases: list[dict], units: dict[str, str | None]) -> None:
    chosen = _preferred(cases)
    lines = [(OURS, units["bf16"]), (INT8, units["int8"])]
    if units["bf16"] == "amx_bf16":  # elsewhere oneDNN's bfloat16 runs on another unit than ours
        lines.append(("dense bf16 oneDNN", units["bf16"]))
    for name, unit in lines:
        xs, ys = _curve(chosen, lambda c: roofline(c, name, unit))  # noqa: B023
        if xs:
            label = f"{name} ({unit})"
            style = "o-" if name.startswith("nibblock") else "o--"
            axis.plot(
                xs, [100 * y for y in ys], style, color=_COLOURS.get(name, "#444444"), label=label
            )
    axis.set_ylim(0, 105)
    axis.set_ylabel("% of the binding ceiling, same rounds")
    axis.set_title(f"{cases[0]['shape']}: cold reads or the unit named", fontsize=10)
