"""The cost model: which blocks and which depth a time budget buys; and the learned mask."""

from __future__ import annotations

import contextlib
import itertools

import nibblock as nb
import pytest
import torch
import torch.nn.functional as F
from nibblock.sparse import CostModel, MovementMask, select_blocks
from nibblock.sparse._cost import LayerCost, StepCost, best_under_budget
from test_select_blocks import by_blocks, data, loss_of, mlp, select
from torch import nn

MACHINE = CostModel(flops=1e9, bandwidth=1e9)


class Tower(nn.Module):
    def __init__(self, layers=6):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(layers))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def best_by_trial(scores, levels, costs, count, fixed, budget):
    """Every set of blocks, for the sum of scores that fits: the oracle."""
    best = -1.0
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(len(scores)), size):
            seconds = fixed[min(levels[i] for i in chosen)] + sum(costs[i] for i in chosen)
            if seconds <= budget:
                best = max(best, sum(scores[i] for i in chosen))
    return best


def test_the_choice_is_the_best_there_is():
    gen = torch.Generator().manual_seed(0)
    for trial in range(40):
        levels = [0, 0, 0, 1, 1, 1, 2, 2, 2]
        scores = torch.rand(9, generator=gen, dtype=torch.float64)
        fixed = {0: 3.0, 1: 2.0, 2: 1.0}
        budget = 1.35 + 3.0 * float(torch.rand((), generator=gen))
        costs, count = [0.3] * 9, 1 + trial % 5
        chosen = best_under_budget(
            scores, torch.tensor(levels), torch.tensor(costs).double(), count, fixed, budget
        )
        want = best_by_trial(scores.tolist(), levels, costs, count, fixed, budget)
        assert float(scores[chosen].sum()) == pytest.approx(want)
        lowest = min(levels[i] for i in chosen.tolist())
        assert fixed[lowest] + 0.3 * len(chosen) <= budget + 1e-9
    none = best_under_budget(scores, torch.tensor(levels), torch.tensor(costs), 3, fixed, 0.5)
    assert len(none) == 0


def test_a_smaller_budget_cuts_deeper_and_is_kept():
    model, batches = Tower(), data()
    free = select(model, batches, density=0.3, cost=MACHINE)
    assert 0 < free.predicted_time < 1
    last, order = free, [f"layers.{i}" for i in range(6)] + ["head"]
    for share in (0.9, 0.75, 0.6, 0.45):
        chosen = select(model, batches, density=0.3, cost=MACHINE, budget=share)
        assert chosen.predicted_time <= share
        assert chosen.depth_cut >= last.depth_cut
        assert chosen.count <= free.count
        first = order.index(chosen.first)
        assert all(order.index(name) >= first for name in chosen)
        last = chosen
    assert last.depth_cut > 0.5
    assert f"a step {last.predicted_time:.2f} of full fine-tuning's" in str(last)


def test_predicted_time_by_hand():
    """Four equal layers of 64 x 64, 8 rows; blocks in the last two."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    batches = [torch.randn(8, 64)]

    def loss_fn(m, batch):
        return m(batch).square().mean()

    chosen = select_blocks(
        model, batches, loss_fn, density=3 / 8, block=32, where=["2", "3"], cost=MACHINE,
        progress=False,
    )  # fmt: skip
    product, update = 2 * 8 * 64 * 64 / 1e9, 36 * 64 * 64 / 1e9
    full = 4 * product + 3 * product + 4 * product + 4 * update
    assert chosen.count == 3
    block = 2 * 8 * 1024 / 1e9 / MACHINE.block_efficiency + 36 * 1024 / 1e9
    above = 1 if chosen.first == "2" else 0
    assert chosen.predicted_time == pytest.approx(
        (4 * product + above * product + 3 * block) / full
    )
    assert chosen.depth_cut == pytest.approx(1 - above / 3)


def test_a_budget_off_the_cpu_needs_the_cost_model_of_that_device():
    model = mlp()
    model.elsewhere = nn.Parameter(torch.empty(1, device="meta"))
    with pytest.raises(ValueError, match="cost must be given for a budget of a model on meta"):
        select(model, data(), budget=0.5)


def test_magnitude_under_a_budget_looks_at_one_forward():
    model, batches = Tower(), data()
    chosen = select(model, batches, method="magnitude", density=0.3, cost=MACHINE, budget=0.5)
    assert chosen.predicted_time <= 0.5
    assert chosen.depth_cut > 0


def test_measured_constants_are_sane():
    machine = CostModel.measure()
    assert machine is CostModel.measure()
    assert 1e8 < machine.flops < 1e15
    assert 1e8 < machine.bandwidth < 1e13
    layers = [LayerCost(i, 16, 1000) for i in range(3)]
    step = StepCost(machine, layers, 3000, 16)
    assert step.above(0) > step.above(1) > step.above(2) == 0
    assert step.depth_cut(2) == 1.0


# --- the learned mask -----------------------------------------------------------------------------


def test_movement_mask_is_the_sum_over_score_steps():
    model, batches = mlp().eval(), data(4)
    mask = MovementMask(model, block=16, lr=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    want = {name: torch.zeros_like(m, dtype=torch.float64) for name, m in mask.values.items()}
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        with mask.score() if step % 2 == 0 else contextlib.nullcontext():
            loss_of(model, batch).backward()
        if step % 2 == 0:
            for name, total in want.items():
                layer = model.get_submodule(name)
                product = (layer.weight * layer.weight.grad).detach().double()
                total -= 0.5 * by_blocks(product, 16, torch.sum)
        optimizer.step()
    assert mask.steps == 2
    for name, total in want.items():
        torch.testing.assert_close(mask.values[name].double(), total, rtol=1e-3, atol=1e-7)
    chosen = mask.selection(0.25)
    flat = torch.cat([want[n].flatten() for n in chosen.shapes])
    kept = torch.cat([chosen.mask(n).flatten() for n in chosen.shapes])
    assert flat[kept].min() >= flat[~kept].max()
    assert chosen.method == "learned movement"
    assert not any(m._forward_hooks for m in model.modules())
    other = MovementMask(model, block=16)
    other.load_state_dict(mask.state_dict())
    assert other.selection(0.25) == chosen
    with pytest.raises(ValueError, match="state of 0 must be"):
        MovementMask(model, block=32).load_state_dict(mask.state_dict())


def test_movement_mask_does_not_change_the_training():
    weights = []
    for scored in (False, True):
        model = mlp()
        mask = MovementMask(model, block=16)
        optimizer = torch.optim.AdamW(model.parameters())
        torch.manual_seed(1)
        for batch in data(3):
            optimizer.zero_grad()
            with mask.score() if scored else contextlib.nullcontext():
                loss_of(model, batch).backward()
            optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_movement_mask_prunes_what_is_not_needed():
    """Half of the inputs are noise that the start weights listen to: their blocks lose."""
    torch.manual_seed(0)
    model = nn.Linear(64, 32)
    wrapped = nn.Sequential(model)
    target = torch.randn(32, 32)
    mask = MovementMask(wrapped, block=16)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.3)
    with torch.no_grad():
        model.weight[:, :32].mul_(0.1)
        model.weight[:, 32:].normal_(0, 0.5)
    for _ in range(60):
        x = torch.randn(64, 64)
        optimizer.zero_grad()
        with mask.score():
            F.mse_loss(wrapped(x), x[:, :32] @ target).backward()
        optimizer.step()
    assert mask.selection(0.5).mask("0")[:, :2].all()


def test_movement_mask_refuses():
    with pytest.raises(ValueError, match="model must hold a linear to score, got none"):
        MovementMask(nn.ReLU())
    with pytest.raises(ValueError, match="a score step must come first, got none"):
        MovementMask(mlp()).selection(0.1)
    with pytest.raises(TypeError, match="model must be an nn.Module"):
        MovementMask(None)


def test_masked_layers_are_scored_as_they_are_now():
    model, batches = mlp(), data()
    chosen = select(model, batches, mode="exact")
    nb.sparse_update(model, chosen)
    again = select(model, batches, mode="exact")
    assert again == chosen
    for name in chosen.scores:
        assert torch.equal(again.scores[name], chosen.scores[name])
