"""Reads the tensors of a GGUF file as codes or as dense values, a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from nibblock.formats._ggml_types import EXACT_TYPES, Codes, decode, dequantize
from nibblock.formats._gguf_file import GGUFFile
from nibblock.formats._gguf_model import Slot, unpermute

FLOATS = frozenset(("F32", "F16", "BF16", "F64"))
_CHUNK_VALUES = 1 << 24  # float32 values dequantised at a time: 64 MB
_SAFE_SCALE = float(np.finfo(np.float32).max) / 256  # times any code it stays in float32


class TensorReader:
    """What becomes of a tensor: codes where its type has them, else values in `dtype`.

    Args:
        file: an opened GGUFFile.
        dtype: of dense tensors.
        quantised: False for dense tensors only.
        requantize: round floats, and types without an exact form, to 8 bits.
    """

    def __init__(
        self, file: GGUFFile, dtype: torch.dtype, quantised: bool, requantize: bool
    ) -> None:
        self.file, self.dtype = file, dtype
        self.quantised, self.requantize = quantised, requantize

    def packs(self, kind: str) -> bool:
        """Whether a tensor of this type gets codes; else it is dense."""
        if not self.quantised:
            return False
        return kind in EXACT_TYPES or self.requantize

    def codes(self, tensor: str) -> Codes | None:
        """A tensor in canonical form, its rows in file order; None when it is to be dense."""
        kind = self.file.tensors[tensor].type
        if not self.packs(kind):
            return None
        if kind not in EXACT_TYPES:
            return self._requantized(tensor)
        codes = decode(kind, self.file.read(tensor))
        self._check_finite(tensor, codes.scales, codes.offsets)
        if float(np.abs(codes.scales).max(initial=0)) > _SAFE_SCALE:
            with np.errstate(over="ignore"):
                self._check_finite(tensor, codes.dequantize())
        return codes

    def slot_codes(self, slot: Slot) -> Codes | None:
        """The same of a slot, its rows in the order of the model."""
        codes = self.codes(slot.tensor)
        if codes is None or not slot.heads:
            return codes
        return codes.rows(unpermute(self.file.tensors[slot.tensor].shape[0], slot.heads))

    def _check_finite(self, tensor: str, *arrays: np.ndarray | None) -> None:
        for array in arrays:
            if array is not None and not np.isfinite(array).all():
                raise self.file.fail(
                    f"hold finite scales in tensor {tensor}", "NaN or infinity; the file is corrupt"
                )

    def _requantized(self, tensor: str) -> Codes:
        info = self.file.tensors[tensor]
        parts = []
        for _, values in self._chunks(tensor):
            pad = -values.shape[1] % 32
            groups = np.pad(values, ((0, 0), (0, pad))).reshape(len(values), -1, 32)
            scales = np.abs(groups).max(-1) / np.float32(127)
            inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
            code = np.rint(groups * inverse[..., None]).clip(-127, 127) + 128
            code = code.astype(np.uint8).reshape(len(values), -1)[:, : info.columns]
            parts.append((code, scales))
        code, scales = (np.concatenate(p) for p in zip(*parts))
        return Codes(np.ascontiguousarray(code), scales, None, 8, 32)

    def _chunks(self, tensor: str, start: int = 0, rows: int | None = None) -> Iterator:
        """(row, [rows, K] float32) in file order, a bounded piece at a time; rows count from
        start.
        """
        info = self.file.tensors[tensor]
        rows = info.rows if rows is None else rows
        step = max(1, _CHUNK_VALUES // max(info.columns, 1))
        for first in range(0, rows, step):
            raw = self.file.read(tensor, start + first, min(step, rows - first))
            try:
                values = dequantize(info.type, raw)
            except NotImplementedError:  # dequantize names the type, this the tensor and file
                raise self.file.fail(
                    f"hold tensor {tensor} in a type that can be read", info.type
                ) from None
            yield first, values.reshape(-1, info.columns)

    def fill(self, out: torch.Tensor, tensor: str, start: int = 0, shift: float = 0.0) -> None:
        """Writes rows of a tensor, from start on, into out [rows, K]."""
        for first, values in self._chunks(tensor, start, len(out)):
            self._check_finite(tensor, values)
            if shift:
                values = values + np.float32(shift)
            out[first : first + len(values)] = torch.from_numpy(np.ascontiguousarray(values))

    def dense(self, slot: Slot) -> torch.Tensor:
        """The slot's tensor in `dtype`."""
        info = self.file.tensors[slot.tensor]
        if slot.row is not None:
            out = torch.empty(1, info.columns, dtype=self.dtype)
            self.fill(out, slot.tensor, slot.row, slot.shift)
            return out[0]
        out = torch.empty(info.rows, info.columns, dtype=self.dtype)
        self.fill(out, slot.tensor, 0, slot.shift)
        out = out.reshape(info.shape)
        if slot.heads:
            out = out[torch.from_numpy(unpermute(info.shape[0], slot.heads))]
        return out

    def float32(self, name: str) -> np.ndarray:
        """All values of a small tensor, flat."""
        return dequantize(self.file.tensors[name].type, self.file.read(name)).reshape(-1)


def as_tensors(codes: Codes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """qweight, scales, offsets as tensors on the same memory."""
    offsets = None if codes.offsets is None else torch.from_numpy(codes.offsets)
    return torch.from_numpy(codes.qweight), torch.from_numpy(codes.scales), offsets
