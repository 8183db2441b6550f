"""The CUDA C++ kernels: whether this machine can run them, which there are, and forced calls.

libnibblock_cuda.so is built where the CUDA toolkit is (setup.py, NIBBLOCK_CUDA) and loaded at the
first question that needs it, never by `import nibblock`: asking for a device is left to whoever has
CUDA tensors. `int4_linear` on CUDA tensors takes these kernels only where their row is proven, i.e.
has run on a GPU with its result file committed; until then they run when called by name here.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Optional

import torch

from nibblock import _library
from nibblock._errors import BackendUnavailable

__all__ = ["int4_linear", "refusal", "rows"]

UNPROVEN = "not yet run on hardware"
_LIBRARY = Path(__file__).resolve().parent / "libnibblock_cuda.so"


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
    _register_fake()
    return None


def _register_fake() -> None:
    from nibblock.ops import _checks

    @torch.library.register_fake("nibblock::_int4_linear_cuda")
    def fake(x, packed, bias, format, values, layout, block, kernel):
        arguments = _checks.decode_format(format)
        _checks.check_linear("int4_linear", x, packed, bias, *arguments)
        return x.new_empty((*x.shape[:-1], arguments[0]))


def rows() -> list[dict]:
    """The CUDA C++ rows of int4_linear for `nb.info`, in the order a call tries them.

    Returns:
        id, isa ("cuda"), serves, state ("" or "not yet run on hardware"), available, reason. Empty
        where the library cannot be loaded; `refusal` says why.
    """
    if refusal():
        return []
    ask = ctypes.CDLL(str(_LIBRARY)).nibblock_cuda_int4_row
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
    return found


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
            stored. scale_dtype: float16 | float32.
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
    reason = refusal()
    if reason:
        raise BackendUnavailable(f"int4_linear: no CUDA C++ kernel can run: {reason}")
    from nibblock.ops import _checks

    code = _checks.format_code(out_features, group_size, bits, affine, scale_dtype, "bf16")
    return torch.ops.nibblock._int4_linear_cuda(
        x, packed, bias, code, values, layout, block, kernel
    )
