"""How the tests reach a kernel: rows of the tables, levels of the CPU, NumPy and torch storage."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from nibblock import _native as native
from reference import (
    Weight,
    bf16_bits_to_f32,
    check_linear,
    dx_roundings,
    f32_to_bf16_bits,
    pack,
    stretch_rounding,
)
from torch import nn

LEVELS = ("scalar", "avx2", "avx512", "avx512_vnni", "amx")
X_DTYPES = ("float32", "bfloat16", "float16")
GROUPS = {4: (32, 64, 128, 256, -1), 8: (16, 32, 64, 128, 256, -1)}  # by bits
FORMS = [(group, bits) for bits, groups in GROUPS.items() for group in groups]
FORMATS = [
    (*form, affine, scale_dtype)
    for form, affine, scale_dtype in itertools.product(FORMS, (False, True), ("float16", "float32"))
]
TABLES = ("forward", "dx")
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rows(which: str) -> list[dict]:
    return native.int4_linear_kernels(which)


def refusal(which, kernel_id, m, weight, x_dtype, compute) -> str | None:
    """Why a row cannot serve a call even when it is forced; None when it can."""
    chosen = native.int4_linear_select(
        which, m=m, x_dtype=x_dtype, compute=compute, **weight.format
    )
    reason = dict(chosen["refused"]).get(kernel_id)
    # A row behind the chosen one serves the call too: it is only not the first to do so.
    return None if reason and reason.startswith("comes after") else reason


def run(which, kernel_id, x, weight, packed, bias=None, compute="bf16", x_dtype=None, **more):
    """One row of a table (None: the one that is selected) on NumPy storage."""
    return native.int4_linear_run(
        which, kernel_id, x, packed, bias, compute=compute, x_dtype=x_dtype, **weight.format, **more
    )


def row_param(row: dict, *before: str):
    """A row of a table as a pytest parameter (..., kernel id); one this CPU cannot run is skipped,
    saying why."""
    marks = []
    if not row["available"]:
        marks = [pytest.mark.skip(reason=f"{row['id']}: {row['reason']}")]
    return pytest.param(*before, row["id"], marks=marks, id=row["id"])


def row_params(*tables: str) -> list:
    """pytest parameters (table, kernel id)."""
    return [row_param(row, which) for which in tables or TABLES for row in rows(which)]


def level_params() -> list:
    """pytest parameters: every level, those above this CPU skipped with the missing level named."""
    top = LEVELS.index(native.cpu_isa_max())
    return [
        pytest.param(
            level,
            marks=[]
            if i <= top
            else [pytest.mark.skip(reason=f"this CPU has no {level}: its level is {LEVELS[top]}")],
        )
        for i, level in enumerate(LEVELS)
    ]


@contextmanager
def isa(level: str) -> Iterator[None]:
    before = native.cpu_isa()
    native.set_cpu_isa(level)
    try:
        yield
    finally:
        native.set_cpu_isa(before)


def own_dtype(kernel_id: str, otherwise: str = "float32") -> str:
    """A dtype of x that the row takes: bfloat16 where its tiles are, else `otherwise`."""
    tiles = ".amx." in kernel_id and not kernel_id.endswith(".int8_tile")
    return "bfloat16" if tiles else otherwise


def operand_of(x_dtype: str) -> str:
    """What a CPU kernel may round the factors of a product to: bfloat16 x alone meets its tiles."""
    return "bfloat16" if x_dtype == "bfloat16" else "float32"


def loss_of_single_weights(which: str, kernel_id: str, weight: Weight) -> np.ndarray:
    """How far integer kernels that round scales may be from a weight that a one-hot row asks for,
    [N, K]; 0 for all others."""
    if which == "forward" and kernel_id.endswith(".avx2.int8"):
        return stretch_rounding(weight)
    if which == "forward" or ".int" not in kernel_id:
        return np.zeros((weight.out_features, weight.in_features))
    compute = "int8" if kernel_id.endswith("int8") else "bf16"
    return dx_roundings(np.eye(weight.out_features), weight, compute)[0]


def store(x: np.ndarray, dtype: str) -> np.ndarray:
    """x in the storage the native functions take: float32, float16, or bfloat16 as uint16."""
    with np.errstate(over="ignore"):
        if dtype == "bfloat16":
            return f32_to_bf16_bits(x).reshape(np.shape(x))
        return np.ascontiguousarray(x, dtype)


def load(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 from that storage."""
    if dtype == "bfloat16":
        return bf16_bits_to_f32(x).reshape(x.shape)
    return x.astype(np.float32)


def as_torch(x: np.ndarray, dtype: str) -> torch.Tensor:
    """A torch tensor of dtype that holds the stored values."""
    if dtype == "bfloat16":
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def as_numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().resolve_neg().to(torch.float32).numpy()


def aligned(blob: np.ndarray) -> np.ndarray:
    """A copy whose data starts at a multiple of 64 bytes, as the native functions ask of a blob."""
    room = np.empty(blob.size + 63, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + blob.size] = blob
    return room[start : start + blob.size]


def packed_of(weight: Weight) -> np.ndarray:
    """The blob, by the second author."""
    return aligned(pack(weight))


def codes_of(weight: Weight) -> list:
    """qweight, scales and offsets (or None) as tensors: what `from_codes` takes first."""
    parts = (weight.qweight, weight.scales, weight.offsets)
    return [None if p is None else torch.from_numpy(p) for p in parts]


def op_arguments(weight: Weight, compute: str = "bf16") -> dict:
    """Keyword arguments of nb.ops.int4_linear."""
    return {
        "out_features": weight.out_features,
        "group_size": weight.group_size,
        "bits": weight.bits,
        "affine": weight.affine,
        "scale_dtype": getattr(torch, weight.scale_dtype),
        "compute": compute,
    }


def dx_arguments(weight: Weight, compute: str = "bf16") -> dict:
    """Keyword arguments of nb.ops.int4_linear_dx."""
    arguments = op_arguments(weight, compute)
    del arguments["out_features"]
    return {"in_features": weight.in_features, **arguments}


def torch_packed(weight: Weight) -> torch.Tensor:
    return torch.from_numpy(packed_of(weight))


def random_x(rng, shape, x_dtype):
    """A standard normal tensor."""
    return as_torch(store(rng.normal(0, 1, shape).astype(np.float32), x_dtype), x_dtype)


def check_op(y, x, weight, bias=None, *, compute="bf16", transposed=False, what=""):
    """Checks y = op(x) for tensors of any number of dimensions."""
    width = x.shape[-1]
    out = weight.in_features if transposed else weight.out_features
    x_dtype = {v: k for k, v in TORCH.items()}[x.dtype]
    assert y.dtype == x.dtype, what
    assert list(y.shape) == [*x.shape[:-1], out], what
    assert y.device == x.device
    if not x.numel() or not y.numel():
        return
    check_linear(
        as_numpy(y).reshape(-1, out),
        as_numpy(x).reshape(-1, width),
        weight,
        None if bias is None else as_numpy(bias),
        dtype=x_dtype,
        operand=operand_of(x_dtype),
        compute=compute,
        transposed=transposed,
        what=what,
    )


class Tied(nn.Module):
    """A head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(50, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, index):
        return self.head(self.emb(index))
