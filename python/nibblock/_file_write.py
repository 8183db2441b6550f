"""How a safetensors file is written: its bytes first, then all of it or nothing."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from nibblock._version import __version__

_KEY = "nibblock"  # of the metadata


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "nibblock: saving and loading needs safetensors: pip install nibblock[transformers]"
        ) from error
    return safetensors


def _pack(safetensors, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> bytes:
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"save: {key} must hold data, got a tensor on the meta device")
    return safetensors.torch.save(
        {k: t.detach().to("cpu").contiguous() for k, t in tensors.items()},
        # One key only: safetensors writes several in no fixed order. "library" is for people: what
        # may be read is what "version" says.
        metadata={_KEY: json.dumps({**header, "library": __version__})},
    )


def _write(path: Path, data: bytes) -> None:
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent or ".")
    except OSError as error:  # it names the temporary file, which nobody asked for
        raise type(error)(
            f"save: path must lie in a folder that exists and can be written to, got "
            f"{str(path)!r} ({error.strerror})"
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent or ".", os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
