"""Modules that stand wherever torch's dense ones stand."""

from nibblock.nn.adapter_linear import Adapter, AdapterLinear
from nibblock.nn.block_sparse_linear import BlockSparseLinear
from nibblock.nn.fused import fuse_linears, unfuse_linears
from nibblock.nn.int4_embedding import Int4Embedding
from nibblock.nn.int4_experts import Int4Experts
from nibblock.nn.int4_linear import Int4Linear
from nibblock.nn.masked_linear import MaskedLinear

__all__ = [
    "Adapter",
    "AdapterLinear",
    "BlockSparseLinear",
    "Int4Embedding",
    "Int4Experts",
    "Int4Linear",
    "MaskedLinear",
    "fuse_linears",
    "unfuse_linears",
]
