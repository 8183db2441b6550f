"""One training step under pytest-benchmark; `python -m nibblock bench finetune` compares runs.

A Llama of SmolLM2's shapes with four layers, 256 tokens.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import pytest

METHODS = ("full", "lora", "shira", "masked")


@pytest.fixture(params=METHODS)
def step(request):
    for package in ("transformers", "peft"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (pip install 'nibblock[finetune]')")
    import transformers
    from nibblock._finetune.methods import prepare

    from . import finetune_steps as steps

    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    settings = dataclasses.replace(steps.METHODS[request.param], seq=256, tokens=256)
    task = steps.task_of(4, settings.seq)
    prepared = prepare(transformers.LlamaForCausalLM(config), task, settings)
    count = iter(range(1_000_000))
    return request.param, lambda: steps.step(prepared, task, settings, next(count))


def bench_step(benchmark, step):
    name, call = step
    benchmark.group = "training step, 256 tokens"
    phases = benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    benchmark.extra_info["method"] = name
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in phases.values())
