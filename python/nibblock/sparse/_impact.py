"""`select_blocks`: which blocks of a model are worth training."""

from __future__ import annotations

import time
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, Callable, Optional, Union

import torch
from torch import nn

from nibblock import ops as _ops
from nibblock._config import Where
from nibblock._progress import Progress, ProgressOption
from nibblock.nn import AdapterLinear, Int4Linear
from nibblock.ops import _block_checks
from nibblock.ops.block_scores import MOST_SAMPLES
from nibblock.sparse import _choose, _cost, _gain
from nibblock.sparse._selection import Selection
from nibblock.sparse._spread import Spread
from nibblock.sparse._taps import Site, Taps, find_sites, targets_of, undisturbed

METHODS = ("impact", "movement", "magnitude", "random")
MODES = ("gain", "sketch", "exact")
LossFn = Callable[[nn.Module, Any], torch.Tensor]


def select_blocks(
    model: nn.Module,
    batches: Optional[Iterable[Any]],
    loss_fn: Optional[LossFn],
    density: float = 0.02,
    block: int = 32,
    method: str = "impact",
    *,
    where: Where = None,
    skip: Union[str, Iterable[str]] = (),
    mode: str = "gain",
    samples: int = 4,
    shards: int = 2,
    robust: float = 1.0,
    normalize: str = "none",
    spread: Union[float, str, None] = "auto",
    budget: Optional[float] = None,
    seed: int = 0,
    progress: ProgressOption = None,
    cost: Optional[_cost.CostModel] = None,
) -> Selection:
    """Chooses the blocks of a model's linears that a fine-tuning should train.

        impact      (sum_t z_t)^2 / sum_t z_t^2, z_t = g_tI^T D x_tJ of token t: how much the loss
                    falls by the block's best step along D, the sign of its gradient in the other
                    half of each batch; or mean over batches of ||g_I^T x_J||_F^2: by a small step
        movement    |mean over batches of <W_IJ, g_I^T x_J>|: what removing the block would change
        magnitude   ||W_IJ||_F^2
        random      a uniform number

    The scores of all layers are compared with each other; the best `density` of all blocks win,
    those of impact under the caps of `spread`.
    Of norms and movement batches are dealt to shards, each shard's scores are scaled to the same
    total, and a block's score is mean - robust * standard deviation over the shards: one lucky
    batch is not enough. A gain is crossed already: no token takes part in its own direction.

    With a `budget` the blocks and the depth of the backward are chosen together: for every layer,
    the best blocks at or above it that the time buys, and of these choices the one with the largest
    total score. A step pays the forward of all layers, the input gradients above the lowest trained
    layer, and each block's gradient and update.

    Args:
        model: any module tree: `nn.Linear`s, `Int4Linear`s, `AdapterLinear`s or
            `MaskedLinear`s, frozen or not. It runs as it is, in evaluation mode; parameters,
            gradients, modes, hooks and torch's random state are as before afterwards.
        batches: what `loss_fn` takes, one after the other; 8 to 32 small ones are plenty. None for
            magnitude and random without a budget. A gain wants some hundred tokens in each; a
            linear that sees a single row of every batch scores 0.
        loss_fn: (model, batch) -> scalar loss; must call the model with gradients enabled.
        density: share of all blocks of the targeted linears, in (0, 1]; with a budget, at most.
        block: B, one of 16, 32, 64, 128.
        method: "impact", "movement", "magnitude" or "random".
        where, skip: which linears are targets, as in `accelerate`. Left out as well, with the
            reason in `Selection.skipped`: linears that cannot be trained by blocks (transformers'
            `Conv1D`s until the model is accelerated), and, unless `where` is given, weights tied to
            another module's, such as a head's.
        mode: how impact is measured. "gain": what the block's own best step wins; it beats random
            blocks at the learning rates that suit them too, if by little. "sketch" and "exact":
            the squared norm of its gradient, estimated or computed; ahead at small rates, and the
            cheapest.
        samples: random combinations of columns that a sketch looks at, 1 to 32.
        shards: of norms and movement: how many the batches are dealt to; at most one a batch.
        robust: how many of the shards' standard deviations to subtract; 0 for the mean.
        normalize: "none", or "layer" to divide a layer's scores by the root of their mean.
        spread: of impact: a layer, and each block row and block column of a layer, gets at most so
            many times its even share (rounded up) before any other gets more, but for blocks
            that nearly all tokens ask for, or whose gain is beyond comparison with the rest's. None
            for the best scores wherever they are: they crowd into the columns of a few input
            features with large activations, where each adds little to the others. "auto": 1 for a
            gain, None for norms.
        budget: a training step's time as a share of full fine-tuning's, or None.
        seed: of the sketch, of random scores, and of torch's generator while loss_fn runs.
        progress: None for a bar on a terminal and one line elsewhere, False for silence, or a
            callable (batches done, batches).
        cost: the machine's constants for `budget` and `Selection.predicted_time`; None measures, on
            the CPU. Of a model on a GPU there is no predicted time without it.
    Returns:
        A `Selection`.
    Raises:
        TypeError: model is not a module. ValueError: an argument out of range, no target, no batch,
        a loss that is no finite scalar or does not reach any target, an input that is changed in
        place, scores that are not finite, a budget that no choice meets, or one without `cost` for
        a model on a GPU.
    Determinism: without a budget, the same arguments give the same blocks at one ISA level, at any
        number of threads, as far as torch's own products do; times are measured.
    Memory: 4 bytes a block and shard for each statistic (a gain has two and no shards), 1 / B^2 of
        the dense gradients; and the inputs of the targeted linears, as in any training step.
    Source: the gain is the Newton decrement along Adam's first step with the empirical Fisher
        information as curvature; block norms of the gradient as importance: the gradient-based
        selection found best among eight in arXiv:2412.13488, by blocks as in arXiv:2405.15525;
        movement: arXiv:2005.07683; choosing depth and parameters by time: the idea of
        arXiv:2309.13192.
    Example:
        >>> def loss_fn(model, batch):
        ...     return model(input_ids=batch, labels=batch).loss
        >>> selection = nb.select_blocks(model, batches, loss_fn, density=0.02)
        >>> print(selection)
        >>> nb.add_adapters(model, nb.AdapterConfig(), blocks=selection)
    """
    op = "select_blocks"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    _check_options(op, density, block, method, mode, samples, shards, robust, normalize, budget)
    if spread == "auto":
        spread = 1.0 if mode == "gain" else None
    if spread is not None and (isinstance(spread, str) or not spread >= 1):
        raise ValueError(f'{op}: spread must be at least 1, None or "auto", got {spread!r}')
    sites = find_sites(op, model, where, skip)
    targets_of(op, sites, "select from")
    scored = method in ("impact", "movement")
    if not isinstance(batches, (Iterable, type(None))):
        raise TypeError(f"{op}: batches must be iterable or None, got {type(batches).__name__}")
    found = [] if batches is None else list(batches)
    if scored or budget is not None:
        if not found:
            raise ValueError(f"{op}: batches must hold at least one for {method}, got none")
        if not callable(loss_fn):
            raise TypeError(f"{op}: loss_fn must be callable, got {type(loss_fn).__name__}")
    away = next((p.device.type for p in model.parameters() if p.device.type != "cpu"), "")
    if budget is not None and cost is None and away:
        raise ValueError(
            f"{op}: cost must be given for a budget of a model on {away}, got None; "
            f"nibblock.sparse.CostModel(flops, bandwidth) holds that device's constants"
        )
    start = time.perf_counter()
    run = _Run(op, model, sites, block, method, mode, samples, seed)
    if run.gain:
        scores = run.score_gain(found, loss_fn, normalize, progress)
    elif scored:
        scores = run.score(found, loss_fn, min(shards, len(found)), robust, normalize, progress)
    else:
        if budget is not None:
            run.look(found[0], loss_fn)
        scores = run.score_weights(normalize)
    options = {
        "density": density, "mode": mode, "samples": samples, "shards": shards, "robust": robust,
        "normalize": normalize, "spread": spread, "budget": budget, "seed": seed,
        "batches": len(found),
    }  # fmt: skip
    spread = spread if method == "impact" else None
    selection = _choose_blocks(
        op, model, sites, scores, block, method, density, budget, cost, run, spread
    )
    selection.options = options
    selection.seconds = time.perf_counter() - start
    selection.bytes = run.bytes
    return selection


def _check_options(op, density, block, method, mode, samples, shards, robust, normalize, budget):
    _choose.check_density(op, density)
    _block_checks.check_block(op, block)
    for name, value, known in (
        ("method", method, METHODS),
        ("mode", mode, MODES),
        ("normalize", normalize, ("none", "layer")),
    ):
        if value not in known:
            raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}")
    for name, value, kind in (
        ("samples", samples, Integral),
        ("shards", shards, Integral),
        ("robust", robust, Real),
        ("budget", 1 if budget is None else budget, Real),
    ):
        if not isinstance(value, kind):
            need = "int" if kind is Integral else "float"
            raise TypeError(f"{op}: {name} must be {need}, got {type(value).__name__}")
    if not 1 <= samples <= MOST_SAMPLES:
        raise ValueError(f"{op}: samples must be in 1 .. {MOST_SAMPLES}, got {samples}")
    if shards < 1:
        raise ValueError(f"{op}: shards must be at least 1, got {shards}")
    if not robust >= 0:
        raise ValueError(f"{op}: robust must be at least 0, got {robust}")
    if budget is not None and not budget > 0:
        raise ValueError(f"{op}: budget must be above 0, got {budget}")


class _Run:
    """The passes over a model: statistics by site and shard, rows and levels, times."""

    def __init__(self, op, model, sites: list[Site], block, method, mode, samples, seed) -> None:
        self.op, self.model, self.sites = op, model, sites
        self.block, self.method, self.seed = block, method, seed
        self.samples = samples if mode == "sketch" else 0
        self.gain = method == "impact" and mode == "gain"
        self.bytes = 0
        self.forward = (0.0, 0.0)  # seconds of the fastest, and its linears' share of them
        self.agreed: dict[str, torch.Tensor] = {}  # by the gain
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._calls = 0

    def _zeros(self, site: Site, device: Optional[torch.device] = None) -> torch.Tensor:
        size = site.grid(self.block)
        out = torch.zeros((2, *size) if self.gain else size, dtype=torch.float32, device=device)
        self.bytes += out.nbytes
        return out

    # --- from gradients --------------------------------------------------------------------------

    def score(self, batches, loss_fn, shards, robust, normalize, progress):
        sums: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
        counts = [len(batches[i::shards]) for i in range(shards)]
        targets = [site for site in self.sites if not site.reason]
        self._pass(batches, loss_fn, sums, targets, progress)
        for site in targets:
            for shard in sums:
                if site.name not in shard:
                    shard[site.name] = self._zeros(site)
        means = [
            {name: s.to("cpu", torch.float64) / count for name, s in shard.items()}
            for shard, count in zip(sums, counts)
        ]
        for site in targets:
            for shard in means:
                if not torch.isfinite(shard[site.name]).all():
                    raise ValueError(f"{self.op}: scores must be finite, got NaN or Inf in "
                                     f"{site.name}")  # fmt: skip
        return _combine(means, [site.name for site in targets], robust, normalize, self.method)

    def score_gain(self, batches, loss_fn, normalize, progress):
        sums: dict[str, torch.Tensor] = {}
        targets = [site for site in self.sites if not site.reason]
        self._pass(batches, loss_fn, [sums], targets, progress)
        out = {}
        for site in targets:
            both = sums[site.name] if site.name in sums else self._zeros(site)
            if not torch.isfinite(both).all():
                raise ValueError(f"{self.op}: scores must be finite, got NaN or Inf in {site.name}")
            out[site.name] = _gain.best_gain(*both.to("cpu", torch.float64))
            self.agreed[site.name] = _gain.agreed(out[site.name], self._tokens.get(site.name, 0))
        if not any(score.any() for score in out.values()):
            raise ValueError(
                f"{self.op}: batches must give some linear two rows or more for the mode gain, "
                f"and halves of them that agree on a step, got none; give larger batches, or "
                f'mode="sketch", which takes single rows'
            )
        return _combine([out], list(out), 0.0, normalize, self.method)

    def _pass(self, batches, loss_fn, sums, targets, progress) -> None:
        """Forward and backward of every batch; their statistics go to `sums` in turn."""
        bar = Progress(progress, len(batches), "nibblock: scoring", "batches")
        taps = Taps(self.op, self.sites, self._receive)
        finished = False
        try:
            with undisturbed(self.model, self.seed), taps.open():
                for i, batch in enumerate(batches):
                    self._sums = sums[i % len(sums)]
                    taps.begin()
                    begun = time.perf_counter()
                    loss = self._loss(loss_fn, batch, i)
                    took = (time.perf_counter() - begun, taps.linear_seconds)
                    if loss.device.type == "cpu":  # elsewhere the clock saw launches alone
                        self.forward = min(took, self.forward) if i else took
                    self._backward(loss, taps, targets)
                    taps.finish()
                    bar.step()
            finished = True
        finally:
            bar.close(finished)

    def _loss(self, loss_fn, batch, i) -> torch.Tensor:
        loss = loss_fn(self.model, batch)
        if not isinstance(loss, torch.Tensor):
            raise TypeError(f"{self.op}: loss_fn must return a Tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"{self.op}: loss_fn must return a scalar, got {list(loss.shape)}")
        if not torch.isfinite(loss.detach()).all():
            raise ValueError(f"{self.op}: loss must be finite, got {loss.item()} for batch {i}")
        return loss

    def _backward(self, loss, taps: Taps, targets) -> None:
        if loss.requires_grad:
            # Only towards the anchor: no Parameter's .grad is touched.
            torch.autograd.grad(loss.reshape(()), [taps.anchor], allow_unused=True)
        if not taps.reached:
            raise ValueError(
                f"{self.op}: loss must depend on one of the {len(targets)} targeted linears with "
                f"gradients enabled, got a loss without such a gradient"
            )

    def _receive(self, site: Site, grad: torch.Tensor, x: torch.Tensor) -> None:
        sums = self._sums.get(site.name)
        if sums is None:
            sums = self._sums[site.name] = self._zeros(site, grad.device)
        if self.gain:
            _ops.block_gain_(sums[0], sums[1], grad, x, block=self.block)
            rows = grad.numel() // max(1, grad.shape[-1])
            self._tokens[site.name] = self._tokens.get(site.name, 0) + rows
        elif self.method == "movement":
            # The op adds both statistics; the norms are not used here.
            _ops.block_scores_(
                torch.zeros_like(sums), sums, grad, x, weight_of(site.module), block=self.block
            )
        else:
            self._calls += 1
            seed = (self.seed * 0x9E3779B1 + self._calls) % 2**63
            _ops.block_scores_(
                sums, None, grad, x, block=self.block, sketch=self.samples, seed=seed
            )

    # --- without gradients -----------------------------------------------------------------------

    def look(self, batch, loss_fn) -> None:
        """One forward, for rows and levels."""
        taps = Taps(self.op, self.sites, None)
        with undisturbed(self.model, self.seed), taps.open(), torch.no_grad():
            begun = time.perf_counter()
            loss_fn(self.model, batch)
            self.forward = (time.perf_counter() - begun, taps.linear_seconds)

    def score_weights(self, normalize):
        generator = torch.Generator().manual_seed(self.seed)
        means = {}
        for site in self.sites:
            if site.reason:
                continue
            self._zeros(site)
            if self.method == "random":
                means[site.name] = torch.rand(
                    site.grid(self.block), generator=generator, dtype=torch.float64
                )
                continue
            norms = _choose.block_norms(weight_of(site.module), self.block)
            if not torch.isfinite(norms).all():
                raise ValueError(f"{self.op}: weight must be finite, got NaN or Inf in {site.name}")
            means[site.name] = norms
        return _combine([means], list(means), 0.0, normalize, self.method)


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight [N, K] that a linear multiplies with now, without gradient.

    That of an `Int4Linear` is dequantised, that of an `AdapterLinear` summed up: a new tensor, one
    layer's at a time.
    """
    if isinstance(module, AdapterLinear):
        return module.dense()
    return module.dequantize() if isinstance(module, Int4Linear) else module.weight.detach()


def _combine(means, names, robust, normalize, method) -> dict[str, torch.Tensor]:
    """One score a block from the shards' means."""
    totals = [sum(float(shard[name].abs().sum()) for name in names) for shard in means]
    average = sum(totals) / len(totals)
    out = {}
    for name in names:
        stack = torch.stack(
            [
                shard[name] * (average / total if total > 0 else 0.0)
                for shard, total in zip(means, totals)
            ]
        )
        spread = stack.std(0, correction=0)
        middle = stack.mean(0).abs() if method == "movement" else stack.mean(0)
        score = middle - robust * spread
        if normalize == "layer":
            mean = float(middle.mean())
            score = score / mean**0.5 if mean > 0 else score
        out[name] = score
    return out


def as_selection(
    sites: list[Site], scores: dict[str, torch.Tensor], block: int, method: str, density: float
) -> Selection:
    """The best `density` of all blocks as a `Selection`, without a forward's account of time."""
    targets = [site for site in sites if site.name in scores]
    if not any(site.level >= 0 for site in sites):
        for level, site in enumerate(sites):
            site.level = level
    flat = torch.cat([scores[site.name].flatten() for site in targets])
    chosen = _best(flat, _choose.block_count(1, len(flat), density))
    sizes = [scores[site.name].numel() for site in targets]
    return _selection(sites, targets, scores, sizes, chosen, block, method, None)


def _best(flat: torch.Tensor, count: int, pick=None) -> torch.Tensor:
    """The places of the largest scores, sorted; of equal scores the first."""
    order = torch.sort(flat, descending=True, stable=True).indices
    return (order[:count] if pick is None else pick(order, count)).sort().values


def _choose_blocks(op, model, sites, scores, block, method, density, budget, cost, run, spread):
    """Compares the blocks of all layers and makes a `Selection` of the best."""
    seen = any(site.level >= 0 for site in sites)
    if not seen:  # no forward: the order of the tree stands for depth
        for level, site in enumerate(sites):
            site.level = level
    targets = sorted(
        (site for site in sites if not site.reason), key=lambda s: (s.level < 0, s.level)
    )
    layers = [
        _cost.LayerCost(s.level, s.rows if seen else 1, s.shape[0] * s.shape[1])
        for s in sites
        if s.level >= 0
    ]
    flat = torch.cat([scores[s.name].flatten() for s in targets])
    sizes = [scores[s.name].numel() for s in targets]
    count = _choose.block_count(1, len(flat), density)
    step = None
    if seen and (cost is not None or budget is not None or run.forward[0] > 0):
        machine = cost
        if machine is None:
            machine = _cost.as_seen(_cost.CostModel.measure(), layers, *run.forward)
        step = _cost.StepCost(machine, layers, _parameters(model, sites), block)
    pick = None
    if spread is not None:
        agreed = torch.cat([run.agreed[s.name].flatten() for s in targets]) if run.gain else None
        pick = Spread([s.grid(block) for s in targets], spread, flat, agreed).pick
    if budget is None:
        chosen = _best(flat, count, pick)
    else:
        repeats = torch.tensor(sizes)
        levels = torch.tensor([s.level for s in targets]).repeat_interleave(repeats)
        costs = torch.tensor([step.of_block(s.rows) for s in targets], dtype=torch.float64)
        fixed = {s.level: step.forward + step.above(s.level) for s in targets if s.level >= 0}
        chosen = _cost.best_under_budget(
            flat, levels, costs.repeat_interleave(repeats), count, fixed, budget * step.full, pick
        )
        if not len(chosen):
            least = (min(fixed.values()) + float(costs.min())) / step.full
            raise ValueError(
                f"{op}: budget must be at least {least:.3g} of a full step for this model, got "
                f"{budget}"
            )
    return _selection(sites, targets, scores, sizes, chosen, block, method, step)


def _selection(sites, targets, scores, sizes, chosen, block, method, step) -> Selection:
    blocks, start = {}, 0
    for site, size in zip(targets, sizes):
        here = chosen[(chosen >= start) & (chosen < start + size)] - start
        start += size
        if len(here):
            columns = site.grid(block)[1]
            blocks[site.name] = torch.stack([here // columns, here % columns], 1).to(torch.int32)
    trained = [site for site in targets if site.name in blocks]
    first = trained[0] if trained else None
    out = Selection(
        blocks=blocks,
        scores={site.name: scores[site.name].float() for site in targets},
        shapes={site.name: site.shape for site in targets},
        block=block,
        method=method,
        first=first.name if first else "",
        skipped={site.name: site.reason for site in sites if site.reason},
    )
    if first is None:
        return out
    if step is None:
        layers = [_cost.LayerCost(s.level, 1, s.shape[0] * s.shape[1]) for s in sites]
        step = _cost.StepCost(_cost.CostModel(1.0, 1.0), layers, 0, block)
        out.depth_cut = step.depth_cut(first.level)
        return out
    out.depth_cut = step.depth_cut(first.level)
    time_ = step.forward + step.above(first.level)
    time_ += sum(len(blocks[s.name]) * step.of_block(s.rows) for s in trained)
    out.predicted_time = time_ / step.full
    return out


def _parameters(model: nn.Module, sites: list[Site]) -> int:
    """How many numbers full fine-tuning would train: a weight in 4 bits counts as a dense one."""
    dense = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    packed = [s for s in sites if isinstance(getattr(s.module, "base", s.module), Int4Linear)]
    return dense + sum(s.shape[0] * s.shape[1] for s in packed)
