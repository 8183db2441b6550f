"""What files of adapters and of sparse updates both check before anything of a model changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def check_bases(path: Path, what: str, records: dict[str, Any], prints: dict[str, str]) -> None:
    """Refuses the first layer whose fingerprint is not the file's; `what` the file holds."""
    for key, record in records.items():
        if prints[key] != record["base"]:
            raise ValueError(
                f"load: {key} must be the layer that the {what} of {path.name} was trained on, "
                f"got another weight ({prints[key][:12]}, the file's {record['base'][:12]})"
            )


def check_fields(records: dict[str, Any], **kinds: type) -> None:
    """Refuses, by a TypeError, a layer's field of another type than `save` writes."""
    for key, record in records.items():
        for field, kind in kinds.items():
            if type(record[field]) is not kind:
                got = type(record[field]).__name__
                raise TypeError(f"{field} of {key} must be {kind.__name__}, got {got}")


def check_trained(
    path: Path, model: nn.Module, trained: dict[str, str], tensors: dict[str, torch.Tensor]
) -> dict[str, nn.Parameter]:
    """The model's Parameters by every name, those of `trained` (name -> tensor) checked."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, source in trained.items():
        if key not in parameters or not isinstance(source, str) or source not in tensors:
            where = "model" if key not in parameters else path.name
            raise ValueError(f"load: {where} must hold {key}, got one without it")
        if parameters[key].shape != tensors[source].shape:
            raise ValueError(
                f"load: {key} must have the file's shape {list(tensors[source].shape)}, got "
                f"{list(parameters[key].shape)}"
            )
    return parameters
