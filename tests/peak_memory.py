"""How much memory loading a model takes, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

_CHILD = """
    import json, sys
    import nibblock as nb
    def peak():  # (ru_maxrss of a child starts at its parent's)
        with open("/proc/self/status") as file:
            return next(int(l.split()[1]) for l in file if l.startswith("VmHWM")) / 1024
    load = getattr(nb, sys.argv[1])
    load(sys.argv[2])  # a tiny model: pays for the imports
    before = peak()
    model = load(sys.argv[3])
    print(json.dumps([peak() - before, sum(p.numel() for p in model.parameters()) / 2**20]))
"""


def peak_of_loading(load: str, tiny: Path, path: Path) -> tuple[float, float]:
    """(MiB that `nb.<load>(path)` adds to the peak, millions (2^20) of numbers and packed bytes
    that the model's Parameters hold)."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_CHILD), load, str(tiny), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    added, held = json.loads(done.stdout.splitlines()[-1])
    return added, held
