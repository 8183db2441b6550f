"""Optimiser steps that move only masked entries: AdamW and SGD, for three kinds of masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch

from nibblock import _library
from nibblock.ops import _checks
from nibblock.ops import _masked_checks as C

_library.load()

from nibblock.ops._masked_register import mutated, run_step  # noqa: E402  (needs the operators)

__all__ = [
    "mask_offsets",
    "masked_adamw_block_",
    "masked_adamw_bool_",
    "masked_adamw_flat_",
    "masked_sgd_block_",
    "masked_sgd_bool_",
    "masked_sgd_flat_",
]

Tensors = Sequence[torch.Tensor]


def mask_offsets(mask: torch.Tensor) -> torch.Tensor:
    """How many entries of a mask are active before each chunk of 1024.

        offsets[c] = sum of mask.flatten()[: 1024 c]

    Args:
        mask: bool, any shape.
    Returns:
        int64 [ceil(numel / 1024) + 1] on the mask's device; the last is the number of active
        entries.
    Raises:
        TypeError: mask is not a bool tensor.
    Gradients: none. Determinism: exact.
    Source: csrc/masked_update/masked_update.h.
    Example:
        >>> nibblock.ops.mask_offsets(torch.tensor([True, False, True]))
        tensor([0, 2])
    """
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        got = _checks.dtype_name(mask.dtype) if isinstance(mask, torch.Tensor) else type(mask)
        raise TypeError(f"mask_offsets: mask must be bool, got {got}")
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % C.CHUNK))
    counts = padded.view(-1, C.CHUNK).sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def masked_adamw_block_(
    values: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    ages: Tensors,
    weights: Tensors,
    blocks: Tensors,
    *,
    block: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    multiplier: Optional[torch.Tensor] = None,
    found_inf: Optional[torch.Tensor] = None,
) -> None:
    """One AdamW step of B x B blocks, in place, written through to the weights they belong to.

        g = grad * multiplier                      (negated if maximize)
        m = beta1 m + (1 - beta1) g                v = beta2 v + (1 - beta2) g^2
        p = p (1 - lr weight_decay)
        p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
        weight[I B : (I + 1) B, J B : (J + 1) B] = p      for the block (I, J)

    t is the number of updates the block has had, this one included: blocks that joined later are
    corrected as if their training had begun then.

    Args:
        values: list of [Z, B, B] float32 | bfloat16, contiguous; changed.
        grads: list, dtypes and shapes of values; any strides.
        exp_avgs, exp_avg_sqs: m and v, lists of float32 as large as values, contiguous; changed.
            These two, ages and blocks may each be a list of one tensor that holds those of all
            values in their order, on the CPU: few tensors are found faster than many.
        ages: list of int32 [Z], updates each block has had, contiguous; 1 is added.
        weights: [] or a list of [N, K] float32 | bfloat16 with contiguous rows (any row stride), of
            the values' dtype or not; changed at the blocks. Elements of ragged blocks outside
            [N, K] stay as they are in values, m and v; without weights there are none.
        blocks: list of int32 [Z, 2] (row block, column block); sorted, distinct and in range where
            there are weights, unused where there are none.
        block: B, one of 16, 32, 64, 128.
        lr, beta1, beta2, eps, weight_decay: as in `torch.optim.AdamW`; decay is decoupled.
        maximize: ascend.
        multiplier: None or float32 tensor of 1 element; 1 / scale of a GradScaler, times a clip
            coefficient.
        found_inf: None or float32 tensor of 1 element; if it is not 0, nothing changes.
    Raises:
        TypeError: a dtype that is not listed. ValueError: lists of different lengths, a shape, a
        block out of range or order, or a hyperparameter out of range. Nothing has changed then.
    Gradients: none; the versions of everything that changed are bumped.
    Determinism: bitwise repeatable at any number of threads and at any ISA level.
    Numerics: float32 with exact square root and division, coefficients rounded to float32 once;
        bfloat16 values are rounded to nearest even. Denormals (below 1.2e-38) count as zero.
    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019); kernels in
        csrc/masked_update/.
    Example:
        >>> w, index = torch.randn(64, 64), torch.tensor([[0, 1]], dtype=torch.int32)
        >>> p, m, v = w[None, :32, 32:].clone(), torch.zeros(1, 32, 32), torch.zeros(1, 32, 32)
        >>> age = torch.zeros(1, dtype=torch.int32)
        >>> nibblock.ops.masked_adamw_block_(
        ...     [p], [torch.randn(1, 32, 32)], [m], [v], [age], [w], [index], block=32, lr=1e-3)
        >>> assert torch.equal(w[:32, 32:], p[0])
    """
    if values:
        run_step(
            "masked_adamw_block_", values, grads, exp_avgs, exp_avg_sqs, ages, weights, blocks,
            block, lr, beta1, beta2, eps, weight_decay, maximize, multiplier, found_inf,
        )  # fmt: skip
        mutated(values, exp_avgs, exp_avg_sqs, ages, weights)


def masked_adamw_flat_(
    params: Tensors,
    grads: Tensors,
    indices: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    multiplier: Optional[torch.Tensor] = None,
    found_inf: Optional[torch.Tensor] = None,
) -> None:
    """One AdamW step of the entries at listed positions, in place.

    The formula is `masked_adamw_block_`'s, for p = param.flatten()[indices].

    Args:
        params: list of float32 | bfloat16 tensors of any shape, contiguous; changed at indices.
        grads: list of the params' dtypes: [nnz] in the order of indices, or of the param's shape.
        indices: list of int32 | int64 [nnz], contiguous, sorted, distinct, in [0, numel).
        exp_avgs, exp_avg_sqs: m and v, lists of float32 [nnz], contiguous; changed.
        steps: list of int32 [1], updates so far; 1 is added.
        lr, beta1, beta2, eps, weight_decay, maximize, multiplier, found_inf: as in
            `masked_adamw_block_`.
    Raises:
        TypeError, ValueError: as `masked_adamw_block_`; also indices out of range or order.
    Gradients: none; versions are bumped. Entries elsewhere keep their bits, NaN included.
    Determinism, numerics, source: as `masked_adamw_block_`.
    Example:
        >>> p, index = torch.zeros(3, 4), torch.tensor([1, 7])
        >>> m, v, step = torch.zeros(2), torch.zeros(2), torch.zeros(1, dtype=torch.int32)
        >>> nibblock.ops.masked_adamw_flat_(
        ...     [p], [torch.ones(2)], [index], [m], [v], [step], lr=0.5)
        >>> p.flatten()[index]
        tensor([-0.5000, -0.5000])
    """
    if params:
        run_step(
            "masked_adamw_flat_", params, grads, indices, exp_avgs, exp_avg_sqs, steps,
            lr, beta1, beta2, eps, weight_decay, maximize, multiplier, found_inf,
        )  # fmt: skip
        mutated(params, exp_avgs, exp_avg_sqs, steps)


def masked_adamw_bool_(
    params: Tensors,
    grads: Tensors,
    masks: Tensors,
    offsets: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    multiplier: Optional[torch.Tensor] = None,
    found_inf: Optional[torch.Tensor] = None,
) -> None:
    """One AdamW step of the entries where a mask is true, in place; plain AdamW without masks.

    The formula is `masked_adamw_block_`'s, for p = param[mask].

    Args:
        params: list of float32 | bfloat16 tensors of any shape, contiguous; changed where masked.
        grads: list, dtypes and shapes of params; any strides.
        masks: list of bool of the params' shapes, contiguous, or with 0 elements: all active.
        offsets: list of int64 [ceil(numel / 1024) + 1], `mask_offsets(mask)`; unused where the mask
            has 0 elements. They must belong to the mask: chunks that they call full are not looked
            up in it.
        exp_avgs, exp_avg_sqs: m and v, lists of float32, as many as the mask has active entries,
            packed in the order of param.flatten(); contiguous; changed.
        steps: list of int32 [1], updates so far; 1 is added.
        lr, beta1, beta2, eps, weight_decay, maximize, multiplier, found_inf: as in
            `masked_adamw_block_`.
    Raises:
        TypeError, ValueError: as `masked_adamw_block_`; also offsets that no mask of this size has.
    Gradients: none; versions are bumped. Entries elsewhere keep their bits, NaN included.
    Determinism, numerics, source: as `masked_adamw_block_`.
    Example:
        >>> p, mask = torch.zeros(4), torch.tensor([True, False, False, True])
        >>> m, v, step = torch.zeros(2), torch.zeros(2), torch.zeros(1, dtype=torch.int32)
        >>> nibblock.ops.masked_adamw_bool_(
        ...     [p], [torch.ones(4)], [mask], [nibblock.ops.mask_offsets(mask)], [m], [v], [step],
        ...     lr=0.5)
        >>> p
        tensor([-0.5000,  0.0000,  0.0000, -0.5000])
    """
    if params:
        run_step(
            "masked_adamw_bool_", params, grads, masks, offsets, exp_avgs, exp_avg_sqs, steps,
            lr, beta1, beta2, eps, weight_decay, maximize, multiplier, found_inf,
        )  # fmt: skip
        mutated(params, exp_avgs, exp_avg_sqs, steps)


def masked_sgd_block_(
    values: Tensors,
    grads: Tensors,
    momenta: Tensors,
    ages: Tensors,
    weights: Tensors,
    blocks: Tensors,
    *,
    block: int,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    multiplier: Optional[torch.Tensor] = None,
    found_inf: Optional[torch.Tensor] = None,
) -> None:
    """One SGD step of B x B blocks, in place, written through to the weights they belong to.

        g = grad * multiplier + weight_decay p     (grad negated if maximize)
        m = momentum m + (1 - dampening) g         (m = g at a block's first update)
        p = p - lr d,    d = g + momentum m if nesterov, m with momentum, g without

    Args:
        values, grads, ages, weights, blocks, block: as in `masked_adamw_block_`.
        momenta: list of float32 as large as values, contiguous; changed. [] where momentum is 0.
            May be one tensor for all, as there.
        lr, momentum, dampening, weight_decay, nesterov: as in `torch.optim.SGD`; decay is coupled.
        maximize, multiplier, found_inf: as in `masked_adamw_block_`.
    Raises, gradients, determinism, numerics: as `masked_adamw_block_`.
    Source: `torch.optim.SGD`'s formula; kernels in csrc/masked_update/.
    Example:
        >>> p, age = torch.zeros(1, 16, 16), torch.zeros(1, dtype=torch.int32)
        >>> index = torch.zeros(1, 2, dtype=torch.int32)
        >>> nibblock.ops.masked_sgd_block_(
        ...     [p], [torch.ones(1, 16, 16)], [], [age], [], [index], block=16, lr=0.5)
        >>> assert (p == -0.5).all()
    """
    if values:
        run_step(
            "masked_sgd_block_", values, grads, momenta, ages, weights, blocks, block,
            lr, momentum, dampening, weight_decay, nesterov, maximize, multiplier, found_inf,
        )  # fmt: skip
        mutated(values, momenta, ages, weights)


def masked_sgd_flat_(
    params: Tensors,
    grads: Tensors,
    indices: Tensors,
    momenta: Tensors,
    steps: Tensors,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    multiplier: Optional[torch.Tensor] = None,
    found_inf: Optional[torch.Tensor] = None,
) -> None:
    """One SGD step of the entries at listed positions, in place.

    The formula is `masked_sgd_block_`'s, for p = param.flatten()[indices].

    Args:
        params, grads, indices, steps: as in `masked_adamw_flat_`.
        momenta: list of float32 [nnz], contiguous; changed. [] where momentum is 0.
        lr, momentum, dampening, weight_decay, nesterov, maximize, multiplier, found_inf: as in
            `masked_sgd_block_`.
    Raises, gradients, determinism, numerics: as `masked_adamw_flat_`.
    Source: as `masked_sgd_block_`.
    Example:
        >>> p, step = torch.zeros(3), torch.zeros(1, dtype=torch.int32)
        >>> nibblock.ops.masked_sgd_flat_(
        ...     [p], [torch.ones(1)], [torch.tensor([2])], [], [step], lr=0.5)
        >>> p
        tensor([ 0.0000,  0.0000, -0.5000])
    """
    if params:
        run_step(
            "masked_sgd_flat_", params, grads, indices, momenta, steps,
            lr, momentum, dampening, weight_decay, nesterov, maximize, multiplier, found_inf,
        )  # fmt: skip
        mutated(params, momenta, steps)


def masked_sgd_bool_(
    params: Tensors,
    grads: Tensors,
    masks: Tensors,
    offsets: Tensors,
    momenta: Tensors,
    steps: Tensors,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    multiplier: Optional[torch.Tensor] = None,
    found_inf: Optional[torch.Tensor] = None,
) -> None:
    """One SGD step of the entries where a mask is true, in place; plain SGD without masks.

    The formula is `masked_sgd_block_`'s, for p = param[mask].

    Args:
        params, grads, masks, offsets, steps: as in `masked_adamw_bool_`.
        momenta: list of float32, as many as the mask has active entries, contiguous; changed. []
            where momentum is 0.
        lr, momentum, dampening, weight_decay, nesterov, maximize, multiplier, found_inf: as in
            `masked_sgd_block_`.
    Raises, gradients, determinism, numerics: as `masked_adamw_bool_`.
    Source: as `masked_sgd_block_`.
    Example:
        >>> p, mask = torch.zeros(2), torch.tensor([True, False])
        >>> step = torch.zeros(1, dtype=torch.int32)
        >>> nibblock.ops.masked_sgd_bool_(
        ...     [p], [torch.ones(2)], [mask], [nibblock.ops.mask_offsets(mask)], [], [step], lr=0.5)
        >>> p
        tensor([-0.5000,  0.0000])
    """
    if params:
        run_step(
            "masked_sgd_bool_", params, grads, masks, offsets, momenta, steps,
            lr, momentum, dampening, weight_decay, nesterov, maximize, multiplier, found_inf,
        )  # fmt: skip
        mutated(params, momenta, steps)
