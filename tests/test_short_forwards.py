"""Int4 models of known architectures: shorter forwards around layers that are not fused."""

from __future__ import annotations

import copy
import pickle

import nibblock as nb
import pytest
import torch
from nibblock.nn import unfuse_linears
from nibblock.nn.fused import has_short_forwards
from test_fuse import CONFIG, accelerated, family, near
from test_fuse_guards import INSIDE, wrap
from test_fuse_rows import Names
from torch import nn

TOKEN = torch.tensor([[3]])
CALLS = ("_int4_siblings", "_int4_mlp", "_int4_layer_end")


def pair(name="Llama", dtype=torch.float32):
    """(the forwards of transformers, ours), with the same int4 layers."""
    short = family(name).to(dtype)
    nb.accelerate(short, CONFIG, progress=False)
    plain = copy.deepcopy(short)
    unfuse_linears(plain)
    assert has_short_forwards(short)
    assert not has_short_forwards(plain)
    return plain, short


def logits(model, tokens=TOKEN):
    """(logits, ops by name)."""
    with torch.no_grad(), Names() as counter:
        out = model(tokens, use_cache=False).logits
    return out, counter.ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_one_call_for_an_mlp_and_one_for_heads(name, dtype):
    plain, short = pair(name, dtype)
    (expected, _), (got, ours) = logits(plain), logits(short)
    near(got, expected)
    # Qwen2 has biases in q, k and v alone.
    assert [ours[name] for name in CALLS] == [2, 0, 2]
    assert sum(ours.values()) == 6  # and the last norm, and the head
    tokens = torch.arange(6).reshape(2, 3)
    (expected, _), (got, ours) = logits(plain, tokens), logits(short, tokens)
    near(got, expected)
    assert [ours[name] for name in CALLS] == [2, 2, 0]
    assert ours["_int4_linear_forward"] == 3  # o_proj of two layers, and the head
    tokens = torch.arange(24).reshape(2, 12)
    near(logits(short, tokens)[0], logits(plain, tokens)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_tokens_behind_a_cache(name, dtype):
    models = pair(name, dtype)
    tokens = torch.arange(12).reshape(2, 6)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True)
    found = [m.generate(tokens, return_dict_in_generate=True, **options) for m in models]
    assert torch.equal(found[0].sequences, found[1].sequences)
    near(torch.stack(found[1].logits), torch.stack(found[0].logits))


@pytest.mark.parametrize("name", INSIDE)
def test_a_forward_of_an_instance_runs(name):
    models = pair()
    tokens = torch.tensor([[3, 50, 9]])
    before = logits(models[0], tokens)[0]
    seen = [wrap(m.model.layers[1].get_submodule(name)) for m in models]
    changed, got = (logits(m, tokens)[0] for m in models)
    assert not torch.equal(changed, before)
    near(got, changed)
    assert len(seen[1]) == len(seen[0]) == 1


@pytest.mark.parametrize("name", ["mlp.gate_proj", "mlp.down_proj", "self_attn.k_proj"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_run(name, kind):
    _, short = pair()
    expected, _ = logits(short)
    seen = []
    module = short.model.layers[0].get_submodule(name)
    handle = getattr(module, kind)(lambda *_: seen.append(1))
    got, ours = logits(short)
    near(got, expected)
    assert seen == [1]
    assert sum(ours[call] for call in CALLS) == 3  # of four
    handle.remove()
    assert torch.equal(logits(short)[0], expected)


def test_what_is_not_an_int4_layer_runs_by_itself():
    plain, short = pair()
    for model in (plain, short):
        nb.add_adapters(model, nb.AdapterConfig(density=0.5, block=16, where=["*0.mlp.down_proj"]))
        model.model.layers[0].self_attn.v_proj = nn.Linear(64, 32, bias=False)
        torch.manual_seed(1)
        nn.init.normal_(model.model.layers[0].self_attn.v_proj.weight)
    (expected, _), (got, ours) = logits(plain), logits(short)
    near(got, expected)
    assert [ours[name] for name in CALLS] == [1, 0, 1]


def test_biases_of_some_and_trained_ones():
    plain, short = pair("Qwen2")
    for model in (plain, short):
        model.model.layers[0].self_attn.k_proj.bias = None
    (expected, _), (got, ours) = logits(plain), logits(short)
    near(got, expected)
    assert ours["_int4_siblings"] == 1
    grads = []
    for model in (plain, short):
        model(TOKEN, use_cache=False).logits.square().sum().backward()
        grads.append(model.model.layers[1].self_attn.v_proj.bias.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3 * grads[0].abs().max())


def test_storage_that_another_module_changed():
    """A layer follows `packed` to another dtype of scales; one call for all sees that late."""
    models = pair()
    for model in models:
        gate = model.model.layers[0].mlp.gate_proj
        state = {k: v.float() if k != "qweight" else v for k, v in gate.state_dict().items()}
        other = copy.deepcopy(gate)
        other.load_state_dict(state, assign=True)
        assert other.packed.numel() > gate.packed.numel()
        gate._parameters["packed"] = other.packed
    (expected, _), (got, _) = logits(models[0]), logits(models[1])
    near(got, expected)


def other_format(model):
    model.model.layers[0].mlp.up_proj.compute = "int8"


def other_linear(model):
    torch.manual_seed(5)
    linear = nb.Int4Linear.from_linear(nn.Linear(64, 32, bias=False), group_size=64)
    model.model.layers[0].self_attn.v_proj = linear


def other_state(model):
    torch.manual_seed(5)
    other = family("Llama")
    nn.init.normal_(other.model.layers[0].mlp.down_proj.weight)
    nb.accelerate(other, CONFIG, progress=False)
    model.load_state_dict(other.state_dict())


def other_bias(model):
    model.model.layers[1].self_attn.o_proj.bias = nn.Parameter(torch.linspace(-1, 1, 64))


def other_norm(model):
    norm = model.model.layers[0].post_attention_layernorm
    norm.weight = nn.Parameter(torch.linspace(0, 2, 64))
    norm.variance_epsilon = 0.1


def other_dtype(model):
    model.bfloat16()


def other_activation(model):
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def dropout(model):
    model.train()


def compiled(model):
    model.model.layers[0].mlp.gate_proj.compile(backend="eager")


def other_class(model):
    class Twice(nb.Int4Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[0].self_attn.o_proj.__class__ = Twice


CHANGES = [other_format, other_linear, other_state, other_bias, other_norm, other_dtype]
CHANGES += [other_activation, dropout, compiled, other_class]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_tokens_is_seen(change):
    models = pair()
    tokens = torch.tensor([[3], [50], [9], [7]])
    before = logits(models[1], tokens)[0]
    for model in models:
        change(model)
    expected, got = (logits(m, tokens)[0] for m in models)
    near(got, expected)
    if change is not other_format:  # (not every level has a kernel for int8)
        assert torch.equal(got, before) == (change in (dropout, compiled))


def test_a_copy_and_a_pickle_have_their_own(tmp_path):
    _, short = pair()
    expected = logits(short)[0]
    other = copy.deepcopy(short)
    again = pickle.loads(pickle.dumps(short))
    other_norm(short)
    assert not torch.equal(logits(short)[0], expected)
    assert torch.equal(logits(other)[0], expected)
    assert torch.equal(logits(again)[0], expected)


def test_a_layer_of_another_width_is_refused_as_ever():
    """The packed bytes of 40 and 64 columns are as many."""
    _, short = pair()
    mlp = short.model.layers[0].mlp
    for name in ("gate_proj", "down_proj"):
        linear = nn.Linear(40, mlp.get_submodule(name).out_features, bias=False)
        own = getattr(mlp, name)
        setattr(mlp, name, nb.Int4Linear.from_linear(linear, group_size=32))
        with torch.no_grad(), pytest.raises(ValueError, match="in_features 40"):
            mlp(torch.randn(1, 1, 64))
        setattr(mlp, name, own)


def test_only_around_what_was_replaced():
    model = family("Llama")
    nb.accelerate(model, CONFIG, where="*layers.1.mlp.*", progress=False)
    first, second = model.model.layers
    names = {type(m).forward for m in (second, second.mlp, second.input_layernorm)}
    assert all(f.__module__ == "nibblock.nn._lean" for f in names)
    for module in (first, first.mlp, first.input_layernorm, second.self_attn):
        assert not has_short_forwards(module) or module is second
    assert type(second.self_attn).__module__ == type(first.self_attn).__module__
    assert type(first).forward.__module__ != "nibblock.nn._lean"
    near(logits(model)[0], logits(copy.deepcopy(model))[0])


def test_a_model_without_known_layers_stays_as_it_is():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    nb.accelerate(model, CONFIG, progress=False)
    assert not has_short_forwards(model)


@pytest.mark.parametrize("short", [False, True])
def test_save_and_load_keep_the_forwards(short, tmp_path):
    models = pair()
    model = models[short]
    nb.save(model, tmp_path / "m.safetensors")
    fresh = family("Llama")
    nb.load(tmp_path / "m.safetensors", fresh)
    assert has_short_forwards(fresh) == short
    assert torch.equal(logits(fresh)[0], logits(model)[0])


def test_compiled_it_is_the_original():
    plain, short = pair()
    mlp = torch.compile(short.model.layers[0].mlp, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 1, 64)
    with torch.no_grad():
        near(mlp(x), plain.model.layers[0].mlp(x))


def test_accelerated_and_untouched():
    """The helper of these tests takes every short forward away again."""
    model = family("Llama")
    accelerated(model)
    assert logits(model)[1].keys().isdisjoint({"_int4_mlp", "_rms_norm_forward"})
