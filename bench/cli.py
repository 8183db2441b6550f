"""`python -m nibblock bench`: which benchmark to run."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "int4_linear": ("int4_report", "one layer: ours, dense torch, other int4 libraries, ceilings"),
    "block_sparse_linear": ("block_report", "block-sparse products over density, adapters"),
    "masked_update": ("masked_report", "optimiser steps: dense, blocks, scattered entries"),
    "gpu": ("gpu_suite", "every Triton kernel beside cuBLAS; needs an NVIDIA GPU"),
    "readme": ("readme", "no measurement: writes the results into README.md"),
    "finetune": ("finetune_suite", "fine-tuning: time to quality, memory, files, which blocks"),
    "model": ("model_suite", "SmolLM2-135M: decode, prefill, perplexity, bytes"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark by name; the rest of `argv` goes to it. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m nibblock bench NAME [options]\n")
        for name, (_, what) in BENCHMARKS.items():
            print(f"  {name:12s} {what}")
        print("\n`python -m nibblock bench NAME --help` lists a benchmark's options.")
        return 0 if arguments else 2
    if arguments[0] not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        print(f"bench: name must be one of {known}, got {arguments[0]!r}", file=sys.stderr)
        return 2
    module = importlib.import_module(f".{BENCHMARKS[arguments[0]][0]}", __package__)
    return module.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
