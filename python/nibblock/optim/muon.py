"""`MaskedMuon`: orthogonalised momentum for trained blocks, AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Optional

import torch
from torch import nn

from nibblock import ops
from nibblock.ops._block_checks import BLOCKS
from nibblock.ops._checks import check_int
from nibblock.optim.adamw import MaskedAdamW

_RMS = 0.2  # of an update with lr 1; AdamW's are about as large


class MaskedMuon(MaskedAdamW):
    """Muon on trained blocks, each by itself: the values of `MaskedLinear`s, adapters and
    `BlockSparseLinear`s.

        m = momentum m + g
        d = the polar factor of (g + momentum m if nesterov else m), nearly
        p = p (1 - lr weight_decay) - lr 0.2 sqrt(B) d

    A step turns all directions that a block's gradient has by the same amount, those with small
    singular values too, where AdamW follows the few large ones. The factor 0.2 sqrt(B) gives the
    update AdamW's usual size, so learning rates are of the same order; the best are a few times
    larger. One state in place of two, and 30 B operations an entry; on a whole N x N matrix Muon
    takes 30 N.

    Blocks are all Parameters of shape [Z, B, B], B 16, 32, 64 or 128, without a mask. Others
    (biases, norms, heads, masked ones) move as by `MaskedAdamW` with the group's lr; give them a
    group of their own for another rate.

    Args:
        params, weight_decay, max_norm, maximize, masks: as `MaskedAdamW`. Directions do not depend
            on the size of gradients, so max_norm changes only how steps are mixed in the momentum.
        lr: of both rules.
        momentum: in [0, 1). 0.8 suits runs of tens of steps; 0.95 is usual in long ones.
        nesterov: whether to look ahead; needs momentum.
        ns_steps: of Newton and Schulz's iteration, 1 to 20.
        betas, eps: of AdamW, for the other Parameters.
    State (float32 whatever the Parameter's dtype, also after `load_state_dict`):
        of blocks: momentum_buffer [Z, B, B], without momentum none, and age, int32 [Z]; of others:
        as `MaskedAdamW`.
    Raises:
        TypeError, ValueError: as `MaskedAdamW`; nesterov without momentum.
    Works with LR schedulers, closures and `torch.amp.GradScaler`, as `MaskedAdamW`.
    Determinism: bitwise, at any number of threads. Numerics: float32 inside; directions of bfloat16
        Parameters are rounded to bfloat16. Entries outside the blocks keep every bit.
    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the
        size of updates: Liu et al., "Muon is scalable for LLM training" (2025). Kernels in
        csrc/masked_update/.
    Example:
        >>> optimizer = nibblock.optim.MaskedMuon(nibblock.trainable_parameters(model), lr=1e-2)
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-2,
        momentum: float = 0.8,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_norm: Optional[float] = None,
        maximize: bool = False,
        masks: Optional[Mapping[nn.Parameter, torch.Tensor]] = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "betas": betas,
            "eps": eps,
            "maximize": maximize,
        }
        super(MaskedAdamW, self).__init__(params, defaults, max_norm, masks)

    def _is_stack(self, parameter: torch.Tensor) -> bool:
        shape, mask = parameter.shape, self._masks.get(parameter)
        square = parameter.dim() == 3 and shape[1] == shape[2] and shape[1] in BLOCKS
        return square and (mask is None or (mask.kind == "bool" and not mask.entries.numel()))

    def _state_names(self, group: dict[str, Any], blocks: bool) -> tuple[str, ...]:
        if not blocks:
            return super()._state_names(group, blocks)
        return ("momentum_buffer",) if group["momentum"] else ()

    def _added_states(self, state: dict, like: dict) -> dict[str, torch.Tensor]:
        late = "momentum_buffer" in like and "momentum_buffer" not in state
        return {"momentum_buffer": like["momentum_buffer"]} if late else {}

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not 0 <= self._number("momentum", group["momentum"]) < 1:
            raise ValueError(f"{self._name}: momentum must be in [0, 1), got {group['momentum']}")
        if group["nesterov"] and not group["momentum"]:
            raise ValueError(f"{self._name}: nesterov must be False without momentum, got True")
        check_int(self._name, "ns_steps", group["ns_steps"])
        if not 1 <= group["ns_steps"] <= 20:
            raise ValueError(
                f"{self._name}: ns_steps must be from 1 to 20, got {group['ns_steps']}"
            )

    def _update(
        self,
        group: dict[str, Any],
        batch: Any,
        grads: list[torch.Tensor],
        multiplier: Optional[torch.Tensor],
        found_inf: Optional[torch.Tensor],
    ) -> None:
        if batch.kind != "block":
            super()._update(group, batch, grads, multiplier, found_inf)
            return
        directions = ops.muon_direction(
            grads,
            batch.states[0] if batch.states else [],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            steps=group["ns_steps"],
            maximize=group["maximize"],
            multiplier=multiplier,
            found_inf=found_inf,
        )
        # Without momentum SGD's rule is p (1 - rate decay) - rate d, where it also writes through.
        size = _RMS * math.sqrt(batch.block)
        ops.masked_sgd_block_(
            batch.parameters, directions, [], batch.clocks, batch.weights, batch.entries,
            block=batch.block, lr=float(group["lr"]) * size,
            weight_decay=group["weight_decay"] / size, found_inf=found_inf,
        )  # fmt: skip
