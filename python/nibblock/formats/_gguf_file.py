"""Reads the container of a GGUF file: header, metadata, tensor table, tensor bytes.

    magic "GGUF" | version u32 | tensors u64 | pairs u64 | pairs | tensor table | padding | data

Everything is little-endian. Each number that the file states is checked against the file's size
before it is used, so a corrupt file costs one ValueError and never memory, time or a crash.
Tensors are read
one by one and never mapped: the peak memory of an import is its result plus one tensor.

Source: the GGUF specification of the ggml project (versions 2 and 3 differ only in byte order
support).
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

# id: (name, values per block, bytes per block). Ids that upstream has removed are absent on
# purpose.
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

# Metadata value types: id -> NumPy dtype; 8 is a string, 9 an array.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MAX_NAME = 65535  # longest key the format allows; longer ones mean a corrupt length


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table. ``shape`` is in row-major order: [N, K] for a linear."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64)) if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        return self.shape[-1]


class _Cursor:
    """Walks the header; every read says what it was reading when the file ends too early."""

    def __init__(self, data: mmap.mmap, label: str) -> None:
        self.data, self.label, self.at, self.size = data, label, 0, len(data)

    def fail(self, need: str, got: object) -> ValueError:
        return ValueError(f"load_gguf: {self.label} must {need}, got {got}")

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self.fail(
                f"hold {what}",
                f"{count} bytes at {self.at} of {self.size}; truncated or corrupt file",
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def u32(self, what: str) -> int:
        return struct.unpack("<I", self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return struct.unpack("<Q", self.take(8, what))[0]

    def text(self, what: str, limit: int | None = None) -> str:
        length = self.u64(f"the length of {what}")
        if limit is not None and length > limit:
            raise self.fail(
                f"hold {what} of at most {limit} bytes", f"{length}; the file is corrupt"
            )
        raw = self.take(length, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            if limit is None:  # vocabularies do hold byte pieces that are not UTF-8
                return raw.decode("utf-8", errors="replace")
            raise self.fail(f"hold {what} in UTF-8", repr(raw[:40])) from None

    def skip_text(self, what: str) -> None:
        length = self.u64(f"the length of {what}")
        if length > self.size - self.at:
            self.take(length, what)
        self.at += length

    def value(self, kind: int, key: str) -> Any:
        what = f"metadata {key}"
        if kind == _STRING:
            return self.text(what)
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        if kind != _ARRAY:
            raise self.fail(f"hold {what} of a known value type", kind)
        item, count = self.u32(what), self.u64(what)
        if item in _SCALARS:
            dtype = np.dtype(_SCALARS[item])
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if item != _STRING:
            raise self.fail(
                f"hold {what} as an array of numbers or strings", f"element type {item}"
            )
        if count > (self.size - self.at) // 8:
            raise self.fail(f"hold {what}", f"{count} strings in {self.size - self.at} bytes")
        # Vocabularies have 100,000 entries and nothing here reads them: walk over, keep the count.
        for _ in range(count):
            self.skip_text(what)
        return StringArray(count)


@dataclass(frozen=True)
class StringArray:
    """Stands for an array of strings that was walked over and not kept."""

    count: int

    def __len__(self) -> int:
        return self.count


class GGUFFile:
    """The checked header of a GGUF file.

    Args:
        path: file name. Read, never written; closed again before the constructor returns.
    Attributes:
        metadata: key -> number, string, NumPy array or StringArray.
        tensors: name -> TensorInfo, in file order.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not a GGUF file, a version other than 2 and 3, big-endian, truncated, or
            corrupt; the message names the file and the metadata key or tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.label = repr(os.path.basename(self.path))
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        with open(self.path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size < 24:
                raise self.fail("hold a GGUF header of 24 bytes", f"a file of {self.size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._parse(_Cursor(data, self.label))

    def fail(self, need: str, got: object) -> ValueError:
        return ValueError(f"load_gguf: {self.label} must {need}, got {got}")

    def _parse(self, cursor: _Cursor) -> None:
        magic = cursor.take(4, "the magic")
        if magic != b"GGUF":
            raise self.fail("start with the magic b'GGUF'", repr(magic))
        version = cursor.u32("the version")
        if version not in (2, 3):
            if version and version & 0xFFFF == 0:
                raise self.fail(
                    "be little-endian", "a big-endian file; convert it with the gguf package"
                )
            raise self.fail("be GGUF version 2 or 3", version)
        tensors = cursor.u64("the tensor count")
        pairs = cursor.u64("the metadata count")
        # A pair takes at least 13 bytes and a table row 32: larger counts cannot be true.
        if pairs > self.size // 13 or tensors > self.size // 32:
            raise self.fail(
                "hold its stated counts", f"{tensors} tensors and {pairs} metadata pairs"
            )
        for index in range(pairs):
            key = cursor.text(f"metadata key {index}", _MAX_NAME)
            if key in self.metadata:
                raise self.fail("name each metadata key once", f"{key!r} twice")
            self.metadata[key] = cursor.value(cursor.u32(f"the type of metadata {key}"), key)
        rows = [self._table_row(cursor, index) for index in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.fail("hold a power of two in general.alignment", alignment)
        start = -(-cursor.at // alignment) * alignment
        for name, kind, shape, offset in rows:
            if offset % alignment:
                raise self.fail(f"hold tensor {name} at a multiple of {alignment} bytes", offset)
            self._add_tensor(name, kind, shape, start + offset)

    def _table_row(self, cursor: _Cursor, index: int) -> tuple[str, int, tuple[int, ...], int]:
        name = cursor.text(f"the name of tensor {index}", _MAX_NAME)
        dims = cursor.u32(f"the rank of tensor {name}")
        if not 1 <= dims <= 4:
            raise self.fail(f"hold tensor {name} with 1 to 4 dimensions", dims)
        sizes = struct.unpack(f"<{dims}Q", cursor.take(8 * dims, f"the shape of tensor {name}"))
        kind = cursor.u32(f"the type of tensor {name}")
        return name, kind, sizes[::-1], cursor.u64(f"the offset of tensor {name}")

    def _add_tensor(self, name: str, kind: int, shape: tuple[int, ...], offset: int) -> None:
        if name in self.tensors:
            raise self.fail("name each tensor once", f"{name!r} twice")
        if kind not in GGML_TYPES:
            raise self.fail(f"hold tensor {name} in a known type", f"type id {kind}")
        type_name, block, block_bytes = GGML_TYPES[kind]
        if shape[-1] % block:
            raise self.fail(
                f"hold rows of tensor {name} in whole {type_name} blocks of {block}", list(shape)
            )
        elements = 1
        for size in shape:  # Python integers: a corrupt shape must not wrap around
            elements *= size
        nbytes = elements // block * block_bytes
        if offset + nbytes > self.size:
            raise self.fail(
                f"hold tensor {name} completely",
                f"bytes {offset}..{offset + nbytes} of {self.size}; truncated or corrupt file",
            )
        self.tensors[name] = TensorInfo(name, type_name, shape, offset, nbytes)

    def read(self, name: str, first: int = 0, rows: int | None = None) -> np.ndarray:
        """Bytes of a tensor's rows.

        Args:
            name: a key of ``tensors``.
            first, rows: the rows to read (all leading dimensions flattened); None means to the end.
        Returns:
            [rows, bytes per row] uint8, a fresh array.
        Raises:
            ValueError: the file has changed since its header was read.
        """
        info = self.tensors[name]
        rows = info.rows - first if rows is None else rows
        width = info.nbytes // max(info.rows, 1)
        with open(self.path, "rb") as file:
            file.seek(info.offset + first * width)
            data = np.fromfile(file, dtype=np.uint8, count=rows * width)
        if data.size != rows * width:
            raise self.fail(
                f"hold tensor {name} completely", f"{data.size} of {rows * width} bytes"
            )
        return data.reshape(rows, width)
