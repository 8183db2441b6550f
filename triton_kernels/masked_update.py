"""Masked optimiser steps and gradient passes on NVIDIA GPUs, each one launch for a whole list.

    masked_adamw_block.cuda.triton.list      and _flat, _bool; masked_sgd_*: the same body
    masked_grad_bool.cuda.triton.list        and _block; grad_norm
    prox_blocks.cuda.triton.list

A device table of pointers names the tensors, a second one says which tensor and which part of it a
program takes. Both are kept for lists that come again, so that a step in a captured graph copies
nothing; hyperparameters are launch arguments, ages and steps stay on the device: no step waits for
the host. Roundings are those of csrc/masked_update/masked_update.h in the same order, coefficients
are computed in float64, nothing is contracted (enable_fp_fusion=False); unlike the CPU, a GPU keeps
denormal states. Formulas and shapes: python/nibblock/ops/masked_update.py, masked_gradient.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Callable, Optional

import torch
import triton
import triton.language as tl
from nibblock.triton_kernels import _common, _configs, _tuned
from nibblock.triton_kernels._common import TRITON_DTYPE, OnDevice, cdiv, jit, launch, rounded
from nibblock.triton_kernels._tables import launch_list

CHUNK = 1024  # entries a program takes; kMaskChunk of the C header, too

Tensors = Sequence[torch.Tensor]


@triton.jit
def _pointer(table, entry, field: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    at = tl.load(table + entry * 10 + field)
    pointer = at.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def masked_step_kernel(
    table, parts, multiplier, found_inf, decay, blend, beta2, rest2, eps, log1, log1_rest,
    log2, log2_rest, lr, lr_rest, momentum, rest,
    KIND: tl.constexpr, P: tl.constexpr, W: tl.constexpr, INDEX: tl.constexpr,
    PACKED: tl.constexpr, ADAMW: tl.constexpr, NEAR: tl.constexpr, FIRST: tl.constexpr,
    NESTEROV: tl.constexpr, DECAYS: tl.constexpr, SIGN: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN: tl.constexpr, B: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One part of one tensor: a block (KIND 0), 1024 listed entries (1), 1024 entries of a mask (2)
    or of a tensor without one (3).
    """
    entry = tl.load(parts + 2 * tl.program_id(0))
    part = tl.load(parts + 2 * tl.program_id(0) + 1)
    param = _pointer(table, entry, 0, P, ALIGNED)
    grad = _pointer(table, entry, 1, P, ALIGNED)
    first = _pointer(table, entry, 2, tl.float32, ALIGNED)
    second = _pointer(table, entry, 3, tl.float32, ALIGNED)
    ages = _pointer(table, entry, 4, tl.int32, False)
    count = tl.load(table + entry * 10 + 7)
    columns = tl.load(table + entry * 10 + 8)
    if EVEN:  # masks then cover whole vectors, and accesses are 16 bytes wide
        count = tl.multiple_of(count, 16)
        columns = tl.multiple_of(columns, 16)
    # 1, or 0 to leave everything as it is: in the masks, not in a branch; the host is never asked.
    live = entry * 0 + 1
    if found_inf is not None:
        live = (tl.load(found_inf) == 0).to(tl.int32)
    count = count * live
    scale = tl.full((), SIGN, tl.float32)
    if multiplier is not None:
        scale = tl.load(multiplier) * SIGN
    age_at = part if KIND == 0 else 0
    age = tl.load(ages + age_at)
    if ADAMW:
        t = (age + 1).to(tl.float64)
        left1 = 1.0 - tl.exp(t * (tl.cast(log1, tl.float64) + tl.cast(log1_rest, tl.float64)))
        left2 = 1.0 - tl.exp(t * (tl.cast(log2, tl.float64) + tl.cast(log2_rest, tl.float64)))
        step = ((tl.cast(lr, tl.float64) + tl.cast(lr_rest, tl.float64)) / left1).to(tl.float32)
        root = (1.0 / tl.sqrt(left2)).to(tl.float32)

    for start in range(0, B * B if KIND == 0 else SIZE, SIZE):
        i = start + tl.arange(0, SIZE)
        here = i < B * B * live
        if KIND == 0:
            at = tl.cast(part, tl.int64) * (B * B) + i  # of values, grads and states alike
            grad_at = at
            state_at = at
            if W is not None:
                blocks = _pointer(table, entry, 6, tl.int32, False)
                n = tl.load(blocks + 2 * part) * B + i // B
                k = tl.load(blocks + 2 * part + 1) * B + i % B
                here = (n < count) & (k < columns)  # count: N
        elif KIND == 1:
            state_at = tl.cast(part, tl.int64) * SIZE + i
            here = state_at < count
            index = _pointer(table, entry, 5, INDEX, EVEN)
            at = tl.load(index + state_at, mask=here, other=0).to(tl.int64)
            grad_at = state_at if PACKED else at
        else:
            at = tl.cast(part, tl.int64) * SIZE + i
            grad_at = at
            here = at < count
            state_at = at
            if KIND == 2:
                offsets = _pointer(table, entry, 6, tl.int64, False)
                before = tl.load(offsets + part)
                active = tl.load(offsets + part + 1) - before
                mask = _pointer(table, entry, 5, tl.uint8, False)
                # A chunk that is all true, or all false, does not look at its mask.
                whole = (active == SIZE).to(tl.int32)
                looked = tl.minimum(active, 1) * (1 - whole)
                on = tl.load(mask + at, mask=at < count * looked, other=0).to(tl.int32)
                here = here & (on + whole > 0)
                state_at = before + tl.cumsum(here.to(tl.int32), 0) - 1
        p = tl.load(param + at, mask=here, other=0.0).to(tl.float32)
        g = tl.load(grad + grad_at, mask=here, other=0.0).to(tl.float32) * scale
        if ADAMW:
            m = tl.load(first + state_at, mask=here, other=0.0)
            v = tl.load(second + state_at, mask=here, other=0.0)
            base = m if NEAR else g
            m = base + blend * (g - m)
            v = v * beta2 + g * g * rest2
            p = p * decay - tl.div_rn(m * step, tl.sqrt_rn(v) * root + eps)
            tl.store(second + state_at, v, mask=here)
        else:
            if DECAYS:
                g = g + p * decay
            direction = g
            if FIRST:
                m = tl.load(first + state_at, mask=here, other=0.0)
                m = tl.where(age == 0, g, m * momentum + g * rest)
                direction = g + m * momentum if NESTEROV else m
            p = p - direction * lr
        if FIRST:
            tl.store(first + state_at, m, mask=here)
        moved = rounded(p, P)
        tl.store(param + at, moved, mask=here)
        if KIND == 0:
            if W is not None:
                weight = _pointer(table, entry, 5, W, EVEN)
                stride = tl.load(table + entry * 10 + 9)
                if EVEN:
                    stride = tl.multiple_of(stride, 16)
                # Through P: what it rounded away must not come back in a wider weight.
                value = moved.to(tl.float32)
                tl.store(weight + n.to(tl.int64) * stride + k, rounded(value, W), mask=here)
    if KIND == 0:
        tl.debug_barrier()  # every thread has read the age before one of them advances it
        tl.store(ages + age_at, age + live)


@jit
def advance_kernel(table, found_inf):
    """steps += 1 for one tensor each, after all parts have read them."""
    at = tl.load(table + tl.program_id(0) * 10 + 4).to(tl.pointer_type(tl.int32))
    live = 1
    if found_inf is not None:
        live = (tl.load(found_inf) == 0).to(tl.int32)
    tl.store(at, tl.load(at) + live)


@triton.jit
def _active(table, entry, at, here, KIND: tl.constexpr, B: tl.constexpr):
    """Which entries of a gradient its mask covers: bool (KIND 2), blocks (0) or all (3)."""
    if KIND == 2:
        mask = _pointer(table, entry, 5, tl.uint8, False)
        here = here & (tl.load(mask + at, mask=here, other=0) != 0)
    if KIND == 0:
        chosen = _pointer(table, entry, 5, tl.uint8, False)
        columns = tl.load(table + entry * 10 + 8)
        block = (at // columns // B) * ((columns + B - 1) // B) + at % columns // B
        here = here & (tl.load(chosen + block, mask=here, other=0) != 0)
    return here


@triton.jit
def squares_kernel(
    table, parts, out, KIND: tl.constexpr, G: tl.constexpr, B: tl.constexpr, SIZE: tl.constexpr
):
    """out[program] = the sum of squares of a part's active entries, float64."""
    entry = tl.load(parts + 2 * tl.program_id(0))
    at = tl.load(parts + 2 * tl.program_id(0) + 1).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    here = _active(table, entry, at, at < tl.load(table + entry * 10 + 7), KIND, B)
    g = tl.load(_pointer(table, entry, 1, G, False) + at, mask=here, other=0.0).to(tl.float64)
    tl.store(out + tl.program_id(0), tl.sum(g * g, 0))


@jit
def norm_kernel(sums, multiplier, norm, scale, SIZE, max_norm, BLOCK: tl.constexpr):
    """norm = |multiplier| sqrt(sum of sums), in a fixed order; scale = multiplier * clip."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(sums + i, mask=i < SIZE, other=0.0)
    factor = tl.full((), 1.0, tl.float32)
    if multiplier is not None:
        factor = tl.load(multiplier)
    size = (tl.abs(factor).to(tl.float64) * tl.sqrt(tl.sum(total, 0))).to(tl.float32)
    tl.store(norm, size)
    if max_norm > 0:
        clip = tl.div_rn(tl.cast(max_norm, tl.float32), size + 1e-6)
        factor = factor * tl.where(clip > 1, 1.0, clip)  # a NaN norm makes a NaN factor
    tl.store(scale, factor)


@triton.jit
def scale_kernel(
    table, parts, scale, KIND: tl.constexpr, G: tl.constexpr, B: tl.constexpr, SIZE: tl.constexpr
):
    """grad = active ? grad * scale : +0."""
    entry = tl.load(parts + 2 * tl.program_id(0))
    at = tl.load(parts + 2 * tl.program_id(0) + 1).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < tl.load(table + entry * 10 + 7)
    here = _active(table, entry, at, inside, KIND, B)
    grad = _pointer(table, entry, 1, G, False)
    g = tl.load(grad + at, mask=here, other=0.0).to(tl.float32) * tl.load(scale)
    tl.store(grad + at, rounded(tl.where(here, g, 0.0), G), mask=inside)


@triton.jit
def prox_kernel(table, parts, norms, P: tl.constexpr, HAS_ORIGIN: tl.constexpr, B: tl.constexpr,
                SIZE: tl.constexpr):  # fmt: skip
    """One block shrunk towards its origin; norms[first of the tensor + z] afterwards."""
    entry = tl.load(parts + 2 * tl.program_id(0))
    z = tl.load(parts + 2 * tl.program_id(0) + 1)
    values = _pointer(table, entry, 0, P, False) + z.to(tl.int64) * (B * B)
    origins = _pointer(table, entry, 1, P, False) + z.to(tl.int64) * (B * B)
    threshold = tl.load(_pointer(table, entry, 2, tl.float32, False) + z).to(tl.float64)
    total = tl.zeros((SIZE,), tl.float64)
    for start in range(0, B * B, SIZE):
        i = start + tl.arange(0, SIZE)
        d = tl.load(values + i).to(tl.float32)
        if HAS_ORIGIN:
            d = d - tl.load(origins + i).to(tl.float32)
        total += d.to(tl.float64) * d.to(tl.float64)
    norm = tl.sqrt(tl.sum(total, 0))
    gone = norm <= threshold  # a NaN norm is not: the block becomes NaN
    left = tl.where(gone, 0.0, 1.0 - threshold / tl.where(norm == 0.0, 1.0, norm))
    keep = left.to(tl.float32)
    for start in range(0, B * B, SIZE):
        i = start + tl.arange(0, SIZE)
        old = tl.load(values + i)
        v = old.to(tl.float32)
        if HAS_ORIGIN:
            origin = tl.load(origins + i)
            o = origin.to(tl.float32)
            new = tl.where(gone, origin, rounded(o + (v - o) * keep, P))
        else:
            new = tl.where(gone, tl.zeros_like(old), rounded(v * keep, P))
        tl.store(values + i, tl.where(threshold == 0.0, old, new))
    first = tl.load(table + entry * 10 + 7)
    tl.store(norms + first + z, tl.where(gone, 0.0, norm * left).to(tl.float32))


def _groups(count: int, key: Callable[[int], Any]) -> dict[Any, list[int]]:
    """Positions of a list by the types that a kernel is compiled for, in order."""
    groups: dict[Any, list[int]] = {}
    for i in range(count):
        groups.setdefault(key(i), []).append(i)
    return groups


def _pair(value: float) -> tuple[float, float]:
    """A double as the sum of two float32: launch arguments are float32."""
    if not math.isfinite(value):
        return value, 0.0
    high = float(torch.tensor(value, dtype=torch.float32))
    return high, value - high


def adamw_rule(lr, beta1, beta2, eps, weight_decay) -> tuple[list[float], dict[str, Any]]:
    """(launch arguments from `decay` on, constants) of AdamW."""
    weight = 1.0 - beta1
    near = weight < 0.5
    logs = [_pair(math.log(b) if b else -math.inf) for b in (beta1, beta2)]
    numbers = [
        1.0 - lr * weight_decay, weight if near else weight - 1.0, beta2, 1.0 - beta2, eps,
        *logs[0], *logs[1], *_pair(lr), 0.0, 0.0,
    ]  # fmt: skip
    return numbers, dict(ADAMW=True, NEAR=near, FIRST=True, NESTEROV=False, DECAYS=False)


def sgd_rule(lr, momentum, dampening, weight_decay, nesterov) -> tuple[list[float], dict[str, Any]]:
    """(launch arguments from `decay` on, constants) of SGD."""
    numbers = [weight_decay, *[0.0] * 8, lr, 0.0, momentum, 1.0 - dampening]
    return numbers, dict(
        ADAMW=False, NEAR=False, FIRST=momentum != 0, NESTEROV=nesterov, DECAYS=weight_decay != 0
    )


def _aligned(row: list[int]) -> bool:
    return all(pointer % 16 == 0 for pointer in row[:4])


def _even(row: list[int]) -> bool:
    return row[5] % 16 == 0 and all(size % 16 == 0 for size in row[7:10])


def step(
    kind: str,
    rule: tuple[list[float], dict[str, Any]],
    params: Tensors,
    grads: Tensors,
    firsts: Tensors,
    seconds: Tensors,
    ages: Tensors,
    maximize: bool,
    multiplier: Optional[torch.Tensor],
    found_inf: Optional[torch.Tensor],
    *,
    block: int = 0,
    weights: Tensors = (),
    blocks: Tensors = (),
    indices: Tensors = (),
    masks: Tensors = (),
    offsets: Tensors = (),
) -> None:
    """One masked optimiser step of a list of tensors, in place.

    Args:
        kind: "block", "flat" or "bool". rule: from `adamw_rule` or `sgd_rule`.
        firsts, seconds: m and v, or empty lists where the rule has none.
        The rest as in `nibblock.ops.masked_adamw_block_`, `_flat_` and `_bool_`.
    """
    if not params:
        return
    numbers, constants = rule
    grads = [g.contiguous() for g in grads]

    def kernel_key(i: int) -> tuple:
        weight = weights[i].dtype if weights else None
        index = indices[i].dtype if indices else torch.int32
        packed = kind == "flat" and grads[i].numel() == indices[i].numel()
        return params[i].dtype, weight, index, packed, bool(masks) and masks[i].numel() > 0

    with OnDevice(params[0]):
        for key, members in _groups(len(params), kernel_key).items():
            dtype, weight, index, packed, masked = key
            rows, counts = [], []
            for i in members:
                row = [params[i].data_ptr(), grads[i].data_ptr()]
                row += [firsts[i].data_ptr() if firsts else 0]
                row += [seconds[i].data_ptr() if seconds else 0, ages[i].data_ptr()]
                if kind == "block":
                    parts = params[i].shape[0]
                    row += [weights[i].data_ptr() if weights else 0, blocks[i].data_ptr()]
                    row += [*weights[i].shape, weights[i].stride(0)] if weights else [0, 0, 0]
                elif kind == "flat":
                    parts = cdiv(indices[i].numel(), CHUNK)
                    row += [indices[i].data_ptr(), 0, indices[i].numel()]
                else:
                    parts = cdiv(params[i].numel(), CHUNK)
                    row += [masks[i].data_ptr() if masked else 0]
                    row += [offsets[i].data_ptr() if masked else 0, params[i].numel()]
                rows.append(row)
                counts.append(parts)
            table, parts_of = launch_list(rows, counts, params[0].device)
            rule_name = "adamw" if constants["ADAMW"] else "sgd"
            shape = _configs.updates_class(rule_name, kind, dtype, block)
            options = _tuned.choose(_common.gpu(params[0]), shape, _configs.updates())
            if sum(counts):
                launch(
                    masked_step_kernel, (sum(counts),),
                    table, parts_of, multiplier, found_inf, *map(float, numbers),
                    KIND={"block": 0, "flat": 1, "bool": 2 if masked else 3}[kind],
                    P=TRITON_DTYPE[dtype], W=None if weight is None else TRITON_DTYPE[weight],
                    INDEX=tl.int64 if index == torch.int64 else tl.int32, PACKED=packed,
                    SIGN=-1.0 if maximize else 1.0, ALIGNED=all(map(_aligned, rows)),
                    EVEN=all(map(_even, rows)),
                    B=block or 1, SIZE=min(CHUNK, block * block) if block else CHUNK,
                    num_stages=1, enable_fp_fusion=False, **options, **constants,
                )  # fmt: skip
            if kind != "block":
                launch(advance_kernel, (len(members),), table, found_inf, num_warps=1)


# --- gradients ------------------------------------------------------------------------------------


def masked_grad(
    grads: Tensors,
    masks: Optional[Tensors],
    blocks: Optional[Tensors],
    block: int,
    multiplier: Optional[torch.Tensor],
    max_norm: float,
    write: bool = True,
) -> torch.Tensor:
    """Masks, scales and clips gradients in place; the joint norm before clipping, float32 scalar.

    Args:
        grads: float32 | bfloat16 | float16, any strides. masks: bool of their shapes or with 0
            elements, or None. blocks: int32 [Z, 2] each, or None. block: B of blocks.
        multiplier, max_norm: as in `nibblock.ops.masked_grad_bool_`. write: False for the norm.
    """
    device = grads[0].device
    own = [g.contiguous() for g in grads]
    chosen: list[Optional[torch.Tensor]] = [None] * len(grads)
    for i, g in enumerate(own):
        if blocks is not None:
            grid = cdiv(g.shape[0], block), cdiv(g.shape[1], block)
            chosen[i] = torch.zeros(grid, dtype=torch.uint8, device=device)
            chosen[i][blocks[i][:, 0].long(), blocks[i][:, 1].long()] = 1
        elif masks is not None and masks[i].numel():
            chosen[i] = masks[i].contiguous()
    groups = _groups(len(own), lambda i: (own[i].dtype, chosen[i] is not None))
    norm = torch.empty((), dtype=torch.float32, device=device)
    scale = torch.empty((), dtype=torch.float32, device=device)
    with OnDevice(grads[0]):
        calls, sums = [], []
        for (dtype, masked), members in groups.items():
            rows, counts = [], []
            for i in members:
                columns = own[i].shape[1] if blocks is not None else 1
                mask = chosen[i].data_ptr() if masked else 0
                size = own[i].numel()
                rows.append([0, own[i].data_ptr(), 0, 0, 0, mask, 0, size, columns])
                counts.append(cdiv(size, CHUNK))
            total = sum(counts)
            kind = 0 if blocks is not None else 2 if masked else 3
            constants = dict(KIND=kind, G=TRITON_DTYPE[dtype], B=block or 1, SIZE=CHUNK)
            part_sums = torch.empty(total, dtype=torch.float64, device=device)
            calls.append((total, *launch_list(rows, counts, device), constants))
            sums.append(part_sums)
            if total:
                launch(squares_kernel, (total,), *calls[-1][1:3], part_sums, **constants)
        together = torch.cat(sums)
        launch(
            norm_kernel, (1,),
            together, multiplier, norm, scale, together.numel(), float(max_norm), BLOCK=CHUNK,
        )  # fmt: skip
        if write:
            for total, table, parts, constants in calls:
                if total:
                    launch(scale_kernel, (total,), table, parts, scale, **constants)
            for g, mine in zip(grads, own):
                if mine is not g:
                    g.copy_(mine)
    return norm


def prox_blocks(values: Tensors, origins: Tensors, thresholds: Tensors) -> torch.Tensor:
    """`nibblock.ops.prox_blocks_`: norms after the step, float32 [sum of Z]."""
    device = values[0].device
    own = [t.contiguous() for t in thresholds]
    starts = [0]
    for v in values:
        starts.append(starts[-1] + v.shape[0])
    norms = torch.empty(starts[-1], dtype=torch.float32, device=device)
    origins = [o.contiguous() for o in origins]
    with OnDevice(values[0]):
        for (dtype, edge), members in _groups(
            len(values), lambda i: (values[i].dtype, values[i].shape[-1])
        ).items():
            rows, counts = [], []
            for i in members:
                origin = origins[i].data_ptr() if origins else 0
                row = [values[i].data_ptr(), origin, own[i].data_ptr(), 0, 0, 0, 0, starts[i]]
                rows.append(row)
                counts.append(values[i].shape[0])
            if sum(counts):
                launch(
                    prox_kernel, (sum(counts),), *launch_list(rows, counts, device), norms,
                    P=TRITON_DTYPE[dtype], HAS_ORIGIN=bool(origins), B=edge,
                    SIZE=min(CHUNK, edge * edge), num_warps=4, enable_fp_fusion=False,
                )  # fmt: skip
    return norms
