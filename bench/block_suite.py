"""What is measured for the block-sparse ops: forward, dx and weight gradient over density, and an
adapter on an int4 base.

One comparison holds every density of one shape, M and block beside the dense lines and torch's own
sparse ops, interleaved, so every ratio comes from the same rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Callable

import torch
import torch.nn.functional as F

from .int4_suite import _figures, _seconds
from .machine import Ceilings
from .providers import Unavailable, onednn_weight
from .shapes import Shape
from .timing import Contender, cold_bytes, copies_for, interleave

DENSITIES = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 0.8)
DENSITIES_QUICK = (0.02, 0.1, 0.5, 0.8)
BLOCKS = (16, 32, 64, 128)
ROWS = (1, 16, 256, 1024)
COLD_ROWS = 16  # up to here a call is bound by reading weights: rotate more than any cache holds
# torch's sparse ops are measured at these densities alone: they take longer than the dense product.
PEER_DENSITIES = (0.02, 0.1, 0.5)

_TOLERANCE = {"fp32": 1e-5, "bf16": 6e-3}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Weights:
    """Random blocks of one shape: a dense float32 weight, and for each density the blocks kept."""

    def __init__(self, shape: Shape, seed: int = 0):
        gen = torch.Generator().manual_seed(seed)
        self.shape = shape
        n, k = shape.out_features, shape.in_features
        # Exact in bfloat16, so that every provider multiplies by the same numbers.
        self.dense = (torch.randn(n, k, generator=gen) * k**-0.5).bfloat16().float()

    def blocks(self, density: float, block: int) -> torch.Tensor:
        from nibblock.sparse import even_blocks

        return even_blocks(self.shape.out_features, self.shape.in_features, block, density)

    def stored(self, density: float, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """values float32 [Z, B, B] and the layout."""
        from nibblock.ops import block_layout
        from nibblock.sparse._choose import read_blocks

        blocks = self.blocks(density, block)
        values = read_blocks(self.dense, blocks, block)
        return values, block_layout(blocks, *self.dense.shape, block)

    def masked(self, density: float, block: int) -> torch.Tensor:
        from nibblock.sparse._choose import scatter_blocks

        values, _ = self.stored(density, block)
        return scatter_blocks(values, self.blocks(density, block), *self.dense.shape)


@dataclass
class Line:
    """One provider at one density (1 for dense): `run(copy)`, what it must give, what it reads."""

    name: str
    density: float
    run: Callable[[int], torch.Tensor]
    exact: Callable[[], torch.Tensor]
    weight_bytes: int
    copies: int = 1

    @property
    def key(self) -> str:
        return self.name if self.density == 1 else f"{self.name} d={self.density:g}"


def _copies(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    return [tensor] + [tensor.clone() for _ in range(count - 1)]


def _reordered(w: torch.Tensor, m: int, count: int) -> list[torch.Tensor]:
    """`w` in oneDNN's order, `count` times; none where oneDNN has no kernels of its dtype."""
    try:
        return [onednn_weight(w, m) for _ in range(count)]
    except Unavailable:
        return []


def _nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _rows(m: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(m, width, generator=gen).bfloat16().to(dtype)


# --- lines --------------------------------------------------------------------------------------


def product_lines(w: Weights, m: int, block: int, densities, dx: bool, cold: int) -> list[Line]:
    """Forward y = x S^T, or dx = g S."""
    n, k = w.dense.shape
    width, lines = n if dx else k, []
    onednn = torch.ops.mkldnn._linear_pointwise.default

    def rows_exact(x, dense):
        return lambda: x[:4].double() @ (dense.double() if dx else dense.double().t())

    for label, dtype in _DTYPES.items():
        x = _rows(m, width, dtype, 1000 + m)
        dense = w.dense.to(dtype)
        plain = dense.t().contiguous() if dx else dense  # what F.linear multiplies by
        count = copies_for(_nbytes(dense), cold) if cold else 1
        eager, packed = _copies(dense, count), _reordered(plain, m, count)
        size, exact = _nbytes(dense), rows_exact(x, w.dense)

        def multiply(i, x=x, eager=eager):
            return torch.mm(x, eager[i]) if dx else F.linear(x, eager[i])

        def prepacked(i, x=x, packed=packed):
            return onednn(x, packed[i], None, "none", [], "")

        lines.append(Line(f"dense {label} eager", 1, multiply, exact, size, count))
        if packed:
            lines.append(Line(f"dense {label} oneDNN", 1, prepacked, exact, size, count))
    for density in densities:
        masked = w.masked(density, block)
        values, layout = w.stored(density, block)
        for label, dtype in _DTYPES.items():
            x = _rows(m, width, dtype, 1000 + m)
            one = values.to(dtype)
            count = copies_for(_nbytes(one), cold) if cold else 1
            run = _ours(x, _copies(one, count), layout, n, k, block, dx)
            size = _nbytes(one, layout)
            lines.append(
                Line(f"nibblock {label}", density, run, rows_exact(x, masked), size, count)
            )
        if not dx and density in PEER_DENSITIES and block == 32:
            x = _rows(m, width, torch.float32, 1000 + m)
            bsr, turned = masked.to_sparse_bsr((block, block)), x.t().contiguous()

            def peer(_, bsr=bsr, turned=turned):
                return torch.mm(bsr, turned).t()

            lines.append(
                Line("torch BSR fp32", density, peer, rows_exact(x, masked), _nbytes(values))
            )
    return lines


def _ours(x, values, layout, n, k, block, dx):
    if dx:
        backward = torch.ops.nibblock.block_sparse_linear_dx.default
        return lambda i: backward(x, values[i], layout, k, block)
    forward = torch.ops.nibblock._block_sparse_linear_forward.default
    return lambda i: forward(x, values[i], layout, None, None, n, block)


def weight_grad_lines(w: Weights, m: int, block: int, densities) -> list[Line]:
    """dS = blocks of g^T x."""
    n, k = w.dense.shape
    lines = []
    g32, x32 = _rows(m, n, torch.float32, 1), _rows(m, k, torch.float32, 2)
    dense = g32.t().double() @ x32.double()
    op = torch.ops.nibblock.block_weight_grad.default
    from nibblock.sparse._choose import read_blocks

    for label, dtype in _DTYPES.items():
        g, x = g32.to(dtype), x32.to(dtype)
        lines.append(
            Line(
                f"dense {label} eager",
                1,
                lambda _, g=g, x=x: torch.mm(g.t(), x),
                lambda: dense,
                _nbytes(g, x),
            )
        )
        for density in densities:
            _, layout = w.stored(density, block)
            blocks = w.blocks(density, block)
            lines.append(
                Line(
                    f"nibblock {label}",
                    density,
                    lambda _, g=g, x=x, layout=layout: op(g, x, layout, block, torch.float32),
                    lambda blocks=blocks: read_blocks(dense, blocks, block),
                    _nbytes(g, x),
                )
            )
    for density in densities:
        if density == PEER_DENSITIES[0] and block == 32:
            pattern = (w.masked(density, block) != 0).float().to_sparse_csr()

            def peer(_, pattern=pattern):
                return torch.sparse.sampled_addmm(pattern, g32.t(), x32, beta=0.0).values()

            at = pattern.to_sparse_coo().indices()
            lines.append(
                Line(
                    "torch sampled_addmm fp32",
                    density,
                    peer,
                    lambda at=at: dense[at[0], at[1]],
                    _nbytes(g32, x32),
                )
            )
    return lines


# --- comparisons --------------------------------------------------------------------------------


def run_case(
    weights: Weights,
    kind: str,
    m: int,
    block: int,
    densities: Sequence[float],
    ceilings: Ceilings,
    budget: float,
) -> dict[str, Any]:
    """Times every line of one kind ("forward", "dx" or "weight_grad"), each result checked
    first.
    """
    n, k = weights.dense.shape
    cold = cold_bytes(4 + 2 * len(densities)) if m <= COLD_ROWS and kind != "weight_grad" else 0
    if kind == "weight_grad":
        lines = weight_grad_lines(weights, m, block, densities)
    else:
        lines = product_lines(weights, m, block, densities, kind == "dx", cold)
    errors = {line.key: check(line, kind) for line in lines}
    contenders = [Contender(line.key, line.run, line.copies) for line in lines]
    contenders += [copy_contender(kind, m, n, k), ceilings.read_contender()]
    contenders += [c for c in [ceilings.peak_contender("bf16"), *_fma(ceilings)] if c]
    timings = interleave(contenders, rounds=15, budget=budget)
    case: dict[str, Any] = {
        "kind": kind,
        "shape": weights.shape.key,
        "model": weights.shape.model,
        "n": n,
        "k": k,
        "m": m,
        "block": block,
        "weights": "cold" if cold else "warm",
        "dense_bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),  # else torch emulates it
        "densities": list(densities),
        "copy": _seconds(timings["copy"]),
        "lines": {},
        "ceilings": {
            name[len("ceiling ") :]: _figures(t)
            for name, t in timings.items()
            if name.startswith("ceiling ")
        },
    }
    for line in lines:
        flops = 2.0 * m * n * k * line.density
        itemsize = 4 if "fp32" in line.name else 2
        case["lines"][line.key] = {
            "name": line.name,
            "density": line.density,
            "error": errors[line.key],
            "bytes": line.weight_bytes + (m * (n + k) * itemsize if kind != "weight_grad" else 0),
            "flops": flops,
            **_seconds(timings[line.key]),
        }
    return case


def copy_contender(kind: str, m: int, n: int, k: int) -> Contender:
    """One pass over what must be read and written anyway: x to y, or the gradient's two inputs."""
    pairs = [(m, (n + k) // 2)] if kind != "weight_grad" else [(m, n), (m, k)]
    source = [torch.ones(p, dtype=torch.bfloat16) for p in pairs]
    target = [torch.empty_like(s) for s in source]

    def copy(_: int) -> None:
        for t, s in zip(target, source):
            t.copy_(s)

    return Contender("copy", copy)


def _fma(ceilings: Ceilings) -> list[Contender]:
    """The float32 peak of the widest registers in force: what kernels without AMX live on."""
    from .machine import native

    unit = {"avx2": "fma_avx2"}.get(native().cpu_isa(), "fma_avx512")
    if native().cpu_isa() == "scalar" or ceilings.peak_contender("bf16") is None:
        return []
    known = ceilings.peak_contender("bf16")
    if known is not None and known.name == f"ceiling {unit}":
        return []
    return [
        Contender(
            f"ceiling {unit}",
            lambda _: native().measure_ceiling(unit, ceilings.threads, 0.01),
            pool="native",
            measure=True,
        )
    ]


def check(line: Line, kind: str) -> float:
    """The relative error against float64; raises AssertionError when it is another product."""
    y, exact = line.run(0).double(), line.exact()
    y = y if kind == "weight_grad" else y[: len(exact)]
    error = float((y - exact).norm() / exact.norm())
    limit = _TOLERANCE["fp32" if "fp32" in line.name else "bf16"]
    if not error <= limit:
        raise AssertionError(f"{line.key}: relative error must be at most {limit}, got {error:.2e}")
    return error


# --- an adapter on an int4 base -----------------------------------------------------------------


def run_adapter(
    weights: Weights, m: int, density: float, ceilings: Ceilings, budget: float
) -> dict[str, Any]:
    """The int4 base alone, with its adapter in one op, and as two ops; bf16 x, groups of 128."""
    from nibblock.ops import int4_pack, int4_quantize
    from nibblock.ops._checks import format_code

    n, k, block = *weights.dense.shape, 32
    codes = int4_quantize(weights.dense, group_size=128)
    packed = int4_pack(*codes, in_features=k, group_size=128)
    values, layout = weights.stored(density, block)
    x = _rows(m, k, torch.bfloat16, 1000 + m)
    count = copies_for(packed.numel(), cold_bytes(5)) if m <= COLD_ROWS else 1
    bases = _copies(packed, count)
    form = (n, 128, 4, True, torch.float32, "bf16")
    base, code = torch.ops.nibblock._int4_linear_forward.default, format_code(*form)
    fused = torch.ops.nibblock._int4_block_sparse_linear_forward.default
    sparse = torch.ops.nibblock._block_sparse_linear_forward.default
    calls: dict[str, Callable[[int], torch.Tensor]] = {
        "base": lambda i: base(x, bases[i], None, code)
    }
    for label, dtype in _DTYPES.items():
        own = _copies(values.to(dtype), count)
        calls[f"one op {label}"] = lambda i, own=own: fused(
            x, bases[i], None, *form, own[i], layout, block, None, None
        )
        calls[f"two ops {label}"] = lambda i, own=own: sparse(
            x, own[i], layout, None, base(x, bases[i], None, code), n, block
        )
    added = (x[:4].double() @ weights.masked(density, block).double().t()).float()
    for label in _DTYPES:
        for ops in ("one op", "two ops"):
            y, alone = calls[f"{ops} {label}"](0)[:4].float(), calls["base"](0)[:4].float()
            error = float((y - alone - added).norm() / (alone + added).norm())
            if not error <= 1e-2:
                raise AssertionError(f"{ops} {label}: relative error is {error:.2e}")
    timings = interleave(
        [Contender(name, call, count) for name, call in calls.items()]
        + [ceilings.read_contender()],
        rounds=25,
        budget=budget,
    )
    return {
        "shape": weights.shape.key,
        "m": m,
        "density": density,
        "weights": "cold" if count > 1 else "warm",
        "lines": {name: _seconds(timings[name]) for name in calls},
        "ceilings": {"read": _figures(timings["ceiling read"])},
    }
