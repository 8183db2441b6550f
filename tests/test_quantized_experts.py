"""load_quantized of mixtures of experts: the file's linears, stacked into Int4Experts exactly."""

from __future__ import annotations

import copy
import re
import subprocess
import sys

import nibblock as nb
import numpy as np
import pytest
import torch
from nibblock.formats.quantized import load_quantized_dense
from peak_memory import peak_of_loading
from quantized_samples import EXPERTS, Sample, configuration, safetensors_torch, transformers
from test_quantized_checkpoints import assert_same_function, edit, logits, tokens

METHODS = ("gptq", "awq", "compressed")


def unpacked(qweight, bits, columns):
    q = qweight.numpy()
    if bits == 4:
        q = np.stack((q & 15, q >> 4), axis=-1).reshape(*q.shape[:-1], -1)
    return q[..., :columns]


def experts_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nb.Int4Experts)}


def stacked(sample, name, leaves, experts, table):
    """[E, N, ...] of the file's matrices: what the fused tensor must hold."""
    inner = EXPERTS[sample.arch][0]
    head = name.replace(".mlp.", f".{inner}.")
    return np.stack(
        [np.concatenate([table[f"{head}.{e}.{leaf}"] for leaf in leaves]) for e in range(experts)]
    )


def check_experts(sample, folder, **options):
    """The folder is loaded as it was drawn; returns the model."""
    model = nb.load_quantized(folder, **options)
    gate, up, down = EXPERTS[sample.arch][1]
    for name, module in experts_of(model).items():
        state = module.state_dict()
        for fused, leaves in (("gate_up_proj", (gate, up)), ("down_proj", (down,))):
            codes, scales, zeros = (
                stacked(sample, name, leaves, module._form.experts, table)
                for table in (sample.codes, sample.scales, sample.zeros)
            )
            weight = module.projections[fused]
            found = unpacked(state[f"{fused}.qweight"], weight.bits, codes.shape[-1])
            assert np.array_equal(found, codes), fused
            assert np.array_equal(state[f"{fused}.scales"].double().numpy(), scales), fused
            middle = 1 << (weight.bits - 1)
            assert weight.affine == bool((zeros != middle).any())
            if weight.affine:
                offsets = state[f"{fused}.offsets"].double().numpy()
                assert np.array_equal(offsets, -(scales * zeros)), fused
            dense = sample.model.get_submodule(name).get_parameter(fused)
            assert torch.equal(module.dequantize()[fused], dense), fused
    for name in sample.codes:
        if ".experts." not in name:
            layer = model.get_submodule(name)
            assert isinstance(layer, nb.Int4Linear), name
            weight = sample.model.get_submodule(name).weight.detach()
            assert torch.equal(layer.dequantize(), weight), name
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    # The dense twin is the reference, bit for bit.
    dense = load_quantized_dense(folder)
    state = dense.state_dict()
    for key, tensor in sample.model.state_dict().items():
        assert torch.equal(state[key], tensor), key
    ids = tokens(sample.model)
    assert torch.equal(logits(dense, ids), logits(sample.model, ids))
    assert_same_function(model, dense)
    return model


def layers(model):
    return len(experts_of(model))


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("method", METHODS)
def test_architectures(tmp_path, method, arch, symmetric):
    sample = Sample(method, 4, 32, symmetric, arch=arch)
    model = check_experts(sample, sample.write(tmp_path / "m"))
    assert layers(model) == (1 if arch == "deepseek_v3" else 2)
    rows = [row for row in model.nibblock_report if row.kind == "Int4Experts"]
    assert [row.name for row in rows] == list(experts_of(model))
    for row, module in zip(rows, experts_of(model).values()):
        assert (row.action, row.shape) == ("int4", (4, 192, 64))
        assert row.reason.endswith(": exact")
        assert row.bytes_before == 4 * 4 * (192 * 64 + 64 * 96)
        assert row.bytes_after == sum(p.numel() for p in module.parameters())
    out = model.generate(tokens(model, 4), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 7)


@pytest.mark.parametrize("arch", EXPERTS)
def test_names_are_those_that_transformers_writes(tmp_path, arch):
    """The samples' names are no invention of ours: save_pretrained writes the older ones, and under
    each name what the codes of that name stand for.
    """
    sample = Sample(arch=arch)
    sample.make()
    sample.model.save_pretrained(tmp_path)
    written = safetensors_torch.load_file(tmp_path / "model.safetensors")
    ours = {re.sub(r"\.(qweight|qzeros|scales)$", ".weight", key) for key in sample.tensors}
    assert ours == written.keys()
    for name, codes in sample.codes.items():
        scales, zeros = (t[name].repeat(32, 1) for t in (sample.scales, sample.zeros))
        columns = codes.shape[1]
        weight = scales[:, :columns] * (codes - zeros[:, :columns])
        assert np.array_equal(written[f"{name}.weight"].double().numpy(), weight), name


@pytest.mark.parametrize(
    "method,bits,group",
    [("gptq", 8, 64), ("gptq", 4, -1), ("gptq_v2", 4, 64), ("compressed", 8, -1), ("awq", 4, 64)],
)
def test_formats(tmp_path, method, bits, group):
    sample = Sample(method, bits, group, arch="qwen3_moe")
    model = check_experts(sample, sample.write(tmp_path / "m"))
    module = model.model.layers[0].mlp.experts
    assert (module.bits, module.down_proj.group_size) == (bits, group)


def test_groups_may_differ_between_projections(tmp_path):
    """A group of 512 is a whole row of 384 columns, and 256 twice of a longer one."""
    sizes = {"hidden_size": 384, "moe_intermediate_size": 640}
    sample = Sample("gptq", 4, 512, arch="qwen3_moe", config={**sizes, "num_hidden_layers": 1})
    model = nb.load_quantized(sample.write(tmp_path / "m"))
    module = model.model.layers[0].mlp.experts
    assert module.gate_up_proj.group_size == -1
    assert module.down_proj.group_size == 256
    dense = sample.model.model.layers[0].mlp.experts
    for name, weight in module.dequantize().items():
        assert torch.equal(weight, dense.get_parameter(name)), name
    assert "down_proj: groups of 512 as 256" in str(model.nibblock_report)
    # ... and a file of ours says so of each.
    nb.save(model, tmp_path / "saved.safetensors")
    other = copy.deepcopy(sample.model)
    nb.load(tmp_path / "saved.safetensors", other)
    assert torch.equal(logits(other, tokens(other)), logits(model, tokens(model)))


def test_bits_may_differ_between_projections(tmp_path):
    one, two = (Sample("gptq", bits, arch="olmoe") for bits in (4, 8))
    path = one.write(tmp_path / "m")
    two.make()
    own = {name for name in two.codes if name.endswith(".down_proj")}
    moved = {k: t for k, t in two.tensors.items() if k.rpartition(".")[0] in own}
    one.tensors.update(moved)
    one.save(path)
    edit(path, lambda q: q.update(dynamic={r"+:.*experts\.\d+\.down_proj": {"bits": 8}}))
    model = nb.load_quantized(path)
    for name, module in experts_of(model).items():
        assert (module.gate_up_proj.bits, module.down_proj.bits) == (4, 8)
        for fused, sample in (("gate_up_proj", one), ("down_proj", two)):
            dense = sample.model.get_submodule(name).get_parameter(fused)
            assert torch.equal(module.dequantize()[fused], dense), fused


@pytest.mark.parametrize("method", METHODS)
def test_some_experts_have_zero_points(tmp_path, method):
    """The affine form holds both: -8 * scale is exact."""
    sample = Sample(method, arch="mixtral", symmetric_where=lambda name: ".experts.2." in name)
    model = check_experts(sample, sample.write(tmp_path / "m"))
    assert model.model.layers[0].mlp.experts.gate_up_proj.affine


def test_schemes_with_and_without_zero_points(tmp_path):
    """compressed-tensors: two groups in config.json; the symmetric experts have no zero points."""
    sample = Sample("compressed", arch="qwen3_moe", symmetric_where=lambda n: ".experts.2." in n)
    path = sample.write(tmp_path / "m")
    for key in list(sample.tensors):
        if re.search(r"\.experts\.2\..*zero_point", key):
            del sample.tensors[key]
    sample.save(path)
    group = copy.deepcopy(sample.quantization()["config_groups"]["group_0"])
    group["targets"] = [r"re:.*\.experts\.2\..*"]
    group["weights"]["symmetric"] = True
    edit(path, lambda q: q["config_groups"].update(group_1=group))
    check_experts(sample, path)


# --- what stays dense -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_not_quantised(tmp_path, method, arch):
    sample = Sample(method, arch=arch, kept=lambda name: ".layers.1." in name)
    path = sample.write(tmp_path / "m")
    model = check_experts(sample, path)
    assert layers(model) == 1
    kept = model.model.layers[1].mlp.experts
    assert type(kept) is type(sample.model.model.layers[1].mlp.experts)
    row = next(row for row in model.nibblock_report if row.name == "model.layers.1.mlp.experts")
    assert (row.action, row.reason) == ("kept", "F16 in the file: dense")
    half = nb.load_quantized(path, dtype=torch.bfloat16).model.layers[1].mlp.experts
    assert half.gate_up_proj.dtype == torch.bfloat16
    assert torch.equal(half.down_proj, kept.down_proj.bfloat16())
    nb.save(model, tmp_path / "saved.safetensors")
    other = copy.deepcopy(sample.model)
    nb.load(tmp_path / "saved.safetensors", other)
    assert torch.equal(logits(other, tokens(other)), logits(model, tokens(model)))


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "fused"])
def test_no_experts_quantised(tmp_path, fused):
    """Attention alone; a file may hold experts as the model does, too."""
    sample = Sample("gptq", arch="olmoe", kept=lambda name: True)
    path = sample.write(tmp_path / "m")
    if fused:
        single = {k: t for k, t in sample.tensors.items() if not re.search(r"experts\.\d", k)}
        whole = {k: t for k, t in sample.model.state_dict().items() if "experts." in k}
        sample.tensors = {**single, **{k: t.half() for k, t in whole.items()}}
        sample.save(path)
    model = check_experts(sample, path)
    assert layers(model) == 0
    row = next(row for row in model.nibblock_report if row.name == "model.layers.0.mlp.experts")
    assert (row.action, row.shape) == ("kept", (4, 192, 64))


def test_layers_that_the_model_leaves_out(tmp_path):
    """DeepSeek-V3's layer 61 predicts further tokens; transformers has no place for it."""
    sample = Sample("gptq", arch="deepseek_v3")
    path = sample.write(tmp_path / "m")
    part = re.compile(r"model\.layers\.1\.")
    more = {part.sub("model.layers.61.", k): t.clone() for k, t in sample.tensors.items()}
    sample.tensors.update(more)
    sample.save(path)
    check_experts(sample, path)


# --- what is done with the model ------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_save_load_and_state_dict(tmp_path, arch):
    sample = Sample("gptq", arch=arch)
    model = nb.load_quantized(sample.write(tmp_path / "m"))
    nb.save(model, tmp_path / "saved.safetensors")
    other = transformers.AutoModelForCausalLM.from_config(configuration(arch)).float().eval()
    nb.load(tmp_path / "saved.safetensors", other)
    ids = tokens(model)
    assert torch.equal(logits(other, ids), logits(model, ids))
    again = nb.load_quantized(tmp_path / "m")
    again.load_state_dict(copy.deepcopy(model).state_dict())
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_dtype_fuse_and_compute(tmp_path):
    sample = Sample("awq", arch="qwen2_moe")
    path = sample.write(tmp_path / "m")
    model = nb.load_quantized(path, dtype=torch.bfloat16, compute="int8", fuse=True)
    assert model(tokens(model)).logits.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.experts.compute == "int8"
    assert model.model.layers[0].mlp.experts.gate_up_proj.weight.dtype == torch.bfloat16
    assert len(model.nibblock_report.fused) == 4  # q/k/v, and gate/up of shared experts
    assert_same_function(model, sample.model, 4e-2)


@pytest.mark.parametrize("arch", ["mixtral", "olmoe"])
def test_demo(tmp_path, arch):
    """The demonstration counts the weights of packed experts as those of dense ones."""
    from nibblock._demo import weight_count

    model = nb.load_quantized(Sample(arch=arch).write(tmp_path / "m"))
    assert weight_count(model) == weight_count(load_quantized_dense(tmp_path / "m"))


def test_convert(tmp_path):
    sample = Sample("gptq", arch="qwen3_moe")
    path = sample.write(tmp_path / "m")
    saved = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "nibblock", "convert", str(path), str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "model.layers.*.mlp.experts x2" in done.stdout
    other = copy.deepcopy(sample.model)
    nb.load(saved, other)
    ids = tokens(other)
    assert torch.equal(logits(other, ids), logits(nb.load_quantized(path), ids))


def test_peak_memory(tmp_path):
    """Loading costs the result and a layer's codes, not a dense copy of the experts."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 8}
    big = Sample("gptq", arch="qwen3_moe", config=sizes, symmetric=True)
    tiny = Sample("gptq", arch="qwen3_moe")
    paths = [s.write(tmp_path / n) for n, s in (("tiny", tiny), ("big", big))]
    added, result = peak_of_loading("load_quantized", *paths)
    dense = 4 * sum(codes.size for codes in big.codes.values()) / 2**20
    assert dense > 90
    assert added < 1.5 * result + 20 < 0.5 * dense, (added, result)


def test_explain(tmp_path):
    """A row for each product of an expert's shape, with the kernel that runs it."""
    sample = Sample("gptq", 4, 32, arch="qwen3_moe", config={"num_hidden_layers": 1})
    model = nb.load_quantized(sample.write(tmp_path / "m"))
    ids = tokens(model)[:1, :5]
    found = nb.explain(model, {"input_ids": ids})
    up, down = ([e for e in found if e.layer.startswith(f"model.layers.0.mlp.experts.{leaf}")]
                for leaf in ("gate_up_proj", "down_proj"))  # fmt: skip
    assert up
    assert len(up) == len(down)

    def rows(explanations):
        """Tokens that the experts saw, all together."""
        total = 0
        for e in explanations:
            times = re.search(r" x(\d+)$", e.layer)
            count = int(re.match(r"\[(\d+), ", e.call)[1])
            total += count * (int(times[1]) if times else 1)
        return total

    slots = model.config.num_experts_per_tok
    assert rows(up) == rows(down) == 5 * slots
    assert "float32 -> 192, int4 group 32, affine, compute bf16" in up[0].call
    assert "96] float32 -> 64" in down[0].call
    table = {row["id"] for row in nb._native.int4_linear_kernels("forward")}
    assert all(e.kernel in table for e in found)
    assert [e.layer for e in found if "experts" not in e.layer]
    # Experts by themselves are a model too.
    module = model.model.layers[0].mlp.experts
    index, weights = torch.tensor([[0, 4], [0, 1]]), torch.ones(2, 2)
    alone = nb.explain(module, (torch.ones(2, 64), index, weights))
    assert {e.layer for e in alone} == {"gate_up_proj", "down_proj"}
    assert sorted(e.call.partition("]")[0] for e in alone) == [
        "[1, 64", "[1, 96", "[2, 64", "[2, 96"
    ]  # fmt: skip


# --- GPT-2 ----------------------------------------------------------------------------------------


def test_conv1d(tmp_path):
    """Quantisers pack the transposed weight of a Conv1D as they do that of a linear."""
    sample = Sample("gptq", 4, 32, arch="gpt2")
    path = sample.write(tmp_path / "m")
    model = nb.load_quantized(path)
    for name in sample.codes:
        layer, conv = model.get_submodule(name), sample.model.get_submodule(name)
        assert isinstance(layer, nb.Int4Linear), name
        assert torch.equal(layer.dequantize().t(), conv.weight), name
        assert torch.equal(layer.bias, conv.bias), name
    assert len(sample.codes) == 8
    dense = load_quantized_dense(path)
    ids = tokens(model)
    assert torch.equal(logits(dense, ids), logits(sample.model, ids))
    assert_same_function(model, dense)
    nb.save(model, tmp_path / "saved.safetensors")
    other = copy.deepcopy(sample.model)
    nb.load(tmp_path / "saved.safetensors", other)
    assert torch.equal(logits(other, ids), logits(model, ids))
    model.load_state_dict(sample.model.state_dict())  # a dense weight, as GPT-2 has it
    assert_same_function(model, sample.model, 0.3)
