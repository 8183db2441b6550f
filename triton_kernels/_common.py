"""What every kernel file shares: products, dtypes, shapes of launches.

Kernels keep to one style. Outputs are the first dimension of an accumulator and tokens the second
where weights are int4: weights are then the 64-row operand of a warp-group product, which takes its
first operand from registers, and a tile of few tokens wastes little. Sums are split by shape alone,
partial sums are float32 and added in order: results are bitwise repeatable.

The same wrappers run on CPU tensors when Triton was imported with TRITON_INTERPRET=1: how they are
tested where there is no GPU.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable, Optional

import torch
import triton
import triton.language as tl
from nibblock.triton_kernels._configs import TARGET as TARGET_PROGRAMS
from nibblock.triton_kernels._configs import next_power_of_2 as next_power_of_2  # for wrappers

INTERPRETED = bool(triton.knobs.runtime.interpret)
# Triton's interpreter keeps bfloat16 as integers and would multiply those.
EMULATE: tl.constexpr = tl.constexpr(INTERPRETED)

TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# Arguments that must not make Triton compile anew when they become 1 or divisible by 16: numbers of
# rows, blocks and parts, and pointers into index arrays. A kernel has those it names. Where a part
# begins is not among them: that it is a multiple of 16 is what allows 16-byte loads.
_COUNTS = ("M", "SPLITS", "PARTS", "O_BLOCKS", "N_BLOCKS", "K_BLOCKS", "R", "COUNT", "SIZE")
_INDICES = ("ptr", "other", "order", "col", "col_row", "col_block", "rows")


def jit(function: Callable) -> Any:
    """`triton.jit` with the arguments above left unspecialised."""
    names = inspect.signature(function).parameters
    return triton.jit(
        function,
        do_not_specialize=[n for n in _COUNTS if n in names],
        do_not_specialize_on_alignment=[n for n in _INDICES if n in names],
    )


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32; PRECISION only matters for float32 operands."""
    if EMULATE:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        result = tl.dot(a, b, acc, input_precision=PRECISION)
    return result


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 x to DTYPE, nearest even; the interpreter would cut bfloat16's tail off."""
    if EMULATE and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, kept.to(tl.float32, bitcast=True), float("nan"))
    return x.to(DTYPE)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x as [M, last] with contiguous rows; a copy only where strides demand one."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty((0, 0))
    if rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]:
        return rows.contiguous()  # an expanded or overlapping view
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def operands(x: torch.dtype, values: torch.dtype) -> tuple[tl.dtype, str]:
    """Type and precision in which activations meet stored blocks or a low-rank factor.

    bfloat16 activations: bfloat16, as a dense layer. float16 with bfloat16: both are exact in tf32.
    Everything else keeps float32's precision through three tf32 products.
    """
    if x == torch.bfloat16:
        return tl.bfloat16, "tf32"
    if x == torch.float16 and values == torch.float16:
        return tl.float16, "tf32"
    if x == torch.float16 and values == torch.bfloat16:
        return tl.float32, "tf32"
    return tl.float32, "tf32x3"


def splits(tiles: int, steps: int, target: int = TARGET_PROGRAMS, least: int = 4) -> int:
    """Into how many parts a sum of `steps` is cut when there are `tiles` independent results.

    A function of shapes and configuration alone; without a tuned one the same on every GPU. target:
    programs to end up with. A part keeps at least `least` steps.
    """
    if tiles <= 0 or tiles * 2 > target:
        return 1
    return max(1, min(target // tiles, steps // least, 64))


TARGET = 0  # the compute capability that `_ahead` records for; 0: the device's own


def capability(tensor: torch.Tensor) -> int:
    """80, 90, ...: what configurations are chosen for. The interpreter has those of 90."""
    if TARGET:
        return TARGET
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def gpu(tensor: torch.Tensor) -> str:
    """The name of a tensor's GPU, "" on the CPU: whose tuned configurations count."""
    return _device_name(tensor.device.index) if tensor.is_cuda else ""


RECORDS: Optional[list] = None  # where launches go instead of a GPU while `_ahead` collects them


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs a kernel on the current device and stream, or notes the launch for `_ahead`."""
    options.setdefault("enable_fp_fusion", True)  # Triton's own default changes with 3.10
    if RECORDS is not None:
        RECORDS.append((kernel, args, options))
    else:
        kernel[grid](*args, **options)


class OnDevice:
    """Makes a tensor's GPU the current one, which is where Triton launches; nothing on the CPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._guard: Optional[torch.cuda.device] = None
        if tensor.is_cuda:
            self._guard = torch.cuda.device(tensor.device)

    def __enter__(self) -> None:
        if self._guard is not None:
            self._guard.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._guard is not None:
            self._guard.__exit__(*error)
