"""Typed look-ups in a GGUF file's metadata, and what transformers calls the values.

Source: the metadata keys of the GGUF specification; what a missing key means after llama.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nibblock.formats._gguf_file import GGUFFile, StringArray


class Metadata:
    """Typed look-ups; each error names the file and the key."""

    def __init__(self, file: GGUFFile, prefix: str = "") -> None:
        self.file, self.prefix = file, prefix

    def get(self, key: str) -> Any:
        return self.file.metadata.get(self.prefix + key)

    def integer(self, key: str, default: int | None = None, low: int = 1) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # some converters repeat one number for each layer
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
            raise self.fail(key, f"an integer of at least {low}", value)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or value <= 0:
            raise self.fail(key, "a positive number", value)
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, "a string", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false", value)
        return value

    def fail(self, key: str, need: str, value: Any) -> ValueError:
        if isinstance(value, (np.ndarray, StringArray)):
            value = f"an array of {len(value)}"
        got = "nothing" if value is None else str(value)[:60]
        return self.file.fail(f"hold metadata {self.prefix}{key} as {need}", got)


def rope_parameters(meta: Metadata, context: int, listed: bool = False) -> dict[str, Any]:
    """transformers' rope_parameters.

    listed: tensors hold frequency divisors for short and long texts; the caller puts them in.
    """
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": meta.real("rope.freq_base", 10000.0),
    }
    # As llama.cpp reads them: a file without a type means linear, and the factor's name in older
    # files stands in where the new one is absent.
    kind = meta.text("rope.scaling.type", "linear")
    old = "rope.scale_linear"
    key = old if meta.get("rope.scaling.factor") is None else "rope.scaling.factor"
    factor = meta.real(key, 1.0)
    if listed and (kind in ("none", "longrope") or (kind == "linear" and factor == 1.0)):
        original = meta.integer("rope.scaling.original_context_length", context)
        return {
            **rope,
            "rope_type": "longrope",
            "factor": context / original,
            "original_max_position_embeddings": original,
            "attention_factor": meta.real("rope.scaling.attn_factor", 1.0),
        }
    if listed:
        raise meta.fail("rope.scaling.type", "longrope beside rope_factors tensors", kind)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return rope
    if kind == "linear":
        return {**rope, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        # ggml multiplies the usual magnitude correction by attn_factor; transformers replaces it.
        correction = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
        return {
            **rope,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": meta.integer(
                "rope.scaling.original_context_length", context
            ),
            "attention_factor": correction * meta.real("rope.scaling.attn_factor", 1.0),
            "beta_fast": meta.real("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": meta.real("rope.scaling.yarn_beta_slow", 1.0),
        }
    raise meta.fail("rope.scaling.type", "one of none, linear, yarn", kind)


def token_ids(file: GGUFFile, vocabulary: int) -> dict[str, Any]:
    """bos, eos and pad ids, where the file has them and they are in the vocabulary."""
    meta = Metadata(file, "tokenizer.ggml.")

    def token(key: str) -> int | None:
        if meta.get(key) is None:
            return None
        value = meta.integer(key, low=0)
        if value == 2**32 - 1:  # how some converters write "none"
            return None
        if value >= vocabulary:
            raise meta.fail(key, f"an id below {vocabulary}", value)
        return value

    eos = [i for i in (token("eos_token_id"), token("eot_token_id")) if i is not None]
    eos = list(dict.fromkeys(eos))
    return {
        "bos_token_id": token("bos_token_id"),
        "eos_token_id": eos if len(eos) > 1 else (eos[0] if eos else None),
        "pad_token_id": token("padding_token_id"),
    }


def llama3_scaling(factors: np.ndarray, theta: float, context: int) -> dict[str, Any] | None:
    """The llama3 rope parameters that give these frequency divisors, or None when none of them do.

    The file stores only the result (one divisor per frequency pair). The published models all use
    low_freq_factor 1, high_freq_factor 4 and an original context of 8192.
    """
    half = len(factors)
    wavelength = 2 * math.pi * theta ** (np.arange(half, dtype=np.float64) / half)
    factor = float(np.max(factors))
    for original in dict.fromkeys((8192, context)):
        low, high = float(original), original / 4.0
        smooth = (original / wavelength - 1.0) / 3.0
        middle = 1.0 / ((1.0 - smooth) / factor + smooth)
        expected = np.where(wavelength < high, 1.0, np.where(wavelength > low, factor, middle))
        if np.allclose(factors, expected, rtol=1e-5, atol=0.0):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    return None


def longrope_scaling(factors: np.ndarray, theta: float, context: int) -> dict[str, Any]:
    """The rope parameters that give any frequency divisors: longrope with one list for all lengths.

    Both factors are 1, so that cosines and sines are not scaled.
    """
    listed = [float(value) for value in factors]
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
        "short_factor": listed,
        "long_factor": list(listed),
    }
