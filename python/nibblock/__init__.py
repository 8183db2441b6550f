"""nibblock: int4 and block-sparse linear layers for PyTorch.

    import nibblock as nb
    report = nb.accelerate(model, nb.Int4Config())      # linears held in 4 bits, in place
    print(report)

Importing loads the CPU operators and nothing else: no GPU is touched, and Triton and transformers
are imported only by what needs them.
"""

from __future__ import annotations

import torch

from nibblock import nn, ops, optim, sparse
from nibblock._accelerate import accelerate
from nibblock._adapters import activate_adapter, add_adapters
from nibblock._config import AdapterConfig, BlockSparseConfig, Int4Config
from nibblock._errors import BackendUnavailable
from nibblock._files import load, save
from nibblock._info import info
from nibblock._select import explain
from nibblock._sparse_update import sparse_update, trainable_parameters, unmask
from nibblock._version import __version__
from nibblock._warmup import warmup
from nibblock.nn import (
    AdapterLinear,
    BlockSparseLinear,
    Int4Embedding,
    Int4Experts,
    Int4Linear,
    MaskedLinear,
)
from nibblock.sparse._impact import select_blocks
from nibblock.sparse._selection import Selection

__all__ = [
    "AdapterConfig",
    "AdapterLinear",
    "BackendUnavailable",
    "BlockSparseConfig",
    "BlockSparseLinear",
    "Int4Config",
    "Int4Embedding",
    "Int4Experts",
    "Int4Linear",
    "MaskedLinear",
    "Selection",
    "__version__",
    "accelerate",
    "activate_adapter",
    "add_adapters",
    "explain",
    "info",
    "load",
    "load_gguf",
    "load_quantized",
    "nn",
    "ops",
    "optim",
    "save",
    "select_blocks",
    "sparse",
    "sparse_update",
    "trainable_parameters",
    "unmask",
    "warmup",
]


def load_gguf(
    path: str, dtype: torch.dtype = torch.float32, fuse: bool = False, **options: object
) -> torch.nn.Module:
    """A transformers model from a GGUF file, its codes and scales carried over exactly.

    See `nibblock.formats.gguf.load_gguf`, which this calls, for every argument, return and error.
    """
    from nibblock.formats import gguf

    return gguf.load_gguf(path, dtype=dtype, fuse=fuse, **options)


def load_quantized(
    path: str, dtype: torch.dtype = torch.float32, fuse: bool = False, **options: object
) -> torch.nn.Module:
    """A transformers model from a GPTQ, AWQ, compressed-tensors, modelopt or MXFP4 folder, no loss.

    See `nibblock.formats.quantized.load_quantized`, which this calls, for every argument, return
    and error.
    """
    from nibblock.formats import quantized

    return quantized.load_quantized(path, dtype=dtype, fuse=fuse, **options)
