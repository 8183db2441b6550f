"""The picture of a `Selection`: scores and choice of all layers on one sheet."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Union

import numpy as np

if TYPE_CHECKING:
    from nibblock.sparse._selection import Selection

_GAP = 2  # blocks between two layers


def sheet(names: Iterable[str]) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
    """Column and row labels, and each layer's place: kinds side by side, numbers downwards."""
    columns: list[str] = []
    rows: list[str] = []
    place = {}
    for name in names:
        numbers = re.findall(r"(?<![^.])\d+(?![^.])", name)
        kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        number = numbers[0] if numbers else ""
        if kind not in columns:
            columns.append(kind)
        if number not in rows:
            rows.append(number)
        place[name] = (rows.index(number), columns.index(kind))
    return columns, rows, place


def _canvas(selection, columns, rows, place):
    """(scores, choice, left edge of each column, top edge of each row); NaN between layers."""
    grids = {name: s.shape for name, s in selection.scores.items()}
    wide = [max((grids[n][1] for n, p in place.items() if p[1] == c), default=0)
            for c in range(len(columns))]  # fmt: skip
    high = [max((grids[n][0] for n, p in place.items() if p[0] == r), default=0)
            for r in range(len(rows))]  # fmt: skip
    left = np.concatenate([[0], np.cumsum([w + _GAP for w in wide])])
    top = np.concatenate([[0], np.cumsum([h + _GAP for h in high])])
    scores = np.full((top[-1], left[-1]), np.nan)
    choice = np.full_like(scores, np.nan)
    for name, (row, column) in place.items():
        h, w = grids[name]
        area = np.s_[top[row] : top[row] + h, left[column] : left[column] + w]
        scores[area] = selection.scores[name].numpy()
        choice[area] = selection.mask(name).numpy()
    return scores, choice, left, top


def plot(selection: Selection, path: Union[str, os.PathLike]) -> None:
    """See `Selection.plot`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "nibblock: plotting needs matplotlib: pip install nibblock[bench]"
        ) from error
    columns, rows, place = sheet(selection.shapes)
    scores, choice, left, top = _canvas(selection, columns, rows, place)
    positive = scores[np.isfinite(scores) & (scores > 0)]
    floor = np.quantile(positive, 0.01) if positive.size else 1.0
    logs = np.log10(np.where(np.isnan(scores), np.nan, np.maximum(scores, floor)))
    # No pyplot: it would start a GUI backend and keep the figure alive.
    figure = Figure(figsize=(14, min(16.0, max(4.0, 0.02 * scores.shape[0]))), dpi=150)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    for i, (values, title, colours) in enumerate(
        ((logs, f"log10 {selection.method} score", "viridis"), (choice, "selected", "binary"))
    ):
        axes = figure.add_subplot(1, 2, i + 1)
        axes.set_facecolor("#e8e8f4")
        shown = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=colours)
        axes.set_title(title)
        axes.set_xticks(left[:-1], columns, rotation=60, ha="right", fontsize=6)
        axes.set_yticks(top[:-1], rows, fontsize=6)
        if i == 0:
            figure.colorbar(shown, ax=axes, fraction=0.03)
    figure.suptitle(selection._summary(), fontsize=8)
    figure.savefig(path)
