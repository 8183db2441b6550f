"""The CUDA C++ kernels of masked steps and weight gradients beside what `bench gpu` measures.

No row of them is chosen before it is measured, so they are called by name; where the library cannot
run, nothing is added. Results are compared with the neighbour's before anything is timed.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from nibblock import _cuda

Call = Callable[[int], Any]


def weight_grad(
    g: torch.Tensor, x: torch.Tensor, layout: torch.Tensor, block: int, want: torch.Tensor
) -> dict[str, tuple[Call, int]]:
    """{"CUDA C++": (call, 1)} for `bench gpu --part wgrad`, checked; {} where it cannot run.

    Args:
        g, x: [M, N], [M, K] bfloat16. layout: of the blocks. want: [Z, B, B], the gradient.
    """
    if _cuda.refusal() is not None:
        return {}

    def call(i: int) -> torch.Tensor:
        return _cuda.block_weight_grad(g, x, layout, block=block, dtype=torch.bfloat16)

    error = float((call(0).float() - want.float()).abs().max() / want.float().abs().max())
    if not error < 2e-2:
        raise AssertionError(f"bench gpu: CUDA C++ block_weight_grad is off by {error:.3g}")
    return {"CUDA C++": (call, 1)}


def adamw(
    lists: list[list[torch.Tensor]],
    ages: list[torch.Tensor],
    weights: list[torch.Tensor],
    blocks: list[torch.Tensor],
    block: int,
    step: Call,
) -> dict[str, tuple[Call, int]]:
    """{"CUDA C++": (call, 1)} for `bench gpu --part adamw`, checked; {} where it cannot run.

    Args:
        lists: values, grads, exp_avgs, exp_avg_sqs. step: the neighbour's step of the same lists,
            lr 1e-3, against which one step of the first tensor is checked.
    """
    if _cuda.refusal() is not None:
        return {}

    def call(i: int) -> None:
        _cuda.masked_adamw_block_(*lists, ages, weights, blocks, block=block, lr=1e-3)

    before = [entry[0].clone() for entry in (*lists, ages, weights)]
    step(0)
    wanted = [entry[0].clone() for entry in (*lists, ages, weights)]
    for entry, old in zip((*lists, ages, weights), before):
        entry[0].copy_(old)
    call(0)
    for entry, want in zip((*lists, ages, weights), wanted):
        if not torch.allclose(entry[0].float(), want.float(), rtol=1e-5, atol=1e-7):
            raise AssertionError("bench gpu: CUDA C++ AdamW differs from the neighbour's step")
    return {"CUDA C++": (call, 1)}
