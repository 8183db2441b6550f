"""Masked passes over gradients, for those who keep their own optimiser, and the group lasso."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch

from nibblock import _library
from nibblock.ops import _masked_checks as C

_library.load()

from nibblock.ops._masked_register import mutated  # noqa: E402  (needs the operators)

__all__ = ["grad_norm", "masked_grad_block_", "masked_grad_bool_", "prox_blocks_"]

Tensors = Sequence[torch.Tensor]
_ops = torch.ops.nibblock


def _checked(check, op: str, call, *arguments) -> torch.Tensor:
    try:
        with torch.no_grad():
            return call(*arguments)
    except RuntimeError:
        check(op, *arguments)
        raise


def masked_grad_bool_(
    grads: Tensors,
    masks: Tensors,
    *,
    multiplier: Optional[torch.Tensor] = None,
    max_norm: float = 0.0,
) -> torch.Tensor:
    """Zeroes gradients outside their masks and scales the rest, in place, to a joint norm.

        norm = || grads[mask] * multiplier ||_2 over the whole list
        grad = mask ? grad * multiplier * min(1, max_norm / (norm + 1e-6)) : 0

    Args:
        grads: list of float32 | bfloat16, any shapes and strides; changed.
        masks: list of bool of the grads' shapes, or with 0 elements: all active.
        multiplier: None or float32 tensor of 1 element.
        max_norm: the largest norm to leave; 0 or less: no limit, and one pass instead of two.
    Returns:
        float32 scalar: norm, before clipping.
    Raises:
        TypeError: a dtype that is not listed. ValueError: lists of different lengths, a shape or
        device that does not fit. Nothing has changed then.
    Gradients: none; the versions of grads are bumped. What was outside a mask is +0, NaN included.
    Determinism: bitwise repeatable at one ISA level, at any number of threads.
    Numerics: squares are summed in float64. A NaN norm makes all active gradients NaN, as in
        `torch.nn.utils.clip_grad_norm_`.
    Source: kernels in csrc/masked_update/.
    Example:
        >>> g = torch.tensor([3.0, 4.0, float("nan")])
        >>> nibblock.ops.masked_grad_bool_([g], [torch.tensor([True, True, False])], max_norm=1.0)
        tensor(5.)
        >>> g
        tensor([0.6000, 0.8000, 0.0000])
    """
    if not grads and not masks:
        return torch.zeros(())
    norm = _checked(
        C.check_grad_bool, "masked_grad_bool_", _ops.masked_grad_bool_.default,
        grads, masks, multiplier, max_norm,
    )  # fmt: skip
    mutated(grads)
    return norm


def masked_grad_block_(
    grads: Tensors,
    blocks: Tensors,
    *,
    block: int,
    multiplier: Optional[torch.Tensor] = None,
    max_norm: float = 0.0,
) -> torch.Tensor:
    """Zeroes dense gradients outside listed blocks and scales the rest, in place, to a joint norm.

    The formula is `masked_grad_bool_`'s, for masks that are true on B x B blocks.

    Args:
        grads: list of [N, K] float32 | bfloat16, any strides; changed.
        blocks: list of int32 [Z, 2] (row block, column block), sorted, distinct, in range.
        block: B, one of 16, 32, 64, 128; the last row and column of blocks may be ragged.
        multiplier, max_norm: as in `masked_grad_bool_`.
    Returns:
        float32 scalar: the norm over all listed blocks, before clipping.
    Raises, gradients, determinism, numerics, source: as `masked_grad_bool_`.
    Example:
        >>> g = torch.ones(32, 32)
        >>> nibblock.ops.masked_grad_block_(
        ...     [g], [torch.tensor([[1, 0]], dtype=torch.int32)], block=16)
        tensor(16.)
        >>> assert g.sum() == 256
    """
    if not grads and not blocks:
        return torch.zeros(())
    norm = _checked(
        C.check_grad_block, "masked_grad_block_", _ops.masked_grad_block_.default,
        grads, blocks, block, multiplier, max_norm,
    )  # fmt: skip
    mutated(grads)
    return norm


def grad_norm(grads: Tensors, *, multiplier: Optional[torch.Tensor] = None) -> torch.Tensor:
    """The joint L2 norm of a list of gradients, packed or dense.

        norm = |multiplier| * sqrt(sum of grad^2 over the whole list)

    Args:
        grads: list of float32 | bfloat16, any shapes and strides.
        multiplier: None or float32 tensor of 1 element.
    Returns:
        float32 scalar; 0 for an empty list.
    Raises:
        TypeError: a dtype that is not listed. ValueError: multiplier of another size, or tensors on
        several devices.
    Gradients: none.
    Determinism: bitwise repeatable at one ISA level, at any number of threads.
    Numerics: squares are summed in float64: no overflow where float32 would have one.
    Source: kernels in csrc/masked_update/.
    Example:
        >>> nibblock.ops.grad_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    if not grads:
        return torch.zeros(())
    call = _ops.grad_norm.default
    return _checked(C.check_grad_norm, "grad_norm", call, grads, multiplier)


def prox_blocks_(values: Tensors, origins: Tensors, thresholds: Tensors) -> torch.Tensor:
    """The proximal step of the group lasso on blocks: shrinks each towards its origin, in place.

        values_z = origin_z + (values_z - origin_z) * max(0, 1 - t_z / ||values_z - origin_z||_F)

    Args:
        values: list of [Z, B, B] float32 | bfloat16, contiguous; changed.
        origins: [] for zeros, or a list of the values' dtypes and shapes.
        thresholds: list of float32 [Z], 0 or more: learning rate times the penalty of each block.
    Returns:
        float32 [sum of Z]: ||values_z - origin_z||_F after the step (before its rounding to
        bfloat16), in the order of the list. Exactly 0 where a block has reached its origin, whose
        bits it then has.
    Raises:
        TypeError: a dtype that is not listed. ValueError: lists of different lengths, a shape or
        device that does not fit, a threshold below 0 or NaN. Nothing has changed then.
    Gradients: none; the versions of values are bumped.
    Determinism: bitwise repeatable at one ISA level, at any number of threads.
    Numerics: norms in float64; a block whose norm is NaN becomes NaN.
    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables"
        (2006); kernels in csrc/masked_update/.
    Example:
        >>> v = torch.ones(2, 16, 16)
        >>> nibblock.ops.prox_blocks_([v], [], [torch.tensor([8.0, 99.0])])
        tensor([8., 0.])
        >>> v[0, 0, 0], v[1].any()
        (tensor(0.5000), tensor(False))
    """
    if not values and not origins and not thresholds:
        return torch.zeros(0)
    norms = _checked(
        C.check_prox, "prox_blocks_", _ops.prox_blocks_.default, values, origins, thresholds
    )
    mutated(values)
    return norms
