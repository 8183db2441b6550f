"""The chart of one block-sparse run: time over density, with the dense line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .block_goals import best_dense

_COLOURS = {"bf16": "#0072b2", "fp32": "#d55e00"}
_PEERS = {"torch BSR fp32": "#009e73", "torch sampled_addmm fp32": "#cc79a7"}


def chart(result: dict[str, Any], path: Path) -> None:
    """Draws the run to a PNG: a panel for each kind and M at block 32 of the first shape.

    Raises:
        ImportError: matplotlib is not installed. ValueError: the run holds no case with several
        densities.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise ImportError("the chart needs matplotlib: pip install 'nibblock[bench]'") from e
    cases = [c for c in result["cases"] if len(c["densities"]) > 2]
    if not cases:
        raise ValueError("plot: the result must hold a case with at least three densities")
    shape, block = cases[0]["shape"], cases[0]["block"]
    cases = [c for c in cases if (c["shape"], c["block"]) == (shape, block)]
    kinds = list(dict.fromkeys(c["kind"] for c in cases))
    rows = sorted({c["m"] for c in cases})
    size = (4.2 * len(rows), 3.6 * len(kinds))
    figure, axes = plt.subplots(
        len(kinds), len(rows), figsize=size, squeeze=False, constrained_layout=True
    )
    env = result["environment"]
    figure.suptitle(
        f"block-sparse {shape}, block {block}, on {env['cpu']}, {env['isa']}, "
        f"{env['threads']} threads, torch {env['torch']}",
        fontsize=11,
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for case in cases:
        _panel(axes[kinds.index(case["kind"])][rows.index(case["m"])], case)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis, case: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_visible(True)
    for label, colour in _COLOURS.items():
        dense = case["lines"][best_dense(case, label)]["median_s"]
        axis.axhline(
            dense * 1e3, color=colour, linestyle="--", linewidth=1.2, label=f"dense {label}"
        )
        _curve(axis, case, f"nibblock {label}", colour, 2.2)
    for name, colour in _PEERS.items():
        _curve(axis, case, name, colour, 1.2)
    axis.set_xscale("log")
    axis.set_yscale("log")
    ticks = [100 * d for d in case["densities"]]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which(lambda value, _: f"{value:g}")
    axis.set_xlabel("density, %")
    axis.set_ylabel("ms a call")
    axis.set_title(f"{case['kind']}, M = {case['m']}, {case['weights']}", fontsize=10)
    axis.grid(True, alpha=0.25)
    axis.legend(fontsize=7)


def _curve(axis, case: dict[str, Any], name: str, colour: str, width: float) -> None:
    found = sorted(
        (e["density"], e["median_s"]) for e in case["lines"].values() if e["name"] == name
    )
    if found:
        xs, ys = [100 * d for d, _ in found], [1e3 * t for _, t in found]
        axis.plot(xs, ys, "o-", color=colour, label=name, linewidth=width, markersize=4)
