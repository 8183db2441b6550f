"""Folders that NVIDIA's Model Optimizer writes, quant_algo NVFP4: what their tensors mean.

    w[n, k] = element[n, k] * weight_scale[n, k // 16] * weight_scale_2

| tensor         | shape and dtype         | holds                                                 |
| weight         | [N, ceil(K/2)] uint8    | byte i of row n: elements 2 i (low nibble), 2 i + 1   |
| weight_scale   | [N, ceil(K/16)] E4M3    | scales of groups                                      |
| weight_scale_2 | [] or [1] float32       | one number for the matrix                             |
| input_scale    | any, optional           | (a scale of quantised activations: not used)          |

`_nvfp4` says how they become 8-bit codes and scales. The settings are config.json's
quantization_config, or, in older folders, hf_quant_config.json. What of the model is quantised the
names of the tensors say; `ignore` and `exclude_modules` say the same once more. quant_algo
W4A16_NVFP4 holds the same tensors and leaves activations as they are. The other algorithms that
have NVFP4 in their names multiply the activations (NVFP4_AWQ), add a product of low rank
(NVFP4_SVD) or quantise in other ways, and are refused.

Source: the export and the NVFP4 tensors of NVIDIA's Model Optimizer; vLLM's reader of them.
"""

from __future__ import annotations

import torch

from nibblock.formats import _nvfp4
from nibblock.formats._quantized_folder import Folder, Part, Settings
from nibblock.formats._quantized_layer import Layer, Reader, Scheme

_NAMES = ("weight", "weight_scale", "weight_scale_2")


class ModelOpt(Reader):
    """The reader of one folder's NVFP4 tensors; see the module."""

    marker, scales = "weight_scale_2", "weight_scale"

    def __init__(self, folder: Folder, settings: Settings) -> None:
        super().__init__(folder)
        if "quantization" in settings.values:
            settings = settings.child("quantization")
        algorithm = settings.word(("quant_algo",), ("nvfp4", "w4a16_nvfp4"), "")
        self._check_group(settings)
        if settings.values.get("config_groups"):
            groups = settings.child("config_groups")
            for key in groups.values:
                self._check(groups.child(key))
        self.unused.append(r"\.input_scale$")  # written for both algorithms
        if algorithm == "nvfp4":
            self.leave_activations(settings, "quant_algo")
        for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
            if settings.values.get(key):
                self.leave_cache(settings, key)

    def _check(self, group: Settings) -> None:
        """Refuses a config group that says something else than NVFP4."""
        group.absent("pre_quant_scale")
        group.absent("output_activations")
        weights = group.child("weights")
        weights.word(("type",), ("float",), "float")
        if weights.integer("num_bits", 4) != 4:
            raise weights.fail("num_bits", "4, the only one of NVFP4")
        self._check_group(weights)

    @staticmethod
    def _check_group(settings: Settings) -> None:
        if settings.values.get("group_size") is None:
            return
        if settings.integer("group_size") != _nvfp4.GROUP:
            raise settings.fail("group_size", f"{_nvfp4.GROUP}, the only one of NVFP4")

    def codes(self, name: str, kind: str) -> str:
        return "weight"

    def scheme(self, name: str, kind: str) -> Scheme:
        return Scheme(8, _nvfp4.GROUP)

    def parts(self, scheme: Scheme, rows: int, columns: int) -> dict[str, Part]:
        return _nvfp4.parts(rows, columns, _NAMES)

    def layer(
        self, name: str, scheme: Scheme, rows: int, columns: int, parts: dict[str, torch.Tensor]
    ) -> Layer:
        return _nvfp4.layer(self, name, columns, parts, _NAMES, divide=False)
