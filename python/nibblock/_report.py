"""What `accelerate` or `add_adapters` did to a model: one row per layer, printable as a table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer: `action` is "int4", "int8", "sparse", "adapter" or "kept"; `reason` says why
    kept.
    """

    name: str
    action: str
    reason: str
    kind: str
    # [out_features, in_features], [num_embeddings, embedding_dim], or [experts, of their largest
    # matrix]
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int


@dataclass
class Report:
    """The rows of an accelerated model. `str()` is a table in which layers of one kind are one
    line.

    Attributes:
        rows: a `LayerReport` for every linear, embedding and experts module that was looked at.
        model_bytes_before, model_bytes_after: all Parameters and buffers, each storage counted
            once.
        fused: names of the siblings that run as one call, "parent.(a|b)".
        not_fused: by the same names, why siblings that could share a call do not.
        trainable: numbers that ask for a gradient after `add_adapters`; 0 after `accelerate`.
    """

    rows: list[LayerReport] = field(default_factory=list)
    model_bytes_before: int = 0
    model_bytes_after: int = 0
    fused: list[str] = field(default_factory=list)
    trainable: int = 0
    not_fused: dict[str, str] = field(default_factory=dict)

    @property
    def replaced(self) -> list[LayerReport]:
        """The layers that were replaced."""
        return [row for row in self.rows if row.action != "kept"]

    @property
    def kept(self) -> list[LayerReport]:
        """The layers that were left alone; `reason` says why."""
        return [row for row in self.rows if row.action == "kept"]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.rows)

    def to_dict(self) -> dict:
        """Rows and totals as plain lists, strings and numbers (JSON)."""
        return {
            "rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
            "replaced": len(self.replaced),
            "kept": len(self.kept),
            "bytes_before": sum(row.bytes_before for row in self.rows),
            "bytes_after": sum(row.bytes_after for row in self.rows),
            "model_bytes_before": self.model_bytes_before,
            "model_bytes_after": self.model_bytes_after,
            "fused": list(self.fused),
            "not_fused": dict(self.not_fused),
            "trainable": self.trainable,
        }

    def __str__(self) -> str:
        folded: dict[tuple, list[LayerReport]] = {}
        for row in self.rows:
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name)
            folded.setdefault((pattern, row.kind, row.shape, row.action, row.reason), []).append(
                row
            )
        lines = [("layer", "shape", "action", "before", "after", "reason")]
        for (pattern, kind, shape, action, reason), rows in folded.items():
            name = rows[0].name if len(rows) == 1 else f"{pattern} x{len(rows)}"
            lines.append(
                (
                    name or f"({kind})",
                    " x ".join(str(size) for size in shape),
                    action,
                    format_bytes(sum(row.bytes_before for row in rows)),
                    format_bytes(sum(row.bytes_after for row in rows)),
                    reason,
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        table = [
            "  ".join(
                [
                    line[0].ljust(widths[0]),
                    line[1].rjust(widths[1]),
                    line[2].ljust(widths[2]),
                    line[3].rjust(widths[3]),
                    line[4].rjust(widths[4]),
                    line[5],
                ]
            ).rstrip()
            for line in lines
        ]
        table.insert(1, "-" * max(len(line) for line in table))
        what = "adapted" if self.trainable else "replaced"
        total = f"{len(self.replaced)} {what}, {len(self.kept)} kept"
        if self.fused:
            total += f", {len(self.fused)} groups of siblings run as one call"
        sizes = format_bytes(self.model_bytes_before), format_bytes(self.model_bytes_after)
        total += f"; model {sizes[0]} -> {sizes[1]}"
        if self.trainable:
            total += f"; {self.trainable} trainable values"
        elif self.model_bytes_after:
            total += f" ({self.model_bytes_before / self.model_bytes_after:.2f}x smaller)"
        notes = [f"not fused: {name}: {reason}" for name, reason in self.not_fused.items()]
        return "\n".join([*table, *notes, total])

    def __repr__(self) -> str:
        return f"<nibblock report: {len(self.replaced)} replaced, {len(self.kept)} kept>"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(str(self))}</pre>"


def format_bytes(count: int) -> str:
    """1500 as "1.5 KB", in powers of 1000."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("KB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95 or unit == "TB":
            return f"{value:.1f} {unit}"
    raise AssertionError("unreachable")


def plain(value: Any) -> Any:
    """A value as JSON can hold it: tuples are lists, numbers that are not finite are None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
