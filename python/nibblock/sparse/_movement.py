"""A mask that is learned while the model trains: movement scores of blocks, never of elements."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Union

import torch
from torch import nn

from nibblock import ops as _ops
from nibblock._config import Where
from nibblock.ops import _block_checks
from nibblock.sparse import _choose
from nibblock.sparse._impact import as_selection, weight_of
from nibblock.sparse._selection import Selection
from nibblock.sparse._taps import Site, Taps, find_sites, targets_of


class MovementMask:
    """One number a block that follows where training moves it.

        m_IJ <- m_IJ - lr * <W_IJ, dL / dW_IJ>          on score steps

    m rises where a step moves the weights of a block away from zero, and falls where it moves them
    towards it; the largest m are the blocks to keep. The gradient of W is never formed: a score
    step costs one exact pass of `nibblock.ops.block_scores_`, in its memory.

    Args:
        model: any module tree on the CPU; its weights may be trained, frozen, in 4 bits, or have
            adapters, which count as part of W.
        block: B, one of 16, 32, 64, 128.
        lr: the rate of m.
        where, skip: which linears, as in `nibblock.select_blocks`.

    Attributes:
        values: layer name -> float32 [ceil(N/B), ceil(K/B)], m.
        steps: how many score steps it has seen.

    Raises:
        TypeError: model is not a module. ValueError: no linear, or a block edge that does not
        exist.
    Determinism: as `nibblock.ops.block_scores_`.
    Source: Sanh, Wolf and Rush, "Movement pruning: adaptive sparsity by fine-tuning", 2020; by
        blocks: Lagunas et al., "Block pruning for faster transformers", 2021.
    Example:
        >>> mask = nibblock.sparse.MovementMask(model, block=32)
        >>> for step, batch in enumerate(batches):
        ...     with mask.score() if step % 4 == 0 else contextlib.nullcontext():
        ...         loss_fn(model, batch).backward()
        ...     optimizer.step()
        >>> selection = mask.selection(density=0.1)
    """

    def __init__(
        self,
        model: nn.Module,
        block: int = 32,
        lr: float = 1.0,
        where: Where = None,
        skip: Union[str, Iterable[str]] = (),
    ) -> None:
        op = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
        _block_checks.check_block(op, block)
        self.block, self.lr, self.steps = block, lr, 0
        self._model = model
        self._sites = find_sites(op, model, where, skip)
        targets = targets_of(op, self._sites, "score")
        self.values = {site.name: torch.zeros(site.grid(block)) for site in targets}

    @contextmanager
    def score(self) -> Iterator[MovementMask]:
        """A score step: whatever goes forward and backward inside moves m.

        Nothing else changes: neither gradients nor what the model computes.
        """
        taps = Taps(type(self).__name__, self._sites, self._receive)
        with taps.open():
            taps.begin()
            yield self
            taps.finish()
        self.steps += 1

    def _receive(self, site: Site, grad: torch.Tensor, x: torch.Tensor) -> None:
        moved = torch.zeros_like(self.values[site.name])
        _ops.block_scores_(
            torch.zeros_like(moved), moved, grad, x, weight_of(site.module), block=self.block
        )
        self.values[site.name].sub_(moved, alpha=self.lr)

    def selection(self, density: float) -> Selection:
        """The blocks of largest m in all layers together.

        Args:
            density: share of all blocks, in (0, 1].
        Returns:
            A `Selection` by "learned movement".
        Raises:
            ValueError: a density out of range, or no score step yet.
        """
        op = f"{type(self).__name__}.selection"
        _choose.check_density(op, density)
        if not self.steps:
            raise ValueError(f"{op}: a score step must come first, got none; use score()")
        scores = {name: m.double() for name, m in self.values.items()}
        return as_selection(self._sites, scores, self.block, "learned movement", density)

    def state_dict(self) -> dict[str, Any]:
        """m and the number of steps, for a checkpoint."""
        return {"steps": self.steps, "values": {n: m.clone() for n, m in self.values.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; ValueError where layers or shapes differ."""
        found = state["values"]
        for name in [*self.values, *found]:
            have = [list(v[name].shape) if name in v else "none" for v in (self.values, found)]
            if have[0] != have[1]:
                raise ValueError(
                    f"{type(self).__name__}: state of {name} must be {have[0]}, got {have[1]}"
                )
        self.steps = int(state["steps"])
        for name, m in self.values.items():
            m.copy_(found[name])
