"""Fakes of the masked updates, and what their Python functions share; imported once, by those.

The ops change their arguments in place and are no part of any graph of derivatives, so there is
nothing to register for autograd.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from itertools import chain

import torch

from nibblock.ops import _masked_checks as C


def mutated(*lists: Iterable[torch.Tensor]) -> None:
    """Tells autograd that these tensors have new values: what was saved of them is stale."""
    if torch.compiler.is_compiling():
        return  # the compiler makes the op functional, and writes back with a copy of its own
    torch.autograd.graph.increment_version(chain.from_iterable(lists))


def adamw_step(op, params_name, params, grads, exp_avgs, exp_avg_sqs, ages_name, ages):
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    return C.Step(op, params_name, params, grads, states, ages_name, ages)


def sgd_step(op, params_name, params, grads, momenta, ages_name, ages):
    return C.Step(op, params_name, params, grads, {"momenta": momenta}, ages_name, ages)


# --- all that a step asks; the order of the arguments is the schema's ---------------------------


def check_adamw_block(
    op, values, grads, exp_avgs, exp_avg_sqs, ages, weights, blocks, block,
    lr, beta1, beta2, eps, weight_decay, maximize, multiplier, found_inf,
):  # fmt: skip
    C.check_adamw(op, lr, beta1, beta2, eps, weight_decay)
    step = adamw_step(op, "values", values, grads, exp_avgs, exp_avg_sqs, "ages", ages)
    C.check_block_step(step, None, weights, blocks, block, multiplier, found_inf)


def check_adamw_flat(
    op, params, grads, indices, exp_avgs, exp_avg_sqs, steps,
    lr, beta1, beta2, eps, weight_decay, maximize, multiplier, found_inf,
):  # fmt: skip
    C.check_adamw(op, lr, beta1, beta2, eps, weight_decay)
    step = adamw_step(op, "params", params, grads, exp_avgs, exp_avg_sqs, "steps", steps)
    C.check_flat_step(step, None, indices, multiplier, found_inf)


def check_adamw_bool(
    op, params, grads, masks, offsets, exp_avgs, exp_avg_sqs, steps,
    lr, beta1, beta2, eps, weight_decay, maximize, multiplier, found_inf,
):  # fmt: skip
    C.check_adamw(op, lr, beta1, beta2, eps, weight_decay)
    step = adamw_step(op, "params", params, grads, exp_avgs, exp_avg_sqs, "steps", steps)
    C.check_bool_step(step, None, masks, offsets, multiplier, found_inf)


def check_sgd_block(
    op, values, grads, momenta, ages, weights, blocks, block,
    lr, momentum, dampening, weight_decay, nesterov, maximize, multiplier, found_inf,
):  # fmt: skip
    C.check_sgd(op, lr, momentum, dampening, weight_decay, nesterov)
    step = sgd_step(op, "values", values, grads, momenta, "ages", ages)
    C.check_block_step(step, momentum, weights, blocks, block, multiplier, found_inf)


def check_sgd_flat(
    op, params, grads, indices, momenta, steps,
    lr, momentum, dampening, weight_decay, nesterov, maximize, multiplier, found_inf,
):  # fmt: skip
    C.check_sgd(op, lr, momentum, dampening, weight_decay, nesterov)
    step = sgd_step(op, "params", params, grads, momenta, "steps", steps)
    C.check_flat_step(step, momentum, indices, multiplier, found_inf)


def check_sgd_bool(
    op, params, grads, masks, offsets, momenta, steps,
    lr, momentum, dampening, weight_decay, nesterov, maximize, multiplier, found_inf,
):  # fmt: skip
    C.check_sgd(op, lr, momentum, dampening, weight_decay, nesterov)
    step = sgd_step(op, "params", params, grads, momenta, "steps", steps)
    C.check_bool_step(step, momentum, masks, offsets, multiplier, found_inf)


CHECKS = {
    "masked_adamw_block_": check_adamw_block,
    "masked_adamw_flat_": check_adamw_flat,
    "masked_adamw_bool_": check_adamw_bool,
    "masked_sgd_block_": check_sgd_block,
    "masked_sgd_flat_": check_sgd_flat,
    "masked_sgd_bool_": check_sgd_bool,
}


_OPS = {op: getattr(torch.ops.nibblock, op).default for op in CHECKS}


def run_step(op: str, *arguments) -> None:
    """Calls the op outside autograd; when it refuses, says why as TypeError or ValueError."""
    try:
        # Off already in an optimiser's step: to enter it again takes 4 us, as seven blocks do.
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            _OPS[op](*arguments)
    except RuntimeError:
        CHECKS[op](op, *arguments)
        raise


def _register_step(op: str) -> None:
    @torch.library.register_fake(f"nibblock::{op}")
    def _(*arguments):
        CHECKS[op](op, *arguments)


for _op in CHECKS:
    _register_step(_op)


def _norm_like(grads: list[torch.Tensor]) -> torch.Tensor:
    device = grads[0].device if grads else None
    return torch.empty((), dtype=torch.float32, device=device)


@torch.library.register_fake("nibblock::masked_grad_bool_")
def _(grads, masks, multiplier, max_norm):
    C.check_grad_bool("masked_grad_bool_", grads, masks, multiplier, max_norm)
    return _norm_like(grads)


@torch.library.register_fake("nibblock::masked_grad_block_")
def _(grads, blocks, block, multiplier, max_norm):
    C.check_grad_block("masked_grad_block_", grads, blocks, block, multiplier, max_norm)
    return _norm_like(grads)


@torch.library.register_fake("nibblock::grad_norm")
def _(grads, multiplier):
    C.check_grad_norm("grad_norm", grads, multiplier)
    return _norm_like(grads)


@torch.library.register_fake("nibblock::prox_blocks_")
def _(values, origins, thresholds):
    count = C.check_prox("prox_blocks_", values, origins, thresholds)
    device = values[0].device if values else None
    return torch.empty((count,), dtype=torch.float32, device=device)
