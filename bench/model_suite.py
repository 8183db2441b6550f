"""A whole model: SmolLM2-135M from its GGUF file, ours beside transformers dense (and llama.cpp).

Decode (eager, and compiled with a static cache), prefill of 512 tokens, perplexity, bytes in
memory. All models live in one process and take turns, round by round.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import torch

from . import goals, table
from .goals import goal_row
from .machine import Ceilings, OtherLoad, environment
from .timing import Contender, Timing, interleave, median

PROMPT = "The history of the steam engine begins"
DENSE = ("dense fp32", "dense bf16")
PLAIN = ("nibblock fp32", "nibblock bf16")
FUSED = ("nibblock fuse fp32", "nibblock fuse bf16")
FROZEN = " frozen"  # compiled with the weights as constants, so that oneDNN prepacks them


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="nibblock bench model", description="SmolLM2-135M: ours beside transformers dense."
    )
    p.add_argument("--quick", action="store_true", help="fewer rounds and no compiled models")
    p.add_argument("--threads", type=int, default=0, help="threads (default: torch's)")
    p.add_argument("--model", metavar="GGUF", help="another GGUF file of a Llama-family model")
    p.add_argument("--tokens", type=int, default=24, help="tokens decoded in one measurement")
    p.add_argument("--prefill", type=int, default=512, help="tokens of the prefill")
    p.add_argument("--text-tokens", type=int, default=2048, help="tokens of the perplexity text")
    p.add_argument("--rounds", type=int, default=0, help="rounds of each comparison")
    p.add_argument("--no-compile", action="store_true", help="leave out the compiled models")
    p.add_argument("--json", metavar="FILE", help="where the JSON goes (default: bench/results/)")
    return p


def main(argv: list[str]) -> int:
    from .int4_report import output, save

    options = parser().parse_args(argv)
    for name in ("tokens", "prefill", "text_tokens"):
        if getattr(options, name) < 2:
            raise SystemExit(f"bench: {name} must be at least 2, got {getattr(options, name)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    target = output(options.json, "model")
    with torch.no_grad():
        result = run(options)
    show(result)
    save(result, target)
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    from nibblock import _demo as demo
    from nibblock import _measure as measure
    from nibblock.formats.gguf import load_tokenizer

    began, load = time.monotonic(), OtherLoad()
    path = Path(options.model) if options.model else demo.smollm2_path()
    models = load_models(path)
    tokenizer = load_tokenizer(path)
    text = demo.english_text()[: 12 * max(options.text_tokens, options.prefill)]
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids[0]
    rounds = options.rounds or (3 if options.quick else 9)
    ceilings = Ceilings(torch.get_num_threads())
    result: dict[str, Any] = {
        "benchmark": "model",
        "model": path.name,
        "weights": measure.weight_count(models[PLAIN[0]]),
        "environment": environment(),
        "ceilings": {"before": ceilings.all(3)},
        "tokens": options.tokens,
        "prefill_tokens": options.prefill,
        "bytes": {name: measure.model_bytes(m) for name, m in models.items()},
        "perplexity": {},
        "continued": {},
    }
    for name, model in models.items():  # also warms every model up
        print(f"perplexity: {name}", flush=True)
        result["perplexity"][name] = measure.perplexity(model, ids[: options.text_tokens])
        tokens, _ = measure.decode(model, prompt, options.tokens)
        result["continued"][name] = tokenizer.decode(tokens)

    llama = llama_cpp(path, prompt, ids[: options.prefill], options.tokens)
    print("decode, eager", flush=True)
    eager = {
        name: (lambda m=model: measure.decode(m, prompt, options.tokens)[1])
        for name, model in models.items()
    }
    result["decode"] = compare({**eager, **llama["decode"]}, rounds)
    print(f"prefill of {options.prefill}", flush=True)
    prefill = {
        name: (lambda m=model: measure.prefill_seconds(m, ids[: options.prefill]))
        for name, model in models.items()
    }
    result["prefill"] = compare({**prefill, **llama["prefill"]}, max(3, rounds // 2))
    result["llama_cpp"] = llama["why"]
    if options.quick or options.no_compile:
        result["decode_compiled"] = {}
    else:
        print("decode, compiled (compiling takes minutes)", flush=True)
        chosen = {n: m for n, m in models.items() if n not in PLAIN}
        result["decode_compiled"] = decode_compiled(chosen, llama, prompt, options.tokens, rounds)
    result["ceilings"]["after"] = ceilings.all(3)
    result["goals"] = rows(result)
    result["other_load"] = round(load.share(), 3)
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def load_models(path: Path) -> dict[str, torch.nn.Module]:
    from nibblock.formats.gguf import load_gguf, load_gguf_dense

    made: dict[str, torch.nn.Module] = {}
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        print(f"loading {path.name}, {label}", flush=True)
        made[f"dense {label}"] = load_gguf_dense(path, dtype)
        made[f"nibblock {label}"] = load_gguf(path, dtype=dtype)
        made[f"nibblock fuse {label}"] = load_gguf(path, dtype=dtype, fuse=True)
    return {name: made[name].eval() for name in (*DENSE, *PLAIN, *FUSED)}


def compare(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Interleaves functions that return their own seconds."""
    timings = interleave(
        [
            Contender(n, lambda _, f=call: f(), pool=_pool(n), measure=True)
            for n, call in calls.items()
        ],
        rounds=rounds,
        budget=600,
    )
    return {name: seconds_of(t) for name, t in timings.items()}


def seconds_of(t: Timing) -> dict[str, Any]:
    return {"median_s": t.median, "min_s": t.min, "rounds_s": t.rounds}


def _pool(name: str) -> str:
    return "llama.cpp" if name == "llama.cpp" else "torch"


def decode_compiled(
    models: dict[str, torch.nn.Module],
    llama: dict[str, Any],
    prompt: torch.Tensor,
    tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """Seconds a token with torch.compile and a static cache; compiled before anything is timed."""
    calls: dict[str, Callable[[], float]] = {}
    for name, model in models.items():
        for variant in ("", FROZEN) if name in DENSE else ("",):
            print(f"compiling {name}{variant}", flush=True)
            call = _static_decoder(model, prompt, tokens, freeze=variant == FROZEN)
            call()  # compiles
            call()
            calls[name + variant] = call
    return compare({**calls, **llama["decode"]}, rounds)


def _static_decoder(
    model: torch.nn.Module, prompt: torch.Tensor, tokens: int, freeze: bool
) -> Callable[[], float]:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=len(prompt) + tokens)

    def step(token, position):
        out = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        return out.logits[:, -1:].argmax(-1)

    compiled = torch.compile(step, dynamic=False, fullgraph=True, options={"freezing": freeze})

    def run_once() -> float:
        cache.reset()
        at = torch.arange(len(prompt))[None]
        out = model(input_ids=prompt[None], position_ids=at, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        positions = [torch.tensor([[len(prompt) + i]]) for i in range(tokens - 1)]
        start = time.perf_counter()
        for position in positions:
            token = compiled(token, position)
        return (time.perf_counter() - start) / (tokens - 1)

    return run_once


def llama_cpp(path: Path, prompt: torch.Tensor, ids: torch.Tensor, tokens: int) -> dict[str, Any]:
    """llama.cpp on the same file and threads, where its Python package is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return {"why": "llama_cpp is not installed", "decode": {}, "prefill": {}}
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(
        model_path=str(path),
        n_ctx=max(len(ids), len(prompt) + tokens) + 8,
        n_batch=len(ids),
        n_ubatch=len(ids),
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def decode() -> float:
        model.reset()
        model.eval(prompt.tolist())
        start = time.perf_counter()
        for _ in range(tokens - 1):
            model.eval([model.sample(temp=0)])
        return (time.perf_counter() - start) / (tokens - 1)

    def prefill() -> float:
        model.reset()
        start = time.perf_counter()
        model.eval(ids.tolist())
        return time.perf_counter() - start

    return {"why": "", "decode": {"llama.cpp": decode}, "prefill": {"llama.cpp": prefill}}


# --- goals and printing ---------------------------------------------------------------------------


def _best(measured: dict[str, Any], names: Sequence[str]) -> str | None:
    there = [n for n in names if n in measured]
    return min(there, key=lambda n: measured[n]["median_s"]) if there else None


def _speed(
    measured: dict[str, Any], ours: Sequence[str], baseline: Sequence[str]
) -> list[goals.Measured]:
    """The best of ours over the best of the baselines: median over rounds of their ratio."""
    a, b = _best(measured, ours), _best(measured, baseline)
    if a is None or b is None:
        return []
    pairs = zip(measured[a]["rounds_s"], measured[b]["rounds_s"])
    return [(median(v / u for u, v in pairs), f"{a} over {b}")]


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The whole-model CPU rows of this project's goals."""
    decode, compiled, prefill = (result[k] for k in ("decode", "decode_compiled", "prefill"))
    without = result["llama_cpp"] or "not part of this run"
    drift = result["perplexity"][PLAIN[0]] / result["perplexity"][DENSE[0]] - 1
    fp32 = 4 * result["weights"]
    smallest = min(PLAIN, key=lambda n: result["bytes"][n])
    ours16 = (PLAIN[1], FUSED[1])
    dense_compiled = (*DENSE, *(n + FROZEN for n in DENSE))
    return [
        goal_row("decode, eager, vs transformers dense", 2.2, 2.6, _speed(decode, PLAIN, DENSE)),
        goal_row(
            "decode, eager, fuse=True, vs transformers dense",
            2.5,
            2.9,
            _speed(decode, FUSED, DENSE),
        ),
        goal_row(
            "decode, compiled, vs dense compiled", 2.5, 3.5, _speed(compiled, FUSED, dense_compiled)
        ),
        goal_row(
            "decode, compiled, vs llama.cpp",
            1.0,
            1.5,
            _speed(compiled, FUSED, ("llama.cpp",)),
            missing=without,
        ),
        goal_row(
            "prefill, bf16 activations, vs transformers dense bf16",
            1.0,
            1.4,
            _speed(prefill, ours16, DENSE[1:]),
        ),
        goal_row(
            "prefill, bf16 activations, vs llama.cpp",
            8.0,
            12.0,
            _speed(prefill, ours16, ("llama.cpp",)),
            missing=without,
        ),
        goal_row(
            "perplexity of the lossless import vs the dequantised model",
            0.002,
            0.002,
            [(drift, "float32 both")],
            "drift",
            lower=True,
        ),
        goal_row(
            "bytes of float32 over bytes in memory",
            4.5,
            5.5,
            [(fp32 / result["bytes"][smallest], smallest)],
        ),
    ]


def show(result: dict[str, Any]) -> None:
    from .int4_report import closing

    env, tokens = result["environment"], result["prefill_tokens"]
    print(f"\n{result['model']} on {env['cpu']}, {env['isa']}, {env['threads']} threads\n")

    def rate(measured: dict[str, Any], name: str, count: float) -> str:
        return f"{count / measured[name]['median_s']:.1f}" if name in measured else "-"

    lines = []
    for name in (*DENSE, *PLAIN, *FUSED, "llama.cpp"):
        if name not in result["decode"]:
            continue
        known = name in result["bytes"]
        lines.append(
            (
                name,
                f"{result['bytes'][name] / 1e6:.1f}" if known else "-",
                rate(result["decode"], name, 1),
                rate(result["decode_compiled"], name, 1),
                rate(result["prefill"], name, tokens),
                f"{result['perplexity'][name]:.4f}" if known else "-",
            )
        )
    header = ("model", "MB", "decode tok/s", "compiled tok/s", "prefill tok/s", "perplexity")
    print(table.render(header, lines))
    for name in (n + FROZEN for n in DENSE):
        if name in result["decode_compiled"]:
            print(f"{name}: compiled {rate(result['decode_compiled'], name, 1)} tok/s")
    print("\nGoals\n")
    print(goals.render(result["goals"]))
    print(f"\n{closing(result)}")
