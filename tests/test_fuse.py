"""Sibling linears that share an input run as one call, and nothing else changes."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading

import nibblock as nb
import pytest
import torch
import torch.nn.functional as F
from nibblock.nn import _lean, fuse_linears, unfuse_linears
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

CONFIG = nb.Int4Config(group_size=32)


class Attention(nn.Module):
    def __init__(self, width=64, bias=True, kv=24):
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, kv, bias=False)
        self.v_proj = nn.Linear(width, kv, bias=bias)
        self.change_input = False

    def forward(self, x, other=None):
        q = self.q_proj(x)
        if self.change_input:
            x.mul_(2)
        y = x if other is None else other
        return q, self.k_proj(y), self.v_proj(y)


class GatedMLP(nn.Module):
    def __init__(self, width=64, hidden=100):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def pair(make=Attention, **options):
    """A plain int4 module and its fused copy."""
    torch.manual_seed(0)
    plain = nn.ModuleDict({"block": make(**options)}).eval()
    nb.accelerate(plain, CONFIG, progress=False)
    fused = copy.deepcopy(plain)
    assert fuse_linears(fused)
    return plain["block"], fused["block"]


class CountCalls(TorchDispatchMode):
    """Counts int4 products, and all ops."""

    def __init__(self):
        super().__init__()
        self.calls = self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        self.calls += "int4_linear" in str(func)
        return func(*args, **(kwargs or {}))


def calls(function, *args):
    with CountCalls() as counter, torch.no_grad():
        out = function(*args)
    return counter.calls, out


def equal(a, b):
    if isinstance(a, torch.Tensor):
        a, b = (a,), (b,)
    return all(torch.equal(x, y) for x, y in zip(a, b))


# --- sharing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, alone, together", [(Attention, 3, 1), (GatedMLP, 3, 2)])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_and_the_same_bits(make, alone, together, rows, dtype):
    plain, fused = pair(make)
    for _ in range(3):
        x = torch.randn(1, rows, 64, dtype=dtype)
        count, expected = calls(plain, x)
        assert count == alone
        count, got = calls(fused, x)
        assert count == together
        assert equal(got, expected)
        for y in got if isinstance(got, tuple) else (got,):
            assert y.is_contiguous()


def test_many_rows_run_alone():
    plain, fused = pair()
    x = torch.randn(50, 64)
    count, got = calls(fused, x)
    assert count == 3
    assert equal(got, plain(x))
    assert fused(torch.empty(0, 64))[0].shape == (0, 64)


def test_names_and_state_dict_stay():
    plain, fused = pair()
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]
    a, b = plain.state_dict(), fused.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert isinstance(fused, Attention)
    assert repr(fused) == repr(plain)
    storages = {
        p.untyped_storage().data_ptr() for n, p in fused.named_parameters() if "packed" in n
    }
    assert len(storages) == 1


# --- never wrong ----------------------------------------------------------------------------------


def test_another_input_runs_alone():
    plain, fused = pair()
    for _ in range(4):  # past the point where useless sharing stops
        x, other = torch.randn(1, 64), torch.randn(1, 64)
        with torch.no_grad():
            assert equal(fused(x, other), plain(x, other))
    assert calls(fused, x)[0] == 3
    equal_but_other = x.clone()
    with torch.no_grad():
        assert equal(fused(x, equal_but_other), plain(x, x))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_input_changed_in_place(guard):
    plain, fused = pair()
    plain.change_input = fused.change_input = True
    with guard():
        x = torch.randn(1, 64)
        assert equal(fused(x.clone()), plain(x.clone()))


def test_direct_calls_of_a_sibling():
    plain, fused = pair()
    x = torch.randn(1, 64)
    with torch.no_grad():
        first = fused.q_proj(x)
        x.data.mul_(3)  # invisible to the version counter
        assert equal((fused.k_proj(x), fused.v_proj(x)), (plain.k_proj(x), plain.v_proj(x)))
        assert not torch.equal(first, fused.q_proj(x))


def test_exception_inside_forward_leaves_nothing_behind():
    plain, fused = pair()
    x = torch.randn(1, 64)
    with torch.no_grad():
        with pytest.raises(ValueError, match="x last dim must equal in_features"):
            fused(x, torch.randn(1, 63))
        assert not fused._int4_groups[0]._active
        assert equal(fused(x), plain(x))


def test_gradients_flow_as_before():
    plain, fused = pair()
    x = torch.randn(1, 64)
    grads = []
    for module in (plain, fused):
        v = x.clone().requires_grad_()
        sum(y.sum() for y in module(v)).backward()
        grads.append((v.grad, module.q_proj.bias.grad))
    assert equal(*grads)


def test_bias_changes_are_seen():
    plain, fused = pair()
    x = torch.randn(1, 64)
    with torch.no_grad():
        fused(x)
        for module in (plain, fused):
            module.v_proj.bias.add_(1)
        assert equal(fused(x), plain(x))
        for module in (plain, fused):
            module.q_proj.bias = nn.Parameter(torch.ones(64))
        assert equal(fused(x), plain(x))
        for module in (plain, fused):
            module.bfloat16()
        assert equal(fused(x), plain(x))


def test_compute_changes_are_seen():
    plain, fused = pair()
    x = torch.randn(1, 64)
    for names in (["q_proj"], ["k_proj", "v_proj"]):
        for module in (plain, fused):
            for name in names:
                getattr(module, name).compute = "int8"
        with torch.no_grad():
            assert equal(fused(x), plain(x))


def test_replaced_sibling():
    plain, fused = pair()
    x = torch.randn(1, 64)
    for module in (plain, fused):
        module.k_proj = nn.Linear(64, 24, bias=False)
    fused.k_proj.load_state_dict(plain.k_proj.state_dict())
    with torch.no_grad():
        for _ in range(3):
            assert equal(fused(x), plain(x))


@pytest.mark.parametrize("make", [Attention, GatedMLP])
def test_threads(make):
    plain, fused = pair(make)
    inputs = [torch.randn(1, 64) for _ in range(8)]
    expected = [plain(x) for x in inputs]
    wrong = []

    def work(i):
        torch.set_grad_enabled(False)
        for _ in range(200):
            if not equal(fused(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_forward_hooks_of_siblings_run():
    _, fused = pair(GatedMLP)
    seen = []
    fused.up_proj.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    with torch.no_grad():
        fused(torch.randn(1, 64))
    assert seen == [torch.Size([1, 100])]


# --- copies, moves, files -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Attention, GatedMLP])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_again(make, how):
    plain, fused = pair(make)
    x = torch.randn(1, 64)
    expected_calls, expected = calls(fused, x)
    other = how(fused)
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    count, got = calls(other, x)
    assert equal(got, expected)
    assert equal(got, plain(x))
    assert count == expected_calls
    assert isinstance(other, make)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign):
    plain, fused = pair()
    torch.manual_seed(5)
    source = Attention()
    nb.accelerate(source, CONFIG, progress=False)
    x = torch.randn(1, 64)
    fused(x)
    fused.load_state_dict(source.state_dict(), assign=assign)
    count, got = calls(fused, x)
    assert count == 1
    assert equal(got, source(x))


def test_moves():
    plain, fused = pair()
    x = torch.randn(1, 64)
    fused.share_memory()
    with torch.no_grad():
        assert equal(fused(x), plain(x))
    fused.bfloat16().float()
    assert calls(fused, x)[0] == 1
    meta = copy.deepcopy(fused).to("meta")
    assert meta(x.to("meta"))[0].shape == (1, 64)


def test_unfuse():
    plain, fused = pair()
    unfuse_linears(fused)
    assert type(fused) is Attention
    x = torch.randn(1, 64)
    count, got = calls(fused, x)
    assert count == 3
    assert equal(got, plain(x))
    storages = {p.untyped_storage().data_ptr() for p in fused.parameters()}
    assert len(storages) == len(list(fused.parameters()))


def test_compiles_in_one_graph():
    plain, fused = pair()
    x = torch.randn(1, 64)
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend="eager")
        assert equal(compiled(x), plain(x))
        assert equal(torch.export.export(fused, (x,)).module()(x), plain(x))


# --- what is fused --------------------------------------------------------------------------------


def test_what_cannot_share_is_left_alone():
    def names(change):
        module = Attention()
        change(module)
        model = nn.ModuleDict({"a": module})
        nb.accelerate(model, CONFIG, progress=False)
        return fuse_linears(model)

    assert names(lambda m: None) == ["a.(q_proj|k_proj|v_proj)"]
    assert names(lambda m: setattr(m, "k_proj", nn.Linear(32, 24))) == ["a.(q_proj|v_proj)"]
    assert names(lambda m: setattr(m, "k_proj", nn.Identity())) == ["a.(q_proj|v_proj)"]
    assert names(lambda m: setattr(m, "k_proj", m.v_proj)) == []

    def mixed(m):
        m.k_proj = nb.Int4Linear.from_linear(m.k_proj, group_size=64)

    assert names(mixed) == ["a.(q_proj|v_proj)"]


def test_siblings_of_one_format_share_beside_another():
    """As in Q4_K_M files, whose v_proj has more bits than q_proj and k_proj."""
    plain = Attention()
    plain.v_proj = nb.Int4Linear.from_linear(plain.v_proj, group_size=16, bits=8)
    nb.accelerate(plain, CONFIG, progress=False)
    fused = copy.deepcopy(plain)
    assert fuse_linears(fused) == ["q_proj|k_proj"]
    with torch.no_grad():
        for rows in (1, 3, 20):
            x = torch.randn(rows, 64)
            count, got = calls(fused, x)
            assert equal(got, plain(x))
            assert count == (2 if rows <= 8 else 3)


def test_accelerate_with_fuse_reports_groups():
    model = nn.ModuleDict({"attention": Attention(), "mlp": GatedMLP()})
    report = nb.accelerate(model, CONFIG, fuse=True, progress=False)
    assert report.fused == ["attention.(q_proj|k_proj|v_proj)", "mlp.(gate_proj|up_proj)"]
    assert "2 groups of siblings run as one call" in str(report)
    assert fuse_linears(model) == []


# --- transformers ---------------------------------------------------------------------------------


def family(name):
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    if name in ("Qwen3", "Gemma"):
        sizes["head_dim"] = 16
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_known_forwards_are_shorter(name):
    """Fails when transformers rewrites these forwards: check nn/_lean.py against the new source."""
    model = family(name)
    accelerated(model)
    layer = model.model.layers[0]
    position = model.model.rotary_emb(torch.zeros(1, 1, 64), torch.tensor([[3]]))
    runs = {
        "mlp": lambda: layer.mlp(torch.ones(1, 1, 64)),
        "norm": lambda: layer.input_layernorm(torch.ones(1, 1, 64)),
        "attention": lambda: layer.self_attn(
            torch.ones(1, 1, 64), position_embeddings=position, attention_mask=None
        )[0],
        "layer": lambda: layer(
            torch.ones(1, 1, 64), position_embeddings=position, attention_mask=None
        ),
    }
    before = {key: count_ops(run) for key, run in runs.items()}
    fuse_linears(model)
    for key, run in runs.items():
        count, out = count_ops(run)
        assert count < before[key][0], key
        near(out, before[key][1])
    assert type(layer.input_layernorm).forward is _lean._rms_norm
    assert inspect.unwrap(type(layer).forward) is _lean._layer
    unfuse_linears(model)
    assert {key: count_ops(run)[0] for key, run in runs.items()} == {
        k: v[0] for k, v in before.items()
    }


def accelerated(model):
    """Int4 layers between the forwards that transformers has."""
    nb.accelerate(model, CONFIG, progress=False)
    unfuse_linears(model)


def near(actual, expected):
    """Equal but for the rounding of norms and silu (csrc/decoder_ops), a few float32 units in the
    last place, which int16 activations turn into a step of 2^-15 here and there.
    """
    wide = expected.dtype == torch.float32
    torch.testing.assert_close(
        actual, expected, rtol=1e-4 if wide else 2e-2, atol=5e-5 if wide else 2e-2
    )


def near_in_norm(actual, expected):
    """A gradient, entries of which cancel: what it is near is its length."""
    error = torch.linalg.vector_norm((actual - expected).float())
    limit = 1e-4 if expected.dtype == torch.float32 else 3e-2
    assert error <= limit * torch.linalg.vector_norm(expected.float())


def count_ops(run):
    with CountCalls() as counter, torch.no_grad():
        out = run()
    return (counter.calls, counter.ops), out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 3, 64), (5, 64), (0, 64)])
def test_short_forwards_at_many_shapes(shape, dtype):
    plain = family("Llama").to(dtype)
    accelerated(plain)
    fused = copy.deepcopy(plain)
    fuse_linears(fused)
    x = torch.randn(shape, dtype=dtype)
    a, b = plain.model.layers[0], fused.model.layers[0]
    for guard in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with guard():
            near(b.mlp(x), a.mlp(x))
            near(b.input_layernorm(x), a.input_layernorm(x))


def test_an_adapter_inside_a_short_layer_trains():
    """Few rows, and a gradient that begins behind the layer's input."""
    plain = family("Llama")
    accelerated(plain)
    fused = copy.deepcopy(plain)
    fuse_linears(fused)
    grads = []
    for model in (plain, fused):
        nb.add_adapters(model, nb.AdapterConfig(density=0.5, block=16, where="*o_proj"))
        model(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 2
    for a, b in zip(*grads):
        assert a.abs().max() > 0
        near_in_norm(b, a)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"])
def test_transformers_models_give_the_same_tokens(name):
    plain = family(name)
    accelerated(plain)
    fused = copy.deepcopy(plain)
    assert len(fuse_linears(fused)) == 4
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        near(fused(tokens).logits, plain(tokens).logits)
        near(fused(tokens[:, :1]).logits, plain(tokens[:, :1]).logits)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = plain.generate(tokens, output_logits=True, return_dict_in_generate=True, **options)
    got = fused.generate(tokens, output_logits=True, return_dict_in_generate=True, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits):
        near(a, b)
    one = copy.deepcopy(fused)
    assert torch.equal(one.generate(tokens, **options), expected.sequences)
    attentions = [m(tokens, output_attentions=True).attentions for m in (plain, fused)]
    assert equal(
        [a for a in attentions[0] if a is not None], [a for a in attentions[1] if a is not None]
    )
