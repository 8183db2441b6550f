"""Writes small quantised transformers folders for the tests, bit by bit, in NumPy and Python ints.

`Sample(...).write(folder)` makes a random model, draws codes, scales and zero points for its
linears, packs them as the format says, and keeps what a reader must find: `codes`, `scales`,
`zeros` [N, ...] and the `model` whose linears hold scale * (code - zero).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mxfp4_samples
import numpy as np
import nvfp4_samples
import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="the transformers package is not installed"
)
safetensors_torch = pytest.importorskip(
    "safetensors.torch", reason="the safetensors package is not installed"
)

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Strategy, group and dtype of the scales, as compressed-tensors' config groups say them.
FLOATS_OF_4_BITS = {
    "mxfp4": ("group", 32, "uint8"),
    "nvfp4": ("tensor_group", 16, "float8_e4m3fn"),
}
_COMMON = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 72}
_GATED = {"intermediate_size": 160, "num_key_value_heads": 2, "max_position_embeddings": 64}
_SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 72,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_ROUTED = {"intermediate_size": 128, "moe_intermediate_size": 96, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": {**_COMMON, **_GATED},
    "qwen2": {**_COMMON, **_GATED, "tie_word_embeddings": True},
    "gpt_neox": {**_COMMON, "intermediate_size": 192, "max_position_embeddings": 64},
    "opt": {**_COMMON, "ffn_dim": 192, "word_embed_proj_dim": 128, "max_position_embeddings": 64},
    "falcon": {},
    "gemma2": {**_COMMON, **_GATED, "head_dim": 32, "sliding_window": 16},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 72, "n_positions": 64},
    "mixtral": {**_SMALL, "intermediate_size": 96, "num_local_experts": 4},
    "qwen2_moe": {**_SMALL, **_ROUTED, "shared_expert_intermediate_size": 32, "num_experts": 4},
    "qwen3_moe": {**_SMALL, **_ROUTED, "head_dim": 16, "num_experts": 4},
    "olmoe": {**_SMALL, "intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **_SMALL, **_ROUTED, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32,
        "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    },
}  # fmt: skip
# What files call the experts of a layer, their gate, up and down matrices, and the layer's router.
EXPERTS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"),
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
    ),
}


def configuration(arch: str, **values: Any) -> Any:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return transformers.AutoConfig.for_model(arch, **{**ARCHITECTURES[arch], **ids, **values})


# --- packing: each function puts [.., n] integers into words as one format draws them ------------


def _int32(words: np.ndarray) -> np.ndarray:
    return (words & 0xFFFFFFFF).astype(np.uint32).view(np.int32)


def columns_of_words(values: np.ndarray, bits: int, places: list[int] | None = None) -> np.ndarray:
    """[R, C] -> [R, C * bits / 32] int32: column p c + j at field places[j] of word c."""
    per = 32 // bits
    places = list(range(per)) if places is None else places
    out = np.zeros((values.shape[0], values.shape[1] // per), np.uint64)
    for word in range(out.shape[1]):
        for j in range(per):
            field = values[:, per * word + j].astype(np.uint64)
            out[:, word] |= field << np.uint64(bits * places[j])
    return _int32(out)


def bit_stream(values: np.ndarray, bits: int) -> np.ndarray:
    """[R, C] -> [R, ceil(C * bits / 32)] int32: element i at bits i * bits of the row."""
    words = -(-values.shape[1] * bits // 32)
    rows = []
    for row in values:
        number = sum(int(value) << (bits * i) for i, value in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(4 * words, "little"), "<i4"))
    return np.stack(rows)


def pack_gptq(codes, scales, zeros, bits, version, g_idx=None) -> dict[str, np.ndarray]:
    stored = columns_of_words(zeros.T, bits).view(np.uint32).astype(np.int64)
    if version == "gptq":  # as the writers do: one subtraction for the whole word
        stored -= int("1" * 8, 16) if bits == 4 else int("01" * 4, 16)
    out = {
        "qweight": columns_of_words(codes, bits).T.copy(),
        "qzeros": _int32(stored),
        "scales": scales.T,
    }
    return out if g_idx is None else {**out, "g_idx": g_idx.astype(np.int32)}


def pack_awq(codes, scales, zeros) -> dict[str, np.ndarray]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # field i holds column order[i]
    places = [order.index(column) for column in range(8)]
    return {
        "qweight": columns_of_words(codes.T, 4, places),
        "qzeros": columns_of_words(zeros.T, 4, places),
        "scales": scales.T,
    }


def pack_compressed(
    codes, scales, zeros, bits, symmetric, plain=False, g_idx=None
) -> dict[str, np.ndarray]:
    out = {
        "weight_packed": bit_stream(codes, bits),
        "weight_scale": scales,
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if not symmetric:
        packed = bit_stream(zeros.T, bits).T.copy()
        signed = (zeros.astype(np.int64) - (1 << (bits - 1))).astype(np.int8)
        out["weight_zero_point"] = signed if plain else packed
    return out if g_idx is None else {**out, "weight_g_idx": g_idx.astype(np.int32)}


def plain_compressed(
    codes, scales, zeros, bits, symmetric, whole=False, g_idx=None
) -> dict[str, np.ndarray]:
    """What int-quantized holds: signed codes and zero points, a byte each."""
    middle = 1 << (bits - 1)
    out = {"weight": (codes - middle).astype(np.int8), "weight_scale": scales}
    if not symmetric:
        out["weight_zero_point"] = (zeros - middle).astype(np.int8)
    if whole:
        out = {key: part if key == "weight" else part[0] for key, part in out.items()}
    return out if g_idx is None else {**out, "weight_g_idx": g_idx.astype(np.int32)}


# --- folders --------------------------------------------------------------------------------------


class Sample:
    """A quantised folder to be written.

    Args:
        method: "gptq", "gptq_v2", "awq", "compressed", "int", "mxfp4" or "nvfp4" (the last three of
            compressed-tensors), or "modelopt".
        bits, group: of all linears; a group of -1 is the row. ("mxfp4" and NVFP4 have their own.)
        symmetric: all zero points are the middle code.
        scale_dtype: "F16", "BF16" or "F32".
        arch, config: the model, as `configuration`.
        head: quantise the head too.
        settings: put into quantization_config.
        options: g_idx=callable (K, name) -> [K]; says: another checkpoint_format than is true;
            plain: zero points of compressed-tensors unpacked; symmetric_where=callable name ->
            bool; kept: of experts, callable name -> bool; seed; whole: one scale for all rows of
            "int"; activations: what config.json says of them; number: NVFP4's scale of a matrix.
    """

    def __init__(
        self,
        method: str = "gptq",
        bits: int = 4,
        group: int = 32,
        symmetric: bool = False,
        scale_dtype: str = "F16",
        arch: str = "llama",
        config: dict[str, Any] | None = None,
        head: bool = False,
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.method, self.bits, self.group, self.symmetric = method, bits, group, symmetric
        self.scale_dtype, self.arch, self.config = scale_dtype, arch, config or {}
        self.head, self.settings, self.options = head, settings or {}, options
        self.rng = np.random.default_rng(options.get("seed", 0))
        self.codes: dict[str, np.ndarray] = {}
        self.scales: dict[str, np.ndarray] = {}
        self.zeros: dict[str, np.ndarray] = {}
        self.tensors: dict[str, torch.Tensor] = {}

    def write(self, folder: Path, shards: int = 1) -> Path:
        self.make()
        return self.write_made(folder, shards)

    def write_made(self, folder: Path, shards: int = 1) -> Path:
        """As `write`, of what `make` made before."""
        folder.mkdir(parents=True, exist_ok=True)
        values = self.model.config.to_dict() | {"quantization_config": self.quantization()}
        (folder / "config.json").write_text(json.dumps(values, indent=1))
        self.save(folder, shards)
        return folder

    def save(self, folder: Path, shards: int = 1) -> None:
        names = sorted(self.tensors)
        if shards == 1:
            safetensors_torch.save_file(self.tensors, folder / "model.safetensors")
            return
        files = {}
        for part in range(shards):
            file = f"model-{part + 1:05d}-of-{shards:05d}.safetensors"
            own = names[part::shards]  # a layer's tensors lie in different files
            safetensors_torch.save_file({k: self.tensors[k] for k in own}, folder / file)
            files.update(dict.fromkeys(own, file))
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def quantization(self) -> dict[str, Any]:
        if self.method.startswith("gptq"):
            values = {
                "quant_method": "gptq",
                "checkpoint_format": self.options.get("says", self.method),
                "bits": self.bits,
                "group_size": self.group,
                "sym": self.symmetric,
                "desc_act": "g_idx" in self.options,
            }
        elif self.method == "awq":
            values = {
                "quant_method": "awq",
                "version": "gemm",
                "bits": 4,
                "group_size": self.group,
                "zero_point": True,
            }
        elif self.method in FLOATS_OF_4_BITS:
            strategy, size, scales = FLOATS_OF_4_BITS[self.method]
            weights = {
                "num_bits": 4,
                "type": "float",
                "symmetric": True,
                "strategy": strategy,
                "group_size": size,
                "dynamic": False,
                "scale_dtype": f"torch.{scales}",
            }
            values = self._compressed(f"{self.method}-pack-quantized", weights)
        elif self.method == "modelopt":
            weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
            group = {"weights": weights, "targets": ["Linear"]}
            if "activations" in self.options:
                group["input_activations"] = self.options["activations"]
            values = {
                "quant_method": "modelopt",
                "quant_algo": "NVFP4" if "activations" in self.options else "W4A16_NVFP4",
                "config_groups": {"group_0": group},
                "ignore": ["lm_head"],
                "producer": {"name": "modelopt", "version": "0.33.0"},
            }
        else:
            strategy = "channel" if self.group == -1 else "group"
            weights = {
                "num_bits": self.bits,
                "type": "int",
                "symmetric": self.symmetric,
                "strategy": "tensor" if self.options.get("whole") else strategy,
                "group_size": None if self.group == -1 else self.group,
                "dynamic": False,
            }
            form = "int-quantized" if self.method == "int" else "pack-quantized"
            values = self._compressed(form, weights)
        return {**values, **self.settings}

    def _compressed(self, form: str, weights: dict[str, Any]) -> dict[str, Any]:
        activations = self.options.get("activations")
        group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [] if self.head else ["lm_head"],
        }

    def make(self) -> None:
        torch.manual_seed(self.options.get("seed", 0))
        config = configuration(self.arch, **self.config)
        self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.dim() == 1:  # norms and biases that are not all 1 or 0
                    parameter += 0.1 * torch.randn_like(parameter)
                parameter.copy_(parameter.half())
                self.tensors[name] = parameter.half().clone()
            for name in self.model.state_dict().keys() - self.tensors.keys():
                if name.endswith("e_score_correction_bias"):  # DeepSeek-V3's router, a buffer
                    buffer = self.model.get_buffer(name)
                    buffer.copy_(0.1 * torch.randn_like(buffer).half())
                    self.tensors[name] = buffer.clone()
        conv = transformers.pytorch_utils.Conv1D
        for name, module in list(self.model.named_modules()):
            if isinstance(module, torch.nn.Linear):
                # (The gate of a shared expert is one row, which no format packs.)
                if module.out_features == 1 or (name == "lm_head" and not self.head):
                    continue
                module.weight = torch.nn.Parameter(self.draw(name, *module.weight.shape))
            elif isinstance(module, conv):
                weight = self.draw(name, module.nf, module.nx)
                module.weight = torch.nn.Parameter(weight.t().contiguous())
            elif self.arch in EXPERTS and hasattr(module, "gate_up_proj"):
                self._split(name, module)
        inner = EXPERTS.get(self.arch, ("mlp",))[0]
        self.tensors = {k.replace(".mlp.", f".{inner}."): t for k, t in self.tensors.items()}

    def _split(self, name: str, module: torch.nn.Module) -> None:
        """One linear an expert in the file; `options["kept"](name)` says what stays dense there."""
        inner, (gate, up, down) = EXPERTS[self.arch]
        kept = self.options.get("kept", lambda name: False)
        for fused, leaves in (("gate_up_proj", (gate, up)), ("down_proj", (down,))):
            del self.tensors[f"{name}.{fused}"]
            whole = module.get_parameter(fused).data
            for expert, matrix in enumerate(whole):
                for leaf, part in zip(leaves, matrix.chunk(len(leaves))):
                    own = f"{name}.{expert}.{leaf}".replace(".mlp.", f".{inner}.")
                    if kept(own):
                        self.tensors[f"{own}.weight"] = part.half().clone()
                    else:
                        part.copy_(self.draw(own, *part.shape))

    def draw(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """Puts a linear of this name into the file; returns the weight that it stands for."""
        if self.method == "mxfp4":
            return self._draw_mxfp4(name, rows, columns)
        if self.method in ("nvfp4", "modelopt"):
            return self._draw_nvfp4(name, rows, columns)
        whole = self.options.get("whole", False)
        only = self.options.get("symmetric_where")
        symmetric = self.symmetric or bool(only and only(name))
        groups = 1 if self.group == -1 else -(-columns // self.group)
        top = 1 << self.bits
        codes = self.rng.integers(0, top, (rows, columns))
        zeros = self.rng.integers(0, top, (rows, groups))
        zeros[0], zeros[1] = 0, top - 1
        if symmetric:
            zeros[:] = top // 2
        drawn = torch.from_numpy(self.rng.uniform(0.4, 1, (rows, groups)) / 4 / top)
        if whole:
            zeros[:], drawn[:] = zeros[2, 0], drawn[2, 0].clone()
        scales = drawn.to(DTYPES[self.scale_dtype])
        index = np.arange(columns) // (columns if self.group == -1 else self.group)
        g_idx = self.options["g_idx"](columns, name) if "g_idx" in self.options else None
        index = index if g_idx is None else g_idx
        wide = scales.double().numpy()
        weight = wide[:, index] * (codes - zeros[:, index])
        numbers = scales.float().numpy()  # exact; turned back below
        if self.method.startswith("gptq"):
            parts = pack_gptq(codes, numbers, zeros, self.bits, self.method, g_idx)
        elif self.method == "awq":
            parts = pack_awq(codes, numbers, zeros)
        elif self.method == "int":
            parts = plain_compressed(codes, numbers, zeros, self.bits, self.symmetric, whole, g_idx)
            codes, zeros = (part + 128 - top // 2 for part in (codes, zeros))
        else:
            plain = self.options.get("plain", False)
            given = (codes, numbers, zeros, self.bits, self.symmetric, plain, g_idx)
            parts = pack_compressed(*given)
        self.tensors.pop(f"{name}.weight", None)
        for part, array in parts.items():
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            if tensor.is_floating_point():
                tensor = tensor.to(DTYPES[self.scale_dtype])
            self.tensors[f"{name}.{part}"] = tensor
        self.codes[name], self.scales[name], self.zeros[name] = codes, wide, zeros
        return torch.from_numpy(weight).float()

    def _draw_mxfp4(self, name: str, rows: int, columns: int) -> torch.Tensor:
        nibbles = self.rng.integers(0, 16, (rows, columns), dtype=np.uint8)
        low, high = self.options.get("exponents", (118, 124))
        exponents = self.rng.integers(low, high, (rows, -(-columns // 32)), dtype=np.uint8)
        self.tensors.pop(f"{name}.weight", None)
        self.tensors[f"{name}.weight_packed"] = torch.from_numpy(mxfp4_samples.pairs(nibbles))
        self.tensors[f"{name}.weight_scale"] = torch.from_numpy(exponents)
        # What a reader must find: the same in symmetric codes of 8 bits.
        self.codes[name] = (128 + 2 * mxfp4_samples.ELEMENTS[nibbles]).astype(np.int64)
        self.scales[name] = np.ldexp(1.0, exponents.astype(np.int64) - 128)
        self.zeros[name] = np.full(exponents.shape, 128)
        return torch.from_numpy(mxfp4_samples.dense(nibbles, exponents)).float()

    def _draw_nvfp4(self, name: str, rows: int, columns: int) -> torch.Tensor:
        nibbles = self.rng.integers(0, 16, (rows, columns), dtype=np.uint8)
        of_groups = self.rng.integers(64, 127, (rows, -(-columns // 16)), dtype=np.uint8)
        divide = self.method == "nvfp4"
        number = np.float32(self.options.get("number", self.rng.uniform(4000, 9000)))
        number = number if divide else np.float32(1) / number
        codes, last = (
            ("weight_packed", "weight_global_scale") if divide else ("weight", "weight_scale_2")
        )
        self.tensors.pop(f"{name}.weight", None)
        self.tensors[f"{name}.{codes}"] = torch.from_numpy(nvfp4_samples.pairs(nibbles))
        self.tensors[f"{name}.weight_scale"] = nvfp4_samples.e4m3_tensor(of_groups)
        self.tensors[f"{name}.{last}"] = torch.tensor([number] if divide else number)
        if "activations" in self.options:
            leaf = "input_global_scale" if divide else "input_scale"
            self.tensors[f"{name}.{leaf}"] = torch.tensor([0.5] if divide else 0.5)
        scales = nvfp4_samples.scales(of_groups, number, divide)
        # What a reader must find: symmetric codes of 8 bits, whose scale is half of the group's.
        self.codes[name] = (128 + 2 * mxfp4_samples.ELEMENTS[nibbles]).astype(np.int64)
        self.scales[name] = scales.astype(np.float64) / 2
        self.zeros[name] = np.full(of_groups.shape, 128)
        return torch.from_numpy(nvfp4_samples.dense(nibbles, scales))
