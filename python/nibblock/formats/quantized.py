"""Imports quantised transformers folders: a model whose linears are Int4Linear, without loss.

Experts that transformers holds fused are put together from the file's one linear an expert and
become Int4Experts: formats/_quantized_experts.py.

| quant_method       | what is read                                                               |
| gptq               | checkpoint_format gptq and gptq_v2; 4 and 8 bits; formats/gptq.py          |
| awq                | version gemm; 4 bits; formats/awq.py                                       |
| compressed-tensors | pack-quantized of 4 and 8 bits, strategies group and channel;              |
|                    | int-quantized and naive-quantized of integers, strategies group, channel   |
|                    | and tensor; all of them symmetric or not; mxfp4- and nvfp4-pack-quantized; |
|                    | mixed-precision of these; formats/compressed_tensors.py                    |
| modelopt           | quant_algo NVFP4 and W4A16_NVFP4; formats/modelopt.py                      |
| mxfp4              | experts of gpt-oss, as 8-bit codes; formats/mxfp4.py                       |

Groups of 32, 64, 128, 256 and whole rows are taken as they are, other multiples of 32 as the
largest of these that divides them, each scale as often as it takes; in 8 bits multiples of 16 and
groups of 16 too. Columns in activation order (gptq's desc_act, compressed-tensors' actorder
"group") are packed group by group and become an Int4Linear with a `column_order`. Other groups have
no exact form here and are refused. What the file holds unquantised stays dense, in `dtype`. Where
the file asks for quantised activations, or a quantised cache of keys and values, both stay as they
are: no weight depends on them, and the report says so.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nibblock._accelerate import _Layer, _unfit, model_bytes
from nibblock._report import LayerReport
from nibblock.formats._quantized_experts import Experts, Names
from nibblock.formats._quantized_folder import FLOATS, MODELOPT_FILE, Folder, Part, read_json
from nibblock.formats._quantized_layer import Layer, Reader, Scheme
from nibblock.formats.awq import AWQ
from nibblock.formats.compressed_tensors import CompressedTensors
from nibblock.formats.gguf import ImportReport
from nibblock.formats.gptq import GPTQ
from nibblock.formats.modelopt import ModelOpt
from nibblock.formats.mxfp4 import MXFP4
from nibblock.nn import Int4Experts, Int4Linear
from nibblock.nn._conv1d import is_conv1d, linear_shape
from nibblock.nn._expert_form import looks_like_experts, matrix_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READERS = {
    "gptq": GPTQ,
    "awq": AWQ,
    "compressed-tensors": CompressedTensors,
    "modelopt": ModelOpt,
    "mxfp4": MXFP4,
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = {torch.int64: ("I64",), torch.int32: ("I32",), torch.bool: ("BOOL",)}
_ORDERED = ", columns in activation order"
# Buffers that older files hold and transformers computes.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def load_quantized(
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    fuse: bool = False,
    compute: str = "bf16",
) -> PreTrainedModel:
    """Loads a quantised transformers folder as a model of Int4Linears, without loss.

        w[n, k] = scale[n, g(k)] * (code[n, k] - zero[n, g(k)]) = scale * code + offset

    Args:
        path: a local transformers folder: config.json with quantization_config (or, of modelopt,
            hf_quant_config.json), and model.safetensors or its shards. Any architecture that
            `AutoModelForCausalLM` builds, as long as what is quantised are its `nn.Linear`s, its
            `Conv1D`s (GPT-2), and its experts where transformers stacks them (Mixtral, Qwen-MoE,
            OLMoE, DeepSeek) or the file does (gpt-oss): these become `Int4Experts`.
        dtype: float32 | bfloat16 | float16, of the activations, norms, biases and dense weights.
        fuse: run q/k/v and gate/up as one product each (see `accelerate`, as for the shorter
            forwards that known decoder layers get in any case).
        compute: "bf16" | "int8", the arithmetic of the Int4Linear layers.
    Returns:
        the model in eval mode on the CPU. `model.nibblock_report` prints what became of each layer.
        Its configuration has no quantization_config. Tied heads stay tied, unless the file holds
        two weights for them.
    Raises:
        FileNotFoundError: no such folder, no config.json or no safetensors file in it.
        TypeError: dtype is none of the three.
        ValueError: experts of one projection with different bits or groups, or only some of them
            quantised; a method, format, number of bits or group size that has no exact form here;
            a truncated or corrupt file; a missing, unexpected or misshaped tensor, or one of
            another dtype; groups in activation order of other sizes than group_size; scales that
            are not finite, or lead out of float32. One line that names the file and the key or
            tensor; all but the last two before a layer is built.
        ImportError: transformers or safetensors is not installed.
    Gradients: as of `Int4Linear`: through the layers and to norms and biases, not to packed
    weights.
    Determinism: the same files give the same bytes.
    Numerics: codes are the file's; scales are, in float16 or float32; offset = -scale * zero is
        exact for float16 and bfloat16 scales, and so is every dequantised weight in float32. With
        float32 scales an offset may be rounded to float32; the report says so. Four-bit floats
        become symmetric codes of 8 bits, which hold them exactly. NVFP4's scales are products or
        quotients of two numbers: they are rounded to float32, as their writers' own arithmetic
        does, and the report says so. `dtype` rounds dense tensors only. Activations are not
        quantised unless `compute` asks for it. Peak memory is the result plus one layer.
    Source: the formats are described in their readers; tests/test_quantized_checkpoints.py packs
    them independently and compares with transformers. Example:
        >>> model = nb.load_quantized("Qwen2.5-0.5B-Instruct-GPTQ-Int4", fuse=True)
        >>> print(model.nibblock_report)
    """
    from nibblock.nn.fused import fuse_where_possible, shorten_forwards

    model = _load(path, dtype, compute, quantised=True)
    shorten_forwards(model)
    if fuse:
        report = model.nibblock_report
        report.fused, report.not_fused = fuse_where_possible(model)
    return model


def load_quantized_dense(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The same model with every weight dequantised to `dtype`: what `load_quantized` is compared
    with.

    Args, Raises: as of `load_quantized`.
    Returns:
        a plain transformers model in eval mode; a tied head stays tied.
    """
    return _load(path, dtype, "bf16", quantised=False)


def is_quantized(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder whose config.json has a quantization_config, of whatever kind, or
    whose hf_quant_config.json names a quant_algo.

    Raises:
        ValueError: one of the two is not JSON.
    """

    def held(name: str, key: str) -> Any:
        file = os.path.join(os.fspath(path), name)
        return read_json(file, "load_quantized").get(key) if os.path.isfile(file) else None

    if held("config.json", "quantization_config") is not None:
        return True
    value = held(MODELOPT_FILE, "quantization")
    return isinstance(value, dict) and value.get("quant_algo") is not None


def _load(
    path: str | os.PathLike[str], dtype: torch.dtype, compute: str, quantised: bool
) -> PreTrainedModel:
    if dtype not in _DTYPES:
        raise TypeError(f"load_quantized: dtype must be float32, bfloat16 or float16, got {dtype}")
    if compute not in ("bf16", "int8"):
        raise ValueError(f'load_quantized: compute must be "bf16" or "int8", got {compute!r}')
    folder = Folder(path)
    settings = folder.settings()
    method = settings.word(("quant_method",), tuple(READERS), "")
    return _Builder(folder, READERS[method](folder, settings), method, dtype, compute).build(
        quantised
    )


class _Builder:
    """Fills a model built on the meta device, one layer at a time."""

    def __init__(
        self, folder: Folder, reader: Reader, method: str, dtype: torch.dtype, compute: str
    ) -> None:
        self.folder, self.reader, self.method = folder, reader, method
        self.dtype, self.compute = dtype, compute
        self.report = ImportReport()
        self.linears: dict[str, Scheme] = {}  # what is quantised, by the model's name
        self.sources: dict[str, str] = {}  # of those, the file's name of each
        self.held: dict[str, str] = {}  # name of a dense tensor -> the file's name of it
        self.dense: list[str] = []  # names of tensors that are taken over as they are
        self.tied: dict[str, str] = {}  # name that a file need not hold -> the one that it shares

    def build(self, quantised: bool) -> PreTrainedModel:
        self.model = self._empty()
        with self.folder.kept_open():  # what is read before all fits is small
            self._plan()
            layers = {
                self.sources[name]: (scheme, linear_shape(self._linear(name))[0])
                for name, scheme in self.linears.items()
            }
            self.reader.prepare({**layers, **self.experts.layers()})
        # All names, shapes and dtypes fit; from here on memory is spent.
        before = 4 * sum(p.numel() for p in self.model.parameters())
        for name in self.dense:
            self._put_dense(name)
        for name in self.experts.dense:
            self._put(name, self.experts.read_dense(name, self.dtype))
        for name, scheme in self.linears.items():
            self._put_linear(name, scheme, quantised)
        for name in self.experts.quantised:
            self._put_experts(name, quantised)
        model = self.model
        for target, source in self.tied.items():
            path, _, leaf = source.rpartition(".")
            shared = model.get_submodule(path)._parameters[leaf]
            path, _, leaf = target.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = shared
        self._describe_rest()
        model.eval()
        self.report.model_bytes_before = before
        self.report.model_bytes_after = model_bytes(model)
        self.report.notes += self.reader.notes
        model.nibblock_report = self.report
        return model

    def _linear(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    # --- the architecture -------------------------------------------------------------------------

    def _empty(self) -> PreTrainedModel:
        from nibblock.integrations.transformers import empty_model, load_config

        try:
            config, generation = load_config(self.folder.path, self.folder.op)
            if hasattr(config, "quantization_config"):
                del config.quantization_config  # no longer true of what is built
            model = empty_model(config, self.dtype, self.folder.op)
        except ValueError as error:
            raise self.folder.fail("describe a causal language model", error, "config.json") from (
                error
            )
        if generation is not None:
            model.generation_config = generation
        return model

    # --- checking ---------------------------------------------------------------------------------

    def _plan(self) -> None:
        left = dict.fromkeys(self.folder.tensors)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        self.names = Names(self.model)
        self.experts = Experts(self.model, self.folder, self.reader)
        marker = self.reader.key("", self.reader.marker)
        for tensor in self.folder.tensors:
            if tensor.endswith(marker):
                for part in self._plan_quantised(tensor[: -len(marker)], modules):
                    left.pop(part, None)
        self._plan_dense(left)
        for part in self.experts.check():
            left.pop(part, None)
        if not self.linears and not self.experts.quantised:
            raise self.folder.fail(f"hold tensors named *{marker} ({self.method})", "none")
        self._plan_ties()
        for name, tensor in self._wanted():
            own = name if name in self.held else self.tied.get(name, name)
            dtypes = _INTEGERS.get(tensor.dtype, FLOATS)
            self.folder.check(self.held.get(own, own), Part.of(tuple(tensor.shape), *dtypes))
            left.pop(self.held.get(name, name), None)
            if name not in self.tied:
                self.dense.append(name)
        self._check_left(left)

    def _plan_quantised(self, source: str, modules: dict[str, nn.Module]) -> list[str]:
        """Finds the place of what the file holds quantised under this name; returns the names of
        its tensors, as far as they are known to fit.
        """
        name, place, reason = source, None, "none"
        if self.reader.fused:
            reason = self.experts.add_stacked(source)
        elif name not in modules:
            key, place = self.names.of(f"{source}.weight")
            name = key.removesuffix(".weight")
        if place is None and name in modules and not self.reader.fused:
            return self._plan_linear(name, source, modules[name])
        if place is not None:
            reason = self.experts.add(place, source, packed=True)
            if not reason:  # codes may be called as a dense weight is, which this one is not
                return [self.reader.key(source, self.reader.codes(source, "Linear"))]
        if reason and not self._ignored(self.reader.key(source, self.reader.marker)):
            raise self._no_place(source, reason)
        return []

    def _no_place(self, source: str, reason: str) -> ValueError:
        key = self.reader.key(source, self.reader.marker)
        need = f"hold {key} for {'experts' if self.reader.fused else 'an nn.Linear'} of the model"
        return self.folder.fail(need, reason, self.folder.tensors[key].file)

    def _plan_linear(self, name: str, source: str, module: nn.Module) -> list[str]:
        """Checks one quantised linear; returns the names of its tensors."""
        reason = type(module).__name__
        if isinstance(module, nn.Linear) or is_conv1d(module):
            parent = self.model.get_submodule(name.rpartition(".")[0])
            reason = _unfit(_Layer(name, module, [(parent, "")]), meta=True)
        if not reason and name in self.linears:
            reason = f"one that {self.sources[name]} is for"
        if reason:
            raise self._no_place(source, reason)
        kind, (rows, columns) = type(module).__name__, linear_shape(module)
        scheme = self.linears[name] = self.reader.scheme(source, kind)
        self.sources[name] = source
        parts = self.reader.parts(scheme, rows, columns)
        names = [f"{source}.{part}" for part in parts]
        for part, need in zip(names, parts.values()):
            self.folder.check(part, need)
        return names if module.bias is not None else names + self.reader.zero_bias(source, rows)

    def _plan_dense(self, left: dict[str, None]) -> None:
        """What the model calls the tensors that the file holds unquantised."""
        saved = self.model.state_dict()
        for key in left:
            name, place = self.names.of(key)
            if key in saved and self.names.converts(key):
                raise self.folder.fail(
                    f"hold tensor {key} as the model does",
                    "one that transformers converts on loading",
                    self.folder.tensors[key].file,
                )
            if key in saved:
                self.held[key] = key
            elif place is not None:
                self.experts.add(place, key.removesuffix(".weight"), packed=False)
            elif name in saved:
                self.held.setdefault(name, key)

    def _plan_ties(self) -> None:
        """Which of the tied tensors the file holds; two different weights are not tied."""
        held = self.held
        for target, source in dict(self.model.all_tied_weights_keys).items():
            head = target.rpartition(".")[0]
            if head in self.linears or (target in held and source in held):
                if head not in self.linears and self._equal(target, source):
                    self.tied[target] = source
                    continue
                self.model.all_tied_weights_keys.pop(target)
                for config in (self.model.config, self.model.config.get_text_config()):
                    config.tie_word_embeddings = False
                self.report.notes.append(
                    f"{target} is not tied to {source}: the file holds a weight for each"
                )
            elif target in held:
                self.tied[source] = target
            else:
                self.tied[target] = source

    def _equal(self, one: str, other: str) -> bool:
        one, other = self.held[one], self.held[other]
        first, second = (self.folder.tensors[name] for name in (one, other))
        if first.shape != second.shape:
            return False
        read = self.folder.read([one, other])
        return torch.equal(read[one].float(), read[other].float())

    def _wanted(self) -> list[tuple[str, torch.Tensor]]:
        """What the model needs besides quantised weights."""
        quantised = {f"{name}.weight" for name in self.linears}
        saved = self.model.state_dict()
        return [
            (name, tensor)
            for name, tensor in saved.items()
            if name not in quantised and not self.experts.holds(name)
        ]

    def _ignored(self, name: str) -> bool:
        """Whether a tensor of the file is none of the model's business."""
        ignored = self.model._keys_to_ignore_on_load_unexpected or ()
        patterns = [*ignored, *_COMPUTED, *self.reader.unused]
        return any(re.search(pattern, name) for pattern in patterns)

    def _check_left(self, left: dict[str, None]) -> None:
        for name in left:
            if not self._ignored(name):
                raise self.folder.fail(
                    "hold tensors that the model has",
                    f"{name}, which it has not",
                    self.folder.tensors[name].file,
                )

    # --- filling ----------------------------------------------------------------------------------

    def _put_dense(self, name: str) -> None:
        key = self.held[name]
        self._put(name, self.folder.read([key])[key])

    def _put(self, name: str, value: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = value.to(module._buffers[leaf].dtype)
        else:
            old = module._parameters[leaf]
            module._parameters[leaf] = nn.Parameter(value.to(old.dtype), old.requires_grad)

    def _put_linear(self, name: str, scheme: Scheme, quantised: bool) -> None:
        old = self._linear(name)
        rows, columns = linear_shape(old)
        layer = self.reader.read(self.sources[name], scheme, rows, columns)
        module: nn.Module = Int4Linear.from_codes(
            layer.qweight,
            layer.scales,
            layer.offsets,
            old.bias,
            in_features=columns,
            group_size=layer.group,
            bits=layer.bits,
            compute=self.compute,
            column_order=layer.columns,
        ).to(self.dtype)
        module._transposed = is_conv1d(old)
        if quantised:
            self.model.set_submodule(name, module)
        else:
            dense = module.dequantize(self.dtype)
            old.weight = nn.Parameter(dense.t().contiguous() if is_conv1d(old) else dense)
            module = old
        self._record(name, module, "kept" if not quantised else "", self._reason(scheme, layer))

    def _put_experts(self, name: str, quantised: bool) -> None:
        module, inexact = self.experts.read(name, self.compute)
        reason = f"{self.method}: {inexact or 'exact'}"
        if any(weight._order is not None for weight in module.projections.values()):
            reason += _ORDERED
        if quantised:
            self.model.set_submodule(name, module)
            self._record(name, module, "", reason)
            return
        for leaf in list(module.projections):  # one after the other: they are large
            self._put(f"{name}.{leaf}", module.get_submodule(leaf).dequantize(self.dtype))
        self._record(name, self.model.get_submodule(name), "kept", reason)

    # --- the report -------------------------------------------------------------------------------

    def _reason(self, scheme: Scheme, layer: Layer) -> str:
        text = f"{self.method}: exact"
        if layer.rounded:
            known = "codes" if layer.rounded == "scales" else "codes and scales"
            text = f"{self.method}: {known} exact, {layer.rounded} rounded to float32"
        if layer.group != scheme.group and layer.scales.shape[1] > 1:
            text += f", groups of {scheme.group} as {layer.group}"
        if layer.columns is not None:
            text += _ORDERED
        return text

    def _record(self, name: str, module: nn.Module, action: str, reason: str) -> None:
        if isinstance(module, nn.Embedding):
            shape: tuple[int, ...] = (module.num_embeddings, module.embedding_dim)
            numbers = math.prod(shape)
        elif isinstance(module, nn.Linear) or is_conv1d(module):
            shape = linear_shape(module)
            numbers = math.prod(shape)
        elif isinstance(module, Int4Experts):
            shapes = module._form.shapes.values()
            shape, numbers = max(shapes, key=math.prod), sum(math.prod(size) for size in shapes)
        else:
            shape, numbers = matrix_shape(module), sum(p.numel() for p in module.parameters())
        self.report.rows.append(
            LayerReport(
                name=name,
                action=action or f"int{module.bits}",
                reason=reason,
                kind=type(module).__name__,
                shape=shape,
                bytes_before=4 * numbers,
                bytes_after=sum(
                    t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())
                ),
            )
        )

    def _describe_rest(self) -> None:
        """Rows for what stayed dense, all in the model's order."""
        known = {row.name for row in self.report.rows}
        for name, module in self.model.named_modules():
            plain = isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module)
            if name in known or not (plain or looks_like_experts(module)):
                continue
            keys = ["weight"] if plain else [k for k, _ in module.named_parameters(recurse=False)]
            key = f"{name}.{keys[0]}"
            source = self.tied.get(key)
            single = self.experts.dense.get(key)
            of = self.held[source or key] if single is None else f"{single.each()[0][2]}.weight"
            dtype = self.folder.tensors[of].dtype
            self._record(name, module, "kept", f"{dtype} in the file: dense")
            if source is not None:
                row = self.report.rows[-1]
                text = f"tied to {source.rpartition('.')[0]}: one storage"
                self.report.rows[-1] = replace(row, reason=text, bytes_before=0, bytes_after=0)
        order = {name: at for at, (name, _) in enumerate(self.model.named_modules())}
        self.report.rows.sort(key=lambda row: order[row.name])
