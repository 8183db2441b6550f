"""The facts of an adapter's or a sparse update's file, and what one of its layers adds or holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Optional

import torch

from nibblock import _adapter_files, _sparse_files
from nibblock._report_cli.facts import LayerFacts, TrainedFacts
from nibblock._report_cli.model_file import _FLOATS
from nibblock._report_cli.tensor_file import TensorFile, own_words
from nibblock.ops import _block_checks

_KINDS = {_adapter_files.KIND: "adapter", _sparse_files.KIND: "masked"}
_VALUES = {_adapter_files.KIND: "values", _sparse_files.KIND: "weight"}


@dataclass(frozen=True)
class Delta:
    """S + C A of one layer: what an adapter adds; with `rank` 0 also the blocks of an update.

    Attributes:
        rows, columns, block: N, K, B. index: int64 [Z], row block * column blocks + column block,
            ascending. values: float64 [Z, B, B], zero outside the weight.
        a, c: float64 [r, K] and [N, r], or None.
    """

    rows: int
    columns: int
    block: int
    index: torch.Tensor
    values: torch.Tensor
    a: Optional[torch.Tensor] = None
    c: Optional[torch.Tensor] = None

    def norm(self) -> float:
        """The Frobenius norm, without an N x K tensor:

        |S + C A|^2 = |S|^2 + tr((A A^T) (C^T C)) + 2 sum_z <S_z, C_z A_z>
        """
        total = self.values.square().sum()
        if self.a is not None:
            total = total + ((self.a @ self.a.T) * (self.c.T @ self.c)).sum()
            total = total + 2 * (self.values * self._low_rank_blocks()).sum()
        # Rounding may leave a tiny negative number where the two parts cancel.
        return math.sqrt(max(0.0, total.item())) if torch.isfinite(total) else math.nan

    def _low_rank_blocks(self) -> torch.Tensor:
        high, wide = _block_checks.grid(self.rows, self.columns, self.block)
        c = torch.zeros(high * self.block, self.c.shape[1], dtype=self.c.dtype)
        a = torch.zeros(self.a.shape[0], wide * self.block, dtype=self.a.dtype)
        c[: self.rows], a[:, : self.columns] = self.c, self.a
        row, column = self.index // wide, self.index % wide
        c = c.view(high, self.block, -1)[row]
        a = a.view(-1, wide, self.block).permute(1, 0, 2)[column]
        return c @ a

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """[len(index), B, B]: these blocks, zeros where there are none."""
        out = self.values.new_zeros(len(index), self.block, self.block)
        here = torch.isin(index, self.index)
        out[here] = self.values[torch.searchsorted(self.index, index[here])]
        return out

    def minus(self, other: Delta) -> Delta:
        """self - other; the low-rank parts side by side, none where they are the same."""
        index = torch.cat([self.index, other.index]).unique()
        values = self.take(index) - other.take(index)
        pairs = [(d.a, d.c) for d in (self, other)]
        same = all(
            (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
            for x, y in zip(*pairs)
        )
        parts = [] if same else [(a, s * c) for s, (a, c) in zip((1, -1), pairs) if a is not None]
        a = torch.cat([a for a, _ in parts]) if parts else None
        c = torch.cat([c for _, c in parts], 1) if parts else None
        return Delta(self.rows, self.columns, self.block, index, values, a, c)


def read_records(file: TensorFile) -> tuple[str, dict[str, dict[str, Any]], dict[str, str]]:
    """(what the file is, layer -> its record, what else was trained -> tensor), checked.

    Raises:
        ValueError: a newer version, or damaged metadata.
    """
    header = file.header()
    what = header["kind"]
    read = _adapter_files._read if what == _adapter_files.KIND else _sparse_files._read
    with own_words():
        records, trained = read(file.path, header)
        for name, record in records.items():
            try:
                _block_checks.check_block(name, record["block"])
                _block_checks.check_features(name, record["out_features"], record["in_features"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"report: {file.path.name}: {error}") from error
    return what, records, trained


def read_layer(file: TensorFile, what: str, name: str, record: dict[str, Any]) -> Delta:
    """The values of one layer, checked against its record.

    Raises:
        ValueError: a tensor is missing, or is not what the record says.
    """
    size = (record["out_features"], record["in_features"], record["block"])
    rank = record.get("rank", 0)
    names = [f"{name}.{_VALUES[what]}", f"{name}.blocks"]
    names += [f"{name}.lora_a", f"{name}.lora_c"] if rank else []
    for key in names:
        file.need(key)
    values, blocks, *pair = file.read(*names)
    try:
        index = _block_checks.check_blocks("blocks", blocks, *size).long()
        need = [(len(index), size[2], size[2]), (rank, size[1]), (size[0], rank)]
        for key, tensor, shape in zip((names[0], *names[2:]), (values, *pair), need):
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                got = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
                raise ValueError(f"{key} must be {list(shape)} of floats, got {got}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"report: {file.path.name}: {name}: {error}") from error
    values = values.double()
    wide = _block_checks.grid(*size)[1]
    for axis, limit in ((0, size[0]), (1, size[1])):  # what lies beyond the weight does not count
        at = index[:, axis, None] * size[2] + torch.arange(size[2])
        inside = at < limit
        values = values.where(inside[:, :, None] if axis == 0 else inside[:, None, :], 0.0)
    flat = index[:, 0] * wide + index[:, 1]
    a, c = (pair[0].double(), pair[1].double()) if rank else (None, None)
    return Delta(*size, flat, values, a, c)


def describe_trained(path: str, file: TensorFile) -> TrainedFacts:
    """The facts of an adapter's or update's file; `path` as it was given. Its values are read, a
    layer at a time, for the norms.

    Raises:
        ValueError: metadata or tensors are missing, or do not fit each other.
    """
    what, records, trained = read_records(file)
    rows = tuple(_row(file, what, name, record) for name, record in records.items())
    extra = {}
    for name, source in trained.items():
        tensor = file.need(source if isinstance(source, str) else repr(source))
        extra[name] = {
            "shape": list(tensor.shape),
            "dtype": _FLOATS.get(tensor.dtype, tensor.dtype),
            "bytes": tensor.bytes,
        }
    return TrainedFacts(
        path=path,
        file_bytes=file.file_bytes,
        what=what,
        version=file.raw()["version"],
        library=file.library(),
        name=file.raw().get("name", ""),
        rows=rows,
        trained=extra,
    )


def _row(file: TensorFile, what: str, name: str, record: dict[str, Any]) -> LayerFacts:
    delta = read_layer(file, what, name, record)
    parts = [_VALUES[what], "blocks", *(["lora_a", "lora_c"] if record.get("rank") else [])]
    high, wide = _block_checks.grid(delta.rows, delta.columns, delta.block)
    values = file.tensors[f"{name}.{_VALUES[what]}"]
    return LayerFacts(
        name,
        _KINDS[what],
        (delta.rows, delta.columns),
        sum(file.tensors[f"{name}.{part}"].bytes for part in parts),
        delta.rows * delta.columns,
        module="linear",
        dtype=_FLOATS.get(values.dtype, values.dtype),
        block=delta.block,
        blocks=len(delta.index),
        all_blocks=high * wide,
        rank=record.get("rank"),
        base=record["base"],
        norm=delta.norm(),
    )
