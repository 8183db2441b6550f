"""`select_blocks`: what is chosen, from which models, and that nothing is left behind."""

from __future__ import annotations

import nibblock as nb
import pytest
import torch
import torch.nn.functional as F
from nibblock.sparse import select_blocks
from nibblock.sparse._spread import Spread
from torch import nn


def loss_of(model, batch):
    x, target = batch
    return F.cross_entropy(model(x), target)


def mlp(seed=0):
    torch.manual_seed(seed)
    first, second, third = nn.Linear(64, 96), nn.Linear(96, 96), nn.Linear(96, 10)
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(0.5), second, nn.ReLU(), third)


def data(count=4, rows=16, seed=1):
    gen = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 64, generator=gen), torch.randint(0, 10, (rows,), generator=gen))
        for _ in range(count)
    ]


def select(model, batches, **more):
    options = {"density": 0.2, "block": 16, "progress": False}
    loss_fn = more.pop("loss_fn", loss_of)
    return select_blocks(model, batches, loss_fn, **{**options, **more})


# --- the scores -----------------------------------------------------------------------------------


def dense_gradients(model, batches):
    """Each linear's weight gradient of every batch, by autograd; in evaluation mode."""
    model.eval()
    out = []
    for batch in batches:
        model.zero_grad()
        loss_of(model, batch).backward()
        out.append(
            {n: m.weight.grad.double() for n, m in model.named_modules() if hasattr(m, "weight")}
        )
    model.zero_grad()
    return out  # fmt: skip


def by_blocks(matrix, block, combine):
    rows = -(-matrix.shape[0] // block)
    columns = -(-matrix.shape[1] // block)
    out = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            out[i, j] = combine(matrix[i * block : (i + 1) * block, j * block : (j + 1) * block])
    return out


def test_exact_scores_are_those_of_the_dense_gradient():
    model, batches = mlp(), data()
    chosen = select(model, batches, mode="exact", shards=1)
    grads = dense_gradients(model, batches)
    for name in ("0", "3", "5"):
        want = sum(by_blocks(g[name], 16, lambda b: b.square().sum()) for g in grads) / len(grads)
        torch.testing.assert_close(chosen.scores[name].double(), want, rtol=1e-4, atol=1e-12)
    flat = torch.cat([chosen.scores[n].flatten() for n in ("0", "3", "5")])
    assert chosen.count == round(0.2 * len(flat))
    kept = torch.cat([chosen.mask(n).flatten() for n in ("0", "3", "5")])
    assert flat[kept].min() >= flat[~kept].max()


def test_movement_scores_are_those_of_the_dense_gradient():
    model, batches = mlp(), data()
    chosen = select(model, batches, method="movement", shards=1)
    grads = dense_gradients(model, batches)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            w = module.weight.detach().double()
            want = sum(by_blocks(w * g[name], 16, torch.sum) for g in grads).abs() / len(grads)
            torch.testing.assert_close(chosen.scores[name].double(), want, rtol=1e-3, atol=1e-7)


def test_robust_scores_punish_what_one_shard_sees():
    """Two shards of equal total: mean - 1 std is the smaller of the two."""
    model, batches = mlp(), data(2)
    one = [select(model, [b], mode="exact", shards=1).scores for b in batches]
    totals = [sum(float(s.sum()) for s in scores.values()) for scores in one]
    middle = sum(totals) / 2
    both = select(model, batches, mode="exact", shards=2, robust=1.0)
    for name in both.scores:
        scaled = [scores[name] * middle / t for scores, t in zip(one, totals)]
        want = torch.minimum(*scaled)
        torch.testing.assert_close(both.scores[name], want, rtol=1e-3, atol=1e-9)
    plain = select(model, batches, mode="exact", shards=2, robust=0.0)
    assert any(not torch.equal(plain.scores[n], both.scores[n]) for n in plain.scores)


def test_normalised_layers_share_the_blocks_more_evenly():
    model, batches = mlp(), data()
    with torch.no_grad():
        model[5].weight.mul_(100)
    shares = [
        max(len(v) for v in select(model, batches, normalize=how).values())
        for how in ("none", "layer")
    ]
    assert shares[1] <= shares[0]


def test_no_column_crowds_out_the_others():
    """One input feature of large activations: by score alone its column takes every block."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    x = torch.randn(64, 256)
    x[:, :32] *= 100
    batches = [(x, torch.randn(64, 256))]
    plain = select(model, batches, mode="exact", block=32, density=0.125)["0"]
    assert set(plain[:, 1].tolist()) == {0}
    found = select(model, batches, mode="exact", block=32, density=0.125, spread=1.0)["0"]
    assert len(found) == len(plain) == 8
    assert sorted(found[:, 1].tolist()) == list(range(8)) == sorted(found[:, 0].tolist())
    # Never fewer blocks than asked for, however tight the caps are.
    every = select(model, batches, mode="exact", block=32, density=1.0, spread=1.0)["0"]
    assert len(every) == 64
    with pytest.raises(ValueError, match='spread must be at least 1, None or "auto", got 0.5'):
        select(model, batches, spread=0.5)


def test_spread_takes_in_order_and_fills_up():
    ones = torch.ones(32)
    picked = Spread([(1, 8)], 1.0, ones[:8]).pick(torch.arange(8), 8).tolist()
    assert picked == list(range(8))
    order = torch.arange(32)  # two layers of 4 x 4, the first one's blocks all better
    picked = Spread([(4, 4), (4, 4)], 1.0, ones).pick(order, 16).tolist()
    assert [sum(p < 16 for p in picked), sum(p >= 16 for p in picked)] == [8, 8]
    assert picked[:4] == [0, 1, 4, 5]  # half of a row, then the next row
    assert Spread([(4, 4)], 1.0, ones[:16]).pick(torch.arange(0), 4).tolist() == []
    ones[16:] = 0.0  # nothing reaches the second layer: caps of the first give way before it
    assert Spread([(4, 4), (4, 4)], 1.0, ones).pick(order, 16).sort().values.tolist() == [
        *range(16)
    ]
    assert len(Spread([(4, 4), (4, 4)], 1.0, ones).pick(order, 20)) == 20


def test_gains_beyond_comparison_are_taken_whatever_the_caps():
    gains = torch.ones(16)
    gains[:3] = torch.tensor([900.0, 800.0, 700.0])  # of one row
    none = torch.zeros(16, dtype=torch.bool)
    order = torch.sort(gains, descending=True, stable=True).indices
    assert Spread([(4, 4)], 1.0, gains).pick(order, 4).tolist()[:2] == [0, 5]
    assert Spread([(4, 4)], 1.0, gains, none).pick(order, 4).tolist() == [0, 1, 2, 7]
    gains[8:] = 60.0  # more than twice the count comes near them: caps hold
    order = torch.sort(gains, descending=True, stable=True).indices
    assert Spread([(4, 4)], 1.0, gains, none).pick(order, 4).tolist()[:2] == [0, 9]
    assert len(Spread([(4, 4)], 1.0, gains, none).pick(order, 16)) == 16
    agreed = gains > 100.0
    assert Spread([(4, 4)], 1.0, gains, agreed).pick(order, 4).tolist()[:3] == [0, 1, 2]


def test_magnitude_and_random_need_no_batches():
    model = mlp()
    chosen = select(model, None, method="magnitude", loss_fn=None)
    for name in chosen.scores:
        norms = by_blocks(model.get_submodule(name).weight.double(), 16, lambda b: b.square().sum())
        torch.testing.assert_close(chosen.scores[name].double(), norms, rtol=1e-5, atol=0)
    one, two = (select(model, None, method="random", seed=s, loss_fn=None) for s in (1, 2))
    assert one != two
    assert one == select(model, None, method="random", seed=1, loss_fn=None)
    assert chosen.predicted_time is None


class Residual(nn.Module):
    """h + W_l tanh(P_l h), layer after layer: W_l trainable, P_l not."""

    def __init__(self, width=256, layers=4):
        super().__init__()
        torch.manual_seed(0)
        self.p = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.w = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        with torch.no_grad():
            for p, w in zip(self.p, self.w):
                p.weight.mul_(2)
                w.weight.mul_(0.2)

    def forward(self, h):
        for p, w in zip(self.p, self.w):
            h = h + w(p(h).tanh())
        return h


@pytest.mark.parametrize("seed", range(3))
def test_planted_blocks_are_found(seed):
    """A teacher that differs from the model in a few blocks of every layer: given their number, the
    sketch finds at least 95 % of them; magnitude and chance do not."""
    student, teacher = Residual(), Residual()
    gen = torch.Generator().manual_seed(seed)
    planted = set()
    with torch.no_grad():
        for l, module in enumerate(teacher.w):
            for at in torch.randperm(64, generator=gen)[:5].tolist():
                i, j = divmod(at, 8)
                planted.add((f"w.{l}", i, j))
                area = module.weight[i * 32 : i * 32 + 32, j * 32 : j * 32 + 32]
                area += 0.02 * torch.randn(32, 32, generator=gen)
    batches = [torch.randn(512, 256, generator=gen) for _ in range(4)]

    def distance(model, x):
        return (model(x) - teacher(x).detach()).square().mean()

    found = {}
    for method in ("impact", "magnitude", "random"):
        chosen = select_blocks(
            student, batches, distance, density=20 / 256, method=method, where="w.*",
            progress=False,
        )  # fmt: skip
        got = {(n, *map(int, pair)) for n, index in chosen.items() for pair in index}
        assert len(got) == len(planted) == 20
        found[method] = len(got & planted) / len(planted)
    assert found["impact"] >= 0.95, found
    assert max(found["magnitude"], found["random"]) < 0.5, found


# --- models ---------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding with a tied head, a layer that runs twice, and one in a container."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.twice = nn.Linear(64, 64)
        self.wide = nn.Linear(64, 128)
        self.back = nn.Linear(in_features=128, out_features=64)
        self.unused = nn.Linear(64, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = self.embed(tokens)
        h = h + self.twice(h).tanh()
        h = h + self.twice(input=h).tanh()
        return self.head(h + self.back(F.silu(self.wide(h))))


def token_loss(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def tokens(count=3):
    gen = torch.Generator().manual_seed(5)
    return [torch.randint(0, 50, (2, 9), generator=gen) for _ in range(count)]


@pytest.mark.parametrize("frozen", [False, True])
def test_tied_shared_and_unused_layers(frozen):
    torch.manual_seed(0)
    model = Tied().requires_grad_(not frozen)
    options = dict(density=0.5, block=32, mode="exact", shards=1, progress=False)
    chosen = select_blocks(model, tokens(), token_loss, **options)
    assert chosen.skipped == {"head": "its weight is tied to embed; name it in where to train it"}
    assert list(chosen.scores) == ["twice", "wide", "back", "unused"]
    assert not chosen.scores["unused"].any()
    grads = []
    model.requires_grad_()
    for batch in tokens():
        model.zero_grad(set_to_none=True)
        token_loss(model, batch).backward()
        grads.append(
            {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
        )
    for name in ("twice", "wide", "back"):
        key = f"{name}.weight"
        want = sum(by_blocks(g[key], 32, lambda b: b.square().sum()) for g in grads) / 3
        torch.testing.assert_close(chosen.scores[name].double(), want, rtol=1e-4, atol=1e-12)
    named = select_blocks(model, tokens(), token_loss, where=["head", "wide"], **options)
    assert set(named.scores) == {"head", "wide"}
    assert named.skipped["back"] == "not selected by where"


def test_frozen_int4_models_are_scored():
    torch.manual_seed(0)
    model, batches = mlp(), data()
    nb.accelerate(model, nb.Int4Config(group_size=32), progress=False)
    dense = mlp()
    for name in ("0", "3", "5"):
        dense.get_submodule(name).weight.data = model.get_submodule(name).dequantize()
        dense.get_submodule(name).bias.data = model.get_submodule(name).bias.data
    model.requires_grad_(False)
    for method in ("impact", "movement"):
        one = select(model, batches, mode="exact", method=method)
        two = select(dense, batches, mode="exact", method=method)
        assert one.overlap(two) >= 0.8
        for name in one.scores:
            scale = two.scores[name].abs().max()
            assert (one.scores[name] - two.scores[name]).abs().max() <= 0.1 * scale
    with pytest.raises(ValueError, match="config.block must be the selection's 16, got 32"):
        nb.add_adapters(model, nb.AdapterConfig(block=32), blocks=one)
    report = nb.add_adapters(model, nb.AdapterConfig(block=16), blocks=one)
    assert len(report.replaced) == len(one)
    again = select(model, batches, mode="exact", method="movement")
    assert again == one  # adapters of zeros: the same model, scored through its AdapterLinears


def test_attention_encoders_and_checkpointing():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

        def forward(self, x):
            q, k, v = self.q(x), self.k(x), self.v(x)
            return x + self.o(F.scaled_dot_product_attention(q, k, v))

    class Encoder(nn.Module):
        def __init__(self, checkpoint):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Block() for _ in range(3))
            self.out = nn.Linear(64, 10)
            self.checkpoint = checkpoint

        def forward(self, x):
            for layer in self.layers:
                if self.checkpoint:
                    x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
                else:
                    x = layer(x)
            return self.out(x).mean(1)

    batches = [(torch.randn(3, 7, 64), torch.randint(0, 10, (3,))) for _ in range(2)]
    plain, kept = (select(Encoder(c), batches) for c in (False, True))
    assert plain == kept
    for name in plain.scores:
        assert torch.equal(plain.scores[name], kept.scores[name])
    # q, k and v read one tensor: nothing below k is skipped that is not below q.
    only = [select(Encoder(False), batches, where=f"layers.2.{n}").depth_cut for n in "qkv"]
    assert only[0] == only[1] == only[2] > 0.4


def test_autocast():
    model, batches = mlp(), data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = select(model, batches, mode="exact")
    assert mixed.overlap(select(model, batches, mode="exact")) > 0.7


# --- nothing is left behind -----------------------------------------------------------------------


def fingerprint(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return (
        [(n, p.requires_grad, id(p), p._version, None if p.grad is None else p.grad.clone())
         for n, p in model.named_parameters()],
        [(n, m.training, *(len(getattr(m, h)) for h in hooks)) for n, m in model.named_modules()],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
    )  # fmt: skip


def assert_same(one, two):
    for (*a, g), (*b, h) in zip(one[0], two[0]):
        assert a == b
        assert (g is None) == (h is None)
        assert g is None or torch.equal(g, h)
    assert one[1] == two[1]
    assert torch.equal(one[2], two[2])
    assert one[3] == two[3]


@pytest.mark.parametrize("fails", [None, 0, 2, "backward"])
def test_everything_is_restored(fails):
    model, batches = mlp(), data()
    model[3].weight.requires_grad_(False)
    model[0].eval()
    loss_of(model, batches[0]).backward()
    seen = []

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ZeroDivisionError("backward")

    def loss_fn(m, batch):
        assert not m.training
        torch.rand(3)
        if len(seen) == fails:
            raise ZeroDivisionError("forward")
        seen.append(batch)
        loss = loss_of(m, batch)
        return Fails.apply(loss) if fails == "backward" else loss

    before = fingerprint(model)
    with torch.no_grad():
        if fails is None:
            select(model, batches, loss_fn=loss_fn)
        else:
            with pytest.raises(ZeroDivisionError):
                select_blocks(model, batches, loss_fn, block=16, progress=False)
        assert not torch.is_grad_enabled()
    assert_same(before, fingerprint(model))


def test_deterministic():
    model, batches = mlp(), data()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.rand(threads)  # the caller's generator does not matter
        found.append(select(model, batches))
    assert found[0] == found[1] == found[2]
    for name in found[0].scores:
        assert torch.equal(found[0].scores[name], found[2].scores[name])
    one, two = (select(model, batches, mode="sketch", seed=s).scores for s in (0, 9))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_memory_is_that_of_the_statistics():
    chosen = select(mlp(), data(), shards=2)
    assert chosen.bytes == 2 * 4 * chosen.total
    dense = sum(n * k for n, k in chosen.shapes.values()) * 4
    assert chosen.bytes / 2 < dense / 240  # 1 / 16^2, ragged edges beside it


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(density=0.0), ValueError, r"density must be in \(0, 1\], got 0.0"),
        (dict(block=24), ValueError, "block must be 16, 32, 64 or 128, got 24"),
        (dict(method="best"), ValueError, "method must be one of impact, movement, magnitude"),
        (dict(mode="fast"), ValueError, "mode must be one of gain, sketch, exact, got 'fast'"),
        (dict(samples=0), ValueError, "samples must be in 1 .. 32, got 0"),
        (dict(shards=0), ValueError, "shards must be at least 1, got 0"),
        (dict(robust=-1.0), ValueError, "robust must be at least 0, got -1.0"),
        (dict(normalize="all"), ValueError, "normalize must be one of none, layer, got 'all'"),
        (dict(budget=0.0), ValueError, "budget must be above 0, got 0.0"),
        (dict(skip="*"), ValueError, "model must hold a linear to select from, got none"),
        (dict(budget=0.01), ValueError, r"budget must be at least 0\.\d+ of a full step"),
    ],
)
def test_arguments_are_checked(change, error, text):
    with pytest.raises(error, match=f"select_blocks: {text}"):
        select(mlp(), data(), **change)


def test_losses_are_checked():
    model, batches = mlp(), data()
    cases = [
        (lambda m, b: 1.0, TypeError, "loss_fn must return a Tensor, got float"),
        (lambda m, b: m(b[0]), ValueError, r"loss_fn must return a scalar, got \[16, 10\]"),
        (lambda m, b: loss_of(m, b) * torch.nan, ValueError, "loss must be finite, got nan"),
        (lambda m, b: torch.tensor(1.0), ValueError, "loss must depend on one of the 3 targeted"),
        (lambda m, b: loss_of(m, b).detach(), ValueError, "loss must depend on one of the 3"),
    ]
    for loss_fn, error, text in cases:
        with pytest.raises(error, match=f"select_blocks: {text}"):
            select_blocks(model, batches, loss_fn, block=16, progress=False)
    with pytest.raises(ValueError, match="batches must hold at least one for impact, got none"):
        select(model, [])
    with pytest.raises(TypeError, match="model must be an nn.Module, got int"):
        select(3, batches)
    with pytest.raises(ValueError, match="0 must keep its input unchanged until backward"):
        select(model, [(x.clone(), y) for x, y in batches], loss_fn=changes_input)


def changes_input(model, batch):
    loss = loss_of(model, batch)
    batch[0].mul_(2)
    return loss
