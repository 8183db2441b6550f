"""Choosing blocks so that no part of a layer crowds out the rest.

Block norms of a gradient are close to an outer product: an input feature with large activations
makes its whole block column large in every row. Taken by score alone such a choice spends itself on
a few columns, which together act little better than a bias; each further block of a column or row
adds less than its score says.
"""

from __future__ import annotations

import math
from typing import Optional

import torch

CHUNK = 1 << 16
DECISIVE = 16.0  # of two gains, squared t statistics: one t is 4 times the other


class Spread:
    """Picks blocks in the order of their scores under caps.

    Args:
        grids: (block rows, block columns) of each layer; blocks are numbered layer by layer, row by
            row.
        share: a layer, a block row and a block column get at most `share` times their even share,
            rounded up, before any other is given more.
        scores: of all blocks. A layer of zeros is one that no gradient reaches: its blocks come
            after all others, whatever the caps.
        agreed: bool, of all blocks, or None. Not None: scores are gains, and caps turn no block
            away whose gain is 16 times that of the block at twice the count that is picked, nor
            one that tokens agree on.
    """

    def __init__(
        self,
        grids: list[tuple[int, int]],
        share: float,
        scores: torch.Tensor,
        agreed: Optional[torch.Tensor] = None,
    ) -> None:
        self.grids, self.share, self.scores, self.agreed = grids, share, scores, agreed
        layer, row, column = [], [], []
        rows = columns = 0
        for at, (r, c) in enumerate(grids):
            place = torch.arange(r * c)
            layer.append(torch.full((r * c,), at))
            row.append(place // max(1, c) + rows)
            column.append(place % max(1, c) + columns)
            rows, columns = rows + r, columns + c
        none = torch.zeros(0, dtype=torch.int64)
        self._places = torch.stack([torch.cat([none, *p]) for p in (layer, row, column)], 1)
        self._sizes = (len(grids), rows, columns)
        parts = scores.split([r * c for r, c in grids])
        self._idle = torch.cat(
            [none.bool(), *(torch.full_like(p, not p.any()).bool() for p in parts)]
        )

    def pick(self, order: torch.Tensor, count: int) -> torch.Tensor:
        """The `count` blocks to take of those in `order` (best first), in the order of taking.

        What the caps turned away comes last, best first.
        """
        count = min(count, len(order))
        if count == 0:
            return order[:0]
        density = count / len(order)
        caps = [
            tuple(math.ceil(self.share * density * n) for n in (r * c, c, r)) for r, c in self.grids
        ]
        used = [[0] * n for n in self._sizes]
        of_layer, of_row, of_column = used
        taken, left = [], []
        idle = self._idle[order]
        free = self._free(order, count)[~idle].tolist()
        order, last = order[~idle], order[idle]
        for start in range(0, len(order), CHUNK):
            part = order[start : start + CHUNK]
            places = self._places[part].tolist()
            for at, (block, (layer, row, column)) in enumerate(zip(part.tolist(), places), start):
                cap = caps[layer]
                if free[at] or (
                    of_layer[layer] < cap[0] and of_row[row] < cap[1] and of_column[column] < cap[2]
                ):
                    of_layer[layer] += 1
                    of_row[row] += 1
                    of_column[column] += 1
                    taken.append(block)
                    if len(taken) == count:
                        return torch.tensor(taken)
                elif len(left) < count:
                    left.append(block)
        return torch.cat([torch.tensor(taken + left, dtype=torch.int64), last])[:count]

    def _free(self, order: torch.Tensor, count: int) -> torch.Tensor:
        """Which blocks of `order` no cap turns away.

        Gains fall off slowly on language models and encoders, where a block's neighbours in its
        column do part of its work: the best is 6 to 10 times the one at twice a count of 2 %, and
        there caps help. Where a few blocks are all there is to train, the rest is noise.
        """
        free = torch.zeros(len(order), dtype=torch.bool)
        if self.agreed is not None:
            gains = self.scores[order]
            rest = gains[min(2 * count, len(order) - 1)].clamp_min(1.0)  # 1: mere noise
            free |= (gains >= DECISIVE * rest) | self.agreed[order]
        return free
