"""The direction in which Muon moves blocks: the polar factor of their momentum, nearly."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Optional

import torch

from nibblock import _library
from nibblock.ops import _block_checks
from nibblock.ops import _masked_checks as C
from nibblock.ops._checks import check_int

_library.load()

__all__ = ["muon_direction"]

Tensors = Sequence[torch.Tensor]
_OP = "muon_direction"
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # csrc/masked_update/muon_direction.h
_direction = torch.ops.nibblock.muon_direction_.default


def _check_numbers(grads, momenta, momentum, steps) -> None:
    """What needs no look at a tensor."""
    C.check_list(_OP, "grads", grads)
    C.check_list(_OP, "momenta", momenta)
    number = isinstance(momentum, numbers.Real) and not isinstance(momentum, bool)
    C._type(number, _OP, f"momentum must be a number, got {type(momentum).__name__}")
    C._check_hyper(_OP, "momentum", momentum, 1.0)
    check_int(_OP, "steps", steps)
    C._value(1 <= steps <= 20, _OP, f"steps must be from 1 to 20, got {steps}")


def _check(out, grads, momenta, momentum, nesterov, steps, maximize, multiplier, found_inf) -> None:
    """All that the op asks; the order of the arguments is the schema's."""
    _check_numbers(grads, momenta, momentum, steps)
    whole = len(momenta) == 1 and len(grads) > 1 and not grads[0].is_cuda
    if not whole:
        C._check_count(_OP, "momenta", len(momenta), len(grads), "grads", True)
    for i, grad in enumerate(grads):
        C._check_weight_type(_OP, f"grads[{i}]", grad)
        C._check_device(_OP, f"grads[{i}]", grad, grads[0].device)
        layout = grad.layout == torch.strided
        C._type(layout, _OP, f"grads[{i}] must be a dense tensor, got {grad.layout}")
        got = list(grad.shape)
        square = len(got) == 3 and got[1] == got[2] and got[1] in _block_checks.BLOCKS
        need = "[Z, B, B] with B 16, 32, 64 or 128"
        C._value(square, _OP, f"grads[{i}] must be {need}, got {got}")
        edge = grads[0].shape[1]
        C._value(
            got[1] == edge, _OP, f"grads[{i}] must be [Z, {edge}, {edge}] as grads[0], got {got}"
        )
    for i, state in enumerate(momenta):
        C._check_type(_OP, f"momenta[{i}]", state, torch.float32)
        C._check_device(_OP, f"momenta[{i}]", state, grads[0].device)
        C._check_contiguous(_OP, f"momenta[{i}]", state)
        shape = list(grads[i].shape)
        if whole:
            shape[0] = sum(len(g) for g in grads)
        got = list(state.shape)
        C._value(got == shape, _OP, f"momenta[{i}] must be {shape}, got {got}")
    C.check_scalar(_OP, "multiplier", multiplier)
    C.check_scalar(_OP, "found_inf", found_inf)


@torch.library.register_fake("nibblock::muon_direction_")
def _(out, grads, momenta, momentum, nesterov, steps, maximize, multiplier, found_inf):
    _check(out, grads, momenta, momentum, nesterov, steps, maximize, multiplier, found_inf)


def batched(out, grads, momenta, momentum, nesterov, steps, maximize, multiplier, found_inf):
    """The CUDA body, by the formula, with cuBLAS's batched products; no kernel of our own."""
    _check(out, grads, momenta, momentum, nesterov, steps, maximize, multiplier, found_inf)
    sign = -1.0 if maximize else 1.0
    for i, (grad, to) in enumerate(zip(grads, out)):
        u = grad.float() * (sign if multiplier is None else sign * multiplier)
        if momenta:
            moved = momenta[i].view_as(u) * momentum + u
            u = u + momentum * moved if nesterov else moved
            if found_inf is not None:
                moved = torch.where(found_inf == 0, moved, momenta[i].view_as(u))
            momenta[i].view_as(u).copy_(moved)
        u = orthogonalised(u, steps)
        to.copy_(u if found_inf is None else torch.where(found_inf == 0, u, 0.0))


torch.library.impl("nibblock::muon_direction_", "CUDA", batched)


def orthogonalised(u: torch.Tensor, steps: int) -> torch.Tensor:
    """The iteration on [Z, B, B] as torch says it; powers of two first, so that no square of an
    entry leaves the range of the dtype."""
    largest = u.abs().amax(dim=(1, 2), keepdim=True)
    exponent = torch.frexp(largest).exponent
    tiny = largest < torch.finfo(u.dtype).tiny
    x = torch.ldexp(torch.where(tiny, 0.0, u), -torch.where(tiny, 0, exponent).clamp(max=126))
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = x / torch.where(tiny, 1.0, norm)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * (gram @ gram))
    return x


def muon_direction(
    grads: Tensors,
    momenta: Tensors,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    maximize: bool = False,
    multiplier: Optional[torch.Tensor] = None,
    found_inf: Optional[torch.Tensor] = None,
) -> list[torch.Tensor]:
    """The orthogonalised momentum of B x B blocks, each by itself; momenta change in place.

        g = grad * multiplier                      (negated if maximize)
        m = momentum m + g
        u = g + momentum m if nesterov else m      (u = g without momenta)
        X = u / ||u||_F, then `steps` times:
            A = X^T X,   X = X (a I + b A + c A^2),   (a, b, c) = (3.4445, -4.7750, 2.0315)

    If u = U S V^T, X is near U V^T: in five steps the polynomial brings singular values between 0.7
    and 1.2, but for those below about ||u||_F / 500, which it makes some 500 times larger. X does
    not depend on the size of u.

    Args:
        grads: list of [Z, B, B] float32 | bfloat16, any strides; B one of 16, 32, 64, 128, the same
            for all.
        momenta: [] or a list of float32 of the grads' shapes, contiguous, distinct; changed. May be
            one tensor [sum of Z, B, B] that holds those of all grads in order, on the CPU.
        momentum: in [0, 1).
        nesterov: whether to look ahead.
        steps: of the iteration, 1 to 20.
        maximize: negates the gradients.
        multiplier: None or float32 tensor of 1 element; 1 / scale of a GradScaler, times a clip
            coefficient.
        found_inf: None or float32 tensor of 1 element; if it is not 0, momenta stay and the
            directions are zeros.
    Returns:
        the directions X, new contiguous tensors of the grads' shapes and dtypes. A block of zeros
        (or denormals) has zeros; one with an infinity or a NaN has NaN, and only that one.
    Raises:
        TypeError: a dtype that is not listed, or not a list. ValueError: lists of different
        lengths, a shape, or a number out of range. Nothing has changed then.
    Gradients: none; grads are read as data, the versions of momenta are bumped.
    Determinism: bitwise repeatable at any number of threads and at any ISA level of the CPU.
    Numerics: float32; blocks are scaled by powers of two first, so that no square leaves the range.
    Cost: 30 B^3 operations a block and nothing larger than four blocks; a matrix of N x N as a
        whole would take N / B times as many. On a GPU the products are cuBLAS's.
    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); kernels
        in csrc/masked_update/cpu_muon.h.
    Example:
        >>> (d,) = nibblock.ops.muon_direction([torch.randn(3, 32, 32)], [])
        >>> assert torch.linalg.svdvals(d).max() < 1.3  # of the 32 only a few are below 0.7
    """
    _check_numbers(grads, momenta, momentum, steps)
    if not grads:
        C._check_count(_OP, "momenta", len(momenta), 0, "grads")
        C.check_scalar(_OP, "multiplier", multiplier)
        C.check_scalar(_OP, "found_inf", found_inf)
        return []
    with torch.no_grad():
        out = [torch.empty(g.shape, dtype=g.dtype, device=g.device) for g in grads]
        arguments = (
            out, grads, momenta, momentum, nesterov, steps, maximize, multiplier, found_inf,
        )  # fmt: skip
        try:
            _direction(*arguments)
        except RuntimeError:
            _check(*arguments)
            raise
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(momenta)
    return out
