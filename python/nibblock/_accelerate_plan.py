"""What `accelerate` would do to a model, from shapes alone: the model may be on the meta device."""

from __future__ import annotations

from typing import Optional

import torch
from torch import nn

from nibblock import _accelerate as _tree
from nibblock._config import Int4Config
from nibblock._report import LayerReport, Report
from nibblock._ties import parameter_owners
from nibblock.nn import _expert_form as _experts
from nibblock.nn._conv1d import is_conv1d
from nibblock.ops import _checks


def plan(model: nn.Module, config: Optional[Int4Config] = None) -> Report:
    """The report of `accelerate(model, config)`, without a weight being read or replaced.

    Args:
        model: any module tree; its Parameters may be on the meta device.
        config: as of `accelerate`, an `Int4Config`; the default one when None.
    Returns:
        A `Report` whose rows, reasons and bytes are those of `accelerate`. Only values say whether
        float16 holds the scales as well as float32: here it does, as for weights of a trained
        network. Where it does not, a layer takes 2 bytes more a group (4 with offsets).
    Determinism: the same model gives the same report. The model is not changed.
    """
    config = Int4Config() if config is None else config
    layers = _tree._find_layers(model, config)
    owners = parameter_owners(model)
    _tree._decide(model, layers, owners, config, _tree._selector(None), [], meta=True)
    before = after = _tree.model_bytes(model)
    rows, packed = [], set()
    # As `accelerate` converts them: a tied head takes the format of its embedding.
    tables = {
        id(layer.module.weight)
        for layer in layers
        if isinstance(layer.module, nn.Embedding) and not layer.reason
    }
    for layer in layers:
        old = layer.module
        size = _tree._module_bytes(old)
        row = _tree._row(layer, size, {})
        if not layer.reason:
            bits, parts = _packed(old, config, tables)
            kept = size - sum(_tree._bytes(w) for w, _ in parts)
            for weight, new in parts:
                if id(weight) not in packed:
                    after += new - _tree._bytes(weight)
                    packed.add(id(weight))
            fields = {**row.__dict__, "action": f"int{bits}"}
            fields["bytes_after"] = kept + sum(new for _, new in parts)
            row = LayerReport(**fields)
        rows.append(row)
    return Report(rows=rows, model_bytes_before=before, model_bytes_after=after)


def _packed(
    module: nn.Module, config: Int4Config, tables: set[int]
) -> tuple[int, list[tuple[torch.Tensor, int]]]:
    """(bits, each weight of the module with the bytes that it takes packed)."""
    form = (config.group_size, config.bits, not config.symmetric)
    if _tree._is_plain(module):
        if id(module.weight) in tables:
            form = (32, 8, False)
        rows, columns = module.weight.t().shape if is_conv1d(module) else module.weight.shape
        size = _checks.packed_bytes(rows, columns, *form, torch.float16)
        return form[1], [(module.weight, size)]
    shape = _experts.read_form(module)
    parts = []
    for (_, weight), size in zip(_experts.weights(module), shape.sizes.values()):
        one = _checks.packed_bytes(*size, *form, torch.float16)
        parts.append((weight, shape.experts * one))
    return config.bits, parts
