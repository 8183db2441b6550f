"""Folders that transformers calls mxfp4, gpt-oss: what their bytes mean.

    w[e, n, k] = element[e, n, k] * 2^(scales[e, n, k // 32] - 127)

| tensor              | shape and dtype             | byte                                         |
| <projection>_blocks | [E, N, ceil(K/32), 16] uint8 | i of block g: elements 32 g + 2 i (the low  |
|                     |                             | nibble) and 32 g + 2 i + 1, as in `_e2m1`    |
| <projection>_scales | [E, N, ceil(K/32)] uint8    | the exponent of a block                      |

Only the two projections of experts are stored so. transformers keeps them transposed, [E, K, N];
the file and `Int4Experts` do not. Rows of gate and up alternate in both: nothing is moved. Each
element becomes an 8-bit code.

Source: transformers/integrations/mxfp4.py; the OCP Microscaling Formats specification 1.0.
"""

from __future__ import annotations

import torch

from nibblock.formats import _e2m1
from nibblock.formats._quantized_folder import Folder, Part, Settings
from nibblock.formats._quantized_layer import Layer, Reader, Scheme, groups_of, layer_of_floats

_GROUP = 32


class MXFP4(Reader):
    """The reader of one folder's MXFP4 tensors; see the module."""

    marker, scales, fused = "blocks", "scales", True

    def __init__(self, folder: Folder, settings: Settings) -> None:
        # (Of the settings, modules_to_not_convert says what the names of the tensors say too.)
        super().__init__(folder)

    def scheme(self, name: str, kind: str) -> Scheme:
        return Scheme(8, _GROUP)

    def parts(self, scheme: Scheme, rows: int, columns: int) -> dict[str, Part]:
        groups = groups_of(columns, _GROUP)
        return {
            "blocks": Part.of((rows, groups, _GROUP // 2), "U8"),
            "scales": Part.of((rows, groups), "U8"),
        }

    def layer(
        self, name: str, scheme: Scheme, rows: int, columns: int, parts: dict[str, torch.Tensor]
    ) -> Layer:
        scales = torch.from_numpy(_e2m1.half_scales(parts["scales"].numpy()))
        return layer_of_floats(parts["blocks"].flatten(1), scales, columns, _GROUP)
