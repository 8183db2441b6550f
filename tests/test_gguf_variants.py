"""load_gguf on what files of one architecture may differ in, and on files that do not fit it."""

from __future__ import annotations

import nibblock as nb
import numpy as np
import pytest
import torch
from gguf_architectures import Sample, configuration, expected_state
from gguf_samples import blocks, ggml_values
from nibblock.formats._ggml_types import EXACT_TYPES, alike, decode
from nibblock.formats._gguf_file import GGUFFile
from nibblock.formats._gguf_model import plan
from nibblock.formats.gguf import load_gguf_dense
from test_gguf import assert_same_function, logits, tokens
from test_gguf_architectures import dense_values

transformers = pytest.importorskip(
    "transformers", reason="the transformers package is not installed"
)


def made_by_hand(path, sample, model_type, **changes):
    """A transformers model from a configuration written in the tests, filled by their mapping."""
    values = {**configuration(sample), **changes}
    config = transformers.AutoConfig.for_model(model_type, **values)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(expected_state(path, sample))
    return model


def assert_equal_logits(path, reference, length=13):
    ours = load_gguf_dense(path)
    ids = tokens(ours, length)
    torch.testing.assert_close(logits(ours, ids), logits(reference, ids), rtol=1e-5, atol=1e-5)
    return ours


def assert_exact(model, path, sample):
    expected, got = expected_state(path, sample), dense_values(model)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


# --- experts --------------------------------------------------------------------------------------


def test_any_two_types_share_a_form_without_rounding():
    rng = np.random.default_rng(7)
    for first in sorted(EXACT_TYPES):
        for second in sorted(EXACT_TYPES):
            raw = [blocks(rng, kind, 3, 512) for kind in (first, second)]
            pair = alike([decode(kind, data) for kind, data in zip((first, second), raw)])
            forms = {(c.bits, c.group, c.offsets is None, c.scales.dtype) for c in pair}
            assert len(forms) == 1
            for kind, data, codes in zip((first, second), raw, pair):
                expected = ggml_values(kind, data)
                np.testing.assert_array_equal(_rounded_once(codes), expected)


def _rounded_once(codes):
    """[N, K] float32: only the last step rounds."""
    code = codes.qweight
    if codes.bits == 4:
        code = np.stack((code & 15, code >> 4), axis=-1)
    code = code.reshape(*codes.scales.shape, -1).astype(np.float64)
    scale = codes.scales.astype(np.float64)[..., None]
    if codes.offsets is None:
        value = (code - (8 if codes.bits == 4 else 128)) * scale
    else:
        value = code * scale + codes.offsets.astype(np.float64)[..., None]
    return value.reshape(len(code), -1).astype(np.float32)


@pytest.mark.parametrize(
    ("types", "form", "bits"),
    [
        ({"": "Q4_K", "ffn_down_exps": "Q4_0"}, (4, 32), 4),
        ({"": "Q4_0", "ffn_up_exps": "Q4_1", "ffn_down_exps": "Q8_0"}, (4, 32), 8),
        ({"": "Q4_0", "ffn_up_exps": "Q5_0", "ffn_down_exps": "Q3_K"}, (8, 32), 4),
        ({"": "Q3_K", "ffn_up_exps": "IQ4_XS", "ffn_down_exps": "Q4_K"}, (8, 16), 4),
        ({"": "Q3_K", "ffn_down_exps": "IQ4_NL"}, (4, 16), 8),
        ({"": "Q3_K", "ffn_up_exps": "Q2_K", "ffn_down_exps": "Q2_K"}, (8, 16), 4),
    ],
)
def test_experts_of_mixed_types_are_exact(tmp_path, types, form, bits):
    sample = Sample("qwen3moe", types, hidden=256, expert_inner=256)
    path = sample.write(tmp_path / "m.gguf")
    model = nb.load_gguf(path)
    assert_exact(model, path, sample)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, nb.Int4Experts)
    assert (experts.gate_up_proj.bits, experts.gate_up_proj.group_size) == form
    assert experts.down_proj.bits == bits
    assert_same_function(model, load_gguf_dense(path))
    row = next(r for r in model.nibblock_report if r.name == "model.layers.1.mlp.experts")
    assert (row.action, row.kind, row.shape) == (f"int{form[0]}", "Int4Experts", (4, 512, 256))
    assert row.reason == ", ".join(dict.fromkeys(_listed(types))) + ": exact"


def _listed(types):
    return [types.get(f"ffn_{p}_exps", types[""]) for p in ("gate", "up", "down")]


def test_a_tensor_for_each_expert(tmp_path):
    """How the first converters wrote Mixtral."""
    replace = {}
    for layer in range(2):
        for part, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
            replace[f"blk.{layer}.ffn_{part}_exps.weight"] = None
            for expert in range(4):
                replace[f"blk.{layer}.ffn_{part}.{expert}.weight"] = shape
    sample = Sample("mixtral", replace=replace)
    path = sample.write(tmp_path / "m.gguf")
    assert_exact(nb.load_gguf(path), path, sample)
    assert_exact(assert_equal_logits(path, made_by_hand(path, sample, "mixtral")), path, sample)
    del replace["blk.1.ffn_up.3.weight"]
    path = Sample("mixtral", replace=replace).write(tmp_path / "bad.gguf")
    with pytest.raises(ValueError, match="'bad.gguf' must hold tensor blk.1.ffn_up.3.weight"):
        nb.load_gguf(path)


def test_experts_in_groups_of_16(tmp_path):
    """What Q4_K_M files hold: downs in Q6_K."""
    types = {"": "Q4_K", "blk.1.ffn_down_exps": "Q6_K"}
    sample = Sample("mixtral", types, hidden=256, inner=256)
    path = sample.write(tmp_path / "m.gguf")
    model = nb.load_gguf(path)
    assert_exact(model, path, sample)
    second = model.model.layers[1].mlp.experts
    assert (second.gate_up_proj.bits, second.down_proj.bits) == (4, 8)
    assert (second.gate_up_proj.group_size, second.down_proj.group_size) == (32, 16)
    assert_same_function(model, load_gguf_dense(path))


def test_experts_of_a_type_without_codes(tmp_path):
    types = {"": "Q4_K", "blk.1.ffn_down_exps": "F16"}
    sample = Sample("mixtral", types, hidden=256, inner=256)
    path = sample.write(tmp_path / "m.gguf")
    model = nb.load_gguf(path)
    assert_exact(model, path, sample)
    first, second = (model.model.layers[i].mlp.experts for i in range(2))
    assert isinstance(first, nb.Int4Experts)
    assert type(second).__name__ == "MixtralExperts"
    assert_same_function(model, load_gguf_dense(path))
    model = nb.load_gguf(path, requantize=True)
    second = model.model.layers[1].mlp.experts
    assert (second.gate_up_proj.bits, second.down_proj.bits) == (4, 8)
    expected = expected_state(path, sample)
    assert torch.equal(
        second.dequantize()["gate_up_proj"], expected["model.layers.1.mlp.experts.gate_up_proj"]
    )
    weight = expected["model.layers.1.mlp.experts.down_proj"]
    step = weight.reshape(4, 256, -1, 32).abs().amax(-1) / 127
    error = (second.dequantize()["down_proj"] - weight).abs().reshape(4, 256, -1, 32).amax(-1)
    assert (error <= 0.5001 * step).all()
    assert "F16 requantized to 8 bits, rounded" in str(model.nibblock_report)


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_dense_experts(tmp_path, kind):
    sample = Sample("qwen3moe", kind)
    path = sample.write(tmp_path / "m.gguf")
    model = nb.load_gguf(path, dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert f"{kind}: dense" in str(model.nibblock_report)
    assert_exact(nb.load_gguf(path), path, sample)


def test_gate_of_the_shared_expert_as_a_matrix(tmp_path):
    replace = {f"blk.{i}.ffn_gate_inp_shexp.weight": (1, 64) for i in range(2)}
    sample = Sample("qwen2moe", replace=replace)
    path = sample.write(tmp_path / "m.gguf")
    assert_exact(nb.load_gguf(path), path, sample)


def test_routing_weights_follow_the_file(tmp_path):
    for value in (True, False):
        path = Sample("qwen2moe", keys={"expert_weights_norm": value}).write(tmp_path / "m.gguf")
        assert nb.load_gguf(path).config.norm_topk_prob is value


# --- what else differs ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "qwen2moe"])
def test_save_and_load(tmp_path, name):
    types = {"": "Q4_0", "ffn_down": "Q5_0", "token_embd": "Q8_0", "output.": "Q4_1"}
    model = nb.load_gguf(Sample(name, types).write(tmp_path / "m.gguf"))
    nb.save(model, tmp_path / "m.safetensors")
    fresh = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    nb.load(tmp_path / "m.safetensors", fresh)
    ids = tokens(model)
    assert torch.equal(logits(fresh, ids), logits(model, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_gemmas_embedding_is_scaled_as_transformers_does(tmp_path, name, dtype):
    path = Sample(name, hidden=96, types="Q4_0").write(tmp_path / "m.gguf")
    model, dense = nb.load_gguf(path, dtype=dtype), load_gguf_dense(path, dtype=dtype)
    ids = torch.arange(70)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nb.Int4Embedding)
    assert torch.equal(embedding(ids), dense.get_input_embeddings()(ids))
    assert model.lm_head.packed is embedding.packed
    assert model.config.dtype == dtype
    assert_same_function(model, dense)


@pytest.mark.parametrize("partial", [False, True])
def test_phi3_with_long_and_short_factors(tmp_path, partial):
    rotary = 12 if partial else 16
    half = rotary // 2
    factors = {
        "short": np.linspace(1, 1.5, half).astype(np.float32),
        "long": np.linspace(2, 9, half).astype(np.float32),
    }
    sample = Sample(
        "phi3",
        keys={
            "rope.dimension_count": rotary,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": 1.25,
        },
        extra={f"rope_factors_{key}.weight": value for key, value in factors.items()},
    )
    path = sample.write(tmp_path / "m.gguf")
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": rotary / 16,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.25,
        **{f"{key}_factor": value.tolist() for key, value in factors.items()},
    }
    reference = made_by_hand(
        path,
        sample,
        "phi3",
        rope_parameters=rope,
        original_max_position_embeddings=16,
        sliding_window=None,
    )
    ours = assert_equal_logits(path, reference)
    short = ours.model.rotary_emb.inv_freq.clone()
    assert_equal_logits(path, reference, 20)  # past the original context: the other list
    plain = 1 / 10000 ** (torch.arange(half) * 2 / rotary)
    torch.testing.assert_close(short, plain / torch.from_numpy(factors["short"]))
    assert ours.model.rotary_emb.attention_scaling == 1.25


def test_gemma3_scales_only_the_layers_that_see_everything(tmp_path):
    keys = {
        "attention.sliding_window": 5,
        "rope.freq_base": 5e5,
        "rope.freq_base_swa": 2e4,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "attention.sliding_window_pattern": 3,
        "final_logit_softcapping": 15.0,
    }
    sample = Sample("gemma3", keys=keys, tied=False)
    path = sample.write(tmp_path / "m.gguf")
    full = {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0}
    reference = made_by_hand(
        path,
        sample,
        "gemma3_text",
        sliding_window=5,
        final_logit_softcapping=15.0,
        layer_types=["sliding_attention"] * 2
        + ["full_attention"]
        + ["sliding_attention"] * 2
        + ["full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    )
    assert_equal_logits(path, reference)
    keys["attention.sliding_window_pattern"] = [True, True, False, True, True, False, True]
    again = Sample("gemma3", keys=keys, tied=False).write(tmp_path / "again.gguf")
    assert_equal_logits(again, reference)


def test_gemma3_without_windows(tmp_path):
    sample = Sample("gemma3", keys={"rope.freq_base": 1e6}, layers=2)
    path = sample.write(tmp_path / "m.gguf")
    reference = made_by_hand(
        path, sample, "gemma3_text", sliding_window=99, layer_types=["full_attention"] * 2
    )
    assert_equal_logits(path, reference)


@pytest.mark.parametrize(
    ("name", "layers", "scalar"), [("gemma2", 46, 16), ("gemma2", 42, 32), ("gemma3", 62, 16)]
)
def test_gemmas_27b_scale_attention_otherwise(tmp_path, name, layers, scalar):
    path = Sample(name, layers=layers).write(tmp_path / "m.gguf")
    assert plan(GGUFFile(path)).config["query_pre_attn_scalar"] == scalar


def test_stablelm_with_parallel_residual(tmp_path):
    missing = ("ffn_norm.weight", "ffn_norm.bias", "attn_q.bias", "attn_k.bias", "attn_v.bias")
    sample = Sample("stablelm", without=missing)
    path = sample.write(tmp_path / "m.gguf")
    changes = {"use_parallel_residual": True, "use_qkv_bias": False}
    assert_equal_logits(path, made_by_hand(path, sample, "stablelm", **changes))
    assert_exact(nb.load_gguf(path), path, sample)


def test_starcoder2_without_biases(tmp_path):
    missing = [f"{n}.bias" for n in ("attn_q", "attn_k", "attn_v", "attn_output")]
    missing += ["ffn_up.bias", "ffn_down.bias"]
    sample = Sample("starcoder2", without=missing, tied=False)
    path = sample.write(tmp_path / "m.gguf")
    assert_equal_logits(path, made_by_hand(path, sample, "starcoder2", use_bias=False))


def test_granite_with_biases_and_defaults(tmp_path):
    replace = {}
    for i in range(2):
        replace |= {f"blk.{i}.attn_{p}.bias": (n,) for p, n in (("q", 64), ("k", 32), ("v", 32))}
        replace[f"blk.{i}.attn_output.bias"] = (64,)
    sample = Sample("granite", replace=replace, keys={"logit_scale": 2.0}, tied=False)
    path = sample.write(tmp_path / "m.gguf")
    reference = made_by_hand(
        path,
        sample,
        "granite",
        attention_bias=True,
        attention_multiplier=16**-0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=2.0,
    )
    assert_equal_logits(path, reference)
    assert_exact(nb.load_gguf(path), path, sample)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "mixtral",
            {"replace": {"blk.1.ffn_down_exps.weight": None}},
            "hold tensor blk.1.ffn_down_exps.weight, got none of that name",
        ),
        (
            "mixtral",
            {"replace": {"blk.0.ffn_up_exps.weight": (3, 96, 64)}},
            r"blk.0.ffn_up_exps.weight with shape \[4, 96, 64\], got \[3, 96, 64\]",
        ),
        ("mixtral", {"keys": {"expert_used_count": None}}, "llama.expert_used_count .* nothing"),
        ("mixtral", {"keys": {"expert_used_count": 5}}, "expert_used_count as at most .* 4, got 5"),
        ("mixtral", {"keys": {"expert_gating_func": 2}}, r"expert_gating_func as 1 \(softmax\)"),
        ("mixtral", {"keys": {"expert_weights_norm": False}}, "expert_weights_norm as true"),
        ("mixtral", {"keys": {"expert_weights_scale": 2.5}}, "expert_weights_scale as 1, got 2.5"),
        ("qwen3moe", {"keys": {"expert_group_count": 8}}, "expert_group_count as 1, got 8"),
        ("qwen2moe", {"keys": {"expert_count": None}}, "qwen2moe.expert_count .* got nothing"),
        ("qwen2moe", {"keys": {"expert_weights_norm": 1}}, "expert_weights_norm as true or false"),
        (
            "qwen2moe",
            {"replace": {"blk.0.ffn_gate_inp_shexp.weight": (2, 64)}},
            r"ffn_gate_inp_shexp.weight with shape \[64\], got \[2, 64\]",
        ),
        (
            "qwen2moe",
            {"keys": {"expert_shared_feed_forward_length": 32}},
            r"ffn_gate_shexp.weight with shape \[32, 64\], got \[160, 64\]",
        ),
        ("gemma2", {"replace": {"blk.1.post_ffw_norm.weight": None}}, "blk.1.post_ffw_norm.weight"),
        ("gemma2", {"keys": {"attn_logit_softcapping": 0.0}}, "softcapping as a positive number"),
        (
            "gemma3",
            {"keys": {"attention.sliding_window": 4, "attention.sliding_window_pattern": [1, 0]}},
            "sliding_window_pattern as 7 times true or false, got an array of 2",
        ),
        ("gemma3", {"extra": {"rope_freqs.weight": np.ones(16, np.float32)}}, "'rope_freqs.weight"),
        (
            "phi3",
            {"extra": {"rope_factors_long.weight": np.ones(8, np.float32)}},
            "hold tensor rope_factors_short.weight",
        ),
        ("phi3", {"keys": {"rope.dimension_count": 7}}, "rope.dimension_count as the head size 16"),
        ("phi3", {"keys": {"rope.scaling.type": "longrope"}}, "one of none, linear, yarn"),
        ("granite", {"keys": {"logit_scale": None}}, "granite.logit_scale .* got nothing"),
        ("granite", {"keys": {"rope.scaling.finetuned": False, "logit_scale": 1.0}}, "finetuned"),
        ("granite", {"head_dim": 32}, "granite.attention.key_length as 16, got 32"),
        ("olmo2", {"keys": {"attention.sliding_window": 8}}, "sliding_window as 0"),
        ("olmo2", {"replace": {"blk.0.attn_norm.weight": (64,)}}, "only tensors .* olmo2 model"),
        ("stablelm", {"replace": {"blk.1.attn_norm.bias": None}}, "tensor blk.1.attn_norm.bias"),
        ("stablelm", {"replace": {"blk.1.attn_k_norm.weight": None}}, "blk.1.attn_k_norm.weight"),
        ("stablelm", {"replace": {"blk.1.ffn_norm.weight": None}}, "blk.1.ffn_norm.weight"),
        (
            "starcoder2",
            {"keys": {"attention.layer_norm_epsilon": None}},
            "starcoder2.attention.layer_norm_epsilon as a positive number, got nothing",
        ),
    ],
)
def test_bad_models(tmp_path, name, options, message):
    path = Sample(name, **options).write(tmp_path / "bad.gguf")
    with pytest.raises(ValueError, match=message) as caught:
        plan(GGUFFile(path))
    assert "'bad.gguf'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_factors_name_the_tensor(tmp_path):
    extra = {f"rope_factors_{k}.weight": np.zeros(8, np.float32) for k in ("short", "long")}
    path = Sample("phi3", extra=extra).write(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="positive numbers in tensor rope_factors_short.weight"):
        nb.load_gguf(path)


def test_bad_scales_of_experts_name_the_tensor(tmp_path):
    path = Sample("qwen3moe").write(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    at = GGUFFile(path).tensors["blk.1.ffn_up_exps.weight"].offset
    data[at : at + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    for load in (nb.load_gguf, load_gguf_dense):
        with pytest.raises(ValueError, match="finite scales in tensor blk.1.ffn_up_exps.weight"):
            load(path)


def refusal(path):
    try:
        plan(GGUFFile(path))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["qwen2moe", "gemma3", "stablelm"])
def test_damaged_headers_are_harmless(tmp_path, name):
    path = Sample(name, layers=1).write(tmp_path / "bad.gguf")
    data = path.read_bytes()
    header = min(t.offset for t in GGUFFile(path).tensors.values())
    rng = np.random.default_rng(2)
    for at in rng.integers(0, header, 400):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        message = refusal(path)
        assert not message or ("'bad.gguf'" in message and "\n" not in message), (at, message)
