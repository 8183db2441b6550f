"""Which blocks of a weight to keep or to train."""

from nibblock.sparse._choose import even_blocks, magnitude_blocks, mask_blocks, resolve_blocks

__all__ = ["even_blocks", "magnitude_blocks", "mask_blocks", "resolve_blocks"]
