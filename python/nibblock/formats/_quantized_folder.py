"""Reads a transformers folder: config.json and its safetensors files, memory-mapped.

Every tensor's name, shape and dtype is known before any of them is read. Files are opened anew for
each read, so that the pages of what was read before do not stay mapped; within `kept_open` once,
for a header of thousands of experts takes long to parse.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
MODELOPT_FILE = "hf_quant_config.json"
FLOATS = ("F32", "F16", "BF16")  # as safetensors names dtypes


@dataclass(frozen=True)
class TensorInfo:
    """What the header of `file` says of one tensor; dtype as safetensors names it ("I32")."""

    shape: tuple[int, ...]
    dtype: str
    file: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Part:
    """A tensor that a layer needs: the (dtype, shape) it may have; an optional one may lack."""

    forms: tuple[tuple[str, tuple[int, ...]], ...]
    optional: bool = False

    @classmethod
    def of(cls, shape: tuple[int, ...], *dtypes: str, optional: bool = False) -> Part:
        """One shape in any of these dtypes."""
        return cls(tuple((dtype, shape) for dtype in dtypes), optional)

    def stacked(self, count: int) -> Part:
        """So many of them in one tensor."""
        return Part(tuple((dtype, (count, *s)) for dtype, s in self.forms), self.optional)

    def __str__(self) -> str:
        shapes: dict[tuple[int, ...], list[str]] = {}
        for dtype, shape in self.forms:
            shapes.setdefault(shape, []).append(dtype)
        return " or ".join(f"{' or '.join(names)} {list(s)}" for s, names in shapes.items())


def read_json(path: str, op: str) -> dict[str, Any]:
    """The object in a JSON file; a ValueError of `op` if there is none."""
    label = "/".join(os.path.abspath(path).split(os.sep)[-2:])
    try:
        with open(path, encoding="utf-8") as stream:
            value = json.load(stream)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{op}: {label!r} must be JSON, got: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{op}: {label!r} must hold an object, got {type(value).__name__}")
    return value


class Folder:
    """A local transformers folder.

    Attributes:
        config: config.json's values.
        tensors: by name, from all safetensors files.
    Raises:
        FileNotFoundError: no config.json or no safetensors file.
        ValueError: a file is damaged, or the index and the files do not fit each other.
        ImportError: safetensors is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], op: str = "load_quantized") -> None:
        self.path, self.op = os.fspath(path), op
        self.label = os.path.basename(os.path.abspath(self.path))
        if not os.path.isfile(os.path.join(self.path, "config.json")):
            raise FileNotFoundError(
                f"{op}: path must be a transformers folder with config.json, got {self.path!r}"
            )
        self.config = self._json("config.json")
        self._kept: tuple[dict[str, Any], contextlib.ExitStack] | None = None
        self.tensors: dict[str, TensorInfo] = {}
        self._list_tensors()

    def fail(self, need: str, got: object, file: str = "") -> ValueError:
        """The error that says what the folder, or a file in it, must hold."""
        name = f"{self.label}/{file}" if file else self.label
        text = " ".join(str(got).split())  # what others raise may have several lines
        return ValueError(f"{self.op}: {name!r} must {need}, got {text}")

    def settings(self) -> Settings:
        """config.json's quantization_config, or what modelopt writes into a file of its own."""
        value = self.config.get("quantization_config")
        if value is None and os.path.isfile(os.path.join(self.path, MODELOPT_FILE)):
            return self._modelopt_settings()
        if not isinstance(value, dict):
            got = "none" if value is None else type(value).__name__
            raise self.fail("hold quantization_config", got, "config.json")
        return Settings(self, value, "quantization_config.")

    def _modelopt_settings(self) -> Settings:
        whole = Settings(self, self._json(MODELOPT_FILE), "", MODELOPT_FILE)
        whole.child("producer").word(("name",), ("modelopt",), "")
        values = {"quant_method": "modelopt", **whole.child("quantization").values}
        return Settings(self, values, "quantization.", MODELOPT_FILE)

    # --- tensors ----------------------------------------------------------------------------------

    def check(self, name: str, part: Part) -> bool:
        """Whether the folder holds this tensor; raises if it is not as it must be."""
        info = self.tensors.get(name)
        if info is None and part.optional:
            return False
        if info is None:
            raise self.fail(f"hold tensor {name} as {part}", "none")
        if (info.dtype, info.shape) not in part.forms:
            raise self.fail(f"hold tensor {name} as {part}", info, info.file)
        return True

    def read(self, names: Iterable[str], index: int | None = None) -> dict[str, torch.Tensor]:
        """Copies of these tensors, or of what each holds at an index of its first dimension."""
        files: dict[str, list[str]] = {}
        for name in names:
            files.setdefault(self.tensors[name].file, []).append(name)
        out = {}
        for file, members in files.items():
            with self._opened(file) as opened:
                for name in members:
                    whole = index is None
                    part = opened.get_tensor(name) if whole else opened.get_slice(name)[index]
                    out[name] = part.clone()
        return out

    @contextlib.contextmanager
    def kept_open(self) -> Iterator[None]:
        """Within it `read` opens each file once, and the pages of all that it read stay mapped."""
        with contextlib.ExitStack() as stack:
            self._kept = ({}, stack)
            try:
                yield
            finally:
                self._kept = None

    def _opened(self, file: str) -> Any:
        if self._kept is None:
            return self._open(file)
        handles, stack = self._kept
        if file not in handles:
            handles[file] = stack.enter_context(self._open(file))
        return contextlib.nullcontext(handles[file])

    def _json(self, file: str) -> dict[str, Any]:
        return read_json(os.path.join(self.path, file), self.op)

    def _open(self, file: str) -> Any:
        try:
            import safetensors
        except ImportError as error:
            raise ImportError(
                f"{self.op}: needs the safetensors package, which is not installed; "
                "pip install nibblock[transformers]"
            ) from error
        try:
            return safetensors.safe_open(os.path.join(self.path, file), framework="pt")
        except FileNotFoundError as error:
            raise self.fail(f"hold the file {file}", "none") from error
        except (safetensors.SafetensorError, OSError) as error:
            raise self.fail("be a whole safetensors file", error, file) from error

    def _list_tensors(self) -> None:
        index = self._index()
        for file in sorted(set(index.values())) if index is not None else [self._single()]:
            with self._open(file) as opened:
                for name in opened.keys():
                    if index is not None and index.get(name) != file:
                        continue  # not what the index takes from this file
                    part = opened.get_slice(name)
                    self.tensors[name] = TensorInfo(tuple(part.get_shape()), part.get_dtype(), file)
        for name, file in (index or {}).items():
            if name not in self.tensors:
                raise self.fail(f"hold tensor {name}, as {_INDEX} says", "none", file)

    def _index(self) -> dict[str, str] | None:
        """File of each tensor, where there are several files."""
        if not os.path.isfile(os.path.join(self.path, _INDEX)):
            return None
        files = self._json(_INDEX).get("weight_map")
        good = isinstance(files, dict) and all(
            # A name with a folder in it could point anywhere.
            isinstance(file, str) and file and os.path.basename(file) == file
            for file in files.values()
        )
        if not good or not files:
            raise self.fail("hold weight_map, from tensors to file names", "something else", _INDEX)
        return files

    def _single(self) -> str:
        if os.path.isfile(os.path.join(self.path, _SINGLE)):
            return _SINGLE
        # Older quantisers put bits and group into the only file's name.
        found = sorted(f for f in os.listdir(self.path) if f.endswith(".safetensors"))
        if len(found) != 1:
            raise FileNotFoundError(
                f"{self.op}: {self.label!r} must hold {_SINGLE} or {_INDEX}, got "
                f"{', '.join(found) if found else 'no safetensors file'}"
            )
        return found[0]


class Settings:
    """Typed look-ups in a JSON object of config.json or another file; each error names the key."""

    def __init__(
        self, folder: Folder, values: dict[str, Any], prefix: str, file: str = "config.json"
    ) -> None:
        self.folder, self.values, self.prefix, self.file = folder, values, prefix, file

    def fail(self, key: str, need: str) -> ValueError:
        value = json.dumps(self.values.get(key))
        got = "nothing" if key not in self.values else value[:60]
        return self.folder.fail(f"hold {self.prefix}{key} as {need}", got, self.file)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, "an integer")
        return value

    def bits(self, key: str) -> int:
        value = self.integer(key)
        if value not in (4, 8):
            raise self.fail(key, "4 or 8")
        return value

    def group(self, key: str) -> int:
        """Columns of a group; -1 is the whole row."""
        value = self.integer(key)
        if value != -1 and value < 1:
            raise self.fail(key, "-1 or a positive number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def word(self, keys: tuple[str, ...], allowed: tuple[str, ...], default: str) -> str:
        """The first of these keys that is there, in lower case."""
        key = next((k for k in keys if self.values.get(k) is not None), None)
        value = default if key is None else self.values[key]
        text = value.lower() if isinstance(value, str) else value
        if text not in allowed:
            raise self.fail(key or keys[0], " or ".join(f'"{word}"' for word in allowed))
        return text

    def absent(self, key: str) -> None:
        """Refuses a key that would change the function of the model; null and {} do not."""
        if self.values.get(key):
            raise self.fail(key, "null: what it asks for is not done here")

    def child(self, key: str) -> Settings:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return Settings(self.folder, value, f"{self.prefix}{key}.", self.file)
