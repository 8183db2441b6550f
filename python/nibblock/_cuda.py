"""The CUDA C++ kernels: whether this machine can run them, which there are, and forced calls.

libnibblock_cuda.so is built where the CUDA toolkit is (setup.py, NIBBLOCK_CUDA) and loaded at the
first question that needs it, never by `import nibblock`: asking for a device is left to whoever has
CUDA tensors. The ops on CUDA tensors take these kernels only where their row is proven, i.e. has
run on a GPU with its result file committed; until then they run when called by name here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch

from nibblock import _library
from nibblock._errors import BackendUnavailable

__all__ = [
    "block_weight_grad",
    "int4_linear",
    "masked_adamw_block_",
    "masked_sgd_block_",
    "refusal",
    "rows",
]

UNPROVEN = "not yet run on hardware"
_LIBRARY = Path(__file__).resolve().parent / "libnibblock_cuda.so"
# The library's function that names the rows of an op, and maybe of its neighbours.
_ROWS = {
    "int4_linear": "nibblock_cuda_int4_row",
    "masked_adamw_block": "nibblock_cuda_masked_row",
    "masked_sgd_block": "nibblock_cuda_masked_row",
    "block_weight_grad": "nibblock_cuda_weight_grad_row",
}

Tensors = Sequence[torch.Tensor]


@functools.cache
def refusal() -> Optional[str]:
    """Why the CUDA C++ kernels cannot run on this machine; None if they can, and then loads them.

    Initialises CUDA when everything but a device has been found.
    """
    if not _LIBRARY.exists():
        why = _library.build_info().get("cuda_left_out") or "built before it had CUDA sources"
        return f"libnibblock_cuda.so is not built ({why})"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    _library.load()
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"libnibblock_cuda.so cannot be loaded ({error})"
    _register_fakes()
    return None


def _register_fakes() -> None:
    from nibblock.ops import _checks

    @torch.library.register_fake("nibblock::_int4_linear_cuda")
    def fake(x, packed, bias, format, values, layout, block, kernel):
        arguments = _checks.decode_format(format)
        _checks.check_linear("int4_linear", x, packed, bias, *arguments)
        return x.new_empty((*x.shape[:-1], arguments[0]))

    @torch.library.register_fake("nibblock::_block_weight_grad_cuda")
    def fake_weight_grad(grad, x, layout, block, dtype, kernel):
        n, k = grad.shape[-1], x.shape[-1]
        count = (layout.numel() + -n // block + -k // block - 2) // 3
        return x.new_empty((count, block, block), dtype=dtype)

    for op in ("masked_adamw_block", "masked_sgd_block"):
        # They return nothing, whatever their arguments.
        torch.library.register_fake(f"nibblock::_{op}_cuda_")(lambda *arguments: None)


def rows(op: str = "int4_linear") -> list[dict]:
    """The CUDA C++ rows of an op for `nb.info`, in the order a call tries them.

    Args:
        op: "int4_linear", "masked_adamw_block", "masked_sgd_block", "block_weight_grad"; any other
            has none.
    Returns:
        id, isa ("cuda"), serves, state ("" or "not yet run on hardware"), available, reason. Empty
        where the library cannot be loaded; `refusal` says why.
    """
    if op not in _ROWS or refusal():
        return []
    ask = getattr(ctypes.CDLL(str(_LIBRARY)), _ROWS[op])
    ask.restype = ctypes.c_bool
    name, serves, proven = ctypes.c_char_p(), ctypes.c_char_p(), ctypes.c_int()
    found = []
    capability = torch.cuda.get_device_capability()
    while ask(len(found), ctypes.byref(name), ctypes.byref(serves), ctypes.byref(proven)):
        # Code for 9.0a runs on that one capability; everything else from 8.0 on.
        only = ".sm90a." in name.value.decode() and capability != (9, 0)
        reason = f"compute capability must be 9.0, got {'.'.join(map(str, capability))}"
        found.append(
            dict(id=name.value.decode(), isa="cuda", serves=serves.value.decode(),
                 state="" if proven.value else UNPROVEN, available=not only,
                 reason=reason if only else "")
        )  # fmt: skip
    return [row for row in found if row["id"].startswith(f"{op}.")]


def _want(op: str) -> None:
    reason = refusal()
    if reason:
        raise BackendUnavailable(f"{op}: no CUDA C++ kernel can run: {reason}")


def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: Optional[torch.Tensor],
    out_features: int,
    group_size: int,
    bits: int,
    affine: bool,
    scale_dtype: torch.dtype,
    values: Optional[torch.Tensor] = None,
    layout: Optional[torch.Tensor] = None,
    block: int = 32,
    kernel: str = "",
) -> torch.Tensor:
    """`nibblock.ops.int4_linear`'s forward on a CUDA C++ kernel, forced; with values also that of
    `int4_block_sparse_linear`, in the same launch.

    Formula: y[m, n] = sum_k x[m, k] * (scale[n, g(k)] * code[n, k] + offset[n, g(k)] + S[n, k])
        + bias[n].

    Args:
        x: [..., K] bfloat16 | float16 on a CUDA device, any strides, 1 to 128 rows; any number for
            the sm90a kernels, which need x and its rows at multiples of 16 bytes.
        packed: uint8 [bytes], the packed weight on the same device.
        bias: [N] float32 | bfloat16 | float16, or None.
        out_features: N. group_size: 32, 64, 128, 256 or -1. bits: 4 or 8. affine: offsets are
            stored. scale_dtype: float16 | float32. (Groups of 16, int8 scales and palettes are
            Triton's.)
        values: S's blocks [Z, block, block] float32 | bfloat16 | float16, rounded to x's dtype in
            the product; bits must be 4. layout: int32, from `block_layout`, on the device; its
            content is not looked at. block: 32, 64 or 128.
        kernel: a row's id, e.g. "int4_linear.cuda.sm80.m8"; "" is the first row that serves, the
            sm90a ones left out.
    Returns:
        [..., N], x's dtype and device.
    Raises:
        BackendUnavailable: the library is not built, torch has no CUDA, or there is no device.
        RuntimeError: an argument or device the kernels do not serve, in one line.
    Gradients: none; `ops.int4_linear` has them.
    Determinism: the same bits on every call on devices with the same number of multiprocessors; no
        atomics in sums.
    Numerics: exact codes and products, float32 sums within a group, one fused multiply-add for each
        scale. In an affine weight, an infinity in x may become NaN where exact arithmetic has an
        infinity, because offset and codes are summed apart.
    Source: csrc/int4_linear/cuda_decode.h, cuda_tile.h.
    """
    _want("int4_linear")
    from nibblock.ops import _checks

    code = _checks.format_code(out_features, group_size, bits, affine, scale_dtype, "bf16")
    return torch.ops.nibblock._int4_linear_cuda(
        x, packed, bias, code, values, layout, block, kernel
    )


def block_weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    layout: torch.Tensor,
    *,
    block: int,
    dtype: torch.dtype = torch.float32,
    kernel: str = "",
) -> torch.Tensor:
    """`nibblock.ops.block_weight_grad` on a CUDA C++ kernel, forced.

    Formula: dS[z][n, k] = sum_m grad[m, I_z B + n] * x[m, J_z B + k].

    Args:
        grad: [..., N] bfloat16 | float16 on a CUDA device, any strides.
        x: [..., K], dtype, device and leading dimensions of grad; any strides.
        layout: int32, from `block_layout`, on the device; its content is not looked at.
        block: B, one of 32, 64, 128.
        dtype: of the result: float32, or that of x.
        kernel: a row's id, e.g. "block_weight_grad.cuda.sm80.b32"; "" is the one that serves.
    Returns:
        [Z, B, B] dtype in the order of the block list; 0 outside [N, K].
    Raises:
        BackendUnavailable: the library is not built, torch has no CUDA, or there is no device.
        RuntimeError: an argument or device the kernels do not serve, in one line.
    Gradients: none; `ops.block_weight_grad` has them.
    Determinism: the same bits on every call and device: the split over tokens depends on shapes
        alone, and its parts are added in order; no atomics in sums.
    Numerics: exact products, sums in float32, rounded once to dtype.
    Source: csrc/block_sparse_linear/cuda_weight_grad.h.
    """
    _want("block_weight_grad")
    return torch.ops.nibblock._block_weight_grad_cuda(grad, x, layout, block, dtype, kernel)


def masked_adamw_block_(
    values: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    ages: Tensors,
    weights: Tensors,
    blocks: Tensors,
    *,
    block: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    multiplier: Optional[torch.Tensor] = None,
    found_inf: Optional[torch.Tensor] = None,
    kernel: str = "",
) -> None:
    """`nibblock.ops.masked_adamw_block_` on a CUDA C++ kernel, forced: the whole list in one
    launch, or one for every 44 tensors of a type.

    Formula and arguments: as the op's, all tensors on one CUDA device. Blocks and ages are not
    looked at by the host: blocks outside a weight move nothing, ages must be at least 0.

    Args:
        kernel: a row's id, "masked_adamw_block.cuda.sm80.list"; "" is the same.
    Raises:
        BackendUnavailable: the library is not built, torch has no CUDA, or there is no device.
        RuntimeError: an argument or device that the kernel does not serve, in one line; nothing
        has changed then.
    Gradients: none; the versions of everything that changed are bumped.
    Determinism: bitwise repeatable. No host synchronisation, no allocation where grads and blocks
        are contiguous; may be captured into a CUDA graph, which then holds the tensors' addresses.
    Numerics: the operations of the CPU's kernels in their order, denormals as zeros: the same bits
        but for a NaN's pattern, a result that rounding alone lifts out of the denormals, and
        coefficients where the device's float64 power rounds to another float32.
    Source: csrc/masked_update/cuda_block.h.
    """
    _want("masked_adamw_block_")
    if not values:
        return
    torch.ops.nibblock._masked_adamw_block_cuda_(
        values, grads, exp_avgs, exp_avg_sqs, ages, weights, blocks, block, lr, beta1, beta2, eps,
        weight_decay, maximize, multiplier, found_inf, kernel,
    )  # fmt: skip
    _mutated(values, exp_avgs, exp_avg_sqs, ages, weights)


def masked_sgd_block_(
    values: Tensors,
    grads: Tensors,
    momenta: Tensors,
    ages: Tensors,
    weights: Tensors,
    blocks: Tensors,
    *,
    block: int,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    multiplier: Optional[torch.Tensor] = None,
    found_inf: Optional[torch.Tensor] = None,
    kernel: str = "",
) -> None:
    """`nibblock.ops.masked_sgd_block_` on a CUDA C++ kernel, forced.

    Formula and arguments: as the op's; the rest as `masked_adamw_block_` here, whose numerics hold
    without the coefficients' exception: nothing is raised to a power.

    Args:
        kernel: a row's id, "masked_sgd_block.cuda.sm80.list"; "" is the same.
    """
    _want("masked_sgd_block_")
    if not values:
        return
    torch.ops.nibblock._masked_sgd_block_cuda_(
        values, grads, momenta, ages, weights, blocks, block, lr, momentum, dampening,
        weight_decay, nesterov, maximize, multiplier, found_inf, kernel,
    )  # fmt: skip
    _mutated(values, momenta, ages, weights)


def _mutated(*lists: Tensors) -> None:
    from nibblock.ops._masked_register import mutated

    mutated(*lists)
