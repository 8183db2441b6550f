"""compressed-tensors checkpoints of two formats: what their words mean.

pack-quantized:

    w[n, k] = weight_scale[n, g(k)] * (q[n, k] - z[n, g(k)]),   q and z signed, b bits

| tensor            | shape and dtype             | word                                        |
| weight_packed     | [N, ceil(K b / 32)] int32   | bits i b... of row n: q[n, i] + 2^(b-1)     |
| weight_scale      | [N, ceil(K/G)] floating     | [N, 1] for strategy "channel"               |
| weight_zero_point | [ceil(N b / 32), ceil(K/G)] | bits i b... of column t: z[i, t] + 2^(b-1); |
|                   | int32, or [N, ceil(K/G)]    | or z itself; a symmetric weight needs none  |
|                   | int8                        |                                             |
| weight_shape      | [2] int64 or int32          | N, K                                        |
| weight_g_idx      | [K] int32, optional         | g(k), or -1 throughout; k // G without it   |

Code and zero point carry the same 2^(b-1), which cancels: both are taken unsigned. With actorder
"group" g(k) is any, as GPTQ's in activation order.

mxfp4-pack-quantized:

    w[n, k] = element[n, k] * 2^(weight_scale[n, k // 32] - 127)

| tensor            | shape and dtype             | byte                                        |
| weight_packed     | [N, K/2] uint8              | i of row n: elements 2 i (the low nibble)   |
|                   |                             | and 2 i + 1, as in `_e2m1`                  |
| weight_scale      | [N, ceil(K/32)] uint8       | the exponent of a block                     |

Each element becomes an 8-bit code.

Source: compressed-tensors' pack-quantized and mxfp4-pack-quantized compressors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from nibblock.formats import _e2m1
from nibblock.formats._quantized_folder import FLOATS, Folder, Part, Settings
from nibblock.formats._quantized_layer import (
    Layer,
    Reader,
    Scheme,
    groups_of,
    layer_of,
    layer_of_floats,
    unpack_rows,
    words_of,
)


@dataclass(frozen=True)
class PackedScheme(Scheme):
    """As `Scheme`, of one of config.json's groups; targets: what its linears are called."""

    symmetric: bool = True
    targets: tuple[str, ...] = ()


class PackQuantized(Reader):
    """The reader of one folder's compressed tensors; see the module."""

    marker, scales, order = "weight_packed", "weight_scale", "weight_g_idx"
    format = "pack-quantized"

    def __init__(self, folder: Folder, settings: Settings) -> None:
        super().__init__(folder)
        for key in ("kv_cache_scheme", "transform_config"):
            settings.absent(key)
        if settings.values.get("sparsity_config"):
            settings.child("sparsity_config").word(("format",), ("dense",), "dense")
        groups = settings.child("config_groups")
        self.schemes = [self._scheme(groups.child(key)) for key in groups.values]

    def _scheme(self, group: Settings) -> PackedScheme:
        group.word(("format",), (self.format,), self.format)
        for name in ("input_activations", "output_activations"):
            group.absent(name)
        targets = group.values.get("targets")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise group.fail("targets", "a list of names")
        for target in targets:
            try:
                re.compile(target[3:] if target.startswith("re:") else "")
            except re.error as error:
                raise group.fail("targets", "names or regular expressions") from error
        weights = group.child("weights")
        if weights.flag("dynamic", False):
            raise weights.fail("dynamic", "false")
        return self._weights(weights, tuple(targets))

    def _weights(self, weights: Settings, targets: tuple[str, ...]) -> PackedScheme:
        bits = weights.bits("num_bits")
        weights.word(("type",), ("int",), "int")
        size = weights.values.get("group_size")
        strategy = weights.word(
            ("strategy",), ("group", "channel"), "channel" if size == -1 else "group"
        )
        return PackedScheme(
            bits,
            -1 if strategy == "channel" else weights.group("group_size"),
            f"{weights.prefix}group_size".partition(".")[2],
            weights.flag("symmetric", True),
            targets,
        )

    def scheme(self, name: str, kind: str) -> PackedScheme:
        """That of the first target that is the module's name, matches it, or is its class."""
        for fits in (
            lambda target: target == name,
            lambda target: target.startswith("re:") and re.match(target[3:], name),
            lambda target: target == kind,
        ):
            for scheme in self.schemes:
                if any(fits(target) for target in scheme.targets):
                    return scheme
        raise self.folder.fail(
            f"hold a group of quantization_config.config_groups with a target for {name}",
            "none",
            "config.json",
        )

    def parts(self, scheme: PackedScheme, rows: int, columns: int) -> dict[str, Part]:
        groups, bits = groups_of(columns, scheme.group), scheme.bits
        packed, plain = (words_of(rows, bits), groups), (rows, groups)
        return {
            "weight_packed": Part.of((rows, words_of(columns, bits)), "I32"),
            "weight_scale": Part.of((rows, groups), *FLOATS),
            "weight_zero_point": Part((("I32", packed), ("I8", plain)), scheme.symmetric),
            "weight_shape": Part.of((2,), "I64", "I32"),
            "weight_g_idx": Part.of((columns,), "I32", "I64", optional=True),
        }

    def layer(
        self,
        name: str,
        scheme: PackedScheme,
        rows: int,
        columns: int,
        parts: dict[str, torch.Tensor],
    ) -> Layer:
        bits, shape = scheme.bits, parts["weight_shape"].tolist()
        if shape != [rows, columns]:
            raise self.fail(name, "weight_shape", f"hold [{rows}, {columns}]", shape)
        index = parts.get("weight_g_idx")
        if index is not None and bool((index == -1).all()):
            index = None  # how the format says that there is no order
        group, order, places = self.groups(name, scheme, columns, index)
        # Words hold their codes in the canonical order already.
        codes = parts["weight_packed"].view(torch.uint8)[:, : -(-columns * bits // 8)].contiguous()
        zeros = parts.get("weight_zero_point")
        if zeros is not None:
            zeros = self._unsigned(zeros, bits, rows)[:, order].contiguous()
        return layer_of(codes, parts["weight_scale"][:, order], zeros, bits, group, places)

    @staticmethod
    def _unsigned(zeros: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
        """[N, groups] with 2^(b-1) added."""
        if zeros.dtype == torch.int8:
            return zeros.int() + (1 << (bits - 1))
        return unpack_rows(zeros.T, bits, rows).T


class PackedMXFP4(PackQuantized):
    """The reader of one folder's MXFP4 tensors; see the module."""

    order = ""
    format = "mxfp4-pack-quantized"
    group = 32

    def _weights(self, weights: Settings, targets: tuple[str, ...]) -> PackedScheme:
        weights.word(("type",), ("float",), "float")
        weights.word(("strategy",), ("group",), "group")
        for key, need in (("num_bits", 4), ("group_size", self.group)):
            if weights.integer(key) != need:
                raise weights.fail(key, f"{need}, the only one of {self.format}")
        if not weights.flag("symmetric", True):
            raise weights.fail("symmetric", "true")
        return PackedScheme(4, self.group, targets=targets)

    def parts(self, scheme: PackedScheme, rows: int, columns: int) -> dict[str, Part]:
        return {
            "weight_packed": Part.of((rows, -(-columns // 2)), "U8"),
            "weight_scale": Part.of((rows, groups_of(columns, self.group)), "U8"),
        }

    def layer(
        self,
        name: str,
        scheme: PackedScheme,
        rows: int,
        columns: int,
        parts: dict[str, torch.Tensor],
    ) -> Layer:
        scales = self._half_scales(parts)
        return layer_of_floats(parts["weight_packed"], scales, columns, self.group)

    @staticmethod
    def _half_scales(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """[N, groups] float32, of elements that are doubled."""
        return torch.from_numpy(_e2m1.half_scales(parts["weight_scale"].numpy()))


_READERS = {reader.format: reader for reader in (PackQuantized, PackedMXFP4)}


def compressed_tensors(folder: Folder, settings: Settings) -> PackQuantized:
    """The reader of the format that a folder's settings name."""
    return _READERS[settings.word(("format",), tuple(_READERS), "")](folder, settings)
