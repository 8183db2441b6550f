"""What a step of its own would win for each block of a weight, without the gradient."""

from __future__ import annotations

import torch

from nibblock import _library
from nibblock.ops import _block_checks

_library.load()

from nibblock.ops._int4_register import _refuse_vmap  # noqa: E402
from nibblock.ops.block_scores import check_pair, check_sums  # noqa: E402

__all__ = ["block_gain", "block_gain_"]

_INPLACE = "block_gain_"
_gain = torch.ops.nibblock.block_gain_.default


def _check(gain, squares, grad, x, block) -> None:
    """All that `block_gain_` asks."""
    check_pair(_INPLACE, grad, x, block, gain=gain, squares=squares)
    check_sums(_INPLACE, grad, x, block, gain=gain, squares=squares)


@torch.library.register_fake("nibblock::block_gain_")
def _(gain, squares, grad, x, block):
    _check(gain, squares, grad, x, block)


torch.library.register_vmap("nibblock::block_gain_", _refuse_vmap(_INPLACE, "grad"))


def block_gain_(
    gain: torch.Tensor,
    squares: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    *,
    block: int = 32,
) -> None:
    """Adds what every token says about a sign step on every block of a linear's weight, in place.

        gain[I, J]    += sum_t z_t
        squares[I, J] += sum_t z_t^2,          z_t = sum_nk g_t[n] D[n, k] x_t[k]

    over n in rows I B .. (I + 1) B and k in columns J B .. (J + 1) B, with D = sign(g_I^T x_J) of
    the half of the tokens that t is not in; sign(0) = 0. Taking W - eta D lowers the sum of the
    tokens' losses by eta gain - eta^2 / 2 squares, as far as their Fisher information tells the
    curvature, and by gain^2 / 2 squares at best. The gradient itself never exists: tiles of its
    signs are made in cache and dropped.

    Args:
        gain, squares: [ceil(N/B), ceil(K/B)] float32, any strides, not overlapping; added to.
        grad: [..., N] float32 | bfloat16 | float16, gradient of the layer's output; any strides.
        x: [..., K] float32 | bfloat16 | float16, the layer's input; leading dimensions of grad, any
            strides; its dtype may differ from grad's. Of M tokens in all, the first ceil(M / 2) are
            one half. A single token adds nothing: there is no other half.
        block: B, one of 16, 32, 64, 128.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape, block edge or device that does
        not fit. Nothing is changed then.
    Gradients: none; grad and x are read as data.
    Determinism: bitwise repeatable at one ISA level, at any number of threads.
    Numerics: float32 products and sums over at most 128 tokens, float64 across them; the scalar
        level sums in float64. A gradient within rounding of 0 may get either sign.
    Memory: 16 bytes a block and 450 KiB a thread.
    Source: kernels in csrc/block_scores/cpu_gain.h and triton_kernels/block_gain.py; the quotient
        is the Newton decrement along D with the empirical Fisher information as curvature,
        cross-validated between halves.
    Example:
        >>> gain, squares = torch.zeros(1, 2), torch.zeros(1, 2)
        >>> nibblock.ops.block_gain_(gain, squares, torch.ones(8, 32), torch.ones(8, 64))
        >>> assert gain.tolist() == [[8 * 32 * 32] * 2]  # every token wins by all entries
        >>> assert squares.tolist() == [[8 * (32 * 32) ** 2] * 2]
    """
    with torch.no_grad():
        try:
            _gain(gain, squares, grad, x, block)
        except RuntimeError:
            _check(gain, squares, grad, x, block)
            raise
    if torch.compiler.is_compiling():
        return  # functionalisation has its own account of what changed
    for changed in (gain, squares):
        if not changed.is_inference():
            torch.autograd.graph.increment_version(changed)


def block_gain(
    grad: torch.Tensor, x: torch.Tensor, *, block: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of `block_gain_` as new tensors.

    Args:
        grad, x, block: as `block_gain_` takes them.
    Returns:
        (gain, squares), float32 [ceil(N/B), ceil(K/B)] each.
    Raises, gradients, determinism, numerics: as `block_gain_`.
    """
    op = "block_gain"
    _block_checks._check_rows(op, "grad", grad)
    _block_checks._check_rows(op, "x", x)
    _block_checks.check_block(op, block)
    size = _block_checks.grid(grad.shape[-1], x.shape[-1], block)
    gain = torch.zeros(size, dtype=torch.float32, device=grad.device)
    squares = torch.zeros_like(gain)
    block_gain_(gain, squares, grad, x, block=block)
    return gain, squares
