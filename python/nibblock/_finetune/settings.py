"""What one training run is asked to do: plain values that JSON can hold."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Optional

from nibblock.sparse._impact import MODES

METHODS = ("full", "lora", "masked", "adapter")
BASELINES = (*METHODS, "lora-cut", "full-cut", "shira")
CUT_METHODS = ("lora-cut", "full-cut")  # trained from the chosen method's lowest layer upwards
SELECTIONS = ("impact", "movement", "magnitude", "random", "even")
MOVES = ("", "reselect", "prox", "progressive")
SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "muon")
COMPUTES = ("bf16", "int8")
LEARNING_RATES = {  # where --lr is not given
    "full": 5e-5,
    "full-cut": 5e-5,
    "lora": 5e-4,
    "lora-cut": 5e-4,
    "shira": 5e-4,
    "masked": 2e-3,  # few weights want larger steps than many
    "adapter": 2e-3,
}
MUON_LEARNING_RATE = 1e-2  # an entry moves by about a fifth of it a step, by AdamW by all of it


@dataclass(frozen=True)
class Settings:
    """One run of one method. Options of the command line have the same names."""

    model: str
    data: str = ""  # "" for the help topics of the standard library
    method: str = "masked"
    density: float = 0.02
    block: int = 32
    budget: float = 0.0  # of full fine-tuning's step time, for the selection; 0 for no limit
    select: str = "impact"
    mode: str = "gain"  # of impact; see select_blocks
    spread: float = 1.0  # caps of impact, in even shares of a layer, row and column; 0 for none
    moves: str = ""  # how the selection changes while it is trained; "" for not at all
    batches: int = 4  # that the selection scores; twice as many chose hardly better blocks
    rank: int = 8  # of LoRA, and of SHiRA's count
    int4: bool = False
    compute: str = "bf16"  # of a 4-bit base; "int8" also takes gradients through it in int8
    tokens: int = 512  # a step
    seq: int = 128
    epochs: int = 1
    steps: int = 0  # 0 for what the epochs hold
    optimizer: str = "adamw"  # of the trained blocks
    lr: float = 0.0  # 0 for the default of the method and optimizer
    schedule: str = "linear"
    warmup: int = 0  # steps
    weight_decay: float = 0.0
    max_norm: float = 1.0  # 0 for no clipping
    valid: float = 0.1
    valid_rows: int = 64
    patience: int = 0  # evaluations without a better loss before it stops; 0 for never
    evaluate: int = 0  # every so many steps; 0 for ten times a run
    checkpoint: int = 0  # every so many steps; 0 for ten times a run, -1 for never
    cache: int = 0  # bytes of the prefix cache; 0 for off
    cut: str = ""  # the lowest trained layer of a method with a cut
    seed: int = 0
    threads: int = 0  # 0 for torch's

    def checked(self) -> Settings:
        """self; ValueError names the option whose value is out of range."""
        choices = {
            "method": BASELINES,
            "select": SELECTIONS,
            "mode": MODES,
            "schedule": SCHEDULES,
            "moves": MOVES,
            "optimizer": OPTIMIZERS,
            "compute": COMPUTES,
            "block": (16, 32, 64, 128),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(str(a) for a in allowed)
                _refuse(name, f"one of {listed}", getattr(self, name))
        least = {"tokens": 2, "seq": 2, "epochs": 1, "batches": 1, "rank": 1, "valid_rows": 1}
        least["checkpoint"] = -1
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) or isinstance(value, bool):
                continue
            low = least.get(field.name, 0)
            if not math.isfinite(value) or value < low:
                _refuse(field.name, f"at least {low}", value)
        if not 0 < self.density <= 1:
            _refuse("density", "in (0, 1]", self.density)
        if not 0 < self.valid < 1:
            _refuse("valid", "in (0, 1)", self.valid)
        if 0 < self.spread < 1:
            _refuse("spread", "at least 1, or 0 for no caps", self.spread)
        if self.budget > 1:
            _refuse("budget", "in (0, 1], a share of full fine-tuning's step", self.budget)
        if self.tokens < self.seq:
            _refuse("tokens", f"at least --seq ({self.seq})", self.tokens)
        if self.moves and (self.method != "masked" or self.checkpoint >= 0):
            raise ValueError(
                f"finetune: --moves must go with --method masked and --checkpoint -1, got "
                f"{self.method} and {self.checkpoint}: a checkpoint holds one list of blocks"
            )
        if self.optimizer == "muon" and self.method not in ("masked", "adapter"):
            raise ValueError(
                f"finetune: --optimizer muon must go with --method masked or adapter, got "
                f"{self.method}: it makes the updates of trained blocks orthogonal"
            )
        if self.compute == "int8" and not self.int4:
            raise ValueError(
                "finetune: --compute int8 must go with --int4, got a dense base: "
                "it is the arithmetic of packed weights"
            )
        if self.int4 and self.method != "adapter":
            raise ValueError(
                f"finetune: --int4 must go with --method adapter, got {self.method}: "
                f"packed weights cannot be trained in place"
            )
        return self

    @property
    def rows_per_step(self) -> int:
        return self.tokens // self.seq

    @property
    def learning_rate(self) -> float:
        default = MUON_LEARNING_RATE if self.optimizer == "muon" else LEARNING_RATES[self.method]
        return self.lr or default

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Settings:
        return Settings(**values).checked()

    def differs(self, other: dict[str, Any]) -> Optional[str]:
        """The first option whose value another run's settings do not share, or None. How often a
        checkpoint is written may differ: no loss depends on it."""
        # Runs of before these options do not name them.
        other = {"optimizer": "adamw", "compute": "bf16", **other}
        for name, value in self.to_json().items():
            if name != "checkpoint" and other.get(name) != value:
                return name
        return None


def _refuse(name: str, need: str, got: object) -> None:
    raise ValueError(f"finetune: --{name.replace('_', '-')} must be {need}, got {got}")


def parse_size(text: str) -> int:
    """Bytes from "off", "0", "512M", "2G", "4096".

    Raises:
        ValueError: anything else.
    """
    units = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
    lowered = text.strip().lower()
    if lowered == "off":
        return 0
    number, unit = (lowered[:-1], units[lowered[-1]]) if lowered[-1:] in units else (lowered, 1)
    try:
        value = float(number) * unit
    except ValueError:
        value = -1.0
    if not 0 <= value < 1 << 62:
        raise ValueError(f'finetune: --cache must be a size as "512M" or "off", got {text!r}')
    return int(value)
