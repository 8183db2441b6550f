"""The chart of one GPU run: speed-up over M by model, and share of the copy bandwidth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .gpu_goals import OURS, geomean, seconds, speed

# Colours that stay apart in print and for colour-blind readers.
_COLOURS = {
    "nibblock": "#0072b2",
    "CUDA C++": "#56b4e9",
    "torch int4": "#d55e00",
    "humming": "#009e73",
    "gemlite": "#cc79a7",
    "bitsandbytes NF4": "#e69f00",
}


def chart(result: dict[str, Any], path: Path) -> None:
    """Draws the run to a PNG.

    Left and middle: int4 forward and dx over cuBLAS bfloat16, geometric means over the layers of a
    model. Right: bytes a second, as a share of a copy's, of int4 forwards of few rows and of packed
    AdamW.

    Raises:
        ImportError: matplotlib is not installed. ValueError: the run holds no int4 case.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise ImportError("the chart needs matplotlib: pip install 'nibblock[bench]'") from e
    if not result["parts"].get("int4"):
        raise ValueError("plot: the result must hold the part int4, got none")
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.2), constrained_layout=True)
    versions = result["versions"]
    figure.suptitle(
        f"{result['gpu']}, torch {versions['torch']}, triton {versions['triton']}, group 128, "
        "CUDA-graph replay with rotating weights",
        fontsize=11,
    )
    _speed(axes[0], result["parts"]["int4"], "int4 forward")
    _speed(axes[1], result["parts"].get("dx", []), "int4 dx")
    _bandwidth(axes[2], result)
    for axis in axes:
        axis.grid(True, alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    found = dict.fromkeys(name for row in rows for name in row["times"])
    return [name for name in found if name in _COLOURS]


def _speed(axis, rows: list[dict[str, Any]], title: str) -> None:
    for model, style in (("8b", "o--"), ("70b", "o-")):
        for name in _names(rows):
            points: dict[int, list[float]] = {}
            for row in rows:
                value = speed(row, ours=name) if row["model"] == model else None
                if value is not None:
                    points.setdefault(row["m"], []).append(value)
            xs = sorted(points)
            if xs:
                ys = [geomean(points[m]) for m in xs]
                width = 2.4 if name == OURS else 1.3
                axis.plot(xs, ys, style, color=_COLOURS[name], linewidth=width, markersize=4,
                          label=f"{name}, {model.upper()}")  # fmt: skip
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    ms = sorted({row["m"] for row in rows})
    axis.set_xticks(ms)
    axis.set_xticklabels(ms)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_xlabel("M (rows of x)")
    axis.set_ylabel("speed-up over cuBLAS bf16")
    axis.set_title(f"{title}: geometric mean over a model's layers", fontsize=10)


def shares(result: dict[str, Any]) -> list[tuple[str, float]]:
    """[(case, share of the measured copy bandwidth)] of what memory bounds."""
    copy = result["ceilings"]["copy_bytes_per_s"]
    found = []
    for row in result["parts"].get("int4", []):
        own = seconds(row, OURS)
        if row["m"] == 1 and own is not None:
            found.append((f"{row['model'].upper()} {row['shape']} M=1", row["bytes"] / own / copy))
    for row in result["parts"].get("adamw", []):
        found.append(("packed AdamW", row["bytes_per_s"] / copy))
    return found


def _bandwidth(axis, result: dict[str, Any]) -> None:
    found = shares(result)
    axis.barh([name for name, _ in found], [100 * value for _, value in found], color="#0072b2")
    axis.invert_yaxis()
    axis.set_xlim(0, 105)
    axis.set_xlabel("% of measured copy bandwidth")
    axis.set_title("nibblock, where memory is the limit", fontsize=10)
