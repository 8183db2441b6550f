"""Other blocks in the middle of a training: the least changed ones go, the most wanted ones come,
and the others keep their optimiser's memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

import torch
from torch import nn

from nibblock import ops as _ops
from nibblock.nn import MaskedLinear
from nibblock.sparse import _choose
from nibblock.sparse._impact import select_blocks
from nibblock.sparse._layers import (
    Optimizer,
    Sparse,
    change_norms,
    put_blocks,
    sparse_layers,
)
from nibblock.sparse._taps import Site, Taps, undisturbed

LossFn = Callable[[nn.Module, Any], torch.Tensor]


@dataclass
class Exchange:
    """What a re-selection did.

    Attributes:
        dropped, grown: layer name -> int32 [Z, 2], for layers that lost or got any.
        count: blocks afterwards.
    """

    dropped: dict[str, torch.Tensor] = field(default_factory=dict)
    grown: dict[str, torch.Tensor] = field(default_factory=dict)
    count: int = 0

    def __str__(self) -> str:
        lost = sum(len(index) for index in self.dropped.values())
        got = sum(len(index) for index in self.grown.values())
        return f"{lost} blocks dropped, {got} grown, {self.count} now"


def reselect(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Optional[Iterable[Any]],
    loss_fn: Optional[LossFn],
    rate: float = 0.2,
    *,
    warm: bool = False,
    dropped: str = "keep",
    mode: str = "sketch",
    samples: int = 4,
    seed: int = 0,
) -> Exchange:
    """Exchanges a share of the trained blocks: the least changed for those with the most impact.

    All layers are compared with each other, so a layer's number of blocks may change; the number in
    all does not: no more are exchanged than are free. Survivors keep values, optimiser state and
    age.

    Args:
        model: with `MaskedLinear`s or active `AdapterLinear`s, all of one block edge. No other
            layer gets blocks.
        optimizer: its state follows: `nibblock.optim` (ages block by block) or any of torch; or
            None.
        batches, loss_fn: what impact is computed from, as in `select_blocks`.
        rate: the share of blocks to exchange, in [0, 1]. 0 changes nothing at all.
        warm: new blocks begin with the optimiser's moments that these batches' mean gradient would
            have left (MaskedAdamW on a `MaskedLinear` only), instead of age 0.
        dropped: of a `MaskedLinear`: "keep" leaves what dropped blocks have learned in the weight,
            "restore" puts the original back. An `AdapterLinear`'s dropped blocks are gone.
        mode, samples, seed: as in `select_blocks`.
    Returns:
        An `Exchange`.
    Raises:
        TypeError, ValueError: as `select_blocks`; no such layers, several block edges, a rate out
        of range, or warm where there are no such states. Nothing has changed then.
    Determinism: the same arguments give the same blocks.
    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
        connectivity", 2018; growth by gradients: Evci et al., "Rigging the lottery", 2020; moments
        of new entries: Ansell et al., "Scaling sparse fine-tuning", 2024. Here by blocks.
    """
    op = "reselect"
    layers = sparse_layers(op, model)
    _check(op, rate, dropped, layers)
    count = sum(len(layer.values) for layer in layers.values())
    number = min(round(rate * count), _places(layers) - count)
    if number == 0:
        return Exchange(count=count)
    batches = list(batches) if batches is not None else []
    if warm:
        _check_warm(op, optimizer, layers)
    scores = _scores(model, layers, batches, loss_fn, mode, samples, seed)
    lost = _least_changed(layers, number)
    return _exchange(model, optimizer, layers, lost, scores, number, dropped, warm,
                     batches, loss_fn, seed)  # fmt: skip


def resize(
    model: nn.Module,
    optimizer: Optimizer,
    density: float,
    batches: Optional[Iterable[Any]] = None,
    loss_fn: Optional[LossFn] = None,
    *,
    warm: bool = False,
    dropped: str = "keep",
    mode: str = "sketch",
    samples: int = 4,
    seed: int = 0,
) -> Exchange:
    """Trains more blocks, or fewer: what a `CubicSchedule` asks for.

    More: those of largest impact, from batches. Fewer: the least changed go.

    Args:
        density: share of all blocks of the model's layers with trainable blocks, in [0, 1].
        batches, loss_fn: needed to grow only.
        model, optimizer, warm, dropped, mode, samples, seed: as in `reselect`.
    Returns:
        An `Exchange`.
    Raises:
        TypeError, ValueError: as `reselect`.
    """
    op = "resize"
    layers = sparse_layers(op, model)
    _choose.check_density(op, density, zero=True)
    _check(op, 0.0, dropped, layers)
    have = sum(len(layer.values) for layer in layers.values())
    want = _choose.block_count(1, _places(layers), density)
    if want <= have:
        lost = _least_changed(layers, have - want)
        return _exchange(model, optimizer, layers, lost, {}, 0, dropped, False, [], None, seed)
    batches = list(batches) if batches is not None else []
    if warm:
        _check_warm(op, optimizer, layers)
    scores = _scores(model, layers, batches, loss_fn, mode, samples, seed)
    none = {name: torch.zeros(len(layer.values), dtype=torch.bool)
            for name, layer in layers.items()}  # fmt: skip
    return _exchange(model, optimizer, layers, none, scores, want - have, dropped, warm,
                     batches, loss_fn, seed)  # fmt: skip


# --- what goes, what comes ------------------------------------------------------------------------


def _grid(layer: Sparse) -> tuple[int, int]:
    return Site("", layer).grid(layer.block)


def _places(layers: dict[str, Sparse]) -> int:
    """How many blocks there could be in all."""
    return sum(rows * columns for rows, columns in map(_grid, layers.values()))


def _check(op, rate, dropped, layers) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{op}: rate must be in [0, 1], got {rate}")
    if dropped not in ("keep", "restore"):
        raise ValueError(f'{op}: dropped must be "keep" or "restore", got {dropped!r}')
    edges = sorted({layer.block for layer in layers.values()})
    if len(edges) > 1:
        raise ValueError(f"{op}: model must have blocks of one edge, got {edges}")
    for name, layer in layers.items():
        if dropped == "restore" and isinstance(layer, MaskedLinear) and layer.original is None:
            raise ValueError(f'{op}: {name} must keep its original for "restore", got none')


def _check_warm(op, optimizer, layers) -> None:
    from nibblock.optim import MaskedAdamW, MaskedMuon

    # Muon is AdamW for other Parameters only: its blocks have one momentum, and no second moment.
    if not isinstance(optimizer, MaskedAdamW) or isinstance(optimizer, MaskedMuon):
        raise ValueError(
            f"{op}: optimizer must be a MaskedAdamW to start warm, got {type(optimizer).__name__}"
        )
    for name, layer in layers.items():
        if not isinstance(layer, MaskedLinear):
            raise ValueError(
                f"{op}: {name} must be a MaskedLinear to start warm, got {type(layer).__name__}"
            )


def _scores(model, layers, batches, loss_fn, mode, samples, seed) -> dict[str, torch.Tensor]:
    chosen = select_blocks(
        model, batches, loss_fn, density=1.0, block=next(iter(layers.values())).block,
        where=list(layers), mode=mode, samples=samples, seed=seed, progress=False,
    )  # fmt: skip
    return chosen.scores


def _least_changed(layers: dict[str, Sparse], number: int) -> dict[str, torch.Tensor]:
    """The blocks of smallest change: layer name -> bool [Z]; of equal ones the last."""
    norms = [change_norms(layer).cpu().double() for layer in layers.values()]
    order = torch.sort(torch.cat(norms), descending=True, stable=True).indices
    lost = torch.zeros(len(order), dtype=torch.bool)
    lost[order[len(order) - number :]] = True
    return dict(zip(layers, lost.split([len(n) for n in norms])))


def _most_wanted(layers, scores, number: int) -> dict[str, torch.Tensor]:
    """The blocks of largest score among those that are not trained now: name -> int64 [n, 2]."""
    flat, places = [], []
    for name, layer in layers.items():
        free = torch.ones(_grid(layer), dtype=torch.bool)
        index = layer.blocks.cpu().long()
        free[index[:, 0], index[:, 1]] = False
        flat.append(scores[name][free].double())
        places.append(free.nonzero())
    order = torch.sort(torch.cat(flat), descending=True, stable=True).indices[:number]
    wanted = torch.zeros(sum(len(f) for f in flat), dtype=torch.bool)
    wanted[order] = True
    parts = wanted.split([len(f) for f in flat])
    return {name: place[part] for name, place, part in zip(layers, places, parts)}


def _exchange(
    model, optimizer, layers, lost, scores, number, dropped, warm, batches, loss_fn, seed
) -> Exchange:
    grown = _most_wanted(layers, scores, number) if number else {}
    gradients = _mean_gradients(model, layers, grown, batches, loss_fn, seed) if warm else {}
    out = Exchange()
    for name, layer in layers.items():
        old, gone = layer.blocks.cpu(), lost[name]
        new = grown.get(name, torch.empty(0, 2, dtype=torch.int64))
        if not gone.any() and not len(new):
            continue
        blocks, order = _ops.sort_blocks(torch.cat([old[~gone].long(), new]))
        put_blocks(layer, blocks.to(torch.int32), optimizer, dropped)
        if gone.any():
            out.dropped[name] = old[gone]
        if len(new):
            out.grown[name] = new.to(torch.int32)
            if warm:
                places = (order >= int((~gone).sum())).nonzero().flatten()
                given = gradients[name][order[places] - int((~gone).sum())]
                _warm_up(optimizer, layer, places, given, len(batches))
    out.count = sum(len(layer.values) for layer in layers.values())
    return out


# --- the optimiser's state of new blocks ----------------------------------------------------------


def _mean_gradients(model, layers, grown, batches, loss_fn, seed) -> dict[str, torch.Tensor]:
    """The mean gradient over batches of the listed blocks, and of no others: name -> [n, B, B]."""
    sites = [Site(name, layer) for name, layer in layers.items()]
    layouts, sums = {}, {}
    for name, layer in layers.items():
        sizes = (layer.out_features, layer.in_features, layer.block)
        layouts[name] = _ops.block_layout(grown[name], *sizes)
        sums[name] = torch.zeros(len(grown[name]), layer.block, layer.block)

    def receive(site, grad, x):
        sums[site.name] += _ops.block_weight_grad(
            grad, x.to(grad.dtype), layouts[site.name], block=site.module.block
        )

    taps = Taps("reselect", sites, receive)
    with undisturbed(model, seed), taps.open():
        for batch in batches:
            taps.begin()
            loss = loss_fn(model, batch)
            torch.autograd.grad(loss.reshape(()), [taps.anchor], allow_unused=True)
            taps.finish()
    return {name: total / len(batches) for name, total in sums.items()}


@torch.no_grad()
def _warm_up(optimizer, layer: MaskedLinear, places, gradient, steps: int) -> None:
    """The state that `steps` updates with this gradient leave: bias correction by age then gives
    the gradient and its square back."""
    state = optimizer.state.get(layer.values)
    if not state:
        return
    group = next(g for g in optimizer.param_groups if any(p is layer.values for p in g["params"]))
    beta1, beta2 = group["betas"]
    gradient = -gradient if group["maximize"] else gradient
    state["exp_avg"][places] = (1 - beta1**steps) * gradient
    state["exp_avg_sq"][places] = (1 - beta2**steps) * gradient.square()
    state["age"][places] = steps
