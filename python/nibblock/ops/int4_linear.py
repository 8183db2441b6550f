"""The int4 ops as typed functions: linear, its input gradient, dequantise, embedding, pack.

    w[n, k] = scale[n, g(k)] * code[n, k] + offset[n, g(k)]        g(k) = k // group_size

Letters, as in csrc/int4_linear/int4_linear.h: M rows of x, N out_features, K in_features, G
group_size. A symmetric weight stores no offsets: offset = -8 * scale (bits = 4) or -128 * scale
(bits = 8).
"""

from __future__ import annotations

from typing import Optional

import torch

from nibblock import _library
from nibblock.ops import _checks
from nibblock.ops._checks import packed_bytes

_library.load()

from nibblock import _native  # noqa: E402  (its shared library lies beside the one just loaded)
from nibblock.ops import (  # noqa: E402  (the first two register fakes and gradients)
    _decoder_register,  # noqa: F401
    _int4_register,  # noqa: F401
    _storage,
)

__all__ = [
    "int4_dequantize",
    "int4_embedding",
    "int4_linear",
    "int4_linear_dx",
    "int4_pack",
    "int4_unpack",
    "packed_bytes",
]

_linear = torch.ops.nibblock.int4_linear.default
_linear_dx = torch.ops.nibblock.int4_linear_dx.default
_dequantize = torch.ops.nibblock.int4_dequantize.default
_embedding = torch.ops.nibblock.int4_embedding.default


def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    *,
    out_features: int,
    group_size: int,
    bits: int = 4,
    affine: bool,
    scale_dtype: torch.dtype,
    compute: str = "bf16",
) -> torch.Tensor:
    """A linear layer whose weight is stored in 4 or 8 bits.

        y[m, n] = sum_k x[m, k] * (scale[n, g(k)] * code[n, k] + offset[n, g(k)]) + bias[n]

    Args:
        x: [..., K] float32 | bfloat16 | float16, any strides; any leading dimensions, none and
            empty ones included.
        packed: [packed_bytes(N, K, ...)] uint8, from `int4_pack`. It does not hold K, only its
            size is compared: another K that gives the same size (95 for 96) is taken for the first
            columns of the weight. `Int4Linear` knows its K and refuses.
        bias: [N] float32 | bfloat16 | float16, or None. Added in float32.
        out_features: N.
        group_size: G, one of 32, 64, 128, 256, or -1 for one group per row; with 8 bits or int8
            scales also 16.
        bits: 4 or 8.
        affine: whether packed holds offsets.
        scale_dtype: float32 | float16 | int8, of the scales and offsets inside packed; see
            `int4_pack`.
        compute: "bf16" (activations keep at least bfloat16's precision, codes are exact) or "int8"
            (activations quantised to int8 per row and block of min(G, 128)).
    Returns:
        [..., N], dtype and device of x, contiguous.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape, format or device that does not
            fit.
    Gradients: x and bias, of any order; that of x by `int4_linear_dx` with the same compute. packed
        is frozen.
    Determinism: bitwise repeatable at one ISA level, at any number of threads.
    Numerics: sums in float32; with compute="bf16" the error against float64 is at most 1.1 times
        that of a dense bfloat16 linear on the same dequantised weight. On a CPU, x keeps at
        least 16 bits per row and block of min(G, 128) and the weight is exact; but bfloat16 x on
        AMX units (5 rows and more) meets the weight rounded to bfloat16. With compute="int8" an
        activation is off by at most 1 / 254 of its block's largest; on AVX2, 4-bit groups of 32
        (5 rows and more) besides take the products of both scales as 15-bit parts of the largest
        of 128 columns.
    Autocast: x and bias are cast as `torch.nn.functional.linear` casts its arguments.
    Source: kernels in csrc/int4_linear/; the layout is drawn in csrc/int4_linear/int4_linear.h.
    Example:
        >>> q = nb.ops.int4_quantize(torch.randn(256, 512), group_size=64)
        >>> packed = nb.ops.int4_pack(*q, in_features=512, group_size=64)
        >>> y = nb.ops.int4_linear(torch.randn(3, 512), packed, out_features=256, group_size=64,
        ...                        affine=True, scale_dtype=torch.float32)
    """
    try:
        return _linear(
            x, packed, bias, out_features, group_size, bits, affine, scale_dtype, compute
        )
    except RuntimeError:
        _checks.check_linear(
            "int4_linear",
            x,
            packed,
            bias,
            out_features,
            group_size,
            bits,
            affine,
            scale_dtype,
            compute,
        )
        raise


def int4_linear_dx(
    grad: torch.Tensor,
    packed: torch.Tensor,
    *,
    in_features: int,
    group_size: int,
    bits: int = 4,
    affine: bool,
    scale_dtype: torch.dtype,
    compute: str = "bf16",
) -> torch.Tensor:
    """The input gradient of `int4_linear`: a product with the weight itself, not its transpose.

        dx[m, k] = sum_n grad[m, n] * (scale[n, g(k)] * code[n, k] + offset[n, g(k)])

    Args:
        grad: [..., N] float32 | bfloat16 | float16, any strides and leading dimensions.
        packed: [packed_bytes(N, K, ...)] uint8.
        in_features: K.
        group_size, bits, affine, scale_dtype: as in `int4_linear`.
        compute: "bf16", or "int8" to quantise grad times scale on the fly, which costs about 1 % of
            dx's norm (groups of 32 and more; on AVX2 with 4-bit codes alone; not on AMX units and
            GPUs).
    Returns:
        [..., K], dtype and device of grad, contiguous.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape, format or device that does not
            fit.
    Gradients: grad (it is `int4_linear` without a bias). packed is frozen.
    Determinism: bitwise repeatable at one ISA level, at any number of threads.
    Numerics: sums in float32; with compute="bf16" the error is far below a dense bfloat16 linear's.
        On a CPU with AVX2 or VNNI, two rows and more and groups of 32 and more are multiplied in
        integers: codes are exact; grad, scales and their products keep 16 bits (int8: scales and
        products 8) of the largest in a block of 128 n. Elsewhere the weight is dequantised to
        float32; where bfloat16 grad meets AMX units (5 rows and more), to bfloat16.
    Source: kernels in csrc/int4_linear/.
    """
    try:
        return _linear_dx(grad, packed, in_features, group_size, bits, affine, scale_dtype, compute)
    except RuntimeError:
        _checks.check_linear_dx(
            "int4_linear_dx",
            grad,
            packed,
            in_features,
            group_size,
            bits,
            affine,
            scale_dtype,
            compute,
        )
        raise


def int4_dequantize(
    packed: torch.Tensor,
    *,
    out_features: int,
    in_features: int,
    group_size: int,
    bits: int = 4,
    affine: bool,
    scale_dtype: torch.dtype,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The dense weight that a packed one stands for.

        w[n, k] = scale[n, g(k)] * code[n, k] + offset[n, g(k)], rounded once to `dtype`

    Args:
        packed: [packed_bytes(N, K, ...)] uint8.
        out_features, in_features: N, K.
        group_size, bits, affine, scale_dtype: as in `int4_linear`.
        dtype: float32 | bfloat16 | float16 of the result.
    Returns:
        [N, K] dtype, device of packed.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a size or format that does not fit
            packed.
    Gradients: none. Determinism: bitwise, everywhere.
    Numerics: computed in float32.
    Source: csrc/int4_linear/cpu_pack.cpp.
    """
    try:
        return _dequantize(
            packed, out_features, in_features, group_size, bits, affine, scale_dtype, dtype
        )
    except RuntimeError:
        _checks.check_dequantize(
            "int4_dequantize",
            packed,
            out_features,
            in_features,
            group_size,
            bits,
            affine,
            scale_dtype,
            dtype,
        )
        raise


def int4_embedding(
    indices: torch.Tensor,
    packed: torch.Tensor,
    *,
    num_embeddings: int,
    embedding_dim: int,
    group_size: int,
    bits: int = 8,
    affine: bool,
    scale_dtype: torch.dtype,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rows of a packed table, dequantised.

        y[..., k] = w[indices[...], k], rounded once to `dtype`

    Args:
        indices: [...] int64 | int32, each in [0, num_embeddings).
        packed: [packed_bytes(num_embeddings, embedding_dim, ...)] uint8.
        num_embeddings, embedding_dim: rows and columns of the table.
        group_size, bits, affine, scale_dtype: as in `int4_linear`.
        dtype: float32 | bfloat16 | float16 of the result.
    Returns:
        [..., embedding_dim] dtype, device of packed, contiguous.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a size or format that does not fit
        packed, or an index out of range.
    Gradients: none. Determinism: bitwise, everywhere.
    Numerics: computed in float32.
    Source: csrc/int4_linear/cpu_pack.cpp.
    """
    try:
        return _embedding(
            indices,
            packed,
            num_embeddings,
            embedding_dim,
            group_size,
            bits,
            affine,
            scale_dtype,
            dtype,
        )
    except RuntimeError:
        _checks.check_embedding(
            "int4_embedding",
            indices,
            packed,
            num_embeddings,
            embedding_dim,
            group_size,
            bits,
            affine,
            scale_dtype,
            dtype,
        )
        _checks.check_indices("int4_embedding", indices, num_embeddings)
        raise


def int4_pack(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: Optional[torch.Tensor] = None,
    *,
    in_features: int,
    group_size: int,
    bits: int = 4,
    scale_dtype: Optional[torch.dtype] = None,
    palette: bool = False,
) -> torch.Tensor:
    """Canonical codes, scales and offsets to the one packed layout all kernels read.

    Args:
        qweight: [N, ceil(K / 2)] uint8 for bits = 4, two codes a byte, low nibble = even k; [N, K]
            uint8 for bits = 8. Unit: code 0..15 or 0..255.
        scales: [N, ceil(K / G)] float32 | float16. Unit: weight per code step.
        offsets: [N, ceil(K / G)], dtype of scales, the weight of code 0; None for a symmetric
            weight.
        in_features: K.
        group_size: G, one of 32, 64, 128, 256, or -1 for one group per row; with 8 bits or int8
            scales also 16.
        bits: 4 or 8.
        scale_dtype: how scales and offsets are stored, the `scale_dtype` of every later call: their
            own dtype (None), or int8: float32 ones that are int8 multiples of one float16 in every
            256 columns, as in GGUF's K-quants, with group_size 16 or 32 and K a multiple of 256. A
            group then takes 8 bits and a half or one, in place of 32.
        palette: with bits = 8 and at most 16 different codes, as those of 4-bit floats and GGUF's
            IQ types: each takes 4 bits, its place in a table. Every op does what it does with the
            8-bit codes, bit for bit; the size of `packed` tells it.
    Returns:
        [packed_bytes(N, K, ..., palette=palette)] uint8, device of qweight.
    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes that do not fit each other, scales
        that int8 does not hold, or codes that a palette does not.
    Gradients: none. Determinism: bitwise. Numerics: nothing is rounded; `int4_unpack` gives it
        back.
    Source: layout in csrc/int4_linear/int4_linear.h.
    """
    op = "int4_pack"
    _checks.check_tensor(op, "qweight", qweight)
    _checks.check_tensor(op, "scales", scales)
    _checks.check_int(op, "in_features", in_features)
    stored = scales.dtype if scale_dtype is None else scale_dtype
    held = _storage.canonical_dtype(stored)
    _checks.check_format(op, group_size, bits, held if scale_dtype is None else stored)
    _checks.check_int8_scales(op, stored, group_size, in_features)
    q = _checks.as_numpy(op, "qweight", qweight, (torch.uint8,), 2)
    s = _checks.as_numpy(op, "scales", scales, (held,), 2)
    o = None if offsets is None else _checks.as_numpy(op, "offsets", offsets, (scales.dtype,), 2)
    rows = q.shape[0]
    groups = _checks.groups_of(in_features, group_size)
    columns = -(-in_features // 2) if bits == 4 else in_features
    for name, array, shape in (
        ("qweight", q, (rows, columns)),
        ("scales", s, (rows, groups)),
        ("offsets", o, (rows, groups)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{op}: {name} must be {list(shape)} for in_features {in_features}, group_size "
                f"{group_size}, bits {bits}, got {list(array.shape)}"
            )
    try:
        packed = _native.pack(
            q,
            s,
            o,
            in_features,
            group_size,
            bits,
            scale_dtype=_checks.dtype_name(stored),
            palette=palette,
            threads=torch.get_num_threads(),
        )
    except ValueError as error:  # what int8 or a palette do not hold: the same sentence
        raise ValueError(f"int4_{error}") from None
    return torch.from_numpy(packed).to(qweight.device)


def int4_unpack(
    packed: torch.Tensor,
    *,
    out_features: int,
    in_features: int,
    group_size: int,
    bits: int = 4,
    affine: bool,
    scale_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
    """The inverse of `int4_pack`, bit for bit.

    Args:
        packed: [packed_bytes(N, K, ...)] uint8.
        out_features, in_features: N, K.
        group_size, bits, affine, scale_dtype: as in `int4_linear`.
    Returns:
        (qweight, scales, offsets) as `int4_pack` takes them; offsets is None unless affine. Device
        of packed.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a size or format that does not fit
            packed.
    Gradients: none. Determinism: bitwise. Numerics: nothing is rounded.
    Source: layout in csrc/int4_linear/int4_linear.h.
    """
    op = "int4_unpack"
    _checks.check_format(op, group_size, bits, scale_dtype)
    _checks.check_packed(
        op, packed, out_features, in_features, group_size, bits, affine, scale_dtype
    )
    _checks.check_data(op, "packed", packed)
    q, s, o = _native.unpack(
        packed.detach().to("cpu").contiguous().numpy(),
        out_features,
        in_features,
        group_size,
        bits,
        affine,
        _checks.dtype_name(scale_dtype),
        threads=torch.get_num_threads(),
    )
    device = packed.device
    return (
        torch.from_numpy(q).to(device),
        torch.from_numpy(s).to(device),
        None if o is None else torch.from_numpy(o).to(device),
    )
