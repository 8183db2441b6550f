"""transformers' `Conv1D`, the transposed linear of GPT-2: what each function makes of it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import nibblock as nb
import pytest
import torch
import torch.nn.functional as F
from test_accelerate import TOKENS, quiet, reasons
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs the transformers package")
Conv1D = transformers.pytorch_utils.Conv1D


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=64,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def dequantised(model):
    """A dense GPT-2 whose Conv1Ds hold what the accelerated one's layers stand for."""
    out = gpt2()
    for name, module in model.named_modules():
        if isinstance(module, (nb.Int4Linear, nb.BlockSparseLinear)):
            whole = module.dense() if isinstance(module, nb.BlockSparseLinear) else module.weight
            conv = out.get_submodule(name)
            conv.weight.data, conv.bias = whole.t().contiguous(), module.bias
    return out


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def model_loss(model, batch):
    return F.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


CONFIGS = [
    nb.Int4Config(group_size=32),
    nb.Int4Config(group_size=64, symmetric=True, method="mse"),
    nb.Int4Config(group_size=32, bits=8, embeddings=True),
    nb.BlockSparseConfig(density=0.5, block=16),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_gpt2_computes_what_its_dequantised_twin_computes(config):
    model, before = gpt2(), gpt2().transformer.h[0].attn.c_attn.weight
    report = quiet(model, config)
    rows = {row.name: row for row in report.rows}
    first = rows["transformer.h.0.attn.c_attn"]
    assert (first.kind, first.shape) == ("Conv1D", (192, 64))
    assert first.bytes_before == (192 * 64 + 192) * 4 > first.bytes_after
    assert sum(row.kind == "Conv1D" for row in report.replaced) == 8
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, nn.Linear)
    assert (layer.nf, layer.nx, tuple(layer.weight.shape)) == (192, 64, (192, 64))
    if isinstance(config, nb.Int4Config):
        assert torch.allclose(layer.weight.t(), before, atol=0.02)
    if not getattr(config, "embeddings", False):
        twin = dequantised(model)
        assert torch.allclose(logits(model), logits(twin), atol=2e-4)
        for cache in (True, False):
            options = dict(max_new_tokens=6, do_sample=False, use_cache=cache)
            tokens = model.generate(TOKENS, **options)
            assert torch.equal(tokens, twin.generate(TOKENS, **options))


@pytest.mark.parametrize("config", CONFIGS)
def test_copies_and_files_keep_the_bits(config, tmp_path):
    pytest.importorskip("safetensors", reason="the safetensors package is not installed")
    model = gpt2()
    quiet(model, config)
    expected = logits(model)
    nb.save(model, tmp_path / "m")
    loaded = nb.load(tmp_path / "m", gpt2(seed=1))
    again = nb.load(tmp_path / "m", copy.deepcopy(model))
    for other in (loaded, again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        assert other.transformer.h[1].mlp.c_fc.nf == 256
    wide = gpt2()
    wide.transformer.h[0].attn.c_attn = Conv1D(64, 192)
    with pytest.raises(ValueError, match=r"c_attn must have the file's shape \[192, 64\]"):
        nb.load(tmp_path / "m", wide)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("way", ["accelerated", "loaded", "copied"])
def test_a_dense_state_dict_is_read_as_conv1d_wrote_it(way, assign, tmp_path):
    """Its square weights would fit the wrong way round without an error."""
    other = gpt2(seed=1)
    state = copy.deepcopy(other.state_dict())
    model = gpt2()
    quiet(model)
    quiet(other)
    if way == "loaded":
        pytest.importorskip("safetensors", reason="the safetensors package is not installed")
        nb.save(model, tmp_path / "m")
        model = nb.load(tmp_path / "m", gpt2())
    elif way == "copied":
        model = copy.deepcopy(model)
    model.load_state_dict(state, assign=assign)
    assert torch.equal(logits(model), logits(other))
    state["transformer.h.0.attn.c_attn.weight"] = torch.zeros(192, 64)
    with pytest.raises(RuntimeError, match=r"the shape in the current model is \[64, 192\]"):
        model.load_state_dict(state)


class Own(Conv1D):
    def forward(self, x):
        return super().forward(x) * 2


class NameOnly(Conv1D):
    pass


def test_what_is_kept_and_what_moves_along():
    calls = []
    hooked = Conv1D(32, 64)
    hooked.tag = "here"
    hooked.register_forward_hook(lambda *_: calls.append(1))
    model = nn.ModuleDict(
        {
            "hooked": hooked,
            "own": Own(32, 64),
            "name_only": NameOnly(32, 64),
            "float64": Conv1D(32, 64).double(),
        }
    )
    bias = hooked.bias
    report = quiet(model, skip="none")
    assert reasons(report) == {
        "own": "Own has a forward of its own",
        "float64": "its weight is float64",
    }
    assert model["hooked"].tag == "here"
    assert model["hooked"].bias is bias
    model["hooked"](torch.ones(2, 3, 64))
    assert calls == [1]
    with pytest.raises(ValueError, match="got a single Conv1D"):
        quiet(Conv1D(4, 4))
    with pytest.raises(TypeError, match="linear must be an nn.Linear, got Conv1D"):
        nb.MaskedLinear.from_linear(Conv1D(64, 64), [[0, 0]])


def test_ties():
    model = nn.ModuleList([Conv1D(64, 64), Conv1D(64, 64), nn.Linear(64, 64)])
    model[1].weight = model[0].weight
    report = quiet(model)
    assert not report.kept
    assert model[0].packed is model[1].packed
    assert model[1]._transposed
    assert not model[2]._transposed
    model = nn.ModuleList([Conv1D(64, 64), nn.Linear(64, 64)])
    model[1].weight = model[0].weight
    report = quiet(model)
    assert not report.replaced
    assert reasons(report)["0"] == "its weight is tied to 1, which reads it transposed"


def test_adapters_of_an_accelerated_model(tmp_path):
    pytest.importorskip("safetensors", reason="the safetensors package is not installed")
    model = gpt2()
    quiet(model)
    fresh = copy.deepcopy(model)
    selection = nb.select_blocks(model, [TOKENS] * 2, model_loss, density=0.5, progress=False)
    assert len(selection.shapes) == 8
    nb.add_adapters(model, nb.AdapterConfig(), blocks=selection)
    before = model_loss(model, TOKENS)
    optimizer = torch.optim.SGD(nb.trainable_parameters(model), lr=1.0)
    before.backward()
    optimizer.step()
    assert model_loss(model, TOKENS) < before
    nb.save(model, tmp_path / "a")
    assert torch.equal(logits(nb.load(tmp_path / "a", fresh)), logits(model))


def test_what_needs_a_dense_linear_says_so():
    model = gpt2()
    report = nb.add_adapters(model)
    told = [row for row in report.kept if "accelerate(model) makes it an Int4Linear" in row.reason]
    assert len(told) == 8
    name = "transformer.h.0.attn.c_attn"
    with pytest.raises(ValueError, match=f"'{name}': Conv1D keeps its weight transposed"):
        nb.sparse_update(gpt2(), {name: [[0, 0]]})
    with pytest.raises(ValueError, match=f"got none: 9 left out, {name}: Conv1D keeps"):
        nb.select_blocks(gpt2(), [TOKENS], model_loss)
    selection = nb.select_blocks(
        gpt2(), None, None, method="magnitude", where="lm_head", density=0.5
    )
    assert "transposed" in selection.skipped[name]


def test_transformers_is_not_imported_for_it():
    code = (
        "import sys, torch, nibblock as nb\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64))\n"
        "nb.accelerate(model, progress=False)\n"
        "nb.add_adapters(model)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
