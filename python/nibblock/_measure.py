"""What the demo, the report, the benches and fine-tuning measure of a model and of a process."""

from __future__ import annotations

import math
import os
import resource
import sys
import time

import torch


def memory(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most so far."""
    if os.path.isfile("/proc/self/status"):
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def forget_peak() -> bool:
    """Lets "VmHWM" begin again at what is resident now; False where the system does not do that,
    and the peak of what came before still counts."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return memory("VmHWM") <= 1.02 * memory("VmRSS")


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers; storage shared by several of them counts once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def weight_count(model: torch.nn.Module) -> int:
    """How many numbers the model holds; packed weights count by their shape, tied ones once."""
    from nibblock.nn import Int4Embedding, Int4Linear
    from nibblock.nn._expert_weight import ExpertWeight

    packed = {}
    for module in model.modules():
        if isinstance(module, Int4Linear):
            packed[id(module.packed)] = module.in_features * module.out_features
        elif isinstance(module, Int4Embedding):
            packed[id(module.packed)] = module.num_embeddings * module.embedding_dim
        elif isinstance(module, ExpertWeight):
            packed[id(module.packed)] = module.experts * module._rows * module._columns
    dense = sum(p.numel() for p in model.parameters() if id(p) not in packed)
    return dense + sum(packed.values())


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor, window: int = 512) -> float:
    """exp of the mean negative log-likelihood of each token given those before it in its window.

    Args:
        model: a causal language model of transformers.
        ids: [T] int64, at least two tokens.
        window: tokens a window; windows do not overlap, the first token of each is only read.
    Returns:
        the perplexity; infinite or NaN where the model's output is.
    """
    total, count = 0.0, 0
    for first in range(0, len(ids) - 1, window):
        part = ids[first : first + window]
        if len(part) < 2:
            break
        logits = model(input_ids=part[None], use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum").item()
        count += len(part) - 1
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def decode(
    model: torch.nn.Module, prompt: torch.Tensor, count: int, stop: tuple[int, ...] = ()
) -> tuple[list[int], float]:
    """Greedy continuation with a key-value cache.

    Returns:
        (at most `count` tokens, seconds a token after the prompt was read).
    """
    out = model(input_ids=prompt[None], use_cache=True, logits_to_keep=1)
    token = out.logits[0, -1].argmax()
    tokens = [int(token)]
    start = time.perf_counter()
    while len(tokens) < count and tokens[-1] not in stop:
        out = model(input_ids=token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[0, -1].argmax()
        tokens.append(int(token))
    return tokens, (time.perf_counter() - start) / max(len(tokens) - 1, 1)


@torch.no_grad()
def prefill_seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Seconds to read a prompt of len(ids) tokens and give the first logits."""
    start = time.perf_counter()
    model(input_ids=ids[None], use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start
