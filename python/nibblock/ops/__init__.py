"""One typed function per op: `nibblock.ops.int4_linear(...)` and its family."""

from nibblock.ops.int4_linear import (
    int4_dequantize,
    int4_embedding,
    int4_linear,
    int4_linear_dx,
    int4_pack,
    int4_quantize,
    int4_unpack,
    packed_bytes,
)

__all__ = [
    "int4_dequantize",
    "int4_embedding",
    "int4_linear",
    "int4_linear_dx",
    "int4_pack",
    "int4_quantize",
    "int4_unpack",
    "packed_bytes",
]
