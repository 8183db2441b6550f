"""Checkpoints: a folder each, whose manifest appears last.

    checkpoints/step-00000120/model.safetensors      trained Parameters, blocks, torch's generator
                              optimizer.safetensors  the optimiser's tensors
                              manifest.json          everything else, and size and hash of the above

A folder without a manifest, or whose files are not those of the manifest, is not a checkpoint. Each
file is written under a temporary name, flushed to the disk and renamed, the manifest after the
others, and an older checkpoint goes only when the new one is there: a process that dies at any
moment leaves the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from nibblock._files import _safetensors
from nibblock._files import _write as write_whole

MANIFEST = "manifest.json"
VERSION = 1
_BLOCKS, _TRAINED, _RANDOM = "blocks/", "trained/", "random/torch"


@dataclass
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        trained: name -> Parameter. blocks: name -> int32 [Z, 2], or None. random: torch's generator
            state. optimizer: as of `Optimizer.state_dict`. facts: what JSON can hold.
    """

    trained: dict[str, torch.Tensor]
    blocks: Optional[dict[str, torch.Tensor]]
    random: torch.Tensor
    optimizer: dict[str, Any]
    facts: dict[str, Any]


def save(folder: Path, step: int, checkpoint: Checkpoint, keep: int = 1) -> Path:
    """Writes a checkpoint, then deletes all but the `keep` newest.

    Raises:
        OSError: as the file system says. TypeError: an optimiser state that neither safetensors nor
        JSON can hold.
    """
    place = folder / f"step-{step:08d}"
    if place.exists():
        _remove(place)  # of a run that died here, or that is repeated
    place.mkdir(parents=True)
    tensors = {_TRAINED + name: tensor for name, tensor in checkpoint.trained.items()}
    for name, blocks in (checkpoint.blocks or {}).items():
        tensors[_BLOCKS + name] = blocks
    tensors[_RANDOM] = checkpoint.random
    state, rest = _flat_optimizer(checkpoint.optimizer)
    files = {}
    for name, group in (("model.safetensors", tensors), ("optimizer.safetensors", state)):
        data = _safetensors().torch.save({k: _plain(t) for k, t in group.items()})
        write_whole(place / name, data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {
        "version": VERSION,
        "step": step,
        "files": files,
        "selected": checkpoint.blocks is not None,
        "optimizer": rest,
        "facts": checkpoint.facts,
    }
    text = json.dumps(manifest, indent=1)
    _flush_folder(folder)  # the folder's own name, before what makes it a checkpoint
    write_whole(place / MANIFEST, text.encode())
    for old in _folders(folder)[:-keep]:
        _remove(old)
    return place


def load_latest(folder: Path) -> Optional[Checkpoint]:
    """The newest whole checkpoint; None where there is none."""
    for place in reversed(_folders(folder)):
        found = _load(place)
        if found is not None:
            return found
    return None


def _load(place: Path) -> Optional[Checkpoint]:
    try:
        manifest = json.loads((place / MANIFEST).read_bytes())
        groups = {}
        for name, fact in manifest["files"].items():
            data = (place / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != fact["sha256"]:
                return None
            groups[name] = _safetensors().torch.load(data)
        if manifest["version"] != VERSION:
            raise ValueError(
                f"finetune: {place.name} must be of version {VERSION}, got {manifest['version']}; "
                f"update nibblock"
            )
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError):
        return None  # not whole: an older one is
    tensors = groups["model.safetensors"]

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}

    return Checkpoint(
        trained=part(_TRAINED),
        blocks=part(_BLOCKS) if manifest["selected"] else None,
        random=tensors[_RANDOM],
        optimizer=_whole_optimizer(groups["optimizer.safetensors"], manifest["optimizer"]),
        facts=manifest["facts"],
    )


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _remove(place: Path) -> None:
    """The manifest first: what is left of a deletion that was cut short is not a checkpoint."""
    manifest = place / MANIFEST
    if manifest.exists():
        manifest.unlink()
        _flush_folder(place)
    shutil.rmtree(place)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous().clone()  # safetensors refuses shared storage


def _flat_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of an optimiser's state dict as "index.key", and the rest for JSON."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        values[str(index)] = {}
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                values[str(index)][key] = value
    rest = {k: v for k, v in state.items() if k != "state"}
    return tensors, {"state": values, **rest}


def _whole_optimizer(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state = {int(index): dict(entry) for index, entry in rest["state"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state[int(index)][key] = tensor
    groups = [
        {k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in rest["param_groups"]
    ]
    return {**rest, "state": state, "param_groups": groups}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> int:
    """One safetensors file, whole or not at all; returns its bytes."""
    data = _safetensors().torch.save({n: _plain(t) for n, t in tensors.items()})
    write_whole(path, data)
    return len(data)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    return _safetensors().torch.load(path.read_bytes())
