"""The training loop: steps, evaluations, early stopping, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch

from nibblock._finetune import checkpoint as files
from nibblock._finetune.methods import Prepared
from nibblock._finetune.moving import make_moves
from nibblock._finetune.settings import Settings
from nibblock._finetune.task import Task
from nibblock._progress import Progress, ProgressOption
from nibblock.sparse.prefix_cache import PrefixCache, find_boundary

BEST = "best.safetensors"


@dataclass
class Record:
    """What a run has done so far; all of it is in every checkpoint.

    Attributes:
        step: how many steps are done. losses: of each step. evaluations: {"step", "seconds",
            "loss", ...}, the first before any step; seconds are of training alone.
        seconds: spent in steps. phases: of those, forward, backward and optimiser.
        best: step of the lowest evaluated loss. waited: evaluations since. stopped: why it ended
            before the last step, or "". state_bytes: see `Prepared.state_bytes`.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    phases: dict[str, float] = field(
        default_factory=lambda: {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
    )
    best: int = 0
    waited: int = 0
    stopped: str = ""
    state_bytes: int = 0

    @property
    def best_loss(self) -> float:
        return next((e["loss"] for e in self.evaluations if e["step"] == self.best), math.inf)


def total_steps(settings: Settings, task: Task) -> int:
    return settings.steps or settings.epochs * task.order.steps_per_epoch


def rate(settings: Settings, step: int, total: int) -> float:
    """The learning rate of a step, counted from 0: a pure function, so that a resumed run needs no
    scheduler's state."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / (settings.warmup + 1)
    done = (step - settings.warmup) / max(1, total - settings.warmup)
    shape = {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "constant": 1.0,
    }
    return settings.learning_rate * shape[settings.schedule]


def make_cache(
    prepared: Prepared, task: Task, settings: Settings, folder: Optional[Path]
) -> Optional[PrefixCache]:
    """The prefix cache of a run, or None; a line of `prepared.notes` says why there is none."""
    if not settings.cache:
        return None
    if settings.method in ("full", "lora", "shira"):
        return None  # they train the first layer
    trunk = task.trunk(prepared.model)
    try:
        stack, index = find_boundary(trunk)
        if index:
            cache = PrefixCache(trunk, max_bytes=settings.cache, folder=folder)
            prepared.notes.append(f"prefix cache: {stack}.0 to {index - 1} run once a row")
            return cache
        reason = f"{stack}.0 is trained"
    except ValueError as error:
        reason = str(error)
    prepared.notes.append(f"no prefix cache: {reason}")
    return None


def train(
    task: Task,
    prepared: Prepared,
    settings: Settings,
    folder: Optional[Path] = None,
    resume: Optional[files.Checkpoint] = None,
    progress: ProgressOption = False,
) -> Record:
    """Trains until the last step or an early stop; the best evaluated weights are in the model.

    Args:
        task, prepared, settings: what, how, and with which numbers.
        folder: where checkpoints, the best weights and the cache's file lie; None keeps the best
            weights in memory and writes nothing.
        resume: a checkpoint of this run; `prepared` was built with its blocks.
        progress: as of `nibblock._progress.Progress`.
    Returns:
        the record of the whole run, resumed parts included.
    Determinism: a run that was stopped and resumed gives the losses of one that was not, bit for
        bit, on the same machine with the same number of threads.
    """
    return _Loop(task, prepared, settings, folder, resume).run(progress)


def one_step(
    task: Task,
    prepared: Prepared,
    batch: Any,
    max_norm: float,
    lr: float,
    around_forward: AbstractContextManager,
    before_zero: Optional[Callable[[], None]] = None,
) -> tuple[float, dict[str, float]]:
    """One forward, backward and update.

    Returns:
        (loss, seconds of "forward", "backward" and "optimizer"; clipping is part of the last).
    """
    model, optimizer = prepared.model, prepared.optimizer
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    start = time.perf_counter()
    with around_forward:
        loss = task.loss(model, batch)
    value = loss.item()
    forward = time.perf_counter()
    loss.backward()
    backward = time.perf_counter()
    if max_norm and not prepared.clips:
        torch.nn.utils.clip_grad_norm_(prepared.trained().values(), max_norm)
    optimizer.step()
    if before_zero is not None:
        before_zero()
    optimizer.zero_grad(set_to_none=True)
    end = time.perf_counter()
    return value, {
        "forward": forward - start,
        "backward": backward - forward,
        "optimizer": end - backward,
    }


class _Loop:
    def __init__(self, task, prepared, settings, folder, resume) -> None:
        self.task, self.prepared, self.settings, self.folder = task, prepared, settings, folder
        self.total = total_steps(settings, task)
        self.every = settings.evaluate or max(1, self.total // 10)
        self.moves = make_moves(task, settings, self.total)
        self.cache = make_cache(prepared, task, settings, folder)
        self.record = Record()
        self.best: Optional[dict[str, torch.Tensor]] = None
        if resume is not None:
            self._restore(resume)
        else:
            torch.manual_seed(settings.seed)

    def _restore(self, resume: files.Checkpoint) -> None:
        self.record = Record(**resume.facts["record"])
        with torch.no_grad():
            for name, parameter in self.prepared.trained().items():
                parameter.copy_(resume.trained[name])
        self.prepared.optimizer.load_state_dict(resume.optimizer)
        torch.set_rng_state(resume.random)

    def run(self, progress: ProgressOption) -> Record:
        record = self.record
        bar = Progress(progress, self.total, self.settings.method, unit="steps")
        for _ in range(record.step):
            bar.step()
        try:
            if not record.evaluations:
                self._evaluate()
            while record.step < self.total and not record.stopped:
                self._step()
                bar.step()
                if record.step % self.every == 0 or record.step == self.total:
                    self._evaluate()
                every = self.settings.checkpoint or max(1, self.total // 10)
                if self.folder is not None and every > 0 and record.step % every == 0:
                    self._save()
            bar.close()
        finally:
            if self.cache is not None:
                self.prepared.notes.append(str(self.cache))
                self.cache.close()
        if record.best == 0 and record.step:
            self.prepared.notes.append("no evaluation was better than the first")
        elif self.moves is not None:
            self.prepared.notes.append("blocks moved: the weights are those of the last step")
        elif record.best != record.step:
            self._take_best()
        return record

    def _step(self) -> None:
        record = self.record
        indices = self.task.order.indices(record.step)
        value, phases = one_step(
            self.task,
            self.prepared,
            self.task.batch(indices),
            self.settings.max_norm,
            rate(self.settings, record.step, self.total),
            nullcontext() if self.cache is None else self.cache.batch(indices),
            self._before_zero,
        )
        record.step += 1
        if self.moves is not None:
            start = time.perf_counter()
            self.moves(record.step, self.prepared)
            phases["optimizer"] += time.perf_counter() - start
        record.losses.append(value)
        record.seconds += sum(phases.values())
        for name, seconds in phases.items():
            record.phases[name] += seconds
        if not math.isfinite(value):
            record.stopped = f"the loss was {value} at step {record.step}"

    def _before_zero(self) -> None:
        if not self.record.state_bytes:  # once, while the gradients are there
            self.record.state_bytes = self.prepared.state_bytes()

    def _evaluate(self) -> None:
        record = self.record
        self.prepared.model.eval()
        figures = self.task.evaluate(self.prepared.model, self._around_held_out)
        record.evaluations.append({"step": record.step, "seconds": record.seconds, **figures})
        best = min((e["loss"] for e in record.evaluations[:-1]), default=math.inf)
        if figures["loss"] < best or len(record.evaluations) == 1:
            record.best, record.waited = record.step, 0
            self._keep_best()
            return
        record.waited += 1
        if self.settings.patience and record.waited >= self.settings.patience:
            record.stopped = f"no better loss in {record.waited} evaluations"

    def _around_held_out(self, rows: torch.Tensor) -> AbstractContextManager:
        """Held-out rows are numbered behind the training rows, and kept once those are: a cache
        that is too small for both serves the steps."""
        if self.cache is None or self.record.step < self.task.order.steps_per_epoch:
            return nullcontext()
        return self.cache.batch(rows + self.task.order.rows)

    def _keep_best(self) -> None:
        if self.record.step == 0 or self.moves is not None:
            return  # what the model held before; it is made again from scratch
        trained = {n: p.detach().clone() for n, p in self.prepared.trained().items()}
        if self.folder is None:
            self.best = trained
        else:
            files.write_tensors(self.folder / BEST, trained)

    def _take_best(self) -> None:
        """The best evaluated weights back into the model."""
        best = self.best
        if self.folder is not None:
            best = files.read_tensors(self.folder / BEST)
        with torch.no_grad():
            for name, parameter in self.prepared.trained().items():
                parameter.copy_(best[name])

    def _save(self) -> None:
        prepared = self.prepared
        files.save(
            self.folder / "checkpoints",
            self.record.step,
            files.Checkpoint(
                trained=dict(prepared.trained()),
                blocks=None if prepared.selection is None else dict(prepared.selection),
                random=torch.get_rng_state(),
                optimizer=prepared.optimizer.state_dict(),
                facts=self._facts(),
            ),
        )

    def _facts(self) -> dict[str, Any]:
        return {
            "settings": self.settings.to_json(),
            "select_seconds": self.prepared.seconds,
            "record": vars(self.record),
        }
