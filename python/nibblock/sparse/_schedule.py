"""When a selection changes during a training: how many blocks, and how many are exchanged."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CubicSchedule:
    """Few blocks, then more, then the needless ones away, then a quiet end.

        grow     d(t) = peak - (peak - start) (1 - t / t_grow)^3
        hold     peak
        shrink   d(t) = end + (peak - end) (1 - t / t_shrink)^3,        t from the stage's begin
        heal     end, no penalty, no exchange

    Args:
        total: steps of the training.
        start, peak, end: densities, in [0, 1].
        grow, shrink, heal: each stage's share of the steps; what is left is held. 0 skips a stage.
    Raises:
        ValueError: a value out of range, or shares above 1 in all.
    Source: the cubic ramp of Zhu and Gupta, "To prune, or not to prune", 2017.
    Example:
        >>> schedule = nibblock.sparse.CubicSchedule(1000, start=0.005, peak=0.03, end=0.02)
        >>> schedule.density(0), schedule.stage(500)
        (0.005, 'hold')
    """

    total: int
    start: float = 0.005
    peak: float = 0.02
    end: float = 0.02
    grow: float = 0.3
    shrink: float = 0.3
    heal: float = 0.15

    def __post_init__(self) -> None:
        op = type(self).__name__
        if self.total < 1:
            raise ValueError(f"{op}: total must be at least 1, got {self.total}")
        for name in ("start", "peak", "end", "grow", "shrink", "heal"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{op}: {name} must be in [0, 1], got {value}")
        if not max(self.start, self.end) <= self.peak:
            raise ValueError(
                f"{op}: peak must be at least start and end, got {self.peak} for {self.start} and "
                f"{self.end}"
            )
        if self.grow + self.shrink + self.heal > 1 + 1e-9:
            raise ValueError(
                f"{op}: grow + shrink + heal must be at most 1, got "
                f"{self.grow + self.shrink + self.heal:g}"
            )

    def _bounds(self) -> tuple[float, float, float]:
        """Where growing ends, shrinking begins, healing begins; in steps."""
        heals = self.total * (1 - self.heal)
        return self.total * self.grow, heals - self.total * self.shrink, heals

    def stage(self, step: int) -> str:
        """ "grow", "hold", "shrink" or "heal"; before and behind the training the nearest one."""
        grown, shrinks, heals = self._bounds()
        if step < grown:
            return "grow"
        if step >= heals and self.heal > 0:
            return "heal"
        return "shrink" if step >= shrinks and self.shrink > 0 else "hold"

    def density(self, step: int) -> float:
        """How large a share of all blocks is trained in a step, counted from 0."""
        grown, shrinks, heals = self._bounds()
        stage = self.stage(step)
        if stage == "grow":
            return self.peak - (self.peak - self.start) * (1 - max(0, step) / grown) ** 3
        if stage == "hold":
            return self.peak
        if stage == "heal":
            return self.end
        done = min(1.0, (step - shrinks) / (heals - shrinks))
        return self.end + (self.peak - self.end) * (1 - done) ** 3


@dataclass(frozen=True)
class ReselectSchedule:
    """How large a share of the blocks is exchanged, and when.

        rate(t) = rate * (1 + cos(pi t / total)) / 2 every `every` steps; 0 in the last third

    Args:
        total: steps of the training.
        every: steps between two re-selections; few gradients judge badly, so rather 50 than 20.
        rate: the share at the beginning, in [0, 1].
    Raises:
        ValueError: a value out of range.
    Source: the cosine of Evci et al., "Rigging the lottery", 2020.
    """

    total: int
    every: int = 50
    rate: float = 0.2

    def __post_init__(self) -> None:
        op = type(self).__name__
        for name in ("total", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{op}: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"{op}: rate must be in [0, 1], got {self.rate}")

    def at(self, step: int) -> float:
        """The share to exchange after `step` steps; 0 for most of them."""
        if step < 1 or step % self.every or 3 * step > 2 * self.total:
            return 0.0
        return self.rate * 0.5 * (1 + math.cos(math.pi * step / self.total))
