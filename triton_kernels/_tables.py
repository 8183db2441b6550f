"""Lists of tensors as tables of pointers on their device, for kernels that take a whole list."""

from __future__ import annotations

import torch

FIELDS = 10  # columns of the table of pointers
_MOST = 256

# Of a list: its table, its parts, and the stream that they were made on.
_Entry = tuple[torch.Tensor, torch.Tensor, int]
_tables: dict[tuple, _Entry] = {}
_captured: list[tuple] = []  # graphs read these, host memory too, for as long as they live


def launch_list(
    rows: list[list[int]], counts: list[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(table int64 [entries, FIELDS], parts int32 [sum of counts, 2]) of a list on its device.

    parts holds (entry, part of it) for each program. Kept, because most lists come again. A list
    first met while a graph is captured is copied from pinned memory, a copy that the graph repeats.

    Args:
        rows: of at most FIELDS numbers each, pointers for the most part. counts: programs of each.
    """
    key = (device, tuple(map(tuple, rows)), tuple(counts))
    on_gpu = device.type == "cuda"
    stream = torch.cuda.current_stream(device) if on_gpu else None
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    found = _tables.get(key)
    if found is None:
        if len(_tables) >= _MOST:
            _tables.clear()
        host = _host(rows, counts, pinned=on_gpu)
        table, parts = (t.to(device, non_blocking=True) for t in host)
        found = table, parts, stream.cuda_stream if stream else 0
        if capturing:  # not for later calls: outside of a replay nothing fills it
            _captured.append((*host, *found))
            return table, parts
        _tables[key] = found
    table, parts, made_on = found
    if capturing:
        _captured.append(found)
    elif stream is not None and stream.cuda_stream != made_on:
        for tensor in (table, parts):  # dropped from here, it must outlive this stream's use
            tensor.record_stream(stream)
    return table, parts


def _host(
    rows: list[list[int]], counts: list[int], pinned: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.empty(len(rows), FIELDS, dtype=torch.int64, pin_memory=pinned)
    table.copy_(torch.tensor([row + [0] * (FIELDS - len(row)) for row in rows]))
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
    starts = torch.tensor([0, *counts]).cumsum(0)[:-1]
    parts = torch.empty(len(owner), 2, dtype=torch.int32, pin_memory=pinned)
    parts.copy_(torch.stack([owner, torch.arange(len(owner)) - starts[owner]], 1))
    return table, parts
