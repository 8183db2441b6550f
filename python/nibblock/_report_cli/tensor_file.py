"""The header of a safetensors file: names, types, shapes, bytes and nibblock's own metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from nibblock import _files
from nibblock._file_write import _KEY, _safetensors
from nibblock.sparse._selection import KIND as SELECTION


@dataclass(frozen=True)
class TensorFacts:
    """One tensor: dtype as safetensors names it ("F32", "BF16", "U8")."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numbers(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


@dataclass(frozen=True)
class TensorFile:
    """A file's checked header; values are read by name, from a memory map.

    Attributes:
        path; file_bytes. metadata: the strings of the file. tensors: name -> TensorFacts.
    """

    path: Path
    file_bytes: int
    metadata: dict[str, str]
    tensors: dict[str, TensorFacts]

    @property
    def ours(self) -> bool:
        """Whether nibblock wrote it."""
        return _KEY in self.metadata

    def header(self) -> dict[str, Any]:
        """nibblock's metadata.

        Raises:
            ValueError: another library's file, a selection, a damaged or newer header.
        """
        if not self.ours:
            raise ValueError(
                f"report: {self.path.name} must be written by nibblock.save, got a safetensors "
                f"file without its metadata"
            )
        if self.raw().get("kind") == SELECTION:
            raise ValueError(
                f"report: {self.path.name} must be a model, adapter or sparse update, got a "
                f"selection of blocks; print(nibblock.Selection.load(PATH)) shows it"
            )
        with own_words():
            return _files._read_header(self.path, self.metadata)

    def raw(self) -> dict[str, Any]:
        """The metadata unchecked; empty where it is no JSON object."""
        try:
            value = json.loads(self.metadata[_KEY])
        except (KeyError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def library(self) -> Optional[str]:
        """The version of nibblock that wrote the file; None for files of before it was kept."""
        value = self.raw().get("library")
        return value if isinstance(value, str) else None

    def need(self, name: str) -> TensorFacts:
        """The tensor of that name; ValueError where there is none."""
        if name not in self.tensors:
            raise ValueError(
                f"report: {self.path.name} must hold {name}, got a file without it; it is damaged"
            )
        return self.tensors[name]

    def read(self, *names: str) -> list[torch.Tensor]:
        """The values of these tensors, which must be in the file."""
        with _safetensors().safe_open(str(self.path), framework="pt") as file:
            return [file.get_tensor(name) for name in names]


class own_words:
    """Turns the "load: ..." of a check that is shared with `load` into "report: ..."."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: Optional[BaseException], trace: object) -> None:
        if isinstance(error, ValueError) and str(error).startswith("load"):
            raise ValueError(f"report: {str(error).partition(': ')[2]}") from error


def open_file(path: Path) -> TensorFile:
    """Reads the header.

    Raises:
        ValueError: not a whole safetensors file. ImportError: safetensors is not installed.
        OSError: as the file system says.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:  # checks it against the size
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"report: {path.name} must be a whole safetensors file, got: {error}"
        ) from error
    with open(path, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        table = json.loads(stream.read(size))
    tensors = {
        name: TensorFacts(
            entry["dtype"],
            tuple(entry["shape"]),
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in table.items()
        if name != "__metadata__"
    }
    return TensorFile(path, path.stat().st_size, metadata, tensors)
