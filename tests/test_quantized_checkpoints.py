"""load_quantized: codes and scales exactly as packed, transformers' own logits, ties, shards."""

from __future__ import annotations

import copy
import json

import nibblock as nb
import numpy as np
import pytest
import torch
from nibblock.formats.quantized import is_quantized, load_quantized_dense
from peak_memory import peak_of_loading
from quantized_samples import DTYPES, Sample, configuration, transformers


def tokens(model, length=11):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (2, length), generator=generator)


def logits(model, ids, dtype=torch.float32):
    with torch.no_grad():
        return model(input_ids=ids).logits.to(dtype)


def assert_same_function(model, dense, tolerance=2e-2):
    ids = tokens(dense)
    expected, got = logits(dense, ids), logits(model, ids)
    assert (got - expected).norm() <= tolerance * expected.norm()


def unpacked(layer):
    """Codes [N, K] of an Int4Linear's state dict."""
    q = layer.state_dict()["qweight"].numpy()
    if layer.bits == 4:
        q = np.stack((q & 15, q >> 4), axis=-1).reshape(len(q), -1)
    return q[:, : layer.in_features]


def check(sample, folder, exact=True):
    """The folder is loaded as it was drawn; returns the model."""
    model = nb.load_quantized(folder)
    assert not model.training
    for name, codes in sample.codes.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nb.Int4Linear), name
        assert np.array_equal(unpacked(layer), codes), name
        state = layer.state_dict()
        per = sample.scales[name].shape[1]
        repeat = state["scales"].shape[1] // per if state["scales"].shape[1] > per else 1
        scales, zeros = (
            np.repeat(part, repeat, 1)[:, : state["scales"].shape[1]]
            for part in (sample.scales[name], sample.zeros[name])
        )
        assert np.array_equal(state["scales"].double().numpy(), scales), name
        if "offsets" in state:
            wanted = -(scales * zeros)
            wanted = wanted if exact else wanted.astype(np.float32)
            assert np.array_equal(state["offsets"].double().numpy(), wanted), name
        else:
            assert (zeros == 1 << (layer.bits - 1)).all(), name
        if exact:
            weight = sample.model.get_submodule(name).weight.detach()
            assert torch.equal(layer.dequantize(), weight), name
    rest = sample.model.state_dict()
    state = model.state_dict()
    for key, tensor in rest.items():
        if key.removesuffix(".weight") not in sample.codes:
            assert torch.equal(state[key], tensor), key
    assert_same_function(model, sample.model)
    # The dense twin is the reference itself, so its logits are, whatever the kernels round.
    dense = load_quantized_dense(folder)
    assert type(dense) is type(sample.model)
    ids = tokens(sample.model)
    tight = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(
        logits(dense.double(), ids, torch.float64),
        logits(copy.deepcopy(sample.model).double(), ids, torch.float64),
        **tight,
    )
    return model


# --- formats --------------------------------------------------------------------------------------

FORMATS = [
    *(("gptq", bits) for bits in (4, 8)),
    *(("gptq_v2", bits) for bits in (4, 8)),
    ("awq", 4),
    *(("compressed", bits) for bits in (4, 8)),
]
named = pytest.mark.parametrize("method,bits", FORMATS, ids=[f"{m}-{b}" for m, b in FORMATS])


@named
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
def test_formats(tmp_path, method, bits, symmetric, group):
    """K is 128 and 160: groups of 64 and 128 leave a short last one; of 256, hold a whole row."""
    sample = Sample(method, bits, group, symmetric, config={"num_hidden_layers": 1})
    model = check(sample, sample.write(tmp_path / "m"))
    layer = model.model.layers[0].mlp.down_proj
    assert layer.group_size == group
    assert layer.affine != symmetric
    assert (layer.scale_dtype == torch.float16) == symmetric
    assert all(row.reason.endswith(": exact") for row in model.nibblock_report.replaced)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "compressed"])
def test_groups_of_16(tmp_path, method, symmetric):
    sample = Sample(method, 8, 16, symmetric, config={"num_hidden_layers": 1})
    model = check(sample, sample.write(tmp_path / "m"))
    assert model.model.layers[0].mlp.down_proj.group_size == 16


@named
def test_every_zero_point(tmp_path, method, bits):
    """Neighbours of every value, the borrows of version 1 included: the draws hold all of them."""
    sample = Sample(method, bits, 32, seed=3)
    check(sample, sample.write(tmp_path / "m"))
    drawn = np.concatenate([z.ravel() for z in sample.zeros.values()])
    assert len(np.unique(drawn)) == 1 << bits


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt_neox", "opt", "gemma2"])
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed"])
def test_architectures(tmp_path, method, arch):
    """Biases, tied and untied heads, other names, sinusoidal and learnt positions."""
    sample = Sample(method, arch=arch)
    model = check(sample, sample.write(tmp_path / "m"))
    tied = sample.model.config.tie_word_embeddings
    table = model.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is table) == tied
    model.tie_weights()  # what transformers calls when it pleases
    assert (model.get_output_embeddings().weight is table) == tied
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("scale_dtype", ["BF16", "F32"])
@pytest.mark.parametrize("method,bits", [("gptq", 4), ("awq", 4), ("compressed", 8)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scale_dtypes(tmp_path, method, bits, scale_dtype, symmetric):
    sample = Sample(method, bits, 32, symmetric, scale_dtype)
    # scale * zero of a float32 scale has up to 32 bits: its offset is rounded, and said to be
    exact = symmetric or scale_dtype != "F32"
    model = check(sample, sample.write(tmp_path / "m"), exact)
    report = str(model.nibblock_report)
    assert ("offsets rounded to float32" in report) != exact
    layer = model.model.layers[0].mlp.down_proj
    half = symmetric and scale_dtype == "BF16"  # these values are exact in float16
    assert (layer.scale_dtype == torch.float16) == half


@named
@pytest.mark.parametrize("group,ours", [(96, 32), (160, 32), (192, 64), (512, 256), (48, 16)])
def test_other_groups_are_divided(tmp_path, method, bits, group, ours):
    if bits == 4 and ours == 16:
        pytest.skip("4 bits have no groups of 16: test_quantized_errors.py")
    config = {"hidden_size": 384, "intermediate_size": 640, "num_hidden_layers": 1}
    sample = Sample(method, bits, group, config=config)
    model = nb.load_quantized(sample.write(tmp_path / "m"))
    for name in sample.codes:
        layer = model.get_submodule(name)
        assert layer.group_size == (-1 if group >= layer.in_features else ours), name
        weight = sample.model.get_submodule(name).weight.detach()
        assert torch.equal(layer.dequantize(), weight), name
    assert f"groups of {group} as {ours}" in str(model.nibblock_report)
    assert_same_function(model, sample.model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(tmp_path, dtype):
    sample = Sample("awq", arch="qwen2")
    model = nb.load_quantized(sample.write(tmp_path / "m"), dtype=dtype)
    assert model.config.dtype == dtype
    assert model.model.norm.weight.dtype == dtype
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.bias.dtype == layer.weight.dtype == dtype
    assert model(tokens(model)).logits.dtype == dtype
    assert_same_function(model, sample.model, 3e-2)


def test_fuse_and_compute(tmp_path):
    path = Sample().write(tmp_path / "m")
    model, fused = nb.load_quantized(path), nb.load_quantized(path, fuse=True)
    assert len(fused.nibblock_report.fused) == 4
    ids = tokens(model, 3)
    torch.testing.assert_close(logits(fused, ids), logits(model, ids), rtol=1e-3, atol=1e-3)
    assert model.state_dict().keys() == fused.state_dict().keys()
    assert nb.load_quantized(path, compute="int8").model.layers[0].mlp.up_proj.compute == "int8"


# --- versions of GPTQ -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_,says", [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_files_of_the_other_version(tmp_path, bits, is_, says):
    sample = Sample(is_, bits, 32, symmetric=True, says=says)
    model = check(sample, sample.write(tmp_path / "m"))
    note = f"config.json says {says}, but all zero points are those of {is_}"
    assert note in str(model.nibblock_report)


@pytest.mark.parametrize("keys", [{"checkpoint_format": None, "format": "GPTQ_V2"}, {"sym": None}])
def test_spellings_of_the_version(tmp_path, keys):
    settings = {k: v for k, v in keys.items() if v is not None}
    sample = Sample("gptq_v2", 4, 32, settings=settings)
    path = sample.write(tmp_path / "m")
    edit(path, lambda q: [q.pop(key) for key, value in keys.items() if value is None])
    check(sample, path)


def test_symmetric_files_with_other_zero_points(tmp_path):
    path = Sample("gptq", settings={"sym": True}).write(tmp_path / "m")
    with pytest.raises(
        ValueError, match=r"'m/model.safetensors' must hold 7 throughout .*\.qzeros"
    ):
        nb.load_quantized(path)


def test_group_indices_in_order(tmp_path):
    sample = Sample("gptq", 4, 32, g_idx=lambda k, _: np.arange(k) // 32)
    check(sample, sample.write(tmp_path / "m"))


def test_groups_in_another_order(tmp_path):
    """Whole groups that changed places are still groups."""
    sample = Sample("gptq", 4, 32, g_idx=lambda k, _: np.arange(k)[::-1] // 32)
    model = nb.load_quantized(sample.write(tmp_path / "m"))
    for name in sample.codes:
        weight = sample.model.get_submodule(name).weight.detach()
        assert torch.equal(model.get_submodule(name).dequantize(), weight), name


def test_layers_of_their_own_kind(tmp_path):
    """GPTQModel's `dynamic`: the second layer's attention has other bits."""
    one, two = Sample("gptq", 4, 32), Sample("gptq", 8, 64)
    path = one.write(tmp_path / "m")
    two.make()
    own = {n for n in two.codes if "layers.1.self_attn" in n}
    for key, tensor in two.tensors.items():
        if key.rpartition(".")[0] in own:
            one.tensors[key] = tensor
    one.save(path)
    rule = {"bits": 8, "group_size": 64}
    edit(path, lambda q: q.update(dynamic={"-:lm_head": {}, r"+:.*\.1\.self_attn\..*": rule}))
    model = nb.load_quantized(path)
    for name in one.codes:
        weight = (two if name in own else one).model.get_submodule(name).weight.detach()
        assert torch.equal(model.get_submodule(name).dequantize(), weight), name


# --- compressed-tensors ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_that_are_not_packed(tmp_path, bits):
    sample = Sample("compressed", bits, plain=True)
    check(sample, sample.write(tmp_path / "m"))


def test_zero_points_of_symmetric_files(tmp_path):
    """Some files hold them, all 0, and a weight_g_idx that says nothing."""
    sample = Sample("compressed", 4, 32, symmetric=True)
    path = sample.write(tmp_path / "m")
    for name, zeros in sample.zeros.items():
        sample.tensors[f"{name}.weight_zero_point"] = torch.zeros(zeros.shape, dtype=torch.int8)
        columns = sample.codes[name].shape[1]
        sample.tensors[f"{name}.weight_g_idx"] = torch.full((columns,), -1, dtype=torch.int32)
    sample.save(path)
    assert not check(sample, path).model.layers[0].mlp.up_proj.affine


def test_groups_by_index(tmp_path):
    sample = Sample("compressed", 8, 32)
    path = sample.write(tmp_path / "m")
    for name, codes in sample.codes.items():
        index = torch.arange(codes.shape[1]) // 32
        sample.tensors[f"{name}.weight_g_idx"] = index.int()
    sample.save(path)
    check(sample, path)


def test_config_groups(tmp_path):
    """Names before patterns before classes, as the format's own matching does."""
    one, two, three = (Sample("compressed", b, g) for b, g in ((4, 32), (8, 64), (8, -1)))
    path = one.write(tmp_path / "m")
    name = "model.layers.0.mlp.down_proj"
    kinds = {"group_0": one, "group_1": two, "group_2": three}
    for sample in (two, three):
        sample.make()
    groups = {k: s.quantization()["config_groups"]["group_0"] for k, s in kinds.items()}
    groups["group_1"]["targets"] = ["re:.*mlp.*"]
    groups["group_2"]["targets"] = [name]
    edit(path, lambda q: q.update(config_groups=groups))
    of = {n: three if n == name else two if "mlp" in n else one for n in one.codes}
    for layer, sample in of.items():
        for key, tensor in sample.tensors.items():
            if key.rpartition(".")[0] == layer:
                one.tensors[key] = tensor
    one.save(path)
    model = nb.load_quantized(path)
    for layer, sample in of.items():
        weight = sample.model.get_submodule(layer).weight.detach()
        assert torch.equal(model.get_submodule(layer).dequantize(), weight), layer
    edit(path, lambda q: q["config_groups"].pop("group_0"))
    with pytest.raises(ValueError, match="with a target for model.layers.0.self_attn.k_proj"):
        nb.load_quantized(path)


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_against_the_package(tmp_path, bits, symmetric, group):
    """compressed-tensors' own compressor writes what we read."""
    pytest.importorskip(
        "compressed_tensors", reason="the compressed-tensors package is not installed"
    )
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    sample = Sample("compressed", bits, group, symmetric)
    path = sample.write(tmp_path / "m")
    weights = sample.quantization()["config_groups"]["group_0"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    for name in sample.codes:
        given = {
            "weight": sample.model.get_submodule(name).weight.detach(),
            "weight_scale": torch.from_numpy(sample.scales[name]).float(),
            "weight_zero_point": torch.from_numpy(
                (sample.zeros[name] - (1 << (bits - 1))).astype(np.int8)
            ),
        }
        theirs = PackedQuantizationCompressor.compress(given, scheme)
        for part in ("weight_packed", "weight_zero_point", "weight_shape"):
            ours = sample.tensors.get(f"{name}.{part}")
            assert (ours is None) == (theirs.get(part) is None), part
            if ours is not None:
                assert torch.equal(ours, theirs[part]), part
        for part, tensor in theirs.items():
            scales = part == "weight_scale"
            sample.tensors[f"{name}.{part}"] = tensor.half() if scales else tensor
    sample.save(path)
    check(sample, path)


# --- folders --------------------------------------------------------------------------------------


def edit(path, change, key="quantization_config"):
    file = path / "config.json"
    values = json.loads(file.read_text())
    change(values[key] if key else values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed"])
def test_shards(tmp_path, method):
    sample = Sample(method, arch="qwen2")
    check(sample, sample.write(tmp_path / "m", shards=3))


def test_one_file_of_another_name(tmp_path):
    sample = Sample()
    path = sample.write(tmp_path / "m")
    (path / "model.safetensors").rename(path / "gptq_model-4bit-32g.safetensors")
    check(sample, path)
    (path / "other.safetensors").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match="'m' must hold model.safetensors or model.*got gptq"
    ):
        nb.load_quantized(path)


@pytest.mark.parametrize("tied", [False, True])
def test_quantised_head(tmp_path, tied):
    """A head in the file is a weight of its own, even where config.json ties it."""
    sample = Sample("gptq", head=True, config={"tie_word_embeddings": False})
    path = sample.write(tmp_path / "m")
    if tied:
        edit(path, lambda config: config.update(tie_word_embeddings=True), key="")
    model = check(sample, path)
    assert not model.config.tie_word_embeddings
    assert ("lm_head.weight is not tied" in str(model.nibblock_report)) == tied
    model.tie_weights()
    assert isinstance(model.lm_head, nb.Int4Linear)
    assert_same_function(model, sample.model)


@pytest.mark.parametrize("what", ["equal", "different", "head only"])
def test_tied_weights_in_the_file(tmp_path, what):
    sample = Sample("awq", arch="qwen2")
    path = sample.write(tmp_path / "m")
    table = sample.tensors["model.embed_tokens.weight"]
    sample.tensors["lm_head.weight"] = table * (2 if what == "different" else 1)
    if what == "head only":
        del sample.tensors["model.embed_tokens.weight"]
    if what == "different":
        weight = sample.tensors["lm_head.weight"].float()
        sample.model.lm_head.weight = torch.nn.Parameter(weight)
    sample.save(path)
    model = check(sample, path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (what != "different")
    assert model.config.tie_word_embeddings == (what != "different")


def test_biases_of_zeros_and_old_buffers(tmp_path):
    """Some quantisers write a bias where there is none, and frequencies that are computed now."""
    sample = Sample("gptq")
    path = sample.write(tmp_path / "m")
    bias = "model.layers.0.mlp.up_proj.bias"
    sample.tensors[bias] = torch.zeros(160, dtype=torch.float16)
    sample.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    sample.save(path)
    model = check(sample, path)
    assert model.model.layers[0].mlp.up_proj.bias is None
    sample.tensors[bias][3] = 1
    sample.save(path)
    with pytest.raises(ValueError, match=f"hold zeros in {bias}, for the model has no bias there"):
        nb.load_quantized(path)


def test_configuration_and_generation(tmp_path):
    path = Sample().write(tmp_path / "m")
    transformers.GenerationConfig(eos_token_id=[2, 5], pad_token_id=4).save_pretrained(path)
    assert is_quantized(path)
    model = nb.load_quantized(path)
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == [2, 5]
    assert model.generate(tokens(model, 4), max_new_tokens=3, do_sample=False).shape[0] == 2


@pytest.mark.parametrize("method", ["gptq", "compressed"])
def test_save_load_and_state_dict(tmp_path, method):
    sample = Sample(method, arch="qwen2")
    model = nb.load_quantized(sample.write(tmp_path / "m"))
    nb.save(model, tmp_path / "saved.safetensors")
    config = configuration("qwen2")
    other = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    nb.load(tmp_path / "saved.safetensors", other)
    ids = tokens(model)
    assert torch.equal(logits(other, ids), logits(model, ids))
    again = nb.load_quantized(tmp_path / "m")
    again.load_state_dict(copy.deepcopy(model).state_dict())
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_the_files_may_go(tmp_path):
    """Nothing of the model lies in the mapped file."""
    sample = Sample("gptq", scale_dtype="F32", symmetric=True)
    path = sample.write(tmp_path / "m")
    model = nb.load_quantized(path, dtype=torch.float16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    file = path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_peak_memory(tmp_path):
    """Loading costs the result and a layer, not a float32 copy of the quantised weights."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2}
    big, tiny = Sample("gptq", config=sizes, symmetric=True), Sample("gptq")
    paths = [s.write(tmp_path / n) for n, s in (("tiny", tiny), ("big", big))]
    added, result = peak_of_loading("load_quantized", *paths)
    dense = 4 * sum(codes.size for codes in big.codes.values()) / 2**20
    assert dense > 65
    assert added < result + 20 < 0.5 * dense, (added, result)


def test_samples_hold_what_they_say():
    """Two words by hand, so that packer and reader cannot be wrong together."""
    from quantized_samples import pack_awq, pack_compressed, pack_gptq

    codes = np.arange(64).reshape(8, 8) % 16  # [N, K]: row n starts at 8 n mod 16
    scales, zeros = np.ones((8, 1), np.float32), np.arange(8)[:, None]
    gptq = pack_gptq(codes, scales, zeros, 4, "gptq_v2")
    assert gptq["qweight"].view(np.uint32).tolist() == [[0x76543210, 0xFEDCBA98] * 4]
    assert gptq["qzeros"].view(np.uint32).tolist() == [[0x76543210]]
    v1 = pack_gptq(codes, scales, zeros, 4, "gptq")["qzeros"].view(np.uint32).tolist()
    assert v1 == [[0x654320FF]]  # 0 - 1 borrows from the 1 beside it
    awq = pack_awq(codes, scales, zeros)
    assert awq["qzeros"].view(np.uint32).tolist() == [[0x75316420]]
    assert awq["qweight"].view(np.uint32)[1].tolist() == [0x99991111]
    packed = pack_compressed(codes, scales, zeros, 4, False)
    assert packed["weight_packed"].view(np.uint32)[:2].tolist() == [[0x76543210], [0xFEDCBA98]]
    assert packed["weight_zero_point"].view(np.uint32).tolist() == [[0x76543210]]
    assert DTYPES.keys() == {"F16", "BF16", "F32"}
