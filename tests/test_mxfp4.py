"""MXFP4: every element and exponent exactly, from gpt-oss folders, compressed-tensors and GGUF."""

from __future__ import annotations

import copy
import struct
from fractions import Fraction

import mxfp4_samples
import nibblock as nb
import numpy as np
import pytest
import torch
from expert_samples import dequantised, error, forward64, routing
from mxfp4_samples import GptOss
from nibblock.formats import _e2m1
from nibblock.formats.quantized import load_quantized_dense
from peak_memory import peak_of_loading
from quantized_samples import Sample, transformers
from test_quantized_checkpoints import assert_same_function, check, edit, logits, tokens
from test_quantized_errors import refused
from test_quantized_experts import check_experts, experts_of

EXPERTS = "model.layers.1.mlp.experts"


# --- bits -----------------------------------------------------------------------------------------


def test_elements_and_scales_are_those_of_the_specification():
    assert mxfp4_samples.ELEMENTS.tolist() == [
        *(0, 0.5, 1, 1.5, 2, 3, 4, 6),
        *(-0.0, -0.5, -1, -1.5, -2, -3, -4, -6),
    ]
    both = np.arange(256, dtype=np.uint8).reshape(16, 16)
    low, high = _e2m1.unpack(both)
    for byte in range(256):
        for code, nibble in ((low, byte & 15), (high, byte >> 4)):
            element = (int(code.flat[byte]) - 128) / 2
            assert element == mxfp4_samples.ELEMENTS[nibble]
    assert np.array_equal(_e2m1.unpack_pairs(both), np.stack((low, high), -1).reshape(16, 32))
    scales = _e2m1.half_scales(np.arange(256, dtype=np.uint8))
    assert scales.dtype == np.float32
    assert np.isnan(scales[255])
    for exponent in range(255):  # fractions: no rounding that both sides could share
        assert Fraction(float(scales[exponent])) == Fraction(2) ** (exponent - 128)


def test_a_layer_holds_every_exponent_that_float32_does():
    """The dequantised weight equals the float64 one, subnormal scales included."""
    nibbles, exponents = mxfp4_samples.every_block()
    nibbles, exponents = nibbles[:253], exponents[:253]  # 6 * 2^126 and more leave float32
    layer = nb.Int4Linear.from_codes(
        torch.from_numpy(_e2m1.unpack_pairs(mxfp4_samples.pairs(nibbles))),
        torch.from_numpy(_e2m1.half_scales(exponents)),
        in_features=32,
        group_size=32,
        bits=8,
    )
    assert torch.equal(
        layer.dequantize().double(), torch.from_numpy(mxfp4_samples.dense(nibbles, exponents))
    )
    # Products keep their accuracy wherever bfloat16 has the weights as normal numbers.
    expected = layer.dequantize()[2:].T
    torch.testing.assert_close(layer(torch.eye(32))[:, 2:], expected, rtol=4e-3, atol=0)


# --- gpt-oss folders ------------------------------------------------------------------------------


def test_gpt_oss_is_exact(tmp_path):
    sample = GptOss()
    model = nb.load_quantized(sample.write(tmp_path / "m"))
    found = experts_of(model)
    assert list(found) == ["model.layers.0.mlp.experts", EXPERTS]
    for name, module in found.items():
        state = module.state_dict()
        for leaf, dense in module.dequantize().items():
            nibbles, exponents = sample.drawn[f"{name}.{leaf}"]
            weight = torch.from_numpy(mxfp4_samples.dense(nibbles, exponents)).transpose(1, 2)
            assert torch.equal(dense.double(), weight), leaf
            codes = 128 + 2 * mxfp4_samples.ELEMENTS[nibbles]
            assert np.array_equal(state[f"{leaf}.qweight"].numpy(), codes)
            scales = state[f"{leaf}.scales"]
            assert scales.dtype == torch.float16  # which holds all that were drawn
            assert np.array_equal(
                scales.double().numpy(), np.ldexp(1.0, exponents.astype(int) - 128)
            )
            weight = module.projections[leaf]
            assert (weight.bits, weight.group_size, weight.affine) == (8, 32, False)
            assert torch.equal(state[f"{leaf}_bias"], sample.tensors[f"{name}.{leaf}_bias"].float())
    for row in model.nibblock_report.replaced:
        assert (row.action, row.reason, row.shape) == ("int8", "mxfp4: exact", (4, 64, 192))
        assert row.bytes_before == 4 * 4 * (192 * 64 + 64 * 96 + 192 + 64)
    assert not hasattr(model.config, "quantization_config")
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert_same_function(model, sample.model)
    out = model.generate(tokens(model, 4), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 7)


def test_gpt_oss_as_transformers_reads_it(tmp_path):
    sample = GptOss(exponents=(100, 126))
    path = sample.write(tmp_path / "m")
    ours = load_quantized_dense(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=transformers.Mxfp4Config(dequantize=True)
    ).eval()
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys() == sample.model.state_dict().keys()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, state[key]), key
        assert torch.equal(value, sample.model.state_dict()[key]), key
    ids = tokens(ours)
    assert torch.equal(logits(ours, ids), logits(theirs, ids))
    assert_same_function(nb.load_quantized(path), theirs)


@pytest.mark.parametrize("count", [1, 7])
def test_gpt_oss_experts_in_float64(tmp_path, count):
    """Routed rows against sums one by one, of the weights that the bits stand for."""
    sample = GptOss()
    model = nb.load_quantized(sample.write(tmp_path / "m"))
    module = model.get_submodule(EXPERTS)
    weights = {
        leaf: torch.from_numpy(mxfp4_samples.dense(*sample.drawn[f"{EXPERTS}.{leaf}"]))
        for leaf in ("gate_up_proj", "down_proj")
    }
    for leaf, weight in dequantised(module).items():
        assert torch.equal(weight, weights[leaf])
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(1))
    index, scale = routing(count, 4, 2)
    # (The reference's gate is clamped at the samples' own limit.)
    module.limit = 0.8
    expected = forward64("gpt_oss", weights, module, x, index, scale)
    assert error(module(x, index, scale), expected) < 1e-2


@pytest.mark.parametrize("exponents", [(0, 3), (1, 250), (200, 253)])
def test_exponents_that_need_float32(tmp_path, exponents):
    sample = GptOss(exponents, num_hidden_layers=1)
    model = nb.load_quantized(sample.write(tmp_path / "m"))
    module = model.model.layers[0].mlp.experts
    for leaf, weight in module.dequantize().items():
        drawn = sample.drawn[f"model.layers.0.mlp.experts.{leaf}"]
        wanted = torch.from_numpy(mxfp4_samples.dense(*drawn)).transpose(1, 2)
        assert torch.equal(weight.double(), wanted)
        assert module.projections[leaf].scale_dtype == torch.float32


def test_layers_that_are_not_quantised(tmp_path):
    sample = GptOss(kept=(1,))
    model = nb.load_quantized(sample.write(tmp_path / "m"))
    assert list(experts_of(model)) == ["model.layers.0.mlp.experts"]
    kept = model.get_submodule(EXPERTS)
    assert torch.equal(kept.gate_up_proj, sample.model.get_submodule(EXPERTS).gate_up_proj)
    row = next(row for row in model.nibblock_report if row.name == EXPERTS)
    assert (row.action, row.reason) == ("kept", "BF16 in the file: dense")
    assert_same_function(model, sample.model)


def test_gpt_oss_is_saved_and_loaded(tmp_path):
    sample = GptOss(exponents=(90, 126))
    path = sample.write(tmp_path / "m")
    model = nb.load_quantized(path, dtype=torch.bfloat16, compute="int8", fuse=True)
    assert model.get_submodule(EXPERTS).compute == "int8"
    assert model.get_submodule(EXPERTS).gate_up_proj.weight.dtype == torch.bfloat16
    assert_same_function(model.float(), sample.model, 4e-2)
    model = nb.load_quantized(path)
    nb.save(model, tmp_path / "saved.safetensors")
    other = copy.deepcopy(sample.model)
    nb.load(tmp_path / "saved.safetensors", other)
    ids = tokens(model)
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_peak_memory(tmp_path):
    """Loading costs the result and a layer's codes, not a dense copy of the experts."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8}
    big, tiny = GptOss(**sizes), GptOss()
    paths = [s.write(tmp_path / n) for n, s in (("tiny", tiny), ("big", big))]
    added, result = peak_of_loading("load_quantized", *paths)
    dense = 4 * sum(nibbles.size for nibbles, _ in big.drawn.values()) / 2**20
    assert dense > 90
    assert added < 1.7 * result + 20 < 0.8 * dense, (added, result)


def test_bad_gpt_oss_folders(tmp_path):
    sample, path = GptOss(), tmp_path / "m"
    blocks, scales = f"{EXPERTS}.gate_up_proj_blocks", f"{EXPERTS}.gate_up_proj_scales"

    def refusal(message, **changes):
        sample.write(path, **changes)
        refused(path, message)

    refusal(rf"^load_quantized: 'm' must hold tensor {scales} as U8 \[4, 192, 2\], got none$",
            **{scales: None})  # fmt: skip
    refusal(
        rf"'m' must hold both projections of {EXPERTS} quantised, or none, got down_proj quantised "
        "and gate_up_proj not$",
        **{blocks: None, scales: None},
    )
    for key, shape in ((blocks, r"\[4, 192, 2, 16\]"), (scales, r"\[4, 192, 2\]")):
        tensor = sample.tensors[key]
        refusal(rf"must hold tensor {key} as U8 {shape}, got U8 \[3, ", **{key: tensor[:3].clone()})
        refusal(rf"must hold tensor {key} as U8 {shape}, got I16", **{key: tensor.short()})
    bad = sample.tensors[scales].clone()
    bad[2, 5, 1] = 255
    refusal(rf"^load_quantized: 'm/model.safetensors' must hold finite numbers in tensor {scales}, "
            "got NaN or infinity$", **{scales: bad})  # fmt: skip
    bad[2, 5, 1] = 254
    most = sample.tensors[blocks].clone()
    most[2, 5, 1] = 0x77
    refusal(f"must hold scales that float32 can multiply in tensor {scales}, got more$",
            **{scales: bad, blocks: most})  # fmt: skip
    most[2, 5, 1] = 0x22  # 1 * 2^127 is a float32
    sample.write(path, **{scales: bad, blocks: most})
    weight = nb.load_quantized(path).get_submodule(EXPERTS).dequantize()["gate_up_proj"]
    assert (weight[2, 32:, 5] == 2.0**127).all()
    down = {f"{EXPERTS}.down_proj": torch.zeros(4, 96, 64)}
    for part in ("blocks", "scales"):
        down[f"{EXPERTS}.down_proj_{part}"] = None
    refusal(rf"'m' must hold both projections of {EXPERTS} quantised, or none, got gate_up_proj "
            "quantised and down_proj not$", **down)  # fmt: skip
    refusal(f"must hold tensors that the model has, got {EXPERTS}.gate_up_proj, which it has not",
            **{f"{EXPERTS}.gate_up_proj": torch.zeros(4, 64, 192)})  # fmt: skip
    for name, got in (
        ("model.layers.0.self_attn.q_proj", "GptOssAttention: GptOssAttention is not decorated"),
        ("model.layers.7.mlp.experts.down_proj", "none"),
        ("model.layers.0.mlp.experts.up_proj", "GptOssExperts, which has no up_proj"),
    ):
        key = f"{name}_blocks"
        refusal(
            f"must hold {key} for experts of the model, got {got}", **{key: torch.zeros(1).byte()}
        )
    none = {key: None for key in sample.tensors if key.endswith(("_blocks", "_scales"))}
    dense = {n: p.clone() for n, p in sample.model.named_parameters() if n in sample.drawn}
    refusal(r"'m' must hold tensors named \*_blocks \(mxfp4\), got none$", **none, **dense)


# --- compressed-tensors ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_compressed_linears(tmp_path, arch):
    sample = Sample("mxfp4", arch=arch)
    model = check(sample, sample.write(tmp_path / "m"))
    rows = model.nibblock_report.replaced
    assert {(row.action, row.reason) for row in rows} == {("int8", "compressed-tensors: exact")}
    layer = model.get_submodule(next(iter(sample.codes)))
    assert (layer.scale_dtype, layer.group_size) == (torch.float16, 32)


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_compressed_experts(tmp_path, arch):
    sample = Sample("mxfp4", arch=arch)
    model = check_experts(sample, sample.write(tmp_path / "m"))
    assert len(experts_of(model)) == 2


def test_compressed_exponents_of_every_size(tmp_path):
    sample = Sample("mxfp4", config={"num_hidden_layers": 1}, exponents=(0, 253))
    model = nb.load_quantized(sample.write(tmp_path / "m"))
    for name in sample.codes:
        layer = model.get_submodule(name)
        assert torch.equal(layer.dequantize(), sample.model.get_submodule(name).weight), name
        assert layer.scale_dtype == torch.float32


def test_against_the_package(tmp_path):
    """compressed-tensors' own compressor writes what we read, and reads what we write."""
    pytest.importorskip(
        "compressed_tensors", reason="the compressed-tensors package is not installed"
    )
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    sample = Sample("mxfp4")
    path = sample.write(tmp_path / "m")
    weights = sample.quantization()["config_groups"]["group_0"]["weights"]
    args = QuantizationArgs(**{**weights, "scale_dtype": torch.uint8})
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    for name in sample.codes:
        weight = sample.model.get_submodule(name).weight.detach()
        given = {
            "weight": weight,
            "weight_scale": torch.from_numpy(2 * sample.scales[name]).float(),
        }
        theirs = MXFP4PackedCompressor.compress(given, scheme)
        assert theirs.keys() == {"weight_packed", "weight_scale"}
        packed, scale = (sample.tensors[f"{name}.{part}"] for part in theirs)
        assert torch.equal(theirs["weight_scale"], scale)
        back = MXFP4PackedCompressor.decompress(
            {"weight_packed": packed, "weight_scale": scale}, scheme
        )
        assert torch.equal(back["weight"].float(), weight)
        # (Signs of zeros are not ours to choose: the rest is the same byte by byte.)
        zero = lambda b: torch.where((b & 7) == 0, b & 0x77, b)  # noqa: E731
        for shift in (0, 4):
            low, high = ((t >> shift) & 15 for t in (theirs["weight_packed"], packed))
            assert torch.equal(zero(low), zero(high)), name
        for part, tensor in theirs.items():
            sample.tensors[f"{name}.{part}"] = tensor
    sample.save(path)
    check(sample, path)


def test_bad_compressed_folders(tmp_path):
    sample = Sample("mxfp4")
    path = sample.write(tmp_path / "m")
    key = "model.layers.1.mlp.up_proj.weight_scale"
    before = sample.tensors[key].clone()
    for value, message in (
        (255, f"'m/model.safetensors' must hold finite numbers in tensor {key}, got NaN or inf"),
        (254, f"must hold scales that float32 can multiply in tensor {key}, got more$"),
    ):
        sample.tensors[key] = before.clone()
        sample.tensors[key][0] = value
        sample.save(path)
        refused(path, message)
    sample.tensors[key] = before.half()
    sample.save(path)
    refused(path, rf"must hold tensor {key} as U8 \[160, 4\], got F16 \[160, 4\]$")
    sample.tensors[key] = before
    key = key.replace("scale", "packed")
    sample.tensors[key] = sample.tensors[key][:, :-1].clone()
    sample.save(path)
    refused(path, rf"must hold tensor {key} as U8 \[160, 64\], got U8 \[160, 63\]$")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 8}, "num_bits as 4, the only one of mxfp4-pack-quantized, got 8"),
        ({"group_size": 16}, "group_size as 32, the only one of mxfp4-pack-quantized, got 16"),
        ({"group_size": None}, "group_size as an integer, got null"),
        ({"type": "int"}, 'type as "float", got "int"'),
        ({"strategy": "tensor_group"}, 'strategy as "group", got "tensor_group"'),
        ({"symmetric": False}, "symmetric as true, got false"),
        ({"dynamic": True}, "dynamic as false, got true"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    path = Sample("mxfp4", config={"num_hidden_layers": 1}).write(tmp_path / "m")
    edit(path, lambda q: q["config_groups"]["group_0"]["weights"].update(change))
    refused(path, f"'m/config.json' must hold quantization_config.config_groups.*{message}$")


def test_samples_hold_what_they_say():
    """Two blocks by hand, so that packer and reader cannot be wrong together."""
    nibbles = np.arange(32, dtype=np.uint8)[None] % 16
    exponents = np.array([[129]], np.uint8)
    assert mxfp4_samples.pairs(nibbles)[0, :8].tobytes() == bytes.fromhex("1032547698badcfe")
    block = mxfp4_samples.ggml_blocks(nibbles, exponents)[0].tobytes()
    assert block == struct.pack("<B", 129) + bytes(16 * i + i for i in range(16))
    assert mxfp4_samples.dense(nibbles, exponents)[0, :9].tolist() == [0, 2, 4, 6, 8, 12, 16, 24, 0]
