"""Blocks that are not needed: shrunk to nothing by a penalty, then truly removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

import torch
from torch import nn

from nibblock import ops as _ops
from nibblock.nn import MaskedLinear
from nibblock.sparse._layers import (
    Optimizer,
    change_norms,
    origin,
    put_blocks,
    sparse_layers,
)


class GroupLasso:
    """A penalty on the size of every block's change, as a step of its own after the optimiser's.

        values_z <- origin_z + (values_z - origin_z) * max(0, 1 - lr strength_z B / ||.||_F)

    the proximal step of  sum_z strength_z B ||values_z - origin_z||_F;  B is the root of a block's
    size, so that a strength means the same for every block edge. A block whose change is smaller
    than the step is exactly its origin afterwards, and `drop_idle_blocks` frees it.

    Args:
        model: with `MaskedLinear`s (origin: the weight before training, where they keep it),
            `AdapterLinear`s and `BlockSparseLinear`s (origin: zero).
        strength: of the penalty, 0 or more; may be changed at any time.
        weights: layer name -> [Z] float, a factor for each block: small where the impact is large,
            say. Layers it does not name have 1.
    Raises:
        TypeError: model is not a module. ValueError: no such layers, a negative strength, weights
        of a layer that is none or of another length.
    Determinism and numerics: as `nibblock.ops.prox_blocks_`.
    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables",
        2006; with an adaptive optimiser the step is that of gradient descent, which is the
        convention of proximal pruning.
    Example:
        >>> lasso = nibblock.sparse.GroupLasso(model, strength=1e-4)
        >>> optimizer.step()
        >>> lasso.step(lr=optimizer.param_groups[0]["lr"])
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        weights: Optional[Mapping[str, torch.Tensor]] = None,
    ) -> None:
        op = type(self).__name__
        if not strength >= 0:
            raise ValueError(f"{op}: strength must be at least 0, got {strength}")
        self.strength = float(strength)
        self._layers = sparse_layers(op, model, pruned=True)
        self._weights = {} if weights is None else dict(weights)
        for name, factor in self._weights.items():
            if name not in self._layers:
                raise ValueError(f"{op}: weights must name layers with blocks, got {name!r}")
            self._check_weights(name, factor)
        self._origins: dict[str, tuple] = {}

    def _check_weights(self, name: str, factor: torch.Tensor) -> None:
        need = len(self._layers[name].values)
        if list(factor.shape) != [need]:
            raise ValueError(
                f"{type(self).__name__}: weights of {name} must be [{need}], got "
                f"{list(factor.shape)}"
            )

    def _origin(self, name: str) -> torch.Tensor:
        """The origin, gathered again only when the block list is another."""
        layer = self._layers[name]
        key = (layer.blocks, layer.values.dtype)
        known = self._origins.get(name)
        if known is None or known[0][0] is not key[0] or known[0][1] != key[1]:
            start = origin(layer)
            start = torch.zeros_like(layer.values.detach()) if start is None else start
            known = self._origins[name] = (key, start.contiguous())
        return known[1]

    @torch.no_grad()
    def step(self, lr: float) -> dict[str, torch.Tensor]:
        """Shrinks every block once.

        Args:
            lr: the learning rate of the optimiser's step before.
        Returns:
            Layer name -> float32 [Z], the size of each block's change afterwards; exactly 0 for
            those that are gone.
        """
        groups: dict[tuple, list[str]] = {}
        for name, layer in self._layers.items():
            groups.setdefault((layer.values.device, layer.values.dtype), []).append(name)
        out: dict[str, torch.Tensor] = {}
        for names in groups.values():
            values = [self._layers[n].values.detach() for n in names]
            thresholds = []
            for name, v in zip(names, values):
                factor = self._weights.get(name)
                limit = torch.full((len(v),), lr * self.strength * v.shape[-1], device=v.device)
                if factor is not None:
                    self._check_weights(name, factor)
                    limit *= factor.to(limit)
                thresholds.append(limit)
            origins = [self._origin(n) for n in names]
            norms = _ops.prox_blocks_(values, origins, thresholds)
            out.update(zip(names, norms.split([len(v) for v in values])))
            for name in names:
                if isinstance(self._layers[name], MaskedLinear):
                    self._layers[name].sync()
        return {name: out[name] for name in self._layers}


def idle_blocks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Which blocks change nothing: layer name -> bool [Z].

    Those of a `MaskedLinear` that are what they were before training (where it keeps that), those
    of an `AdapterLinear` or `BlockSparseLinear` that are zero. Raises as `drop_idle_blocks`.
    """
    layers = sparse_layers("idle_blocks", model, pruned=True)
    return {name: change_norms(layer) == 0 for name, layer in layers.items()}


def drop_idle_blocks(model: nn.Module, optimizer: Optimizer = None) -> dict[str, int]:
    """Removes the blocks that change nothing: their values, gradients and optimiser state are
    freed.

    Args:
        model: with `MaskedLinear`s, `AdapterLinear`s or `BlockSparseLinear`s.
        optimizer: whose state shall follow, or None.
    Returns:
        Layer name -> how many blocks went, for the layers that lost any. The model computes what
        it computed before.
    Raises:
        TypeError: model is not a module. ValueError: no such layers, or a merged adapter.
    Example:
        >>> nibblock.sparse.drop_idle_blocks(model, optimizer)
        {'layers.0.mlp': 3}
    """
    out = {}
    for name, layer in sparse_layers("drop_idle_blocks", model, pruned=True).items():
        idle = (change_norms(layer) == 0).cpu()
        if idle.any():
            put_blocks(layer, layer.blocks.cpu()[~idle], optimizer)
            out[name] = int(idle.sum())
    return out
