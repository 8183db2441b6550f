"""`Int4Linear` and `Int4Embedding` as modules: they stand wherever torch's own stand."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle

import nibblock as nb
import pytest
import torch
import torch.nn.functional as F
from torch import nn

FORMATS = [
    dict(group_size=32, symmetric=False),
    dict(group_size=64, symmetric=True),
    dict(group_size=128, symmetric=False, bits=8),
    dict(group_size=-1, symmetric=True, bits=8),
    dict(group_size=256, symmetric=False, method="mse"),
]


def layer(n=48, k=130, bias=True, dtype=torch.float32, **options) -> nb.Int4Linear:
    torch.manual_seed(n + k)
    return nb.Int4Linear.from_linear(nn.Linear(k, n, bias=bias, dtype=dtype), **options)


def close(y: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(y.float(), expected.float(), rtol=2e-2, atol=2e-2)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_the_linear_of_its_dequantised_weight(options, dtype):
    q = layer(dtype=dtype, **options)
    assert isinstance(q, nn.Linear)
    for shape in [(130,), (0, 130), (1, 130), (2, 3, 130)]:
        x = torch.randn(shape, dtype=dtype)
        y = q(x)
        assert y.dtype == dtype
        assert y.shape == (*shape[:-1], 48)
        assert close(y, F.linear(x.float(), q.dequantize(), q.bias.float()))


def test_better_method_is_better():
    linear = nn.Linear(256, 64)
    errors = [
        (nb.Int4Linear.from_linear(linear, method=method).weight - linear.weight).pow(2).sum()
        for method in ("rtn", "mse")
    ]
    assert errors[1] <= errors[0]


def test_dequantize_dtypes():
    q = layer()
    assert q.dequantize().dtype == torch.float32
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())
    with pytest.raises(TypeError, match=r"dtype must be float32, bfloat16 or float16, got float64"):
        q.dequantize(torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bias_is_float32_whatever_torch_makes_by_default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        q = nb.Int4Linear(64, 16)
    finally:
        torch.set_default_dtype(before)
    assert q.bias.dtype == torch.float32
    assert q(torch.ones(2, 64)).shape == (2, 16)


def test_from_codes_keeps_scales():
    qweight = torch.randint(0, 256, (20, 40), dtype=torch.uint8)
    scales = torch.rand(20, 3).half()
    offsets = torch.randn(20, 3).half()
    q = nb.Int4Linear.from_codes(
        qweight, scales, offsets, in_features=80, group_size=32, compute="int8"
    )
    state = q.state_dict()
    assert q.scale_dtype == torch.float16
    assert torch.equal(state["qweight"], qweight)
    assert torch.equal(state["scales"], scales)
    assert torch.equal(state["offsets"], offsets)
    codes = torch.stack([qweight & 15, qweight >> 4], -1).reshape(20, 80).float()
    spread = [t.float().repeat_interleave(32, 1)[:, :80] for t in (scales, offsets)]
    assert torch.allclose(q.weight, codes * spread[0] + spread[1], rtol=1e-6, atol=1e-6)


# --- weight is read-only --------------------------------------------------------------------------


def test_weight_is_read_only():
    q = layer()
    before = q.weight
    for value in (nn.Parameter(torch.zeros(48, 130)), torch.zeros(48, 130), None):
        with pytest.raises(AttributeError, match="weight must not be assigned"):
            q.weight = value
    with pytest.raises(AttributeError, match="weight must not be assigned"):
        del q.weight
    assert torch.equal(q.weight, before)
    assert q.weight.dtype == torch.float32
    assert q.weight.device == torch.device("cpu")
    assert dict(q.named_parameters()).keys() == {"packed", "bias"}


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, error, text",
    [
        (torch.ones(3, 130).long(), TypeError, "x must be float32, bfloat16 or float16, got int64"),
        (torch.ones(3, 130, dtype=torch.float64), TypeError, "bfloat16 or float16, got float64"),
        (torch.ones(3, 129), ValueError, r"x last dim must equal in_features 130, got \[3, 129\]"),
        (torch.tensor(1.0), ValueError, "x must have at least 1 dimension, got a scalar"),
        ([1.0], TypeError, "x must be a Tensor, got list"),
        (torch.ones(3, 130).to("meta"), ValueError, "packed must be on meta, where x is, got cpu"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("grad", [True, False])
def test_errors(x, error, text, grad):
    q = layer()
    with torch.set_grad_enabled(grad), pytest.raises(error, match=f"^int4_linear: .*{text}"):
        q(x)


@pytest.mark.parametrize(
    "options, error, text",
    [
        (dict(group_size=48), ValueError, "group_size must be 32, 64, 128, 256 or -1"),
        (dict(bits=3), ValueError, "bits must be 4 or 8, got 3"),
        (dict(compute="fp4"), ValueError, 'compute must be "bf16" or "int8", got "fp4"'),
        (dict(method="best"), ValueError, 'method must be "rtn" or "mse"'),
        (dict(importance=torch.ones(3)), ValueError, r"importance must be \[130\], got \[3\]"),
    ],
)
def test_from_linear_errors(options, error, text):
    with pytest.raises(error, match=text):
        nb.Int4Linear.from_linear(nn.Linear(130, 4), **options)


def test_from_linear_refuses_what_it_cannot_hold():
    with pytest.raises(TypeError, match="linear must be an nn.Linear, got Conv1d"):
        nb.Int4Linear.from_linear(nn.Conv1d(1, 1, 1))
    with pytest.raises(TypeError, match="weight must be float32, bfloat16 or float16, got float64"):
        nb.Int4Linear.from_linear(nn.Linear(8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="meta device"):
        nb.Int4Linear.from_linear(nn.Linear(8, 8, device="meta"))
    bad = nn.Linear(8, 8)
    with torch.no_grad():
        bad.weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match="3"):
        nb.Int4Linear.from_linear(bad)


def test_compute_can_be_changed():
    q = layer()
    x = torch.randn(4, 130)
    y = q(x)
    q.compute = "int8"
    # Where no kernel of this CPU has int8 units, activations keep what they had.
    assert torch.equal(q(x), y) == ("int8" not in nb.explain(q, x).kernel)
    assert close(q(x), y)
    with pytest.raises(ValueError, match="compute must be"):
        q.compute = "fp8"
    assert q.compute == "int8"


# --- state dict -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(options, assign):
    q = layer(**options)
    options = {k: v for k, v in options.items() if k != "method"}
    state = q.state_dict()
    names = {"qweight", "scales", "bias"} | (set() if options["symmetric"] else {"offsets"})
    assert state.keys() == names
    fresh = nb.Int4Linear(130, 48, **options)
    parameter = fresh.packed
    fresh.load_state_dict(state, assign=assign)
    assert torch.equal(fresh.packed, q.packed)
    assert (fresh.packed is parameter) != assign
    assert not fresh.packed.requires_grad
    assert fresh.bias.requires_grad


def test_state_dict_in_a_tree_with_dense_weight():
    dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8, bias=False))
    target = nn.Sequential(nb.Int4Linear(64, 64), nn.ReLU(), nb.Int4Linear(64, 8, bias=False))
    assert str(target.load_state_dict(dense.state_dict())) == "<All keys matched successfully>"
    for i in (0, 2):
        expected = nb.Int4Linear.from_linear(dense[i], scale_dtype=torch.float32)
        assert torch.equal(target[i].packed, expected.packed)


def test_scale_dtype_follows_the_values_and_the_file():
    dense = nn.Linear(96, 40)
    q = nb.Int4Linear.from_linear(dense, group_size=32)
    assert q.scale_dtype == torch.float16
    fresh = nb.Int4Linear(96, 40, group_size=32)
    assert fresh.scale_dtype == torch.float32
    x = torch.randn(3, 96)
    fresh(x)
    fresh.load_state_dict(q.state_dict())
    assert fresh.scale_dtype == torch.float16
    assert torch.equal(fresh(x), q(x))
    with torch.no_grad():
        dense.weight.mul_(1e-5)  # scales below float16's normal numbers
    tiny = nb.Int4Linear.from_linear(dense, group_size=32)
    assert tiny.scale_dtype == torch.float32
    q.load_state_dict(tiny.state_dict())
    assert torch.equal(q(x), tiny(x))
    # A refused file changes nothing.
    before = q.packed.clone()
    bad = {**fresh.state_dict(), "qweight": torch.zeros(40, 3, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="size mismatch for qweight"):
        q.load_state_dict(bad)
    assert q.scale_dtype == torch.float32
    assert torch.equal(q.packed, before)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("mean, compact", [(0.0, True), (0.02, True), (5.0, False)])
def test_float16_offsets_cost_no_accuracy(bits, mean, compact):
    """Where groups are narrow and far from zero an offset has to be exact beside their range."""
    dense = nn.Linear(128, 64, bias=False)
    with torch.no_grad():
        dense.weight.copy_(mean + 0.01 * torch.randn(64, 128))
    found = nb.Int4Linear.from_linear(dense, group_size=64, bits=bits)
    best = nb.Int4Linear.from_linear(dense, group_size=64, bits=bits, scale_dtype=torch.float32)
    assert found.scale_dtype == (torch.float16 if compact else torch.float32)
    errors = [(q.dequantize() - dense.weight).square().mean().sqrt() for q in (found, best)]
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("value, compact", [(0.0, True), (0.25, True), (1 / 3, False)])
def test_constant_groups_stay_exact(value, compact):
    dense = nn.Linear(64, 8, bias=False)
    nn.init.constant_(dense.weight, value)
    q = nb.Int4Linear.from_linear(dense, group_size=32)
    assert (q.scale_dtype == torch.float16) == compact
    assert torch.equal(q.dequantize(), dense.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_has_the_dense_weights_dtype(dtype, tmp_path):
    """Models compute with `.weight` themselves (Mamba's dt_proj) or ask for its dtype."""
    model = nn.Sequential(nn.Linear(64, 8)).to(dtype)
    fresh = copy.deepcopy(model)
    nb.accelerate(model, nb.Int4Config(group_size=32), progress=False)
    assert (model[0].weight @ torch.ones(64, dtype=dtype)).dtype == dtype
    assert torch.equal(model[0].weight, model[0].dequantize(dtype))
    assert copy.deepcopy(model)[0].weight.dtype == dtype
    nb.save(model, tmp_path / "model.safetensors")
    nb.load(tmp_path / "model.safetensors", fresh)
    assert fresh[0].weight.dtype == dtype
    assert model.half()[0].weight.dtype == torch.float16
    assert model.double()[0].weight.dtype == torch.float16  # kernels know no float64


def test_strict_load_reports_keys():
    q = layer()
    state = q.state_dict()
    before = q.packed.clone()
    with pytest.raises(RuntimeError, match='Missing key.*"qweight", "scales", "offsets", "bias"'):
        q.load_state_dict({})
    result = q.load_state_dict({"qweight": state["qweight"], "extra": state["bias"]}, strict=False)
    assert result.missing_keys == ["scales", "offsets", "bias"]
    assert result.unexpected_keys == ["extra"]
    with pytest.raises(RuntimeError, match='Unexpected key.*"offsets"'):
        layer(symmetric=True).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for scales"):
        layer(group_size=32).load_state_dict(state)
    with pytest.raises(RuntimeError, match="qweight must be uint8, got int64"):
        q.load_state_dict({**state, "qweight": state["qweight"].long()})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        q.load_state_dict({"weight": torch.ones(2, 2), "bias": state["bias"]})
    assert torch.equal(q.packed, before)


def test_scale_dtype_of_the_file_is_converted_only_when_exact():
    """Fused siblings keep their format where the file's values fit it (tests/test_packed_state.py
    has the rest); scales and offsets of two dtypes must fit the module's.
    """
    block = nn.Module()
    for name in ("gate_proj", "up_proj"):
        q = nb.Int4Linear.from_linear(nn.Linear(64, 16, bias=False), group_size=32)
        setattr(block, name, q)
    nb.nn.fused.fuse_linears(block)
    fused = block.gate_proj
    assert fused.scale_dtype == torch.float16
    state = fused.state_dict()
    fused.load_state_dict({k: v.float() if k != "qweight" else v for k, v in state.items()})
    assert fused.scale_dtype == torch.float16
    assert torch.equal(fused.state_dict()["scales"], state["scales"])
    with pytest.raises(RuntimeError, match="scales must be exact in float16"):
        fused.load_state_dict({**state, "scales": torch.rand(16, 2)})


def test_meta_device():
    q = layer()
    meta = nb.Int4Linear(130, 48, device="meta")
    assert meta.packed.is_meta
    assert meta.bias.is_meta
    assert meta(torch.ones(2, 130, device="meta")).shape == (2, 48)
    assert meta.state_dict()["qweight"].shape == (48, 65)
    empty = copy.deepcopy(meta).to_empty(device="cpu")
    empty.load_state_dict(q.state_dict())
    meta.load_state_dict(q.state_dict(), assign=True)
    x = torch.randn(3, 130)
    assert torch.equal(meta(x), q(x))
    assert torch.equal(empty(x), q(x))


# --- copies, moves, training ----------------------------------------------------------------------


def test_copies():
    q = layer()
    x = torch.randn(3, 130)
    saved = io.BytesIO()
    torch.save(q, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(q),
        copy.copy(q),
        pickle.loads(pickle.dumps(q)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(other(x), q(x))
        assert repr(other) == repr(q)
    assert copy.deepcopy(q).packed.data_ptr() != q.packed.data_ptr()


def test_to_dtype_leaves_the_weight_alone():
    q = layer()
    weight = q.dequantize()
    for move in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()):
        move(q)
        assert q.packed.dtype == torch.uint8
        assert torch.equal(q.dequantize(), weight)
    q.bfloat16()
    assert q.bias.dtype == torch.bfloat16
    assert q(torch.randn(2, 130, dtype=torch.bfloat16)).dtype == torch.bfloat16


def _child(module, x, out):
    torch.set_num_threads(1)
    out.put(module(x).detach().numpy())


def test_share_memory_with_another_process():
    q = layer()
    q.share_memory()
    assert q.packed.is_shared()
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    x = torch.randn(2, 130)
    process = context.Process(target=_child, args=(q, x, out))
    process.start()
    y = out.get(timeout=120)
    process.join(timeout=60)
    assert process.exitcode == 0
    assert torch.equal(torch.from_numpy(y), q(x))


def test_training_through_it():
    q = layer()
    head = nn.Linear(48, 1)
    body = nn.Linear(130, 130)
    parameters = [*body.parameters(), *q.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    x, target = torch.randn(64, 130), torch.randn(64, 1)
    packed = q.packed.clone()
    losses = []
    for _ in range(20):
        loss = F.mse_loss(head(q(body(x))), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert q.packed.grad is None
    assert torch.equal(q.packed, packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype):
    q = layer(dtype=dtype)
    x = torch.randn(2, 5, 130, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, 48, dtype=dtype)
    dx, db = torch.autograd.grad(q(x), [x, q.bias], grad)
    assert dx.dtype == dtype
    assert torch.allclose(dx.float(), grad.float() @ q.dequantize(), rtol=3e-2, atol=3e-2)
    assert torch.allclose(db.float(), grad.float().sum((0, 1)), rtol=2e-2, atol=2e-2)
    q.requires_grad_(False)
    assert not q(x.detach()).requires_grad


def test_second_derivatives():
    q = layer()
    x = torch.randn(3, 130, requires_grad=True)
    (dx,) = torch.autograd.grad(q(x).pow(2).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    w = q.dequantize()
    assert torch.allclose(ddx, (2 * w.T @ w).sum(0).expand_as(ddx), rtol=2e-2, atol=2e-1)


def test_grad_and_no_grad_paths_agree_bitwise():
    q = layer()
    x = torch.randn(7, 130)
    with_grad = q(x.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(q(x), with_grad)
    with torch.inference_mode():
        assert torch.equal(q(x), with_grad)


def test_hooks_and_functional_call():
    q = layer()
    calls = []
    q.register_forward_hook(lambda m, args, out: calls.append(out.shape))
    x = torch.randn(2, 130)
    y = torch.func.functional_call(q, {"bias": torch.zeros(48)}, (x,))
    assert calls == [y.shape]
    assert torch.allclose(y + q.bias, q(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["int4", "sparse", "masked", "adapter"])
def test_input_may_be_named_as_in_torch(kind):
    model = nn.Sequential(nn.Linear(64, 32))
    if kind == "sparse":
        nb.accelerate(model, nb.BlockSparseConfig(density=0.5, block=16), progress=False)
    elif kind == "masked":
        model[0] = nb.nn.MaskedLinear.from_linear(model[0], 0.5, 16)
    else:
        nb.accelerate(model, nb.Int4Config(group_size=32), progress=False)
    if kind == "adapter":
        nb.add_adapters(model, nb.AdapterConfig(density=0.5, block=16))
    x = torch.randn(3, 64)
    assert torch.equal(model[0](input=x), model[0](x))


def test_extra_repr():
    text = repr(nb.Int4Linear(64, 32, bias=False, symmetric=True, scale_dtype=torch.float16))
    assert "in_features=64, out_features=32, bias=False" in text
    assert "bits=4, group_size=128, symmetric=True, scale_dtype=float16" in text
