"""Block lists [Z, 2] of one weight: spread evenly, by magnitude, from a mask, or as the caller
says.
"""

from __future__ import annotations

import math
from typing import Union

import torch
import torch.nn.functional as F

from nibblock.ops import _block_checks, _checks

BlockChoice = Union[float, torch.Tensor, list, tuple]


def check_density(op: str, density: float, zero: bool = False) -> float:
    """density as a float in (0, 1], or [0, 1] where `zero` allows an empty choice."""
    if isinstance(density, bool) or not isinstance(density, (int, float)):
        raise TypeError(f"{op}: density must be float, got {type(density).__name__}")
    if not (0 if zero else 1e-300) <= density <= 1:
        low = "[0, 1]" if zero else "(0, 1]"
        raise ValueError(f"{op}: density must be in {low}, got {density}")
    return float(density)


def block_count(rows: int, columns: int, density: float) -> int:
    """How many of rows x columns blocks a density stands for: to the nearest, at least one."""
    total = rows * columns
    if density == 0 or total == 0:
        return 0
    return min(total, max(1, math.floor(density * total + 0.5)))


def even_blocks(out_features: int, in_features: int, block: int, density: float) -> torch.Tensor:
    """A share of all blocks, spread evenly and repeatably.

        every block row gets floor or ceil of its share, at equal distances; each row's first block
        is shifted by the golden ratio, so that columns are covered evenly too

    Args:
        out_features, in_features: N, K.
        block: B, one of 16, 32, 64, 128.
        density: share of the ceil(N/B) x ceil(K/B) blocks, in [0, 1]; above 0 at least one block.
    Returns:
        [Z, 2] int32, sorted, distinct.
    Raises:
        TypeError, ValueError: as `nibblock.ops.block_layout`; a density out of range.
    Determinism: the same arguments give the same blocks everywhere.
    """
    op = "even_blocks"
    _block_checks.check_block(op, block)
    _block_checks.check_features(op, out_features, in_features)
    check_density(op, density, zero=True)
    rows, columns = _block_checks.grid(out_features, in_features, block)
    count = block_count(rows, columns, density)
    found = []
    for row in range(rows):
        here = (row + 1) * count // rows - row * count // rows
        # A fraction of 2^32 / golden ratio in integers: the same on every machine.
        shift = row * 2654435769 % 2**32
        found += [(row, ((j << 32) + shift) * columns // (here << 32)) for j in range(here)]
    return torch.tensor(found, dtype=torch.int32).reshape(-1, 2)


def mask_blocks(mask: torch.Tensor, out_features: int, in_features: int, block: int):
    """The blocks where a mask is true.

    Args:
        mask: bool [ceil(N/B), ceil(K/B)].
        out_features, in_features, block: N, K, B.
    Returns:
        [Z, 2] int32, sorted.
    Raises:
        TypeError: mask is not bool. ValueError: another shape.
    """
    return _mask("mask_blocks", "mask", mask, out_features, in_features, block)


def _mask(op, name, mask, out_features, in_features, block) -> torch.Tensor:
    _block_checks.check_block(op, block)
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: {name} must be bool, got {_checks.dtype_name(mask.dtype)}")
    need = list(_block_checks.grid(out_features, in_features, block))
    if list(mask.shape) != need:
        raise ValueError(f"{op}: {name} must be {need}, got {list(mask.shape)}")
    return mask.nonzero().to("cpu", torch.int32)


def _inside(weight: torch.Tensor, blocks: torch.Tensor, block: int):
    """The whole blocks of a dense weight as a view [N // B, K // B, B, B], and which of `blocks`
    are
    whole: a bool [Z]."""
    rows, columns = weight.shape[0] // block, weight.shape[1] // block
    whole = (blocks[:, 0] < rows) & (blocks[:, 1] < columns)
    area = weight[: rows * block, : columns * block]
    return area.unflatten(0, (rows, block)).unflatten(2, (columns, block)).transpose(1, 2), whole


def _edges(blocks: torch.Tensor, whole: torch.Tensor, block: int):
    """(position, row slice, column slice) of each ragged block."""
    for z in (~whole).nonzero().flatten().tolist():
        row, column = (int(v) * block for v in blocks[z])
        yield z, slice(row, row + block), slice(column, column + block)


@torch.no_grad()
def read_blocks(weight: torch.Tensor, blocks: torch.Tensor, block: int) -> torch.Tensor:
    """A copy [Z, B, B] of the listed blocks of a dense [N, K], zero outside it; nothing else is
    copied."""
    out = weight.new_zeros(len(blocks), block, block)
    index = blocks.long().cpu()
    grid, whole = _inside(weight, index, block)
    if whole.any():
        row, column = index[whole].to(weight.device).unbind(1)
        out[whole.to(weight.device)] = grid[row, column]
    for z, rows, columns in _edges(index, whole, block):
        part = weight[rows, columns]
        out[z, : part.shape[0], : part.shape[1]] = part
    return out


@torch.no_grad()
def write_blocks(
    weight: torch.Tensor, blocks: torch.Tensor, values: torch.Tensor, block: int
) -> None:
    """The inverse of `read_blocks`: overwrites the listed blocks of a dense weight, in place."""
    index = blocks.long().cpu()
    grid, whole = _inside(weight, index, block)
    if whole.any():
        row, column = index[whole].to(weight.device).unbind(1)
        grid[row, column] = values[whole.to(values.device)]
    for z, rows, columns in _edges(index, whole, block):
        part = weight[rows, columns]
        part.copy_(values[z, : part.shape[0], : part.shape[1]])


def scatter_blocks(
    values: torch.Tensor, blocks: torch.Tensor, out_features: int, in_features: int
) -> torch.Tensor:
    """The dense [N, K] that stored blocks stand for; dtype of values."""
    dense = values.new_zeros(out_features, in_features)
    write_blocks(dense, blocks, values.detach(), values.shape[-1])
    return dense


def block_norms(weight: torch.Tensor, block: int) -> torch.Tensor:
    """Squared Frobenius norm of every block: float64 [ceil(N/B), ceil(K/B)], on the CPU."""
    rows, columns = _block_checks.grid(*weight.shape, block)
    out = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):  # a block row at a time: no float64 copy of the weight
        part = weight[row * block : (row + 1) * block].detach().to("cpu", torch.float64)
        squares = F.pad(part.square().sum(0), (0, columns * block - weight.shape[1]))
        out[row] = squares.view(columns, block).sum(1)
    return out


def magnitude_blocks(weight: torch.Tensor, block: int, density: float) -> torch.Tensor:
    """The blocks of largest Frobenius norm; of equal ones the first.

    Args:
        weight: [N, K] float32 | bfloat16 | float16, finite.
        block: B, one of 16, 32, 64, 128.
        density: share of all blocks to keep, in (0, 1]; at least one block.
    Returns:
        [Z, 2] int32, sorted.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a weight that is not finite or not 2-D,
        or a density out of range.
    Determinism: the same weight gives the same blocks.
    """
    op = "magnitude_blocks"
    _block_checks.check_block(op, block)
    _checks.check_float(op, "weight", weight)
    check_density(op, density)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be 2-D, got {list(weight.shape)}")
    if weight.is_meta:
        raise ValueError(f"{op}: weight must hold data, got a tensor on the meta device")
    norms = block_norms(weight, block)
    if not torch.isfinite(norms).all():
        row, column = (~torch.isfinite(norms)).nonzero()[0].tolist()
        raise ValueError(f"{op}: weight must be finite, got NaN or Inf in block [{row}, {column}]")
    count = block_count(*norms.shape, density)
    order = torch.sort(norms.flatten(), descending=True, stable=True).indices[:count]
    chosen = order.sort().values
    columns = norms.shape[1]
    return torch.stack([chosen // max(1, columns), chosen % max(1, columns)], 1).to(torch.int32)


def _listed(op: str, blocks: Union[list, tuple]) -> torch.Tensor:
    """A list of pairs as a tensor of the dtype that its numbers have."""
    if not blocks:
        return torch.empty(0, 2, dtype=torch.int64)
    try:
        return torch.tensor(blocks)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{op}: blocks must be a list of pairs [block row, block column], got {blocks!r:.60}"
        ) from error


def resolve_blocks(
    op: str, blocks: BlockChoice, out_features: int, in_features: int, block: int
) -> torch.Tensor:
    """A caller's choice as a checked list: a share of all blocks, a list of pairs, or a mask.

    Args:
        op: whose errors these are.
        blocks: a float in [0, 1] (see `even_blocks`); int [Z, 2], sorted and distinct; or bool
            [ceil(N/B), ceil(K/B)].
        out_features, in_features, block: N, K, B.
    Returns:
        [Z, 2] int32 on the CPU.
    Raises:
        TypeError, ValueError: as `nibblock.ops.block_layout`.
    """
    _block_checks.check_block(op, block)
    if isinstance(blocks, (int, float)):
        share = check_density(op, blocks, zero=True)
        return even_blocks(out_features, in_features, block, share)
    if isinstance(blocks, (list, tuple)):
        blocks = _listed(op, blocks)
    if isinstance(blocks, torch.Tensor) and blocks.dtype == torch.bool:
        return _mask(op, "blocks", blocks, out_features, in_features, block)
    index = _block_checks.check_blocks(op, blocks, out_features, in_features, block)
    return index.to(torch.int32)
