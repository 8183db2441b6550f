"""The operators' CUDA bodies: the checks of the CPU's glue, then a Triton kernel.

Registering costs nothing: Triton is imported when an operator first meets a CUDA tensor, and its
absence is a `BackendUnavailable`. What a GPU cannot do without stopping is left out: values inside
`layout` and `indices` are not looked at; a layout comes checked from `block_layout`, and an
embedding row out of range is NaN.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Optional

import torch

from nibblock import _library
from nibblock._errors import BackendUnavailable
from nibblock.triton_kernels import _table

_library.load()

from nibblock.ops import _block_checks, _block_register, _checks  # noqa: E402  (needs the schemas)

_bodies = torch.library.Library("nibblock", "IMPL", "CUDA")


@functools.cache
def missing() -> Optional[str]:
    """Why Triton kernels cannot run on any device of this machine; None if nothing is missing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; type: pip install nibblock[triton]"
    return None


@functools.cache
def refusal(device: int) -> Optional[str]:
    """Why Triton kernels cannot run on a CUDA device; None if they can."""
    if missing():
        return missing()
    capability = torch.cuda.get_device_capability(device)
    if capability < _table.MIN_CAPABILITY:
        need = ".".join(map(str, _table.MIN_CAPABILITY))
        return f"compute capability must be {need} or higher, got {'.'.join(map(str, capability))}"
    return None


def choose(op: str, rows: int, dtype: torch.dtype, device: torch.device) -> dict:
    """Which row of the Triton table serves a call on a device, why each other does not.

    Returns:
        kernel: id or None; refused: [(id, reason)]; level: the device's compute capability.
    """
    reason = refusal(device.index or 0)
    if reason:
        return {"kernel": None, "refused": [(r.id, reason) for r in _table.TABLE[op]], "level": ""}
    taken = _table.select(op, rows, dtype)
    refused, later = [], False
    for row in _table.TABLE[op]:
        if row is taken:
            later = True
        elif later:
            refused.append((row.id, f"{taken.id} comes first"))
        else:
            refused.append((row.id, f"serves {row.serves_text}"))
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    note = f" ({taken.state})" if taken.state else ""
    return {"kernel": taken.id, "refused": refused, "level": f"sm {capability}{note}"}


def rows(op: str) -> list[dict]:
    """The Triton rows of an op for `nb.info`: id, isa, serves, state, available, reason."""
    reason = missing() or ("" if torch.cuda.is_available() else "no CUDA device")
    if not reason:
        reason = refusal(0) or ""
    return [
        dict(id=row.id, isa="triton", serves=row.serves_text, state=row.state,
             available=not reason, reason=reason)
        for row in _table.TABLE[op]
    ]  # fmt: skip


def kernels(op: str, stem: str, tensor: torch.Tensor) -> ModuleType:
    reason = refusal(tensor.device.index) if tensor.is_cuda else missing()
    if reason:
        raise BackendUnavailable(f"{op}: no kernel for {tensor.device}: {reason}")
    return importlib.import_module(f"nibblock.triton_kernels.{stem}")


OPS = tuple(_table.TABLE)


def _check_compute(op: str, compute: str) -> None:
    if compute == "int8":
        raise BackendUnavailable(
            f'{op}: compute must be "bf16" on a GPU, got "int8": no kernel quantises activations '
            f'there; set compute="bf16"'
        )


def int4_linear(x, packed, bias, out_features, group_size, bits, affine, scale_dtype, compute):
    op = "int4_linear"
    _checks.check_linear(
        op, x, packed, bias, out_features, group_size, bits, affine, scale_dtype, compute
    )
    _check_compute(op, compute)
    module = kernels(op, "int4_linear", x)
    form = module.Format.of(
        packed, out_features, x.shape[-1], group_size, bits, affine, scale_dtype
    )
    return module.linear(x, packed, _contiguous(bias), form)


def _int4_linear_forward(x, packed, bias, format):
    return int4_linear(x, packed, bias, *_checks.decode_format(format))


def int4_linear_dx(grad, packed, in_features, group_size, bits, affine, scale_dtype, compute):
    op = "int4_linear_dx"
    _checks.check_linear_dx(
        op, grad, packed, in_features, group_size, bits, affine, scale_dtype, compute
    )
    module = kernels(op, "int4_linear", grad)
    form = module.Format.of(
        packed, grad.shape[-1], in_features, group_size, bits, affine, scale_dtype
    )
    return module.linear(grad, packed, None, form, dx=True)


def int4_dequantize(
    packed, out_features, in_features, group_size, bits, affine, scale_dtype, dtype
):
    op = "int4_dequantize"
    _checks.check_dequantize(
        op, packed, out_features, in_features, group_size, bits, affine, scale_dtype, dtype
    )
    module = kernels(op, "int4_linear", packed)
    form = module.Format.of(
        packed, out_features, in_features, group_size, bits, affine, scale_dtype
    )
    return module.dequantize(packed, form, dtype)


def int4_embedding(
    indices, packed, num_embeddings, embedding_dim, group_size, bits, affine, scale_dtype, dtype
):
    op = "int4_embedding"
    _checks.check_embedding(
        op, indices, packed, num_embeddings, embedding_dim, group_size, bits, affine, scale_dtype,
        dtype,
    )  # fmt: skip
    module = kernels(op, "int4_linear", packed)
    form = module.Format.of(
        packed, num_embeddings, embedding_dim, group_size, bits, affine, scale_dtype
    )
    out = module.dequantize(packed, form, dtype, indices.reshape(-1).contiguous())
    return out.view(*indices.shape, embedding_dim)


def block_sparse_linear(x, values, layout, bias, y0, out_features, block):
    op = "block_sparse_linear"
    _block_checks.check_linear(op, x, values, layout, bias, y0, out_features, block)
    module = kernels(op, "block_sparse_linear", x)
    sizes = (out_features, x.shape[-1], block)
    return module.linear(x, values, layout.contiguous(), _contiguous(bias), y0, *sizes)


def block_sparse_linear_dx(grad, values, layout, in_features, block):
    op = "block_sparse_linear_dx"
    _block_checks.check_linear_dx(op, grad, values, layout, in_features, block)
    module = kernels(op, "block_sparse_linear", grad)
    sizes = (grad.shape[-1], in_features, block)
    return module.linear(grad, values, layout.contiguous(), None, None, *sizes, dx=True)


def block_weight_grad(grad, x, layout, block, dtype):
    op = "block_weight_grad"
    _block_checks.check_weight_grad(op, grad, x, layout, block, dtype)
    module = kernels(op, "block_sparse_linear", x)
    return module.block_weight_grad(grad, x, layout.contiguous(), block, dtype)


def int4_block_sparse_linear(
    x, packed, bias, out_features, group_size, bits, affine, scale_dtype, compute, values, layout,
    block, lora_a, lora_c,
):  # fmt: skip
    op = "int4_block_sparse_linear"
    own = (out_features, group_size, bits, affine, scale_dtype)
    rest = (values, layout, block, lora_a, lora_c)
    _block_register.check_fused(op, x, packed, bias, *own, compute, *rest)
    _check_compute(op, compute)
    module = kernels(op, "int4_linear", x)
    form = module.Format.of(
        packed, out_features, x.shape[-1], group_size, bits, affine, scale_dtype
    )
    adapter = module.Adapter(values, layout.contiguous(), block, lora_a, lora_c)
    return module.linear(x, packed, _contiguous(bias), form, adapter)


def int4_block_sparse_linear_dx(
    grad, packed, in_features, group_size, bits, affine, scale_dtype, compute, values, layout,
    block, lora_a, lora_c,
):  # fmt: skip
    op = "int4_block_sparse_linear_dx"
    own = (in_features, group_size, bits, affine, scale_dtype, compute)
    rest = (values, layout, block, lora_a, lora_c)
    _block_register.check_fused_dx(op, grad, packed, *own, *rest)
    module = kernels(op, "int4_linear", grad)
    form = module.Format.of(
        packed, grad.shape[-1], in_features, group_size, bits, affine, scale_dtype
    )
    adapter = module.Adapter(values, layout.contiguous(), block, lora_a, lora_c)
    return module.linear(grad, packed, None, form, adapter, dx=True)


def _contiguous(tensor: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    return None if tensor is None else tensor.contiguous()


BODIES = {
    "int4_linear": int4_linear,
    "_int4_linear_forward": _int4_linear_forward,
    "int4_linear_dx": int4_linear_dx,
    "int4_dequantize": int4_dequantize,
    "int4_embedding": int4_embedding,
    "block_sparse_linear": block_sparse_linear,
    "_block_sparse_linear_forward": block_sparse_linear,
    "block_sparse_linear_dx": block_sparse_linear_dx,
    "block_weight_grad": block_weight_grad,
    "int4_block_sparse_linear": int4_block_sparse_linear,
    "_int4_block_sparse_linear_forward": int4_block_sparse_linear,
    "int4_block_sparse_linear_dx": int4_block_sparse_linear_dx,
}

for _name, _body in BODIES.items():
    _bodies.impl(_name, _body)
