"""compressed-tensors checkpoints: what their words mean, format by format.

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

int-quantized, and naive-quantized where its weights are integers: the same w, of

| tensor            | shape and dtype             | holds                                       |
| weight            | [N, K] int8                 | q itself, of 2 to 8 bits                    |
| weight_scale      | [N, ceil(K/G)] floating     | [N, 1] for "channel", [1] for "tensor"      |
| weight_zero_point | as weight_scale, int8       | z itself; a symmetric weight needs none     |
| weight_g_idx      | [K] int32, optional         | as above                                    |

Each q becomes the 8-bit code q + 128.

mxfp4-pack-quantized:

    w[n, k] = element[n, k] * 2^(weight_scale[n, k // 32] - 127)

| tensor            | shape and dtype             | byte                                        |
| weight_packed     | [N, K/2] uint8              | i of row n: elements 2 i (the low nibble)   |
|                   |                             | and 2 i + 1, as in `_e2m1`                  |
| weight_scale      | [N, ceil(K/32)] uint8       | the exponent of a block                     |

nvfp4-pack-quantized:

    w[n, k] = element[n, k] * (weight_scale[n, k // 16] / weight_global_scale)

| tensor              | shape and dtype           | holds                                       |
| weight_packed       | [N, K/2] uint8            | elements, as above                          |
| weight_scale        | [N, ceil(K/16)] E4M3      | the scale of a group                        |
| weight_global_scale | [] or [1] float32         | one number for the matrix                   |

Each element becomes an 8-bit code; `_nvfp4` says what float32 rounds. Format mixed-precision: each
of config.json's groups names one of the above. Quantised activations (input_activations) and a
quantised cache (kv_cache_scheme) change no weight: they stay as they are, and the tensors
input_scale, input_zero_point, input_global_scale, k_scale and v_scale are not used.

Source: compressed-tensors' compressors of these formats.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from nibblock.formats import _e2m1, _nvfp4
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
    """As `Scheme`, of one of config.json's groups.

    format: how the group's linears are packed. targets: what they are called. symmetric: whether
    zero points may lack. whole: whether one scale is for all rows.
    """

    format: str = ""
    targets: tuple[str, ...] = ()
    symmetric: bool = True
    whole: bool = False


class PackQuantized:
    """How pack-quantized stores a linear; base of the other formats.

    Attributes:
        format: the format's name. codes: the name of the tensor that holds codes.
        strategies: those that it is read of.
    """

    format, codes = "pack-quantized", "weight_packed"
    strategies: tuple[str, ...] = ("group", "channel")

    def scheme(self, weights: Settings, targets: tuple[str, ...]) -> PackedScheme:
        """What a config group's settings of weights say."""
        bits = self.bits(weights)
        size = weights.values.get("group_size")
        default = "channel" if size == -1 else "group"
        if size is None and "tensor" in self.strategies:
            default = "tensor"
        strategy = weights.word(("strategy",), self.strategies, default)
        return PackedScheme(
            bits,
            weights.group("group_size") if strategy == "group" else -1,
            f"{weights.prefix}group_size".partition(".")[2],
            self.format,
            targets,
            weights.flag("symmetric", True),
            strategy == "tensor",
        )

    def bits(self, weights: Settings) -> int:
        """Bits of a code here."""
        bits = weights.bits("num_bits")
        weights.word(("type",), ("int",), "int")
        return bits

    def parts(self, scheme: PackedScheme, rows: int, columns: int) -> dict[str, Part]:
        """As `Reader.parts`."""
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
        reader: Reader,
        name: str,
        scheme: PackedScheme,
        rows: int,
        columns: int,
        parts: dict[str, torch.Tensor],
    ) -> Layer:
        """As `Reader.layer`."""
        bits, shape = scheme.bits, parts["weight_shape"].tolist()
        if shape != [rows, columns]:
            raise reader.fail(name, "weight_shape", f"hold [{rows}, {columns}]", shape)
        # Words hold their codes in the canonical order already.
        codes = parts["weight_packed"].view(torch.uint8)[:, : -(-columns * bits // 8)].contiguous()
        zeros = parts.get("weight_zero_point")
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = unpack_rows(zeros.T, bits, rows).T
        return self._grouped(reader, name, scheme, columns, parts, codes, zeros)

    def _grouped(
        self,
        reader: Reader,
        name: str,
        scheme: PackedScheme,
        columns: int,
        parts: dict[str, torch.Tensor],
        codes: torch.Tensor,
        zeros: torch.Tensor | None,
    ) -> Layer:
        """The layer of these codes and zero points [N, groups], the latter unsigned or int8."""
        index = parts.get("weight_g_idx")
        if index is not None and bool((index == -1).all()):
            index = None  # how the format says that there is no order
        group, order, places = reader.groups(name, scheme, columns, index)
        if zeros is not None:
            middle = 1 << (scheme.bits - 1) if zeros.dtype == torch.int8 else 0
            zeros = (zeros.int() + middle).expand(len(codes), -1)[:, order].contiguous()
        scales = parts["weight_scale"].expand(len(codes), -1)  # (one for all rows, if `whole`)
        return layer_of(codes, scales[:, order], zeros, scheme.bits, group, places)


class IntQuantized(PackQuantized):
    """How int-quantized stores a linear."""

    format, codes = "int-quantized", "weight"
    strategies = ("group", "channel", "tensor")

    def bits(self, weights: Settings) -> int:
        if weights.word(("type",), ("int", "float"), "int") == "float":
            raise weights.fail("type", f'"int", for floats have no exact form here ({self.format})')
        if not 2 <= weights.integer("num_bits") <= 8:
            raise weights.fail("num_bits", "2 to 8")
        return 8

    def parts(self, scheme: PackedScheme, rows: int, columns: int) -> dict[str, Part]:
        form = (1,) if scheme.whole else (rows, groups_of(columns, scheme.group))
        return {
            "weight": Part.of((rows, columns), "I8"),
            "weight_scale": Part.of(form, *FLOATS),
            "weight_zero_point": Part.of(form, "I8", optional=scheme.symmetric),
            "weight_g_idx": Part.of((columns,), "I32", "I64", optional=True),
        }

    def layer(
        self,
        reader: Reader,
        name: str,
        scheme: PackedScheme,
        rows: int,
        columns: int,
        parts: dict[str, torch.Tensor],
    ) -> Layer:
        codes = parts["weight"].view(torch.uint8) ^ 128  # q + 128
        zeros = parts.get("weight_zero_point")
        return self._grouped(reader, name, scheme, columns, parts, codes, zeros)


class NaiveQuantized(IntQuantized):
    """The same under another name."""

    format = "naive-quantized"


class PackedMXFP4(PackQuantized):
    """How mxfp4-pack-quantized stores a linear."""

    format = "mxfp4-pack-quantized"
    strategies = ("group",)
    group = 32

    def scheme(self, weights: Settings, targets: tuple[str, ...]) -> PackedScheme:
        weights.word(("type",), ("float",), "float")
        weights.word(("strategy",), self.strategies, self.strategies[0])
        for key, need in (("num_bits", 4), ("group_size", self.group)):
            if weights.integer(key) != need:
                raise weights.fail(key, f"{need}, the only one of {self.format}")
        if not weights.flag("symmetric", True):
            raise weights.fail("symmetric", "true")
        return PackedScheme(8, self.group, format=self.format, targets=targets)

    def parts(self, scheme: PackedScheme, rows: int, columns: int) -> dict[str, Part]:
        return {
            "weight_packed": Part.of((rows, -(-columns // 2)), "U8"),
            "weight_scale": Part.of((rows, groups_of(columns, self.group)), "U8"),
        }

    def layer(
        self,
        reader: Reader,
        name: str,
        scheme: PackedScheme,
        rows: int,
        columns: int,
        parts: dict[str, torch.Tensor],
    ) -> Layer:
        scales = torch.from_numpy(_e2m1.half_scales(parts["weight_scale"].numpy()))
        return layer_of_floats(parts["weight_packed"], scales, columns, self.group)


class PackedNVFP4(PackedMXFP4):
    """How nvfp4-pack-quantized stores a linear."""

    format = "nvfp4-pack-quantized"
    strategies = ("tensor_group",)
    group = _nvfp4.GROUP
    names = ("weight_packed", "weight_scale", "weight_global_scale")

    def parts(self, scheme: PackedScheme, rows: int, columns: int) -> dict[str, Part]:
        return _nvfp4.parts(rows, columns, self.names)

    def layer(
        self,
        reader: Reader,
        name: str,
        scheme: PackedScheme,
        rows: int,
        columns: int,
        parts: dict[str, torch.Tensor],
    ) -> Layer:
        return _nvfp4.layer(reader, name, columns, parts, self.names, divide=True)


_FORMS: dict[str, PackQuantized] = {
    form.format: form
    for form in (PackQuantized(), PackedMXFP4(), PackedNVFP4(), IntQuantized(), NaiveQuantized())
}
_MIXED = "mixed-precision"


class CompressedTensors(Reader):
    """The reader of one folder's compressed tensors; see the module."""

    scales, order = "weight_scale", "weight_g_idx"

    def __init__(self, folder: Folder, settings: Settings) -> None:
        super().__init__(folder)
        kind = settings.word(("format",), (*_FORMS, _MIXED), "")
        settings.absent("transform_config")
        if settings.values.get("sparsity_config"):
            settings.child("sparsity_config").word(("format",), ("dense",), "dense")
        groups = settings.child("config_groups")
        self.schemes = [self._scheme(groups.child(key), kind) for key in groups.values]
        if settings.values.get("kv_cache_scheme"):
            self.leave_cache(settings, "kv_cache_scheme")
        # Where codes may be called as a dense weight is, scales tell what is quantised.
        codes = "weight" if kind == _MIXED else _FORMS[kind].codes
        self.marker = "weight_scale" if codes == "weight" else codes

    def _scheme(self, group: Settings, kind: str) -> PackedScheme:
        allowed, default = (tuple(_FORMS), "") if kind == _MIXED else ((kind,), kind)
        form = _FORMS[group.word(("format",), allowed, default)]
        group.absent("output_activations")
        if group.values.get("input_activations"):
            group.child("input_activations")
            if not self.notes:  # one says it of all groups
                self.leave_activations(group, "input_activations")
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
        return form.scheme(weights, tuple(targets))

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

    def codes(self, name: str, kind: str) -> str:
        return _FORMS[self.scheme(name, kind).format].codes

    def parts(self, scheme: PackedScheme, rows: int, columns: int) -> dict[str, Part]:
        return _FORMS[scheme.format].parts(scheme, rows, columns)

    def layer(
        self,
        name: str,
        scheme: PackedScheme,
        rows: int,
        columns: int,
        parts: dict[str, torch.Tensor],
    ) -> Layer:
        return _FORMS[scheme.format].layer(self, name, scheme, rows, columns, parts)
