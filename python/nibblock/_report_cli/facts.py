"""What `describe` and `changes` return: plain values, with `to_dict()` for JSON."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Optional

from nibblock._report import Report, plain


def over(part: float, whole: float) -> Optional[float]:
    """part / whole; None over zero."""
    return part / whole if whole else None


def total_norm(norms: list[Optional[float]]) -> float:
    """The Frobenius norm of what lies in disjoint parts; NaN where one of them is."""
    return math.sqrt(sum(norm * norm for norm in norms if norm is not None))


@dataclass(frozen=True)
class LayerFacts:
    """One layer of a file; what does not apply to its kind is None.

    Attributes:
        name: of the module. kind: "int4", "int8", "block-sparse", "adapter", "masked", "dense" (it
            holds a tensor of two or more dimensions) or "vectors" (norms, biases, buffers).
        module: "linear", "embedding" or "experts". shape: [N, K], [rows, columns] of an embedding,
            [E, N, K] of a projection of experts, or a dense module's largest tensor.
        bytes: of its tensors in the file; 0 where `tied` names the layer that holds them.
        weights: float numbers that it stands for, biases included; 0 where tied.
        fixed_bytes: of integers among its tensors, which have no float size.
        dtype: of its scales or values. group_size: weights a scale, -1 for a row. column_order:
            True where the file holds an order of columns, by which a row is cut into groups.
        block, blocks, all_blocks, density: B, Z, blocks of the grid, Z over those.
        rank: of the low-rank pair, 0 for none. base: fingerprint of the layer below, 64 digits.
        norm: Frobenius norm, in float64: of an adapter's S + C A; of the weights that an update
            holds in its blocks (which are weights, not differences).
        tied: the layer that holds this one's tensors; empty for its own.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    weights: int
    module: str = ""
    fixed_bytes: int = 0
    dtype: str = ""
    group_size: Optional[int] = None
    column_order: Optional[bool] = None
    block: Optional[int] = None
    blocks: Optional[int] = None
    all_blocks: Optional[int] = None
    rank: Optional[int] = None
    base: Optional[str] = None
    norm: Optional[float] = None
    tied: str = ""

    @property
    def density(self) -> Optional[float]:
        return None if self.blocks is None else over(self.blocks, self.all_blocks)

    def to_dict(self) -> dict[str, Any]:
        values = {**asdict(self), "density": self.density}
        return plain({key: value for key, value in values.items() if value not in (None, "")})


@dataclass(frozen=True)
class Facts:
    """What one PATH is. Attributes: path: as it was given; file_bytes: on the disk."""

    kind: ClassVar[str] = ""
    path: str
    file_bytes: int

    def summary(self) -> dict[str, Any]:
        """The figures that are not in the rows."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, strings and numbers (JSON)."""
        out = {"path": self.path, "kind": self.kind, "file_bytes": self.file_bytes}
        out.update(self.summary())
        if hasattr(self, "rows"):
            out["rows"] = [row.to_dict() for row in self.rows]
        return plain(out)


@dataclass(frozen=True)
class ModelFacts(Facts):
    """A whole model of `nibblock.save`.

    Attributes:
        version: of the format. library: the version that wrote it, or None (before it was kept).
        rows: every layer. tied: tensors that another name holds, name -> name.
    """

    kind: ClassVar[str] = "model"
    version: int
    library: Optional[str]
    rows: tuple[LayerFacts, ...]
    tied: dict[str, str] = field(default_factory=dict)

    def by_kind(self) -> dict[str, dict[str, Any]]:
        """kind -> layers, weights, bytes, float32_bytes, bfloat16_bytes, bits_per_weight; "all"
        last."""
        kinds = list(dict.fromkeys(row.kind for row in self.rows))
        groups = {kind: [row for row in self.rows if row.kind == kind] for kind in kinds}
        return {kind: _sizes(rows) for kind, rows in {**groups, "all": self.rows}.items()}

    def summary(self) -> dict[str, Any]:
        groups: dict[str, int] = {}
        for row in self.rows:
            if row.group_size is not None:
                groups[str(row.group_size)] = groups.get(str(row.group_size), 0) + 1
        values = {"version": self.version, "library": self.library, "kinds": self.by_kind()}
        return {**values, "groups": groups, "tied": self.tied}


def _sizes(rows) -> dict[str, Any]:
    weights, held = sum(r.weights for r in rows), sum(r.bytes for r in rows)
    fixed = sum(r.fixed_bytes for r in rows)
    return {
        "layers": len(rows),
        "weights": weights,
        "bytes": held,
        "float32_bytes": 4 * weights + fixed,
        "bfloat16_bytes": 2 * weights + fixed,
        "of_float32": over(held, 4 * weights + fixed),
        "of_bfloat16": over(held, 2 * weights + fixed),
        "bits_per_weight": over(8 * held, weights),
    }


@dataclass(frozen=True)
class TrainedFacts(Facts):
    """An adapter or a sparse update of `nibblock.save`.

    Attributes:
        what: "adapters" or "sparse_update". version, library: as of `ModelFacts`.
        name: of the adapter; empty for an update.
        rows: every layer. `weights` there are those of the layer's [N, K].
        trained: what else was trained: name -> {"shape", "dtype", "bytes"}.
    """

    what: str
    version: int
    library: Optional[str]
    name: str
    rows: tuple[LayerFacts, ...]
    trained: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.what

    @property
    def blocks(self) -> int:
        return sum(row.blocks for row in self.rows)

    @property
    def all_blocks(self) -> int:
        """Of the grids of the file's layers; what the model has besides is not in the file."""
        return sum(row.all_blocks for row in self.rows)

    @property
    def norm(self) -> float:
        return total_norm([row.norm for row in self.rows])

    @property
    def base(self) -> str:
        """One fingerprint of all of the file's base layers: equal for two files of the same layers
        of the same base."""
        text = "\n".join(
            f"{row.name} {row.base}" for row in sorted(self.rows, key=lambda r: r.name)
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        held = sum(row.bytes for row in self.rows)
        weights = sum(row.weights for row in self.rows)
        kind = "adapter" if self.what == "adapters" else "masked"
        return {
            "version": self.version,
            "library": self.library,
            **({"name": self.name} if self.name else {}),
            "layers": {kind: len(self.rows), "dense": len(self.trained)},
            "bytes": {kind: held, "dense": sum(t["bytes"] for t in self.trained.values())},
            "weights": weights,
            "of_float32": over(held, 4 * weights),
            "of_bfloat16": over(held, 2 * weights),
            "blocks": self.blocks,
            "all_blocks": self.all_blocks,
            "density": over(self.blocks, self.all_blocks),
            "block_sizes": sorted({row.block for row in self.rows}),
            "ranks": sorted({row.rank for row in self.rows if row.rank is not None}),
            "base": self.base,
            "norm": self.norm,
            "trained": self.trained,
        }


@dataclass(frozen=True)
class GGUFFacts(Facts):
    """A GGUF file.

    Attributes:
        architecture: as in its metadata; "" where it names none.
        types: tensor type -> {"tensors", "weights", "bytes"}.
        layers: "int4", "int8", "dense" (linears, experts and embeddings) and "vectors" (norms,
            biases, routers) -> how many tensors become that in `load_gguf`; None where it refuses
            the file.
        bytes_here: of that model's Parameters with dense tensors in float32; None as well.
        refusal: why `load_gguf` refuses; empty where it does not.
    """

    kind: ClassVar[str] = "gguf"
    architecture: str
    types: dict[str, dict[str, int]]
    layers: Optional[dict[str, int]]
    bytes_here: Optional[int]
    refusal: str = ""

    def summary(self) -> dict[str, Any]:
        names = ("architecture", "types", "layers", "bytes_here", "refusal")
        weights = sum(t["weights"] for t in self.types.values())
        held = sum(t["bytes"] for t in self.types.values())
        sizes = {"weights": weights, "bytes": held, "bits_per_weight": over(8 * held, weights)}
        return {**{name: getattr(self, name) for name in names}, **sizes}


@dataclass(frozen=True)
class FolderFacts(Facts):
    """A transformers folder.

    Attributes:
        architecture: the class in its configuration. parameters: numbers, tied ones once.
        dtypes: of the tensors in its safetensors files -> bytes; empty where there are none.
        plan: what `accelerate(model)` would do to it; None where the file is of `nibblock.save`.
        saved: the facts of its model.safetensors where `convert` wrote it.
    """

    kind: ClassVar[str] = "transformers"
    architecture: str
    parameters: int
    dtypes: dict[str, int]
    plan: Optional[Report] = None
    saved: Optional[ModelFacts] = None

    def summary(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "architecture": self.architecture,
            "parameters": self.parameters,
            "dtypes": self.dtypes,
        }
        if self.plan is not None:
            out["accelerate"] = self.plan.to_dict()
        if self.saved is not None:
            out["saved"] = self.saved.to_dict()
        return out


@dataclass(frozen=True)
class RunFacts:
    """One method of a `finetune` folder.

    Attributes:
        name: of its folder. state: "done", or "not done" (stopped, or at work).
        settings: the options it was started with.
        checkpoint_step: of the newest checkpoint whose files have their stated sizes, or None.
        checkpoint_bytes: of that one.
        file, file_bytes: what it left for deployment, "" and 0 before it is done.
        result: the figures of result.json; None before it is done.
    """

    name: str
    state: str
    settings: dict[str, Any]
    checkpoint_step: Optional[int]
    checkpoint_bytes: int
    file: str
    file_bytes: int
    result: Optional[dict[str, Any]]


@dataclass(frozen=True)
class FinetuneFacts(Facts):
    """A folder of `python -m nibblock finetune --out`. Attributes: runs: the chosen method first,
    where its report says which that was."""

    kind: ClassVar[str] = "finetune"
    runs: tuple[RunFacts, ...]

    @property
    def results(self) -> list[dict[str, Any]]:
        """The figures of the runs that are done."""
        return [run.result for run in self.runs if run.result is not None]

    def summary(self) -> dict[str, Any]:
        return {"runs": [asdict(run) for run in self.runs]}


@dataclass(frozen=True)
class LayerChange:
    """What changed in one layer.

    Attributes:
        both, first_only, second_only: blocks, or for a tensor outside the blocks 1 or 0.
        norm: Frobenius norm of second - first. reference: of first, over the same weights.
    """

    name: str
    both: int
    first_only: int
    second_only: int
    norm: float
    reference: float

    @property
    def relative(self) -> Optional[float]:
        """norm over reference; None where the first one's is zero."""
        return over(self.norm, self.reference)


@dataclass(frozen=True)
class Changes:
    """What changed from one adapter or update to another of the same base.

    Attributes:
        first, second: the paths. what: "adapters" or "sparse_update".
        rows: every layer of either, in order. trained: tensors outside the blocks.
    """

    first: str
    second: str
    what: str
    rows: tuple[LayerChange, ...]
    trained: tuple[LayerChange, ...] = ()

    @property
    def norm(self) -> float:
        return total_norm([row.norm for row in self.rows])

    @property
    def relative(self) -> Optional[float]:
        """Of all layers together: norm of the difference over the norm of the first."""
        return over(self.norm, total_norm([row.reference for row in self.rows]))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, strings and numbers (JSON)."""
        totals = {
            key: sum(getattr(row, key) for row in self.rows)
            for key in ("both", "first_only", "second_only")
        }
        return plain(
            {
                "first": self.first,
                "second": self.second,
                "kind": self.what,
                **totals,
                "norm": self.norm,
                "relative": self.relative,
                "rows": [{**asdict(r), "relative": r.relative} for r in self.rows],
                "trained": [{**asdict(r), "relative": r.relative} for r in self.trained],
            }
        )
