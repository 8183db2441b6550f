"""The gain of `select_blocks`: what a block's own best step lowers the loss by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nibblock.sparse._gain import add_gain, best_gain
from test_select_blocks import data, loss_of, mlp, select
from torch import nn


def gain_by_the_formula(g, x, block):
    """(sum z, sum z^2) of every block, token by token, in float64."""
    half = (len(g) + 1) // 2
    rows, columns = -(-g.shape[1] // block), -(-x.shape[1] // block)
    out = torch.zeros(2, rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            gi = g[:, i * block : (i + 1) * block].double()
            xj = x[:, j * block : (j + 1) * block].double()
            for here, there in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
                direction = (gi[there].T @ xj[there]).sign()
                z = torch.einsum("tr,rc,tc->t", gi[here], direction, xj[here])
                out[0, i, j] += z.sum()
                out[1, i, j] += z.square().sum()
    return out


@pytest.mark.parametrize(
    ("tokens", "n", "k", "block"),
    [(64, 64, 96, 32), (7, 70, 100, 16), (33, 130, 300, 64), (5, 129, 40, 128), (1, 32, 32, 32)],
)
def test_gain_is_that_of_the_formula(tokens, n, k, block):
    torch.manual_seed(0)
    g, x = torch.randn(tokens, n), torch.randn(tokens, k)
    want = gain_by_the_formula(g, x, block)
    for lead in ((tokens,), (1, tokens)):
        found = torch.zeros_like(want, dtype=torch.float32)
        add_gain(*found, g.view(*lead, n), x.view(*lead, k), block)
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-3)
    score = best_gain(*found.double())
    assert (score >= 0).all()
    assert (score <= tokens * (1 + 1e-5)).all()  # Cauchy and Schwarz: where all tokens agree
    up = want[0] > 0
    torch.testing.assert_close(score[up], want[0][up] ** 2 / want[1][up], rtol=1e-3, atol=1e-3)
    assert not score[~up].any()


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
        both = sum(gain_by_the_formula(g.flatten(0, -2), x.flatten(0, -2), 16) for g, x in pairs)
        want = best_gain(*both)
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


def test_gain_needs_two_rows():
    model = nn.Sequential(nn.Linear(32, 32))
    one = [(torch.randn(1, 32), torch.randn(1, 32))] * 3
    with pytest.raises(ValueError, match='two rows or more for the mode gain.* mode="sketch"'):
        select(model, one, mode="gain")
    assert len(select(model, one, mode="sketch")["0"])
