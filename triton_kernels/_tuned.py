"""Configurations measured on a GPU, read from files. Importing this imports no Triton.

`python -m nibblock tune` writes one file for a GPU. Those in this package's configs/ ship with it;
a user's own lie in the folder that the environment variable NIBBLOCK_TUNED names, and win. A shape
class that no file names keeps the configuration chosen by hand. Files are read at the first launch
on a GPU and kept; a changed file counts in the next process.

A file may only choose among the candidates of its class (`_configs.candidates`), all of them
compiled ahead of time and of one row of `_table`: no file can bring in a kernel or a tile that was
never checked, and one that tries is an error.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from nibblock.triton_kernels import _table
from nibblock.triton_kernels._configs import Config, ShapeClass, candidates

SHIPPED = Path(__file__).resolve().parent / "configs"
VARIABLE = "NIBBLOCK_TUNED"
FORMAT = 1

_forced: Optional[tuple[str, Config]] = None


def slug(gpu: str) -> str:
    """A GPU's name as a file's: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def user_folder() -> Optional[Path]:
    """The folder that NIBBLOCK_TUNED names, None without it.

    Raises:
        ValueError: there is no such folder.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    if not Path(named).is_dir():
        raise ValueError(f"{VARIABLE}: must be a folder, got {named}")
    return Path(named)


def read(path: Path) -> dict[ShapeClass, Config]:
    """The entries of one file.

    Raises:
        ValueError: the file is not one of this format; the text names it, the entry and a way out.
    """

    def wrong(where: str, need: str, got: object) -> ValueError:
        return ValueError(f"{path}: {where} must be {need}, got {got}; tune again or remove it")

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise wrong("content", "JSON", error) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise wrong("format", str(FORMAT), found)
    if not isinstance(content.get("gpu"), str) or slug(content["gpu"]) != path.stem:
        raise wrong("gpu", f"the one the file is named after ({path.stem})", content.get("gpu"))
    level = content.get("capability")
    if not (isinstance(level, list) and len(level) == 2 and all(type(n) is int for n in level)):
        raise wrong("capability", "[major, minor]", level)
    entries = content.get("entries")
    if not isinstance(entries, list):
        raise wrong("entries", "a list", type(entries).__name__)
    found: dict[ShapeClass, Config] = {}
    for number, entry in enumerate(entries):
        where = f"entries[{number}]"
        if not isinstance(entry, dict):
            raise wrong(where, "an object", type(entry).__name__)
        shape = _shape(entry)
        if shape is None or shape.op not in _table.TABLE:
            raise wrong(where, "of a known op with the fields of a shape class", _facts(entry))
        if shape in found:
            raise wrong(where, "of a class of its own", f"{shape} again")
        allowed = candidates(shape, 10 * level[0] + level[1])
        if entry.get("config") not in allowed:
            need = f"one of the {len(allowed)} candidates of {shape}"
            raise wrong(f"{where}.config", need, entry.get("config"))
        found[shape] = entry["config"]
    return found


def _facts(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if k in ShapeClass._fields}


def _shape(entry: dict[str, Any]) -> Optional[ShapeClass]:
    facts = _facts(entry)
    strings = ("op", "dtype")
    right = all(type(v) is (str if k in strings else int) for k, v in facts.items())
    if "op" not in facts or not right:
        return None
    shape = ShapeClass(**facts)
    int4 = shape.op in ("int4_linear", "int4_linear_dx")
    if shape.dtype not in ("float32", "bfloat16", "float16"):
        return None
    if shape.op.startswith(("block_", "masked_")) and shape.block not in (0, 16, 32, 64, 128):
        return None
    if shape.op.startswith("block_") and not shape.block:
        return None
    groups = (16, 32, 64, 128, 256, -1)
    if int4 and (shape.bits not in (4, 8) or shape.group not in groups):
        return None
    return shape


@functools.cache
def _files(gpu: str, folder: Optional[Path]) -> dict[ShapeClass, Config]:
    found: dict[ShapeClass, Config] = {}
    for place in (SHIPPED, folder):
        path = None if place is None else place / f"{slug(gpu)}.json"
        if path is not None and path.is_file():
            found.update(read(path))
    return found


@functools.cache
def lookup(gpu: str, shape: ShapeClass) -> Optional[Config]:
    """What the files say of a class on a GPU; None where they do not name it.

    Args:
        gpu: its name, as torch.cuda.get_device_name gives it.
    Raises:
        ValueError: a file for this GPU is not in order, or NIBBLOCK_TUNED names no folder.
    """
    return _files(gpu, user_folder()).get(shape)


def forget() -> None:
    """Files are read again at the next launch."""
    lookup.cache_clear()
    _files.cache_clear()


@contextlib.contextmanager
def forcing(op: str, config: Config) -> Iterator[None]:
    """Launches of `op` take this configuration, whatever the files say: for the tuner and tests."""
    global _forced
    before, _forced = _forced, (op, config)
    try:
        yield
    finally:
        _forced = before


def choose(gpu: str, shape: ShapeClass, own: Config) -> Config:
    """The configuration of one launch: forced, from a file, or `own`, the one chosen by hand.

    gpu: "" where there is none (the interpreter, and launches that are only recorded).
    """
    if _forced is not None and _forced[0] == shape.op:
        return _forced[1]
    found = lookup(gpu, shape) if gpu else None
    return own if found is None else found
