"""MXFP4 bit by bit, after the OCP Microscaling specification, and small gpt-oss folders of it.

An element is four bits s e e m, a block 32 of them with one exponent byte. Nothing of the package
is used here: values are float64, packing is written out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

safetensors_torch = pytest.importorskip(
    "safetensors.torch", reason="the safetensors package is not installed"
)


def _element(nibble: int) -> float:
    sign, exponent, mantissa = nibble >> 3, (nibble >> 1) & 3, nibble & 1
    size = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa * 0.5)
    return -size if sign else size


ELEMENTS = np.array([_element(nibble) for nibble in range(16)])


def dense(nibbles: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """[..., K] float64 of elements [..., K] and exponents [..., ceil(K / 32)]; 255 is NaN."""
    scales = np.where(exponents == 255, np.nan, 2.0 ** (exponents.astype(np.float64) - 127))
    return ELEMENTS[nibbles] * np.repeat(scales, 32, axis=-1)[..., : nibbles.shape[-1]]


def pairs(nibbles: np.ndarray) -> np.ndarray:
    """[..., K / 2] bytes: columns 2 i (low) and 2 i + 1, as safetensors files have them."""
    return (nibbles[..., 0::2] + 16 * nibbles[..., 1::2]).astype(np.uint8)


def ggml_blocks(nibbles: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """[..., K / 32 * 17] bytes: of each block its exponent, then columns i (low) and i + 16."""
    blocks = nibbles.reshape(*exponents.shape, 32)
    halves = (blocks[..., :16] + 16 * blocks[..., 16:]).astype(np.uint8)
    raw = np.concatenate((exponents[..., None], halves), axis=-1)
    return raw.reshape(*exponents.shape[:-1], -1)


def every_block() -> tuple[np.ndarray, np.ndarray]:
    """(elements [256, 32], exponents [256, 1]): all exponents, each with all elements, twice."""
    nibbles = np.tile(np.concatenate((np.arange(16), np.arange(16)[::-1])), (256, 1))
    return nibbles.astype(np.uint8), np.arange(256, dtype=np.uint8)[:, None]


class GptOss:
    """A gpt-oss folder as transformers writes it: experts in MXFP4, all else in bfloat16.

    Args:
        exponents: [low, high) of those that are drawn.
        kept: numbers of the layers whose experts are not quantised.
        config: other sizes.
    Attributes:
        tensors: of the file, by name. model: transformers', dense, in float32, with those weights.
        drawn: (nibbles [E, N, K], exponents [E, N, K / 32]) by the projection's name.
    """

    def __init__(
        self,
        exponents: tuple[int, int] = (118, 124),
        kept: tuple[int, ...] = (),
        seed: int = 0,
        **config: Any,
    ) -> None:
        import transformers

        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        values = {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 72,
            "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4,
            "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        }  # fmt: skip
        self.config = transformers.AutoConfig.for_model("gpt_oss", **{**values, **config})
        model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        self.model = model.eval()
        self.kept = kept
        self.tensors: dict[str, torch.Tensor] = {}
        self.drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                leaf = name.rpartition(".")[2]
                if leaf in ("gate_up_proj", "down_proj") and int(name.split(".")[2]) not in kept:
                    count, columns, rows = parameter.shape  # transposed in the model
                    nibbles = rng.integers(0, 16, (count, rows, columns), dtype=np.uint8)
                    size = (count, rows, columns // 32)
                    self.set(name, nibbles, rng.integers(*exponents, size, dtype=np.uint8))
                    continue
                if parameter.dim() < 3:  # biases that are not 0, norms that are not 1, sinks
                    parameter += 0.1 * torch.randn_like(parameter)
                parameter.copy_(parameter.bfloat16())
                self.tensors[name] = parameter.bfloat16().clone()

    def set(self, name: str, nibbles: np.ndarray, exponents: np.ndarray) -> None:
        """Another projection in the file and the model."""
        self.drawn[name] = nibbles, exponents
        blocks = pairs(nibbles).reshape(*exponents.shape, 16)
        self.tensors[f"{name}_blocks"] = torch.from_numpy(blocks)
        self.tensors[f"{name}_scales"] = torch.from_numpy(exponents)
        weight = torch.from_numpy(dense(nibbles, exponents)).float().transpose(1, 2)
        with torch.no_grad():
            self.model.get_parameter(name).copy_(weight)

    def write(self, folder: Path, **changes: torch.Tensor | None) -> Path:
        """`changes` replace tensors of the file; None takes one away."""
        folder.mkdir(parents=True, exist_ok=True)
        whole = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
        kept = [f"model.layers.{layer}.mlp.experts" for layer in self.kept]
        quantization = {"quant_method": "mxfp4", "modules_to_not_convert": [*whole, *kept]}
        values = self.config.to_dict() | {
            "architectures": ["GptOssForCausalLM"],
            "quantization_config": quantization,
        }
        (folder / "config.json").write_text(json.dumps(values))
        tensors = {k: t for k, t in {**self.tensors, **changes}.items() if t is not None}
        safetensors_torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
