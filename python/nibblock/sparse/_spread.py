"""Choosing blocks so that no part of a layer crowds out the rest.

Block norms of a gradient are close to an outer product: an input feature with large activations
makes its whole block column large in every row. Taken by score alone such a choice spends itself on
a few columns, which together act little better than a bias; each further block of a column or row
adds less than its score says.
"""

from __future__ import annotations

import math

import torch

CHUNK = 1 << 16


class Spread:
    """Picks blocks in the order of their scores under caps.

    Args:
        grids: (block rows, block columns) of each layer; blocks are numbered layer by layer, row by
            row.
        share: a layer, a block row and a block column get at most `share` times their even share,
            rounded up, before any other is given more.
    """

    def __init__(self, grids: list[tuple[int, int]], share: float) -> None:
        self.grids, self.share = grids, share
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
        for start in range(0, len(order), CHUNK):
            part = order[start : start + CHUNK]
            for block, (layer, row, column) in zip(part.tolist(), self._places[part].tolist()):
                cap = caps[layer]
                if of_layer[layer] < cap[0] and of_row[row] < cap[1] and of_column[column] < cap[2]:
                    of_layer[layer] += 1
                    of_row[row] += 1
                    of_column[column] += 1
                    taken.append(block)
                    if len(taken) == count:
                        return torch.tensor(taken)
                elif len(left) < count:
                    left.append(block)
        return torch.tensor((taken + left)[:count])
