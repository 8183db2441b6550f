"""What the fine-tuning bench runs, a cell at a time: (bed, variant, learning rate, seed).

Every cell is a process of its own. A finished one is appended to a file of JSON lines and never run
again, so the bench can be stopped and started at will. Learning rates are swept with the first
seed, equally many for every variant; the other seeds run at the best of them, or at the two best,
of which the one with the lower mean over all seeds counts: one seed's best is often another's
second.

Blocks are 2 % of all, or 8 %, which is about what a training state of a tenth allows. Blocks of a
cut are all above it, as many as without. They are chosen by impact unless a name says otherwise;
"even" spreads them without looking at anything.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from nibblock._finetune.settings import Settings

from .finetune_beds import BEDS, Bed, build, planted_recall

MANY = 0.08
PLANTED_SEEDS = (0, 1, 2, 3, 4)
CACHE = 4 << 30


@dataclass(frozen=True)
class Variant:
    """A method as it is compared.

    Attributes:
        method, select: as of the settings. cut: how much is trained, one of the bed's `cuts`; ""
            for everything. cache: whether what is below runs once a row. density: share of all
            blocks. int4: a 4-bit base. compute: of that base. budget: of the selection. moves: how
            the selection changes. optimizer: of the trained blocks. beds: where it runs.
            experiments: which of X1 to X7 read it.
        rate_of: a variant whose best learning rate it takes unswept: one whose losses are the same
            bit for bit, or the one that an ablation changes. seeds: how many of the bed's.
        finalists: with how many of its rates all seeds run.
    """

    method: str
    select: str = "impact"
    mode: str = "gain"
    cut: str = ""
    cache: bool = False
    density: float = 0.02
    int4: bool = False
    compute: str = "bf16"
    budget: float = 0.0
    moves: str = ""
    optimizer: str = "adamw"
    beds: tuple[str, ...] = ("smollm2", "minilm")
    experiments: str = "X1 X2 X3 X4"
    rate_of: str = ""
    seeds: int = 3
    finalists: int = 1

    def settings(self, bed: Bed, lr: float, seed: int) -> Settings:
        return dataclasses.replace(
            bed.settings,
            method=self.method,
            select=self.select,
            mode=self.mode,
            cut=bed.cuts[self.cut] if self.cut else "",
            cache=CACHE if self.cache else 0,
            density=self.density,
            int4=self.int4,
            compute=self.compute,
            budget=self.budget,
            moves=self.moves,
            optimizer=self.optimizer,
            lr=lr,
            seed=seed,
        )


THIRD = "top third"
OURS_EVEN = "ours, even blocks, top third, cache"
OURS_MANY = "ours, 8 %"
RANDOM_MANY = "random blocks, 8 %"
OURS_MUON = "ours, 8 %, Muon"
RANDOM_MUON = "random blocks, 8 %, Muon"
INT4_MUON = "random blocks, 8 %, Muon, int4 base in int8"
OURS_FEW = "ours"
RIVALS = {  # by whom ours is compared with seed by seed: which of ours
    "random blocks": OURS_FEW,
    "magnitude blocks": OURS_FEW,
    RANDOM_MANY: OURS_MANY,
    RANDOM_MUON: OURS_MUON,
}
OURS_THIRD = "ours, top third, cache"
VARIANTS = {
    "full": Variant("full", finalists=2),
    OURS_EVEN: Variant("masked", "even", cut=THIRD, cache=True),
    "ours, even blocks, top third": Variant("masked", "even", cut=THIRD, rate_of=OURS_EVEN),
    OURS_MANY: Variant("masked", density=MANY, finalists=2),
    OURS_MUON: Variant("masked", density=MANY, optimizer="muon", finalists=2),
    OURS_FEW: Variant("masked", experiments="X1 X2 X3 X4 X6", seeds=5),
    "ours, Muon": Variant("masked", optimizer="muon"),
    RANDOM_MANY: Variant("masked", "random", density=MANY, experiments="X6", finalists=2),
    RANDOM_MUON: Variant(
        "masked", "random", density=MANY, optimizer="muon", experiments="X6", finalists=2
    ),
    # The same updates on the same start: the file that the bed loads is a 4-bit one.
    INT4_MUON: Variant(
        "adapter",
        "random",
        density=MANY,
        int4=True,
        compute="int8",
        optimizer="muon",
        beds=("smollm2",),
        experiments="X1 X2 X4",
        rate_of=RANDOM_MUON,
    ),
    "random blocks": Variant("masked", "random", experiments="X6", seeds=5),
    "magnitude blocks": Variant("masked", "magnitude", experiments="X6", seeds=5),
    "even blocks": Variant("masked", "even", experiments="X6"),
    "blocks by gradient norm": Variant("masked", mode="sketch", experiments="X6"),
    OURS_THIRD: Variant("masked", cut=THIRD, cache=True, experiments="X1 X2 X3 X4 X7"),
    "lora": Variant("lora", finalists=2),
    "shira": Variant("shira"),
    "lora, top third, cache": Variant("lora-cut", cut=THIRD, cache=True),
    "full, top third, cache": Variant("full-cut", cut=THIRD, cache=True),
    "ours, top third": Variant("masked", cut=THIRD, rate_of=OURS_THIRD),
    "lora, top third": Variant("lora-cut", cut=THIRD, rate_of="lora, top third, cache"),
    "full, top third": Variant("full-cut", cut=THIRD, rate_of="full, top third, cache"),
    "ours, int4 base": Variant("adapter", int4=True, beds=("smollm2",), experiments="X3 X4"),
    "ours, adapter": Variant("adapter", experiments="X3 X7"),
    "ours, budget 0.5": Variant("masked", budget=0.5, cache=True, experiments="X1 X7"),
    **{
        f"ours, {what}, top third, cache": Variant(
            "masked",
            select,
            cut=THIRD,
            cache=True,
            moves=moves,
            experiments="X7",
            rate_of=OURS_THIRD,
        )
        for what, select, moves in (
            ("re-selecting", "impact", "reselect"),
            ("group lasso", "impact", "prox"),
            ("progressive", "impact", "progressive"),
            ("movement", "movement", ""),
        )
    },
}
PLANTED = {
    "impact, gain": {"method": "impact", "mode": "gain"},
    "impact, exact": {"method": "impact", "mode": "exact"},
    "impact, sketch": {"method": "impact", "mode": "sketch"},
    "magnitude blocks": {"method": "magnitude"},
    "random blocks": {"method": "random"},
}


@dataclass(frozen=True)
class Cell:
    bed: str
    variant: str
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.bed}/{self.variant}/{self.lr:g}/{self.seed}"


class Cells:
    """The finished cells of a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"bench: line {number} of {path.name} must be JSON, got {line[:40]!r}; "
                        f"delete that line, its cell runs again"
                    ) from error
                self.done[Cell(**row["cell"]).key] = row

    def add(self, row: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[Cell(**row["cell"]).key] = row

    def of(self, bed: str, variant: str) -> list[dict[str, Any]]:
        return [
            row
            for row in self.done.values()
            if (row["cell"]["bed"], row["cell"]["variant"]) == (bed, variant)
        ]

    def finalists(self, bed: str, variant: str) -> list[float]:
        """The learning rates of the lowest held-out losses with the first seed, best first; as many
        as the variant asks for, none until the whole sweep is done."""
        variant = VARIANTS[variant].rate_of or variant
        swept = {lr: self._loss(bed, variant, lr, BEDS[bed].seeds[0]) for lr in rates(bed, variant)}
        if None in swept.values():
            return []
        return sorted(swept, key=lambda lr: swept[lr])[: VARIANTS[variant].finalists]

    def best_rate(self, bed: str, variant: str) -> Optional[float]:
        """Of the finalists the one with the lowest mean over all seeds, or, until they have all
        run, the first seed's best; None until the whole sweep is done."""
        variant = VARIANTS[variant].rate_of or variant
        found = self.finalists(bed, variant)
        seeds = BEDS[bed].seeds[: VARIANTS[variant].seeds]
        losses = {lr: [self._loss(bed, variant, lr, seed) for seed in seeds] for lr in found}
        if not found or any(None in of_rate for of_rate in losses.values()):
            return found[0] if found else None
        return min(found, key=lambda lr: sum(losses[lr]))

    def _loss(self, bed: str, variant: str, lr: float, seed: int) -> Optional[float]:
        row = self.done.get(Cell(bed, variant, lr, seed).key)
        if row is None:
            return None
        return row["result"]["best"]["loss"] if "best" in row["result"] else math.inf


def rates(bed: str, variant: str) -> tuple[float, ...]:
    """The learning rates of a variant's sweep."""
    of = VARIANTS[variant]
    full, others, muon = BEDS[bed].rates
    if of.optimizer == "muon":
        return muon
    return full if of.method.startswith("full") else others


def due(
    cells: Cells, beds: list[str], variants: list[str], more: Sequence[tuple[float, int]] = ()
) -> Iterator[Cell]:
    """The cells that are still to be run, in the order of their worth: sweeps before seeds, and of
    both the variants in the order of the table; then these rates and seeds with each. Asks again
    after every cell."""
    while True:
        found = next(_missing(cells, beds, variants, more), None)
        if found is None:
            return
        yield found
        if found.key not in cells.done:
            raise RuntimeError(f"bench: {found.key} was not run")


def _missing(cells, beds, variants, more=()) -> Iterator[Cell]:
    if "planted" in beds:
        for seed in PLANTED_SEEDS:
            for name in PLANTED:
                cell = Cell("planted", name, 0.0, seed)
                if cell.key not in cells.done:
                    yield cell
    pairs = [
        (bed, variant)
        for bed in beds
        if bed in BEDS
        for variant in variants
        if bed in VARIANTS[variant].beds
    ]
    for bed, variant in pairs:
        for lr in () if VARIANTS[variant].rate_of else rates(bed, variant):
            cell = Cell(bed, variant, lr, BEDS[bed].seeds[0])
            if cell.key not in cells.done:
                yield cell
    for at in range(max((len(BEDS[bed].seeds) for bed, _ in pairs), default=0)):
        for bed, variant in pairs:
            if at >= min(VARIANTS[variant].seeds, len(BEDS[bed].seeds)):
                continue
            for lr in cells.finalists(bed, variant):
                cell = Cell(bed, variant, lr, BEDS[bed].seeds[at])
                if cell.key not in cells.done:
                    yield cell
    for lr, seed in more:
        for bed, variant in pairs:
            cell = Cell(bed, variant, lr, seed)
            if cell.key not in cells.done:
                yield cell


def run(cell: Cell, threads: int = 0) -> dict[str, Any]:
    """Runs a cell in a child; a cell that fails is kept too, with its reason, and so never retried.

    Returns:
        {"cell", "result" or {"error": text}, "wall_seconds"}.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nibblock-cell-") as folder:
        process = start(cell, threads, Path(folder))
        process.wait()
        return row_of(cell, process, Path(folder), began)


def start(
    cell: Cell, threads: int, folder: Path, turns: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Starts a cell's child, which works in `folder`; `turns`: as of `_in_turn`, or none."""
    task = {"cell": dataclasses.asdict(cell), "threads": threads, "turns": list(turns)}
    (folder / "cell.json").write_text(json.dumps(task), encoding="utf-8")
    command = [sys.executable, "-m", f"{__package__}.finetune_cells", str(folder)]
    with open(folder / "errors", "wb") as errors:
        return subprocess.Popen(command, stderr=errors, pass_fds=turns)


def row_of(cell: Cell, process: subprocess.Popen, folder: Path, began: float) -> dict[str, Any]:
    """What a child that has ended leaves."""
    file = folder / "result.json"
    if process.returncode == 0 and file.is_file():
        result = json.loads(file.read_text(encoding="utf-8"))
    else:
        text = (folder / "errors").read_text(encoding="utf-8", errors="replace")
        lines = text.strip().splitlines() or [f"exit status {process.returncode}"]
        result = {"error": lines[-1]}
    return {
        "cell": dataclasses.asdict(cell),
        "result": result,
        "wall_seconds": round(time.monotonic() - began, 1),
    }


@contextmanager
def _in_turn(go: int, done: int) -> Iterator[None]:
    """Takes turns with other cells: everything up to the end of a step is one.

    Args:
        go, done: ends of two pipes: a byte is read from the first at the start of a turn and
            written to the second at its end.
    """
    from nibblock._finetune import loop

    own = loop.one_step

    def wait() -> None:
        if not os.read(go, 1):
            raise SystemExit("the bench that this cell was part of has ended")

    def one_step(*args: Any, **options: Any) -> Any:
        out = own(*args, **options)
        os.write(done, b".")
        wait()
        return out

    wait()
    loop.one_step = one_step
    try:
        yield
    finally:
        loop.one_step = own


def child(folder: str) -> int:
    """The child's part: reads FOLDER/cell.json, writes FOLDER/result.json."""
    import torch
    from nibblock._finetune import worker

    place = Path(folder)
    task = json.loads((place / "cell.json").read_text(encoding="utf-8"))
    cell = Cell(**task["cell"])
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    if cell.bed == "planted":
        began = time.perf_counter()
        recall = planted_recall(PLANTED[cell.variant], cell.seed)
        result: dict[str, Any] = {"recall": recall, "seconds": time.perf_counter() - began}
    else:
        variant, bed = VARIANTS[cell.variant], BEDS[cell.bed]
        settings = variant.settings(bed, cell.lr, cell.seed)
        with _in_turn(*task["turns"]) if task["turns"] else nullcontext():
            result = worker.run(settings, place, False, progress=False, build=build)
        del result["losses"]
    result["threads"] = torch.get_num_threads()
    (place / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[1]))
