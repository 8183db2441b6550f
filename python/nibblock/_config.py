"""What `accelerate` is asked to do, checked when it is written down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Callable, Optional, Union

import torch

from nibblock.ops import _checks
from nibblock.ops._block_checks import VALUES, check_block
from nibblock.ops._checks import GROUP_SIZES, groups_text
from nibblock.sparse._choose import check_density

Where = Union[None, str, Iterable[str], Callable[[str, torch.nn.Module], bool]]


@dataclass(frozen=True)
class Int4Config:
    """How `nibblock.accelerate` stores the linears and experts of a model.

    Args:
        group_size: 32, 64, 128, 256, or -1 for one group per row; with 8 bits also 16. Weights of
            a row that share one scale.
        symmetric: True stores scales only (zero is exact); False stores a scale and an offset per
            group.
        bits: 4 or 8 bits a weight.
        compute: "bf16" keeps at least bfloat16's precision of the activations; "int8" quantises
            them per row and group (faster on CPUs with int8 units, less exact), and gradients on
            their way through.
        method: "rtn" rounds to nearest; "mse" searches scales of least squared error per group
            (slower to convert, closer to the dense weight).
        embeddings: True also holds `nn.Embedding`s, and linears tied to one, in 8 bits (groups of
            32, symmetric); a tied pair shares one storage.

    Raises:
        TypeError: an argument of another type. ValueError: a value outside the lists above.
    """

    group_size: int = 128
    symmetric: bool = False
    bits: int = 4
    compute: str = "bf16"
    method: str = "rtn"
    embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("group_size", "bits"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Int4Config: {name} must be int, got {type(value).__name__}")
        for name in ("symmetric", "embeddings"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"Int4Config: {name} must be bool, got {type(value).__name__}")
        if self.bits not in (4, 8):
            raise ValueError(f"Int4Config: bits must be 4 or 8, got {self.bits}")
        if self.group_size not in GROUP_SIZES[self.bits]:
            raise ValueError(
                f"Int4Config: group_size must be {groups_text(self.bits)}, got {self.group_size}"
            )
        if self.compute not in ("bf16", "int8"):
            raise ValueError(f'Int4Config: compute must be "bf16" or "int8", got {self.compute!r}')
        if self.method not in ("rtn", "mse"):
            raise ValueError(f'Int4Config: method must be "rtn" or "mse", got {self.method!r}')


def _check_block(name: str, block: object, dtype: object) -> None:
    if isinstance(block, bool) or not isinstance(block, int):
        raise TypeError(f"{name}: block must be int, got {type(block).__name__}")
    check_block(name, block)
    if dtype is not None and dtype not in VALUES:
        raise TypeError(
            f"{name}: dtype must be float32 or bfloat16, got {_checks.dtype_name(dtype)}"
        )


@dataclass(frozen=True)
class BlockSparseConfig:
    """How `nibblock.accelerate` prunes the linears of a model.

    Args:
        density: share of each layer's blocks to keep, in (0, 1]: those of largest Frobenius norm.
        block: B, edge of a block: 16, 32, 64 or 128.
        dtype: float32 | bfloat16 of the kept values; None for the weight's (float32 for float16).

    Raises:
        TypeError: an argument of another type. ValueError: a value outside these ranges.
    """

    density: float = 0.25
    block: int = 32
    dtype: Optional[torch.dtype] = None

    def __post_init__(self) -> None:
        check_density("BlockSparseConfig", self.density)
        _check_block("BlockSparseConfig", self.block, self.dtype)


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapters `nibblock.add_adapters` puts on the linears of a model.

    Args:
        density: share of each layer's blocks that its adapter holds, spread evenly; in (0, 1], or 0
            for a low-rank pair alone. Not used where `add_adapters` is given blocks.
        block: B, edge of a block: 16, 32, 64 or 128.
        rank: r of the low-rank pair; 0 for none.
        where: None for every linear; a name pattern ("*.mlp.*"), a list of them, or a callable
            (name, module) -> bool.
        skip: names or name patterns that get no adapter.
        name: of the adapters, a word without dots.
        dtype: float32 | bfloat16 of their Parameters.

    Raises:
        TypeError: an argument of another type. ValueError: a value outside these ranges.
    """

    density: float = 0.02
    block: int = 32
    rank: int = 0
    where: Where = None
    skip: Union[str, Iterable[str]] = ()
    name: str = "default"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        op = "AdapterConfig"
        if isinstance(self.rank, bool) or not isinstance(self.rank, int):
            raise TypeError(f"{op}: rank must be int, got {type(self.rank).__name__}")
        if self.rank < 0:
            raise ValueError(f"{op}: rank must be at least 0, got {self.rank}")
        check_density(op, self.density, zero=self.rank > 0)
        _check_block(op, self.block, self.dtype)
        if self.dtype is None:
            raise TypeError(f"{op}: dtype must be float32 or bfloat16, got None")
        if not isinstance(self.name, str):
            raise TypeError(f"{op}: name must be str, got {type(self.name).__name__}")
        if not self.name or "." in self.name:
            raise ValueError(f"{op}: name must be a word without dots, got {self.name!r}")
