"""GPTQ checkpoints: what their words mean.

    w[n, k] = scales[g(k), n] * (q[n, k] - z[g(k), n])

| tensor  | shape and dtype               | field j of a word (nibble, or byte of 8 bits)        |
| qweight | [K b / 32, N] int32           | of [r, n]: q of row k = (32 / b) r + j               |
| qzeros  | [ceil(K/G), N b / 32] int32   | of [t, c]: z of column n = (32 / b) c + j            |
| scales  | [ceil(K/G), N] floating       |                                                      |
| g_idx   | [K] int32 or int64, optional  | (no words:) g(k); k // G without it                  |

g(k) in activation order (desc_act) is any: each group has G columns, the last what is left of K.
Sorted by group the columns are a weight like any, and `Layer.columns` says which they are.

Version 1 (`gptq`) stores z - 1, subtracted from whole words, so that a z of 0 borrows from the next
nibble; adding 1 to each nibble of a word with its carries undoes that. Version 2 (`gptq_v2`) stores
z. Some files are of the other version than they say. One whose zero points are all 7 (all 8) is of
version 1 (2): symmetric quantisers write nothing else, and others do not write one number only.

Source: the layouts of AutoGPTQ and GPTQModel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from nibblock.formats._quantized_folder import FLOATS, Folder, Part, Settings
from nibblock.formats._quantized_layer import (
    Layer,
    Reader,
    Scheme,
    groups_of,
    layer_of,
    unpack_rows,
    words_of,
)

_VERSIONS = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class GPTQScheme(Scheme):
    """As `Scheme`; symmetric: config.json says that all zero points are the middle code."""

    symmetric: bool = False


class GPTQ(Reader):
    """The reader of one folder's GPTQ tensors; see the module."""

    marker, scales, order = "qweight", "scales", "g_idx"

    def __init__(self, folder: Folder, settings: Settings) -> None:
        super().__init__(folder)
        keys = ("checkpoint_format", "format")
        self.version = settings.word(keys, _VERSIONS, "gptq")
        settings.word(("pack_dtype",), ("int32",), "int32")
        self.default = self._scheme(settings)
        self.rules = self._rules(settings)
        self.less = self.version == "gptq"  # whether z - 1 is stored

    @staticmethod
    def _scheme(settings: Settings) -> GPTQScheme:
        key = f"{settings.prefix}group_size".partition(".")[2]
        symmetric = settings.flag("sym", False)
        return GPTQScheme(settings.bits("bits"), settings.group("group_size"), key, symmetric)

    def _rules(self, settings: Settings) -> list[tuple[re.Pattern, GPTQScheme]]:
        """Layers stored in another way: `dynamic`, from patterns of names to settings."""
        if not settings.values.get("dynamic"):
            return []
        dynamic, rules = settings.child("dynamic"), []
        for key, value in dynamic.values.items():
            if key.startswith("-:"):
                continue  # not quantised, which the tensors say too
            try:
                pattern = re.compile(key[2:] if key.startswith("+:") else key)
            except re.error as error:
                raise dynamic.fail(key, "a regular expression") from error
            if not isinstance(value, dict):
                raise dynamic.fail(key, "an object")
            merged = {**settings.values, **value}
            rules.append(
                (pattern, self._scheme(Settings(self.folder, merged, f"{dynamic.prefix}{key}.")))
            )
        return rules

    def scheme(self, name: str, kind: str) -> GPTQScheme:
        return next((s for pattern, s in self.rules if pattern.match(name)), self.default)

    def parts(self, scheme: GPTQScheme, rows: int, columns: int) -> dict[str, Part]:
        groups, bits = groups_of(columns, scheme.group), scheme.bits
        return {
            "qweight": Part.of((words_of(columns, bits), rows), "I32"),
            "qzeros": Part.of((groups, words_of(rows, bits)), "I32"),
            "scales": Part.of((groups, rows), *FLOATS),
            "g_idx": Part.of((columns,), "I32", "I64", optional=True),
        }

    def prepare(self, layers: dict[str, tuple[GPTQScheme, int]]) -> None:
        """Finds out which version the folder holds."""
        spans = {name: self._span(name, *value) for name, value in layers.items()}
        for less in (True, False):
            middle = (-1, -1) if less else (0, 0)
            if spans and all(span == middle for span in spans.values()):
                if less != self.less:
                    self.notes.append(
                        f"config.json says {self.version}, but all zero points are those of "
                        f"{_VERSIONS[not less]}: read so"
                    )
                self.less = less
                return
        middle = -1 if self.less else 0
        for name, (scheme, _) in layers.items():
            if scheme.symmetric and spans[name] != (middle, middle):
                raise self.fail(
                    name,
                    "qzeros",
                    f"hold {(1 << (scheme.bits - 1)) + middle} throughout (quantization_config.sym "
                    f"true, {self.version})",
                    "others",
                )

    def _span(self, name: str, scheme: GPTQScheme, rows: int) -> tuple[int, int]:
        """Smallest and largest stored zero point, counted from the middle code."""
        key = f"{name}.qzeros"
        stored = unpack_rows(self.folder.read([key])[key], scheme.bits, rows)
        middle = 1 << (scheme.bits - 1)
        return int(stored.min()) - middle, int(stored.max()) - middle

    def layer(
        self, name: str, scheme: GPTQScheme, rows: int, columns: int, parts: dict[str, torch.Tensor]
    ) -> Layer:
        bits = scheme.bits
        # A word's bytes are neighbours in k already, as the canonical form wants them.
        raw = parts["qweight"].view(torch.uint8).reshape(-1, rows, 4)
        codes = raw.transpose(0, 1).reshape(rows, -1)
        codes = codes[:, : -(-columns * bits // 8)].contiguous()
        words = parts["qzeros"]
        if self.less:
            step = 0x11111111 if bits == 4 else 0x01010101
            words = ((words.long() + step) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
        zeros = unpack_rows(words, bits, rows)
        group, order, places = self.groups(name, scheme, columns, parts.get("g_idx"))
        scales = parts["scales"][order].T.contiguous()
        return layer_of(codes, scales, zeros[order].T.contiguous(), bits, group, places)
