"""What passes a model's linears in one step: their inputs, and the gradients of their outputs.

Nothing is copied and no weight is asked for a gradient: a forward hook keeps a reference to the
input and puts a hook on the output tensor, which hands over both as soon as backward reaches it.
Where an output has no gradient (everything below it is frozen or stored in 4 bits), the graph is
made to begin there. Works on any module tree whose linears are called as modules.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Optional

import torch
from torch import nn

from nibblock import _accelerate as _tree
from nibblock._config import Where
from nibblock._ties import parameter_owners
from nibblock.nn import AdapterLinear, BlockSparseLinear, Int4Linear, MaskedLinear
from nibblock.nn._conv1d import KEPT_TRANSPOSED, conv1d_class, is_conv1d, linear_shape
from nibblock.ops import _block_checks


@dataclass
class Site:
    """One linear of a model.

    Attributes:
        name, module: where it is.
        reason: why it is not a target; empty if it is one.
        rows: rows of its input in the last step that passed it, all calls together.
        level: its depth in forward order; linears that read the same tensor share one. -1 until a
            forward has passed it.
    """

    name: str
    module: nn.Module
    reason: str = ""
    rows: int = 0
    level: int = -1

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return linear_shape(self.module)

    def grid(self, block: int) -> tuple[int, int]:
        """Block rows and columns."""
        return _block_checks.grid(*self.shape, block)


def find_sites(op: str, model: nn.Module, where: Where, skip) -> list[Site]:
    """Every linear of a model in the order of its tree; those that cannot or shall not be trained
    by blocks carry the reason."""
    patterns, wanted = _tree._patterns(skip, op), _tree._selector(where, op)
    sites = []
    owners = parameter_owners(model)
    for layer in _linears(model):
        module = layer.module
        if _tree._matches(layer.name, patterns):
            reason = "in skip"
        elif isinstance(module, BlockSparseLinear):
            reason = "block-sparse already"
        elif is_conv1d(module):
            reason = KEPT_TRANSPOSED
        elif isinstance(module, (AdapterLinear, MaskedLinear)):
            reason = ""
        elif isinstance(module, Int4Linear):
            reason = _tree._unfit_parent(layer)
        else:
            reason = _tree._unfit(layer)
        if not reason and not wanted(layer.name, module):
            reason = "not selected by where"
        if not reason and where is None:
            reason = _tied(module, owners)
        sites.append(Site(layer.name, module, reason))
    return sites


def targets_of(op: str, sites: list[Site], use: str) -> list[Site]:
    """The sites without a reason; a ValueError that tells one of the reasons if there is none."""
    targets = [site for site in sites if not site.reason]
    if not targets:
        left = f": {len(sites)} left out, {sites[0].name}: {sites[0].reason}" if sites else ""
        raise ValueError(f"{op}: model must hold a linear to {use}, got none{left}")
    return targets


def _linears(model: nn.Module) -> list[_tree._Layer]:
    kinds = (nn.Linear, AdapterLinear, *filter(None, (conv1d_class(),)))
    layers: dict[int, _tree._Layer] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        prefix, _, attribute = name.rpartition(".")
        parent = modules.get(prefix)
        if isinstance(module, kinds) and not isinstance(parent, AdapterLinear):
            layer = layers.setdefault(id(module), _tree._Layer(name, module, []))
            if name:
                layer.places.append((parent, attribute))
    return list(layers.values())


def _tied(module: nn.Module, owners) -> str:
    """Training a tied weight's blocks would change the other module too: only by the caller's
    wish."""
    base = module.base if isinstance(module, AdapterLinear) else module
    weight = base._parameters.get("packed" if isinstance(base, Int4Linear) else "weight")
    for name, other, _ in owners.get(id(weight), ()):
        if other is not base:
            return f"its weight is tied to {name}; name it in where to train it"
    return ""


class _Root(torch.autograd.Function):
    """y as it is, but with a gradient: of nothing that is kept."""

    @staticmethod
    def forward(ctx, y, anchor):
        return y.clone()  # not a view: models may change it in place

    @staticmethod
    def backward(ctx, grad):
        return None, None


class Taps:
    """Hooks on the linears of a model while `open` is entered.

    Attributes:
        linear_seconds: what the linears' forwards took since `begin`.

    Args:
        op: whose errors these are.
        sites: all linears; `receive` gets those without a reason.
        receive: (site, grad, x) with detached tensors [..., N] and [..., K], once for each site and
            step; a module that runs several times in a step gets all its rows together.
    """

    def __init__(
        self,
        op: str,
        sites: list[Site],
        receive: Optional[Callable[[Site, torch.Tensor, torch.Tensor], None]],
    ) -> None:
        self._op, self._sites, self._receive = op, sites, receive
        self.anchor = torch.zeros((), requires_grad=True)
        self.reached: set[int] = set()
        self._handles: list = []
        self._reset()

    def _reset(self) -> None:
        self._calls: dict[int, int] = {}
        self._seen: set[int] = set()
        self._parts: dict[int, list] = {}
        self._level, self._last = -1, None
        self._started: dict[int, float] = {}
        self.linear_seconds = 0.0  # of this step's forward
        self._backward = False

    @contextmanager
    def open(self) -> Iterator[Taps]:
        """Registers the hooks, and removes them whatever happens."""
        try:
            for index, site in enumerate(self._sites):
                start, end = self._start(index), self._hook(index, site)
                self._handles.append(site.module.register_forward_pre_hook(start))
                self._handles.append(site.module.register_forward_hook(end, with_kwargs=True))
            yield self
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._reset()

    def begin(self) -> None:
        """A new step: forward follows."""
        self._reset()

    def finish(self) -> None:
        """After backward: hands over the modules that ran more than once."""
        parts, self._parts = self._parts, {}
        for index, found in parts.items():
            grads, inputs = zip(*((g.flatten(0, -2), x.flatten(0, -2)) for g, x in found))
            self._receive(self._sites[index], torch.cat(grads), torch.cat(inputs))
        self._reset()

    def _start(self, index: int):
        def hook(module, args):
            self._started[index] = time.perf_counter()

        return hook

    def _hook(self, index: int, site: Site):
        def hook(module, args, kwargs, output):
            if self._backward and index in self._calls:
                # A checkpoint computes its part again: seen already, but the graph must be the
                # same.
                return output if output.requires_grad else _Root.apply(output, self.anchor)
            self.linear_seconds += time.perf_counter() - self._started[index]
            x = args[0] if args else next(iter(kwargs.values()))
            self._place(site, index, x)
            if site.reason or self._receive is None or not torch.is_grad_enabled():
                return None
            self._calls[index] = self._calls.get(index, 0) + 1
            tapped = output if output.requires_grad else _Root.apply(output, self.anchor)
            version = x._version
            kept = x.detach()
            tapped.register_hook(lambda grad: self._arrive(index, grad, kept, version))
            return tapped

        return hook

    def _place(self, site: Site, index: int, x: torch.Tensor) -> None:
        rows = x.numel() // max(1, x.shape[-1])
        same = (x.data_ptr(), x._version, tuple(x.shape))
        if self._last != same:
            self._level += 1
        # Alive while its address is compared: a freed tensor's may come again.
        self._last, self._alive = same, x
        if index not in self._seen:
            self._seen.add(index)
            site.level, site.rows = self._level, 0
        site.rows += rows

    def _arrive(self, index, grad, x, version) -> None:
        self._backward = True
        site = self._sites[index]
        self.reached.add(index)
        if x._version != version:
            raise ValueError(
                f"{self._op}: {site.name} must keep its input unchanged until backward, got one "
                f"that was changed in place"
            )
        grad = grad.detach()
        if grad.dtype == torch.float64:
            grad = grad.float()
        if x.dtype == torch.float64:
            x = x.float()
        if self._calls[index] == 1:
            self._receive(site, grad, x)
        else:
            self._parts.setdefault(index, []).append((grad, x))


def _of_gpu(index: int) -> torch.Generator:
    return torch.cuda.default_generators[index]


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Runs a model without leaving a trace: nothing asks for gradients, dropout and running
    statistics are off, random numbers come from `seed`. Flags, modes and generators are put back,
    whatever happens."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    gpus = sorted({p.device.index for p, _ in flags if p.is_cuda})
    try:
        with torch.random.fork_rng(devices=gpus), torch.enable_grad():
            for generator in (torch.default_generator, *map(_of_gpu, gpus)):
                generator.manual_seed(seed)
            for parameter, asks in flags:
                if asks:
                    parameter.requires_grad_(False)
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for parameter, asks in flags:
            parameter.requires_grad_(asks)
        for module, mode in modes:
            module.training = mode
