"""`Int4Experts` as a module: values, gradients, state, where its arithmetic comes from."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import nibblock as nb
import pytest
import torch
from nibblock.nn import _expert_form

pytest.importorskip("transformers", reason="the transformers package is not installed")

from expert_samples import (
    KINDS,
    dense_experts,
    dequantised,
    error,
    forward64,
    routing,
)

FORMATS = [
    dict(group_size=32),
    dict(group_size=64, symmetric=True),
    dict(group_size=128, bits=8),
    dict(group_size=-1, symmetric=True, bits=8),
    dict(group_size=32, method="mse"),
    dict(group_size=256, scale_dtype=torch.float32),
]
# Of rounding, at most that of bfloat16 activations; a wrong expert or gate is off by far more.
BOUND = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def quantised(dense, **options):
    return nb.Int4Experts.from_experts(dense, **{"group_size": 32, **options})


def twin(module, dense):
    """The dense module with the weights that the quantised one stands for."""
    out = copy.deepcopy(dense)
    out.load_state_dict(module.dequantize(), strict=False)
    return out


def inputs(tokens, experts=4, hidden=64, slots=2, dtype=torch.float32, seed=1):
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x, *routing(tokens, experts, slots, seed)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_against_the_oracle_and_the_eager_forward(kind):
    dense = dense_experts(kind)
    module = quantised(dense)
    for tokens in (1, 2, 9):
        args = inputs(tokens)
        with torch.no_grad():
            y, eager = module(*args), twin(module, dense)(*args)
        assert y.shape == args[0].shape
        assert error(y, forward64(kind, dequantised(module), module, *args)) < 1e-2
        assert error(y, eager) < 1e-2


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("dtype", BOUND)
def test_formats_and_dtypes(options, dtype):
    module = quantised(dense_experts(dtype=dtype), **options)
    for tokens in (1, 5):
        args = inputs(tokens, dtype=dtype)
        y = module(*args)
        assert y.dtype == dtype
        expected = forward64("mixtral", dequantised(module), module, *args)
        assert error(y, expected) < BOUND[dtype]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_odd_sizes(kind, group_size):
    dense = dense_experts(kind, experts=3, hidden=48, inner=40)
    module = quantised(dense, group_size=group_size)
    for tokens in (1, 7):
        args = inputs(tokens, experts=3, hidden=48)
        expected = forward64(kind, dequantised(module), module, *args)
        assert error(module(*args), expected) < 1e-2


def test_compute_int8_and_its_setter():
    module = quantised(dense_experts())
    args = inputs(6)
    exact = module(*args)
    module.compute = "int8"
    assert module.compute == "int8"
    assert all(weight._args[-1] == "int8" for weight in module.projections.values())
    assert error(module(*args), exact) < 3e-2  # 0 where the CPU has no int8 units
    with pytest.raises(ValueError, match='compute must be "bf16" or "int8"'):
        module.compute = "fp8"


ROUTES = {
    "one without tokens": ([[0, 1], [1, 3], [3, 0]], 4),
    "all to one": ([[2], [2], [2]], 4),
    "twice the same": ([[1, 1], [0, 1]], 4),
    "not here": ([[0, 4], [4, 4], [3, 1]], 4),
    "one token, one not here": ([[4, 2]], 4),
    "one token, none here": ([[4, 4]], 4),
    "unsorted": ([[3, 0, 2]], 4),
    "one expert": ([[0], [0]], 1),
}


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("kind", ["mixtral", "muse_spark"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_routes(name, kind, dtype):
    index, experts = torch.tensor(ROUTES[name][0], dtype=dtype), ROUTES[name][1]
    module = quantised(dense_experts(kind, experts=experts))
    x = torch.randn(len(index), 64)
    scale = torch.rand(index.shape)
    expected = forward64(kind, dequantised(module), module, x, index, scale)
    assert error(module(x, index, scale), expected) < 1e-2


def test_nothing_to_do():
    module = quantised(dense_experts())
    assert module(*inputs(0)).shape == (0, 64)
    y = module(torch.randn(3, 64), torch.empty(3, 0, dtype=torch.int64), torch.empty(3, 0))
    assert torch.equal(y, torch.zeros(3, 64))


def test_strided_and_sliced_inputs():
    module = quantised(dense_experts())
    x, index, scale = inputs(6)
    expected = module(x, index, scale)
    wide = torch.zeros(6, 130)
    wide[:, 1:129:2] = x
    assert torch.equal(module(wide[:, 1:129:2], index.t().contiguous().t(), scale), expected)


def test_a_token_that_is_not_finite_stays_alone():
    module = quantised(dense_experts())
    x, index, scale = inputs(6)
    x[2] = float("nan")
    y = module(x, index, scale)
    assert y[2].isnan().any()
    assert y[[0, 1, 3, 4, 5]].isfinite().all()


# torch.exp itself depends on the threads from 32768 numbers on: the large case does without.
@pytest.mark.parametrize("kind, tokens", [("mixtral", 1), ("mixtral", 12), ("nemotron_h", 64)])
def test_same_bits_at_any_number_of_threads(kind, tokens):
    module = quantised(dense_experts(kind, experts=3, hidden=192, inner=1001))
    args = inputs(tokens, experts=3, hidden=192)
    args[0].requires_grad_()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = module(*args)
        found.append((y, *torch.autograd.grad(y.square().sum(), args[0])))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_mse_is_no_worse():
    dense = dense_experts()
    errors = []
    for method in ("rtn", "mse"):
        weights = quantised(dense, method=method).dequantize()
        errors.append(sum((w - getattr(dense, n)).square().sum() for n, w in weights.items()))
    assert errors[1] <= errors[0]


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h", "muse_spark"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_gradients_are_those_of_the_dequantised_module(kind, tokens):
    dense = dense_experts(kind)
    module = quantised(dense)
    other = twin(module, dense)
    found = []
    for experts in (module, other):
        x, index, scale = inputs(tokens)
        x.requires_grad_()
        scale.requires_grad_()
        experts.zero_grad()
        (experts(x, index, scale) * torch.arange(64)).sum().backward()
        small = {n: p.grad for n, p in experts.named_parameters() if p.grad is not None}
        found.append({"x": x.grad, "scale": scale.grad, **small})
    ours, theirs = found
    for name in ("gate_up_proj", "up_proj", "down_proj"):  # frozen here
        theirs.pop(name, None)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert error(ours[name], grad) < 2e-2, name
    assert not any(p.requires_grad for n, p in module.named_parameters() if n.endswith("packed"))


def test_bias_gradient_without_one_of_the_input():
    dense = dense_experts("gpt_oss")
    module = quantised(dense)
    module(*inputs(4)).sum().backward()
    assert module.down_proj_bias.grad.abs().sum() > 0
    assert module.gate_up_proj_bias.grad.abs().sum() > 0


def test_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    module = quantised(dense_experts())
    x, index, scale = inputs(5)
    x.requires_grad_()
    (plain,) = torch.autograd.grad(module(x, index, scale).sum(), x)
    y = checkpoint(module, x, index, scale, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], plain)


@pytest.mark.parametrize("tokens", [1, 4])
def test_training_after_inference_mode(tokens):
    module = quantised(dense_experts())
    x, index, scale = inputs(tokens)
    with torch.inference_mode():
        expected = module(x, index, scale)
    x.requires_grad_()
    y = module(x, index, scale)
    assert torch.equal(y.detach(), expected.clone())
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 4])
def test_autocast_as_the_dense_module(tokens):
    dense = dense_experts()
    module = quantised(dense)
    x, index, scale = inputs(tokens)
    for grad in (False, True):
        x.requires_grad_(grad)
        with torch.autocast("cpu", torch.bfloat16):
            y, eager = module(x, index, scale), twin(module, dense)(x, index, scale)
        assert y.dtype == eager.dtype == torch.float32
        assert 1e-4 < error(y, module(x, index, scale)) < 2e-2
        assert error(y, eager) < 2e-2


@pytest.mark.parametrize("tokens", [1, 6])
def test_compiled_around_it(tokens):
    module = quantised(dense_experts("gpt_oss"))
    x, index, scale = inputs(tokens)

    def around(x):
        return module(x * 2, index, scale) + 1

    compiled = torch.compile(around, backend="aot_eager")
    assert torch.equal(compiled(x), around(x))
    a, b = (x.clone().requires_grad_() for _ in range(2))
    compiled(a).sum().backward()
    around(b).sum().backward()
    assert torch.equal(a.grad, b.grad)


# --- what it holds --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("options", FORMATS)
def test_state_dict_is_canonical(kind, options):
    module = quantised(dense_experts(kind, hidden=72, inner=40), **options)
    state = module.state_dict()
    bits, affine = options.get("bits", 4), not options.get("symmetric", False)
    parts = ("qweight", "scales", "offsets") if affine else ("qweight", "scales")
    own = {f"{name}.{part}" for name in ("gate_up_proj", "down_proj") for part in parts}
    biases = {"gate_up_proj_bias", "down_proj_bias"} if kind == "gpt_oss" else set()
    assert state.keys() == own | biases
    assert state["gate_up_proj.qweight"].shape == (4, 80, 72 if bits == 8 else 36)
    assert state["down_proj.qweight"].shape == (4, 72, 40 if bits == 8 else 20)
    assert state["down_proj.qweight"].dtype == torch.uint8
    for name, weight in dequantised(module).items():
        weight = weight.transpose(1, 2) if kind == "gpt_oss" else weight
        assert error(module.dequantize()[name], weight) < 1e-7
        assert torch.equal(module._modules[name].weight, module.dequantize()[name])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_state_dict_round_trip(assign, meta):
    source = quantised(dense_experts("gpt_oss", seed=1))
    other = nb.Int4Experts(dense_experts("gpt_oss", seed=2), group_size=32)
    if meta:
        other.to("meta")
        if not assign:
            return
    other.load_state_dict(source.state_dict(), assign=assign)
    args = inputs(5)
    assert torch.equal(other(*args), source(*args))
    assert torch.equal(other(*inputs(1)), source(*inputs(1)))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_dense_state_dict_is_quantised_on_loading(kind):
    dense = dense_experts(kind)
    module = nb.Int4Experts(dense_experts(kind, seed=5), group_size=32, scale_dtype=torch.float16)
    assert not module.gate_up_proj.weight.any()
    parent = torch.nn.ModuleDict({"mlp": module})
    parent.load_state_dict({f"mlp.{k}": v for k, v in dense.state_dict().items()})
    args = inputs(5)
    expected = quantised(dense, scale_dtype=torch.float16)
    assert torch.equal(module(*args), expected(*args))
    with pytest.raises(RuntimeError, match=r"size mismatch for down_proj.weight"):
        module.load_state_dict({**dense.state_dict(), "down_proj": torch.zeros(4, 3, 3)})
    state = expected.state_dict()
    del state["down_proj.scales"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"down_proj.scales"'):
        module.load_state_dict(state)
    assert torch.equal(module(*args), expected(*args))


def test_views_follow_what_is_loaded():
    module = quantised(dense_experts(), scale_dtype=torch.float16)
    args = inputs(1)
    module(*args)
    other = quantised(dense_experts(seed=3), scale_dtype=torch.float32)
    module.load_state_dict(other.state_dict())  # larger blobs: `packed` gets other memory
    assert torch.equal(module(*args), other(*args))
    module.gate_up_proj.packed.data = module.gate_up_proj.packed.data.clone().zero_()
    assert not module(*args).any()


def copies():
    def saved(module):
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved]


@pytest.mark.parametrize("make", copies(), ids=["deepcopy", "pickle", "save"])
def test_copies(make):
    module = quantised(dense_experts("gpt_oss"))
    args = inputs(1)
    expected = module(*args)
    size = len(pickle.dumps(module))
    other = make(module)
    assert torch.equal(other(*args), expected)
    assert len(pickle.dumps(module)) == size  # with its views made, too
    with torch.no_grad():
        other.gate_up_proj.packed.zero_()
    assert torch.equal(module(*args), expected)
    assert not torch.equal(other(*args), expected)


def test_to_dtype_moves_biases_and_what_weight_shows():
    module = quantised(dense_experts("gpt_oss")).to(torch.bfloat16)
    assert module.down_proj_bias.dtype == module.down_proj.weight.dtype == torch.bfloat16
    assert module.down_proj.packed.dtype == torch.uint8
    assert module.dequantize()["down_proj"].dtype == torch.float32
    assert module(*inputs(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_dense_weights_are_let_go():
    dense = dense_experts("gpt_oss")
    watched = [weakref.ref(p) for p in (dense.gate_up_proj, dense.down_proj)]
    bias = dense.down_proj_bias
    module = quantised(dense)
    assert module.down_proj_bias is bias
    assert module.limit == 0.8
    assert module.training is False
    del dense
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    assert module(*inputs(2)).isfinite().all()


def test_repr_says_what_it_is():
    text = repr(quantised(dense_experts(), bits=8))
    assert "MixtralExperts: experts=4, hidden=64, inner=96, bias=False, compute='bf16'" in text
    assert "experts=4, in_features=64, out_features=192, bits=8, group_size=32" in text


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error_type, text",
    [
        (dict(x=torch.zeros(3, 65)), ValueError, r"hidden_states must be \[tokens, 64\], got"),
        (dict(x=torch.zeros(1, 3, 64)), ValueError, r"got \[1, 3, 64\]"),
        (dict(x=torch.zeros(3, 64).double()), TypeError, "hidden_states must be float32.*float64"),
        (dict(index=torch.zeros(3, 2)), TypeError, "top_k_index must be int64 or int32, got float"),
        (dict(index=torch.zeros(2, 2).long()), ValueError, r"top_k_index must be \[3, k\]"),
        (dict(scale=torch.zeros(3, 1)), ValueError, r"top_k_weights must be \[3, 2\]"),
        (dict(index=torch.full((3, 2), 5)), ValueError, r"top_k_index must be in \[0, 4\], got 5"),
        (dict(index=torch.full((3, 2), -1)), ValueError, r"in \[0, 4\], got -1"),
        (dict(x=[1]), TypeError, "hidden_states must be a Tensor, got list"),
    ],
)
def test_wrong_calls(change, error_type, text):
    module = quantised(dense_experts())
    x, index, scale = inputs(3)
    args = {"x": x, "index": index, "scale": scale, **change}
    with pytest.raises(error_type, match="Int4Experts: .*" + text):
        module(args["x"], args["index"], args["scale"])


def test_one_token_out_of_range():
    module = quantised(dense_experts())
    x, _, scale = inputs(1)
    for bad in (-1, 5):
        with pytest.raises(ValueError, match=rf"top_k_index must be in \[0, 4\], got {bad}"):
            module(x, torch.tensor([[0, bad]]), scale)


def test_wrong_makings():
    with pytest.raises(TypeError, match="experts must be an nn.Module, got int"):
        nb.Int4Experts(3)
    with pytest.raises(ValueError, match="Linear is not decorated"):
        nb.Int4Experts.from_experts(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="group_size must be 32"):
        quantised(dense_experts(), group_size=48)
    dense = dense_experts()
    with torch.no_grad():
        dense.down_proj[2, 5, 7] = float("inf")
    with pytest.raises(ValueError, match="down_proj: expert 2: int4_quantize: weight must be fin"):
        quantised(dense)
    with pytest.raises(ValueError, match="on the meta device"):
        quantised(dense.to("meta"))
    assert nb.Int4Experts(dense).down_proj.packed.is_meta  # zeros need no numbers
    codes = {"gate_up_proj": (torch.zeros(4, 1, 32, dtype=torch.uint8), torch.ones(4, 1, 2), None)}
    with pytest.raises(ValueError, match=r"gate_up_proj.qweight must be \[4, 192, ...\]"):
        nb.Int4Experts.from_codes(dense_experts(), codes, group_size=32)
    with pytest.raises(ValueError, match="codes must hold gate_up_proj, got down_proj"):
        nb.Int4Experts.from_codes(dense_experts(), {"down_proj": ()}, group_size=32)


def test_projections_of_different_formats():
    """What mixed files hold: each projection keeps its own bits and groups, in copies too."""
    dense = dense_experts()
    made = {
        name: nb.Int4Experts.from_experts(dense, **form)
        for name, form in (
            ("gate_up_proj", {"group_size": 64, "bits": 4}),
            ("down_proj", {"group_size": 32, "bits": 8, "symmetric": True}),
        )
    }
    codes = {}
    for name, module in made.items():
        parts = module.projections[name].canonical()
        codes[name] = (parts["qweight"], parts["scales"], parts.get("offsets"))
    mixed = nb.Int4Experts.from_codes(
        dense,
        codes,
        group_size={"gate_up_proj": 64, "down_proj": 32},
        bits={"gate_up_proj": 4, "down_proj": 8},
    )
    for name, module in made.items():
        assert torch.equal(mixed.dequantize()[name], module.dequantize()[name])
        weight = mixed.projections[name]
        assert (weight.bits, weight.group_size) == (8, 32) if name == "down_proj" else (4, 64)
    again = copy.deepcopy(mixed)
    for weight in again.projections.values():
        weight.packed.data.zero_()
    again.load_state_dict(mixed.state_dict())
    for other in (again, copy.deepcopy(mixed)):
        for name, weight in other.dequantize().items():
            assert torch.equal(weight, mixed.dequantize()[name])
    with pytest.raises(
        ValueError, match="bits must be a number, or one for gate_up_proj and down_proj, got up"
    ):
        nb.Int4Experts.from_codes(dense, codes, group_size=64, bits={"up": 4})


def test_constructor_on_an_accelerated_module_keeps_its_gate():
    module = quantised(dense_experts("gpt_oss"))
    again = nb.Int4Experts(module, group_size=64, bits=8)
    again.load_state_dict(twin(module, dense_experts("gpt_oss")).state_dict())
    args = inputs(4)
    assert error(again(*args), module(*args)) < 2e-2


def test_every_decorated_class_of_transformers_is_known():
    """Of the installed transformers: fails when its decorator looks different."""
    for kind in KINDS:
        assert _expert_form.unfit(dense_experts(kind)) == "", kind
