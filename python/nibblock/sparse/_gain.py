"""What a block can lower the loss by: the gain of a step, and how far tokens disagree about it.

The norm of a block's gradient says how steep the loss is, not how far one can go: blocks of outlier
features are steep and curved, and a learning rate that suits the rest is too large for them. Along
a direction D of block [I, J] the loss of a small step eta falls by

    eta sum_t z_t - eta^2 / 2 T sum_t z_t^2 + ...        z_t = g_tI^T D x_tJ

with the Fisher information of the T tokens as curvature; the best step wins (sum z)^2 / (2 T sum
z^2): many where tokens agree, whatever their scale. D is the sign of the block's gradient, Adam's
first step, and comes from the other half of the tokens: on its own half any direction of B^2 signs
looks good.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def add_gain(
    gain: torch.Tensor, squares: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, block: int
) -> None:
    """Adds the sums over tokens of z and of z^2 to what is known of every block, in place.

    Args:
        gain, squares: [ceil(N/B), ceil(K/B)] float32.
        grad: [..., N], gradient of a linear's output; x: [..., K], its input. The first half of the
            tokens gives the second its direction, and the other way round.
        block: B.
    Memory: a block column of the gradient twice, [2, N, B], and as much as grad once more.
    Determinism: that of torch's products.
    """
    g, x = _halves(grad, block), _halves(x, block)
    blocks = g.shape[-1] // block
    for j, part in enumerate(x.split(block, -1)):
        direction = torch.bmm(part.transpose(1, 2), g).flip(0).sign_()  # [2, B, N]
        z = torch.bmm(part, direction).mul_(g).unflatten(-1, (blocks, block)).sum(-1)
        gain[:, j] += z.sum((0, 1))
        squares[:, j] += z.square_().sum((0, 1))


def _halves(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """[..., C] as float32 [2, ceil(T/2), C up to whole blocks]; zeros where nothing was."""
    rows = tensor.detach().flatten(0, -2).float()
    odd, short = len(rows) % 2, -rows.shape[1] % block
    if odd or short:
        rows = F.pad(rows, (0, short, 0, odd))
    return rows.unflatten(0, (2, -1))


def best_gain(gain: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """(sum z)^2 / sum z^2 of every block; 0 where a step along D would raise the loss."""
    up = gain.clamp_min(0.0)
    return torch.where(squares > 0, up * up / squares.clamp_min(torch.finfo().tiny), 0.0)
