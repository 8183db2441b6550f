"""`MaskedSGD`: stochastic gradient descent on the selected entries of each Parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Optional

import torch
from torch import nn

from nibblock import ops
from nibblock.optim._masked import MaskedOptimizer


class MaskedSGD(MaskedOptimizer):
    """SGD with momentum that moves only what a mask selects, and keeps state for nothing else.

        g += weight_decay * p
        b  = momentum b + (1 - dampening) g     (b = g at a block's first update)
        p -= lr * (g + momentum b if nesterov else b)

    Args:
        params, max_norm, maximize, masks: as `MaskedAdamW`.
        lr, momentum, dampening, weight_decay, nesterov: as `torch.optim.SGD`; weight decay acts on
            selected entries only.
    State (float32 whatever the Parameter's dtype, also after `load_state_dict`):
        momentum_buffer: [Z, B, B], or [selected entries], if momentum is not 0; age: int32 [Z] of
        `values`; step: int32 [1] of others; both start anew where momentum comes in later.
    Raises:
        TypeError, ValueError: as `MaskedAdamW`; nesterov without momentum, or with dampening.
    Works with LR schedulers, closures and `torch.amp.GradScaler`, which leaves the unscaling to the
    update.
    Determinism: bitwise, at any number of threads. Numerics: float32 inside; bfloat16 Parameters
        are rounded once a step. Entries outside the masks keep every bit.
    Source: kernels in csrc/masked_update/.
    Example:
        >>> optimizer = nibblock.optim.MaskedSGD(nibblock.trainable_parameters(model), lr=0.1)
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        max_norm: Optional[float] = None,
        maximize: bool = False,
        masks: Optional[Mapping[nn.Parameter, torch.Tensor]] = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, max_norm, masks)

    def _state_names(self, group: dict[str, Any], blocks: bool) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _added_states(self, state: dict, like: dict) -> dict[str, torch.Tensor]:
        # Momentum that comes later starts with b = g, as torch's does: at age 0.
        late = "momentum_buffer" in like and "momentum_buffer" not in state
        return like if late else {}

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            self._check_range(name, group[name])
        self._check_finite("dampening", group["dampening"])
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"{self._name}: nesterov must be False without momentum or with dampening, got True"
            )

    def _update(
        self,
        group: dict[str, Any],
        batch: Any,
        grads: list[torch.Tensor],
        multiplier: Optional[torch.Tensor],
        found_inf: Optional[torch.Tensor],
    ) -> None:
        rule = {
            "lr": float(group["lr"]),
            "momentum": group["momentum"],
            "dampening": group["dampening"],
            "weight_decay": group["weight_decay"],
            "nesterov": group["nesterov"],
            "maximize": group["maximize"],
            "multiplier": multiplier,
            "found_inf": found_inf,
        }
        p, clocks, entries = batch.parameters, batch.clocks, batch.entries
        momenta = batch.states[0] if batch.states else []
        if batch.kind == "block":
            ops.masked_sgd_block_(
                p, grads, momenta, clocks, batch.weights, entries, block=batch.block, **rule
            )
        elif batch.kind == "flat":
            ops.masked_sgd_flat_(p, grads, entries, momenta, clocks, **rule)
        else:
            ops.masked_sgd_bool_(p, grads, entries, batch.offsets, momenta, clocks, **rule)
