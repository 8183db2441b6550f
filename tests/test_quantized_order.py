"""load_quantized of files in activation order (desc_act, actorder "group"): nothing is lost."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import nibblock as nb
import numpy as np
import pytest
import torch
from nibblock.formats.quantized import load_quantized_dense
from quantized_samples import Sample, configuration, transformers
from test_quantized_checkpoints import assert_same_function, edit, logits, tokens, unpacked

METHODS = ("gptq", "gptq_v2", "compressed")


def shuffle(group=32, by=lambda name: ""):
    """g_idx: every group has `group` columns, somewhere; one order for each `by(name)` and K."""

    def g_idx(columns, name):
        seed = [columns, *by(name).encode()]
        return np.random.default_rng(seed).permutation(np.arange(columns) // group)

    return g_idx


def each(name):
    """An order for each linear, but for siblings one: they saw the same inputs."""
    for siblings in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        if name.endswith(siblings):
            return name.rpartition(".")[0] + siblings[0]
    return name


def of_name(sample, name):
    """(codes, scales, offsets) in the order of packing, and the columns' places, of one linear."""
    codes, scales, zeros = (t[name] for t in (sample.codes, sample.scales, sample.zeros))
    stored = sample.tensors.get(f"{name}.g_idx", sample.tensors.get(f"{name}.weight_g_idx"))
    places = np.argsort(stored.numpy(), kind="stable")
    return codes[:, places], scales, -(scales * zeros), places


def check(sample, folder, **options):
    """The folder is loaded as it was drawn; returns the model."""
    model = nb.load_quantized(folder, **options)
    for name in sample.codes:
        layer, state = model.get_submodule(name), model.get_submodule(name).state_dict()
        codes, scales, offsets, places = of_name(sample, name)
        assert np.array_equal(unpacked(layer), codes), name
        assert np.array_equal(state["column_order"].numpy(), places), name
        assert np.array_equal(state["scales"].double().numpy(), scales), name
        if layer.affine:
            assert np.array_equal(state["offsets"].double().numpy(), offsets), name
        weight = sample.model.get_submodule(name).weight.detach()
        assert torch.equal(layer.dequantize(), weight), name
    rows = [row for row in model.nibblock_report if row.name in sample.codes]
    assert all(row.reason.endswith("exact, columns in activation order") for row in rows)
    assert_same_function(model, sample.model, 6e-3)
    dense = load_quantized_dense(folder)
    ids = tokens(sample.model)
    assert torch.equal(logits(dense, ids), logits(sample.model, ids))
    return model


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_formats(tmp_path, method, bits, group, symmetric):
    """K is 256 and 160: groups of 64 and 128 leave a short last one, which is scattered too."""
    config = {"hidden_size": 256, "num_hidden_layers": 1}
    g_idx = shuffle(group, each)
    sample = Sample(method, bits, group, symmetric, config=config, g_idx=g_idx)
    model = check(sample, sample.write(tmp_path / "m"))
    layer = model.model.layers[0].mlp.down_proj
    assert (layer.group_size, layer.bits, layer.affine) == (group, bits, not symmetric)
    assert not torch.equal(layer.column_order, torch.arange(160))


@pytest.mark.parametrize("arch", ["qwen2", "gpt_neox", "opt", "gemma2"])
@pytest.mark.parametrize("method", METHODS[1:])
def test_architectures(tmp_path, method, arch):
    sample = Sample(method, arch=arch, g_idx=shuffle(by=each))
    check(sample, sample.write(tmp_path / "m", shards=2))


def test_weights_that_are_transposed(tmp_path):
    sample = Sample("gptq", arch="gpt2", g_idx=shuffle(by=each))
    folder = sample.write(tmp_path / "m")
    model = nb.load_quantized(folder)
    for name in sample.codes:
        weight = sample.model.get_submodule(name).weight.detach()  # [K, N]
        assert torch.equal(model.get_submodule(name).dequantize(), weight.t()), name
    assert_same_function(model, sample.model, 6e-3)
    dense = load_quantized_dense(folder).state_dict()
    assert all(torch.equal(dense[k], v) for k, v in sample.model.state_dict().items())
    model.load_state_dict(dense)  # a dense weight, as [K, N], has its columns in order
    assert model.transformer.h[0].mlp.c_fc.column_order is None
    assert_same_function(model, sample.model, 0.2)


@pytest.mark.parametrize("group,ours", [(96, 32), (192, 64), (512, 256)])
@pytest.mark.parametrize("method", ["gptq", "compressed"])
def test_other_groups_are_divided(tmp_path, method, group, ours):
    config = {"hidden_size": 640, "intermediate_size": 1024, "num_hidden_layers": 1}
    sample = Sample(method, 4, group, config=config, g_idx=shuffle(group))
    model = nb.load_quantized(sample.write(tmp_path / "m"))
    for name in sample.codes:
        layer = model.get_submodule(name)
        assert layer.group_size == ours, name
        assert torch.equal(layer.dequantize(), sample.model.get_submodule(name).weight), name
    report = str(model.nibblock_report)
    assert f"exact, groups of {group} as {ours}, columns in activation order" in report


@pytest.mark.parametrize("method", ["gptq", "compressed"])
def test_orders_that_are_none(tmp_path, method):
    """In order, whole groups that changed places, one group only: nothing has to be gathered."""
    for g_idx in (
        lambda k, _: np.arange(k) // 32,
        lambda k, _: np.arange(k)[::-1] // 32,
    ):
        sample = Sample(method, g_idx=g_idx)
        model = nb.load_quantized(sample.write(tmp_path / "m"))
        for name in sample.codes:
            layer = model.get_submodule(name)
            assert layer.column_order is None
            assert torch.equal(layer.dequantize(), sample.model.get_submodule(name).weight), name
        assert "activation order" not in str(model.nibblock_report)
        assert not any("column_order" in key for key in model.state_dict())


def test_one_layer_in_activation_order(tmp_path):
    def g_idx(columns, name):
        index = np.arange(columns) // 32
        return np.random.default_rng(0).permutation(index) if name.endswith("v_proj") else index

    sample = Sample(g_idx=g_idx, config={"num_hidden_layers": 1})
    model = nb.load_quantized(sample.write(tmp_path / "m"), fuse=True)
    assert [n for n in sample.codes if model.get_submodule(n).column_order is not None] == [
        "model.layers.0.self_attn.v_proj"
    ]
    assert model.nibblock_report.fused == [
        "model.layers.0.self_attn.(q_proj|k_proj)",
        "model.layers.0.mlp.(gate_proj|up_proj)",
    ]
    for name in sample.codes:
        weight = sample.model.get_submodule(name).weight
        assert torch.equal(model.get_submodule(name).dequantize(), weight), name
    assert_same_function(model, sample.model, 6e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_against_the_package(tmp_path, bits, symmetric):
    """compressed-tensors' own packing and decompression, which it applied to gathered columns.

    Its versions of today have no actorder "group" any more, so the gather is done here.
    """
    pytest.importorskip(
        "compressed_tensors", reason="the compressed-tensors package is not installed"
    )
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    sample = Sample("compressed", bits, 32, symmetric, g_idx=shuffle(by=each))
    path = sample.write(tmp_path / "m")
    weights = sample.quantization()["config_groups"]["group_0"]["weights"]
    edit(path, lambda q: q["config_groups"]["group_0"]["weights"].update(actorder="group"))
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    model = check(sample, path)
    for name in sample.codes:
        parts = {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in sample.tensors.items()
            if key.startswith(f"{name}.")
        }
        order = parts.pop("weight_g_idx").argsort(stable=True)
        codes = unpack_from_int32(parts["weight_packed"], bits, parts["weight_shape"])
        parts["weight_packed"] = pack_to_int32(codes[:, order].contiguous(), bits)
        parts["weight_scale"] = parts["weight_scale"].float()
        weight = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        found = model.get_submodule(name).dequantize()
        assert torch.equal(found[:, order], weight), name


@pytest.mark.parametrize("columns", [1, 33, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_taken_some_rows_at_a_time(monkeypatch, bits, columns):
    from nibblock.formats import _quantized_layer

    monkeypatch.setattr(_quantized_layer, "CHUNK_CODES", 3 * columns)
    rng = np.random.default_rng(columns)
    codes, order = rng.integers(0, 1 << bits, (7, columns)), rng.permutation(columns)

    def packed(values):
        if bits == 8:
            return torch.from_numpy(values).byte()
        values = np.pad(values, ((0, 0), (0, columns % 2)))
        return torch.from_numpy(values[:, ::2] | values[:, 1::2] << 4).byte()

    found = _quantized_layer.take_codes(packed(codes), bits, torch.from_numpy(order))
    assert torch.equal(found, packed(codes[:, order]))


# --- what is done with the model ------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample():
    out = Sample("gptq", arch="qwen2", g_idx=shuffle(by=each))
    out.make()
    return out


@pytest.fixture
def folder(sample, tmp_path):
    return sample.write_made(tmp_path / "m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_models_compute_the_same(folder, dtype):
    """The siblings have one order each: they share a call, and the shorter forwards run."""
    model = nb.load_quantized(folder, dtype)
    fused = nb.load_quantized(folder, dtype, fuse=True)
    assert len(fused.nibblock_report.fused) == 4
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for length in (1, 3, 17):
        ids = tokens(model, length)[:1]
        expected = logits(model, ids)
        assert (logits(fused, ids) - expected).norm() <= tolerance * expected.norm()
    text = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    if dtype == torch.float32:
        ids = tokens(model, 4)[:1]
        assert torch.equal(fused.generate(ids, **text), model.generate(ids, **text))
    assert model.state_dict().keys() == fused.state_dict().keys()


def test_siblings_with_orders_of_their_own(tmp_path):
    sample = Sample(g_idx=shuffle(by=lambda name: name))
    path = sample.write(tmp_path / "m")
    check(sample, path)
    assert nb.load_quantized(path, fuse=True).nibblock_report.fused == []
    check(sample, path, fuse=True)


def test_gradients_reach_the_embeddings(sample, folder):
    model = nb.load_quantized(folder)
    ids = tokens(sample.model)
    found = []
    for one in (model, copy.deepcopy(sample.model).double()):
        table = one.get_input_embeddings().weight
        out = one(input_ids=ids).logits.double().square().mean()
        found.append(torch.autograd.grad(out, table)[0].double())
    assert (found[0] - found[1]).norm() < 1e-2 * found[1].norm()


def test_round_trips(tmp_path, folder):
    model = nb.load_quantized(folder)
    ids = tokens(model)
    expected = logits(model, ids)
    nb.save(model, tmp_path / "saved.safetensors")
    config = configuration("qwen2")
    other = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    nb.load(tmp_path / "saved.safetensors", other)
    again = nb.load_quantized(folder)
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(model.state_dict())
    for one in (other, again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(one, ids), expected)
        assert one.state_dict().keys() == model.state_dict().keys()


def test_adapters_on_top(tmp_path, folder):
    model = nb.load_quantized(folder)
    ids = tokens(model)
    before = logits(model, ids)
    nb.add_adapters(model, nb.AdapterConfig(density=0.2, rank=2, block=16))
    assert torch.equal(logits(model, ids), before)
    dense = load_quantized_dense(folder)
    assert len(nb.add_adapters(dense, nb.AdapterConfig(density=0.2, rank=2, block=16))) == 15
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nb.AdapterLinear):
                theirs = dense.get_submodule(name)
                for ours, other in zip(layer.adapter().parameters(), theirs.adapter().parameters()):
                    ours.copy_(torch.randn(ours.shape, generator=generator) * 0.05)
                    other.copy_(ours)
    assert (logits(model, ids) - before).norm() > 0.1 * before.norm()
    assert_same_function(model, dense, 6e-3)
    nb.save(model, tmp_path / "adapter.safetensors")
    fresh = nb.load_quantized(folder)
    nb.load(tmp_path / "adapter.safetensors", fresh)
    assert torch.equal(logits(fresh, ids), logits(model, ids))


def test_convert(tmp_path, folder):
    target = tmp_path / "out.safetensors"
    call = [sys.executable, "-m", "nibblock", "convert", str(folder), str(target), "--json"]
    facts = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
    reasons = {row["reason"] for row in facts["report"]["rows"] if row["action"] == "int4"}
    assert reasons == {"gptq: exact, columns in activation order"}
    config = configuration("qwen2")
    other = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    nb.load(target, other)
    model = nb.load_quantized(folder)
    assert torch.equal(logits(other, tokens(model)), logits(model, tokens(model)))


# --- experts --------------------------------------------------------------------------------------


def of_expert(name):
    """Gate and up of one expert saw the same inputs."""
    for siblings in (("gate_proj", "up_proj"), ("w1", "w3")):
        if name.endswith(siblings):
            return name.rpartition(".")[0] + siblings[0]
    return name


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("method,bits", [("gptq", 4), ("gptq_v2", 8), ("compressed", 4)])
def test_experts(tmp_path, method, bits, arch):
    sample = Sample(method, bits, arch=arch, g_idx=shuffle(by=of_expert))
    folder = sample.write(tmp_path / "m")
    model = nb.load_quantized(folder)
    found = {n: m for n, m in model.named_modules() if isinstance(m, nb.Int4Experts)}
    assert found
    for name, module in found.items():
        for leaf, weight in module.projections.items():
            assert weight.column_order.shape == (4, weight._columns)
            dense = sample.model.get_submodule(name).get_parameter(leaf)
            assert torch.equal(module.dequantize()[leaf], dense), leaf
        row = next(row for row in model.nibblock_report if row.name == name)
        assert row.reason.endswith(": exact, columns in activation order")
        orders = sum(8 * weight.column_order.numel() for weight in module.projections.values())
        assert row.bytes_after == sum(p.numel() for p in module.parameters()) + orders
    dense = load_quantized_dense(folder)
    state = dense.state_dict()
    for key, tensor in sample.model.state_dict().items():
        assert torch.equal(state[key], tensor), key
    assert_same_function(model, dense, 1e-2)
    for length in (1, 3):  # a token alone takes another way through the experts
        ids = tokens(model, length)[:1]
        assert (logits(model, ids) - logits(dense, ids)).norm() < 1e-2 * logits(dense, ids).norm()
    ids = tokens(model)
    nb.save(model, tmp_path / "saved.safetensors")
    other = transformers.AutoModelForCausalLM.from_config(configuration(arch), dtype=torch.float32)
    nb.load(tmp_path / "saved.safetensors", other.eval())
    again = nb.load_quantized(folder)
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(model.state_dict())
    for one in (other, again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(one, ids), logits(model, ids))
    from nibblock._report_cli.describe import describe

    rows = [row for row in describe(tmp_path / "saved.safetensors").rows if row.module == "experts"]
    assert len(rows) == 2 * len(found)
    assert all(row.column_order for row in rows)


def test_gradients_through_experts(tmp_path):
    sample = Sample("gptq", arch="qwen3_moe", g_idx=shuffle(by=of_expert))
    model = nb.load_quantized(sample.write(tmp_path / "m"))
    module = model.model.layers[0].mlp.experts
    experts = sample.model.model.layers[0].mlp.experts
    ups, downs = experts.gate_up_proj.detach().double(), experts.down_proj.detach().double()
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (9, 64))).requires_grad_()
    rows = np.random.default_rng(1).permuted(np.tile(np.arange(4), (9, 1)), axis=1)[:, :2]

    def expert(row, e):
        gate, up = (ups[e] @ row).chunk(2)
        return downs[e] @ (torch.nn.functional.silu(gate) * up)

    wanted = torch.stack([sum(expert(r, e) for e in es) / 2 for r, es in zip(x, rows.tolist())])
    given = x.detach().float().requires_grad_()
    found = module(given, torch.from_numpy(rows), torch.full((9, 2), 0.5))
    assert (found.double() - wanted).norm() < 1e-2 * wanted.norm()
    grad = torch.from_numpy(np.random.default_rng(2).normal(0, 1, (9, 64)))
    (ours,) = torch.autograd.grad(found, given, grad.float())
    (theirs,) = torch.autograd.grad(wanted, x, grad)
    assert (ours.double() - theirs).norm() < 1e-2 * theirs.norm()


def test_experts_whose_orders_are_refused(tmp_path):
    sample = Sample("gptq", arch="mixtral", g_idx=shuffle(by=of_expert))
    module = nb.load_quantized(sample.write(tmp_path / "m")).model.layers[0].mlp.experts
    state = module.state_dict()
    before = {k: v.clone() for k, v in state.items()}
    order = state["down_proj.column_order"]
    for bad, text in (
        (order[0], r"must be \[4, 96\], got \[96\]"),
        (order.clamp(max=94), "must hold each of 0 to 95 once, got 94 twice"),
    ):
        changed = {**state, "down_proj.column_order": bad}
        with pytest.raises(RuntimeError, match=f"down_proj.column_order: .*{text}"):
            module.load_state_dict(changed)
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    for leaf in ("gate_up_proj", "down_proj"):  # codes without an order have none
        state.pop(f"{leaf}.column_order")
    module.load_state_dict(state)
    assert all(weight.column_order is None for weight in module.projections.values())
