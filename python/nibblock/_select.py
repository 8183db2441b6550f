"""`explain`: which kernel serves a call, and why each row before it in the table does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import nn

from nibblock import _native
from nibblock.nn import Int4Linear
from nibblock.ops import _checks


@dataclass(frozen=True)
class Explanation:
    """The choice for one layer shape. `str()` is a small table.

    Attributes:
        layer: its name (or "Int4Linear"), with " xN" for N layers of one shape.
        kernel: id of the row that runs; None when no row serves the call.
        refused: (id, reason) of every other row.
        call: what was asked, in words.
        isa: the instruction level in force.
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


def explain(module: nn.Module, x: Any) -> Union[Explanation, Explanations]:
    """Says which kernel runs for an input, and why each other row of the table was refused.

    Args:
        module: an `Int4Linear`, or any model that holds some.
        x: for an `Int4Linear`, its input [..., K] float32 | bfloat16 | float16 (nothing is
            computed; it may be a meta tensor). For a model, what its forward takes: a tensor, a
            tuple of positional or a dict of keyword arguments; the forward runs once, without
            gradients, to see the shapes.
    Returns:
        An `Explanation`, or for a model `Explanations`, one for each distinct shape; both print.
    Raises:
        TypeError: module is not a module, or x of a dtype that is not served. ValueError: x of
        another shape, or a model without any Int4Linear.
    Determinism: the rows are those the dispatcher walks.
    """
    if isinstance(module, Int4Linear):
        module._diagnose(
            x.to("meta") if isinstance(x, torch.Tensor) and module.packed.is_meta else x
        )
        return _explain_layer("Int4Linear", module, x)
    if not isinstance(module, nn.Module):
        raise TypeError(f"explain: module must be an nn.Module, got {type(module).__name__}")
    layers = {m: name for name, m in module.named_modules() if isinstance(m, Int4Linear)}
    if not layers:
        raise ValueError("explain: module must hold an Int4Linear, got none; accelerate it first")
    seen: dict[tuple, list[tuple[str, Int4Linear, torch.Tensor]]] = {}

    def note(layer, args):
        value = args[0]
        rows = value.numel() // max(1, value.shape[-1])
        key = (rows, value.dtype, layer._args, layer.in_features, layer.bias is None)
        seen.setdefault(key, []).append((layers[layer], layer, value.detach().to("meta")))

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
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


def _explain_layer(name: str, layer: Int4Linear, x: torch.Tensor) -> Explanation:
    rows = x.numel() // max(1, x.shape[-1])
    dtype = _checks.dtype_name(x.dtype)
    choice = _native.int4_linear_select(
        "forward",
        rows,
        layer.out_features,
        layer.in_features,
        layer.group_size,
        layer.bits,
        layer.affine,
        _checks.dtype_name(layer.scale_dtype),
        dtype,
        layer.compute,
    )
    call = (
        f"[{rows}, {layer.in_features}] {dtype} -> {layer.out_features}, int{layer.bits} group "
        f"{layer.group_size}, {'affine' if layer.affine else 'symmetric'}, compute {layer.compute}"
    )
    refused = tuple((str(i), str(reason)) for i, reason in choice["refused"])
    return Explanation(name, choice["kernel"], refused, call, _native.cpu_isa())
