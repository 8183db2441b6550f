"""What `accelerate` is asked to do, checked when it is written down."""

from __future__ import annotations

from dataclasses import dataclass

from nibblock.ops._checks import GROUP_SIZES


@dataclass(frozen=True)
class Int4Config:
    """How `nibblock.accelerate` stores the linears of a model.

    Args:
        group_size: 32, 64, 128, 256, or -1 for one group per row. Weights of a row that share one scale.
        symmetric: True stores scales only (zero is exact); False stores a scale and an offset per group.
        bits: 4 or 8 bits a weight.
        compute: "bf16" keeps at least bfloat16's precision of the activations; "int8" quantises them per
            row and group (faster on CPUs with int8 units, less exact).
        method: "rtn" rounds to nearest; "mse" searches scales of least squared error per group (slower to
            convert, closer to the dense weight).
        embeddings: True also holds `nn.Embedding`s, and linears tied to one, in 8 bits (groups of 32,
            symmetric); a tied pair shares one storage.

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
        if self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"Int4Config: group_size must be 32, 64, 128, 256 or -1 (whole row), "
                f"got {self.group_size}"
            )
        if self.bits not in (4, 8):
            raise ValueError(f"Int4Config: bits must be 4 or 8, got {self.bits}")
        if self.compute not in ("bf16", "int8"):
            raise ValueError(f'Int4Config: compute must be "bf16" or "int8", got {self.compute!r}')
        if self.method not in ("rtn", "mse"):
            raise ValueError(f'Int4Config: method must be "rtn" or "mse", got {self.method!r}')
