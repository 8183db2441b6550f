"""load_gguf on every architecture: exact weights, transformers' logits, generation, errors."""

from __future__ import annotations

import warnings

import nibblock as nb
import pytest
import torch
from gguf_architectures import BLOCKS, MODEL_TYPES, Sample, configuration, expected_state
from nibblock.formats.gguf import load_gguf_dense
from test_gguf import assert_read_alike, assert_same_function, logits, tokens

transformers = pytest.importorskip(
    "transformers", reason="the transformers package is not installed"
)

NAMES = [name for name in BLOCKS if name != "llama"]  # test_gguf.py has that one


def dense_values(model) -> dict[str, torch.Tensor]:
    """Every weight by transformers' name, packed ones dequantised."""
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, nb.Int4Experts):
            out |= {f"{name}.{key}": value for key, value in module.dequantize().items()}
        elif isinstance(module, (nb.Int4Linear, nb.Int4Embedding)):
            out[f"{name}.weight"] = module.dequantize()
    packed = tuple(key.removesuffix("weight") for key in out)
    for name, value in model.state_dict().items():
        if name.endswith((".bias", "_bias")) or not name.startswith(
            (*packed, *(f"{k}." for k in out))
        ):
            out[name] = value
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of each architecture, written once."""
    made = {}

    def write(name):
        if name not in made:
            sample = Sample(name)
            made[name] = (sample, sample.write(tmp_path_factory.mktemp(name) / "m.gguf"))
        return made[name]

    return write


# --- weights and configuration --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_exact_and_in_its_place(written, name):
    sample, path = written(name)
    expected = expected_state(path, sample)
    for model in (nb.load_gguf(path), load_gguf_dense(path)):
        assert not model.training
        got = dense_values(model)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(got[key], value), key
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_model_made_by_hand(written, name):
    """A transformers model from a configuration written in the tests, filled by their mapping."""
    sample, path = written(name)
    config = transformers.AutoConfig.for_model(MODEL_TYPES.get(name, name), **configuration(sample))
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    reference.load_state_dict(expected_state(path, sample))
    ours = load_gguf_dense(path)
    assert type(ours) is type(reference)
    ids = tokens(ours)
    torch.testing.assert_close(logits(ours, ids), logits(reference, ids), rtol=1e-5, atol=1e-5)
    model = nb.load_gguf(path)
    assert_same_function(model, reference)
    kinds = {type(m) for n, m in model.named_modules() if n.endswith("_proj") or "c_fc" in n}
    assert nb.Int4Linear in kinds
    assert torch.nn.Linear not in kinds


# Where transformers reads the file itself. It leaves some sizes at their defaults, whatever the
# file says: these samples have the defaults.
ORACLES = {
    "qwen2moe": {"expert_inner": 1408, "shared": 5632},
    "qwen3moe": {"expert_inner": 768},
    "gemma2": {
        "head_dim": 256,
        "kv_heads": 1,
        "heads": 2,
        "keys": {"attention.sliding_window": 4},
    },
    "gemma3": {"head_dim": 256, "kv_heads": 1, "heads": 2},
    "phi3": {"keys": {}, "meta": {"tokenizer.ggml.padding_token_id": 0}},
    "stablelm": {"without": ("attn_q_norm.weight", "attn_k_norm.weight")},
    "starcoder2": {"meta": {"tokenizer.ggml.tokens": [f"t{i}" for i in range(70)]}},
}


@pytest.mark.parametrize("name", ORACLES)
def test_matches_transformers(tmp_path, name):
    assert_read_alike(Sample(name, **ORACLES[name]).write(tmp_path / "m.gguf"))


@pytest.mark.parametrize("name", NAMES)
def test_report_and_demo_count_the_same_weights(written, name):
    from nibblock._measure import weight_count

    _, path = written(name)
    model, dense = nb.load_gguf(path), load_gguf_dense(path)
    assert weight_count(model) == weight_count(dense)
    report = model.nibblock_report
    assert not [row.name for row in report if row.action == "kept"]
    named = {n for n, m in model.named_modules() if isinstance(m, (nb.Int4Linear, nb.Int4Experts))}
    assert named <= {row.name for row in report}
    assert report.model_bytes_after < report.model_bytes_before / 2


# --- use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_generation_with_and_without_cache(written, name):
    _, path = written(name)
    model = nb.load_gguf(path)
    ids = tokens(model, 7)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cached = model.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert cached.shape == (2, 11)


@pytest.mark.parametrize("name", NAMES)
def test_fuse(written, name):
    _, path = written(name)
    model, fused = nb.load_gguf(path), nb.load_gguf(path, fuse=True)
    ids = tokens(model, 2)
    torch.testing.assert_close(logits(fused, ids), logits(model, ids), rtol=1e-3, atol=1e-3)
    assert model.state_dict().keys() == fused.state_dict().keys()
    report = fused.nibblock_report
    assert not report.not_fused
    if name == "phi3":
        assert report.fused == []
        assert "as one linear each" in str(report)
    # (v is of another type than q and k in these files: what is left to share is gate and up.)
    elif name not in ("mixtral", "qwen3moe", "starcoder2", "gpt-oss"):
        assert report.fused
