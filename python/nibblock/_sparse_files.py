"""A sparse update as one small safetensors file, tied to the model that it was trained on.

The file holds, for every `MaskedLinear`, its blocks and what its weight holds there now, and
whatever else of the model asks for a gradient; in its metadata (key "nibblock", JSON) the shape,
block edge and dtypes of each layer and a fingerprint of its weight before training. Loading
compares the fingerprints first, so blocks are only ever written over the bytes they were trained
from.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nibblock import _accelerate as _tree
from nibblock import _sparse_update
from nibblock._carry_over import carry_over
from nibblock._file_checks import check_bases, check_fields, check_trained
from nibblock._ties import parameter_owners
from nibblock.nn import MaskedLinear
from nibblock.ops import _block_checks, _checks
from nibblock.sparse import _choose

VERSION = 1
KIND = "sparse_update"
_VALUES = {_checks.dtype_name(dtype): dtype for dtype in _block_checks.VALUES}
_FIELDS = {
    "out_features": int,
    "in_features": int,
    "block": int,
    "dtype": str,
    "values_dtype": str,
    "base": str,
}


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """Every MaskedLinear of a model once, by its first name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, MaskedLinear)}


def fingerprint(module: nn.Linear) -> str:
    """A hash of shape, dtype and every byte of a linear's weight; of a MaskedLinear's original."""
    weight = module.weight.detach()
    if isinstance(module, MaskedLinear):
        weight = module.original_weight()
    form = [_checks.dtype_name(weight.dtype), list(weight.shape)]
    digest = hashlib.sha256(json.dumps(form).encode())
    data = weight.to("cpu").contiguous().view(-1).view(torch.uint8)
    digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def _fingerprints(modules: dict[str, nn.Linear]) -> dict[str, str]:
    # Few at a time: a MaskedLinear's original is a copy of its weight.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(modules, pool.map(fingerprint, modules.values())))


# --- saving -------------------------------------------------------------------------------------


def collect(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and header of a model's sparse update."""
    layers = masked_layers(model)
    for path, layer in layers.items():
        if layer._origin is None:
            raise ValueError(
                f"save: {path} must have kept its original blocks, got none; pass "
                f"keep_original=True to sparse_update, or save unmask(model) whole"
            )
        layer.sync()
    prints = _fingerprints(layers)
    tensors: dict[str, torch.Tensor] = {}
    records: dict[str, Any] = {}
    for path, layer in layers.items():
        # What was dropped from the list keeps its trained values, and the file carries them too.
        blocks = _ever_trained(layer)
        tensors[f"{path}.blocks"] = blocks
        tensors[f"{path}.weight"] = _choose.read_blocks(layer.weight, blocks, layer.block)
        records[path] = {
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "block": layer.block,
            "dtype": _checks.dtype_name(layer.weight.dtype),
            "values_dtype": _checks.dtype_name(layer.values.dtype),
            "base": prints[path],
        }
    own = {id(layer.values) for layer in layers.values()}
    trained = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            trained[key] = f"trained.{key}"
            tensors[trained[key]] = parameter
    header = {"kind": KIND, "version": VERSION, "layers": records, "trained": trained}
    return tensors, header


def _ever_trained(layer: MaskedLinear) -> torch.Tensor:
    index = layer._origin[0].long()
    columns = _block_checks.grid(layer.out_features, layer.in_features, layer.block)[1]
    order = torch.argsort(index[:, 0] * columns + index[:, 1])
    return index[order].to(torch.int32)


# --- loading ------------------------------------------------------------------------------------


def restore(
    path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor], model: nn.Module
) -> None:
    """Applies the file's update to the model; refuses before it changes anything."""
    records, trained = _read(path, header)
    layers = _sparse_update.find_layers(model)
    owners = parameter_owners(model)
    for key, record in records.items():
        _check_layer(path, key, record, tensors, layers.get(key), owners)
    prints = _fingerprints({key: layers[key].module for key in records})
    check_bases(path, "update", records, prints)
    parameters = check_trained(path, model, trained, tensors)
    for key, layer in masked_layers(model).items():
        if key not in records and layer._origin is None:
            raise ValueError(
                f"load: {key} must have kept its original blocks, got none; it is not in "
                f"{path.name} and would have to be reverted"
            )
    # Nothing above touched the model; nothing below can refuse.
    for layer in masked_layers(model).values():
        layer.revert()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        for key, source in trained.items():
            parameters[key].copy_(tensors[source])
            parameters[key].requires_grad_()
    for key, record in records.items():
        _apply(layers[key], record, tensors[f"{key}.blocks"], tensors[f"{key}.weight"])


def _read(path: Path, header: dict[str, Any]):
    if header.get("version") != VERSION:
        raise ValueError(
            f"load: {path.name} must be a sparse update of version {VERSION}, got "
            f"{header.get('version')!r}; update nibblock"
        )
    try:
        records = {
            key: {part: record[part] for part in _FIELDS}
            for key, record in header["layers"].items()
        }
        check_fields(records, **_FIELDS)
        return records, dict(header["trained"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: {path.name} must have whole metadata, got: {error!r}") from error


def _check_layer(path, key, record, tensors, layer, owners) -> None:
    reason = _sparse_update._refusal(layer, owners)
    if reason:
        raise ValueError(f"load: {key} must be a dense linear of the model, got {reason}")
    module = layer.module
    need = [record["out_features"], record["in_features"], record["dtype"]]
    have = [module.out_features, module.in_features, _checks.dtype_name(module.weight.dtype)]
    if have != need:
        raise ValueError(f"load: {key} must be {need} as in the file, got {have}")
    if record["values_dtype"] not in {"float32", need[2]} & _VALUES.keys():
        raise ValueError(
            f"load: {path.name} must hold values of {key} in float32 or the weight's dtype, got "
            f"{record['values_dtype']!r}; the file is damaged"
        )
    if isinstance(module, MaskedLinear) and module._origin is None:
        raise ValueError(
            f"load: {key} must have kept its original blocks, got none; pass keep_original=True"
        )
    for part in ("blocks", "weight"):
        if f"{key}.{part}" not in tensors:
            raise ValueError(f"load: {path.name} must hold {key}.{part}, got a file without it")
    blocks, held = tensors[f"{key}.blocks"], tensors[f"{key}.weight"]
    try:
        _block_checks.check_blocks("blocks", blocks, *need[:2], record["block"])
        shape = [len(blocks), record["block"], record["block"]]
        if list(held.shape) != shape or held.dtype != module.weight.dtype:
            got = f"{list(held.shape)} {_checks.dtype_name(held.dtype)}"
            raise ValueError(f"weight must be {shape} {need[2]}, got {got}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"load: {key}: {error}") from error


@torch.no_grad()
def _apply(layer: _tree._Layer, record: dict, blocks: torch.Tensor, held: torch.Tensor) -> None:
    """Puts the file's blocks over the original ones, in a MaskedLinear with the file's list."""
    module, dtype = layer.module, _VALUES[record["values_dtype"]]
    fits = (
        isinstance(module, MaskedLinear)
        and module.block == record["block"]
        and module.values.dtype == dtype
    )
    if not fits:
        plain = module.to_linear() if isinstance(module, MaskedLinear) else module
        new = MaskedLinear.from_linear(plain, blocks, record["block"], dtype)
        carry_over(module, new)
        module = new.requires_grad_(False)
        _sparse_update.swap(layer, module)
    elif not module._same_blocks(blocks):
        module.set_blocks(blocks)
    module.values.requires_grad_()
    # The bytes of the file, whatever they mean as numbers; `values` are read from there.
    _choose.write_blocks(module.weight, blocks, held.to(module.weight.device), module.block)
    module._read()
