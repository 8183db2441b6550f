"""`accelerate`, its report, `save` and `load`."""

from __future__ import annotations

import copy
import json

import nibblock as nb
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

CONFIG = nb.Int4Config(group_size=32)


def quiet(model, config=CONFIG, **options):
    return nb.accelerate(model, config, progress=False, **options)


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """Embedding, blocks and a head tied to the embedding."""

    def __init__(self, width=64, vocabulary=100, tied=True):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


TOKENS = torch.arange(10).reshape(2, 5)


def reasons(report):
    return {row.name: row.reason for row in report.kept}


# --- config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, text",
    [
        (dict(group_size=48), ValueError, "Int4Config: group_size must be 32, 64, 128, 256 or -1"),
        (dict(group_size=0), ValueError, "got 0"),
        (dict(group_size="64"), TypeError, "group_size must be int, got str"),
        (dict(bits=2), ValueError, "bits must be 4 or 8, got 2"),
        (dict(bits=True), TypeError, "bits must be int, got bool"),
        (dict(symmetric=1), TypeError, "symmetric must be bool, got int"),
        (dict(compute="fp16"), ValueError, 'compute must be "bf16" or "int8"'),
        (dict(method="gptq"), ValueError, 'method must be "rtn" or "mse"'),
    ],
)
def test_config_is_checked_when_made(options, error, text):
    with pytest.raises(error, match=text):
        nb.Int4Config(**options)


# --- what is replaced -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_replaces_linears_in_place(bits):
    torch.manual_seed(0)
    model = Model(tied=False).eval()
    expected = model(TOKENS)
    report = quiet(model, nb.Int4Config(group_size=32, bits=bits))
    assert len(report.replaced) == 7
    assert not report.kept
    assert all(type(b.up) is nb.Int4Linear and not b.up.training for b in model.blocks)
    assert type(model.embed) is nn.Embedding
    assert F.cosine_similarity(model(TOKENS).flatten(), expected.flatten(), 0) > 0.98
    assert report.model_bytes_after < report.model_bytes_before
    assert report.rows[0].shape == (128, 64)
    again = quiet(model)
    assert not again.replaced
    assert set(reasons(again).values()) == {"already quantised"}


def test_bias_parameter_is_taken_over():
    model = Model()
    bias = model.blocks[0].up.bias
    quiet(model)
    assert model.blocks[0].up.bias is bias


@pytest.mark.parametrize(
    "where, count",
    [
        (None, 6),
        ("*.up", 3),
        (["blocks.0.*", "blocks.2.down"], 3),
        (lambda name, module: module.out_features == 128, 3),
    ],
)
def test_where(where, count):
    report = quiet(Model(), where=where)
    assert len(report.replaced) == count


def test_skip():
    model = Model(tied=False)
    report = quiet(model, skip=("head", "blocks.1.*"))
    assert reasons(report) == dict.fromkeys(["head", "blocks.1.up", "blocks.1.down"], "in skip")
    assert type(model.head) is nn.Linear
    assert quiet(Model(tied=False), skip="head").kept[0].name == "head"


def test_module_in_several_places_is_replaced_in_all():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    report = quiet(model)
    assert len(report) == 1
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is nb.Int4Linear


def test_linears_tied_to_each_other_stay_tied():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    quiet(model)
    assert model[0].packed is model[1].packed
    assert model[0].bias is not model[1].bias


def test_attributes_move_along():
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].tag = {"rank": 3}
    quiet(model)
    assert model[0].tag == {"rank": 3}
    assert copy.deepcopy(model)[0].tag == {"rank": 3}
    assert "weight" not in model[0].__dict__


def test_hooks_move_along():
    model = nn.Sequential(nn.Linear(64, 64))
    calls = []
    handle = model[0].register_forward_hook(lambda *args: calls.append(1))
    quiet(model)
    model(torch.ones(1, 64))
    handle.remove()
    model(torch.ones(1, 64))
    assert calls == [1]


# --- what is kept, and why ------------------------------------------------------------------------


def test_tied_head_is_kept_or_both_are_quantised():
    model = Model()
    report = quiet(model)
    assert "tied to embed" in reasons(report)["head"]
    assert model.head.weight is model.embed.weight

    model = Model().eval()
    expected = model(TOKENS)
    report = quiet(model, nb.Int4Config(group_size=32, embeddings=True))
    assert not report.kept
    assert model.head.packed is model.embed.packed
    assert {row.action for row in report} == {"int4", "int8"}
    assert F.cosine_similarity(model(TOKENS).flatten(), expected.flatten(), 0) > 0.98

    model = Model()
    report = quiet(model, nb.Int4Config(group_size=32, embeddings=True), skip="head")
    assert "tied to head, which stays dense" in reasons(report)["embed"]


def test_attention_and_encoder_layers_are_kept():
    model = nn.Sequential(
        nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), nn.MultiheadAttention(64, 4)
    ).eval()
    x = torch.randn(2, 5, 64)
    expected = model[0](x)
    report = quiet(model)
    assert not report.replaced
    assert "nn.TransformerEncoderLayer" in reasons(report)["0.linear1"]
    assert "attention" in reasons(report)["0.self_attn.out_proj"].lower()
    assert "nn.MultiheadAttention" in reasons(report)["1.out_proj"]
    assert torch.equal(model[0](x), expected)


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class ExtraParameter(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(1))


class OwnMethod(nn.Linear):
    def logits(self, x):
        return self(x) / 2


class OwnCall(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class OwnAttribute(nn.Linear):
    is_head = True


class NameOnly(nn.Linear):
    pass


def test_unusual_linears():
    patched = nn.Linear(64, 64)
    patched.forward = lambda x: x
    frozen = nn.Linear(64, 64)
    frozen.weight = None
    stored, short = nn.Linear(64, 64), nn.Linear(64, 64)
    stored.weight = nn.Parameter(torch.eye(64).to_sparse())
    short.bias = nn.Parameter(torch.ones(1))
    watched = nn.Linear(64, 64)
    watched.register_state_dict_post_hook(lambda *args: None)
    model = nn.ModuleDict(
        {
            "own": OwnForward(64, 64),
            "extra": ExtraParameter(64, 64),
            "parametrised": parametrizations.weight_norm(nn.Linear(64, 64)),
            "patched": patched,
            "float64": nn.Linear(64, 64, dtype=torch.float64),
            "complex64": nn.Linear(64, 64, dtype=torch.complex64),
            "meta": nn.Linear(64, 64, device="meta"),
            "empty": nn.Linear(64, 0),
            "none": frozen,
            "stored": stored,
            "short": short,
            "name_only": NameOnly(64, 64),
            "method": OwnMethod(64, 64),
            "call": OwnCall(64, 64),
            "attribute": OwnAttribute(64, 64),
            "state": watched,
            "lazy": nn.LazyLinear(64),
            "other_lazy": nn.LazyConv1d(3, 3),  # has no linear; the tree is counted all the same
        }
    )
    report = quiet(model)
    assert [row.name for row in report.replaced] == ["name_only"]
    expected = {
        "own": "forward of its own",
        "extra": "more than a weight and a bias: gain",
        "parametrised": "parametrised",
        "patched": "forward of its own",
        "float64": "float64",
        "complex64": "complex64",
        "meta": "meta device",
        "empty": "empty",
        "none": "not a Parameter",
        "stored": "[64, 64], torch.sparse_coo",
        "short": "its bias is [1]",
        "method": "OwnMethod has logits of its own",
        "call": "OwnCall has __call__ of its own",
        "attribute": "OwnAttribute has is_head of its own",
        "state": "hooks on its state dict",
        "lazy": "lazy and has not run yet",
    }
    assert reasons(report).keys() == expected.keys()
    for name, text in expected.items():
        assert text in reasons(report)[name]


# --- failures leave the model unchanged -----------------------------------------------------------


def test_exception_midway_changes_nothing():
    model = Model(tied=False)
    with torch.no_grad():
        model.blocks[2].down.weight[5, 7] = float("inf")
    modules = list(model.modules())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"accelerate: blocks\.2\.down: .*finite"):
        quiet(model)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert model.state_dict().keys() == state.keys()

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nb.accelerate(model, CONFIG, where="blocks.0.*", progress=stop)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]


def test_wrong_arguments():
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        nb.accelerate("model")
    with pytest.raises(
        TypeError, match="config must be an Int4Config or a BlockSparseConfig, got dict"
    ):
        nb.accelerate(Model(), {"group_size": 32})
    with pytest.raises(ValueError, match=r"got a single Linear; use Int4Linear\.from_linear"):
        nb.accelerate(nn.Linear(64, 64))
    with pytest.raises(TypeError, match="name patterns must be str, got int"):
        quiet(Model(), skip=(1,))
    with pytest.raises(TypeError, match="name patterns must be str or a list of them, got int"):
        nb.accelerate(Model(), where=3)


# --- report and progress --------------------------------------------------------------------------


def test_report_prints_and_folds():
    report = quiet(Model())
    text = str(report)
    assert "blocks.*.up x3" in text
    assert "128 x 64" in text
    assert "6 replaced, 1 kept" in text
    assert len(text.splitlines()) == 6
    facts = json.loads(json.dumps(report.to_dict()))
    assert facts["replaced"] == 6
    assert facts["rows"][0] == {
        "name": "blocks.0.up",
        "action": "int4",
        "reason": "",
        "kind": "Linear",
        "shape": [128, 64],
        "bytes_before": 128 * 64 * 4 + 128 * 4,
        "bytes_after": report.rows[0].bytes_after,
    }
    assert "<pre>" in report._repr_html_()


def test_progress(capsys):
    seen = []
    nb.accelerate(Model(), CONFIG, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]
    assert capsys.readouterr().err == ""
    nb.accelerate(Model(), CONFIG)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nibblock: quantising: 6 layers in")
    assert len(captured.err.splitlines()) == 1
    nb.accelerate(Model(), CONFIG, progress=False)
    assert capsys.readouterr().err == ""


# --- whole models of transformers -----------------------------------------------------------------


def tiny_llama(tied):
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings", [True, False])
def test_llama(tied, embeddings, tmp_path):
    model = tiny_llama(tied)
    with torch.no_grad():
        expected = model(TOKENS).logits
    report = quiet(model, nb.Int4Config(group_size=32, embeddings=embeddings), fuse=True)
    assert len(report.kept) == (1 if tied and not embeddings else 0)
    assert len(report.fused) == 4
    with torch.no_grad():
        logits = model(TOKENS).logits
    assert F.cosine_similarity(logits.flatten(), expected.flatten(), 0) > 0.95
    model.tie_weights()  # transformers does so on many occasions
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits)
    if embeddings and tied:
        assert model.lm_head.packed is model.model.embed_tokens.packed
    assert model.dtype == torch.float32
    out = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 9)
    nb.save(model, tmp_path / "m")
    other = tiny_llama(tied)
    nb.load(tmp_path / "m", other)
    with torch.no_grad():  # (what is loaded is not fused: its norms and silu are torch's)
        torch.testing.assert_close(other(TOKENS).logits, logits, atol=5e-5, rtol=1e-4)


def test_falcon_writes_a_linear_in_other_words(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")

    def falcon(seed):
        torch.manual_seed(seed)
        sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
        ends = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
        return transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, **ends)).eval()

    model, twin = falcon(0), falcon(0)
    report = quiet(model)
    assert [row.kind for row in report.replaced] == ["FalconLinear"] * 8
    for row in report.replaced:
        twin.get_submodule(row.name).weight.data = model.get_submodule(row.name).dequantize()
    with torch.no_grad():
        logits = model(TOKENS).logits
        assert torch.allclose(logits, twin(TOKENS).logits, atol=1e-4)
        nb.save(model, tmp_path / "m")
        assert torch.equal(nb.load(tmp_path / "m", falcon(1))(TOKENS).logits, logits)
    name = report.replaced[0].name  # what trains the weight itself must give the same bits
    with pytest.raises(ValueError, match=f"'{name}': FalconLinear has a forward of its own"):
        nb.sparse_update(twin, {name: [[0, 0]]})
