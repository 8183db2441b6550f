"""`MaskedAdamW`: AdamW on the selected entries of each Parameter, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Optional

import torch
from torch import nn

from nibblock import ops
from nibblock.optim._masked import MaskedOptimizer


class MaskedAdamW(MaskedOptimizer):
    """AdamW that moves only what a mask selects, and keeps state for nothing else.

        p *= 1 - lr * weight_decay
        m  = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
        p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    t counts the updates of the block or Parameter, not the optimiser's steps.

    Args:
        params: Parameters, named Parameters or groups, as for any `torch.optim.Optimizer`; float32
            or bfloat16, contiguous. `values` of a `MaskedLinear` are updated block by block and
            written into the layer's weight in the same pass. Others move where `masks` says, or
            everywhere.
        lr, betas, eps, weight_decay: as `torch.optim.AdamW`; weight decay acts on selected entries
            only.
        max_norm: gradients are scaled down to this L2 norm over everything that moves, in all
            groups (fused into the update; `.grad` is not changed); None for no clipping.
        maximize: whether to ascend.
        masks: Parameter -> bool tensor of its shape, or int32 | int64 [nnz] sorted flat indices.
            A group of `add_param_group` may bring "masks" of its own.
    Attributes:
        last_norm: float32 scalar, the norm before clipping at the last step; None without max_norm.
    State (float32 whatever the Parameter's dtype, also after `load_state_dict`):
        exp_avg, exp_avg_sq: [Z, B, B], or [selected entries]; age: int32 [Z] of `values`; step:
        int32 [1] of others.
    Raises:
        TypeError: a Parameter or mask of another dtype. ValueError: a value out of range, a mask
        that does not fit, or one of a Parameter that is not among params.
    Changes of `.state` and of `param_groups` count from the next step on, as with torch's.
    Works with LR schedulers, closures and `torch.amp.GradScaler`, which leaves the unscaling to the
    update.
    Determinism: bitwise, at any number of threads. Numerics: float32 inside; bfloat16 Parameters
        are rounded once a step. Entries outside the masks keep every bit.
    Source: kernels in csrc/masked_update/; the rule: Loshchilov and Hutter, Decoupled Weight Decay
        Regularization, 2019.
    Example:
        >>> optimizer = nibblock.optim.MaskedAdamW(nibblock.trainable_parameters(model), lr=1e-3)
        >>> loss_fn(model, batch).backward()
        >>> optimizer.step()
    """

    _states = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_norm: Optional[float] = None,
        maximize: bool = False,
        masks: Optional[Mapping[nn.Parameter, torch.Tensor]] = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, max_norm, masks)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            self._check_range(name, group[name])
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"{self._name}: betas must be a pair of numbers, got {betas!r}")
        for name, beta in zip(("beta1", "beta2"), betas):
            if not 0 <= self._number(name, beta) < 1:
                raise ValueError(f"{self._name}: {name} must be in [0, 1), got {beta}")

    def _update(
        self,
        group: dict[str, Any],
        batch: Any,
        grads: list[torch.Tensor],
        multiplier: Optional[torch.Tensor],
        found_inf: Optional[torch.Tensor],
    ) -> None:
        beta1, beta2 = group["betas"]
        rule = {
            "lr": float(group["lr"]),
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "maximize": group["maximize"],
            "multiplier": multiplier,
            "found_inf": found_inf,
        }
        p, clocks, states, entries = batch.parameters, batch.clocks, batch.states, batch.entries
        if batch.kind == "block":
            ops.masked_adamw_block_(
                p, grads, *states, clocks, batch.weights, entries, block=batch.block, **rule
            )
        elif batch.kind == "flat":
            ops.masked_adamw_flat_(p, grads, entries, *states, clocks, **rule)
        else:
            ops.masked_adamw_bool_(p, grads, entries, batch.offsets, *states, clocks, **rule)
