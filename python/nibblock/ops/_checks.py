"""What every int4 op asks of its arguments, and the size of a packed weight.

One set of sentences serves three places: the fakes and the Python wrappers call the functions
below, the C++ glue repeats the same words for direct calls of `torch.ops.nibblock.*`. The good path
never comes through here; the wrappers diagnose after an op has refused.
"""

from __future__ import annotations

from numbers import Integral
from typing import Optional

import torch

GROUP_SIZES = {4: (32, 64, 128, 256, -1), 8: (16, 32, 64, 128, 256, -1)}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALE_DTYPES = (torch.float32, torch.float16, torch.int8)
INDEX_DTYPES = (torch.int64, torch.int32)

PANEL_ROWS = 16
RUN_K = 256  # columns that share the unit of int8 scales
_GRANULE_K = 64


def dtype_name(dtype: object) -> str:
    """`torch.float32` as "float32"; anything else as its repr."""
    text = str(dtype)
    return text[6:] if text.startswith("torch.") else repr(dtype)


def groups_text(bits: int) -> str:
    """What an error says the group size has to be."""
    return f"{', '.join(map(str, GROUP_SIZES[bits][:-1]))} or -1 (whole row)"


def groups_of(in_features: int, group_size: int) -> int:
    """Groups of a row, the last perhaps short; a row without elements has none."""
    if group_size < 0:
        return torch.sym_min(in_features, 1)
    return (in_features + group_size - 1) // group_size


def packed_bytes(
    out_features: int,
    in_features: int,
    group_size: int,
    bits: int,
    affine: bool,
    scale_dtype: torch.dtype,
    palette: bool = False,
) -> int:
    """Bytes of a packed weight: the twin of `int4_geometry` in csrc/int4_linear/int4_linear.h.

    Written without branches on the sizes, so that it also works on symbolic ones.
    `test_int4_linear` holds it against the C++ figure.
    """
    k_pad = (in_features + _GRANULE_K - 1) // _GRANULE_K * _GRANULE_K
    groups = groups_of(in_features, group_size)
    codes = k_pad * PANEL_ROWS * (4 if palette else bits) // 8
    units = in_features // RUN_K * PANEL_ROWS * 2 if scale_dtype == torch.int8 else 0
    section = (groups * PANEL_ROWS * scale_dtype.itemsize + units + 63) // 64 * 64
    lines = (codes + section * (2 if affine else 1)) // 64
    stride = (lines + 1 - lines % 2 + 2 * palette) * 64
    return (out_features + PANEL_ROWS - 1) // PANEL_ROWS * stride


def compact_scale_dtype(scales: torch.Tensor, offsets: Optional[torch.Tensor]) -> torch.dtype:
    """float16 if it costs next to nothing beside the rounding to codes, else float32.

    Every scale must be zero or a normal number in float16, so that it is off by at most 2^-11, and
    every offset must be off by at most an eighth of its group's code step, which adds at most 3 %
    to the error of the codes. Groups of small range far from zero need float32, and a constant
    group (scale 0) does unless float16 holds its value.
    """
    half = torch.finfo(torch.float16)
    size = scales.abs()
    fits = (size == 0) | ((size >= half.tiny) & (size <= half.max))
    if offsets is not None:
        fits &= (offsets.half().to(offsets.dtype) - offsets).abs() * 8 <= size
    return torch.float16 if bool(fits.all()) else torch.float32


def check_int(op: str, name: str, value: object) -> None:
    """Raises TypeError for what is no integer; symbolic ones and NumPy's are."""
    torch._check_type(
        isinstance(value, (Integral, torch.SymInt)),
        lambda: f"{op}: {name} must be int, got {type(value).__name__}",
    )


def check_format(
    op: str, group_size: int, bits: int, scale_dtype: torch.dtype, compute: str = "bf16"
) -> None:
    """Raises ValueError or TypeError for a weight format that does not exist."""
    check_int(op, "bits", bits)
    check_int(op, "group_size", group_size)
    torch._check_value(bits in (4, 8), lambda: f"{op}: bits must be 4 or 8, got {bits}")
    torch._check_value(
        group_size in GROUP_SIZES[bits] or (group_size == 16 and scale_dtype == torch.int8),
        lambda: f"{op}: group_size must be {groups_text(bits)}, got {group_size}",
    )
    torch._check_type(
        scale_dtype in SCALE_DTYPES,
        lambda: (
            f"{op}: scale_dtype must be float16, float32 or int8, got {dtype_name(scale_dtype)}"
        ),
    )
    torch._check_value(
        compute in ("bf16", "int8"),
        lambda: (
            f'{op}: compute must be "bf16" or "int8", got '
            + (f'"{compute}"' if isinstance(compute, str) else repr(compute))
        ),
    )


def has_int8_scales(group_size: int, in_features: int) -> bool:
    """Whether scales of this format may be int8 multiples of a float16 for 256 columns."""
    return group_size in (16, 32) and in_features % RUN_K == 0


def check_int8_scales(op: str, scale_dtype: torch.dtype, group_size: int, in_features: int) -> None:
    torch._check_value(
        scale_dtype != torch.int8 or has_int8_scales(group_size, in_features),
        lambda: (
            f"{op}: the weight must have group_size 16 or 32 and in_features a multiple of {RUN_K} "
            f"for int8 scales, got group_size={group_size}, in_features={in_features}"
        ),
    )


def check_tensor(op: str, name: str, value: object) -> None:
    torch._check_type(
        isinstance(value, torch.Tensor),
        lambda: f"{op}: {name} must be a Tensor, got {type(value).__name__}",
    )


def check_data(op: str, name: str, value: object) -> None:
    """Raises what is wrong with an argument whose numbers are read here and now."""
    check_tensor(op, name, value)
    torch._check_value(
        not value.is_meta,
        lambda: f"{op}: {name} must hold data, got a tensor on the meta device",
    )


def as_numpy(op: str, name: str, tensor: torch.Tensor, dtypes: tuple, ndim: int):
    """A CPU tensor's numbers of one of these dtypes and so many dimensions, contiguous."""
    check_data(op, name, tensor)
    if tensor.dtype not in dtypes:
        wanted = " or ".join(dtype_name(d) for d in dtypes)
        raise TypeError(f"{op}: {name} must be {wanted}, got {dtype_name(tensor.dtype)}")
    if tensor.dim() != ndim:
        raise ValueError(f"{op}: {name} must be {ndim}-D, got {list(tensor.shape)}")
    return tensor.detach().to("cpu").contiguous().numpy()


def check_float(op: str, name: str, tensor: torch.Tensor) -> None:
    check_tensor(op, name, tensor)
    torch._check_type(
        tensor.dtype in FLOATS,
        lambda: (
            f"{op}: {name} must be float32, bfloat16 or float16, got {dtype_name(tensor.dtype)}"
        ),
    )


def check_packed(
    op: str,
    packed: torch.Tensor,
    out_features: int,
    in_features: int,
    group_size: int,
    bits: int,
    affine: bool,
    scale_dtype: torch.dtype,
) -> None:
    check_tensor(op, "packed", packed)
    check_int(op, "out_features", out_features)
    check_int(op, "in_features", in_features)
    torch._check_value(
        out_features >= 0, lambda: f"{op}: out_features must be at least 0, got {out_features}"
    )
    torch._check_value(
        in_features >= 0, lambda: f"{op}: in_features must be at least 0, got {in_features}"
    )
    torch._check_type(
        packed.dtype == torch.uint8,
        lambda: f"{op}: packed must be uint8, got {dtype_name(packed.dtype)}",
    )
    check_int8_scales(op, scale_dtype, group_size, in_features)
    form = (out_features, in_features, group_size, bits, affine, scale_dtype)
    need = packed_bytes(*form)
    torch._check_value(
        packed.dim() == 1
        and (
            packed.shape[0] == need or (bits == 8 and packed.shape[0] == packed_bytes(*form, True))
        ),
        lambda: (
            f"{op}: packed must be a contiguous [{need}] for out_features={out_features}, "
            f"in_features={in_features}, group_size={group_size}, bits={bits}, affine={affine}, "
            f"got {list(packed.shape)}"
        ),
    )


def check_device(
    op: str, name: str, tensor: torch.Tensor, **others: Optional[torch.Tensor]
) -> None:
    for other_name, other in others.items():
        if other is not None:
            check_tensor(op, other_name, other)
        torch._check_value(
            other is None or other.device == tensor.device,
            lambda other_name=other_name, other=other: (
                f"{op}: {other_name} must be on {tensor.device}, where {name} is, "
                f"got {other.device}"
            ),
        )


_GROUP_CODES = {32: 0, 64: 1, 128: 2, 256: 3, -1: 4, 16: 5}


def format_code(
    out_features: int,
    group_size: int,
    bits: int,
    affine: bool,
    scale_dtype: torch.dtype,
    compute: str,
) -> int:
    """The `format` of `_int4_linear_forward`: the last six arguments of `int4_linear` in one int.

    bit 0: 8 bits; 1: affine; 2: float32 scales; 3: int8 compute; 4 to 6: group; 7: int8 scales; 8
    and up: out_features.
    """
    check_format("int4_linear", group_size, bits, scale_dtype, compute)
    flags = (bits == 8) + 2 * affine + 8 * (compute == "int8")
    flags += 4 * (scale_dtype == torch.float32) + 128 * (scale_dtype == torch.int8)
    return (out_features << 8) + (_GROUP_CODES[group_size] << 4) + flags


def decode_format(code: int) -> tuple[int, int, int, bool, torch.dtype, str]:
    """The inverse of `format_code`."""
    group_size = {v: k for k, v in _GROUP_CODES.items()}[(code >> 4) & 7]
    scale_dtype = torch.int8 if code & 128 else torch.float32 if code & 4 else torch.float16
    compute = "int8" if code & 8 else "bf16"
    return code >> 8, group_size, 8 if code & 1 else 4, bool(code & 2), scale_dtype, compute


def check_linear(
    op: str,
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: Optional[torch.Tensor],
    out_features: int,
    group_size: int,
    bits: int,
    affine: bool,
    scale_dtype: torch.dtype,
    compute: str,
) -> None:
    """All that `int4_linear` asks; in_features is x's last dimension."""
    check_float(op, "x", x)
    torch._check_value(
        x.dim() >= 1, lambda: f"{op}: x must have at least 1 dimension, got a scalar"
    )
    check_device(op, "x", x, packed=packed, bias=bias)
    check_format(op, group_size, bits, scale_dtype)
    check_packed(op, packed, out_features, x.shape[-1], group_size, bits, affine, scale_dtype)
    check_format(op, group_size, bits, scale_dtype, compute)
    if bias is not None:
        check_float(op, "bias", bias)
        torch._check_value(
            bias.dim() == 1 and bias.shape[0] == out_features,
            lambda: f"{op}: bias must be [{out_features}], got {list(bias.shape)}",
        )


def check_linear_dx(
    op: str,
    grad: torch.Tensor,
    packed: torch.Tensor,
    in_features: int,
    group_size: int,
    bits: int,
    affine: bool,
    scale_dtype: torch.dtype,
    compute: str,
) -> None:
    """All that `int4_linear_dx` asks; out_features is grad's last dimension."""
    check_float(op, "grad", grad)
    torch._check_value(
        grad.dim() >= 1, lambda: f"{op}: grad must have at least 1 dimension, got a scalar"
    )
    check_device(op, "grad", grad, packed=packed)
    check_format(op, group_size, bits, scale_dtype)
    check_packed(op, packed, grad.shape[-1], in_features, group_size, bits, affine, scale_dtype)
    check_format(op, group_size, bits, scale_dtype, compute)


def check_dequantize(
    op: str,
    packed: torch.Tensor,
    out_features: int,
    in_features: int,
    group_size: int,
    bits: int,
    affine: bool,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    torch._check_type(
        dtype in FLOATS,
        lambda: f"{op}: dtype must be float32, bfloat16 or float16, got {dtype_name(dtype)}",
    )
    check_format(op, group_size, bits, scale_dtype)
    check_packed(op, packed, out_features, in_features, group_size, bits, affine, scale_dtype)


def check_embedding(
    op: str,
    indices: torch.Tensor,
    packed: torch.Tensor,
    num_embeddings: int,
    embedding_dim: int,
    group_size: int,
    bits: int,
    affine: bool,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    torch._check_type(
        dtype in FLOATS,
        lambda: f"{op}: dtype must be float32, bfloat16 or float16, got {dtype_name(dtype)}",
    )
    check_tensor(op, "indices", indices)
    torch._check_type(
        indices.dtype in INDEX_DTYPES,
        lambda: f"{op}: indices must be int64 or int32, got {dtype_name(indices.dtype)}",
    )
    check_device(op, "indices", indices, packed=packed)
    check_format(op, group_size, bits, scale_dtype)
    check_packed(op, packed, num_embeddings, embedding_dim, group_size, bits, affine, scale_dtype)


def check_indices(op: str, indices: torch.Tensor, rows: int) -> None:
    """Raises ValueError naming the first index that is out of range; reads the data."""
    bad = indices[(indices < 0) | (indices >= rows)]
    if bad.numel():
        raise ValueError(f"{op}: indices must be in [0, {rows}), got {int(bad.flatten()[0])}")
