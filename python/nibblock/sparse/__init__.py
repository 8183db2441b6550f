"""Which blocks of a weight to keep or to train."""

from nibblock.sparse._choose import even_blocks, magnitude_blocks, mask_blocks, resolve_blocks
from nibblock.sparse.prefix_cache import PrefixCache

__all__ = ["PrefixCache", "even_blocks", "magnitude_blocks", "mask_blocks", "resolve_blocks"]
