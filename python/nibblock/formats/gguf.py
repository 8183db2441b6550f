"""Imports GGUF files: a transformers model whose linears are Int4Linear, without loss.

What becomes of each tensor:

| tensor type                     | becomes                                                        |
| Q4_0, Q4_1, Q2_K, Q3_K, Q4_K,   | Int4Linear, 4 bits, codes and scales exactly (TQ needs the     |
| Q1_0, TQ*                       | gguf package)                                                  |
| Q5_*, Q6_K, Q8_0                | Int4Linear with bits=8, group 16 or 32, exactly                |
| IQ1_* to IQ4_*, MXFP4, NVFP4    | the same with a palette: 4 bits each (IQ1 to IQ3 need the gguf |
|                                 | package)                                                       |
| F32, F16, BF16                  | a dense nn.Linear in `dtype`; `requantize=True` rounds it to   |
|                                 | 8 bits, group 32, instead                                      |
| norms, biases                   | dense, in `dtype`                                              |

The embedding follows the same table with Int4Embedding; a tied head shares its packed storage.
The experts of a layer become one Int4Experts; where one of its tensors is dense, all of that
layer's experts are. Routers are dense.

Architectures: llama (Mistral's and Mixtral's files too), qwen2, qwen3, qwen2moe, qwen3moe, gemma,
gemma2, gemma3 (text), phi3, granite, smollm3, olmo2, stablelm, starcoder2, gpt-oss.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from nibblock._report import LayerReport, Report
from nibblock.formats._ggml_types import EXACT_TYPES, Codes
from nibblock.formats._gguf_experts import put_experts
from nibblock.formats._gguf_file import GGUFFile
from nibblock.formats._gguf_metadata import llama3_scaling, longrope_scaling
from nibblock.formats._gguf_model import ModelPlan, Slot, plan
from nibblock.formats._gguf_tensors import FLOATS, TensorReader, as_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_gguf(
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    fuse: bool = False,
    *,
    compute: str = "bf16",
    requantize: bool = False,
) -> PreTrainedModel:
    """Loads a GGUF file as a transformers model whose linears are Int4Linear, without loss.

        w[n, k] = scale[n, k / group] * code[n, k] + offset[n, k / group]

    Args:
        path: a GGUF file, version 2 or 3, of an architecture that the module's docstring lists.
        dtype: float32 | bfloat16 | float16, of the activations, norms, biases and dense weights.
        fuse: run q/k/v and gate/up as one product each (see `accelerate`, as for the shorter
            forwards that known decoder layers get in any case); in phi3 they are one linear each
            already.
        compute: "bf16" | "int8", the arithmetic of the Int4Linear layers.
        requantize: store linears, experts and embeddings that the file holds as floats (or in a
            type newer than the module's table) in 8 bits, group 32, symmetric, rounded to nearest,
            instead of dense. No longer lossless for those layers.
    Returns:
        the model in eval mode on the CPU. `model.nibblock_report` prints what became of each layer.
    Raises:
        FileNotFoundError: no such file.
        TypeError: dtype is none of the three.
        ValueError: not a GGUF file, truncated or corrupt; unknown tensor type or architecture; a
            missing, unexpected or misshaped tensor. One line that names file and tensor.
        ImportError: transformers (or, for rare tensor types, gguf) is not installed.
    Gradients: as of `Int4Linear`: through the layers and to norms and biases, not to packed
    weights.
    Determinism: the same file gives the same bytes.
    Numerics: with requantize=False every weight equals ggml's own float32 dequantisation, then
        `dtype` for dense tensors only. (Where the gates of a layer's experts have offsets and the
        ups have none, or the reverse, `dequantize` may round their last bit.) Gemma's norms are
        stored as w + 1 and become w, rounded to float32. Peak memory is the result plus one tensor
        (of experts, about twice a layer's).
    Source: block layouts of ggml; tests/test_gguf.py compares with the gguf package and
    transformers. Example:
        >>> model = nb.load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf", fuse=True)
        >>> print(model.nibblock_report)
    """
    from nibblock.nn.fused import fuse_where_possible, shorten_forwards

    model, builder = _load(path, dtype, quantised=True, compute=compute, requantize=requantize)
    shorten_forwards(model)
    if fuse:
        report = builder.report
        report.fused, report.not_fused = fuse_where_possible(model)
        if builder.layout.fused:
            report.notes.append(
                f"fuse: nothing to do, a {builder.layout.model_type} model has q/k/v and gate/up "
                "as one linear each"
            )
    model.nibblock_report = builder.report
    return model


def load_gguf_dense(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The same model with every weight dequantised to `dtype`: what `load_gguf` is compared with.

    Args, Raises: as of `load_gguf`.
    Returns:
        a plain transformers model in eval mode; a tied head stays tied.
    """
    return _load(path, dtype, quantised=False, compute="bf16", requantize=False)[0]


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer stored in a GGUF file, as a transformers tokenizer.

    Args:
        path: a GGUF file.
    Returns:
        a PreTrainedTokenizerFast.
    Raises:
        FileNotFoundError, ValueError: as of `load_gguf`.
        ImportError: transformers or gguf is not installed.
    """
    from nibblock.integrations.transformers import require_transformers

    file = GGUFFile(path)
    if "tokenizer.ggml.tokens" not in file.metadata:
        raise file.fail("hold a tokenizer (tokenizer.ggml.tokens)", "none")
    transformers = require_transformers("load_gguf", "gguf")
    folder, name = os.path.split(os.path.abspath(file.path))
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)


def _load(
    path: str | os.PathLike[str],
    dtype: torch.dtype,
    *,
    quantised: bool,
    compute: str,
    requantize: bool,
) -> tuple[PreTrainedModel, _Builder]:
    if dtype not in _DTYPES:
        raise TypeError(f"load_gguf: dtype must be float32, bfloat16 or float16, got {dtype}")
    if compute not in ("bf16", "int8"):
        raise ValueError(f'load_gguf: compute must be "bf16" or "int8", got {compute!r}')
    file = GGUFFile(path)
    layout = plan(file)  # every name and shape is checked before anything is allocated
    builder = _Builder(file, layout, dtype, quantised, compute, requantize)
    return builder.build(), builder


@dataclass
class ImportReport(Report):
    """What became of each linear and embedding; "before" is its size in float32.

    Attributes:
        notes: what else a reader should know, one sentence each.
    """

    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *self.notes])


class _Builder:
    """Fills a model built on the meta device, one tensor at a time."""

    def __init__(
        self,
        file: GGUFFile,
        layout: ModelPlan,
        dtype: torch.dtype,
        quantised: bool,
        compute: str,
        requantize: bool,
    ) -> None:
        self.file, self.layout, self.dtype, self.compute = file, layout, dtype, compute
        self.reader = TensorReader(file, dtype, quantised, requantize)
        self.report = ImportReport()

    def build(self) -> PreTrainedModel:
        from nibblock._tied_keys import rename_tied_keys
        from nibblock.integrations.transformers import build_empty

        factors = self._rope_factors()
        kind = self.layout.model_type
        try:
            model = build_empty(kind, self.layout.config, self.dtype, factors)
        except ValueError as error:
            raise self.file.fail(f"describe a {kind} model", error) from error
        biases = {s.module: s for s in self.layout.slots if s.kind == "bias"}
        for slot in self.layout.slots:
            if slot.kind == "parameter":
                module = model.get_submodule(slot.module)
                # (A router's gate for the shared expert is a vector here and a row there.)
                value = self.reader.dense(slot).reshape(getattr(module, slot.leaf).shape)
                setattr(module, slot.leaf, nn.Parameter(value))
            elif slot.kind == "linear":
                bias = biases.get(slot.module)
                self._put_linear(model, slot, None if bias is None else self.reader.dense(bias))
            elif slot.kind == "embedding":
                self._put_embedding(model, slot)
        for experts in self.layout.experts:
            self.report.rows.append(put_experts(model, experts, self.reader, self.compute))
        rename_tied_keys(model)
        model.eval()
        sizes = [info.rows * info.columns for info in self.file.tensors.values()]
        self.report.model_bytes_before = 4 * sum(sizes)
        self.report.model_bytes_after = _bytes(model)
        return model

    def _rope_factors(self) -> np.ndarray | None:
        """Puts the file's divisors of the rotary frequencies into the configuration.

        A converted model has nothing else to know them from. Returns those that the model must
        still divide by, because the configuration's formula only comes close to them.
        """
        names = self.layout.rope_factors
        if not names:
            return None
        for name in names:
            factors = self.reader.float32(name)
            if not np.isfinite(factors).all() or (factors <= 0).any():
                raise self.file.fail(f"hold positive numbers in tensor {name}", "others")
        rope = self.layout.config["rope_parameters"]
        if len(names) == 2:
            for key, name in zip(("short_factor", "long_factor"), names):
                rope[key] = [float(value) for value in self.reader.float32(name)]
            return None
        if rope["rope_type"] != "default":
            raise self.file.fail(
                f"hold either tensor {name} or rope scaling {rope['rope_type']}", "both"
            )
        if (factors == 1).all():
            return None
        theta, context = rope["rope_theta"], self.layout.config["max_position_embeddings"]
        known = llama3_scaling(factors, theta, context)
        if known is not None:
            self.layout.config["rope_parameters"] = known
            return factors
        self.layout.config["rope_parameters"] = longrope_scaling(factors, theta, context)
        self.report.notes.append(
            f"rotary frequencies divided by {name}: the configuration's rope_type longrope"
        )
        return None

    def _put_linear(self, model: PreTrainedModel, slot: Slot, bias: torch.Tensor | None) -> None:
        info = self.file.tensors[slot.tensor]
        if bias is None and model.get_submodule(slot.module).bias is not None:
            # The configuration has one switch for several linears. One that lacks a bias here gets
            # zeros, so that a model made from the configuration takes this one's tensors.
            bias = torch.zeros(info.shape[0], dtype=self.dtype)
        codes = self.reader.slot_codes(slot)
        if codes is None:
            module = nn.Linear(info.columns, info.shape[0], bias=False, device="meta")
            module.weight = nn.Parameter(self.reader.dense(slot))
            module.bias = None if bias is None else nn.Parameter(bias)
        else:
            from nibblock.nn import Int4Linear

            module = Int4Linear.from_codes(
                *as_tensors(codes),
                bias,
                in_features=info.columns,
                group_size=codes.group,
                bits=codes.bits,
                compute=self.compute,
            ).to(self.dtype)
        model.set_submodule(slot.module, module)
        self._record(slot, module, codes)

    def _put_embedding(self, model: PreTrainedModel, slot: Slot) -> None:
        info = self.file.tensors[slot.tensor]
        codes = self.reader.slot_codes(slot)
        old = model.get_submodule(slot.module)
        if codes is None:
            old.weight = nn.Parameter(self.reader.dense(slot))
            self._record(slot, old, codes)
            if self.layout.tied:
                model.lm_head.weight = old.weight
                self._record_tied(slot)
            return
        from nibblock.nn import Int4Embedding

        embedding = Int4Embedding.from_codes(
            *as_tensors(codes),
            embedding_dim=info.columns,
            group_size=codes.group,
            bits=codes.bits,
            padding_idx=old.padding_idx,
            dtype=self.dtype,
            multiplier=getattr(old, "scalar_embed_scale", None),  # Gemma's class has one
        )
        model.set_submodule(slot.module, embedding)
        self._record(slot, embedding, codes)
        if self.layout.tied:
            model.lm_head = embedding.linear(compute=self.compute)
            self._record_tied(slot)

    def _record(self, slot: Slot, module: nn.Module, codes: Codes | None) -> None:
        info = self.file.tensors[slot.tensor]
        if codes is None:
            reason = f"{info.type}: dense"
            if info.type not in FLOATS and self.reader.quantised:
                reason = f"{info.type} has no exact form here: dense; requantize=True stores 8 bits"
        elif info.type in EXACT_TYPES:
            reason = f"{info.type}: exact"
        else:
            reason = f"{info.type}: requantized to 8 bits, rounded"
        self.report.rows.append(
            LayerReport(
                name=slot.module,
                action="kept" if codes is None else f"int{codes.bits}",
                reason=reason,
                kind=type(module).__name__,
                shape=(info.shape[0], info.shape[1]),
                bytes_before=4 * info.rows * info.columns,
                bytes_after=_bytes(module),
            )
        )

    def _record_tied(self, slot: Slot) -> None:
        reason = f"tied to {slot.module}: one storage"
        first = self.report.rows[-1]
        self.report.rows.append(
            replace(first, name="lm_head", reason=reason, bytes_before=0, bytes_after=0)
        )


def _bytes(module: nn.Module) -> int:
    return sum(
        p.numel() * p.element_size() for p in {id(p): p for p in module.parameters()}.values()
    )
