"""What the block-sparse ops ask of their arguments, and the one layout array they share.

As in `_checks`: the fakes and the Python wrappers call these functions, the C++ glue repeats the
sentences for direct calls of `torch.ops.nibblock.*`. What a layout holds is checked once, when it
is built; a call only checks that its size fits.
"""

from __future__ import annotations

from typing import Optional

import torch

from nibblock.ops import _checks

BLOCKS = (16, 32, 64, 128)
VALUES = (torch.float32, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def grid(out_features: int, in_features: int, block: int) -> tuple[int, int]:
    """Block rows and block columns of an [N, K] weight; the last of each may be ragged."""
    return (out_features + block - 1) // block, (in_features + block - 1) // block


def check_block(op: str, block: int) -> None:
    _checks.check_int(op, "block", block)
    torch._check_value(
        block in BLOCKS, lambda: f"{op}: block must be 16, 32, 64 or 128, got {block}"
    )


def check_features(op: str, out_features: int, in_features: int) -> None:
    _checks.check_int(op, "out_features", out_features)
    _checks.check_int(op, "in_features", in_features)
    torch._check_value(
        out_features >= 0, lambda: f"{op}: out_features must be at least 0, got {out_features}"
    )
    torch._check_value(
        in_features >= 0, lambda: f"{op}: in_features must be at least 0, got {in_features}"
    )


def check_index(op: str, blocks: object) -> torch.Tensor:
    """`blocks` as an int64 [Z, 2] tensor on the CPU; only its form is checked."""
    if not isinstance(blocks, torch.Tensor):
        raise TypeError(f"{op}: blocks must be a Tensor, got {type(blocks).__name__}")
    if blocks.dtype not in _INTEGERS:
        raise TypeError(
            f"{op}: blocks must be int64 or int32, got {_checks.dtype_name(blocks.dtype)}"
        )
    if blocks.dim() != 2 or blocks.shape[1] != 2:
        raise ValueError(
            f"{op}: blocks must be [Z, 2] (row block, column block), got {list(blocks.shape)}"
        )
    if blocks.is_meta:
        raise ValueError(f"{op}: blocks must hold data, got a tensor on the meta device")
    return blocks.detach().to("cpu", torch.int64)


def check_blocks(
    op: str, blocks: object, out_features: int, in_features: int, block: int
) -> torch.Tensor:
    """`blocks` as int64 [Z, 2] on the CPU, in range, sorted and distinct; reads the data."""
    check_block(op, block)
    check_features(op, out_features, in_features)
    index = check_index(op, blocks)
    rows, columns = grid(out_features, in_features, block)
    outside = (index < 0) | (index >= torch.tensor([rows, columns]))
    if outside.any():
        bad = index[outside.any(1)][0].tolist()
        raise ValueError(
            f"{op}: blocks must lie in the {rows} x {columns} blocks of a "
            f"[{out_features}, {in_features}] weight with block {block}, got {bad}"
        )
    key = index[:, 0] * columns + index[:, 1]
    step = key[1:] - key[:-1]
    if (step <= 0).any():
        at = int((step <= 0).nonzero()[0])
        if (step < 0).any():
            at = int((step < 0).nonzero()[0])
            raise ValueError(
                f"{op}: blocks must be sorted by row block, then column block, got "
                f"{index[at + 1].tolist()} after {index[at].tolist()}; use nibblock.ops.sort_blocks"
            )
        raise ValueError(f"{op}: blocks must be distinct, got {index[at].tolist()} twice")
    return index


def build_layout(index: torch.Tensor, out_features: int, in_features: int, block: int):
    """The layout array of checked blocks; drawn in
    csrc/block_sparse_linear/block_sparse_linear.h.
    """
    rows, columns = grid(out_features, in_features, block)
    row, column = index[:, 0], index[:, 1]
    start = torch.zeros(1, dtype=torch.int64)
    row_ptr = torch.cat([start, torch.bincount(row, minlength=rows).cumsum(0)])
    col_ptr = torch.cat([start, torch.bincount(column, minlength=columns).cumsum(0)])
    order = torch.sort(column, stable=True).indices
    parts = (row_ptr, column, col_ptr, row[order], order)
    return torch.cat(parts).to(torch.int32)


def layout_size(out_features: int, in_features: int, block: int, count: int) -> int:
    rows, columns = grid(out_features, in_features, block)
    return rows + columns + 2 + 3 * count


def check_layout(
    op: str, layout: torch.Tensor, out_features: int, in_features: int, block: int, count: int
) -> None:
    torch._check_type(
        isinstance(layout, torch.Tensor),
        lambda: f"{op}: layout must be a Tensor, got {type(layout).__name__}",
    )
    torch._check_type(
        layout.dtype == torch.int32,
        lambda: f"{op}: layout must be int32, got {_checks.dtype_name(layout.dtype)}",
    )
    need = layout_size(out_features, in_features, block, count)
    torch._check_value(
        layout.dim() == 1 and layout.shape[0] == need,
        lambda: (
            f"{op}: layout must be [{need}] for {count} blocks of out_features={out_features}, "
            f"in_features={in_features}, block={block}, got {list(layout.shape)}; "
            f"build it with block_layout()"
        ),
    )


def check_values(op: str, values: torch.Tensor, block: int) -> None:
    torch._check_type(
        isinstance(values, torch.Tensor),
        lambda: f"{op}: values must be a Tensor, got {type(values).__name__}",
    )
    torch._check_type(
        values.dtype in VALUES,
        lambda: f"{op}: values must be float32 or bfloat16, got {_checks.dtype_name(values.dtype)}",
    )
    torch._check_value(
        values.dim() == 3 and values.shape[1] == block and values.shape[2] == block,
        lambda: f"{op}: values must be [Z, {block}, {block}], got {list(values.shape)}",
    )


def _check_rows(op: str, name: str, tensor: torch.Tensor) -> None:
    _checks.check_float(op, name, tensor)
    torch._check_value(
        tensor.dim() >= 1, lambda: f"{op}: {name} must have at least 1 dimension, got a scalar"
    )


def check_linear(
    op: str,
    x: torch.Tensor,
    values: torch.Tensor,
    layout: torch.Tensor,
    bias: Optional[torch.Tensor],
    y0: Optional[torch.Tensor],
    out_features: int,
    block: int,
) -> None:
    """All that `block_sparse_linear` asks; in_features is x's last dimension."""
    _check_rows(op, "x", x)
    _checks.check_device(op, "x", x, values=values, layout=layout, bias=bias, y0=y0)
    check_block(op, block)
    check_features(op, out_features, x.shape[-1])
    check_values(op, values, block)
    check_layout(op, layout, out_features, x.shape[-1], block, values.shape[0])
    if bias is not None:
        _checks.check_float(op, "bias", bias)
        torch._check_value(
            bias.dim() == 1 and bias.shape[0] == out_features,
            lambda: f"{op}: bias must be [{out_features}], got {list(bias.shape)}",
        )
    if y0 is not None:
        torch._check_type(
            y0.dtype == x.dtype,
            lambda: (
                f"{op}: y0 must be {_checks.dtype_name(x.dtype)} as x, got "
                f"{_checks.dtype_name(y0.dtype)}"
            ),
        )
        need = [*x.shape[:-1], out_features]
        torch._check_value(
            list(y0.shape) == need, lambda: f"{op}: y0 must be {need}, got {list(y0.shape)}"
        )


def check_linear_dx(
    op: str,
    grad: torch.Tensor,
    values: torch.Tensor,
    layout: torch.Tensor,
    in_features: int,
    block: int,
) -> None:
    """All that `block_sparse_linear_dx` asks; out_features is grad's last dimension."""
    _check_rows(op, "grad", grad)
    _checks.check_device(op, "grad", grad, values=values, layout=layout)
    check_block(op, block)
    check_features(op, grad.shape[-1], in_features)
    check_values(op, values, block)
    check_layout(op, layout, grad.shape[-1], in_features, block, values.shape[0])


def layout_count(
    op: str, layout: torch.Tensor, out_features: int, in_features: int, block: int
) -> int:
    """Z, from a layout's size."""
    rows, columns = grid(out_features, in_features, block)
    rest = layout.numel() - rows - columns - 2
    count = rest // 3
    torch._check_value(
        rest >= 0,
        lambda: (
            f"{op}: layout must be [{rows + columns + 2} + 3 Z] for out_features={out_features}, "
            f"in_features={in_features}, block={block}, got {list(layout.shape)}; "
            f"build it with block_layout()"
        ),
    )
    return count


def check_weight_grad(
    op: str,
    grad: torch.Tensor,
    x: torch.Tensor,
    layout: torch.Tensor,
    block: int,
    dtype: torch.dtype,
) -> int:
    """All that `block_weight_grad` asks; returns Z."""
    _check_rows(op, "grad", grad)
    _check_rows(op, "x", x)
    torch._check_type(
        grad.dtype == x.dtype,
        lambda: (
            f"{op}: grad must be {_checks.dtype_name(x.dtype)} as x, got "
            f"{_checks.dtype_name(grad.dtype)}"
        ),
    )
    _checks.check_device(op, "grad", grad, x=x, layout=layout)
    torch._check_value(
        list(grad.shape[:-1]) == list(x.shape[:-1]),
        lambda: (
            f"{op}: grad must have the leading dimensions of x, {list(x.shape)}, got "
            f"{list(grad.shape)}"
        ),
    )
    check_block(op, block)
    torch._check_type(
        dtype in VALUES,
        lambda: f"{op}: dtype must be float32 or bfloat16, got {_checks.dtype_name(dtype)}",
    )
    sizes = (grad.shape[-1], x.shape[-1], block)
    count = layout_count(op, layout, *sizes)
    check_layout(op, layout, *sizes, count)
    return count


def check_low_rank(
    op: str,
    device: torch.device,
    lora_a: Optional[torch.Tensor],
    lora_c: Optional[torch.Tensor],
    out_features: int,
    in_features: int,
) -> None:
    torch._check_value(
        (lora_a is None) == (lora_c is None),
        lambda: f"{op}: lora_c must be given exactly when lora_a is, got only one of them",
    )
    if lora_a is None or lora_c is None:
        return
    for name, tensor in (("lora_a", lora_a), ("lora_c", lora_c)):
        _checks.check_float(op, name, tensor)
        torch._check_value(
            tensor.device == device,
            lambda name=name, tensor=tensor: (
                f"{op}: {name} must be on {device}, got {tensor.device}"
            ),
        )
    torch._check_value(
        lora_a.dim() == 2 and lora_a.shape[1] == in_features,
        lambda: f"{op}: lora_a must be [rank, {in_features}], got {list(lora_a.shape)}",
    )
    torch._check_type(
        lora_c.dtype == lora_a.dtype,
        lambda: (
            f"{op}: lora_c must be {_checks.dtype_name(lora_a.dtype)} as lora_a, got "
            f"{_checks.dtype_name(lora_c.dtype)}"
        ),
    )
    need = [out_features, lora_a.shape[0]]
    torch._check_value(
        list(lora_c.shape) == need, lambda: f"{op}: lora_c must be {need}, got {list(lora_c.shape)}"
    )
