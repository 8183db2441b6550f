"""`PrefixCache`: the same bits as without it, and a refusal wherever they would not be."""

from __future__ import annotations

import functools

import nibblock as nb
import pytest
import torch
from finetune_samples import tiny_bert, tiny_llama
from nibblock.sparse import PrefixCache
from nibblock.sparse._row_store import RowStore
from nibblock.sparse.prefix_cache import find_boundary

pytest.importorskip("transformers", reason="the transformers package is not installed")

ROWS = torch.randint(0, 100, (12, 10), generator=torch.Generator().manual_seed(3))
GROUPS = [[0, 5, 2, 7], [1, 3, 4, 6], [8, 9, 10, 11]]


def freeze_below(model, prefix: str, index: int):
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.startswith(prefix):
            parameter.requires_grad_(int(name[len(prefix) :].split(".")[0]) >= index)
    return model


def llama(index: int = 2):
    return freeze_below(tiny_llama(), "model.layers.", index)


def bert(index: int = 2, dropout: float = 0.0):
    model = freeze_below(tiny_bert(dropout=dropout), "bert.encoder.layer.", index)
    model.classifier.requires_grad_(True)
    return model


def lora(index: int = 2):
    peft = pytest.importorskip("peft", reason="the peft package is not installed")
    targets = [f"model.layers.{i}.mlp.up_proj" for i in range(index, 4)]
    config = peft.LoraConfig(r=2, lora_dropout=0.0, target_modules=targets)
    return peft.get_peft_model(tiny_llama(), config)


def adapters(index: int = 2):
    model = tiny_llama()
    config = nb.AdapterConfig(density=0.5, where=[f"model.layers.{i}.*" for i in range(index, 4)])
    nb.add_adapters(model, config)
    return model


def text_loss(model, ids):
    out = model(input_ids=ROWS[ids], use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(out.flatten(0, 1), ROWS[ids][:, 1:].flatten())


def class_loss(model, ids):
    mask = torch.ones_like(ROWS[ids])
    mask[:, 8:] = 0
    logits = model(input_ids=ROWS[ids], attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids) % 2)


def losses(model, loss_of, cache=None, epochs: int = 3):
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    seen = []
    for _ in range(epochs):
        for ids in GROUPS:
            if cache is None:
                loss = loss_of(model, ids)
            else:
                with cache.batch(ids):
                    loss = loss_of(model, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
    return seen


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize(
    "build, loss_of",
    [(llama, text_loss), (bert, class_loss), (lora, text_loss), (adapters, text_loss)],
    ids=["llama", "bert", "lora", "adapters"],
)
def test_training_has_the_same_bits(tmp_path, build, loss_of, where):
    plain = losses(build(), loss_of)
    model = build()
    folder = tmp_path if where == "file" else None
    with PrefixCache(model, folder=folder) as cache:
        assert cache.index == 2
        assert losses(model, loss_of, cache) == plain
        assert (cache.hits, cache.misses, len(cache)) == (24, 12, 12)
        assert cache.bytes == 12 * 10 * 64 * 4
    assert plain[0] != plain[-1]
    assert not list(tmp_path.iterdir())


def test_layers_below_do_nothing_on_a_hit_and_are_as_before_afterwards():
    model, calls = llama(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    cache = PrefixCache(model)
    for expected in (4, 2):
        calls.clear()
        with cache.batch([4, 5]):
            text_loss(model, [4, 5])
        assert len(calls) == expected
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)
    calls.clear()
    text_loss(model, [4, 5])
    assert len(calls) == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_above_the_boundary(reentrant):
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
    plain = losses(llama(), text_loss)
    model = llama()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = checkpoint
    model.enable_input_require_grads()  # as transformers does for reentrant checkpoints
    cache = PrefixCache(model)
    assert losses(model, text_loss, cache) == plain
    assert cache.hits == 24


@pytest.mark.parametrize("where", ["memory", "file"])
def test_cap_leaves_the_rest_to_be_computed(tmp_path, where):
    row = 10 * 64 * 4
    model = llama()
    cache = PrefixCache(model, max_bytes=6 * row + 5, folder=tmp_path if where == "file" else None)
    assert losses(model, text_loss, cache) == losses(llama(), text_loss)
    assert (len(cache), cache.bytes) == (6, 6 * row)
    assert cache.hits == 2 * 4  # the one batch that fits whole


def test_other_grouping_and_order_reuse_rows():
    model = llama().train()
    cache = PrefixCache(model)
    for ids in GROUPS:
        with cache.batch(ids):
            text_loss(model, ids)
    mixed = [11, 0, 3, 7]
    with cache.batch(mixed):
        ours = text_loss(model, mixed)
    assert cache.hits == 4
    torch.testing.assert_close(ours, text_loss(model, mixed), rtol=1e-5, atol=1e-6)


def test_a_changed_prefix_empties_the_cache():
    model = llama()
    cache = PrefixCache(model)
    for change in range(3):
        with cache.batch([0, 1]):
            ours = text_loss(model, [0, 1])
        assert ours == text_loss(model, [0, 1])
        with torch.no_grad():
            layer = model.model.layers[change % 2]
            if change == 1:  # replaced, not written
                new = layer.mlp.up_proj.weight.detach() * 1.5
                layer.mlp.up_proj.weight = torch.nn.Parameter(new, requires_grad=False)
            else:
                layer.mlp.up_proj.weight.mul_(1.5)
    assert (cache.stale, cache.hits, cache.misses) == (2, 0, 6)


def test_another_text_under_the_same_number_is_computed():
    model = llama()
    cache = PrefixCache(model)
    with cache.batch([0]):
        text_loss(model, [0])
    with cache.batch([0]):
        other = text_loss(model, [1])
    assert other == text_loss(model, [1])
    with cache.batch([0]):  # another length
        short = model(input_ids=ROWS[:1, :5], use_cache=False).logits
    assert torch.equal(short, model(input_ids=ROWS[:1, :5], use_cache=False).logits)
    assert cache.hits == 0
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    with cache.batch([0]):
        changed = text_loss(model, [0])
    assert changed == text_loss(model, [0])
    assert cache.hits == 0


def test_dropout_below_is_refused_and_above_allowed():
    model = bert(dropout=0.1).train()
    cache = PrefixCache(model)
    with pytest.raises(ValueError, match="must be deterministic, got random numbers drawn there"):
        with cache.batch([0, 1]):
            class_loss(model, [0, 1])
    assert len(cache) == 0
    assert "forward" not in model.bert.encoder.layer[0].__dict__
    model.bert.embeddings.eval()
    with pytest.raises(ValueError, match=r"dropout of 0\.1 at bert\.encoder\.layer\.0\."):
        with cache.batch([0, 1]):
            class_loss(model, [0, 1])
    for layer in model.bert.encoder.layer[:2]:
        layer.eval()
    for _ in range(2):
        with cache.batch([0, 1]):
            class_loss(model, [0, 1])
    assert cache.hits == 2


def refusals():
    two = torch.nn.Module()
    two.a, two.b = (torch.nn.ModuleList([torch.nn.Linear(2, 2)]) for _ in range(2))
    return [
        (lambda: PrefixCache(llama(0)), ValueError, "boundary must lie above the first layer"),
        (lambda: PrefixCache(two), ValueError, "layers of one nn.ModuleList, got a, b"),
        (lambda: PrefixCache(torch.nn.Linear(2, 2)), ValueError, "got none; pass boundary"),
        (lambda: PrefixCache(llama(), "lm_head"), ValueError, "must name a layer"),
        (lambda: PrefixCache(llama(), "nothing.3"), ValueError, "must name a layer"),
        (
            lambda: PrefixCache(llama(1), "model.layers.3"),
            ValueError,
            r"model\.layers\.1\..* must be frozen",
        ),
        (lambda: PrefixCache(3), TypeError, "must be an nn.Module, got int"),
        (lambda: PrefixCache(llama(), max_bytes=1.5), TypeError, "must be int, got float"),
        (lambda: PrefixCache(llama(), max_bytes=-1), ValueError, "at least 0, got -1"),
    ]


@pytest.mark.parametrize("index", range(9))
def test_refuses_at_construction(index):
    call, kind, text = refusals()[index]
    with pytest.raises(kind, match=text):
        call()


def test_refuses_in_a_batch():
    model = llama()
    cache = PrefixCache(model)
    for ids, text in (([0, 0], "must be distinct"), ([], "at least one"), ([0, 1], "must be 1")):
        with pytest.raises(ValueError, match=text), cache.batch(ids):
            text_loss(model, [0])
    with pytest.raises(ValueError, match="without a key-value cache"), cache.batch([0]):
        model(input_ids=ROWS[:1], use_cache=True)
    with cache.batch([0]):
        text_loss(model, [0])
        with pytest.raises(ValueError, match="must run once and in order"):
            text_loss(model, [0])
    with pytest.raises(ValueError, match="before another is opened"), cache.batch([0]):
        with cache.batch([1]):
            pass
    model.model.embed_tokens.requires_grad_(True)
    with (
        pytest.raises(ValueError, match="must be frozen, got a Parameter that is trained in front"),
        cache.batch([0]),
    ):
        text_loss(model, [0])
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    with pytest.raises(ValueError, match="trained below layer 2"), cache.batch([0]):
        text_loss(model, [0])


def test_find_boundary_of_names():
    model = llama(3)
    assert find_boundary(model) == ("model.layers", 3)
    assert find_boundary(model, "model.layers.1.mlp.up_proj") == ("model.layers", 1)
    assert PrefixCache(model, "model.layers.2").index == 2


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_store_keeps_every_bit(tmp_path, where, dtype):
    store = RowStore(10**6, tmp_path if where == "file" else None)
    generator = torch.Generator().manual_seed(0)
    rows = {k: torch.randn(3, 1000 + k, generator=generator).to(dtype) for k in range(20)}
    rows[7][0, 0] = float("nan")
    for key, row in rows.items():
        assert store.put(key, row, key)
    assert store.put(3, rows[3] * 2, 5)  # replaced in its place
    rows[3] = rows[3] * 2
    for key, row in rows.items():
        out = torch.empty_like(row)
        store.read(store.find(key), out)
        assert torch.equal(out.view(torch.uint8), row.view(torch.uint8))
    assert store.bytes == sum(r.numel() * r.element_size() for r in rows.values())
    assert not store.put(99, torch.zeros(10**6), 0)
    store.clear()
    assert (len(store), store.bytes) == (0, 0)
    store.close()
    assert not store.put(1, torch.zeros(1), 0)
