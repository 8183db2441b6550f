"""`save` and `load`: an accelerated model, or its adapters, as one safetensors file.

The file holds canonical tensors (or, of layers with a palette or int8 scales, those of
`_stored_parts`), so it does not depend on the machine that wrote it, and in its metadata (key
"nibblock", JSON) how each quantised layer is stored and which tensors are tied. Tied tensors are
written once. A file appears whole or not at all: it is written under a temporary name in the same
folder, flushed to the disk and renamed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn

from nibblock import _adapter_files, _expert_files, _sparse_files, _stored_parts
from nibblock._carry_over import carry_over
from nibblock._file_write import _KEY, _pack, _safetensors, _write
from nibblock._tied_keys import rename_tied_keys
from nibblock.nn import (
    BlockSparseLinear,
    Int4Embedding,
    Int4Linear,
    fuse_linears,
    unfuse_linears,
)
from nibblock.nn._conv1d import is_conv1d, linear_shape
from nibblock.nn._expert_weight import ExpertWeight
from nibblock.nn.fused import has_short_forwards, shorten_forwards
from nibblock.ops import _checks, _storage

# 2: some layer's columns are in an order of their own, which readers of version 1 would not see.
# 3: some layer's codes or scales are in a form of `_stored_parts`.
_VERSIONS = (1, 2, 3)
_QUANTISED = (Int4Linear, Int4Embedding)
_OURS = (*_QUANTISED, BlockSparseLinear, ExpertWeight)


def save(model: nn.Module, path: Union[str, os.PathLike], adapter: Optional[str] = None) -> None:
    """Writes a model; of one with adapters or `MaskedLinear`s, only what was trained.

    Without those: the model's Parameters and buffers, int4 layers in their canonical form and
    block-sparse ones as their blocks. With adapters or after `sparse_update`: a small file that is
    good for this base only (`unmask` the model to save it whole).

    Args:
        model: any module tree, accelerated or not.
        path: where the safetensors file shall lie; an existing file is replaced at the very end.
        adapter: the name of the adapter to save; None for the active one. Every Parameter outside
            the adapters that asks for a gradient goes into the file too.
    Raises:
        TypeError: model is not a module, or has extra state that is not a tensor.
        ValueError: a tensor on the meta device (there is nothing to save), no adapter of that name,
        none active, several active, or one that is merged; adapters and `MaskedLinear`s in one
        model, or of the latter one without its original blocks.
        ImportError: safetensors is not installed. OSError: as the file system says.
    Determinism: the same model gives the same bytes.
    Example:
        >>> nibblock.save(model, "model.safetensors")
        >>> nibblock.load("model.safetensors", same_architecture)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: model must be an nn.Module, got {type(model).__name__}")
    safetensors = _safetensors()
    if _adapter_files.adapter_layers(model):
        if _sparse_files.masked_layers(model):
            raise ValueError(
                "save: model must hold adapters or MaskedLinears, got both; call unmask(model), "
                "or take the adapters off"
            )
        tensors, header = _adapter_files.collect(model, adapter)
        _write(Path(path), _pack(safetensors, tensors, header))
        return
    if adapter is not None:
        raise ValueError(f"save: adapter must be one of none, got {adapter!r}")
    if _sparse_files.masked_layers(model):
        _write(Path(path), _pack(safetensors, *_sparse_files.collect(model)))
        return
    layers: dict[str, dict[str, Any]] = {}
    shared: dict[str, str] = {}  # name of a tied quantised layer -> the layer whose tensors it uses
    owner: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BlockSparseLinear):
            layers[name] = _describe_sparse(module)
        elif isinstance(module, (*_QUANTISED, ExpertWeight)):
            layers[name] = _describe(module)
            first = owner.setdefault(id(module.packed), name)
            if first != name:
                shared[name] = first
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for key, tensor in _state(model, shared).items():
        if not isinstance(tensor, torch.Tensor):  # of get_extra_state, which may return anything
            raise TypeError(
                f"save: {key} must be a Tensor, the only thing that a safetensors file holds, got "
                f"{type(tensor).__name__}; let get_extra_state return a Tensor"
            )
        where = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and where in seen:
            tied[key] = seen[where]
            continue
        if not tensor.is_meta:
            seen[where] = key
        tensors[key] = tensor
    version = 2 if any("column_order" in record for record in layers.values()) else 1
    if any(_stored_parts.is_close(record) for record in layers.values()):
        version = 3
        _stored_parts.compact(tensors, layers)
    header = {"version": version, "layers": layers, "shared": shared, "tied": tied}
    if has_short_forwards(model):
        header["short_forwards"] = True
    _write(Path(path), _pack(safetensors, tensors, header))


def _state(model: nn.Module, shared: dict[str, str]) -> dict[str, torch.Tensor]:
    """The state dict without the codes of layers whose weight another layer saves."""
    skipped = {f"{name}.{part}" for name in shared for part in ("qweight", "scales", "offsets")}
    return {k: t for k, t in model.state_dict().items() if k not in skipped}


def _describe(module: nn.Module) -> dict[str, Any]:
    record: dict[str, Any] = {
        "rows": module._rows,
        "columns": module._columns,
        "group_size": module.group_size,
        "bits": module.bits,
        "affine": module.affine,
        "scale_dtype": _checks.dtype_name(module.scale_dtype),
    }
    if isinstance(module, Int4Linear):
        record.update(kind="linear", compute=module.compute, bias=module.bias is not None)
    elif isinstance(module, ExpertWeight):
        record.update(kind=_expert_files.KIND, experts=module.experts, compute=module.compute)
    else:
        record.update(kind="embedding", padding_idx=module.padding_idx)
        if module.multiplier is not None:
            record["multiplier"] = module.multiplier
    if module.palette:
        record["palette"] = True
    if getattr(module, "_order", None) is not None:
        record["column_order"] = True
    return record


def _describe_sparse(module: BlockSparseLinear) -> dict[str, Any]:
    return {
        "kind": "block_sparse",
        "rows": module.out_features,
        "columns": module.in_features,
        "block": module.block,
        "bias": module.bias is not None,
    }


# --- load -----------------------------------------------------------------------------------------


def load(
    path: Union[str, os.PathLike], model: nn.Module, adapter: Optional[str] = None
) -> nn.Module:
    """Restores a file of `save` into a model of the same architecture, in place.

    A model's file: layers that it holds in 4 or 8 bits or as blocks are replaced; everything else
    and their biases are copied into the model's tensors (and take the file's tensors where the
    model's are on the meta device). Hooks stay, what is one module or one Parameter in the model
    stays one, and fused linears are fused again. Where the saved model had shorter forwards
    (`accelerate`, `load_gguf`) this one gets them, and computes the same bits. An adapter's file:
    its layers become `AdapterLinear`s, or get one more adapter (one of the same name is
    overwritten); it is active afterwards, on these layers and on no other.
    A sparse update's file: its layers become `MaskedLinear`s and hold the trained blocks; other
    `MaskedLinear`s are reverted. What was not trained is frozen, as `add_adapters` does.

    Args:
        path: a safetensors file written by `save`.
        model: the same architecture, dense or accelerated in any way. Its weights do not matter for
            a model's file; for the others they must be those that it was trained on, bit for bit
            (`MaskedLinear`s: the original ones).
        adapter: the name that an adapter gets; None for the one in the file.
    Returns:
        model.
    Raises:
        ValueError: the file is not one of `save`'s, is damaged, or does not fit the model; the text
        names the first layer or tensor that differs, of an adapter or update the first layer whose
        base is another, and the model is unchanged. FileNotFoundError: no such file.
        ImportError: safetensors is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load: model must be an nn.Module, got {type(model).__name__}")
    safetensors = _safetensors()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: path must name a file, got {str(path)!r}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"load: {path.name} must be a whole safetensors file, got: {error}"
        ) from error
    header = _read_header(path, metadata)
    if header.get("kind") == _adapter_files.KIND:
        _adapter_files.restore(path, header, tensors, model, adapter)
        return model
    if adapter is None and header.get("kind") == _sparse_files.KIND:
        _sparse_files.restore(path, header, tensors, model)
        return model
    if adapter is not None:
        raise ValueError(f"load: adapter must be None for a model's file, got {adapter!r}")
    for key, source in header["tied"].items():
        tensors[key] = tensors[source]
    _stored_parts.expand(path, tensors, header["layers"], header["shared"])

    modules = dict(model.named_modules(remove_duplicate=False))
    new = _build_layers(path, header, modules, tensors)
    new.update(_expert_files.build(path, header, modules, tensors))
    rest = _match_rest(path, header, model, modules, tensors)
    extra = {key: rest.pop(key) for key in _extra_state(model, header["layers"])}
    # Nothing above touched the model; nothing below can refuse (but a model's own extra state).
    for name, module in new.items():
        _take_over(modules[name], module)
        parent, _, attribute = name.rpartition(".")
        modules[parent]._modules[attribute] = module
    _fill(model, rest)
    for key, value in extra.items():
        modules[key.rpartition(".")[0]].set_extra_state(value)
    rename_tied_keys(model)
    if any("_int4_groups" in module.__dict__ for module in model.modules()):
        unfuse_linears(model)  # the groups hold the layers that were replaced
        fuse_linears(model)
    if header["short_forwards"]:
        shorten_forwards(model)
    return model


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Hooks, attributes and the bias Parameter, as `accelerate`; `_fill` then fills the bias."""
    carry_over(old, new)
    bias = old._parameters.get("bias")
    if bias is not None:
        new._parameters["bias"] = bias


def _read_header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if _KEY not in metadata:
        raise ValueError(f"load: {path.name} must be written by nibblock.save, got other metadata")
    try:
        header = json.loads(metadata[_KEY])
        if header.get("kind") in (_adapter_files.KIND, _sparse_files.KIND):
            return dict(header)
        if "kind" in header:
            raise ValueError(f"a file of kind {header['kind']!r}")
        version = header["version"]
        if version in _VERSIONS:
            parts: dict[str, Any] = {p: dict(header[p]) for p in ("layers", "shared", "tied")}
            return {**parts, "short_forwards": header.get("short_forwards") is True}
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"load: {path.name} must have whole metadata, got: {error!r}") from error
    raise ValueError(
        f"load: {path.name} must be of version {_VERSIONS[-1]} or older, got {version!r}; update "
        f"nibblock"
    )


def _build_layers(path, header, modules, tensors) -> dict[str, nn.Module]:
    new: dict[str, nn.Module] = {}
    first: dict[int, str] = {}  # a module of the model -> its first name
    # Tied layers last: they take the storage of the layer whose tensors the file holds.
    for name, record in sorted(
        header["layers"].items(), key=lambda item: item[0] in header["shared"]
    ):
        if record["kind"] == _expert_files.KIND:
            continue
        old = modules.get(name)
        linear = record["kind"] != "embedding"
        base = nn.Linear if linear else nn.Embedding
        if not (isinstance(old, base) or (linear and is_conv1d(old))):
            got = "none" if old is None else type(old).__name__
            raise ValueError(f"load: {name} must be an nn.{base.__name__} in the model, got {got}")
        shape = [*linear_shape(old)] if linear else [old.num_embeddings, old.embedding_dim]
        if shape != [record["rows"], record["columns"]]:
            raise ValueError(
                f"load: {name} must have the file's shape [{record['rows']}, {record['columns']}], "
                f"got {shape}"
            )
        if linear and (old.bias is not None) != record["bias"]:
            have = "a bias" if old.bias is not None else "no bias"
            raise ValueError(
                f"load: {name} must have {'a' if record['bias'] else 'no'} bias as in the file, "
                f"got {have}"
            )
        if linear and old.bias is not None and old.bias.dtype not in _checks.FLOATS:
            raise ValueError(
                f"load: {name}.bias must be float32, bfloat16 or float16 in the model, got "
                f"{_checks.dtype_name(old.bias.dtype)}"
            )
        twin = first.setdefault(id(old), name)
        if twin != name:
            if not _same_layer(header, tensors, twin, name):
                raise ValueError(_differ(name, twin, "module"))
            new[name] = new[twin]
            continue
        build = _build_sparse if record["kind"] == "block_sparse" else _build_layer
        new[name] = build(path, header, name, record, old, new, tensors)
        new[name].train(old.training)
    for name, module in modules.items():
        if id(module) in first and name not in header["layers"]:
            raise ValueError(_differ(name, first[id(module)], "module"))
    return new


def _differ(name: str, first: str, what: str) -> str:
    return (
        f"load: {name} must be as {first} in the file, for they are one {what} in the model, got "
        f"another; untie them in the model"
    )


def _same_layer(header, tensors, first: str, second: str) -> bool:
    """Whether the file holds the same layer under both names."""
    layers, shared = header["layers"], header["shared"]
    pairs = [(f"{first}.{part}", f"{second}.{part}") for part in ("bias", "column_order")]
    for part in ("qweight", "scales", "offsets", "values", "blocks"):
        pairs.append(tuple(f"{shared.get(name, name)}.{part}" for name in (first, second)))
    return layers[first] == layers[second] and all(
        _same(tensors.get(a), tensors.get(b)) for a, b in pairs
    )


def _same(one: Optional[torch.Tensor], other: Optional[torch.Tensor]) -> bool:
    if one is None or other is None or one is other:
        return one is other
    return torch.equal(one, other)


def _build_sparse(path, header, name, record, old, new, tensors) -> BlockSparseLinear:
    parts = ("values", "blocks", "bias") if record["bias"] else ("values", "blocks")
    for part in parts:
        if f"{name}.{part}" not in tensors:
            raise ValueError(f"load: {path.name} must hold {name}.{part}, got a file without it")
    try:
        return BlockSparseLinear.from_values(
            *(tensors[f"{name}.{part}"] for part in parts),
            in_features=record["columns"],
            out_features=record["rows"],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"load: {name}: {error}") from error


def _build_layer(path, header, name, record, old, new, tensors) -> nn.Module:
    scale_dtype = getattr(torch, record["scale_dtype"])
    form = {
        "group_size": record["group_size"],
        "bits": record["bits"],
    }
    source = new.get(header["shared"].get(name, ""))
    parts = []
    if source is None:
        for part in ("qweight", "scales", "offsets")[: 3 if record["affine"] else 2]:
            key = f"{name}.{part}"
            if key not in tensors:
                raise ValueError(f"load: {path.name} must hold {key}, got a file without it")
            parts.append(tensors[key])
        held = _storage.canonical_dtype(scale_dtype)
        if parts[1].dtype != held:
            raise ValueError(
                f"load: {name}.scales must be {_checks.dtype_name(held)}, got "
                f"{_checks.dtype_name(parts[1].dtype)}"
            )
    parts += [None] * (3 - len(parts)) if source is None else []
    tied = {"affine": record["affine"], "scale_dtype": scale_dtype}
    stored = {"scale_dtype": scale_dtype, "palette": record.get("palette", False)}
    try:
        if record["kind"] == "linear":
            bias = tensors.get(f"{name}.bias") if record["bias"] else None
            if record["bias"] and bias is None:
                raise ValueError(f"{path.name} holds no {name}.bias")
            order = tensors.get(f"{name}.column_order")
            if record.get("column_order") and order is None:
                raise ValueError(f"{path.name} holds no {name}.column_order")
            form.update(in_features=record["columns"], compute=record["compute"])
            form["column_order"] = order
            if source is not None:
                return Int4Linear.from_packed(
                    source.packed, bias, out_features=record["rows"], **form, **tied
                )
            return Int4Linear.from_codes(*parts, bias, **stored, **form)
        dtype = old._dtype if isinstance(old, Int4Embedding) else old.weight.dtype
        form.update(embedding_dim=record["columns"], padding_idx=record["padding_idx"], dtype=dtype)
        form["multiplier"] = record.get("multiplier")
        if source is not None:
            return Int4Embedding.from_packed(
                source.packed, num_embeddings=record["rows"], **form, **tied
            )
        return Int4Embedding.from_codes(*parts, **stored, **form)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load: {name}: {error}") from error


def _match_rest(path, header, model, modules, tensors) -> dict[str, torch.Tensor]:
    """The dense tensors of the file and its layers' biases, checked against the model's."""
    inside = tuple(f"{name}." for name in header["layers"])
    rest = {k: t for k, t in tensors.items() if not k.startswith(inside)} if inside else tensors
    have = _dense_state(model, header["layers"])
    for name in header["layers"]:
        if name not in modules:  # a projection of experts that are dense in the model
            continue
        bias = modules[name]._parameters.get("bias")
        if bias is not None:
            have[f"{name}.bias"] = bias
            rest[f"{name}.bias"] = tensors[f"{name}.bias"]
    extra = _extra_state(model, header["layers"])
    for key in [*have, *extra]:
        if key not in rest:
            raise ValueError(
                f"load: {path.name} must hold {key} of the model, got a file without it"
            )
    first: dict[int, str] = {}
    for key, tensor in have.items():
        if rest[key].shape != tensor.shape:
            raise ValueError(
                f"load: {key} must have the file's shape {list(rest[key].shape)}, got "
                f"{list(tensor.shape)}"
            )
        twin = first.setdefault(id(tensor), key)
        if not _same(rest[twin], rest[key]):
            raise ValueError(_differ(key, twin, "tensor"))
    for key in rest:
        if key not in have and key not in extra:
            raise ValueError(f"load: model must hold {key} of {path.name}, got a model without it")
    return rest


def _dense_state(model: nn.Module, layers: dict) -> dict[str, torch.Tensor]:
    """Dense Parameters and persistent buffers outside the layers that the file holds quantised."""
    out: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name in layers:
            continue
        prefix = f"{name}." if name else ""
        if isinstance(module, _OURS):
            # Quantised or pruned here, dense in the file: say so by the name the file uses.
            raise ValueError(
                f"load: {name} must be dense as in the file, got {type(module).__name__}"
            )
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or prefix + key in layers:
                continue
            if key not in module._non_persistent_buffers_set:
                out[prefix + key] = tensor
    return out


def _extra_state(model: nn.Module, layers: dict) -> list[str]:
    """The keys under which modules keep state of their own, beyond tensors that torch knows."""
    return [
        f"{name}._extra_state" if name else "_extra_state"
        for name, module in model.named_modules(remove_duplicate=False)
        if name not in layers and type(module).get_extra_state is not nn.Module.get_extra_state
    ]


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced: dict[torch.Tensor, nn.Parameter] = {}  # (tensors hash by identity)
    for key, value in tensors.items():
        name, _, leaf = key.rpartition(".")
        module = modules[name]
        place = module._parameters if leaf in module._parameters else module._buffers
        old = place[leaf]
        if not old.is_meta:
            old.copy_(value)
        elif isinstance(old, nn.Parameter):
            # What is tied in the model or in the file becomes one Parameter (`.to("meta")`
            # unties).
            made = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
            made = replaced.setdefault(old, replaced.get(value, made))
            replaced[value] = place[leaf] = made
        else:
            place[leaf] = value.to(old.dtype)
