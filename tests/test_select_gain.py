"""The gain of `select_blocks`: what a block's own best step lowers the loss by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nibblock.sparse._gain import best_gain
from reference_scores import gain_sums
from test_select_blocks import data, loss_of, mlp, select
from torch import nn


def test_best_gain():
    """(sum z)^2 / sum z^2, at most the number of tokens; 0 where the step would go up or nothing is
    known."""
    z = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, -1.0], [-1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    score = best_gain(z.sum(1), z.square().sum(1))
    torch.testing.assert_close(score, torch.tensor([3.0, 4 / 6, 0.0, 0.0]))


def test_gain_of_a_model():
    """Scores of a selection are those of its gradients; scales of inputs and losses are nothing to
    them."""
    model, batches = mlp().eval(), data()
    chosen = select(model, batches, mode="gain")
    assert chosen.bytes == sum(2 * 4 * s.numel() for s in chosen.scores.values())
    assert chosen == select(model, batches, mode="gain", loss_fn=lambda m, b: 64 * loss_of(m, b))
    seen = {}

    def hook(name):
        def keep(module, args, output):
            output.register_hook(lambda grad: seen.setdefault(name, []).append((grad, args[0])))

        return keep

    for name in ("0", "3", "5"):
        model.get_submodule(name).register_forward_hook(hook(name))
    for batch in batches:
        loss_of(model, batch).backward()
    for name, pairs in seen.items():
        sums = [
            gain_sums(g.flatten(0, -2).numpy(), x.detach().flatten(0, -2).numpy(), 16)
            for g, x in pairs
        ]
        gain, squares = (sum(getattr(s, part) for s in sums) for part in ("gain", "squares"))
        want = best_gain(torch.from_numpy(gain), torch.from_numpy(squares))
        torch.testing.assert_close(chosen.scores[name].double(), want, rtol=2e-3, atol=1e-3)


def test_gain_prefers_what_tokens_agree_on():
    """Outlier inputs make a gradient large where tokens disagree: only its norm is fooled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64, bias=False))
    x = torch.randn(256, 128)
    x[:, :32] = 100 * torch.randn(256, 32)
    wanted = torch.zeros(64, 128)
    wanted[:32, 96:] = torch.randn(32, 32)
    y = model(x).detach() + x @ wanted.t() + 30 * torch.randn(256, 64)
    pick = dict(density=0.125, block=32, loss_fn=lambda m, b: F.mse_loss(m(b[0]), b[1]))
    best = select(model, [(x, y)], mode="gain", **pick)["0"].tolist()
    assert best == [[0, 3]]
    assert select(model, [(x, y)], mode="exact", **pick)["0"].tolist()[0][1] == 0


def test_blocks_that_tokens_agree_on_need_no_spread():
    """All that a teacher changed lies in one block row: caps would trade it for noise. Of a model
    whose tokens disagree, caps hold."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(128, 128, bias=False))
    model = nn.Sequential(nn.Linear(128, 128, bias=False))
    model.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        teacher[0].weight[16:32] += 0.02 * torch.randn(16, 128)
    x = torch.randn(8, 64, 128)
    pick = dict(density=0.125, loss_fn=lambda m, b: F.mse_loss(m(b), teacher(b).detach()))
    row = [[1, j] for j in range(8)]
    assert select(model, list(x), mode="gain", **pick)["0"].tolist() == row
    noise = torch.randn(8, 64, 128)
    targets = [teacher(b).detach() + 4 * n for b, n in zip(x, noise)]
    pick["loss_fn"] = lambda m, b: F.mse_loss(m(b[0]), b[1])
    noisy = select(model, list(zip(x, targets)), mode="gain", **pick)["0"]
    assert max(torch.bincount(noisy[:, 0].long()).tolist()) == 1
    free = select(model, list(zip(x, targets)), mode="gain", spread=None, **pick)["0"]
    assert max(torch.bincount(free[:, 0].long()).tolist()) > 1


def test_gain_needs_two_rows():
    model = nn.Sequential(nn.Linear(32, 32))
    one = [(torch.randn(1, 32), torch.randn(1, 32))] * 3
    with pytest.raises(ValueError, match='two rows or more for the mode gain.* mode="sketch"'):
        select(model, one, mode="gain")
    assert len(select(model, one, mode="sketch")["0"])


@pytest.mark.parametrize("mode, spread", [("gain", "auto"), ("exact", 1.0), ("exact", None)])
def test_layers_that_nothing_reaches_come_last(mode, spread):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.unused, self.b = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x):
            return self.b(F.gelu(self.a(x)))

    torch.manual_seed(0)
    batches = [(torch.randn(16, 64), torch.randn(16, 64)) for _ in range(4)]
    found = select(
        Half(), batches, mode=mode, spread=spread, density=0.5, block=16,
        loss_fn=lambda m, b: F.mse_loss(m(b[0]), b[1]),
    )  # fmt: skip
    assert "unused" not in found
    assert sum(map(len, found.values())) == 24


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(where=5), "name patterns must be str or a list of them, got int"),
        (dict(skip=3), "name patterns must be str or a list of them, got int"),
        (dict(batches=5), "batches must be iterable or None, got int"),
        (dict(budget="a"), "budget must be float, got str"),
        (dict(samples=1.5), "samples must be int, got float"),
        (dict(shards=1.5), "shards must be int, got float"),
    ],
)
def test_arguments_of_another_type_are_refused(change, message):
    batches = change.pop("batches", data())
    with pytest.raises(TypeError, match=f"select_blocks: {message}"):
        select(mlp(), batches, **change)
