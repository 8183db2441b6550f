"""What the masked updates ask of their arguments: lists of tensors, checked before anything moves.

As in `_checks`: the fakes and the Python wrappers call these functions, the C++ glue repeats the
sentences for direct calls of `torch.ops.nibblock.*`. What needs data (ranges, order, counts) is
skipped for tensors that have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Callable, Optional

import torch

from nibblock.ops import _block_checks
from nibblock.ops._checks import dtype_name

CHUNK = 1024
_WEIGHTS = (torch.float32, torch.bfloat16)

Tensors = Sequence[torch.Tensor]


def _has_data(*tensors: torch.Tensor) -> bool:
    """False under fake tensors and on the meta device, and on a GPU, whose data would have to be
    waited for."""
    fake = torch._subclasses.FakeTensor
    functional = torch._subclasses.functional_tensor.FunctionalTensor
    return not any(t.is_meta or t.is_cuda or isinstance(t, (fake, functional)) for t in tensors)


def _value(condition: bool, op: str, text: str) -> None:
    torch._check_value(condition, lambda: f"{op}: {text}")


def _type(condition: bool, op: str, text: str) -> None:
    torch._check_type(condition, lambda: f"{op}: {text}")


def check_list(op: str, name: str, tensors: object) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a list of tensors, got {type(tensors).__name__}")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, torch.Tensor):
            got = type(tensor).__name__
            raise TypeError(f"{op}: {name}[{i}] must be a Tensor, got {got}")


def _check_count(op: str, name: str, got: int, need: int, peer: str, none: bool = False) -> None:
    _value(
        got == need or (none and got == 0),
        op,
        f"{name} must hold {need} tensors as {peer}{', or none' if none else ''}, got {got}",
    )


def _check_weight_type(op: str, name: str, tensor: torch.Tensor) -> None:
    got = dtype_name(tensor.dtype)
    _type(tensor.dtype in _WEIGHTS, op, f"{name} must be float32 or bfloat16, got {got}")


def _check_type(op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    got = dtype_name(tensor.dtype)
    _type(tensor.dtype == dtype, op, f"{name} must be {dtype_name(dtype)}, got {got}")


def _check_same_type(op: str, name: str, tensor: torch.Tensor, peer: str, other) -> None:
    _type(
        tensor.dtype == other.dtype,
        op,
        f"{name} must be {dtype_name(other.dtype)} as {peer}, got {dtype_name(tensor.dtype)}",
    )


def _check_device(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    _value(tensor.device == device, op, f"{name} must be on {device}, got {tensor.device}")


def _check_contiguous(op: str, name: str, tensor: torch.Tensor) -> None:
    ok = tensor.is_contiguous()
    _value(ok, op, f"{name} must be contiguous, got strides {list(tensor.stride())}")


def _check_numel(op: str, name: str, tensor: torch.Tensor, need: int) -> None:
    got = list(tensor.shape)
    _value(tensor.numel() == need, op, f"{name} must hold {need} elements, got {got}")


def _check_shape_of(op: str, name: str, tensor: torch.Tensor, peer: str, other) -> None:
    need, got = list(other.shape), list(tensor.shape)
    _value(need == got, op, f"{name} must be {need} as {peer}, got {got}")


def check_scalar(op: str, name: str, value: Optional[torch.Tensor]) -> None:
    if value is None:
        return
    if not isinstance(value, torch.Tensor):
        got = type(value).__name__
        raise TypeError(f"{op}: {name} must be a Tensor of 1 element or None, got {got}")
    _check_type(op, name, value, torch.float32)
    _check_numel_one(op, name, value)


def _check_numel_one(op: str, name: str, value: torch.Tensor) -> None:
    got = list(value.shape)
    _value(value.numel() == 1, op, f"{name} must hold 1 element, got {got}")


def _check_hyper(op: str, name: str, value: float, below: float = math.inf) -> None:
    if below == math.inf:
        ok, need = 0.0 <= value < math.inf, "finite and at least 0"
    else:
        ok, need = 0.0 <= value < below, f"in [0, {below:g})"
    _value(ok, op, f"{name} must be {need}, got {value:g}")


def check_adamw(op, lr, beta1, beta2, eps, weight_decay) -> None:
    _check_hyper(op, "lr", lr)
    _check_hyper(op, "beta1", beta1, 1.0)
    _check_hyper(op, "beta2", beta2, 1.0)
    _check_hyper(op, "eps", eps)
    _check_hyper(op, "weight_decay", weight_decay)


def check_sgd(op, lr, momentum, dampening, weight_decay, nesterov) -> None:
    _check_hyper(op, "lr", lr)
    _check_hyper(op, "momentum", momentum)
    _value(math.isfinite(dampening), op, f"dampening must be finite, got {dampening:g}")
    _check_hyper(op, "weight_decay", weight_decay)
    _value(
        not nesterov or (momentum > 0 and dampening == 0),
        op,
        f"nesterov must come with momentum above 0 and dampening 0, got momentum={momentum:g}, "
        f"dampening={dampening:g}",
    )


class Step:
    """The arguments every kind of step shares: parameters, gradients, states and counters."""

    def __init__(self, op, params_name, params, grads, states, ages_name, ages):
        self.op, self.params_name, self.params, self.grads = op, params_name, params, grads
        self.states, self.ages_name, self.ages = states, ages_name, ages

    def check_lists(self, momentum: Optional[float], **others: Tensors) -> None:
        """`momentum` is None for AdamW; `weights` may be an empty list."""
        op, need = self.op, len(self.params)
        lists = {self.params_name: self.params, "grads": self.grads, **self.states}
        for name, tensors in {**lists, self.ages_name: self.ages, **others}.items():
            check_list(op, name, tensors)
        _check_count(op, "grads", len(self.grads), need, self.params_name)
        for name, tensors in self.states.items():
            if momentum == 0:
                got = len(tensors)
                text = f"{name} must be an empty list where momentum is 0, got {got} tensors"
                _value(got == 0, op, text)
            else:
                _check_count(op, name, len(tensors), need, self.params_name)
        _check_count(op, self.ages_name, len(self.ages), need, self.params_name)
        for name, tensors in others.items():
            none = name == "weights"
            _check_count(op, name, len(tensors), need, self.params_name, none)
        self.device = self.params[0].device if self.params else None
        for name, tensors in {**lists, self.ages_name: self.ages, **others}.items():
            for i, tensor in enumerate(tensors):
                _check_device(op, f"{name}[{i}]", tensor, self.device)

    def check_param(self, i: int) -> torch.Tensor:
        name, param = f"{self.params_name}[{i}]", self.params[i]
        _check_weight_type(self.op, name, param)
        _check_contiguous(self.op, name, param)
        return param

    def check_grad_type(self, i: int) -> None:
        peer = f"{self.params_name}[{i}]"
        _check_same_type(self.op, f"grads[{i}]", self.grads[i], peer, self.params[i])

    def check_grad(self, i: int) -> None:
        peer = f"{self.params_name}[{i}]"
        _check_shape_of(self.op, f"grads[{i}]", self.grads[i], peer, self.params[i])
        self.check_grad_type(i)

    def check_states(self, i: int, entries: Optional[int], ages: int) -> None:
        """`entries` is None where only data could tell."""
        for name, tensors in self.states.items():
            if tensors:
                at = f"{name}[{i}]"
                _check_type(self.op, at, tensors[i], torch.float32)
                _check_contiguous(self.op, at, tensors[i])
                if entries is not None:
                    _check_numel(self.op, at, tensors[i], entries)
        at, age = f"{self.ages_name}[{i}]", self.ages[i]
        _check_type(self.op, at, age, torch.int32)
        _check_contiguous(self.op, at, age)
        _check_numel(self.op, at, age, ages)
        if _has_data(age) and age.numel():
            least = int(age.min())
            _value(least >= 0, self.op, f"{at} must be at least 0, got {least}")


def _check_blocks(op: str, i: int, blocks: torch.Tensor, count: Optional[int]) -> None:
    _check_type(op, f"blocks[{i}]", blocks, torch.int32)
    need = "Z" if count is None else count
    _value(
        blocks.dim() == 2 and blocks.shape[1] == 2 and count in (None, blocks.shape[0]),
        op,
        f"blocks[{i}] must be [{need}, 2] (row block, column block), got {list(blocks.shape)}",
    )


def _check_blocks_inside(op: str, i: int, blocks: torch.Tensor, n: int, k: int, block: int) -> None:
    if not _has_data(blocks) or not blocks.shape[0]:
        return
    rows, columns = _block_checks.grid(n, k, block)
    index = blocks.long()
    key = index[:, 0] * columns + index[:, 1]
    inside = (index >= 0).all() and (index < torch.tensor([rows, columns])).all()
    _value(
        bool(inside and (key[1:] > key[:-1]).all()),
        op,
        f"blocks[{i}] must be sorted, distinct and in the {rows} x {columns} blocks of a "
        f"[{n}, {k}] weight with block {block}, got others",
    )


def _rows_contiguous(tensor: torch.Tensor) -> bool:
    n, k = tensor.shape
    return (k <= 1 or tensor.stride(1) == 1) and (n <= 1 or tensor.stride(0) >= k)


def _part(op: str, name: str, tensors: Tensors, values: Tensors, entries: Callable) -> Tensors:
    """A list with one tensor for all values, as one tensor each; other lists as they are.

    `entries` of values with Z blocks: how many elements.
    """
    if len(tensors) != 1 or len(values) < 2 or tensors[0].device.type != "cpu":
        return tensors
    sizes = [entries(v.shape[0] if v.dim() else 0) for v in values]
    _check_contiguous(op, f"{name}[0]", tensors[0])
    _check_numel(op, f"{name}[0]", tensors[0], sum(sizes))
    return tensors[0].view(-1).split(sizes)


def check_block_step(step: Step, momentum, weights, blocks, block, multiplier, found_inf) -> None:
    op = step.op
    for name, tensors in {**step.states, "ages": step.ages, "blocks": blocks}.items():
        check_list(op, name, tensors)
    check_list(op, "values", step.params)
    values = step.params
    states = step.states
    step.states = {
        name: _part(op, name, tensors, values, lambda z: z * block * block)
        for name, tensors in states.items()
    }
    step.ages = _part(op, "ages", step.ages, values, lambda z: z)
    if len(blocks) == 1 and len(values) > 1 and blocks[0].device.type == "cpu":
        _check_blocks(op, 0, blocks[0], sum(v.shape[0] if v.dim() else 0 for v in values))
        blocks = blocks[0].split([v.shape[0] if v.dim() else 0 for v in values])
    step.check_lists(momentum, weights=weights, blocks=blocks)
    _block_checks.check_block(op, block)
    for i in range(len(step.params)):
        values = step.check_param(i)
        _value(
            values.dim() == 3 and values.shape[1] == block and values.shape[2] == block,
            op,
            f"values[{i}] must be [Z, {block}, {block}], got {list(values.shape)}",
        )
        step.check_grad(i)
        step.check_states(i, values.numel(), values.shape[0])
        _check_blocks(op, i, blocks[i], values.shape[0])
        if weights:
            weight = weights[i]
            _check_weight_type(op, f"weights[{i}]", weight)
            got = list(weight.shape)
            _value(weight.dim() == 2, op, f"weights[{i}] must be [N, K], got {got}")
            _value(
                _rows_contiguous(weight),
                op,
                f"weights[{i}] must have contiguous rows, got strides {list(weight.stride())}",
            )
            _check_blocks_inside(op, i, blocks[i], *weight.shape, block)
    check_scalar(op, "multiplier", multiplier)
    check_scalar(op, "found_inf", found_inf)


def check_flat_step(step: Step, momentum, indices, multiplier, found_inf) -> None:
    op = step.op
    step.check_lists(momentum, indices=indices)
    for i in range(len(step.params)):
        param, index, grad = step.check_param(i), indices[i], step.grads[i]
        _type(
            index.dtype in (torch.int32, torch.int64),
            op,
            f"indices[{i}] must be int32 or int64, got {dtype_name(index.dtype)}",
        )
        _check_contiguous(op, f"indices[{i}]", index)
        _value(index.dim() == 1, op, f"indices[{i}] must be [nnz], got {list(index.shape)}")
        count, numel = index.shape[0], param.numel()
        _value(
            list(grad.shape) in ([count], list(param.shape)),
            op,
            f"grads[{i}] must be [{count}] or {list(param.shape)} as params[{i}], got "
            f"{list(grad.shape)}",
        )
        step.check_grad_type(i)
        step.check_states(i, count, 1)
        if _has_data(index) and count:
            ok = index[0] >= 0 and index[-1] < numel and (index[1:] > index[:-1]).all()
            text = f"indices[{i}] must be sorted, distinct and in [0, {numel}), got others"
            _value(bool(ok), op, text)
    check_scalar(op, "multiplier", multiplier)
    check_scalar(op, "found_inf", found_inf)


def check_bool_step(step: Step, momentum, masks, offsets, multiplier, found_inf) -> None:
    op = step.op
    step.check_lists(momentum, masks=masks, offsets=offsets)
    for i in range(len(step.params)):
        param, mask, starts = step.check_param(i), masks[i], offsets[i]
        step.check_grad(i)
        _check_type(op, f"masks[{i}]", mask, torch.bool)
        _check_contiguous(op, f"masks[{i}]", mask)
        active: Optional[int] = param.numel()
        if mask.numel():
            _check_shape_of(op, f"masks[{i}]", mask, f"params[{i}]", param)
            _check_type(op, f"offsets[{i}]", starts, torch.int64)
            _check_contiguous(op, f"offsets[{i}]", starts)
            _check_numel(op, f"offsets[{i}]", starts, offsets_size(param.numel()))
            active = _active(op, i, starts, param.numel()) if _has_data(starts) else None
        step.check_states(i, active, 1)
    check_scalar(op, "multiplier", multiplier)
    check_scalar(op, "found_inf", found_inf)


def offsets_size(numel: int) -> int:
    return (numel + CHUNK - 1) // CHUNK + 1


def _active(op: str, i: int, starts: torch.Tensor, numel: int) -> int:
    steps = starts[1:] - starts[:-1]
    room = torch.full_like(steps, CHUNK)
    room[-1:] = numel - CHUNK * (len(steps) - 1)
    _value(
        bool(starts[0] == 0 and (steps >= 0).all() and (steps <= room).all()),
        op,
        f"offsets[{i}] must count the mask's true entries from 0, got others; build it with "
        "mask_offsets()",
    )
    return int(starts[-1])


# --- gradients ----------------------------------------------------------------------------------


def _check_max_norm(op: str, max_norm: float) -> None:
    _value(max_norm == max_norm, op, "max_norm must be a number, got nan")


def _check_grads(op: str, grads: Tensors, name: Optional[str], others: Tensors) -> None:
    check_list(op, "grads", grads)
    if name is not None:
        check_list(op, name, others)
        _check_count(op, name, len(others), len(grads), "grads")
    for i, grad in enumerate(grads):
        _check_weight_type(op, f"grads[{i}]", grad)
        _check_device(op, f"grads[{i}]", grad, grads[0].device)
    for i, other in enumerate(others):
        _check_device(op, f"{name}[{i}]", other, grads[0].device)


def check_grad_bool(op, grads, masks, multiplier, max_norm) -> None:
    _check_grads(op, grads, "masks", masks)
    for i, mask in enumerate(masks):
        _check_type(op, f"masks[{i}]", mask, torch.bool)
        if mask.numel():
            _check_shape_of(op, f"masks[{i}]", mask, f"grads[{i}]", grads[i])
    check_scalar(op, "multiplier", multiplier)
    _check_max_norm(op, max_norm)


def check_grad_block(op, grads, blocks, block, multiplier, max_norm) -> None:
    _check_grads(op, grads, "blocks", blocks)
    _block_checks.check_block(op, block)
    for i, grad in enumerate(grads):
        _value(grad.dim() == 2, op, f"grads[{i}] must be [N, K], got {list(grad.shape)}")
        _check_blocks(op, i, blocks[i], None)
        _check_blocks_inside(op, i, blocks[i], *grad.shape, block)
    check_scalar(op, "multiplier", multiplier)
    _check_max_norm(op, max_norm)


def check_grad_norm(op, grads, multiplier) -> None:
    _check_grads(op, grads, None, ())
    check_scalar(op, "multiplier", multiplier)


def check_prox(op, values, origins, thresholds) -> int:
    """Returns how many blocks there are in all."""
    for name, tensors in (("values", values), ("origins", origins), ("thresholds", thresholds)):
        check_list(op, name, tensors)
    _check_count(op, "origins", len(origins), len(values), "values", True)
    _check_count(op, "thresholds", len(thresholds), len(values), "values")
    count = 0
    for i, value in enumerate(values):
        name = f"values[{i}]"
        _check_weight_type(op, name, value)
        _check_contiguous(op, name, value)
        _value(value.dim() == 3, op, f"{name} must be [Z, B, B], got {list(value.shape)}")
        if origins:
            _check_same_type(op, f"origins[{i}]", origins[i], name, value)
            _check_device(op, f"origins[{i}]", origins[i], value.device)
            _check_shape_of(op, f"origins[{i}]", origins[i], name, value)
        limit = thresholds[i]
        _check_type(op, f"thresholds[{i}]", limit, torch.float32)
        _check_device(op, f"thresholds[{i}]", limit, value.device)
        need, got = [value.shape[0]], list(limit.shape)
        _value(got == need, op, f"thresholds[{i}] must be {need}, got {got}")
        if _has_data(limit):
            bad = limit[~(limit >= 0)]
            if bad.numel():
                least = float(bad[0])
                _value(False, op, f"thresholds[{i}] must be at least 0, got {least:g}")
        count += value.shape[0]
    return count
