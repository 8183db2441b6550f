"""`sparse_update`: trains selected blocks of a model, in place; `unmask`: the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import nn

from nibblock import _accelerate as _tree
from nibblock._carry_over import carry_over
from nibblock._config import Where
from nibblock._ties import parameter_owners
from nibblock.nn import AdapterLinear, BlockSparseLinear, Int4Linear, MaskedLinear
from nibblock.nn._conv1d import KEPT_TRANSPOSED, conv1d_class, is_conv1d


def sparse_update(
    model: nn.Module,
    selection: Mapping[str, torch.Tensor],
    block: Optional[int] = None,
    where: Where = None,
    dtype: Optional[torch.dtype] = None,
    keep_original: bool = True,
) -> nn.Module:
    """Makes the selected blocks of a model trainable, in place, and freezes everything else.

    Each selected linear becomes a `MaskedLinear` with the same weight Parameter; no byte of it
    changes, and no copy of it is made. One that is a `MaskedLinear` already gets the new list: what
    it trained before stays in its weight. The model computes what it computed before, until an
    optimiser moves `trainable_parameters(model)`.

    Args:
        model: any module tree with dense linears. Not itself a linear: use
            `MaskedLinear.from_linear` for a single one.
        selection: layer name -> int [Z, 2] (row block, column block), sorted, or a bool mask
            [ceil(N/B), ceil(K/B)]; `nibblock.select_blocks` makes one. Layers that it does not name
            are frozen.
        block: B, one of 16, 32, 64, 128; None for the selection's own, else 32.
        where: which of the named layers to take: None for all, a name pattern, a list of them, or a
            callable (name, module) -> bool.
        dtype: of the trained values: float32, or the weight's; None for the weight's (float32 for
            float16). float32 values of a bfloat16 weight are its master copy.
        keep_original: whether each layer keeps its blocks as they were, for `revert` and `save`.
    Returns:
        model.
    Raises:
        TypeError: model is not a module, or selection not a mapping; a list of another dtype.
        ValueError: nothing is left to train (an empty selection, or where takes none of it);
        selection names something else than a dense linear of the model, a weight that is tied to
        another module's (it would change there as well), an `Int4Linear` (use `add_adapters`),
        transformers' `Conv1D`, a linear whose class has a forward or parameters of its own, or
        blocks that do not fit. The model is unchanged then.
    Gradients: the selected blocks, packed [Z, B, B]. Determinism: the same arguments give the same
        model.
    Example:
        >>> nibblock.sparse_update(model, {"0": torch.tensor([[0, 0], [2, 1]])})
        >>> optimizer = nibblock.optim.MaskedAdamW(nibblock.trainable_parameters(model), lr=1e-3)
    """
    op = "sparse_update"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            f"{op}: model must be a tree with layers to train, got a single "
            f"{type(model).__name__}; use MaskedLinear.from_linear"
        )
    if not isinstance(selection, Mapping):
        raise TypeError(f"{op}: selection must map layer names, got {type(selection).__name__}")
    if block is None:
        block = getattr(selection, "block", 32)
    wanted = _tree._selector(where, op)
    layers = find_layers(model)
    owners = parameter_owners(model)
    chosen = {}
    for name in selection:
        layer = layers.get(name)
        reason = _refusal(layer, owners)
        if reason:
            raise ValueError(
                f"{op}: selection must name dense linears of the model, got {name!r}: {reason}"
            )
        if any(layer is other for other in chosen.values()):
            raise ValueError(f"{op}: selection must name each layer once, got {name!r} again")
        if wanted(name, layer.module):
            chosen[name] = layer
    if not chosen:
        got = f"none of {len(selection)} for where={where!r}" if selection else "an empty selection"
        raise ValueError(f"{op}: selection and where must leave a layer to train, got {got}")
    made = {}
    for name, layer in chosen.items():
        made[name] = _make(op, layer, selection[name], block, dtype, keep_original)
    # Nothing above touched the model; nothing below can refuse.
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    for name, layer in chosen.items():
        if isinstance(layer.module, MaskedLinear):
            layer.module.set_blocks(made[name])
            layer.module.values.requires_grad_()
            continue
        new = made[name].requires_grad_(False)
        new.values.requires_grad_()
        swap(layer, new)
    return model


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every Parameter of a model that asks for a gradient, once.

    Args:
        model: any module tree.
    Returns:
        A list in the order of `model.parameters()`: what an optimiser takes.
    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"trainable_parameters: model must be an nn.Module, got {type(model).__name__}"
        )
    return [p for p in model.parameters() if p.requires_grad]


def unmask(model: nn.Module, revert: bool = False) -> nn.Module:
    """Turns every `MaskedLinear` of a model back into an `nn.Linear`, in place.

    Args:
        model: any module tree.
        revert: False keeps what was trained; True first puts the original bytes back.
    Returns:
        model; weights are the same Parameters as before and stay frozen; hooks and attributes that
        were set on a layer stay too.
    Raises:
        TypeError: model is not a module. ValueError: revert, and a layer did not keep its original
        blocks; or model is itself a `MaskedLinear` (use `to_linear`). The model is unchanged then.
    """
    op = "unmask"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, MaskedLinear):
        raise ValueError(f"{op}: model must be a tree, got a single MaskedLinear; use to_linear")
    layers = [
        layer for layer in find_layers(model).values() if isinstance(layer.module, MaskedLinear)
    ]
    if revert:
        for layer in layers:
            if layer.module._origin is None:
                raise ValueError(
                    f"{op}: {layer.name} must have kept its original blocks, got none; pass "
                    f"keep_original=True to sparse_update"
                )
    for layer in layers:
        if revert:
            layer.module.revert()
        new = layer.module.to_linear()
        carry_over(layer.module, new)
        swap(layer, new)
    return model


# --- layers --------------------------------------------------------------------------------------


def find_layers(model: nn.Module) -> dict[str, _tree._Layer]:
    """Every linear and adapter of a model with the places it stands in, by each of its names."""
    kinds = (nn.Linear, AdapterLinear, *filter(None, (conv1d_class(),)))
    layers: dict[int, _tree._Layer] = {}
    named: dict[str, _tree._Layer] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if isinstance(module, kinds) and name:
            prefix, _, attribute = name.rpartition(".")
            layer = layers.setdefault(id(module), _tree._Layer(name, module, []))
            layer.places.append((modules[prefix], attribute))
            named[name] = layer
    return named


def _refusal(layer: Optional[_tree._Layer], owners) -> str:
    """Why blocks of this layer cannot be trained in place; empty if they can."""
    if layer is None:
        return "no linear of the model"
    module = layer.module
    if isinstance(module, Int4Linear):
        return "its weight is held in 4 bits, which are not trained in place; use add_adapters"
    if isinstance(module, AdapterLinear):
        return "it has an adapter, which is trained instead of its base"
    if isinstance(module, BlockSparseLinear):
        return "block-sparse already, its values are Parameters of their own"
    if is_conv1d(module):
        return KEPT_TRANSPOSED
    if any(isinstance(parent, AdapterLinear) for parent, _ in layer.places):
        return "the base of an AdapterLinear, which is trained instead"
    reason = "" if isinstance(module, MaskedLinear) else _tree._unfit(layer)
    if reason:
        return reason
    tied = [n for n, other, _ in owners[id(module.weight)] if other is not module]
    return f"its weight is tied to {tied[0]}, where it would change too" if tied else ""


def _make(op, layer, blocks, block, dtype, keep_original) -> Any:
    """A new MaskedLinear over the layer's weight, or for one that is there its checked list; the
    model is not touched.
    """
    module = layer.module
    try:
        if isinstance(module, MaskedLinear):
            if module.block != block:
                raise ValueError(
                    f"block must be {module.block} as its values are, got {block}; use unmask first"
                )
            return module._checked_blocks(blocks)
        asked, kept = module.weight.requires_grad, module.weight.grad
        try:
            new = MaskedLinear.from_linear(module, blocks, block, dtype, keep_original)
        finally:  # frozen only once every layer has been made
            module.weight.requires_grad_(asked)
            module.weight.grad = kept
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {layer.name}: {error}") from error
    carry_over(module, new)
    return new


def swap(layer: _tree._Layer, new: nn.Module) -> None:
    """Puts a module into every place of a layer."""
    for parent, attribute in layer.places:
        parent._modules[attribute] = new
