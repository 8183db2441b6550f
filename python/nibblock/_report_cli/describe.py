"""`describe`: what a path is, by what lies there, and its facts."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Union

import torch

from nibblock._report_cli import folder as _folder
from nibblock._report_cli.facts import Facts, GGUFFacts
from nibblock._report_cli.model_file import describe_model
from nibblock._report_cli.tensor_file import open_file
from nibblock._report_cli.trained_file import describe_trained
from nibblock.formats._ggml_types import EXACT_TYPES, Form, common_form, form
from nibblock.formats._gguf_file import GGUFFile
from nibblock.formats._gguf_model import ExpertSlot, plan
from nibblock.ops import _checks


def describe(path: Union[str, os.PathLike]) -> Facts:
    """The facts of a file or folder.

    Args:
        path: a file of `nibblock.save`, a GGUF file, a transformers folder (`convert`'s too), or a
            folder of `python -m nibblock finetune --out` or of one of its methods.
    Returns:
        `ModelFacts`, `TrainedFacts`, `GGUFFacts`, `FolderFacts` or `FinetuneFacts`; `to_dict()` of
        each is JSON. Headers are read, not weights; but of adapters and updates also the values,
        for their norms, a layer at a time. A transformers model is built on the meta device.
    Raises:
        FileNotFoundError: nothing there. ValueError: damaged, or none of the above; one line that
        names the file and what it must be. ImportError: a package that it needs is not installed.
    Determinism: the same bytes give the same facts.
    """
    given, path = os.fspath(path), Path(path)
    if not path.exists():
        raise FileNotFoundError(f"report: PATH must be a file or folder that exists, got {given!r}")
    if path.is_dir():
        return _folder.describe_folder(given, path)
    with open(path, "rb") as stream:
        magic = stream.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        return _describe_gguf(given, path)
    # Any other file may only be safetensors, which begins with the length of its JSON.
    file = open_file(path)
    header = file.header()
    return (describe_trained if "kind" in header else describe_model)(given, file)


def _describe_gguf(given: str, path: Path) -> GGUFFacts:
    try:
        file = GGUFFile(path)
    except ValueError as error:
        raise ValueError(f"report: {str(error).partition(': ')[2]}") from error
    types: dict[str, dict[str, int]] = {}
    for info in file.tensors.values():
        entry = types.setdefault(info.type, {"tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["weights"] += info.rows * info.columns
        entry["bytes"] += info.nbytes
    architecture = file.metadata.get("general.architecture", "")
    facts = {"architecture": str(architecture), "types": types}
    try:
        layout = plan(file)
    except ValueError as error:  # of an architecture that load_gguf does not build, or damaged
        reason = str(error).partition(": ")[2]
        return GGUFFacts(given, file.size, **facts, layers=None, bytes_here=None, refusal=reason)
    counts: Counter = Counter({"int4": 0, "int8": 0, "dense": 0, "vectors": 0})
    held = 0
    kinds = {slot.tensor: slot.kind for slot in layout.slots}  # a tensor may fill several modules
    for name, kind in kinds.items():
        info = file.tensors[name]
        if kind not in ("linear", "embedding"):
            counts["vectors"] += 1
        elif info.type not in EXACT_TYPES:
            counts["dense"] += 1
        else:
            counts[f"int{form(info.type)[0]}"] += 1
            held += _packed_bytes(info.rows, info.columns, form(info.type))
            continue
        held += 4 * info.rows * info.columns
    for slot in layout.experts:
        held += _count_experts(file, slot, counts)
    return GGUFFacts(given, file.size, **facts, layers=dict(counts), bytes_here=held)


def _packed_bytes(rows: int, columns: int, layout: Form) -> int:
    bits, group, affine, dtype, levels = layout
    scale_dtype = getattr(torch, dtype)
    return _checks.packed_bytes(rows, columns, group, bits, affine, scale_dtype, bool(levels))


def _count_experts(file: GGUFFile, slot: ExpertSlot, counts: Counter) -> int:
    """Bytes of the experts of one layer; their tensors are added to counts."""
    projections = [
        [file.tensors[name] for name in names] for names in (slot.gate + slot.up, slot.down)
    ]
    flat = [info for tensors in projections for info in tensors]
    biases = [file.tensors[name] for name in slot.biases]
    counts["vectors"] += len(biases)
    held = 4 * sum(info.rows * info.columns for info in biases)
    if any(info.type not in EXACT_TYPES for info in flat):  # one makes all of them dense
        counts["dense"] += len(flat)
        return held + 4 * sum(info.rows * info.columns for info in flat)
    experts = len(slot.down) if len(slot.down) > 1 else projections[1][0].shape[0]
    for tensors in projections:
        layout = common_form([form(info.type) for info in tensors])
        counts[f"int{layout[0]}"] += len(tensors)
        rows = sum(info.rows for info in tensors) // experts
        held += experts * _packed_bytes(rows, tensors[0].columns, layout)
    return held
