"""The rows of the Triton backend: which kernel serves what. Importing this imports no Triton.

`nb.explain`, `nb.info`, the support table and the dispatch read the same rows, in order: the first
that serves a call runs it. `proven` says whether a kernel has run on a GPU, with its result file
committed under bench/results; until then its row says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch

FEW_ROWS = 64  # up to here an int4 weight's bytes are the cost, beyond it the products
MATMUL_ROWS = 1024  # from here on one dequantisation is small beside the product
MIN_CAPABILITY = (8, 0)

UNPROVEN = "not yet run on hardware"


@dataclass(frozen=True)
class Row:
    """One kernel: id, what it serves in words and as a test on (rows, dtype), and its state."""

    id: str
    serves_text: str
    serves: Callable[[int, torch.dtype], bool]
    proven: bool = False

    @property
    def kind(self) -> str:
        return self.id.rsplit(".", 1)[1]

    @property
    def state(self) -> str:
        return "" if self.proven else UNPROVEN


def _any(rows: int, dtype: torch.dtype) -> bool:
    return True


def _few(rows: int, dtype: torch.dtype) -> bool:
    return rows <= FEW_ROWS


def _many_bfloat16(rows: int, dtype: torch.dtype) -> bool:
    return rows >= MATMUL_ROWS and dtype == torch.bfloat16


def _int4(op: str, dequantize: bool) -> list[Row]:
    rows = [Row(f"{op}.cuda.triton.few", f"m <= {FEW_ROWS}", _few)]
    if dequantize:
        text = f"m >= {MATMUL_ROWS}, bfloat16"
        rows.append(Row(f"{op}.cuda.triton.dequantize", text, _many_bfloat16))
    return [*rows, Row(f"{op}.cuda.triton.tile", "any", _any)]


def _one(op: str, kind: str) -> list[Row]:
    return [Row(f"{op}.cuda.triton.{kind}", "any", _any)]


TABLE: dict[str, list[Row]] = {
    "int4_linear": _int4("int4_linear", True),
    "int4_linear_dx": _int4("int4_linear_dx", True),
    "int4_dequantize": _one("int4_dequantize", "tile"),
    "int4_embedding": _one("int4_embedding", "rows"),
    "block_sparse_linear": _one("block_sparse_linear", "tile"),
    "block_sparse_linear_dx": _one("block_sparse_linear_dx", "tile"),
    "block_weight_grad": _one("block_weight_grad", "blocks"),
    "int4_block_sparse_linear": _int4("int4_block_sparse_linear", False),
    "int4_block_sparse_linear_dx": _int4("int4_block_sparse_linear_dx", False),
    "block_scores": _one("block_scores", "tile"),
    "block_gain": _one("block_gain", "tile"),
    **{
        op: _one(op, "list")
        for op in (
            "masked_adamw_block", "masked_adamw_flat", "masked_adamw_bool", "masked_sgd_block",
            "masked_sgd_flat", "masked_sgd_bool", "masked_grad_bool", "masked_grad_block",
            "grad_norm", "prox_blocks",
        )
    },
}  # fmt: skip


def select(op: str, rows: int, dtype: torch.dtype) -> Row:
    """The row that serves a call of `op` with `rows` tokens of `dtype`."""
    return next(row for row in TABLE[op] if row.serves(rows, dtype))
