"""Puts the experts of a GGUF file into a transformers model: codes into Int4Experts, exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from nibblock._report import LayerReport
from nibblock.formats._ggml_types import EXACT_TYPES, Codes, alike
from nibblock.formats._gguf_model import ExpertSlot, Slot
from nibblock.formats._gguf_tensors import FLOATS, TensorReader, as_tensors
from nibblock.nn._expert_form import read_form

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def put_experts(
    model: PreTrainedModel, slot: ExpertSlot, reader: TensorReader, compute: str
) -> LayerReport:
    """Fills the experts of one layer; says what became of them.

    Of each expert gate's rows come first and up's behind them, or they take turns (gpt-oss), as
    transformers has them. The two projections may have different bits and groups. One of a type
    without codes makes the whole layer's experts dense.
    """
    experts = model.get_submodule(slot.module)
    _put_biases(experts, slot.biases, reader)
    tensors = [reader.file.tensors[name] for name in (*slot.gate, *slot.up, *slot.down)]
    kinds = list(dict.fromkeys(info.type for info in tensors))
    shape = tuple(experts.gate_up_proj.shape)
    projections = {"gate_up_proj": (slot.gate, slot.up), "down_proj": (slot.down,)}
    dense = [kind for kind in kinds if not reader.packs(kind)]
    action = "kept"
    if dense:
        for name, parts in projections.items():
            _fill(experts, name, parts, reader)
    else:
        from nibblock.nn import Int4Experts

        turns = _take_turns(experts)
        codes = {
            name: _stack(parts, shape[0], turns, reader) for name, parts in projections.items()
        }
        experts = Int4Experts.from_codes(
            experts,
            {name: _by_expert(value, shape[0]) for name, value in codes.items()},
            group_size={name: value.group for name, value in codes.items()},
            bits={name: value.bits for name, value in codes.items()},
            compute=compute,
        )
        model.set_submodule(slot.module, experts)
        action = f"int{codes['gate_up_proj'].bits}"
    return LayerReport(
        name=slot.module,
        action=action,
        reason=_reason(kinds, dense, reader),
        kind=type(experts).__name__,
        shape=shape,
        bytes_before=4 * sum(info.rows * info.columns for info in tensors),
        bytes_after=sum(p.numel() * p.element_size() for p in experts.parameters()),
    )


def _take_turns(experts: nn.Module) -> bool:
    """Whether rows of gate and up alternate in this module's first projection."""
    return not getattr(experts, "is_concatenated", True)


def _put_biases(experts: nn.Module, names: tuple[str, ...], reader: TensorReader) -> None:
    """Fills the biases of gate and up, which are one Parameter, and of down."""
    if not names:
        return
    gate, up, down = (reader.dense(Slot(name, "", "bias")) for name in names)
    both = (
        torch.stack((gate, up), 2).flatten(1) if _take_turns(experts) else torch.cat((gate, up), 1)
    )
    experts.gate_up_proj_bias = nn.Parameter(both)
    experts.down_proj_bias = nn.Parameter(down)


def _stack(
    parts: tuple[tuple[str, ...], ...], count: int, turns: bool, reader: TensorReader
) -> Codes:
    """[E * N, K] codes in one form: of each expert the rows of each part, one part after the other
    or, where they take turns, one row of each.

    A part is one tensor of all experts or a tensor for each.
    """
    sizes = [len(names) for names in parts]
    flat = alike([reader.codes(name) for names in parts for name in names])
    groups = [flat[sum(sizes[:i]) :][:size] for i, size in enumerate(sizes)]

    def join(array: str) -> np.ndarray:
        each = [np.concatenate([getattr(codes, array) for codes in group]) for group in groups]
        each = [a.reshape(count, -1, a.shape[1]) for a in each]
        joined = np.stack(each, axis=2) if turns else np.concatenate(each, axis=1)
        return joined.reshape(-1, joined.shape[-1])

    first = flat[0]
    offsets = None if first.offsets is None else join("offsets")
    if offsets is not None and not np.isfinite(offsets).all():  # that another part's type needs
        raise reader.file.fail(
            f"hold scales that float32 can multiply in tensor {parts[0][0]}", "more"
        )
    return replace(first, qweight=join("qweight"), scales=join("scales"), offsets=offsets)


def _by_expert(codes: Codes, count: int) -> tuple:
    return tuple(None if t is None else t.view(count, -1, t.shape[1]) for t in as_tensors(codes))


def _fill(
    experts: nn.Module, name: str, parts: tuple[tuple[str, ...], ...], reader: TensorReader
) -> None:
    form = read_form(experts)
    count, (rows, columns) = form.experts, form.sizes[name]
    out = torch.empty(count, rows, columns, dtype=reader.dtype)
    rows //= len(parts)
    # [E, N / parts, K] of each part, in their place
    places = (
        [out[:, index :: len(parts)] for index in range(len(parts))]
        if _take_turns(experts)
        else out.split(rows, dim=1)
    )
    for place, tensors in zip(places, parts):
        for expert in range(count):
            tensor, start = (
                (tensors[expert], 0) if len(tensors) > 1 else (tensors[0], expert * rows)
            )
            reader.fill(place[expert], tensor, start)
    setattr(
        experts, name, nn.Parameter(out.transpose(1, 2).contiguous() if form.transposed else out)
    )


def _reason(kinds: list[str], dense: list[str], reader: TensorReader) -> str:
    listed = ", ".join(kinds)
    if not reader.quantised or (dense and set(dense) <= FLOATS):
        return f"{listed}: dense"
    if dense:
        names = ", ".join(kind for kind in dense if kind not in FLOATS)
        return (
            f"{names} has no exact form here: all experts of the layer are dense; "
            "requantize=True stores 8 bits"
        )
    rounded = [kind for kind in kinds if kind not in EXACT_TYPES]
    if rounded:
        return f"{listed}: {', '.join(rounded)} requantized to 8 bits, rounded"
    return f"{listed}: exact"
