"""Selections that change while a model is trained: what the ablation compares with a static one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from nibblock._finetune.settings import Settings
from nibblock._finetune.task import Task

AfterStep = Callable[[int, Any], None]  # (steps done, Prepared)
LOOKED_AT = 4  # batches of a re-selection: those of the next steps
STRENGTH = 0.1  # of the penalty, in steps of an adaptive optimiser
HEAL = 0.8  # of the run; afterwards nothing moves
START, PEAK = 0.25, 1.5  # of the wanted density, for the progressive schedule


def make_moves(task: Task, settings: Settings, total: int) -> Optional[AfterStep]:
    """What is done after every step of a run whose blocks move; None for a static selection."""
    build = {"reselect": _reselect, "prox": _prox, "progressive": _progressive}
    return build[settings.moves](task, settings, total) if settings.moves else None


def _next_batches(task: Task, step: int) -> list[Any]:
    return [task.batch(task.order.indices(step + i)) for i in range(LOOKED_AT)]


def _reselect(task: Task, settings: Settings, total: int) -> AfterStep:
    from nibblock.sparse import ReselectSchedule, reselect

    schedule = ReselectSchedule(total, every=max(1, total // 8))

    def after(step: int, prepared: Any) -> None:
        share = schedule.at(step)
        if share > 0:
            batches = _next_batches(task, step)
            reselect(prepared.model, prepared.optimizer, batches, task.loss, share, seed=step)

    return after


def _prox(task: Task, settings: Settings, total: int) -> AfterStep:
    from nibblock.sparse import GroupLasso, drop_idle_blocks

    made: list[GroupLasso] = []

    def after(step: int, prepared: Any) -> None:
        if not made:
            made.append(GroupLasso(prepared.model, STRENGTH))
        if step - 1 < HEAL * total:
            made[0].step(prepared.optimizer.param_groups[0]["lr"])
            if step >= HEAL * total:  # the last time: what is where it began leaves
                drop_idle_blocks(prepared.model, prepared.optimizer)

    return after


def _progressive(task: Task, settings: Settings, total: int) -> AfterStep:
    from nibblock.sparse import CubicSchedule, resize

    wanted = settings.density
    schedule = CubicSchedule(total, start=START * wanted, peak=min(1.0, PEAK * wanted), end=wanted)
    every = max(1, total // 16)

    def after(step: int, prepared: Any) -> None:
        if step % every == 0 and step < total:
            batches = _next_batches(task, step)
            resize(
                prepared.model, prepared.optimizer, schedule.density(step), batches, task.loss,
                seed=step,
            )  # fmt: skip

    return after
