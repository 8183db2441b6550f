"""The hooks and profiler marks around a masked step, beside those of torch's own optimisers."""

from __future__ import annotations

import nibblock as nb
import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

KINDS = [nb.optim.MaskedAdamW, nb.optim.MaskedSGD, nb.optim.MaskedMuon]


def made(kind):
    values = nn.Parameter(torch.ones(2, 16, 16))
    values.grad = torch.ones_like(values)
    return values, kind([values], lr=0.1)


def told(optimizer, call):
    """What hooks of all kinds see of one step, in their order."""
    seen = []

    def note(name):
        return lambda o, args, kwargs: seen.append((name, o is args[0], len(args), list(kwargs)))

    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(note("all before")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        torch_optimizer.register_optimizer_step_post_hook(note("all after")),
    ]
    try:
        call(optimizer)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [lambda o: o.step(), lambda o: o.step(lambda: 3.0)])
def test_hooks_see_what_they_see_of_torchs_optimizers(kind, call):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    want = told(torch.optim.SGD([p], lr=0.1), call)
    assert [name for name, *_ in want] == ["all before", "before", "after", "all after"]
    values, optimizer = made(kind)
    assert told(optimizer, call) == want
    assert not torch.equal(values, torch.ones_like(values))


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_may_bring_another_closure(kind):
    _, optimizer = made(kind)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), {}))
    assert optimizer.step() == 7.0
    assert optimizer.step(closure=lambda: 1.0) == 7.0


def test_a_hook_that_returns_something_else_is_named():
    values, optimizer = made(nb.optim.MaskedAdamW)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: 5)
    with pytest.raises(RuntimeError, match=r"MaskedAdamW: a step hook must return None .*, got 5"):
        optimizer.step()
    assert torch.equal(values, torch.ones_like(values))


def test_the_profiler_shows_a_step_as_it_shows_torchs():
    _, optimizer = made(nb.optim.MaskedAdamW)
    with torch.profiler.profile() as seen:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in seen.events()]
    assert names.count("Optimizer.step#MaskedAdamW.step") == 1
    assert names.count("Optimizer.zero_grad#MaskedAdamW.zero_grad") == 1


def test_a_subclass_with_a_step_of_its_own_has_torchs_hooks():
    calls = []

    class Twice(nb.optim.MaskedAdamW):
        def step(self, closure=None):
            super().step()
            return super().step(closure)

    values = nn.Parameter(torch.ones(2, 16, 16))
    values.grad = torch.ones_like(values)
    optimizer = Twice([values], lr=0.1)
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(len(args)))
    optimizer.step()
    # Once for each of the three steps, as where a subclass of torch's optimisers calls its own.
    assert len(calls) == 3
    assert optimizer.state[values]["step"].item() == 2


def test_the_schedulers_of_torch_count_steps():
    _, optimizer = made(nb.optim.MaskedAdamW)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.075)
