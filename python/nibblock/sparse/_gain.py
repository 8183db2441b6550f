"""What a block can lower the loss by: the gain of a step, and how far tokens disagree about it.

The norm of a block's gradient says how steep the loss is, not how far one can go: blocks of outlier
features are steep and curved, and a learning rate that suits the rest is too large for them. Along
a direction D of block [I, J] the loss of a small step eta falls by

    eta sum_t z_t - eta^2 / 2 T sum_t z_t^2 + ...        z_t = g_tI^T D x_tJ

with the Fisher information of the T tokens as curvature; the best step wins (sum z)^2 / (2 T sum
z^2): many where tokens agree, whatever their scale. D is the sign of the block's gradient, Adam's
first step, and comes from the other half of the tokens: on its own half any direction of B^2 signs
looks good. `nibblock.ops.block_gain_` makes the two sums.
"""

from __future__ import annotations

import torch

AGREED, CERTAIN = 0.25, 32.0


def agreed(score: torch.Tensor, tokens: int) -> torch.Tensor:
    """Which blocks nearly every token asks for, bool as score.

    A score is a squared t statistic, and at most the number of tokens, where z is the same for all:
    its share of that is how far they agree. On SmolLM2 and MiniLM it was an eighth at most; from a
    quarter on a block is taken to be wanted for itself. 32 says that it is no accident among some
    million blocks.
    """
    return (score >= AGREED * tokens) & (score >= CERTAIN)


def best_gain(gain: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """(sum z)^2 / sum z^2 of every block; 0 where a step along D would raise the loss."""
    up = gain.clamp_min(0.0)
    return torch.where(squares > 0, up * up / squares.clamp_min(torch.finfo().tiny), 0.0)
