"""compressed-tensors' formats of int8 weights, of several formats in one file, and activations."""

from __future__ import annotations

import nibblock as nb
import numpy as np
import pytest
import torch
from nibblock.formats.quantized import load_quantized_dense
from quantized_samples import Sample
from test_quantized_checkpoints import assert_same_function, check, edit
from test_quantized_errors import refused, resave
from test_quantized_experts import check_experts, experts_of
from test_quantized_order import each, shuffle

UP = "model.layers.1.mlp.up_proj"
ONE = {"num_hidden_layers": 1}
# W8A8 as llm-compressor writes it: activations per token, as they come.
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def group_of(path, change, key="group_0"):
    edit(path, lambda q: change(q["config_groups"][key]))


# --- int-quantized --------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_formats(tmp_path, bits, group, symmetric):
    """Integers of fewer bits lie in int8 too, and become codes of 8 bits."""
    sample = Sample("int", bits, group, symmetric, config=ONE)
    model = check(sample, sample.write(tmp_path / "m"))
    layer = model.model.layers[0].mlp.down_proj
    assert (layer.bits, layer.group_size, layer.affine) == (8, group, not symmetric)
    reasons = {(row.action, row.reason) for row in model.nibblock_report.replaced}
    assert reasons == {("int8", "compressed-tensors: exact")}


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_one_scale_for_all_rows(tmp_path, symmetric):
    sample = Sample("int", 8, -1, symmetric, config=ONE, whole=True)
    path = sample.write(tmp_path / "m")
    assert sample.tensors["model.layers.0.mlp.up_proj.weight_scale"].shape == (1,)
    check(sample, path)
    group_of(path, lambda group: group["weights"].update(strategy=None))  # what is then meant
    check(sample, path)


@pytest.mark.parametrize("scale_dtype", ["BF16", "F32"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scale_dtypes(tmp_path, scale_dtype, symmetric):
    sample = Sample("int", 8, -1, symmetric, scale_dtype, config=ONE)
    exact = symmetric or scale_dtype != "F32"
    model = check(sample, sample.write(tmp_path / "m"), exact)
    assert ("offsets rounded to float32" in str(model.nibblock_report)) != exact


@pytest.mark.parametrize("group,ours", [(48, 16), (80, 16), (96, 32), (192, 64)])
def test_other_groups_are_divided(tmp_path, group, ours):
    config = {"hidden_size": 384, "intermediate_size": 640, **ONE}
    sample = Sample("int", 8, group, config=config)
    model = nb.load_quantized(sample.write(tmp_path / "m"))
    for name in sample.codes:
        layer = model.get_submodule(name)
        assert layer.group_size == ours, name
        weight = sample.model.get_submodule(name).weight
        assert torch.equal(layer.dequantize(), weight), name
    assert f"groups of {group} as {ours}" in str(model.nibblock_report)
    assert_same_function(model, sample.model)


@pytest.mark.parametrize("group", [24, 40])
def test_groups_without_an_exact_form(tmp_path, group):
    path = Sample("int", 8, group, config=ONE).write(tmp_path / "m")
    refused(path, rf"group_size as -1 or a multiple of 16, got {group}$")


def test_naive_quantized(tmp_path):
    sample = Sample("int", 8, -1, True, settings={"format": "naive-quantized"}, config=ONE)
    path = sample.write(tmp_path / "m")
    check(sample, path)
    group_of(path, lambda group: group["weights"].update(type="float"))
    refused(
        path,
        r"'m/config.json' must hold .*group_0.weights.type as \"int\", for floats have no exact "
        r"form here \(naive-quantized\), got \"float\"$",
    )


def test_columns_in_activation_order(tmp_path):
    sample = Sample("int", 8, 16, g_idx=shuffle(16, by=each), config=ONE)
    model = check_order(sample, sample.write(tmp_path / "m"))
    assert "columns in activation order" in str(model.nibblock_report)


def check_order(sample, path):
    model = nb.load_quantized(path)
    dense = load_quantized_dense(path)
    for name in sample.codes:
        weight = sample.model.get_submodule(name).weight
        assert torch.equal(model.get_submodule(name).dequantize(), weight), name
        assert torch.equal(dense.get_submodule(name).weight, weight), name
    assert_same_function(model, sample.model)
    return model


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("arch", ["qwen2", "gpt_neox", "opt"])
def test_architectures(tmp_path, arch, symmetric):
    """Biases, tied heads, other names."""
    sample = Sample("int", 8, -1, symmetric, arch=arch)
    check(sample, sample.write(tmp_path / "m", shards=2))


@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts(tmp_path, arch, group):
    sample = Sample("int", 8, group, arch=arch, activations=TOKENS)
    model = check_experts(sample, sample.write(tmp_path / "m"))
    assert len(experts_of(model)) == (1 if arch == "deepseek_v3" else 2)
    assert len(model.nibblock_report.notes) == 1


def test_experts_that_stay_dense(tmp_path):
    kept = lambda name: "layers.0" in name  # noqa: E731
    sample = Sample("int", 8, -1, arch="mixtral", kept=kept)
    model = check_experts(sample, sample.write(tmp_path / "m"))
    assert list(experts_of(model)) == ["model.layers.1.mlp.experts"]


def test_experts_that_are_not_all_there(tmp_path):
    sample = Sample("int", 8, -1, arch="mixtral", config=ONE)
    path = sample.write(tmp_path / "m")
    name = "model.layers.0.block_sparse_moe.experts.2.w3"
    codes = sample.tensors[f"{name}.weight"]
    resave(sample, path, **{f"{name}.weight": None})
    refused(path, rf"must hold tensor {name}.weight as I8 \[96, 64\], got none$")
    resave(sample, path, **{f"{name}.weight": codes.half()})
    refused(path, rf"must hold tensor {name}.weight as I8 \[96, 64\], got F16")
    resave(sample, path, **{f"{name}.weight_scale": None, f"{name}.weight_zero_point": None})
    refused(path, "hold all experts of .*gate_up_proj quantised, or none, got .* not$")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("form", ["int-quantized", "naive-quantized"])
def test_against_the_package(tmp_path, form, strategy, symmetric):
    """compressed-tensors' own compressor writes what we read, and reads what we write."""
    pytest.importorskip(
        "compressed_tensors", reason="the compressed-tensors package is not installed"
    )
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group = 32 if strategy == "group" else -1
    given = {"settings": {"format": form}, "config": ONE, "whole": strategy == "tensor"}
    sample = Sample("int", 8, group, symmetric, **given)
    path = sample.write(tmp_path / "m")
    weights = sample.quantization()["config_groups"]["group_0"]["weights"]
    assert weights["strategy"] == strategy
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=QuantizationArgs(**TOKENS),
    )
    package = BaseCompressor.get_value_from_registry(form)
    model = nb.load_quantized(path)
    for name in sample.codes:
        parts = {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in sample.tensors.items()
            if key.startswith(f"{name}.")
        }
        parts["weight_scale"] = parts["weight_scale"].float()
        weight = package.decompress(parts, scheme)["weight"]
        assert torch.equal(model.get_submodule(name).dequantize(), weight), name
        whole = {**parts, "weight": weight}
        whole.setdefault("weight_zero_point", torch.zeros_like(parts["weight_scale"]).char())
        theirs = package.compress(whole, scheme)
        assert theirs.keys() == parts.keys()
        for part, tensor in theirs.items():
            assert torch.equal(tensor, parts[part]), part
            scale = part == "weight_scale"
            sample.tensors[f"{name}.{part}"] = tensor.half() if scale else tensor
    sample.save(path)
    check(sample, path)


def test_bad_tensors(tmp_path):
    sample = Sample("int", 8, -1)
    path = sample.write(tmp_path / "m")
    codes, scale, zeros = (f"{UP}.{p}" for p in ("weight", "weight_scale", "weight_zero_point"))
    for key, value, message in (
        (codes, sample.tensors[codes].byte(), r"weight as I8 \[160, 128\], got U8"),
        (codes, sample.tensors[codes][1:].clone(), r"weight as I8 \[160, 128\], got I8 \[159"),
        (codes, None, r"weight as I8 \[160, 128\], got none"),
        (scale, torch.ones(1), r"weight_scale as F32 or F16 or BF16 \[160, 1\], got F32 \[1\]"),
        (scale, None, r"weight as F32 or F16 or BF16 \[160, 128\], got I8 \[160, 128\]"),
        (zeros, None, r"weight_zero_point as I8 \[160, 1\], got none"),
        (zeros, sample.tensors[zeros].int(), r"weight_zero_point as I8 \[160, 1\], got I32"),
    ):
        resave(sample, path, **{key: value})
        refused(path, f"must hold tensor {UP}.{message}")
    bad = sample.tensors[scale].clone()
    bad[7] = float("inf")
    resave(sample, path, **{scale: bad})
    refused(path, f"must hold finite numbers in tensor {scale}, got NaN or infinity$")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 1}, "num_bits as 2 to 8, got 1"),
        ({"num_bits": 16}, "num_bits as 2 to 8, got 16"),
        ({"type": "float"}, r'type as "int", for .*\(int-quantized\), got "float"'),
        ({"strategy": "block"}, 'strategy as "group" or "channel" or "tensor", got "block"'),
        ({"dynamic": True}, "dynamic as false, got true"),
        ({"strategy": "group"}, "group_size as an integer, got null"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    path = Sample("int", 8, -1, config=ONE).write(tmp_path / "m")
    group_of(path, lambda group: group["weights"].update(change))
    refused(path, f"must hold quantization_config.config_groups.group_0.weights.{message}$")


# --- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method,bits", [("int", 8), ("compressed", 4), ("mxfp4", 4)])
def test_activations_stay_as_they_are(tmp_path, method, bits):
    """Scales of them in the file too, where they are fixed."""
    sample = Sample(method, bits, activations={**TOKENS, "strategy": "tensor", "dynamic": False})
    sample.make()
    for name in list(sample.codes):
        sample.tensors[f"{name}.input_scale"] = torch.ones(1)
        sample.tensors[f"{name}.input_zero_point"] = torch.zeros(1, dtype=torch.int8)
    path = sample.write_made(tmp_path / "m")
    assert check(sample, path).nibblock_report.notes == [
        "config.json asks for quantised activations "
        "(quantization_config.config_groups.group_0.input_activations): they stay as they are, "
        'which changes no weight; compute="int8" lets the kernels quantise them, per row and group'
    ]
    group_of(path, lambda group: group.update(input_activations=None))
    refused(path, r"must hold tensors that the model has, got .*\.input_scale, which it has not$")
    group_of(path, lambda group: group.update(input_activations=8))
    refused(path, "group_0.input_activations as an object, got 8$")


def test_caches_of_older_folders(tmp_path):
    """Scales of the cache that lie beside the projections."""
    sample = Sample("int", 8, -1, settings={"kv_cache_scheme": {"num_bits": 8}}, config=ONE)
    sample.make()
    for leaf in ("k_scale", "v_scale", "k_zero_point", "v_zero_point"):
        sample.tensors[f"model.layers.0.self_attn.{leaf}"] = torch.ones(1)
    (note,) = check(sample, sample.write_made(tmp_path / "m")).nibblock_report.notes
    assert "quantised cache of keys and values (quantization_config.kv_cache_scheme)" in note


# --- several formats ------------------------------------------------------------------------------


def mixed(folder, samples, of):
    """One folder of several: of(name) is the key of the sample that a linear comes from."""
    first, *others = samples.values()
    path = first.write(folder)
    for sample in others:
        sample.make()
    groups = {}
    for key, sample in samples.items():
        values = sample.quantization()
        groups[key] = values["config_groups"]["group_0"]
        groups[key]["format"] = values["format"]
        groups[key]["targets"] = [name for name in sample.codes if of(name) == key]
    for name in first.codes:
        source = samples[of(name)]
        if source is first:
            continue
        for key in [k for k in first.tensors if k.rpartition(".")[0] == name]:
            if not key.endswith(".bias"):
                del first.tensors[key]
        for key, tensor in source.tensors.items():
            if key.rpartition(".")[0] == name:
                first.tensors[key] = tensor
    first.save(path)
    edit(path, lambda q: q.update(format="mixed-precision", config_groups=groups))
    return path


def test_mixed_precision(tmp_path):
    samples = {
        "group_0": Sample("compressed", 4, 32),
        "group_1": Sample("nvfp4", activations=TOKENS),
        "group_2": Sample("int", 8, -1, True, activations=TOKENS),
        "group_3": Sample("mxfp4"),
        "group_4": Sample("int", 8, 16, settings={"format": "naive-quantized"}),
    }

    def of(name):
        leaf = name.rpartition(".")[2]
        leaves = ("q_proj", "k_proj", "v_proj", "up_proj")
        return f"group_{leaves.index(leaf) + 1 if leaf in leaves else 0}"

    path = mixed(tmp_path / "m", samples, of)
    model, dense = nb.load_quantized(path), load_quantized_dense(path)
    for name in samples["group_0"].codes:
        weight = samples[of(name)].model.get_submodule(name).weight
        assert torch.equal(model.get_submodule(name).dequantize(), weight), name
        assert torch.equal(dense.get_submodule(name).weight, weight), name
        assert model.get_submodule(name).bits == (4 if of(name) == "group_0" else 8)
    assert_same_function(model, dense)
    (note,) = model.nibblock_report.notes
    assert "config_groups.group_1.input_activations" in note
    for form, got in (("float-quantized", '"float-quantized"'), (None, "null")):
        group_of(path, lambda group, form=form: group.update(format=form), "group_1")
        refused(
            path,
            'group_1.format as "pack-quantized" or "mxfp4-pack-quantized" or '
            '"nvfp4-pack-quantized" or "int-quantized" or "naive-quantized", got ' + got,
        )
    group_of(path, lambda group: group.update(format="mixed-precision"), "group_1")
    refused(path, 'group_1.format as .*, got "mixed-precision"$')
    group_of(path, lambda group: group.update(format="int-quantized"), "group_1")
    refused(path, 'group_1.weights.type as "int", for floats have no exact form .*, got "float"$')


def test_mixed_experts(tmp_path):
    """A projection of experts in NVFP4, the other in int8; then two formats in one projection."""
    samples = {
        "group_0": Sample("nvfp4", arch="mixtral", config=ONE),
        "group_1": Sample("int", 8, -1, True, arch="mixtral", config=ONE),
    }
    down = lambda name: f"group_{int(name.endswith('w2'))}"  # noqa: E731
    path = mixed(tmp_path / "m", samples, down)
    module = nb.load_quantized(path).model.layers[0].mlp.experts
    for leaf, key in (("gate_up_proj", "group_0"), ("down_proj", "group_1")):
        experts = samples[key].model.model.layers[0].mlp.experts
        assert torch.equal(module.dequantize()[leaf], experts.get_parameter(leaf)), leaf
    assert module.projections["down_proj"].group_size == -1
    assert module.projections["gate_up_proj"].group_size == 16
    one = lambda name: f"group_{int(name.endswith('3.w1'))}"  # noqa: E731
    path = mixed(tmp_path / "n", samples, one)
    refused(
        path,
        "must give all experts of .*gate_up_proj the same bits and group size, got 8 bits, group "
        "16 for .*0.w1 and 8 bits, group -1 for .*3.w1$",
    )


def test_mixed_experts_of_equal_groups(tmp_path):
    """int8 and MXFP4 in groups of 32 are 8-bit codes both: one module holds them."""
    samples = {
        "group_0": Sample("mxfp4", arch="mixtral", config=ONE),
        "group_1": Sample("int", 8, 32, arch="mixtral", config=ONE),
    }
    path = mixed(tmp_path / "m", samples, lambda name: f"group_{int('.2.' in name)}")
    module = nb.load_quantized(path).model.layers[0].mlp.experts
    for leaf in ("gate_up_proj", "down_proj"):
        for expert, matrix in enumerate(module.dequantize()[leaf]):
            source = samples[f"group_{int(expert == 2)}"]
            experts = source.model.model.layers[0].mlp.experts
            assert torch.equal(matrix, experts.get_parameter(leaf)[expert]), (leaf, expert)


def test_samples_hold_what_they_say():
    """A matrix by hand, so that packer and reader cannot be wrong together."""
    from quantized_samples import plain_compressed

    codes, zeros = np.array([[0, 255], [128, 1]]), np.array([[0], [130]])
    scales = np.ones((2, 1), np.float32)
    parts = plain_compressed(codes, scales, zeros, 8, False)
    assert parts["weight"].tolist() == [[-128, 127], [0, -127]]
    assert parts["weight_zero_point"].tolist() == [[-128], [2]]
    assert plain_compressed(codes, scales, zeros, 8, True).keys() == {"weight", "weight_scale"}
    assert plain_compressed(codes, scales, zeros, 8, True, True)["weight_scale"].shape == (1,)
