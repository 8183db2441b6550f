"""How much each block of a weight's gradient matters, without the gradient."""

from __future__ import annotations

from typing import Optional

import torch

from nibblock import _library
from nibblock.ops import _block_checks, _checks

_library.load()

from nibblock.ops._int4_register import _refuse_vmap  # noqa: E402

__all__ = ["block_scores", "block_scores_"]

MOST_SAMPLES = 32  # kMostSamples of csrc/block_scores/block_scores.h
_INPLACE = "block_scores_"
_scores = torch.ops.nibblock.block_scores_.default


def check_pair(op: str, grad, x, block: int, **others) -> None:
    """A gradient and an input with as many rows, a block edge, and others on the same device."""
    _block_checks._check_rows(op, "grad", grad)
    _block_checks._check_rows(op, "x", x)
    _checks.check_device(op, "x", x, grad=grad, **others)
    torch._check_value(
        list(grad.shape[:-1]) == list(x.shape[:-1]),
        lambda: (
            f"{op}: grad must have the leading dimensions of x, {list(x.shape)}, got "
            f"{list(grad.shape)}"
        ),
    )
    _block_checks.check_block(op, block)


def check_sums(op: str, grad, x, block: int, **sums) -> None:
    """Statistics of every block, float32 [ceil(N/B), ceil(K/B)] each."""
    need = list(_block_checks.grid(grad.shape[-1], x.shape[-1], block))
    for name, tensor in sums.items():
        if tensor is None:
            continue
        torch._check_type(
            tensor.dtype == torch.float32,
            lambda name=name, tensor=tensor: (
                f"{op}: {name} must be float32, got {_checks.dtype_name(tensor.dtype)}"
            ),
        )
        torch._check_value(
            list(tensor.shape) == need,
            lambda name=name, tensor=tensor: (
                f"{op}: {name} must be {need}, got {list(tensor.shape)}"
            ),
        )


def _check(scores, movement, grad, x, weight, block, sketch) -> None:
    """All that `block_scores_` asks."""
    op = _INPLACE
    check_pair(op, grad, x, block, scores=scores, movement=movement, weight=weight)
    torch._check_value(
        0 <= sketch <= MOST_SAMPLES,
        lambda: f"{op}: sketch must be in 0 .. {MOST_SAMPLES}, got {sketch}",
    )
    check_sums(op, grad, x, block, scores=scores, movement=movement)
    torch._check_value(
        (movement is None) == (weight is None),
        lambda: f"{op}: weight must be given exactly when movement is, got only one of them",
    )
    if movement is None or weight is None:
        return
    torch._check_value(
        sketch == 0,
        lambda: (
            f"{op}: movement must be None with a sketch, got a Tensor; sketch=0 computes it exactly"
        ),
    )
    _block_checks._check_rows(op, "weight", weight)
    shape = [grad.shape[-1], x.shape[-1]]
    torch._check_value(
        list(weight.shape) == shape,
        lambda: f"{op}: weight must be {shape}, got {list(weight.shape)}",
    )


@torch.library.register_fake("nibblock::block_scores_")
def _(scores, movement, grad, x, weight, block, sketch, seed):
    _check(scores, movement, grad, x, weight, block, sketch)


torch.library.register_vmap("nibblock::block_scores_", _refuse_vmap(_INPLACE, "grad"))


def block_scores_(
    scores: torch.Tensor,
    movement: Optional[torch.Tensor],
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: Optional[torch.Tensor] = None,
    *,
    block: int = 32,
    sketch: int = 0,
    seed: int = 0,
) -> None:
    """Adds what one backward step says about every block of a linear layer's weight, in place.

        scores[I, J]   += ||g_I^T x_J||_F^2                          sketch = 0
        scores[I, J]   += ||g_I^T x_J Omega_J||_F^2 / s              sketch = s > 0
        movement[I, J] += <W_IJ, g_I^T x_J>                          sketch = 0

    g_I are columns I B .. (I + 1) B of grad, x_J columns J B .. (J + 1) B of x; Omega_J [B, s]
    holds independent signs drawn from the seed, so that the sketch's expectation is the exact
    score. The gradient itself never exists: tiles of it are summed in cache and dropped.

    Args:
        scores: [ceil(N/B), ceil(K/B)] float32, any strides; added to.
        movement: the same, or None; added to. Only with a weight, and not with a sketch.
        grad: [..., N] float32 | bfloat16 | float16, gradient of the layer's output; any strides.
        x: [..., K] float32 | bfloat16 | float16, the layer's input; leading dimensions of grad, any
            strides; its dtype may differ from grad's.
        weight: [N, K] float32 | bfloat16 | float16 with contiguous rows (others are copied), or
            None.
        block: B, one of 16, 32, 64, 128.
        sketch: 0 for the exact score, or how many samples s, up to 32: s / B of the work, and a
            relative standard deviation of about sqrt(2 / s) or less, the less the more directions
            a block's gradient has.
        seed: of the signs; give every call its own.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape, block edge, sketch or device
        that does not fit, or a movement without weight. Nothing is changed then.
    Gradients: none; grad, x and weight are read as data.
    Determinism: bitwise repeatable at one ISA level, at any number of threads.
    Numerics: float32 products and sums within a tile, float64 across tiles; the scalar level sums
        in float64. Squares below 1e-38 vanish.
    Memory: 16 bytes a block, half a MiB a thread, and with a sketch 4 m s ceil(K/B) bytes.
    Source: kernels in csrc/block_scores/; the norm by tiles and its sketch are the standard
        identities E[Omega Omega^T] = s I and ||A||_F^2 = sum of squared entries.
    Example:
        >>> scores = torch.zeros(2, 3)
        >>> g, x = torch.randn(8, 64), torch.randn(8, 96)
        >>> nibblock.ops.block_scores_(scores, None, g, x, block=32)
        >>> torch.testing.assert_close(scores[1, 2], (g.t() @ x)[32:, 64:].square().sum())
    """
    with torch.no_grad():
        try:
            _scores(scores, movement, grad, x, weight, block, sketch, seed)
        except RuntimeError:
            _check(scores, movement, grad, x, weight, block, sketch)
            raise
    if torch.compiler.is_compiling():
        return  # functionalisation has its own account of what changed
    for changed in (scores, movement):
        if changed is not None and not changed.is_inference():
            torch.autograd.graph.increment_version(changed)


def block_scores(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: Optional[torch.Tensor] = None,
    *,
    block: int = 32,
    mode: str = "exact",
    samples: int = 4,
    seed: int = 0,
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """The scores of `block_scores_` as new tensors.

    Args:
        grad, x, weight, block, seed: as `block_scores_` takes them.
        mode: "exact", or "sketch" for an estimate from `samples` random combinations of columns.
        samples: s of the sketch, 1 to 32.
    Returns:
        (scores, movement), float32 [ceil(N/B), ceil(K/B)] each; movement is None without a weight.
    Raises:
        TypeError, ValueError: as `block_scores_`; an unknown mode.
    Gradients, determinism, numerics: as `block_scores_`.
    """
    op = "block_scores"
    if mode not in ("exact", "sketch"):
        raise ValueError(f'{op}: mode must be "exact" or "sketch", got {mode!r}')
    if mode == "sketch" and not 1 <= samples <= MOST_SAMPLES:
        raise ValueError(f"{op}: samples must be in 1 .. {MOST_SAMPLES}, got {samples}")
    _block_checks._check_rows(op, "grad", grad)
    _block_checks._check_rows(op, "x", x)
    _block_checks.check_block(op, block)
    size = _block_checks.grid(grad.shape[-1], x.shape[-1], block)
    scores = torch.zeros(size, dtype=torch.float32, device=grad.device)
    movement = None if weight is None else torch.zeros_like(scores)
    sketch = samples if mode == "sketch" else 0
    block_scores_(scores, movement, grad, x, weight, block=block, sketch=sketch, seed=seed)
    return scores, movement
