"""NVFP4 of compressed-tensors and Model Optimizer: bit for bit what float32 makes of it."""

from __future__ import annotations

import copy
import json
from fractions import Fraction

import mxfp4_samples
import nibblock as nb
import numpy as np
import nvfp4_samples
import pytest
import torch
from nibblock.formats import _nvfp4
from nibblock.formats.quantized import is_quantized, load_quantized_dense
from quantized_samples import Sample
from test_quantized_checkpoints import assert_same_function, check, edit, logits, tokens
from test_quantized_errors import refused, resave
from test_quantized_experts import check_experts, experts_of

UP = "model.layers.1.mlp.up_proj"
METHODS = ("nvfp4", "modelopt")
NAMES = {
    "nvfp4": ("weight_packed", "weight_scale", "weight_global_scale"),
    "modelopt": ("weight", "weight_scale", "weight_scale_2"),
}
WORDS = {"nvfp4": "compressed-tensors", "modelopt": "modelopt"}
# What published folders say of the activations: 4 bits, scaled per tensor and, as they come, group.
FOUR_BITS = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "dynamic": "local",
}
both = pytest.mark.parametrize("method", METHODS)


# --- bits -----------------------------------------------------------------------------------------


def layer_of(nibbles, of_groups, number, divide):
    names = NAMES["nvfp4" if divide else "modelopt"]
    tensors = (
        torch.from_numpy(nvfp4_samples.pairs(nibbles)),
        nvfp4_samples.e4m3_tensor(of_groups),
        torch.tensor(number),
    )
    given = dict(zip(names, tensors))
    return _nvfp4.layer(None, "x", nibbles.shape[1], given, names, divide)


def nearest(exact):
    """The float32 next to a fraction: to even, subnormals too."""
    if exact == 0:
        return Fraction(0)
    step = Fraction(2) ** -149
    while abs(exact) / step >= 2**24:
        step *= 2
    return round(exact / step) * step


def test_scales_are_those_of_the_specification():
    known = nvfp4_samples.E4M3
    assert [known[byte] for byte in (1, 7, 8, 56, 0x7E, 0xFE)] == [
        *(2.0**-9, 7 * 2.0**-9, 2.0**-6, 1, 448, -448),
    ]
    assert np.isnan(known[[0x7F, 0xFF]]).all()
    torchs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert np.array_equal(torchs.numpy(), known.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("number", [1.0, 3.0, 6917.3, 2.0**-20, 1 / 6917.3, 1.7e30, 3e-35])
def test_every_scale_with_every_element(number, divide):
    """Against fractions rounded to float32 twice, and against the samples' own arithmetic."""
    of_groups = np.array([b for b in range(256) if b & 127 < 127], np.uint8)[:, None]
    nibbles = np.tile(np.arange(16, dtype=np.uint8), (len(of_groups), 1))
    number = np.float32(number)
    layer = layer_of(nibbles, of_groups, number, divide)
    exact = []
    for row, byte in enumerate(of_groups[:, 0]):
        scale = Fraction(float(nvfp4_samples.E4M3[byte]))
        whole = scale / Fraction(float(number)) if divide else scale * Fraction(float(number))
        exact.append(nearest(whole) == whole)
        assert Fraction(float(layer.scales[row, 0])) == nearest(whole) / 2
    assert layer.rounded == ("" if all(exact) else "scales")
    module = nb.Int4Linear.from_codes(
        layer.qweight, layer.scales, in_features=16, group_size=16, bits=8
    )
    scales = nvfp4_samples.scales(of_groups, number, divide)
    dense = module.dequantize()
    assert np.array_equal(dense.numpy(), nvfp4_samples.dense(nibbles, scales))
    for row in range(0, len(of_groups), 17):
        for column in range(16):
            product = Fraction(float(scales[row, 0])) * Fraction(
                float(mxfp4_samples.ELEMENTS[column])
            )
            assert Fraction(float(dense[row, column])) == nearest(product)


# --- folders --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_linears(tmp_path, method, arch):
    sample = Sample(method, arch=arch)
    model = check(sample, sample.write(tmp_path / "m"))
    rows = model.nibblock_report.replaced
    rounded = f"{WORDS[method]}: codes exact, scales rounded to float32"
    reasons = {rounded, f"{WORDS[method]}: exact"}  # (a number of few bits rounds nothing)
    assert {row.action for row in rows} == {"int8"}
    assert rounded in {row.reason for row in rows} <= reasons
    assert model.nibblock_report.notes == []
    layer = model.get_submodule(UP)
    assert (layer.scale_dtype, layer.group_size, layer.affine) == (torch.float32, 16, False)
    assert not hasattr(model.config, "quantization_config")


@both
def test_powers_of_two_are_exact(tmp_path, method):
    sample = Sample(method, number=4096, config={"num_hidden_layers": 1})
    model = check(sample, sample.write(tmp_path / "m"))
    rows = model.nibblock_report.replaced
    assert {row.reason for row in rows} == {f"{WORDS[method]}: exact"}
    assert all(model.get_submodule(n).scale_dtype == torch.float16 for n in sample.codes)


@both
def test_rows_that_end_within_a_group(tmp_path, method):
    config = {"num_hidden_layers": 1, "intermediate_size": 152}
    sample = Sample(method, config=config)
    model = check(sample, sample.write(tmp_path / "m"))
    assert model.model.layers[0].mlp.down_proj.in_features % 16 == 8


@both
@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts(tmp_path, method, arch):
    """Each matrix of each expert has a number of its own."""
    sample = Sample(method, arch=arch, activations=FOUR_BITS)
    model = check_experts(sample, sample.write(tmp_path / "m"))
    names = list(experts_of(model))
    assert len(names) == (1 if arch == "deepseek_v3" else 2)
    row = next(row for row in model.nibblock_report if row.name == names[0])
    start, _, rest = row.reason.partition(": ")
    leaves = ("down_proj", "gate_up_proj")
    assert (row.action, start) == ("int8", WORDS[method])
    assert sorted(rest.split(", ")) == [f"{leaf}: scales rounded to float32" for leaf in leaves]


@both
def test_experts_that_stay_dense(tmp_path, method):
    sample = Sample(method, arch="qwen3_moe", kept=lambda name: "layers.0" in name)
    model = check_experts(sample, sample.write(tmp_path / "m"))
    assert list(experts_of(model)) == ["model.layers.1.mlp.experts"]


@both
def test_an_expert_with_a_dense_weight(tmp_path, method):
    """A dense weight beside a quantised one is one too many, wherever the codes lie."""
    sample = Sample(method, arch="qwen3_moe", config={"num_hidden_layers": 1})
    path = sample.write(tmp_path / "m")
    name = "model.layers.0.mlp.experts.1.up_proj"
    weight = torch.zeros(96, 64, dtype=torch.float16)
    resave(sample, path, **{f"{name}.weight": weight})
    if method == "modelopt":
        refused(path, rf"must hold tensor {name}.weight as U8 \[96, 32\], got F16 \[96, 64\]$")
    else:
        refused(path, f"all experts of .* quantised, or none, got .* and {name} not$")


@both
def test_a_quantised_head_and_shards(tmp_path, method):
    sample = Sample(method, head=True, config={"tie_word_embeddings": False})
    model = check(sample, sample.write(tmp_path / "m", shards=3))
    assert isinstance(model.lm_head, nb.Int4Linear)


@both
def test_fuse_compute_save_and_load(tmp_path, method):
    sample = Sample(method, activations=FOUR_BITS)
    path = sample.write(tmp_path / "m")
    model = nb.load_quantized(path)
    fused = nb.load_quantized(path, dtype=torch.bfloat16, compute="int8", fuse=True)
    assert len(fused.nibblock_report.fused) == 4
    assert_same_function(fused.float(), sample.model, 4e-2)
    nb.save(model, tmp_path / "saved.safetensors")
    other = copy.deepcopy(sample.model)
    nb.load(tmp_path / "saved.safetensors", other)
    ids = tokens(model)
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_against_the_package(tmp_path):
    """compressed-tensors' own compressor writes what we read, and reads what we write."""
    pytest.importorskip(
        "compressed_tensors", reason="the compressed-tensors package is not installed"
    )
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    sample = Sample("nvfp4", activations=FOUR_BITS)
    path = sample.write(tmp_path / "m")
    weights = sample.quantization()["config_groups"]["group_0"]["weights"]
    args = QuantizationArgs(**{**weights, "scale_dtype": torch.float8_e4m3fn})
    scheme = QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=QuantizationArgs(**FOUR_BITS)
    )
    model = nb.load_quantized(path)
    half = load_quantized_dense(path, dtype=torch.bfloat16)
    for name in sample.codes:
        packed, scale, number = (sample.tensors[f"{name}.{part}"] for part in NAMES["nvfp4"])
        given = dict(zip(NAMES["nvfp4"], (packed, scale, number)))
        # In float32, bit for bit; in bfloat16, which decompress rounds to, too.
        elements = unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1], torch.float32)
        wide = dequantize(elements, scale.float(), args=args, global_scale=number)
        assert torch.equal(model.get_submodule(name).dequantize(), wide), name
        back = NVFP4PackedCompressor.decompress(given, scheme)["weight"]
        assert back.dtype == torch.bfloat16
        assert torch.equal(half.get_submodule(name).weight, back), name
        given = {
            "weight": wide,
            "weight_scale": scale.float(),
            "weight_global_scale": number,
            "input_global_scale": sample.tensors[f"{name}.input_global_scale"],
        }
        theirs = NVFP4PackedCompressor.compress(given, scheme)
        assert theirs.keys() == {*NAMES["nvfp4"], "input_global_scale"}
        assert theirs["weight_scale"].dtype == torch.float8_e4m3fn
        for part, tensor in theirs.items():
            if part != "weight_packed":
                ours = sample.tensors[f"{name}.{part}"]
                assert torch.equal(tensor.float(), ours.float()), part
        # (Signs of zeros are not ours to choose: the rest is the same byte by byte.)
        zero = lambda b: torch.where((b & 7) == 0, b & 0x77, b)  # noqa: E731
        for shift in (0, 4):
            low, high = ((t >> shift) & 15 for t in (theirs["weight_packed"], packed))
            assert torch.equal(zero(low), zero(high)), name
        for part, tensor in theirs.items():
            sample.tensors[f"{name}.{part}"] = tensor
    sample.save(path)
    check(sample, path)


# --- activations and caches -----------------------------------------------------------------------

NOTE = 'they stay as they are, which changes no weight; compute="int8" lets'


@both
def test_activations_stay_as_they_are(tmp_path, method):
    sample = Sample(method, activations=FOUR_BITS)
    path = sample.write(tmp_path / "m")
    assert any("input_" in key for key in sample.tensors)
    model = check(sample, path)
    (note,) = model.nibblock_report.notes
    key = "config_groups.group_0.input_activations" if method == "nvfp4" else "quant_algo"
    assert note.startswith(
        f"config.json asks for quantised activations (quantization_config.{key}): {NOTE}"
    )
    assert note in str(model.nibblock_report)


def test_scales_of_activations_that_config_json_does_not_know(tmp_path):
    sample = Sample("nvfp4")
    path = sample.write(tmp_path / "m")
    key = f"{UP}.input_global_scale"
    resave(sample, path, **{key: torch.ones(1)})
    refused(path, f"must hold tensors that the model has, got {key}, which it has not")


CACHES = {
    "nvfp4": ("model.layers.0.self_attn.k_scale", "model.layers.1.self_attn.v_scale"),
    "modelopt": (
        "model.layers.0.self_attn.k_proj.k_scale",
        "model.layers.1.self_attn.v_proj.v_scale",
    ),
}


@both
def test_caches_stay_as_they_are(tmp_path, method):
    sample = Sample(method)
    sample.make()
    for key in CACHES[method]:
        sample.tensors[key] = torch.ones(1)
    path = sample.write_made(tmp_path / "m")
    refused(path, f"must hold tensors that the model has, got {CACHES[method][0]}")
    eight = {"num_bits": 8, "type": "float", "dynamic": False}
    edit(path, lambda q: q.update(kv_cache_scheme=eight))
    (note,) = check(sample, path).nibblock_report.notes
    assert note.startswith(
        "config.json asks for a quantised cache of keys and values "
        "(quantization_config.kv_cache_scheme): it stays as it is"
    )


# --- what is refused ------------------------------------------------------------------------------


@both
def test_bad_tensors(tmp_path, method):
    sample = Sample(method)
    path = sample.write(tmp_path / "m")
    packed, scale, number = (f"{UP}.{part}" for part in NAMES[method])

    def refusal(key, value, message):
        resave(sample, path, **{key: value})
        refused(path, message)

    before = sample.tensors[number]
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        refusal(
            number,
            torch.full_like(before, bad),
            rf"'m/model.safetensors' must hold a finite positive number in tensor {number}, "
            rf"got {bad}$",
        )
    small = sample.tensors[scale].view(torch.uint8).clone()
    small[0] = torch.arange(1, 9)  # multiples of 2^-9: half of such a scale may be no float32
    tiny = torch.full_like(before, 3e38 if method == "nvfp4" else 2.0**-140)
    resave(sample, path, **{number: tiny, scale: small.view(torch.float8_e4m3fn)})
    refused(path, f"must hold a number that keeps scales above .* in tensor {number}, got")
    huge = 2.0**-118 if method == "nvfp4" else 2.0**118
    refusal(
        number,
        torch.full_like(before, huge),
        f"must hold scales that float32 can multiply in tensor {scale}, got more$",
    )
    bad = sample.tensors[scale].view(torch.uint8).clone()
    bad[3, 2] = 0xFF
    refusal(
        scale,
        bad.view(torch.float8_e4m3fn),
        f"must hold finite numbers in tensor {scale}, got NaN or infinity$",
    )
    refusal(scale, bad, rf"must hold tensor {scale} as F8_E4M3 \[160, 8\], got U8 \[160, 8\]$")
    refusal(
        scale,
        sample.tensors[scale][:, :4].clone(),
        rf"must hold tensor {scale} as F8_E4M3 \[160, 8\], got F8_E4M3 \[160, 4\]$",
    )
    refusal(
        packed,
        sample.tensors[packed][:, 1:].clone(),
        rf"must hold tensor {packed} as U8 \[160, 64\], got U8 \[160, 63\]$",
    )
    refusal(
        number,
        torch.ones(2),
        rf"must hold tensor {number} as F32 \[1\] or F32 \[\], got F32 \[2\]$",
    )
    refusal(scale, None, rf"'m' must hold tensor {scale} as")
    if method == "nvfp4":
        refusal(number, None, rf"'m' must hold tensor {number} as F32 \[1\] or F32 \[\], got none$")
    else:  # without its marker a linear is taken for a dense one
        refusal(number, None, rf"must hold tensor {packed} as F32 .* got U8 \[160, 64\]$")
        extra = f"{UP}.pre_quant_scale"  # what NVFP4_AWQ writes: it multiplies the activations
        refusal(extra, torch.ones(128), f"hold tensors that the model has, got {extra}, which")


@pytest.mark.parametrize("shape", [(), (1,)])
@both
def test_numbers_of_both_shapes(tmp_path, method, shape):
    sample = Sample(method, config={"num_hidden_layers": 1})
    sample.make()
    last = NAMES[method][2]
    for key, tensor in sample.tensors.items():
        if key.endswith(f".{last}"):
            sample.tensors[key] = tensor.reshape(shape).clone()
    check(sample, sample.write_made(tmp_path / "m"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 8}, "num_bits as 4, the only one of nvfp4-pack-quantized, got 8"),
        ({"group_size": 32}, "group_size as 16, the only one of nvfp4-pack-quantized, got 32"),
        ({"type": "int"}, 'type as "float", got "int"'),
        ({"strategy": "group"}, 'strategy as "tensor_group", got "group"'),
        ({"symmetric": False}, "symmetric as true, got false"),
        ({"dynamic": True}, "dynamic as false, got true"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    path = Sample("nvfp4", config={"num_hidden_layers": 1}).write(tmp_path / "m")
    edit(path, lambda q: q["config_groups"]["group_0"]["weights"].update(change))
    refused(path, f"'m/config.json' must hold quantization_config.config_groups.*{message}$")


# --- Model Optimizer's settings -------------------------------------------------------------------


def older(path, values, producer="modelopt"):
    """The folder with hf_quant_config.json in place of quantization_config."""
    edit(path, lambda config: config.pop("quantization_config", None), key="")
    found = {"producer": {"name": producer, "version": "0.23.0"}, "quantization": values}
    (path / "hf_quant_config.json").write_text(json.dumps(found))


def test_older_folders(tmp_path):
    sample = Sample("modelopt", activations={"num_bits": 4})
    sample.make()
    for key in CACHES["modelopt"]:
        sample.tensors[key] = torch.ones(())
    path = sample.write_made(tmp_path / "m")
    values = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
    older(path, {**values, "exclude_modules": ["lm_head"]})
    assert is_quantized(path)
    notes = check(sample, path).nibblock_report.notes
    assert notes[0].startswith(
        f"hf_quant_config.json asks for quantised activations (quantization.quant_algo): {NOTE}"
    )
    assert "hf_quant_config.json asks for a quantised cache" in notes[1]
    assert "(quantization.kv_cache_quant_algo)" in notes[1]
    for change, message in (
        ({"quant_algo": "NVFP4_AWQ"}, 'quant_algo as "nvfp4" or "w4a16_nvfp4", got "NVFP4_AWQ"'),
        ({"quant_algo": "FP8"}, 'quant_algo as "nvfp4" or "w4a16_nvfp4", got "FP8"'),
        ({"group_size": 32}, "group_size as 16, the only one of NVFP4, got 32"),
        ({"quant_method": "gptq"}, "bits as an integer, got nothing"),
    ):
        older(path, {**values, **change})
        refused(path, f"'m/hf_quant_config.json' must hold quantization.{message}$")
    older(path, values, "another")
    refused(
        path, '\'m/hf_quant_config.json\' must hold producer.name as "modelopt", got "another"$'
    )
    older(path, {"quant_algo": None, "kv_cache_quant_algo": "FP8"})
    assert not is_quantized(path)
    (path / "hf_quant_config.json").write_text("{")
    refused(path, "'m/hf_quant_config.json' must be JSON")
    with pytest.raises(ValueError, match="'m/hf_quant_config.json' must be JSON"):
        is_quantized(path)
    (path / "hf_quant_config.json").unlink()
    assert not is_quantized(path)


def test_settings_within_settings(tmp_path):
    """Some config.json hold the older file's object."""
    sample = Sample("modelopt", config={"num_hidden_layers": 1})
    path = sample.write(tmp_path / "m")
    inner = {"quant_algo": "W4A16_NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    both = {"quant_method": "modelopt", "quantization": inner}
    edit(path, lambda config: config.update(quantization_config=both), key="")
    check(sample, path)
    inner["quant_algo"] = "MIXED_PRECISION"
    edit(path, lambda config: config.update(quantization_config=both), key="")
    refused(path, 'quantization_config.quantization.quant_algo as "nvfp4" or .*, got "MIXED_PREC')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"num_bits": 8}}, "weights.num_bits as 4, the only one of NVFP4, got 8"),
        ({"weights": {"type": "int"}}, 'weights.type as "float", got "int"'),
        ({"weights": {"group_size": 128}}, "weights.group_size as 16, the only .*, got 128"),
        ({"weights": None}, "weights as an object, got null"),
        ({"pre_quant_scale": True}, "pre_quant_scale as null: .*, got true"),
        ({"output_activations": {"num_bits": 8}}, "output_activations as null: .*, got .*"),
    ],
)
def test_bad_groups(tmp_path, change, message):
    path = Sample("modelopt", config={"num_hidden_layers": 1}).write(tmp_path / "m")
    edit(path, lambda q: q["config_groups"]["group_0"].update(change))
    start = "^load_quantized: 'm/config.json' must hold quantization_config.config_groups.group_0."
    refused(path, f"{start}{message}$")


def test_samples_hold_what_they_say():
    """One row by hand, so that packer and reader cannot be wrong together."""
    nibbles = np.arange(32, dtype=np.uint8)[None] % 16
    of_groups = np.array([[0x38, 0x45]], np.uint8)  # 1 and 3.25
    assert nvfp4_samples.pairs(nibbles)[0, :4].tobytes() == bytes.fromhex("10325476")
    scales = nvfp4_samples.scales(of_groups, np.float32(2), True)
    assert scales.tolist() == [[0.5, 1.625]]
    row = nvfp4_samples.dense(nibbles, scales)[0]
    assert row[:8].tolist() == [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3]
    assert row[24:].tolist() == [-1.625 * x for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
    assert nvfp4_samples.scales(of_groups, np.float32(2), False).tolist() == [[2, 6.5]]
