"""The experts of a model's file: each projection is a layer of the file, both make one module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from nibblock.nn import Int4Experts, _expert_form
from nibblock.ops import _checks, _storage

KIND = "experts"


def build(
    path: Path,
    header: dict[str, Any],
    modules: dict[str, nn.Module],
    tensors: dict[str, torch.Tensor],
) -> dict[str, nn.Module]:
    """An `Int4Experts` for each experts module of the file, by name; the model is not touched.

    Raises:
        ValueError: the file is damaged or does not fit the model.
    """
    from nibblock._files import _differ, _same_layer

    found: dict[str, dict[str, dict]] = {}
    for name, record in header["layers"].items():
        if record["kind"] == KIND:
            parent, _, leaf = name.rpartition(".")
            found.setdefault(parent, {})[leaf] = record
    new: dict[str, nn.Module] = {}
    first: dict[int, str] = {}  # a module of the model -> its first name
    for name, records in found.items():
        old = modules.get(name)
        _check(name, old, records)
        twin = first.setdefault(id(old), name)
        if twin != name:
            for leaf in records:
                if not _same_layer(header, tensors, f"{twin}.{leaf}", f"{name}.{leaf}"):
                    raise ValueError(_differ(name, twin, "module"))
            new[name] = new[twin]
            continue
        codes, orders = {}, {}
        for leaf, record in records.items():
            key = f"{name}.{leaf}"
            codes[leaf] = _parts(path, header["shared"].get(key, key), record, tensors)
            if record.get("column_order"):
                orders[leaf] = _need(path, f"{key}.column_order", tensors)
        try:
            new[name] = Int4Experts.from_codes(
                old,
                codes,
                group_size={leaf: record["group_size"] for leaf, record in records.items()},
                bits={leaf: record["bits"] for leaf, record in records.items()},
                compute=records["down_proj"]["compute"],
                column_order=orders,
                scale_dtype={
                    leaf: getattr(torch, record["scale_dtype"]) for leaf, record in records.items()
                },
                palette={leaf: record.get("palette", False) for leaf, record in records.items()},
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"load: {name}: {error}") from error
    for name, module in modules.items():
        if id(module) in first and name not in found:
            raise ValueError(_differ(name, first[id(module)], "module"))
    return new


def _check(name: str, old: nn.Module | None, records: dict[str, dict]) -> None:
    """Raises where the module of the model is not what the file holds."""
    if old is None:
        raise ValueError(f"load: {name} must be a module of experts in the model, got none")
    if not isinstance(old, Int4Experts):
        reason = _expert_form.unfit(old, meta=True)
        if reason:
            raise ValueError(
                f"load: {name} must be experts that can be held in 4 or 8 bits in the model, got "
                f"{type(old).__name__}: {reason}"
            )
    form = old._form if isinstance(old, Int4Experts) else _expert_form.read_form(old)
    want = {leaf: [r["experts"], r["rows"], r["columns"]] for leaf, r in records.items()}
    have = {leaf: [form.experts, *size] for leaf, size in form.sizes.items()}
    if want != have:
        raise ValueError(f"load: {name} must have the file's {_shapes(want)}, got {_shapes(have)}")


def _shapes(shapes: dict[str, list[int]]) -> str:
    return ", ".join(f"{leaf} {shape}" for leaf, shape in sorted(shapes.items()))


def _need(path: Path, key: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    if key not in tensors:
        raise ValueError(f"load: {path.name} must hold {key}, got a file without it")
    return tensors[key]


def _parts(path: Path, key: str, record: dict, tensors: dict[str, torch.Tensor]) -> tuple:
    parts = []
    for part in ("qweight", "scales", "offsets")[: 3 if record["affine"] else 2]:
        parts.append(_need(path, f"{key}.{part}", tensors))
    held = _storage.canonical_dtype(getattr(torch, record["scale_dtype"]))
    if parts[1].dtype != held:
        raise ValueError(
            f"load: {key}.scales must be {_checks.dtype_name(held)}, got "
            f"{_checks.dtype_name(parts[1].dtype)}"
        )
    return (*parts, None)[:3]
