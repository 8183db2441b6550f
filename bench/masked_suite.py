"""What is measured for the masked optimiser steps: a list of parameters of about 20 million
entries, moved whole, in blocks, at scattered positions and by a mask, beside torch's optimisers.

Every line has two figures. "cold": the step runs once after a pass over a buffer larger than the
last-level cache, as it does after a long backward; its program is warmed up by the same step on a
tiny list, none of its data is. "resident": the step runs again and again. A dense step is larger
than most caches, so the two differ little there; a packed one-percent step fits into them, so they
differ much.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Callable, Optional

import torch

from .int4_suite import _figures, _seconds
from .machine import native
from .timing import MIB, Contender, interleave, last_level_cache, wait_until_idle

BLOCK = 32
LR, DECAY = 1e-4, 0.01
# Name -> shapes. The second is six layers of SmolLM2-135M: 42 linears, so that the cost of a tensor
# shows.
LISTS = {
    "10 of 2048x1024": [(2048, 1024)] * 10,
    "42 of SmolLM2": [
        (576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536),
    ] * 6,
}  # fmt: skip
BASELINE = "torch AdamW fused"


@dataclass
class Line:
    """One step: `run()`, how many entries it moves, and the bytes memory must move for one.

    `floor_bytes` counts each float once per read and once per write. A scattered entry moves the
    whole line it lies on, so of a list at density d a share 1 - (1 - d)^16 of the parameter's lines
    is read and written.
    """

    name: str
    run: Callable[[], object]
    entries: int
    floor_bytes: float
    check: Optional[Callable[[], float]] = None


class Parameters:
    """The list: parameters and gradients, shared by every line that moves them whole."""

    def __init__(self, shapes: list[tuple[int, int]], seed: int = 0):
        self.gen = torch.Generator().manual_seed(seed)
        self.shapes = shapes
        self.params = [self.normal(s) for s in shapes]
        self.grads = [self.normal(s) for s in shapes]
        self.count = sum(p.numel() for p in self.params)

    def normal(self, shape) -> torch.Tensor:
        return torch.randn(shape, generator=self.gen)

    def blocks(self, shape: tuple[int, int], density: float) -> torch.Tensor:
        rows, columns = (-(-n // BLOCK) for n in shape)
        count = max(1, round(rows * columns * density))
        chosen = torch.randperm(rows * columns, generator=self.gen)[:count].sort().values
        return torch.stack([chosen // columns, chosen % columns], 1).int()

    def steps(self) -> list[torch.Tensor]:
        return [torch.zeros(1, dtype=torch.int32) for _ in self.shapes]


def _difference(ours: list[torch.Tensor], start: list[torch.Tensor], grads, momentum) -> float:
    """The largest distance, in update sizes, from torch's plain optimiser after one step."""
    twins = [torch.nn.Parameter(p.clone()) for p in start]
    if momentum is None:
        optimizer = torch.optim.AdamW(twins, lr=LR, weight_decay=DECAY, foreach=False)
    else:
        optimizer = torch.optim.SGD(twins, lr=LR, momentum=momentum, foreach=False)
    for twin, grad in zip(twins, grads):
        twin.grad = grad
    optimizer.step()
    worst = max(float((a - b).abs().max()) for a, b in zip(ours, twins) if a.numel())
    if not worst <= 1e-2 * LR:
        raise AssertionError(f"a step must be torch's within 1 % of lr, got {worst / LR:.2g} lr")
    return worst / LR


def torch_lines(p: Parameters) -> list[Line]:
    lines = []
    for name, make, size in (
        (BASELINE, lambda q: torch.optim.AdamW(q, lr=LR, weight_decay=DECAY, fused=True), 28),
        ("torch AdamW foreach",
         lambda q: torch.optim.AdamW(q, lr=LR, weight_decay=DECAY, foreach=True), 28),
        ("torch SGD fused", lambda q: torch.optim.SGD(q, lr=LR, momentum=0.9, fused=True), 20),
        ("torch SGD foreach", lambda q: torch.optim.SGD(q, lr=LR, momentum=0.9, foreach=True), 20),
    ):  # fmt: skip
        params = [torch.nn.Parameter(t.clone()) for t in p.params]
        for q, g in zip(params, p.grads):
            q.grad = g
        lines.append(Line(name, make(params).step, p.count, size * p.count))
    return lines


def bool_line(p: Parameters, name: str, density: float, masked: bool, momentum=None) -> Line:
    """Whole lists (no mask, or one that is true everywhere), or a random mask."""
    from nibblock import ops

    params, start = [t.clone() for t in p.params], p.params
    if masked:
        masks = [torch.rand(s, generator=p.gen) < density for s in p.shapes]
    else:
        masks = [torch.zeros(0, dtype=torch.bool) for _ in p.shapes]
    offsets = [ops.mask_offsets(m) for m in masks]
    counts = [int(m.sum()) if masked else t.numel() for m, t in zip(masks, params)]
    active = [m if masked else torch.ones(s, dtype=torch.bool) for m, s in zip(masks, p.shapes)]
    states = [[torch.zeros(n) for n in counts] for _ in range(2 if momentum is None else 1)]
    steps = p.steps()
    if momentum is None:
        more = dict(lr=LR, weight_decay=DECAY)
        op = ops.masked_adamw_bool_
    else:
        more = dict(lr=LR, momentum=momentum)
        op = ops.masked_sgd_bool_

    def run():
        op(params, p.grads, masks, offsets, *states, steps, **more)

    def check():
        run()
        at = [(a[m], b[m], g[m]) for a, b, g, m in zip(params, start, p.grads, active)]
        for a, b, m in zip(params, start, active):
            assert torch.equal(a[~m], b[~m])
        return _difference(*zip(*at), momentum)

    moved = sum(counts)
    # Partly active chunks are read whole: parameters, gradients and the mask.
    whole = density < 1
    per = (28 if momentum is None else 20) * moved
    if whole:
        per = 16 * moved + (4 + 4 + 4 + 1) * p.count
    return Line(name, run, moved, per, check)


def block_line(p: Parameters, density: float) -> Line:
    """Packed blocks, written through to the dense weights."""
    from nibblock import ops
    from nibblock.sparse._choose import read_blocks

    weights = [t.clone() for t in p.params]
    blocks = [p.blocks(shape, density) for shape in p.shapes]
    start = [read_blocks(w, b, BLOCK) for w, b in zip(weights, blocks)]
    values = [v.clone() for v in start]
    grads = [p.normal(v.shape) for v in values]
    states = [[torch.zeros_like(v) for v in values] for _ in range(2)]
    ages = [torch.zeros(len(b), dtype=torch.int32) for b in blocks]

    def run():
        ops.masked_adamw_block_(
            values, grads, *states, ages, weights, blocks, block=BLOCK, lr=LR, weight_decay=DECAY
        )

    def check():
        run()
        for w, b, v, old in zip(weights, blocks, values, p.params):
            assert torch.equal(read_blocks(w, b, BLOCK), v)
            assert int((w != old).sum()) <= v.numel()
        return _difference(values, start, grads, None)

    moved = sum(v.numel() for v in values)
    # 28 as a dense step, and the weight's line: read for ownership and written, or only written
    # where it goes past the caches; the floor is the latter.
    return Line(f"nibblock block {density:.0%}", run, moved, 32 * moved, check)


def masked_layers(p: Parameters, density: float) -> list:
    """`MaskedLinear`s of the list, with gradients, and with weights that are in step."""
    import nibblock as nb

    layers = []
    for (n, k), weight in zip(p.shapes, p.params):
        linear = torch.nn.Linear(k, n, bias=False)
        linear.weight.copy_(weight)
        layers.append(
            nb.MaskedLinear.from_linear(linear, blocks=p.blocks((n, k), density), block=BLOCK)
        )
        layers[-1](torch.zeros(1, k))
        layers[-1].values.grad = p.normal(layers[-1].values.shape)
    return layers


def optimizer_line(p: Parameters, density: float) -> Line:
    """The same as a training loop has it: `MaskedAdamW.step` on `MaskedLinear`s."""
    import nibblock as nb

    layers = masked_layers(p, density)
    values = [layer.values for layer in layers]
    start = [v.detach().clone() for v in values]
    optimizer = nb.optim.MaskedAdamW(values, lr=LR, weight_decay=DECAY)

    def check():
        optimizer.step()
        worst = _difference([v.detach() for v in values], start, [v.grad for v in values], None)
        for layer, old in zip(layers, p.params):
            assert int((layer.weight != old).sum()) <= layer.values.numel()
        optimizer.step()  # with the same gradients: from here on states are kept together
        return worst

    moved = sum(v.numel() for v in values)
    return Line(f"nibblock MaskedAdamW block {density:.0%}", optimizer.step, moved, 32 * moved,
                check)  # fmt: skip


def muon_lines(p: Parameters, density: float) -> list[Line]:
    """`MaskedMuon.step`, and its directions alone: ours, and by torch's batched products."""
    import nibblock as nb
    from nibblock.ops.muon_direction import orthogonalised

    layers = masked_layers(p, density)
    values = [layer.values for layer in layers]
    optimizer = nb.optim.MaskedMuon(values, lr=LR, momentum=0.0, nesterov=False)
    grads = [v.grad for v in values]
    size = LR * 0.2 * BLOCK**0.5
    start = [v.detach().clone() for v in values]

    def check():
        optimizer.step()
        worst = 0.0
        for v, old, g in zip(values, start, grads):
            wanted = old.double() - size * orthogonalised(g.double(), 5)
            worst = max(worst, float((v.detach() - wanted).abs().max()) / LR)
        if not worst <= 1e-2:
            raise AssertionError(f"a step must be the formula's within 1 % of lr, got {worst:.2g}")
        for layer, old in zip(layers, p.params):  # and the layers live as long as their line
            assert int((layer.weight != old).sum()) <= layer.values.numel()
        optimizer.param_groups[0].update(momentum=0.8, nesterov=True)
        optimizer.step()
        optimizer.step()  # with the same gradients: from here on states are kept together
        return worst

    moved = sum(v.numel() for v in values)
    joined = torch.cat(grads)
    return [
        Line(f"nibblock MaskedMuon block {density:.0%}", optimizer.step, moved, 32 * moved, check),
        Line(f"nibblock Muon directions {density:.0%}",
             lambda: nb.ops.muon_direction([joined], []), moved, 8 * moved),
        Line(f"torch Muon directions {density:.0%}", lambda: orthogonalised(joined, 5), moved,
             8 * moved),
    ]  # fmt: skip


def flat_line(p: Parameters, density: float, packed: bool) -> Line:
    """Random positions; gradients packed, or as dense as the parameter."""
    from nibblock import ops

    params = [t.clone() for t in p.params]
    index = [
        (torch.rand(t.numel(), generator=p.gen) < density).nonzero().squeeze(1).int()
        for t in params
    ]
    grads = [g.flatten()[i] for g, i in zip(p.grads, index)] if packed else p.grads
    states = [[torch.zeros(len(i)) for i in index] for _ in range(2)]
    steps = p.steps()

    def run():
        ops.masked_adamw_flat_(params, grads, index, *states, steps, lr=LR, weight_decay=DECAY)

    def check():
        run()
        at = [t.flatten()[i] for t, i in zip(params, index)]
        old = [t.flatten()[i] for t, i in zip(p.params, index)]
        return _difference(at, old, [g.flatten()[i] for g, i in zip(p.grads, index)], None)

    moved = sum(len(i) for i in index)
    lines = (1 - (1 - density) ** 16) * p.count * 4
    per = 2 * lines + 20 * moved + (4 * moved if packed else lines)
    name = f"nibblock flat {density:.0%}, {'packed' if packed else 'dense'} gradients"
    return Line(name, run, moved, per, check)


def make_lines(p: Parameters, quick: bool) -> list[Line]:
    lines = torch_lines(p)
    if quick:
        lines = lines[:1]
    lines += [
        bool_line(p, "nibblock dense", 1.0, False),
        bool_line(p, "nibblock dense, mask all true", 1.0, True),
        block_line(p, 0.10),
        block_line(p, 0.01),
        optimizer_line(p, 0.10),
        optimizer_line(p, 0.01),
        flat_line(p, 0.01, True),
        flat_line(p, 0.01, False),
    ]
    if not quick:
        lines += [
            bool_line(p, "nibblock mask 10%", 0.1, True),
            bool_line(p, "nibblock SGD dense", 1.0, False, 0.9),
            *muon_lines(p, 0.10),
            *muon_lines(p, 0.01),
        ]
    return lines


class Evict:
    """A buffer larger than the last-level cache; passing over it leaves nothing else there."""

    def __init__(self) -> None:
        self.buffer = torch.zeros((last_level_cache() * 5 // 4 + 32 * MIB) // 4)

    def __call__(self) -> None:
        self.buffer.add_(1.0)


def run_list(name: str, quick: bool, threads: int, evict: Evict, budget: float) -> dict[str, Any]:
    """Times every line, cold and resident, each checked first."""
    p = Parameters(LISTS[name])
    lines = make_lines(p, quick)
    tiny = make_lines(Parameters([(BLOCK, BLOCK)]), quick)
    errors = {line.name: line.check() if line.check else 0.0 for line in lines}

    def cold(line: Line, small: Line) -> Callable[[int], float]:
        def call(_: int) -> float:
            evict()
            small.run()
            start = time.perf_counter()
            line.run()
            return time.perf_counter() - start

        return call

    contenders = [
        Contender(f"cold {c.name}", cold(c, t), measure=True) for c, t in zip(lines, tiny)
    ]
    # What p, g, m and v occupy, changed in place: the same bytes after the same eviction.
    streams = native().Bandwidth(16 * p.count)

    def update(_: int) -> float:
        evict()
        wait_until_idle()  # the pool that evicted would spin beside these threads
        return streams.update(threads, 0)

    contenders.append(Contender("ceiling update", update, pool="native", measure=True))
    timings = interleave(contenders, rounds=25, budget=budget)
    again = [Contender(c.name, lambda _, c=c: c.run()) for c in lines]
    timings.update(interleave(again, rounds=25, budget=budget))
    return {
        "list": name,
        "tensors": len(p.shapes),
        "parameters": p.count,
        "ceilings": {"update": _figures(timings["ceiling update"])},
        "lines": {
            line.name: {
                "entries": line.entries,
                "floor_bytes": line.floor_bytes,
                # The most that memory allows over a dense step of 28 bytes an entry.
                "ceiling_ratio": 28 * p.count / line.floor_bytes,
                "error_in_lr": errors[line.name],
                "cold": _seconds(timings[f"cold {line.name}"]),
                "resident": _seconds(timings[line.name]),
            }
            for line in lines
        },
    }
