"""One typed function per op: `nibblock.ops.int4_linear(...)` and its family."""

from nibblock.ops import _triton, _triton_masked  # noqa: F401  (CUDA bodies; no Triton yet)
from nibblock.ops.block_gain import block_gain, block_gain_
from nibblock.ops.block_scores import block_scores, block_scores_
from nibblock.ops.block_sparse_linear import (
    block_layout,
    block_sparse_linear,
    block_sparse_linear_dx,
    sort_blocks,
)
from nibblock.ops.block_weight_grad import block_weight_grad
from nibblock.ops.int4_block_sparse_linear import (
    int4_block_sparse_linear,
    int4_block_sparse_linear_dx,
)
from nibblock.ops.int4_linear import (
    int4_dequantize,
    int4_embedding,
    int4_linear,
    int4_linear_dx,
    int4_pack,
    int4_unpack,
    packed_bytes,
)
from nibblock.ops.int4_quantize import int4_quantize
from nibblock.ops.masked_gradient import (
    grad_norm,
    masked_grad_block_,
    masked_grad_bool_,
    prox_blocks_,
)
from nibblock.ops.masked_update import (
    mask_offsets,
    masked_adamw_block_,
    masked_adamw_bool_,
    masked_adamw_flat_,
    masked_sgd_block_,
    masked_sgd_bool_,
    masked_sgd_flat_,
)
from nibblock.ops.muon_direction import muon_direction

__all__ = [
    "block_gain",
    "block_gain_",
    "block_layout",
    "block_scores",
    "block_scores_",
    "block_sparse_linear",
    "block_sparse_linear_dx",
    "block_weight_grad",
    "grad_norm",
    "int4_block_sparse_linear",
    "int4_block_sparse_linear_dx",
    "int4_dequantize",
    "int4_embedding",
    "int4_linear",
    "int4_linear_dx",
    "int4_pack",
    "int4_quantize",
    "int4_unpack",
    "mask_offsets",
    "masked_adamw_block_",
    "masked_adamw_bool_",
    "masked_adamw_flat_",
    "masked_grad_block_",
    "masked_grad_bool_",
    "masked_sgd_block_",
    "masked_sgd_bool_",
    "masked_sgd_flat_",
    "muon_direction",
    "packed_bytes",
    "prox_blocks_",
    "sort_blocks",
]
