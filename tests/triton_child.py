"""Runs the Triton cases in this process and prints one JSON line a case: name, seconds, error.

python tests/triton_child.py interpret NAME ...    on the CPU, through Triton's interpreter
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback

if sys.argv[1] == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"

import importlib

import torch


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        module, _, case = name.partition(":")
        run = importlib.import_module(module).CASES[case]
        start, error = time.perf_counter(), None
        try:
            run(torch.device("cpu"))
        except Exception:  # noqa: BLE001  (reported to the test that asked for this case)
            error = traceback.format_exc()
        seconds = time.perf_counter() - start
        print(json.dumps(dict(name=name, seconds=round(seconds, 3), error=error)), flush=True)


if __name__ == "__main__":
    main()
