"""The layer shapes and row counts that every benchmark of this package uses."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One linear layer: y [M, out_features] = x [M, in_features] W^T."""

    model: str
    layer: str
    out_features: int
    in_features: int

    @property
    def key(self) -> str:
        return f"{self.out_features}x{self.in_features}"


LLAMA_8B = (
    Shape("llama-8b", "q/o", 4096, 4096),
    Shape("llama-8b", "k/v", 1024, 4096),
    Shape("llama-8b", "gate/up", 14336, 4096),
    Shape("llama-8b", "down", 4096, 14336),
)
SMOLLM2 = (
    Shape("smollm2-135m", "q/o", 576, 576),
    Shape("smollm2-135m", "k/v", 192, 576),
    Shape("smollm2-135m", "gate/up", 1536, 576),
    Shape("smollm2-135m", "down", 576, 1536),
    Shape("smollm2-135m", "head", 49152, 576),
)
MINILM = (
    Shape("minilm-l6", "attention", 384, 384),
    Shape("minilm-l6", "up", 1536, 384),
    Shape("minilm-l6", "down", 384, 1536),
)
ALL = LLAMA_8B + SMOLLM2 + MINILM
QUICK = (LLAMA_8B[0],)

ROWS = (1, 4, 8, 16, 64, 256, 1024)
ROWS_QUICK = (1, 8, 16, 256)


def select(names: list[str] | None, quick: bool) -> tuple[Shape, ...]:
    """Shapes by "NxK" or by model name ("llama-8b"); the default set when `names` is empty.

    Raises:
        ValueError: a name is neither a model of this file nor of the form NxK.
    """
    if not names:
        return QUICK if quick else ALL
    chosen: list[Shape] = []
    for name in names:
        known = [s for s in ALL if name in (s.model, s.key)]
        if known:
            chosen.extend(known)
            continue
        parts = name.lower().split("x")
        if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
            models = ", ".join(sorted({s.model for s in ALL}))
            raise ValueError(
                f"bench: shapes must be NxK or one of {models}, got {name!r}; for example 4096x4096"
            )
        chosen.append(Shape("custom", name, int(parts[0]), int(parts[1])))
    return tuple(dict.fromkeys(chosen))
