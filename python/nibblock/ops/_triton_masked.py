"""CUDA bodies of the masked updates, block_scores and block_gain; see `_triton`.

Checks that would have to read a device's memory (order of indices, ages) are left out: a step never
waits for the host.
"""

from __future__ import annotations

from typing import Any, Callable

import torch

from nibblock.ops import _masked_checks, _masked_register, _triton
from nibblock.ops.block_gain import _check as _check_gain
from nibblock.ops.block_scores import _check as _check_scores

_STEM = "masked_update"


def _adamw(kind: str) -> Callable[..., None]:
    op = f"masked_adamw_{kind}_"
    check = getattr(_masked_register, f"check_adamw_{kind}")

    def body(*arguments: Any) -> None:
        check(op, *arguments)
        *tensors, lr, beta1, beta2, eps, decay, maximize, multiplier, found_inf = arguments
        lists, more = _sort(kind, tensors, True)
        if not lists[0]:
            return
        kernels = _triton.kernels(op, _STEM, lists[0][0])
        rule = kernels.adamw_rule(lr, beta1, beta2, eps, decay)
        kernels.step(kind, rule, *lists, maximize, multiplier, found_inf, **more)

    return body


def _sgd(kind: str) -> Callable[..., None]:
    op = f"masked_sgd_{kind}_"
    check = getattr(_masked_register, f"check_sgd_{kind}")

    def body(*arguments: Any) -> None:
        check(op, *arguments)
        *tensors, lr, momentum, dampening, decay, nesterov, maximize, multiplier, found_inf = (
            arguments
        )
        lists, more = _sort(kind, tensors, False)
        if not lists[0]:
            return
        kernels = _triton.kernels(op, _STEM, lists[0][0])
        rule = kernels.sgd_rule(lr, momentum, dampening, decay, nesterov)
        kernels.step(kind, rule, *lists, maximize, multiplier, found_inf, **more)

    return body


def _sort(kind: str, tensors: list, adamw: bool) -> tuple[list, dict[str, Any]]:
    """A schema's leading arguments as ([params, grads, first, second, ages], the mask's)."""
    more: dict[str, Any] = {}
    params, grads, *tensors = tensors
    if kind == "block":
        *tensors, more["weights"], more["blocks"], more["block"] = tensors
    elif kind == "flat":
        more["indices"], *tensors = tensors
    else:
        more["masks"], more["offsets"], *tensors = tensors
    *states, ages = tensors
    return [params, grads, *states, *([] if adamw else [[]]), ages], more


def masked_grad_bool_(grads, masks, multiplier, max_norm):
    op = "masked_grad_bool_"
    _masked_checks.check_grad_bool(op, grads, masks, multiplier, max_norm)
    kernels = _triton.kernels(op, _STEM, grads[0])
    return kernels.masked_grad(grads, masks, None, 0, multiplier, max_norm)


def masked_grad_block_(grads, blocks, block, multiplier, max_norm):
    op = "masked_grad_block_"
    _masked_checks.check_grad_block(op, grads, blocks, block, multiplier, max_norm)
    kernels = _triton.kernels(op, _STEM, grads[0])
    return kernels.masked_grad(grads, None, blocks, block, multiplier, max_norm)


def grad_norm(grads, multiplier):
    op = "grad_norm"
    _masked_checks.check_grad_norm(op, grads, multiplier)
    kernels = _triton.kernels(op, _STEM, grads[0])
    return kernels.masked_grad(grads, None, None, 0, multiplier, 0.0, write=False)


def prox_blocks_(values, origins, thresholds):
    op = "prox_blocks_"
    _masked_checks.check_prox(op, values, origins, thresholds)
    return _triton.kernels(op, _STEM, values[0]).prox_blocks(values, origins, thresholds)


def block_scores_(scores, movement, grad, x, weight, block, sketch, seed):
    op = "block_scores_"
    _check_scores(scores, movement, grad, x, weight, block, sketch)
    kernels = _triton.kernels(op, "block_scores", x)
    kernels.block_scores(scores, movement, grad, x, weight, block, sketch, seed)


def block_gain_(gain, squares, grad, x, block):
    op = "block_gain_"
    _check_gain(gain, squares, grad, x, block)
    _triton.kernels(op, "block_gain", x).block_gain(gain, squares, grad, x, block)


BODIES: dict[str, Callable] = {
    **{f"masked_adamw_{kind}_": _adamw(kind) for kind in ("block", "flat", "bool")},
    **{f"masked_sgd_{kind}_": _sgd(kind) for kind in ("block", "flat", "bool")},
    "masked_grad_bool_": masked_grad_bool_,
    "masked_grad_block_": masked_grad_block_,
    "grad_norm": grad_norm,
    "prox_blocks_": prox_blocks_,
    "block_scores_": block_scores_,
    "block_gain_": block_gain_,
}

_bodies = torch.library.Library("nibblock", "IMPL", "CUDA")
for _name, _body in BODIES.items():
    _bodies.impl(_name, _body)
