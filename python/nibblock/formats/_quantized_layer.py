"""From a checkpoint's codes, scales and zero points to the canonical form, without loss.

    scale[n, g(k)] * (code[n, k] - zero[n, g(k)]) = scale * code + offset,  offset = -scale * zero

A float16 or bfloat16 scale (11 bits at most) times a zero point (8 bits) is exact in float32, and
so is every dequantised weight. A float32 scale times a zero point may have to be rounded, by 2^-24
of itself, and so may a scale that is itself computed from two numbers; `Layer.rounded` says so.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Optional

import torch

from nibblock import ops as _ops
from nibblock.formats import _e2m1
from nibblock.formats._quantized_folder import FLOATS, Folder, Part, Settings
from nibblock.nn._packed import _exact
from nibblock.ops._checks import GROUP_SIZES

assert sys.byteorder == "little"  # words are read as bytes below
_LARGEST = torch.finfo(torch.float32).max
CHUNK_CODES = 1 << 22  # unpacked at a time


@dataclass(frozen=True)
class Layer:
    """A weight as `Int4Linear.from_codes` takes it.

    qweight: [N, ceil(K/2)] uint8, low nibble = even k (bits 4), or [N, K] uint8 (bits 8).
    scales: [N, ceil(K/group)] float16 or float32. offsets: the same, or None: symmetric.
    rounded: "offsets" or "scales", where some of them had to be rounded to float32.
    columns: [K] int64, the weight's column of each column of these, or None: they are in order.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    offsets: Optional[torch.Tensor]
    bits: int
    group: int
    rounded: str = ""
    columns: Optional[torch.Tensor] = None


def groups_of(columns: int, group: int) -> int:
    """Groups of a row, the last perhaps short."""
    return 1 if group == -1 else -(-columns // group)


def words_of(count: int, bits: int) -> int:
    """32-bit words that hold so many codes, the last perhaps padded."""
    return -(-count * bits // 32)


def unpack_rows(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """[R, W] int32, code i of a row at bit i * bits of its words -> [R, count] uint8."""
    raw = words.contiguous().view(torch.uint8)
    if bits == 4:
        raw = torch.stack((raw & 15, raw >> 4), dim=-1).reshape(len(words), -1)
    return raw[:, :count]


def regroup(index: torch.Tensor, group: int, bits: int) -> Optional[tuple[int, torch.Tensor]]:
    """The group size of ours that holds a file's groups exactly.

    Args:
        index: [K] int64, the file's group of each column.
        group: the file's group size; taken as it is where it is one of ours.
        bits: of a code here, 4 or 8: 8 have groups of 16 too.
    Returns:
        (size, the file's group of each of ours [ceil(K/size)]): a group of 512 is one of 256
        twice. None where no size does it: columns that share 32 (of 8 bits, 16) belong to several
        groups.
    """
    sizes = GROUP_SIZES[bits]
    own = [group] if group in sizes else []
    for size in (*own, *reversed(sizes)):
        step = max(len(index), 1) if size == -1 else size
        first = index[::step]
        if torch.equal(first.repeat_interleave(step)[: len(index)], index):
            return size, first
    return None


def take_codes(qweight: torch.Tensor, bits: int, order: torch.Tensor) -> torch.Tensor:
    """Column order[j] of a `Layer`'s codes as column j, some rows at a time."""
    if bits == 8:
        return qweight.index_select(1, order)
    out = torch.empty_like(qweight)
    step = max(1, CHUNK_CODES // max(len(order), 1))
    for first in range(0, len(qweight), step):
        raw = qweight[first : first + step]
        codes = torch.stack((raw & 15, raw >> 4), dim=-1).flatten(1).index_select(1, order)
        low, high = codes[:, 0::2], codes[:, 1::2]
        out[first : first + step] = low
        out[first : first + step, : high.shape[1]] |= high << 4
    return out


def layer_of(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: Optional[torch.Tensor],
    bits: int,
    group: int,
    columns: Optional[torch.Tensor] = None,
) -> Layer:
    """The canonical form.

    Args:
        qweight: as in `Layer`, its columns in the weight's order; `columns` is applied here.
        scales: [N, ceil(K/group)] float16 | bfloat16 | float32, finite.
        zeros: the same shape, integers: the code that stands for 0; None for the middle one.
        bits, group, columns: as in `Layer`.
    """
    if columns is not None:
        qweight = take_codes(qweight, bits, columns)
    wide = scales.float()
    offsets, rounded = None, ""
    if zeros is not None and not bool((zeros == 1 << (bits - 1)).all()):
        exact = 0.0 - wide.double() * zeros.double()  # 32 bits at most
        offsets = exact.float()
        rounded = "" if torch.equal(offsets.double(), exact) else "offsets"
    parts = (wide,) if offsets is None else (wide, offsets)
    if all(_exact(part, torch.float16) for part in parts):
        wide = wide.half()
        offsets = None if offsets is None else offsets.half()
    return Layer(qweight, wide.contiguous(), offsets, bits, group, rounded, columns)


def layer_of_floats(
    packed: torch.Tensor, half_scales: torch.Tensor, columns: int, group: int
) -> Layer:
    """The canonical form of 4-bit floats: 8-bit codes, see `_e2m1`.

    Args:
        packed: [N, ceil(K/2)] uint8, low nibble = even k; what follows K is left out.
        half_scales: [N, ceil(K/group)] float32, of the doubled elements.
        columns, group: K and as in `Layer`.
    """
    codes = torch.from_numpy(_e2m1.unpack_pairs(packed.numpy()))
    return layer_of(codes[:, :columns].contiguous(), half_scales, None, 8, group)


def leaves_float32(layer: Layer, columns: int) -> bool:
    """Whether finite scales give a weight that float32 cannot hold."""
    if layer.offsets is not None and not bool(torch.isfinite(layer.offsets).all()):
        return True
    # (2^bits times the largest one is beyond every product: few files are looked at further.)
    if not bool((layer.scales.double().abs() * (1 << layer.bits) > _LARGEST).any()):
        return False
    form = {"in_features": columns, "group_size": layer.group, "bits": layer.bits}
    packed = _ops.int4_pack(layer.qweight, layer.scales, layer.offsets, **form)
    dense = _ops.int4_dequantize(
        packed,
        out_features=len(layer.qweight),
        affine=layer.offsets is not None,
        scale_dtype=layer.scales.dtype,
        **form,
    )
    return not bool(torch.isfinite(dense).all())


@dataclass(frozen=True)
class Scheme:
    """How a linear is stored: bits of a code here, columns of a group (-1: the row), and the key of
    config.json's quantization_config that says the latter.
    """

    bits: int
    group: int
    key: str = "group_size"


class Reader:
    """What reads one format's tensors of a folder; base of one class a format.

    Attributes:
        marker: a linear is quantised where the file has a tensor of this name.
        scales: the name of the tensor that must be finite.
        order: the name of the tensor that says each column's group; "" where there is none.
        fused: whether what is quantised are experts as the model holds them: a tensor of the file
            has one for each, and is named <projection>_<marker> in place of <linear>.<marker>.
        unused: patterns of names of tensors that no weight needs.
        notes: what a reader of the report should know.
    """

    marker: str
    scales: str
    order = ""
    fused = False

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.unused: list[str] = []
        self.notes: list[str] = []

    def leave_activations(self, settings: Settings, key: str) -> None:
        """Notes that a key of the settings asks to quantise what linears read, and that it stays as
        it is: no weight depends on it. Scales that the file holds for it are not used.
        """
        self.unused.append(r"\.input_(scale|zero_point|global_scale)$")
        self.notes.append(
            f"{settings.file} asks for quantised activations ({settings.prefix}{key}): they stay "
            'as they are, which changes no weight; compute="int8" lets the kernels quantise them, '
            "per row and group"
        )

    def leave_cache(self, settings: Settings, key: str) -> None:
        """The same of the cache of keys and values."""
        self.unused.append(r"\.[kv]_(scale|zero_point)$")
        self.notes.append(
            f"{settings.file} asks for a quantised cache of keys and values "
            f"({settings.prefix}{key}): it stays as it is, which changes no weight"
        )

    def codes(self, name: str, kind: str) -> str:
        """The name of the tensor that holds the codes of the module of this name and class name."""
        return self.marker

    def key(self, name: str, tensor: str) -> str:
        """The file's name of a tensor of what is called `name`."""
        return f"{name}_{tensor}" if self.fused else f"{name}.{tensor}"

    def scheme(self, name: str, kind: str) -> Scheme:
        """The scheme of the module of this name and class name."""
        raise NotImplementedError  # every format has its own

    def parts(self, scheme: Scheme, rows: int, columns: int) -> dict[str, Part]:
        """The tensors of one linear, by the last part of their names."""
        raise NotImplementedError  # every format has its own

    def prepare(self, layers: dict[str, tuple[Scheme, int]]) -> None:
        """Finds out what the whole folder must tell. layers: (scheme, N) by name."""

    def layer(
        self, name: str, scheme: Scheme, rows: int, columns: int, parts: dict[str, torch.Tensor]
    ) -> Layer:
        """The linear in canonical form."""
        raise NotImplementedError  # every format has its own

    def fail(self, name: str, tensor: str, need: str, got: object) -> ValueError:
        """The error about what a tensor of a linear holds."""
        key = self.key(name, tensor)
        return self.folder.fail(f"{need} in tensor {key}", got, self.folder.tensors[key].file)

    def zero_bias(self, name: str, rows: int) -> list[str]:
        """The names of a bias of zeros, which some quantisers write where there was none.

        Raises:
            ValueError: it has another shape or dtype, or does not hold zeros.
        """
        bias = f"{name}.bias"
        if not self.folder.check(bias, Part.of((rows,), *FLOATS, optional=True)):
            return []
        if bool(self.folder.read([bias])[bias].any()):
            raise self.folder.fail(
                f"hold zeros in {bias}, for the model has no bias there",
                "others",
                self.folder.tensors[bias].file,
            )
        return [bias]

    def read(
        self, name: str, scheme: Scheme, rows: int, columns: int, expert: Optional[int] = None
    ) -> Layer:
        """Reads one linear's tensors, which must have been checked; of fused ones an expert's.

        Raises:
            ValueError: a scale is not finite, or the groups have no exact form here.
        """
        held = self.folder.tensors
        keys = {part: self.key(name, part) for part in self.parts(scheme, rows, columns)}
        keys = {part: key for part, key in keys.items() if key in held}
        read = self.folder.read(keys.values(), expert)
        out = self.layer(name, scheme, rows, columns, {p: read[key] for p, key in keys.items()})
        if not bool(torch.isfinite(out.scales).all()):
            raise self.fail(name, self.scales, "hold finite numbers", "NaN or infinity")
        if leaves_float32(out, columns):
            raise self.fail(name, self.scales, "hold scales that float32 can multiply", "more")
        return out

    def groups(
        self, name: str, scheme: Scheme, columns: int, stored: Optional[torch.Tensor] = None
    ) -> tuple[int, torch.Tensor, Optional[torch.Tensor]]:
        """Groups of ours that hold those of the file; raises where no size does it.

        Args:
            stored: [K] the file's own group of each column; None for k // group.
        Returns:
            (size, the file's group of each of ours) as of `regroup`, and the order of columns in
            which those groups are contiguous; None: that of the weight.
        """
        group, count = scheme.group, groups_of(columns, scheme.group)
        index = torch.arange(columns) // (max(columns, 1) if group == -1 else group)
        if stored is not None:
            index = stored.long()
            # A placeholder (all 0) leaves groups out; taken at its word it would spoil the weight.
            held = index.unique()
            if not torch.equal(held, torch.arange(count)):
                wrong = held[(held < 0) | (held >= count)].tolist()
                got = wrong[0] if wrong else "groups left out"
                raise self.fail(name, self.order, f"hold each group from 0 to {count - 1}", got)
        found, order = regroup(index, group, scheme.bits), None
        if found is None and stored is not None:
            order = self._activation_order(name, index, group)
            found = regroup(index[order], group, scheme.bits)
        if found is None:
            least = min(size for size in GROUP_SIZES[scheme.bits] if size > 0)
            raise self.folder.fail(
                f"hold quantization_config.{scheme.key} as -1 or a multiple of {least}",
                group,
                "config.json",
            )
        return *found, order

    def _activation_order(self, name: str, index: torch.Tensor, group: int) -> torch.Tensor:
        """The columns group by group, those of one group in the weight's order."""
        counts = index.bincount()
        wanted = torch.full_like(counts, group)
        wanted[-1] = len(index) - group * (len(counts) - 1)
        wrong = (counts != wanted).nonzero().flatten().tolist()
        if wrong:
            at = wrong[0]
            need = f"hold {int(wanted[at])} columns of group {at}"
            raise self.fail(name, self.order, need, int(counts[at]))
        return index.argsort(stable=True)
