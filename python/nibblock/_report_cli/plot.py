"""The picture of files that hold blocks: density and norm of every layer, a row of maps a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Union

import numpy as np

from nibblock._report_cli.facts import Facts, LayerFacts, total_norm
from nibblock.sparse._plot import sheet


def plot(facts: Sequence[Facts], path: Union[str, os.PathLike]) -> None:
    """Draws the layers with blocks of each file: kinds side by side, numbers downwards.

    Args:
        facts: of `describe`; those without blocks are left out.
        path: of the picture, .png.
    Raises:
        ValueError: none of them holds blocks. ImportError: matplotlib is not installed.
    """
    found = [(f.path, [r for r in getattr(f, "rows", ()) if r.blocks is not None]) for f in facts]
    found = [(name, rows) for name, rows in found if rows]
    if not found:
        raise ValueError(
            "report: --plot must go with a file that holds blocks (an adapter, an update or a "
            "block-sparse model), got none"
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "report: --plot needs matplotlib, which is not installed; pip install nibblock[bench]"
        ) from error
    heights = [max(2.5, 1.5 + 0.15 * len(sheet(r.name for r in rows)[1])) for _, rows in found]
    # No pyplot: it would start a GUI backend and keep the figure alive.
    figure = Figure(figsize=(12, min(40.0, sum(heights))), dpi=120)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    for index, (name, rows) in enumerate(found):
        columns, numbers, density, norm = maps(rows)
        for side, (values, title) in enumerate(((density, "density"), (norm, "norm"))):
            axes = figure.add_subplot(len(found), 2, 2 * index + side + 1)
            axes.set_facecolor("#e8e8f4")
            axes.set_title(f"{Path(name).name}: {title}", fontsize=8)
            axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=6)
            axes.set_yticks(range(len(numbers)), numbers, fontsize=6)
            shown = axes.imshow(
                values, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0.0
            )
            figure.colorbar(shown, ax=axes, fraction=0.03).ax.tick_params(labelsize=6)
    figure.savefig(path)


def maps(rows: Sequence[LayerFacts]) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """(labels of columns, labels of rows, density, norm) with NaN where there is no layer, or for
    a model's layers no norm."""
    columns, numbers, place = sheet(row.name for row in rows)
    density = np.full((len(numbers), len(columns)), np.nan)
    norm = np.full_like(density, np.nan)
    shares: dict[tuple[int, int], list[LayerFacts]] = {}
    for row in rows:  # experts of one layer, each a linear, share a place
        shares.setdefault(place[row.name], []).append(row)
    for at, group in shares.items():
        density[at] = sum(row.blocks for row in group) / max(1, sum(r.all_blocks for r in group))
        if all(row.norm is not None for row in group):
            norm[at] = total_norm([row.norm for row in group])
    return columns, numbers, density, norm
