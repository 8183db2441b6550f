"""`add_adapters` and `activate_adapter`: adapters on many layers of a model at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

import torch
from torch import nn

from nibblock import _accelerate as _tree
from nibblock._config import AdapterConfig
from nibblock._report import LayerReport, Report
from nibblock._ties import parameter_owners
from nibblock.nn import AdapterLinear, BlockSparseLinear, Int4Linear
from nibblock.nn._conv1d import KEPT_TRANSPOSED, conv1d_class, is_conv1d, linear_shape


def add_adapters(
    model: nn.Module,
    config: Optional[AdapterConfig] = None,
    blocks: Optional[Mapping[str, torch.Tensor]] = None,
) -> Report:
    """Puts a zero adapter on the linears of `model`, in place; everything else is frozen.

    Linears become `AdapterLinear`s with the linear as their base; a layer that is one already gets
    another adapter. The new adapters are active, and they alone ask for gradients. The model
    computes what it computed before, until they are trained.

    Args:
        model: any module tree, dense or with `Int4Linear`s. Not itself a linear: use
            `AdapterLinear` for a single one.
        config: `AdapterConfig()` when None.
        blocks: layer name -> int [Z, 2] (or bool mask), for example a selection by impact; layers
            that it does not name get no adapter; a `Selection` must have config's block edge. None:
            `config.density` of every layer's blocks.
    Returns:
        A `Report`: a row for every linear, with the reason for each one that got no adapter. Those
        are: linears whose class has a forward, parameters or parametrisations of its own;
        projections of `nn.MultiheadAttention` and linears of `nn.TransformerEncoderLayer`, whose
        fast paths read weights directly; weights in other dtypes than float32, bfloat16, float16;
        transformers' `Conv1D`s (accelerate the model first: an `Int4Linear` takes an adapter).
    Raises:
        TypeError: model is not a module, or config not an AdapterConfig. ValueError: model is
        itself a linear, blocks names a layer that is none, blocks do not fit a layer, a layer has
        an adapter of this name already, or one is merged. The model is unchanged then.
    Gradients: the new adapters'. Determinism: the same arguments give the same blocks (a low-rank
        pair starts from torch's generator).
    Example:
        >>> report = nibblock.add_adapters(model, nibblock.AdapterConfig(density=0.02))
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    """
    op = "add_adapters"
    config = AdapterConfig() if config is None else config
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"{op}: config must be an AdapterConfig, got {type(config).__name__}")
    if isinstance(model, (nn.Linear, AdapterLinear)):
        raise ValueError(
            f"{op}: model must be a tree with layers to adapt, got a single "
            f"{type(model).__name__}; use AdapterLinear"
        )
    if blocks is not None and not isinstance(blocks, Mapping):
        raise TypeError(f"{op}: blocks must map layer names, got {type(blocks).__name__}")
    edge = getattr(blocks, "block", config.block)
    if edge != config.block:
        raise ValueError(
            f"{op}: config.block must be the selection's {edge}, got {config.block}; pass "
            f"AdapterConfig(block={edge})"
        )
    layers = _find(model)
    _decide(layers, config, blocks)
    report = Report(model_bytes_before=_tree.model_bytes(model))
    made = {layer.name: _make(op, layer, config, blocks) for layer in layers if not layer.reason}
    # Nothing above touched the model; nothing below can refuse.
    before = {layer.name: _bytes(layer.module) for layer in layers}
    owners = parameter_owners(model)
    model.requires_grad_(False)
    for layer in layers:
        new = made.get(layer.name)
        if new is None:
            continue
        if isinstance(layer.module, AdapterLinear):
            layer.module._put(config.name, new.adapter(config.name).requires_grad_())
            continue
        new.requires_grad_(False)
        new.adapter().requires_grad_()
        new._tied = tied_to(layer.module, owners)
        for parent, attribute in layer.places:
            parent._modules[attribute] = new
    rename_tied_keys(model)
    report.model_bytes_after = _tree.model_bytes(model)
    report.rows = [_row(layer, config, made.get(layer.name), before) for layer in layers]
    report.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return report


def activate_adapter(model: nn.Module, name: Optional[str]) -> int:
    """Makes the adapter of that name the active one on every layer that has it; others run bare.

    Args:
        model: a tree with `AdapterLinear`s.
        name: of the adapter; None deactivates all. Nothing is copied.
    Returns:
        On how many layers it is active now.
    Raises:
        ValueError: no layer has an adapter of that name, or another one is merged on some layer
        (the text names it); nothing has changed then.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AdapterLinear)}
    having = {n: m for n, m in layers.items() if name in m.names}
    if name is not None and not having:
        known = ", ".join(sorted({a for m in layers.values() for a in m.names})) or "none"
        raise ValueError(f"activate_adapter: name must be one of {known}, got {name!r}")
    for path, layer in layers.items():
        wanted = name if path in having else None
        if layer.merged is not None and layer.merged != wanted:
            raise ValueError(
                f"activate_adapter: {path} must be unmerged first, got {layer.merged!r} merged; "
                f"call unmerge()"
            )
    for path, layer in layers.items():
        layer.activate(name if path in having else None)
    return len(having)


# --- finding and deciding -----------------------------------------------------------------------


def _find(model: nn.Module) -> list[_tree._Layer]:
    kinds = (nn.Linear, AdapterLinear, *filter(None, (conv1d_class(),)))
    layers: dict[int, _tree._Layer] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        prefix, _, attribute = name.rpartition(".")
        parent = modules.get(prefix)
        if not isinstance(module, kinds) or isinstance(parent, AdapterLinear):
            continue
        layer = layers.setdefault(id(module), _tree._Layer(name, module, []))
        layer.places.append((parent, attribute))
    return list(layers.values())


def _decide(layers, config: AdapterConfig, blocks) -> None:
    op = "add_adapters"
    skip = _tree._patterns(config.skip, op)
    wanted = _tree._selector(config.where, op)
    for layer in layers:
        module = layer.module
        if _tree._matches(layer.name, skip):
            layer.reason = "in skip"
        elif isinstance(module, BlockSparseLinear):
            layer.reason = "block-sparse already"
        elif is_conv1d(module):
            layer.reason = KEPT_TRANSPOSED
        elif not isinstance(module, (AdapterLinear, Int4Linear)):
            layer.reason = _tree._unfit(layer, meta=True)
        elif isinstance(module, Int4Linear):
            layer.reason = _tree._unfit_parent(layer)
        if not layer.reason and not wanted(layer.name, module):
            layer.reason = "not selected by where"
        if not layer.reason and blocks is not None and layer.name not in blocks:
            layer.reason = "not named in blocks"
    if blocks is not None:
        kept = {layer.name: layer.reason for layer in layers}
        for name in blocks:
            if kept.get(name, "no linear of the model"):
                raise ValueError(
                    f"{op}: blocks must name linears that take an adapter, got {name!r}: "
                    f"{kept.get(name, 'no linear of the model')}"
                )


def _make(op: str, layer, config: AdapterConfig, blocks) -> AdapterLinear:
    """A new AdapterLinear over the layer's linear; the model is not touched."""
    module = layer.module
    base = module.base if isinstance(module, AdapterLinear) else module
    asked = {id(p): p.requires_grad for p in base.parameters()}
    try:
        if isinstance(module, AdapterLinear):
            module._check_name(config.name)
            module._check_unmerged("another is added")
        choice = config.density if blocks is None else blocks[layer.name]
        return AdapterLinear(base, config.block, choice, config.rank, config.name, config.dtype)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {layer.name}: {error}") from error
    finally:
        for parameter in base.parameters():  # frozen only once every layer has been made
            parameter.requires_grad_(asked[id(parameter)])


def tied_to(module: nn.Module, owners) -> str:
    """The other Parameter of the model that is this linear's weight; empty if there is none."""
    if isinstance(module, Int4Linear):
        return ""
    for name, other, key in owners[id(module.weight)]:
        if other is not module:
            return f"{name}.{key}"
    return ""


def rename_tied_keys(model: nn.Module) -> None:
    """Tells transformers' `tie_weights` where the weights of adapted layers are now.

    Such a model keeps {"lm_head.weight": "model.embed_tokens.weight"}; the head's is now
    "lm_head.base.weight".
    """

    def renamed(module: nn.Module, key: str) -> str:
        path, _, leaf = key.rpartition(".")
        child = module
        for part in path.split(".") if path else ():
            child = getattr(child, "_modules", {}).get(part)
        return f"{path}.base.{leaf}" if isinstance(child, AdapterLinear) else key

    for module in model.modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            keys = getattr(module, attribute, None)
            if isinstance(keys, dict):
                new = {renamed(module, k): renamed(module, v) for k, v in keys.items()}
                if new != keys:
                    setattr(module, attribute, new)


# --- report -------------------------------------------------------------------------------------


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _row(layer, config: AdapterConfig, new: Optional[AdapterLinear], before) -> LayerReport:
    module = layer.module
    base = module.base if isinstance(module, AdapterLinear) else module
    extra = 0 if new is None else _bytes(new.adapter(config.name))
    return LayerReport(
        name=layer.name,
        action="kept" if new is None else "adapter",
        reason=layer.reason,
        kind=type(base).__name__,
        shape=linear_shape(module),
        bytes_before=before[layer.name],
        bytes_after=before[layer.name] + extra,
    )
