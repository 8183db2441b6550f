"""Adapters as one small safetensors file, tied to the base that they were trained on.

The file holds the Parameters of one named adapter of every layer, its blocks, and whatever else of
the model asks for a gradient; in its metadata (key "nibblock", JSON) the shape, block edge and rank
of each layer's adapter and a fingerprint of its base. Loading compares the fingerprints first.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from nibblock._file_checks import check_bases, check_fields, check_trained
from nibblock._ties import parameter_owners
from nibblock.nn import Adapter, AdapterLinear, BlockSparseLinear, Int4Linear, MaskedLinear
from nibblock.ops import _block_checks, _checks

VERSION = 1
KIND = "adapters"
_FIELDS = {"out_features": int, "in_features": int, "block": int, "rank": int, "base": str}
_PARTS = ("values", "blocks", "lora_a", "lora_c")


def adapter_layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """Every AdapterLinear of a model once, by its first name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdapterLinear)}


# --- fingerprints -------------------------------------------------------------------------------


def fingerprint(base: nn.Linear) -> str:
    """A hash of a base layer: format, shape, and every byte of its weight and bias."""
    if isinstance(base, Int4Linear):
        parts = [("packed", base.packed)]
        if base._order is not None:
            parts.append(("column_order", base._order))
        form = [base.group_size, base.bits, base.affine, _checks.dtype_name(base.scale_dtype)]
    else:
        parts, form = [("weight", base.weight)], []
    if base.bias is not None:
        parts.append(("bias", base.bias))
    shapes = [(n, _checks.dtype_name(t.dtype), list(t.shape)) for n, t in parts]
    digest = hashlib.sha256(
        json.dumps([base.out_features, base.in_features, form, shapes]).encode()
    )
    for _, tensor in parts:
        data = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
        digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def _fingerprints(bases: dict[str, nn.Linear]) -> dict[str, str]:
    # Hashing leaves the interpreter lock for every large buffer, so threads do help.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(bases, pool.map(fingerprint, bases.values())))


# --- saving -------------------------------------------------------------------------------------


def collect(
    model: nn.Module, name: Optional[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and header of one adapter of a model; `name` of None is the active one."""
    every = adapter_layers(model)
    layers = {
        path: layer
        for path, layer in every.items()
        if (layer.active is not None if name is None else name in layer.names)
    }
    if not layers:
        known = ", ".join(sorted({n for m in every.values() for n in m.names})) or "none"
        if name is None:
            raise ValueError(
                f"save: an adapter must be active, got none of {known} active; pass adapter=NAME"
            )
        raise ValueError(f"save: adapter must be one of {known}, got {name!r}")
    names = sorted({layer.active for layer in layers.values()}) if name is None else [name]
    if len(names) > 1:
        raise ValueError(
            f"save: one adapter must be active on all layers, got {', '.join(names)}; "
            f"pass adapter=NAME"
        )
    for path, layer in every.items():
        if layer.merged is not None:
            raise ValueError(
                f"save: {path} must be unmerged, got {layer.merged!r} merged; call unmerge()"
            )
    tensors: dict[str, torch.Tensor] = {}
    records: dict[str, Any] = {}
    own: set[int] = set()
    prints = _fingerprints({path: layer.base for path, layer in layers.items()})
    for path, layer in layers.items():
        adapter = layer.adapter(names[0])
        for part in _PARTS:
            tensor = getattr(adapter, part)
            if tensor is not None:
                tensors[f"{path}.{part}"] = tensor
        records[path] = {
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "block": adapter.block,
            "rank": adapter.rank,
            "base": prints[path],
        }
    for layer in every.values():
        own.update(id(p) for p in layer.adapters.parameters())
    trained = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            trained[key] = f"trained.{key}"
            tensors[trained[key]] = parameter
    header = {
        "kind": KIND,
        "version": VERSION,
        "name": names[0],
        "layers": records,
        "trained": trained,
    }
    return tensors, header


# --- loading ------------------------------------------------------------------------------------


def restore(
    path: Path,
    header: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    model: nn.Module,
    name: Optional[str],
) -> None:
    """Puts the file's adapter on the model and activates it; refuses before it changes anything."""
    from nibblock._adapters import rename_tied_keys, tied_to

    records, trained = _read(path, header)
    name = header["name"] if name is None else name
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"load: adapter must be a word without dots, got {name!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    bases = {key: _base(key, record, modules) for key, record in records.items()}
    for key, layer in adapter_layers(model).items():
        if layer.merged is not None:
            raise ValueError(
                f"load: {key} must be unmerged, got {layer.merged!r} merged; call unmerge()"
            )
    check_bases(path, "adapter", records, _fingerprints(bases))
    made = {key: _adapter(path, key, records[key], tensors, bases[key]) for key in records}
    fresh = {key: _wrap(modules[key], name, made[key], key) for key in records}
    parameters = check_trained(path, model, trained, tensors)
    owners = parameter_owners(model)
    for key, new in fresh.items():
        if new is not None:
            new._tied = tied_to(modules[key], owners)
    # Nothing above touched the model; nothing below can refuse.
    own = {id(p) for m in adapter_layers(model).values() for p in m.adapters.parameters()}
    with torch.no_grad():
        for key, parameter in parameters.items():
            if key in trained:
                parameter.copy_(tensors[trained[key]])
                parameter.requires_grad_()
            elif id(parameter) not in own:
                parameter.requires_grad_(False)  # what add_adapters froze, and save would add
    for key, layer in adapter_layers(model).items():
        if key not in records:
            layer.activate(None)
    for key, new in fresh.items():
        old = modules[key]
        if isinstance(old, AdapterLinear):
            _replace(old, name, made[key])
            continue
        for other, module in modules.items():  # every place where the same module stands
            if module is old:
                parent, _, attribute = other.rpartition(".")
                modules[parent]._modules[attribute] = new
    rename_tied_keys(model)


def _read(path: Path, header: dict[str, Any]):
    if header.get("version") != VERSION:
        raise ValueError(
            f"load: {path.name} must be an adapter file of version {VERSION}, got "
            f"{header.get('version')!r}; update nibblock"
        )
    try:
        records = {
            key: {part: record[part] for part in _FIELDS}
            for key, record in header["layers"].items()
        }
        if not isinstance(header["name"], str):
            raise TypeError("name must be str")
        check_fields(records, **_FIELDS)
        return records, dict(header["trained"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: {path.name} must have whole metadata, got: {error!r}") from error


def _base(key: str, record: dict[str, Any], modules: dict[str, nn.Module]) -> nn.Linear:
    module = modules.get(key)
    base = module.base if isinstance(module, AdapterLinear) else module
    if not isinstance(base, nn.Linear) or isinstance(base, (BlockSparseLinear, MaskedLinear)):
        got = "none" if module is None else type(module).__name__
        hint = "; call unmask(model) first" if isinstance(base, MaskedLinear) else ""
        raise ValueError(f"load: {key} must be a linear of the model, got {got}{hint}")
    shape, need = (
        [base.out_features, base.in_features],
        [record["out_features"], record["in_features"]],
    )
    if shape != need:
        raise ValueError(f"load: {key} must have the file's shape {need}, got {shape}")
    if next(base.parameters()).is_meta:
        raise ValueError(f"load: {key} must hold data, got a layer on the meta device")
    return base


def _adapter(path, key, record, tensors, base) -> Adapter:
    """The file's adapter of one layer, checked, on its base's device."""
    parts = _PARTS if record["rank"] else _PARTS[:2]
    for part in parts:
        if f"{key}.{part}" not in tensors:
            raise ValueError(f"load: {path.name} must hold {key}.{part}, got a file without it")
    values, blocks = tensors[f"{key}.values"], tensors[f"{key}.blocks"]
    sizes = (base.out_features, base.in_features, record["block"])
    device = next(base.parameters()).device
    try:
        index = _block_checks.check_blocks("blocks", blocks, *sizes)
        _block_checks.check_values("values", values, record["block"])
        if len(values) != len(index):
            raise ValueError(f"values must be {len(index)} blocks, got {list(values.shape)}")
        new = Adapter(*sizes, index, record["rank"], values.dtype, device)
        with torch.no_grad():
            for part in ("values", "lora_a", "lora_c"):
                if part in parts:
                    _same_shape(part, tensors[f"{key}.{part}"], getattr(new, part))
                    getattr(new, part).copy_(tensors[f"{key}.{part}"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"load: {key}: {error}") from error
    return new


def _same_shape(part: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.shape != like.shape:
        raise ValueError(f"{part} must be {list(like.shape)}, got {list(tensor.shape)}")


def _wrap(module: nn.Module, name: str, adapter: Adapter, key: str) -> Optional[AdapterLinear]:
    """A new AdapterLinear over a bare linear (None where there is one); the model is not
    touched.
    """
    if isinstance(module, AdapterLinear):
        return None
    asked = {id(p): p.requires_grad for p in module.parameters()}
    try:
        new = AdapterLinear(module, adapter.block, 0.0, 0, name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load: {key}: {error}") from error
    finally:
        for parameter in module.parameters():
            parameter.requires_grad_(asked[id(parameter)])
    new._put(name, adapter.train(module.training))
    return new


def _replace(layer: AdapterLinear, name: str, new: Adapter) -> None:
    """Puts an adapter under a name, keeping the Parameters of one that holds the same blocks: an
    optimiser may have them."""
    old = layer.adapters._modules.get(name)
    same = (
        old is not None
        and (old.block, old.rank) == (new.block, new.rank)
        and old.values.dtype == new.values.dtype
        and torch.equal(old.blocks, new.blocks)
    )
    if same:
        with torch.no_grad():
            for part, parameter in old.named_parameters():
                parameter.copy_(getattr(new, part))
        layer.activate(name)
        return
    layer._put(name, new.train(layer.base.training))
