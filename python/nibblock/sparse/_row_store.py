"""Where a prefix cache keeps its rows: in memory, or in an unnamed file of a folder."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import NamedTuple, Optional, Union

import torch


class Row(NamedTuple):
    """One stored tensor."""

    place: Union[int, torch.Tensor]  # byte offset in the file, or the tensor itself
    shape: tuple[int, ...]
    dtype: torch.dtype
    stamp: int  # of what the row was computed from


class RowStore:
    """Tensors by key, up to a number of bytes.

    Args:
        max_bytes: cap; a row that would pass it is not kept.
        folder: where the file lies; None keeps the rows in memory. The file has no name, so that it
            is gone when the process is, however it ends.
    """

    def __init__(self, max_bytes: int, folder: Optional[Union[str, os.PathLike]] = None) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._rows: dict[int, Row] = {}
        self._file = None if folder is None else tempfile.TemporaryFile(dir=folder)

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, key: int) -> Optional[Row]:
        return self._rows.get(key)

    def put(self, key: int, tensor: torch.Tensor, stamp: int) -> bool:
        """Keeps a copy; False where the cap leaves no room. A row of the same size is replaced in
        its place; another size takes new room."""
        size = tensor.numel() * tensor.element_size()
        old = self._rows.get(key)
        if old is not None and (old.shape, old.dtype) != (tuple(tensor.shape), tensor.dtype):
            if self._file is None:
                self.bytes -= old.place.numel() * old.place.element_size()
            del self._rows[key]  # its room in a file is not used again before clear()
            old = None
        if old is None and self.bytes + size > self.max_bytes:
            return False
        data = tensor.detach().to("cpu", copy=True).contiguous()
        if self._file is None:
            place: Union[int, torch.Tensor] = data
        else:
            place = self.bytes if old is None else old.place
            self._write(place, data)
        if old is None:
            self.bytes += size
        self._rows[key] = Row(place, tuple(tensor.shape), tensor.dtype, stamp)
        return True

    def _write(self, offset: int, data: torch.Tensor) -> None:
        # Not through the mapping: a full disk is an OSError here, and a dead process there.
        left = memoryview(data.view(-1).view(torch.uint8).numpy())
        while left:
            written = os.pwrite(self._file.fileno(), left, offset)
            offset, left = offset + written, left[written:]

    def read(self, row: Row, out: torch.Tensor) -> None:
        """Copies a stored row into `out`, of the row's shape."""
        if self._file is None:
            out.copy_(row.place)
            return
        size = out.numel() * row.dtype.itemsize
        start = row.place - row.place % mmap.ALLOCATIONGRANULARITY
        # Mapped for this read only: pages of a standing map would count as this process's memory.
        with mmap.mmap(
            self._file.fileno(), row.place + size - start, access=mmap.ACCESS_COPY, offset=start
        ) as view:
            source = torch.frombuffer(view, dtype=torch.uint8)[row.place - start :]
            out.copy_(source.view(row.dtype).view(row.shape))
            del source

    def clear(self) -> None:
        self._rows.clear()
        self.bytes = 0
        if self._file is not None:
            os.ftruncate(self._file.fileno(), 0)

    def close(self) -> None:
        self._rows.clear()
        self.bytes = self.max_bytes = 0
        if self._file is not None:
            self._file.close()
            self._file = None
