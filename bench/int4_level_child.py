"""A child process of int4_suite.run_levels: measures under the limits its environment sets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from .int4_suite import level_cases


def main() -> None:
    target, threads, budget = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(threads)
    Path(target).write_text(json.dumps(level_cases(budget)))


if __name__ == "__main__":
    main()
