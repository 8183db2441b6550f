"""`explain`: which kernel serves a call, and why each row before it in the table does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import nn

from nibblock import _native
from nibblock.nn import AdapterLinear, BlockSparseLinear, Int4Experts, Int4Linear
from nibblock.nn._expert_weight import ExpertWeight
from nibblock.nn.adapter_linear import fused as runs_fused
from nibblock.ops import _checks, _triton


@dataclass(frozen=True)
class Explanation:
    """The choice for one layer shape. `str()` is a small table.

    Attributes:
        layer: its name (or its class), with " xN" for N layers of one shape. Of experts: the
            projection's name, with " xN" for N products of one shape.
        kernel: id of the row that runs; None when no row serves the call.
        refused: (id, reason) of every other row.
        call: what was asked, in words.
        isa: the instruction level in force; on a GPU, its compute capability.
    """

    layer: str
    kernel: str | None
    refused: tuple[tuple[str, str], ...]
    call: str
    isa: str

    def __str__(self) -> str:
        lines = [f"{self.layer}: {self.call}, ISA level {self.isa}"]
        width = max([len(i) for i, _ in self.refused] + [len(self.kernel or "")])
        lines.append(f"  runs     {self.kernel or 'nothing: no kernel serves this call'}")
        lines += [f"  refused  {name.ljust(width)}  {reason}" for name, reason in self.refused]
        return "\n".join(lines)


class Explanations(tuple):
    """The `Explanation` of every distinct layer shape of a model."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n\n".join(str(item) for item in self)


Layer = Union[Int4Linear, BlockSparseLinear, AdapterLinear]
Product = Union[Int4Linear, BlockSparseLinear, AdapterLinear, ExpertWeight]
_LAYERS = (Int4Linear, BlockSparseLinear, AdapterLinear)


def explain(module: nn.Module, x: Any) -> Union[Explanation, Explanations]:
    """Says which kernel runs for an input, and why each other row of the table was refused.

    Args:
        module: an `Int4Linear`, `BlockSparseLinear` or `AdapterLinear`, or any model that holds
            some.
        x: for a layer, its input [..., K] float32 | bfloat16 | float16 (nothing is computed; it may
            be a meta tensor). For a model, what its forward takes: a tensor, a tuple of positional
            or a dict of keyword arguments; the forward runs once, without gradients, to see the
            shapes. `Int4Experts` are a model too: (hidden_states, top_k_index, top_k_weights).
    Returns:
        An `Explanation`, or for a model `Explanations`, one for each distinct shape; both print.
        Experts run a product for each expert that some token chose. An
        `AdapterLinear` without an active adapter, or with a merged one, runs its base alone.
    Raises:
        TypeError: module is not a module, or x of a dtype that is not served. ValueError: x of
        another shape, or a model without any such layer.
    Determinism: the rows are those the dispatcher walks.
    """
    if isinstance(module, _LAYERS):
        if _plain_base(module):
            raise ValueError(
                "explain: module must run a kernel of this package, got an AdapterLinear that runs "
                "its nn.Linear alone"
            )
        meta = isinstance(x, torch.Tensor) and _is_meta(module)
        running(module)._diagnose(x.to("meta") if meta else x)
        return _explain_layer(type(module).__name__, module, x)
    if not isinstance(module, nn.Module):
        raise TypeError(f"explain: module must be an nn.Module, got {type(module).__name__}")
    layers = layers_of(module)
    experts = {m: name for name, m in module.named_modules() if isinstance(m, Int4Experts)}
    if not layers and not experts:
        raise ValueError("explain: module must hold an Int4Linear, got none; accelerate it first")
    seen: dict[tuple, list[tuple[str, Product, torch.Tensor]]] = {}

    def note(layer, args, kwargs):
        value = args[0] if args else kwargs["input"]
        rows = value.numel() // max(1, value.shape[-1])
        key = (rows, value.dtype, *shape_key(layer))
        seen.setdefault(key, []).append((layers[layer], layer, value.detach().to("meta")))

    def note_experts(layer, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        index = args[1] if len(args) > 1 else kwargs["top_k_index"]
        # (Index E stands for an expert that is not here; wrong ones are the forward's to refuse.)
        chosen = index[(index >= 0) & (index < layer._form.experts)].unique(return_counts=True)[1]
        for leaf, weight in layer.projections.items():
            name = f"{experts[layer]}.{leaf}".removeprefix(".")
            for rows in chosen.tolist():
                key = (rows, x.dtype, ExpertWeight, weight._args, weight._columns)
                key += (weight._order is not None,)
                value = torch.empty(rows, weight._columns, dtype=x.dtype, device="meta")
                seen.setdefault(key, []).append((name, weight, value))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    handles += [e.register_forward_pre_hook(note_experts, with_kwargs=True) for e in experts]
    training = {m: m.training for m in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            if isinstance(x, (tuple, list)):
                module(*x)
            elif hasattr(x, "keys"):
                module(**x)
            else:
                module(x)
    finally:
        for handle in handles:
            handle.remove()
        for m, mode in training.items():
            m.training = mode
    out = []
    for calls in seen.values():
        name, layer, value = calls[0]
        out.append(
            _explain_layer(name if len(calls) == 1 else f"{name} x{len(calls)}", layer, value)
        )
    return Explanations(out)


def layers_of(model: nn.Module) -> dict[Layer, str]:
    """The layers of a model that run kernels of this package; a base belongs to its adapter."""
    found = {m: name for name, m in model.named_modules() if isinstance(m, _LAYERS)}
    bases = {id(m.base) for m in found if isinstance(m, AdapterLinear)}
    return {m: name for m, name in found.items() if id(m) not in bases and not _plain_base(m)}


def running(layer: Layer) -> Layer:
    """The base of an AdapterLinear that runs it alone; otherwise the layer itself."""
    if isinstance(layer, AdapterLinear) and (layer.active is None or layer.merged is not None):
        return layer.base
    return layer


def _plain_base(layer: Layer) -> bool:
    return not isinstance(running(layer), _LAYERS)


def _is_meta(layer: Layer) -> bool:
    return next(layer.parameters()).is_meta


def shape_key(layer: Layer) -> tuple:
    layer = running(layer)
    if isinstance(layer, Int4Linear):
        ordered = layer._order is not None
        return (Int4Linear, layer._args, layer.in_features, layer.bias is None, ordered)
    key = (type(layer), layer.out_features, layer.in_features, layer.bias is None)
    key += (layer.block, layer.values.shape[0], layer.values.dtype)
    if isinstance(layer, AdapterLinear):
        int4 = isinstance(layer.base, Int4Linear)
        own = (layer.base._args, layer.base._order is not None) if int4 else None
        key += (layer.adapter().rank, own, runs_fused(layer.base))
    return key


def _explain_layer(name: str, layer: Product, x: torch.Tensor) -> Explanation:
    layer = running(layer)
    rows = x.numel() // max(1, x.shape[-1])
    dtype = _checks.dtype_name(x.dtype)
    packed = isinstance(layer, (Int4Linear, ExpertWeight))
    outputs = layer._rows if packed else layer.out_features
    call = f"[{rows}, {x.shape[-1]}] {dtype} -> {outputs}"
    cuda = next(layer.parameters()).is_cuda
    if packed:
        choice = _cuda_choice(layer, rows, x) if cuda else _int4_choice(layer, rows, dtype)
        call += _int4_text(layer)
        if layer._order is not None:
            call += ", columns of x gathered"
    else:
        values = layer.values
        fused = isinstance(layer, AdapterLinear) and runs_fused(layer.base)
        choice = (
            _cuda_choice(layer, rows, x)
            if cuda
            else _native.block_sparse_select(
                "fused" if fused else "forward",
                rows,
                layer.out_features,
                layer.in_features,
                layer.block,
                values.shape[0],
                dtype,
                _checks.dtype_name(values.dtype),
            )
        )
        call += f", {values.shape[0]} {_checks.dtype_name(values.dtype)} blocks of {layer.block}"
        if fused:
            call += f"{_int4_text(layer.base)} base"
        elif isinstance(layer, AdapterLinear) and isinstance(layer.base, Int4Linear):
            why = "hooks" if layer.base._order is None else "columns in an order of their own"
            call += f"{_int4_text(layer.base)} base with {why}, by itself"
        elif isinstance(layer, AdapterLinear):
            call += f", {_checks.dtype_name(layer.base.weight.dtype)} base by torch"
        if isinstance(layer, AdapterLinear) and layer.adapter().rank:
            call += f", rank {layer.adapter().rank}"
    refused = tuple((str(i), str(reason)) for i, reason in choice["refused"])
    isa = choice.get("level") or _native.cpu_isa()
    return Explanation(name, choice["kernel"], refused, call, isa)


def _cuda_choice(layer: Product, rows: int, x: torch.Tensor) -> dict:
    """The Triton rows of a layer on a GPU, as `_native`'s tables answer."""
    packed = isinstance(layer, (Int4Linear, ExpertWeight))
    op = "int4_linear" if packed else "block_sparse_linear"
    if isinstance(layer, AdapterLinear) and runs_fused(layer.base):
        op = "int4_block_sparse_linear"
    device = next(layer.parameters()).device
    return _triton.choose(op, rows, x.dtype, device)


def _int4_choice(layer: Union[Int4Linear, ExpertWeight], rows: int, dtype: str) -> dict:
    return _native.int4_linear_select(
        "forward",
        rows,
        layer._rows,
        layer._columns,
        layer.group_size,
        layer.bits,
        layer.affine,
        _checks.dtype_name(layer.scale_dtype),
        dtype,
        layer.compute,
    )


def _int4_text(layer: Union[Int4Linear, ExpertWeight]) -> str:
    return (
        f", int{layer.bits} group {layer.group_size}, "
        f"{'affine' if layer.affine else 'symmetric'}, compute {layer.compute}"
    )
