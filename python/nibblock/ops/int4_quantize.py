"""Quantisation as a typed function: a dense weight's codes, scales and offsets.

    w[n, k] ~ scale[n, g(k)] * code[n, k] + offset[n, g(k)]        g(k) = k // group_size

Letters as in int4_linear.py.
"""

from __future__ import annotations

from typing import Callable, Optional

import numpy as np
import torch

from nibblock import _library
from nibblock.ops import _checks

_library.load()

from nibblock import _native  # noqa: E402  (its shared library lies beside the one just loaded)
from nibblock.ops import _storage  # noqa: E402

__all__ = ["int4_quantize"]


def _check_range(op: str, scales: np.ndarray, offsets: Optional[np.ndarray], bits: int) -> None:
    """Refuses a group whose largest scale * code is beyond float32: it would come back infinite."""
    steps = 2 ** (bits - 1) if offsets is None else 2**bits - 1
    with np.errstate(over="ignore"):
        good = np.isfinite(scales * np.float32(steps))
    if offsets is not None:
        good &= np.isfinite(offsets)
    if not good.all():
        row, group = (int(i) for i in np.argwhere(~good)[0])
        raise ValueError(
            f"{op}: weight must span at most 3.4e38 (float32's largest number) in every group, got "
            f"more in row {row}, group {group}; scale the weight"
        )


def int4_quantize(
    weight: torch.Tensor,
    *,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    method: str = "rtn",
    importance: Optional[torch.Tensor] = None,
    scale_dtype: torch.dtype = torch.float32,
    progress: Optional[Callable[[int, int], None]] = None,
) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
    """Codes, scales and offsets that stand for a dense weight.

        rtn: scale and offset from each group's range, codes rounded to nearest
        mse: scale and offset that minimise sum_k importance[k] * (w[n, k] - dequantised[n, k])^2,
             searched over clipped ranges; never worse than rtn by that measure

    Args:
        weight: [N, K] float32 | bfloat16 | float16, finite.
        group_size: G, one of 32, 64, 128, 256, or -1 for one group per row; with 8 bits or int8
            scales also 16.
        bits: 4 or 8.
        symmetric: True for scales only, False for scales and offsets.
        method: "rtn" or "mse".
        importance: [K] float32, not negative, for example mean squares of the layer's input; or
            None.
        scale_dtype: float32 | float16 the scales and offsets are rounded to; or int8: to what
            `int4_pack` stores as that, with the codes nearest to the weight for these.
        progress: called as progress(rows done, rows), from this thread; or None.
    Returns:
        (qweight, scales, offsets) as `int4_pack` takes them, device of weight.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape or option that does not fit, or a
        weight that is not finite or spans more than float32 can say within a group.
    Gradients: none. Determinism: bitwise at any number of threads.
    Numerics: float32.
    Source: csrc/native/quantize.cpp.
    """
    op = "int4_quantize"
    _checks.check_format(op, group_size, bits, scale_dtype)
    _checks.check_float(op, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be 2-D, got {list(weight.shape)}")
    _checks.check_int8_scales(op, scale_dtype, group_size, weight.shape[1])
    if method not in ("rtn", "mse"):
        raise ValueError(f'{op}: method must be "rtn" or "mse", got {method!r}')
    _checks.check_data(op, "weight", weight)
    w = weight.detach().to("cpu", torch.float32).contiguous().numpy()
    if importance is not None:
        importance = _checks.as_numpy(op, "importance", importance, (torch.float32,), 1)
        if importance.shape[0] != w.shape[1]:
            raise ValueError(
                f"{op}: importance must be [{w.shape[1]}], got {list(importance.shape)}"
            )
    try:
        q, s, o = _native.quantize(
            w,
            group_size,
            bits,
            symmetric,
            method=method,
            importance=importance,
            threads=torch.get_num_threads(),
            progress=progress,
        )
    except (TypeError, ValueError) as error:
        if str(error).startswith("quantize: "):  # the same sentence under this op's name
            raise type(error)(f"int4_{error}") from None
        raise
    _check_range(op, s, o, bits)
    codes, scales = torch.from_numpy(q), torch.from_numpy(s)
    offsets = None if o is None else torch.from_numpy(o)
    if scale_dtype == torch.int8:
        scales = _storage.round_to_int8(scales, group_size)
        offsets = None if offsets is None else _storage.round_to_int8(offsets, group_size)
        codes = _storage.nearest_codes(torch.from_numpy(w), scales, offsets, group_size, bits)
    else:
        scales = scales.to(scale_dtype)
        offsets = None if offsets is None else offsets.to(scale_dtype)
    for name, tensor in (("scales", scales), ("offsets", offsets)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(
                f"{op}: {name} must be finite in {_checks.dtype_name(scale_dtype)}, got a value "
                f"beyond its range; use scale_dtype=torch.float32"
            )
    device = weight.device
    return (
        codes.to(device),
        scales.to(device),
        None if offsets is None else offsets.to(device),
    )
