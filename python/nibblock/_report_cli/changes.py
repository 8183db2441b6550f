"""What changed from one adapter or sparse update to another of the same base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Union

import torch

from nibblock import _adapter_files
from nibblock._report_cli.facts import Changes, LayerChange
from nibblock._report_cli.tensor_file import TensorFile, open_file
from nibblock._report_cli.trained_file import Delta, read_layer, read_records


def changes(first: Union[str, os.PathLike], second: Union[str, os.PathLike]) -> Changes:
    """Compares two files of `nibblock.save` that hold adapters, or sparse updates, of one base.

    The audit of a new version before it is deployed, or of what a rollback would undo:

        norm = |second - first|_F      reference = |first|_F      relative = norm / reference

    For adapters of what they add, S + C A, a block that a file lacks being zero. An update holds
    weights, and what the base has where it holds none is not in the file: for updates both norms
    are over the blocks that both files hold, so `first_only` and `second_only` must be looked at
    beside them. A layer that one file lacks has all its blocks in the other one only.

    Args:
        first, second: the files, the older one first.
    Returns:
        `Changes`: a row a layer with its counts of blocks and norms, in float64; and the same of
        every tensor that was trained outside the blocks. Equal values give exactly 0.
    Raises:
        ValueError: a file is damaged or none of an adapter or update; or the two cannot be
        compared: of another kind, of another base, with no layer in common, or with blocks of
        another size. FileNotFoundError: no such file.
    Determinism: the same files give the same numbers. Memory: one layer of both at a time.
    """
    paths = [Path(first), Path(second)]
    files = [open_file(path) for path in paths]
    kinds, records, trained = zip(*(_records(file) for file in files))
    both = f"{paths[0].name} and {paths[1].name}"
    if kinds[0] != kinds[1]:
        raise _unlike(both, "of one kind", f"{kinds[0]} and {kinds[1]}")
    names = list(dict.fromkeys([*records[0], *records[1]]))
    common = [name for name in names if name in records[0] and name in records[1]]
    if not common:
        raise _unlike(both, "of the same base", "no layer in common to tell it by")
    for name in common:
        one, other = (r[name] for r in records)
        if one["base"] != other["base"]:
            got = f"{one['base'][:12]} and {other['base'][:12]} at {name}"
            raise _unlike(both, "of the same base", got)
        if one["block"] != other["block"]:
            got = f"{one['block']} and {other['block']} at {name}"
            raise _unlike(both, "in blocks of one size", got)
    rows = [_layer(files, kinds[0], name, [r.get(name) for r in records]) for name in names]
    extra = [
        _tensor(files, name, [t.get(name) for t in trained])
        for name in dict.fromkeys([*trained[0], *trained[1]])
    ]
    return Changes(os.fspath(first), os.fspath(second), kinds[0], tuple(rows), tuple(extra))


def _unlike(both: str, need: str, got: str) -> ValueError:
    return ValueError(f"report: {both} must be {need} to be compared, got {got}")


def _records(file: TensorFile) -> tuple[str, dict[str, Any], dict[str, str]]:
    if "kind" not in file.header():
        raise ValueError(
            f"report: {file.path.name} must be an adapter or sparse update to be compared, got a "
            f"whole model"
        )
    return read_records(file)


def _layer(files, what: str, name: str, records: list) -> LayerChange:
    held = [read_layer(f, what, name, r) if r else None for f, r in zip(files, records)]
    there = next(d for d in held if d is not None)
    empty = Delta(there.rows, there.columns, there.block, there.index[:0], there.values[:0])
    one, other = (empty if d is None else d for d in held)
    both = torch.isin(one.index, other.index)
    counts = int(both.sum()), int((~both).sum()), len(other.index) - int(both.sum())
    if what != _adapter_files.KIND:
        index = one.index[both]
        one, other = (Delta(d.rows, d.columns, d.block, index, d.take(index)) for d in (one, other))
    return LayerChange(name, *counts, norm=other.minus(one).norm(), reference=one.norm())


def _tensor(files, name: str, sources: list) -> LayerChange:
    held = [file.read(key)[0].double() if key else None for file, key in zip(files, sources)]
    one, other = held
    if one is None or other is None:
        return LayerChange(name, 0, int(other is None), int(one is None), 0.0, 0.0)
    if one.shape != other.shape:
        raise _unlike(
            " and ".join(file.path.name for file in files),
            f"of one shape at {name}",
            f"{list(one.shape)} and {list(other.shape)}",
        )
    norm = torch.linalg.vector_norm
    return LayerChange(name, 1, 0, 0, norm(other - one).item(), norm(one).item())
