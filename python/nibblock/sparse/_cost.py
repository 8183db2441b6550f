"""What a fine-tuning step costs, layer by layer, and which blocks a time budget buys.

A step pays the forward of every layer, the input gradient of every layer above the lowest trained
one, and for each trained block its weight gradient and its optimiser update. So where the lowest
block lies matters as much as how many there are.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Optional

import torch

_UPDATE_BYTES = 36  # AdamW in float32: parameter, gradient and two moments, read and written


@dataclass(frozen=True)
class CostModel:
    """The constants of a step's time.

    Attributes:
        flops: multiply-adds x 2 a second of a dense product.
        bandwidth: bytes a second that memory delivers.
        block_efficiency: share of `flops` that the gradient of blocks reaches.
        overhead: what a layer's forward and input gradient take beside the products of the linears
            (attention, norms, activations), as a factor.
    """

    flops: float
    bandwidth: float
    block_efficiency: float = 0.6
    overhead: float = 1.0

    @classmethod
    def measure(cls) -> CostModel:
        """Measures this machine once a process and thread count (a tenth of a second)."""
        return _measure(torch.get_num_threads())

    def product(self, rows: int, numbers: int) -> float:
        """Seconds of rows x (a weight of so many numbers)."""
        return 2.0 * rows * numbers / self.flops

    def update(self, numbers: int) -> float:
        """Seconds of an optimiser's update of so many numbers."""
        return _UPDATE_BYTES * numbers / self.bandwidth


@functools.cache
def _measure(threads: int) -> CostModel:
    a, b = torch.ones(512, 576), torch.ones(576, 1536)
    source = torch.ones(1 << 22)
    target = torch.empty_like(source)

    def best(work) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    flops = 2.0 * a.shape[0] * b.numel() / best(lambda: a @ b)
    bandwidth = 2.0 * source.numel() * 4 / best(lambda: target.copy_(source))
    return CostModel(flops, bandwidth)


@dataclass(frozen=True)
class LayerCost:
    """A linear as the cost model sees it."""

    level: int
    rows: int
    numbers: int  # N * K


class StepCost:
    """Times of one step of a model, in seconds.

    Args:
        model: the constants.
        layers: every linear, trained or not.
        parameters: how many numbers full fine-tuning updates.
        block: B.
    """

    def __init__(
        self, model: CostModel, layers: list[LayerCost], parameters: int, block: int
    ) -> None:
        self.model, self.layers, self.block = model, layers, block
        self.forward = model.overhead * sum(model.product(l.rows, l.numbers) for l in layers)
        gradients = sum(model.product(l.rows, l.numbers) for l in layers)
        self.full = self.forward + self.above(0) + gradients + model.update(parameters)

    def above(self, level: int) -> float:
        """Input gradients of the layers above a level."""
        paid = sum(self.model.product(l.rows, l.numbers) for l in self.layers if l.level > level)
        return self.model.overhead * paid

    def of_block(self, rows: int) -> float:
        """One trained block of a layer that sees so many rows."""
        numbers = self.block * self.block
        product = self.model.product(rows, numbers) / self.model.block_efficiency
        return product + self.model.update(numbers)

    def depth_cut(self, level: int) -> float:
        """Share of all input gradients that is not computed when `level` is the lowest trained.

        Counted in whole products: the same bits whatever rate the machine showed.
        """
        whole = sum(l.rows * l.numbers for l in self.layers if l.level > 0)
        paid = sum(l.rows * l.numbers for l in self.layers if l.level > level)
        return 1.0 - paid / whole if whole else 0.0


def as_seen(model: CostModel, layers: list[LayerCost], forward: float, linears: float) -> CostModel:
    """The constants that one forward shows: the rate of its linears, and what else it took.

    Both come from the same seconds, so that a busy machine does not look like a slow model.
    """
    work = sum(2.0 * l.rows * l.numbers for l in layers)
    if not 0 < linears <= forward or work <= 0:
        return model
    return replace(model, flops=work / linears, overhead=min(4.0, forward / linears))


def best_under_budget(
    scores: torch.Tensor,
    levels: torch.Tensor,
    costs: torch.Tensor,
    count: int,
    fixed: dict[int, float],
    budget: float,
    pick: Optional[Callable[[torch.Tensor, int], torch.Tensor]] = None,
) -> torch.Tensor:
    """The blocks of largest total score that a time buys.

    For every level: the best blocks at or above it until `count` or the time is used up; the level
    with the largest sum wins (of equal sums the higher one). Exact where all blocks cost the same.

    Args:
        scores, levels, costs: [M] of each block; costs in seconds.
        count: at most so many.
        fixed: level -> seconds of a step whose lowest trained layer is there, without blocks.
        budget: seconds.
        pick: (positions, best first; how many) -> the positions to take; None takes the first.
    Returns:
        Positions, sorted; empty if no level leaves time for a block.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    at = levels[order]
    best, chosen = -1.0, order[:0]
    for level in sorted(fixed, reverse=True):
        left = budget - fixed[level]
        if left <= 0:
            continue
        allowed = order[at >= level]
        allowed = allowed[:count] if pick is None else pick(allowed, count)
        number = int((costs[allowed].cumsum(0) <= left).sum())
        if not number:
            continue
        total = float(scores[allowed[:number]].clamp(min=0).sum())
        if total > best:
            best, chosen = total, allowed[:number]
    return chosen.sort().values
