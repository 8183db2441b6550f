"""AWQ checkpoints of version GEMM: what their words mean.

    w[n, k] = scales[g(k), n] * (q[k, n] - z[g(k), n]),   g(k) = k // G

| tensor  | shape and dtype             | word                                             |
| qweight | [K, N/8] int32              | nibble i of [k, c]: q of column 8 c + O[i]       |
| qzeros  | [ceil(K/G), N/8] int32      | nibble i of [t, c]: z of column 8 c + O[i]       |
| scales  | [ceil(K/G), N] floating     |                                                  |

O = 0 2 4 6 1 3 5 7. Zero points are stored as they are, unlike GPTQ's.

Source: the layout of AutoAWQ's GEMM kernel (arXiv:2306.00978).
"""

from __future__ import annotations

import torch

from nibblock.formats._quantized_folder import FLOATS, Folder, Part, Settings
from nibblock.formats._quantized_layer import (
    CHUNK_CODES,
    Layer,
    Reader,
    Scheme,
    groups_of,
    layer_of,
    unpack_rows,
    words_of,
)

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds column j of its word: O's inverse


class AWQ(Reader):
    """The reader of one folder's AWQ tensors; see the module."""

    marker, scales = "qweight", "scales"

    def __init__(self, folder: Folder, settings: Settings) -> None:
        super().__init__(folder)
        settings.word(("version", "format", "checkpoint_format"), ("gemm",), "gemm")
        if settings.integer("bits") != 4:
            raise settings.fail("bits", "4, the only one of version gemm")
        self.default = Scheme(4, settings.group("group_size"))

    def scheme(self, name: str, kind: str) -> Scheme:
        return self.default

    def parts(self, scheme: Scheme, rows: int, columns: int) -> dict[str, Part]:
        groups, words = groups_of(columns, scheme.group), words_of(rows, 4)
        return {
            "qweight": Part.of((columns, words), "I32"),
            "qzeros": Part.of((groups, words), "I32"),
            "scales": Part.of((groups, rows), *FLOATS),
        }

    def layer(
        self, name: str, scheme: Scheme, rows: int, columns: int, parts: dict[str, torch.Tensor]
    ) -> Layer:
        group, order, _ = self.groups(name, scheme, columns)
        codes = torch.zeros(rows, -(-columns // 2), dtype=torch.uint8)
        step = max(2, CHUNK_CODES // max(rows, 1) // 2 * 2)  # pairs of k share a byte
        for first in range(0, columns, step):
            part = _unpack(parts["qweight"][first : first + step], rows)
            to = slice(first // 2, first // 2 + -(-len(part) // 2))
            codes[:, to] = part[0::2].T
            high = part[1::2].T << 4
            codes[:, to.start : to.start + high.shape[1]] |= high
        zeros = _unpack(parts["qzeros"], rows)[order].T.contiguous()
        return layer_of(codes, parts["scales"][order].T.contiguous(), zeros, 4, group)


def _unpack(words: torch.Tensor, rows: int) -> torch.Tensor:
    """[R, W] int32 -> [R, N] uint8, columns in their order."""
    nibbles = unpack_rows(words, 4, 8 * words.shape[1]).reshape(len(words), -1, 8)
    return nibbles[..., list(_PLACES)].reshape(len(words), -1)[:, :rows]
