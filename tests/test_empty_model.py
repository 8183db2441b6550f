"""`empty_model`: parameters on the meta device, buffers as the constructor would make them."""

from __future__ import annotations

import pytest
import torch
from nibblock.integrations.transformers import empty_model
from quantized_samples import configuration, transformers


def falcon_h1():
    """Its multipliers are computed by the model around the layer that holds them."""
    return transformers.FalconH1Config(
        vocab_size=72, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, ssm_multipliers=[0.5, 1.0, 2.0, 3.0, 4.0],
    )  # fmt: skip


CONFIGS = {
    **{arch: lambda arch=arch: configuration(arch) for arch in ("llama", "gemma2", "opt")},
    "gpt_neox": lambda: configuration("gpt_neox", rotary_pct=0.5),
    "yarn": lambda: configuration(
        "llama",
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                         "original_max_position_embeddings": 16},
    ),
    "falcon_h1": falcon_h1,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_are_the_constructors(name, dtype):
    real = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    before = torch.random.get_rng_state()
    model = empty_model(CONFIGS[name](), dtype, "test")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.is_meta and p.dtype == dtype for p in model.parameters())
    assert model.config.dtype == dtype
    expected, got = dict(real.named_buffers()), dict(model.named_buffers())
    assert expected.keys() == got.keys()
    assert expected or name == "opt"
    for key, buffer in expected.items():
        assert got[key].dtype == buffer.dtype
        assert torch.equal(got[key], buffer), key
    for module, other in zip(real.modules(), model.modules()):
        assert getattr(module, "attention_scaling", 1) == getattr(other, "attention_scaling", 1)


def test_buffers_that_nothing_computes(monkeypatch):
    kind = transformers.LlamaForCausalLM
    for cls in (kind, transformers.LlamaModel):
        monkeypatch.setattr(cls, "_init_weights", lambda self, module: None)
    with pytest.raises(ValueError, match=r"^buffer model\.rotary_emb\.\w+, which no file holds"):
        empty_model(configuration("llama"), torch.float32, "test")


def test_configurations_that_transformers_refuses():
    config = configuration("llama")
    config.hidden_act = "no such function"
    with pytest.raises(ValueError, match="no such function") as caught:
        empty_model(config, torch.float32, "test")
    assert "\n" not in str(caught.value)
