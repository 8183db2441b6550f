"""Writes small GGUF files for the tests: random models of every tensor type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

# byte offsets of the float16 numbers in a block: the rest of a block may be any bytes
HALVES = {
    "Q1_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "IQ1_S": (0,),
    "IQ1_M": (),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def type_id(name: str) -> Any:
    return gguf.GGMLQuantizationType[name]


def blocks(rng: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray:
    """[rows, bytes] random blocks of a type: any codes, scales near 0.02 (K types less)."""
    values, size = gguf.GGML_QUANT_SIZES[type_id(kind)]
    raw = rng.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    if kind == "MXFP4":
        raw[..., 0] = rng.integers(118, 124, raw.shape[:2])  # scales of 2^-9 to 2^-4
    if kind == "NVFP4":
        raw[..., :4] = rng.integers(1, 12, (*raw.shape[:2], 4))  # of 2^-9 to 2^-5
    for at in HALVES.get(kind, ()):
        size_of = 0.0005 if kind.endswith(("_K", "XS", "NL", "XXS")) or kind == "Q8_0" else 0.01
        half = (rng.standard_normal((rows, columns // values, 1)) * size_of).astype(np.float16)
        raw[..., at : at + 2] = half.view(np.uint8)
    if kind == "IQ1_M":  # the float16 lies in the top nibbles of the block's last four words
        half = (rng.standard_normal((rows, columns // values, 1)) * 0.01).astype(np.float16)
        nibbles = half.view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16) << 12
        words = raw[..., 48:].view(np.uint16)
        words[...] = (words & 0x0FFF) | nibbles
    return raw.reshape(rows, -1)


def ggml_values(kind: str, raw: np.ndarray) -> np.ndarray:
    """[rows, columns] float32: what ggml makes of blocks, by the gguf package where it knows."""
    if kind != "Q1_0":
        return gguf.quants.dequantize(raw, type_id(kind))
    out = []
    for row in raw.reshape(len(raw), -1, 18):
        for block in row:
            d = np.frombuffer(block[:2].tobytes(), "<f2")[0].astype(np.float32)
            bits = int.from_bytes(block[2:].tobytes(), "little")
            out += [d if bits >> i & 1 else -d for i in range(128)]
    return np.array(out, np.float32).reshape(len(raw), -1)


class Model:
    """A tiny model to be written: sizes, the type of each kind of tensor, and extra metadata."""

    def __init__(self, arch: str = "llama", types: dict[str, str] | str = "Q4_0", **options: Any):
        self.arch, self.options = arch, options
        self.types = {"": types} if isinstance(types, str) else types
        self.hidden = options.get("hidden", 256)
        self.inner = options.get("inner", 512)
        self.heads = options.get("heads", 4)
        self.kv_heads = options.get("kv_heads", 2)
        self.head_dim = options.get("head_dim", self.hidden // self.heads)
        self.vocab = options.get("vocab", 70)
        self.layers = options.get("layers", 2)
        self.tied = options.get("tied", False)
        self.rng = np.random.default_rng(options.get("seed", 0))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        out: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab, h)}
        for i in range(self.layers):
            b = f"blk.{i}."
            out |= {b + "attn_norm.weight": (h,), b + "ffn_norm.weight": (h,)}
            out |= {b + "attn_q.weight": (q, h), b + "attn_k.weight": (kv, h)}
            out |= {b + "attn_v.weight": (kv, h), b + "attn_output.weight": (h, q)}
            out |= {b + "ffn_gate.weight": (self.inner, h), b + "ffn_up.weight": (self.inner, h)}
            out |= {b + "ffn_down.weight": (h, self.inner)}
            if self.arch == "qwen2" or self.options.get("bias"):
                out |= {b + "attn_q.bias": (q,), b + "attn_k.bias": (kv,), b + "attn_v.bias": (kv,)}
            if self.arch == "qwen3":
                out |= {b + "attn_q_norm.weight": (self.head_dim,)}
                out |= {b + "attn_k_norm.weight": (self.head_dim,)}
        out["output_norm.weight"] = (h,)
        if not self.tied:
            out["output.weight"] = (self.vocab, h)
        return out

    def kind(self, name: str, shape: tuple[int, ...]) -> str:
        plain = len(shape) == 1 or name.endswith(".bias")
        if plain or "norm" in name or "ffn_gate_inp" in name:
            return "F32"
        fits = [part for part in self.types if part in name]
        return self.types[max(fits, key=len)]

    def metadata(self) -> dict[str, Any]:
        a = self.arch
        values = {
            f"{a}.block_count": self.layers,
            f"{a}.context_length": 512,
            f"{a}.embedding_length": self.hidden,
            f"{a}.feed_forward_length": self.inner,
            f"{a}.attention.head_count": self.heads,
            f"{a}.attention.head_count_kv": self.kv_heads,
            f"{a}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{a}.rope.freq_base": 10000.0,
            f"{a}.attention.key_length": self.head_dim,
            f"{a}.attention.value_length": self.head_dim,
            f"{a}.rope.dimension_count": self.head_dim,
            f"{a}.vocab_size": self.vocab,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
        return {
            k: v for k, v in {**values, **self.options.get("meta", {})}.items() if v is not None
        }

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.arch)
        for key, value in self.metadata().items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        shapes = {**self.shapes(), **self.options.get("replace", {})}
        for name, shape in shapes.items():
            if shape is None:
                continue
            kind = self.kind(name, shape)
            if kind in ("F32", "F16"):
                scale, shift = (0.1, 1.0) if name.endswith("norm.weight") else (0.05, 0.0)
                data = (self.rng.standard_normal(shape) * scale + shift).astype(
                    np.float32 if kind == "F32" else np.float16
                )
                writer.add_tensor(name, data)
            elif kind == "BF16":
                data = self.rng.standard_normal(shape).astype(np.float32) * np.float32(0.05)
                raw = gguf.quants.quantize(data, type_id(kind))
                writer.add_tensor(name, raw, raw_dtype=type_id(kind))
            else:
                raw = blocks(self.rng, kind, int(np.prod(shape[:-1])), shape[-1])
                raw = raw.reshape(*shape[:-1], -1)
                writer.add_tensor(name, raw, raw_dtype=type_id(kind))
        for name, data in self.options.get("extra", {}).items():
            writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path
